"""Every format of the field, read, judged and written back."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_dspark.adapters.lora import add_lora
from hf_dspark.checkpoints.convert import convert
from hf_dspark.checkpoints.inspect import describe
from hf_dspark.errors import BindingError, CheckpointError
from hf_dspark.models.modeling_dspark import DSparkDrafter
from tests.checkpoints.foreign import (
    CHECKPOINTS,
    EPS,
    LAYERS,
    TAPS,
    THETA,
    D,
    V,
    deepspec,
    gemma4,
    gemma_target,
    judge,
    native,
    reference,
    specforge,
    speculators,
    write,
    zlab,
)
from tests.helpers import needs_adapters
from tests.models.drafting import draft
from tests.reference import Gemma4Reference
from tests.tiny import MASK, VOCAB, tiny_drafter, tiny_target

TEMPERATURES = [0.5, 0.6, 0.7, 0.8, 0.9]


def load(folder: Any) -> DSparkDrafter:
    return DSparkDrafter.from_pretrained(folder)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_format_drafts_as_its_own_project_and_survives_conversion(tmp_path, name: str) -> None:
    """Hidden states, logits and confidences are those of its project's forward; written in each format that can hold it and read again,
    weights are the same bits and drafts the same; `describe` says what was loaded."""
    found, target = CHECKPOINTS[name](), tiny_target("qwen3")
    source = write(tmp_path / "source", found["config"], found["stored"])
    drafter = load(source)
    weights, expected = drafter.state_dict(), reference(found, target)
    facts = describe(str(source))
    assert name.startswith(facts["format"].replace("dflash", "zlab") if facts["format"] == "dflash" else facts["format"])
    assert (facts["block_size"], facts["first_predicting_slot"], facts["taps"]) == (found["gamma"], found["slot"], TAPS)
    assert facts["confidence_head"] == (drafter.confidence_head is not None)
    assert facts["parameters"] == sum(tensor.numel() for tensor in found["stored"].values())
    assert drafter.config.block_size == found["gamma"]
    judge(drafter.bind(target), expected)
    cannot = {
        "hf-dspark": False,
        "deepspec": found["slot"] == 1 or found.get("sees") or found.get("draft_ids") is not None,
        "speculators": found.get("sees") and not name.startswith("speculators"),
    }
    for to, refused in cannot.items():
        made = tmp_path / to
        if refused:
            with pytest.raises(CheckpointError, match="cannot hold"):
                convert(load(source), made, to, target=target)
            assert not made.exists()
            continue
        again = load(convert(load(source), made, to, target=target)).bind(target)
        assert again.state_dict().keys() == weights.keys()
        assert all(torch.equal(tensor, weights[key]) for key, tensor in again.state_dict().items())
        judge(again, expected)


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if "sliding" in name])
def test_sliding_formats_train_as_they_draft(tmp_path, name: str) -> None:
    """`training_hidden` at an anchor equals `draft_hidden` after the context before it, windows and slots included."""
    found = CHECKPOINTS[name]()
    drafter = load(write(tmp_path, found["config"], found["stored"])).bind(tiny_target("qwen3"))
    taps = torch.randn(2, 16, len(TAPS) * D, generator=torch.Generator().manual_seed(1))
    anchors = torch.tensor([[3, 11], [8, 14]])
    ids = torch.tensor([[5, 6], [7, 8]])
    with torch.no_grad():
        together = drafter.training_hidden(taps, ids, anchors)
        for row in range(2):
            for i in range(2):
                alone = draft(drafter, [taps[row, : int(anchors[row, i])]], [int(ids[row, i])])
                torch.testing.assert_close(together[row, i], alone[0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["zlab", "transformers-dflash-sliding", "speculators-dflash-reduced", "speculators-dspark-sliding"])
def test_generate_with_a_foreign_drafter_gives_plain_text(tmp_path, name: str) -> None:
    """Ragged batches decode to the target's own greedy text, whatever slot predicts first and whatever a layer sees."""
    found, target = CHECKPOINTS[name](), tiny_target("qwen3")
    # Bound: one of the formats does not say its vocabulary, and transformers would ask for tokenizers.
    drafter = load(write(tmp_path, found["config"], found["stored"])).bind(target)
    ids = torch.tensor([[0, 0, 7, 8, 9], [5, 6, 7, 8, 9]])
    options = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]), "max_new_tokens": 24, "do_sample": False}
    assert torch.equal(target.generate(ids, **options), target.generate(ids, **options, assistant_model=drafter))


