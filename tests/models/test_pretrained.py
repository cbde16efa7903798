"""Saving a drafter, and loading it strictly."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from hf_dspark.configuration_dspark import DSparkConfig
from hf_dspark.errors import CheckpointError
from hf_dspark.models.modeling_dspark import DSparkDrafter
from tests.models.drafting import draft, random_taps
from tests.tiny import tiny_drafter, tiny_llama


def same_weights(a: DSparkDrafter, b: DSparkDrafter) -> bool:
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize(("head", "reduced"), [("gated", True), ("rnn", False), ("none", False)])
def test_save_and_load_round_trip(tmp_path, head: str, reduced: bool) -> None:
    """Every tensor comes back bit for bit, none is an embedding or head, and the loaded drafter drafts the same."""
    target = tiny_llama()
    drafter = tiny_drafter(target, head, draft_token_ids=torch.arange(0, 90, 2) if reduced else None)
    drafter.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    assert stored == set(drafter.state_dict())
    assert not [key for key in stored if "embed_tokens" in key or "lm_head" in key or "inv_freq" in key]
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is DSparkDrafter
    assert type(AutoConfig.from_pretrained(tmp_path)) is DSparkConfig
    assert same_weights(drafter, loaded)
    assert all(p.requires_grad for p in loaded.parameters())
    assert not loaded.training
    taps = random_taps(drafter, 4)
    torch.testing.assert_close(draft(loaded.bind(target), [taps], [5]), draft(drafter, [taps], [5]))


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 4.0), (torch.bfloat16, None)])
def test_frequencies_are_right_just_after_loading(tmp_path, dtype: torch.dtype, factor: float | None) -> None:
    """Buffers that no file holds are computed on loading, exactly theta^(-2i/D) in float32, also for scaled RoPE."""
    scaling = {"rope_type": "default"} if factor is None else {"rope_type": "linear", "factor": factor}
    tiny_drafter(tiny_llama(), rope_parameters={**scaling, "rope_theta": 500.0}, dtype=dtype).save_pretrained(tmp_path)
    loaded = DSparkDrafter.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    expected = 500.0 ** (-torch.arange(0, 8, 2) / 8.0) / (factor or 1.0)
    torch.testing.assert_close(loaded.rotary_emb.inv_freq, expected)
    torch.testing.assert_close(loaded.rotary_emb.original_inv_freq, expected)


def test_loading_in_another_dtype(tmp_path) -> None:
    """dtype= casts the parameters and leaves integer buffers integers."""
    tiny_drafter(tiny_llama(), draft_token_ids=torch.arange(40)).save_pretrained(tmp_path)
    loaded = DSparkDrafter.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.fc.weight.dtype == torch.bfloat16
    assert loaded.d2t.dtype == torch.int64


def test_a_partial_own_checkpoint_is_refused_with_a_full_list(tmp_path) -> None:
    """Missing, unexpected, mis-shaped and mis-typed tensors are all named in one CheckpointError."""
    tiny_drafter(tiny_llama(), "gated", draft_token_ids=torch.arange(40)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["fc.weight"], tensors["layers.1.mlp.up_proj.weight"]
    tensors["layers.2.mlp.up_proj.weight"] = torch.zeros(3)
    tensors["hidden_norm.weight"] = torch.zeros(5)
    tensors["d2t"] = torch.zeros(40)
    tensors["norm.weight"] = torch.zeros(32, dtype=torch.int8)  # quantized
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        DSparkDrafter.from_pretrained(tmp_path)
    for line in (
        "2 missing, 1 unexpected, 1 mis-shaped, 2 mis-typed",
        "missing: fc.weight (32, 64)",
        "missing: layers.1.mlp.up_proj.weight",
        "unexpected: layers.2.mlp.up_proj.weight",
        "mis-shaped: hidden_norm.weight is (5,), expected (32,)",
        "mis-typed: d2t is F32, expected integers",
        "mis-typed: norm.weight is I8, expected floating point",
    ):
        assert line in str(caught.value)


def test_a_config_that_would_be_filled_with_defaults_is_refused(tmp_path) -> None:
    """Keys missing from config.json are named, instead of taking defaults of another model."""
    tiny_drafter(tiny_llama()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["target_layer_ids"], config["mask_token_id"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="lacks target_layer_ids, mask_token_id"):
        DSparkDrafter.from_pretrained(tmp_path)


def test_loading_with_a_longer_block_is_refused(tmp_path) -> None:
    """Overriding block_size upwards is a ValueError; downwards it loads."""
    tiny_drafter(tiny_llama()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1\.\.5"):
        DSparkDrafter.from_pretrained(tmp_path, block_size=6)
    assert DSparkDrafter.from_pretrained(tmp_path, block_size=3).config.block_size == 3
