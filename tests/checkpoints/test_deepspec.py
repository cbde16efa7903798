"""DeepSpec's checkpoints in, everything else refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_dspark.errors import BindingError, CheckpointError
from hf_dspark.models.modeling_dspark import DSparkDrafter
from tests.checkpoints.foreign import deepspec_config_json, deepspec_tensors, write
from tests.tiny import tiny_target


@pytest.fixture
def target():
    return tiny_target("qwen3")


def test_a_sharded_deepspec_checkpoint_loads_bit_for_bit(tmp_path, target) -> None:
    """Every tensor of backbone and heads is the stored one, and the copies of embedding and head are not loaded, nor saved again."""
    tensors = deepspec_tensors(target, "rnn")
    drafter = DSparkDrafter.from_pretrained(write(tmp_path, deepspec_config_json(markov_head_type="rnn"), tensors, shards=3))
    state = drafter.state_dict()
    assert set(tensors) - set(state) == {"embed_tokens.weight", "lm_head.weight"}
    assert set(state) <= set(tensors)
    assert all(torch.equal(state[name], tensors[name]) for name in state)
    assert not drafter.bound
    assert drafter.config.target_model_type == "qwen3"
    drafter.bind(target).save_pretrained(tmp_path / "own")
    again = DSparkDrafter.from_pretrained(tmp_path / "own")
    assert again.config.architectures == ["DSparkDrafter"]
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in state.items())


def test_a_deepspec_dflash_checkpoint_loads(tmp_path, target) -> None:
    """markov_rank 0 without head keys is the DFlash variant: no sequential head, no confidence head."""
    config = deepspec_config_json(markov_rank=0, enable_confidence_head=False)
    del config["markov_head_type"], config["confidence_head_with_markov"]
    drafter = DSparkDrafter.from_pretrained(write(tmp_path, config, deepspec_tensors(target, "none", confidence=False)))
    assert drafter.markov_head is None
    assert drafter.confidence_head is None
    assert drafter.bind(target).bound


def test_the_stored_dtype_is_kept(tmp_path, target) -> None:
    """bfloat16 files give bfloat16 parameters, whatever the config says, and bind to a float32 target."""
    tensors = {name: t.to(torch.bfloat16) for name, t in deepspec_tensors(target).items()}
    drafter = DSparkDrafter.from_pretrained(write(tmp_path, deepspec_config_json(), tensors))
    assert {p.dtype for p in drafter.parameters()} == {torch.bfloat16}
    assert all(torch.equal(p, tensors[name]) for name, p in drafter.state_dict().items())
    assert drafter.bind(target).bound
    assert DSparkDrafter.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_rope_is_read_from_either_place(tmp_path, target) -> None:
    """rope_parameters wins over nothing, and the older rope_theta with rope_scaling is understood."""
    tensors = deepspec_tensors(target)
    config = deepspec_config_json(rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    del config["rope_theta"], config["rope_scaling"]
    assert DSparkDrafter.from_pretrained(write(tmp_path / "a", config, tensors)).config.rope_parameters["rope_theta"] == 777.0
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
    old = DSparkDrafter.from_pretrained(write(tmp_path / "b", deepspec_config_json(rope_scaling=scaling), tensors))
    assert old.config.rope_parameters["rope_theta"] == 5000.0
    assert old.config.rope_parameters["factor"] == 2.0


@pytest.mark.parametrize("key", ["embed_tokens.weight", "lm_head.weight"])
def test_binding_to_another_target_than_the_files_is_refused(tmp_path, target, key: str) -> None:
    """A copy that differs from the target's weights is refused by name; the right target still binds after that."""
    tensors = deepspec_tensors(target)
    drafter = DSparkDrafter.from_pretrained(write(tmp_path, deepspec_config_json(), tensors))
    other = tiny_target("qwen3")
    module = other.get_input_embeddings() if key.startswith("embed") else other.get_output_embeddings()
    with torch.no_grad():
        module.weight[50, 3] += 0.1
    with pytest.raises(BindingError, match=key):
        drafter.bind(other)
    assert not drafter.bound
    assert drafter.bind(target).bound


def test_a_missing_shard_is_refused(tmp_path, target) -> None:
    """A shard that the index names but the folder lacks is named, with every tensor in it; so is a copy that is not there."""
    tensors = deepspec_tensors(target)
    write(tmp_path, deepspec_config_json(), tensors, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"Missing files: model-00002-of-00003\.safetensors") as caught:
        DSparkDrafter.from_pretrained(tmp_path)
    assert all(f"missing: {name}" in str(caught.value) for name in sorted(tensors)[1::3])
    del tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        DSparkDrafter.from_pretrained(write(tmp_path / "copy", deepspec_config_json(), tensors, shards=3))


def test_incomplete_deepspec_config_lists_its_missing_keys(tmp_path, target) -> None:
    """Keys that the tensors' meaning depends on are required, all of them named at once."""
    config = deepspec_config_json()
    del config["target_layer_ids"], config["rope_theta"], config["confidence_head_with_markov"]
    with pytest.raises(CheckpointError) as caught:
        DSparkDrafter.from_pretrained(write(tmp_path, config, deepspec_tensors(target)))
    assert "target_layer_ids, confidence_head_with_markov, rope_theta (or rope_parameters)" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["DFlash2DraftModel"], "model_type": "qwen3"}, "DFlash 2.*Readable are"),
        ({"architectures": ["DFlashDraftModel"], "dflash_config": {"projector_type": "domino"}}, "Domino.*Readable are"),
        ({"speculators_model_type": "eagle3"}, "no DSpark or DFlash drafter.*Readable are"),
        ({"architectures": ["DeepseekV4ForCausalLM"], "dspark_block_size": 5, "dspark_markov_rank": 256}, "DeepSeek-V4.*Readable are"),
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, "a target model.*Readable are"),
        ({"architectures": ["Qwen3Eagle3Model"], "model_type": "qwen3"}, "unknown format.*Readable are"),
        ({"architectures": ["Gemma4DSparkModel"], "model_type": "gemma4_text"}, "Gemma4DSparkModel.*Missing keys"),
        ({"architectures": ["DFlashDraftModel"], "dflash_config": {"mask_token_id": 1}}, "z-lab DFlashDraftModel.*Missing keys"),
        ({"architectures": ["DFlashDraftModel"], "dflash_config": {"projector_type": "dspark"}}, "Model-Optimizer.*Missing keys"),
        ({"architectures": ["DSparkDraftModel"], "dflash_config": {}}, "SpecForge.*Missing keys"),
        ({"architectures": ["DSparkSpeculator"], "speculators_model_type": "dspark"}, "speculators.*Missing keys"),
        ({"model_type": "muse_glimmer_assistant"}, "muse_glimmer_assistant.*Missing keys"),
    ],
)
def test_other_formats_and_incomplete_configs_are_refused_by_name(tmp_path, config: dict[str, Any], message: str) -> None:
    """Each format of the wild that is not readable is named, with those that are; a readable one that lacks a key, with that key."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        DSparkDrafter.from_pretrained(tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path, target) -> None:
    """Weights without a config.json are refused, instead of being given a default config."""
    save_file(deepspec_tensors(target), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        DSparkDrafter.from_pretrained(tmp_path)