@pytest.mark.parametrize("sliding", [False, True])
def test_native_dflash_equals_transformers_own_class(tmp_path, sliding: bool) -> None:
    """The hidden states are those that transformers' MuseGlimmerAssistantModel computes from the same files."""
    from transformers import AutoModel
    from transformers.cache_utils import DFlashCache

    found, target = native(sliding=sliding), tiny_target("qwen3")
    folder = write(tmp_path, found["config"], found["stored"])
    theirs = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    drafter = load(folder).bind(target)
    taps = torch.randn(1, 12, len(TAPS) * D, generator=torch.Generator().manual_seed(2))
    block = target.get_input_embeddings()(torch.tensor([[9, *[MASK] * 5]]))
    memory = DFlashCache(config=theirs.config)
    memory.activate_past_recording()
    memory.set_previous_accepted_tokens(12)
    with torch.no_grad():
        expected = theirs(noise_embeds=block, context_hidden_states=taps, past_key_values=memory, use_cache=True).last_hidden_state
        torch.testing.assert_close(draft(drafter, [taps[0]], [9]), expected[:, 1:], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("k_eq_v", [True, False])
def test_gemma4_backbone_drafts_as_deepspecs_does(tmp_path, k_eq_v: bool) -> None:
    """Four norms, unscaled scores, normed values, partial rotation, layer scalars; soft-cap before the Markov bias, embeddings scaled.
    Written as DeepSpec writes it and read again, weights are the same bits; speculators cannot hold it."""
    target = gemma_target()
    config, tensors = gemma4(k_eq_v, target)
    source = write(tmp_path / "source", config, tensors)
    drafter = load(source).bind(target)
    embedding, head = target.get_input_embeddings()(torch.arange(VOCAB)).detach(), target.get_output_embeddings().weight.detach()
    shape = (LAYERS, 4, 1 if k_eq_v else 2, 12, EPS, THETA, 5, MASK, "vanilla", True)
    judge(drafter, Gemma4Reference(tensors, embedding, head, *shape, activation="gelu", softcap=2.0, rotated=0.25))
    ids, options = torch.tensor([[5, 6, 7, 8]]), {"max_new_tokens": 16, "do_sample": False}
    assert torch.equal(target.generate(ids, **options), target.generate(ids, **options, assistant_model=drafter))
    state = load(convert(load(source), tmp_path / "again", "deepspec", target=target)).bind(target).state_dict()
    assert all(torch.equal(state[name], tensors[name]) for name in state)
    with pytest.raises(CheckpointError, match="Gemma 4 backbone"):
        convert(load(source), tmp_path / "other", "speculators", target=target)


def plain() -> dict[str, Any]:
    return deepspec("vanilla")


def gemma() -> dict[str, Any]:
    config, tensors = gemma4(True, gemma_target())
    return {"config": config, "stored": tensors}


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (zlab, {"is_causal": True}, "causal blocks"),
        (zlab, {"dflash_config": {"target_layer_ids": TAPS, "mask_token_id": MASK, "output_multiplier": 0.2}}, "output_multiplier"),
        (zlab, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (zlab, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (lambda: specforge("vanilla"), {"dflash_config": {"projector_type": "other"}}, "projector_type"),
        (lambda: speculators("vanilla", old=True), {"speculators_config": {"proposal_methods": []}}, "which slot predicts first"),
        (lambda: speculators("rnn"), {"sample_from_anchor": False}, "recurrent head"),
        (lambda: native(sliding=False), {"is_causal": True}, "causal blocks"),
        (gemma, {"enable_moe_block": True}, "enable_moe_block"),
        (gemma, {"hidden_size_per_layer_input": 16}, "hidden_size_per_layer_input"),
        (gemma, {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}}, "proportional"),
        (plain, {"sample_from_anchor": True}, "sample_from_anchor"),
        (plain, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (plain, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (plain, {"mask_token_id": V}, r"mask_token_id must be a row .* got 97"),
        (plain, {"target_layer_ids": [1, 3]}, "must not hold the last layer"),
        (plain, {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "sliding_attention"),
    ],
)
def test_what_a_reader_does_not_have_is_refused(tmp_path, make, change: dict[str, Any], message: str) -> None:
    """Keys that would change the meaning of the tensors are named, instead of being left out, and so are values out of range."""
    found = make()
    with pytest.raises(CheckpointError, match=message):
        load(write(tmp_path, found["config"] | change, found["stored"]))


def test_mask_embedding_in_a_pickle_is_refused(tmp_path) -> None:
    """A mask row beside the weights, in a pickle, is neither read nor ignored."""
    found = zlab()
    folder = write(tmp_path, found["config"], found["stored"])
    (folder / "mask_embedding.pt").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"mask_embedding\.pt"):
        load(folder)


def test_reduced_vocabularies_must_agree_with_themselves_and_the_target(tmp_path) -> None:
    """d2t and t2d name the same tokens inside the target's vocabulary, and the copied rows of the head are the target's."""
    found = speculators("vanilla", reduced=True)
    config, stored = found["config"], found["stored"]
    with pytest.raises(CheckpointError, match="different draft vocabularies"):
        load(write(tmp_path / "a", config, stored | {"t2d": stored["t2d"].roll(1)}))
    with pytest.raises(CheckpointError, match="distinct ids"):
        load(write(tmp_path / "b", config, stored | {"d2t": stored["d2t"] + V}))
    drafter = load(write(tmp_path / "c", config, stored | {"lm_head.weight": stored["lm_head.weight"] + 0.5}))
    with pytest.raises(BindingError, match=r"lm_head\.weight"):
        drafter.bind(tiny_target("qwen3"))


def test_converted_reduced_vocabulary_holds_the_targets_rows(tmp_path) -> None:
    """speculators' files hold lm_head rows, offsets and a mask that agree, in the dtypes that it checks."""
    found, target = speculators("vanilla", reduced=True), tiny_target("qwen3")
    own = convert(load(write(tmp_path / "source", found["config"], found["stored"])), tmp_path / "own")
    made = convert(load(own), tmp_path / "made", "speculators", target=target)
    tensors, stored = load_file(made / "model.safetensors"), found["stored"]
    assert tensors.keys() == stored.keys()
    assert all(torch.equal(tensors[key], stored[key]) and tensors[key].dtype == stored[key].dtype for key in stored)
    with pytest.raises(CheckpointError, match="--target"):
        convert(load(own), tmp_path / "none", "speculators")


@needs_adapters
def test_what_cannot_be_converted_is_refused(tmp_path) -> None:
    """An adapter, a recurrent head behind a slot that does not predict, a folder with files, and a format of no name."""
    target = tiny_target("qwen3")
    with pytest.raises(CheckpointError, match="Merge it first"):
        convert(add_lora(tiny_drafter(target), rank=2), tmp_path / "made", "speculators")
    with pytest.raises(CheckpointError, match="recurrent head"):
        convert(tiny_drafter(target, "rnn", sample_from_anchor=False), tmp_path / "made", "speculators", target=target)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        convert(tiny_drafter(target), tmp_path / "full")
    with pytest.raises(ValueError, match="allowed: hf-dspark"):
        convert(tiny_drafter(target), tmp_path / "made", "gguf")
    assert not (tmp_path / "made").exists()


@needs_adapters
def test_written_files_follow_the_umask(tmp_path) -> None:
    """Saved drafters, adapters and conversions can be read by whom the umask lets read."""
    target = tiny_target("qwen3")
    drafter = tiny_drafter(target)
    (tmp_path / "reference").touch()
    drafter.save_pretrained(tmp_path / "saved")
    convert(drafter, tmp_path / "made", "deepspec", target=target)
    add_lora(tiny_drafter(target), rank=2).save_pretrained(tmp_path / "adapter")
    modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "reference").stat().st_mode}


@pytest.mark.parametrize(
    "file",
    [
        {"temperatures": TEMPERATURES, "dataset": "x", "num_samples": 100, "ece_before": [0.1], "ece_after": [0.0]},
        {"sts_temperatures": TEMPERATURES},
    ],
)
def test_temperatures_of_sglang_and_tensorrt_are_read(tmp_path, file: dict[str, Any]) -> None:
    """A calibration.json without our format's number is read by the keys that SGLang or TensorRT-LLM write."""
    found = deepspec("vanilla")
    folder = write(tmp_path, found["config"], found["stored"])
    (folder / "calibration.json").write_text(json.dumps(file))
    assert load(folder).config.confidence_temperatures == TEMPERATURES
    assert describe(str(folder))["temperatures"] == TEMPERATURES


def test_temperatures_in_a_foreign_config_are_read(tmp_path) -> None:
    """`sts_temperatures` of a config.json calibrate as `confidence_temperatures` do, and travel through a conversion."""
    found = speculators("vanilla")
    folder = write(tmp_path / "source", found["config"] | {"sts_temperatures": TEMPERATURES}, found["stored"])
    assert load(folder).config.confidence_temperatures == TEMPERATURES
    made = convert(load(folder), tmp_path / "made", "deepspec", target=tiny_target("qwen3"))
    assert json.loads((made / "config.json").read_text())["confidence_temperatures"] == TEMPERATURES
