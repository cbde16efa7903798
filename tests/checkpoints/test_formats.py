"""Each row of the formats of the field: tiny checkpoints with the exact key names and shapes, read, judged and written back.

The judge is the straight-line reference, which knows what each project's forward does, and transformers' own class where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_dspark.cache.kv_cache import RowCache, RowLayout
from hf_dspark.checkpoints.convert import convert
from hf_dspark.checkpoints.inspect import describe
from hf_dspark.errors import BindingError, CheckpointError
from hf_dspark.models.modeling_dspark import DSparkDrafter
from tests.checkpoints.test_deepspec import HEAD_DIM, HEADS, KV, LAYERS, MLP, TAPS, D, R, V, deepspec_config_json, deepspec_tensors, write
from tests.reference import Gemma4Reference, ReferenceDrafter
from tests.tiny import MASK, VOCAB, tiny_target

EPS, THETA, WINDOW = 1e-6, 5000.0, 6
QWEN3 = {key: value for key, value in deepspec_config_json().items() if key not in ("architectures", "block_size", "mask_token_id")} | {
    "num_target_layers": 4,
}
for _own in (
    *("confidence_head_with_markov", "enable_confidence_head", "markov_head_type", "markov_rank", "num_anchors", "target_layer_ids"),
):
    QWEN3.pop(_own)
NO_COPIES = ("embed_tokens.weight", "lm_head.weight")


def without_copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in NO_COPIES}


def per_query(window: int, causal: bool) -> Callable[[int, int, int], bool]:
    """Keys fewer than `window` positions before the query; nothing behind it where causal."""
    return lambda query, key, anchor: query - key < window and (key <= query or not causal)


# ----------------------------------------------------------------------------------------------------- tiny checkpoints
#
# Each gives: config, tensors as stored, the same under DeepSpec's names, and what its project's forward does: gamma, first slot, what a
# query of a sliding layer sees, head, and whether the confidence head sees the Markov feature.


def deepspec(head: str) -> dict[str, Any]:
    tensors = deepspec_tensors(tiny_target("qwen3"), head)
    config = deepspec_config_json(markov_head_type=head)
    return {"config": config, "stored": tensors, "own": tensors, "gamma": 5, "slot": 0, "head": head, "markov_confidence": True}


def speculators(head: str, *, kind: str = "dspark", reduced: bool = False, sliding: bool = False, old: bool = False) -> dict[str, Any]:
    """`old`: as its releases up to 0.7 wrote it, with copies of the target's matrices, and without `sample_from_anchor`."""
    target = tiny_target("qwen3")
    tensors = deepspec_tensors(target, head, confidence=kind == "dspark")
    ids = torch.arange(1, V, 2)
    stored = tensors if old else without_copies(tensors)
    if reduced:
        if head != "none":
            stored["markov_head.markov_w2.weight"] = tensors["markov_head.markov_w2.weight"][ids].contiguous()
        mask = torch.zeros(V, dtype=torch.bool)
        mask[ids] = True
        copy = target.get_output_embeddings().weight.detach()[ids].contiguous()
        stored |= {"d2t": ids - torch.arange(len(ids)), "t2d": mask, "lm_head.weight": copy}
    layer = {key: value for key, value in QWEN3.items() if key not in ("num_target_layers", "rope_theta", "rope_scaling")}
    layer |= {"model_type": "qwen3", "rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
    if sliding:
        layer |= {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ["sliding_attention"] * LAYERS}
    from_anchor = kind == "dspark"
    config = {
        "architectures": ["DSparkDraftModel" if kind == "dspark" else "DFlashDraftModel"],
        "speculators_model_type": kind,
        "speculators_version": "0.7.0" if old else "0.9.0",
        "transformer_layer_config": layer,
        "draft_vocab_size": len(ids) if reduced else V,
        "block_size": 5,
        "target_hidden_size": D,
        "aux_hidden_state_layer_ids": [i + 1 for i in TAPS],
        "mask_token_id": MASK,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5 if from_anchor else 4}],
            "verifier": {"name_or_path": "some/target", "architectures": ["Qwen3ForCausalLM"]},
        },
        "tie_word_embeddings": False,
    }
    if not old:
        config["sample_from_anchor"] = from_anchor
    if kind == "dspark":
        config |= {"markov_rank": R, "markov_head_type": head, "enable_confidence_head": True, "confidence_head_with_markov": True}
    sees = None
    if sliding:  # the window counts from the anchor for all slots, and the block is causal
        sees = lambda query, key, anchor: key <= query and key >= anchor - WINDOW  # noqa: E731
    return {
        "config": config,
        "stored": stored,
        "own": {**tensors, **{k: v for k, v in stored.items() if "markov_w2" in k}},
        "gamma": 5 if from_anchor else 4,
        "slot": 0 if from_anchor else 1,
        "head": head,
        "markov_confidence": True,
        "draft_ids": ids if reduced else None,
        "sees": sees,
    }


def zlab(*, nested_block: bool = False, sliding: bool = False, causal: bool | None = None) -> dict[str, Any]:
    tensors = without_copies(deepspec_tensors(tiny_target("qwen3"), "none", confidence=False))
    dflash = {"target_layer_ids": TAPS, "mask_token_id": MASK} | ({"block_size": 6} if nested_block else {})
    config = QWEN3 | {"architectures": ["DFlashDraftModel"], "auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, "dflash_config": dflash}
    config |= {} if nested_block else {"block_size": 6}
    if sliding:
        config |= {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ["full_attention", "sliding_attention"]}
    if causal is not None:
        config["is_causal"] = causal
    sees = per_query(WINDOW, causal is not False) if sliding else None
    return {"config": config, "stored": tensors, "own": tensors, "gamma": 5, "slot": 1, "head": "none", "sees": sees, "sliding": [1]}


def specforge(head: str, *, old: bool = False, normalised: bool = False) -> dict[str, Any]:
    tensors = without_copies(deepspec_tensors(tiny_target("qwen3"), head))
    stored = tensors
    if old:
        stored = {("logit_head." + name if name.startswith(("markov_head", "confidence_head")) else name): t for name, t in tensors.items()}
    heads = {"markov_rank": R, "markov_head_type": head, "enable_confidence_head": True, "confidence_head_with_markov": True}
    dflash = {"projector_type": "dspark", "attention_mode": "gqa", "mask_token_id": MASK, "target_layer_ids": TAPS, **heads}
    config = QWEN3 | {"architectures": ["DSparkDraftModel"], "block_size": 5, "dflash_config": dflash}
    if normalised:  # as its script prepares a checkpoint for SGLang
        config |= {"architectures": ["Qwen3DSparkModel"], **heads}
    return {"config": config, "stored": stored, "own": tensors, "gamma": 5, "slot": 0, "head": head, "markov_confidence": True}


def model_optimizer(head: str, *, sliding: bool = False) -> dict[str, Any]:
    tensors = without_copies(deepspec_tensors(tiny_target("qwen3"), head))
    flat = {
        "markov_head.markov_w1.": "markov_w1.",
        "markov_head.markov_w2.": "markov_w2.",
        "markov_head.gate_proj.": "gate_proj.",
        "markov_head.joint_proj.": "joint_proj.",
        "confidence_head.proj.": "confidence_proj.",
    }
    stored = {}
    for name, tensor in tensors.items():
        prefix = next((p for p in flat if name.startswith(p)), None)
        stored[name if prefix is None else flat[prefix] + name[len(prefix) :]] = tensor
    dflash = {"mask_token_id": MASK, "target_layer_ids": TAPS, "projector_type": "dspark", "shift_label": True, "markov_rank": R}
    dflash |= {"markov_head_type": head, "use_confidence_head": True}
    config = QWEN3 | {"architectures": ["DFlashDraftModel"], "block_size": 5, "dflash_config": dflash}
    if sliding:  # on all layers, though layer_types says full
        config["sliding_window"] = WINDOW
        dflash |= {"use_swa": True, "swa_window_size": WINDOW, "causal": False}
    sees = per_query(WINDOW, False) if sliding else None
    return {
        "config": config,
        "stored": stored,
        "own": tensors,
        "gamma": 5,
        "slot": 0,
        "head": head,
        "markov_confidence": True,
        "sees": sees,
    }


def native(*, sliding: bool) -> dict[str, Any]:
    tensors = without_copies(deepspec_tensors(tiny_target("qwen3"), "none", confidence=False))
    names = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    config = {
        "architectures": ["MuseGlimmerAssistantModel"],
        "model_type": "muse_glimmer_assistant",
        "hidden_size": D,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "max_position_embeddings": 512,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention" if sliding else "full_attention"] * LAYERS,
        "block_size": 6,
        "mask_token_id": MASK,
        "target_layer_ids": TAPS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    sees = per_query(WINDOW + 1, False) if sliding else None  # a distance of exactly the window is still seen
    stored = {names.get(name, name): tensor for name, tensor in tensors.items()}
    return {"config": config, "stored": stored, "own": tensors, "gamma": 5, "slot": 1, "head": "none", "sees": sees}


CHECKPOINTS: dict[str, Callable[[], dict[str, Any]]] = {
    "deepspec-vanilla": lambda: deepspec("vanilla"),
    "deepspec-gated": lambda: deepspec("gated"),
    "deepspec-rnn": lambda: deepspec("rnn"),
    "speculators-dspark": lambda: speculators("vanilla"),
    "speculators-dspark-gated": lambda: speculators("gated"),
    "speculators-dspark-rnn": lambda: speculators("rnn"),
    "speculators-dspark-reduced": lambda: speculators("vanilla", reduced=True),
    "speculators-dspark-sliding": lambda: speculators("vanilla", sliding=True),
    "speculators-dspark-old": lambda: speculators("vanilla", old=True),
    "speculators-dflash": lambda: speculators("none", kind="dflash"),
    "speculators-dflash-reduced": lambda: speculators("none", kind="dflash", reduced=True),
    "speculators-dflash-old": lambda: speculators("none", kind="dflash", old=True),
    "zlab": zlab,
    "zlab-nested": lambda: zlab(nested_block=True),
    "zlab-sliding": lambda: zlab(sliding=True),
    "zlab-sliding-bidirectional": lambda: zlab(sliding=True, causal=False),
    "specforge-vanilla": lambda: specforge("vanilla"),
    "specforge-gated": lambda: specforge("gated"),
    "specforge-rnn-old": lambda: specforge("rnn", old=True),
    "specforge-normalised": lambda: specforge("vanilla", normalised=True),
    "model-optimizer-vanilla": lambda: model_optimizer("vanilla"),
    "model-optimizer-gated": lambda: model_optimizer("gated"),
    "model-optimizer-rnn": lambda: model_optimizer("rnn"),
    "model-optimizer-sliding": lambda: model_optimizer("vanilla", sliding=True),
    "transformers-dflash": lambda: native(sliding=False),
    "transformers-dflash-sliding": lambda: native(sliding=True),
}


def reference(found: dict[str, Any], target: torch.nn.Module) -> ReferenceDrafter:
    layers = found.get("sliding", range(LAYERS))
    return ReferenceDrafter(
        found["own"],
        target.get_input_embeddings().weight.detach(),
        target.get_output_embeddings().weight.detach(),
        LAYERS,
        HEADS,
        KV,
        HEAD_DIM,
        EPS,
        THETA,
        found["gamma"],
        MASK,
        found["head"],
        found.get("markov_confidence", False),
        draft_ids=found.get("draft_ids"),
        first_slot=found["slot"],
        sees=None if found.get("sees") is None else dict.fromkeys(layers, found["sees"]),
    )


def judge(drafter: DSparkDrafter, expected: ReferenceDrafter, length: int = 14, tap_width: int = len(TAPS) * D) -> None:
    """Hidden states, logits of a greedy chain and confidences of one block equal the reference's."""
    taps = torch.randn(length, tap_width, generator=torch.Generator().manual_seed(0))
    cache = RowCache()
    cache.add_rows(1)
    with torch.no_grad():
        drafter.extend_context(taps, RowLayout([0], [length]), cache)
        h = drafter.draft_hidden(torch.tensor([9]), [length], cache)
        theirs = expected.hidden(9, taps)
        torch.testing.assert_close(h[0], theirs, rtol=1e-5, atol=2e-5)
        tokens, logits = expected.chain(9, theirs)
        previous = torch.tensor([[9, *tokens[:-1]]])
        own = drafter.base_logits(h)
        if drafter.markov_head is not None:
            own = own + drafter.markov_head.project(drafter.markov_head.block(previous, h))
        torch.testing.assert_close(own[0], logits, rtol=1e-5, atol=5e-5)
        if drafter.confidence_head is not None:
            confidence = expected.confidence(9, tokens, theirs)
            torch.testing.assert_close(drafter.confidence(h, previous)[0], confidence, rtol=1e-5, atol=2e-5)


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_format_drafts_as_its_own_project_does(tmp_path, name: str) -> None:
    """Loaded and bound, each checkpoint gives hidden states, logits and confidences of its project's forward, on the stored weights."""
    found = CHECKPOINTS[name]()
    target = tiny_target("qwen3")
    drafter = DSparkDrafter.from_pretrained(write(tmp_path, found["config"], found["stored"])).bind(target)
    assert drafter.config.block_size == found["gamma"]
    judge(drafter, reference(found, target))


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if "sliding" in name])
def test_sliding_formats_train_as_they_draft(tmp_path, name: str) -> None:
    """`training_hidden` at an anchor equals `draft_hidden` after the context before it, windows and slots included."""
    found = CHECKPOINTS[name]()
    drafter = DSparkDrafter.from_pretrained(write(tmp_path, found["config"], found["stored"])).bind(tiny_target("qwen3"))
    taps = torch.randn(2, 16, len(TAPS) * D, generator=torch.Generator().manual_seed(1))
    anchors = torch.tensor([[3, 11], [8, 14]])
    ids = torch.tensor([[5, 6], [7, 8]])
    with torch.no_grad():
        together = drafter.training_hidden(taps, ids, anchors)
        for row in range(2):
            for i in range(2):
                start = int(anchors[row, i])
                cache = RowCache()
                cache.add_rows(1)
                drafter.extend_context(taps[row, :start], RowLayout([0], [start]), cache)
                alone = drafter.draft_hidden(ids[row, i][None], [start], cache)
                torch.testing.assert_close(together[row, i], alone[0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["zlab", "transformers-dflash-sliding", "speculators-dflash-reduced", "speculators-dspark-sliding"])
def test_generate_with_a_foreign_drafter_gives_plain_text(tmp_path, name: str) -> None:
    """Ragged batches decode to the target's own greedy text, whatever slot predicts first and whatever a layer sees."""
    found = CHECKPOINTS[name]()
    target = tiny_target("qwen3")
    # Bound: one of the formats does not say its vocabulary, and transformers would ask for tokenizers.
    drafter = DSparkDrafter.from_pretrained(write(tmp_path, found["config"], found["stored"])).bind(target)
    ids = torch.tensor([[0, 0, 7, 8, 9], [5, 6, 7, 8, 9]])
    options = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]), "max_new_tokens": 24, "do_sample": False}
    assert torch.equal(target.generate(ids, **options), target.generate(ids, **options, assistant_model=drafter))


@pytest.mark.parametrize("sliding", [False, True])
def test_native_dflash_equals_transformers_own_class(tmp_path, sliding: bool) -> None:
    """The hidden states are those that transformers' MuseGlimmerAssistantModel computes from the same files."""
    from transformers import AutoModel
    from transformers.cache_utils import DFlashCache

    found = native(sliding=sliding)
    target = tiny_target("qwen3")
    folder = write(tmp_path, found["config"], found["stored"])
    theirs = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    drafter = DSparkDrafter.from_pretrained(folder).bind(target)
    taps = torch.randn(1, 12, len(TAPS) * D, generator=torch.Generator().manual_seed(2))
    block = target.get_input_embeddings()(torch.tensor([[9, *[MASK] * 5]]))
    memory = DFlashCache(config=theirs.config)
    memory.activate_past_recording()
    memory.set_previous_accepted_tokens(12)
    cache = RowCache()
    cache.add_rows(1)
    with torch.no_grad():
        expected = theirs(noise_embeds=block, context_hidden_states=taps, past_key_values=memory, use_cache=True).last_hidden_state
        drafter.extend_context(taps[0], RowLayout([0], [12]), cache)
        torch.testing.assert_close(drafter.draft_hidden(torch.tensor([9]), [12], cache), expected[:, 1:], rtol=1e-5, atol=2e-5)


# --------------------------------------------------------------------------------------------------------------- gemma 4


def gemma4(k_eq_v: bool, target: torch.nn.Module) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """DeepSpec's Gemma 4 drafter: global head size 12 on every layer, three query heads to a key head where values are keys."""
    generator = torch.Generator().manual_seed(11)

    def random(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    size, heads, kv = 12, 4, 1 if k_eq_v else 2
    tensors = {
        name: tensor
        for name, tensor in deepspec_tensors(target, "vanilla").items()
        if "self_attn" not in name and not name.startswith("layers")
    }
    for i in range(LAYERS):
        p = f"layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"):
            tensors[f"{p}.{norm}.weight"] = 1 + random(D)
        tensors |= {
            f"{p}.layer_scalar": torch.tensor([0.7 + 0.2 * i]),
            f"{p}.self_attn.q_proj.weight": random(heads * size, D),
            f"{p}.self_attn.k_proj.weight": random(kv * size, D),
            f"{p}.self_attn.o_proj.weight": random(D, heads * size),
            f"{p}.self_attn.q_norm.weight": 1 + random(size),
            f"{p}.self_attn.k_norm.weight": 1 + random(size),
            f"{p}.mlp.gate_proj.weight": random(MLP, D),
            f"{p}.mlp.up_proj.weight": random(MLP, D),
            f"{p}.mlp.down_proj.weight": random(D, MLP),
        }
        if not k_eq_v:
            tensors[f"{p}.self_attn.v_proj.weight"] = random(kv * size, D)
    config = {
        "architectures": ["Gemma4DSparkModel"],
        "model_type": "gemma4_text",
        "target_model_type": "gemma4",
        "target_text_model_type": "gemma4_text",
        "vocab_size": VOCAB,
        "hidden_size": D,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_target_layers": 4,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 8,
        "global_head_dim": size,
        "attention_k_eq_v": k_eq_v,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "enable_moe_block": False,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "max_position_embeddings": 512,
        "rms_norm_eps": EPS,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": THETA},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "layer_types": ["full_attention"] * LAYERS,
        "block_size": 5,
        "mask_token_id": MASK,
        "target_layer_ids": TAPS,
        "num_anchors": 512,
        "tie_word_embeddings": False,
        "markov_rank": R,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }
    return config, tensors


def gemma_target() -> Any:
    """A Gemma target with scaled embeddings and a soft-cap on its logits."""
    target = tiny_target("gemma3")
    target.config.final_logit_softcapping = 2.0
    return target


@pytest.mark.parametrize("k_eq_v", [True, False])
def test_gemma4_backbone_drafts_as_deepspecs_does(tmp_path, k_eq_v: bool) -> None:
    """Four norms, unscaled scores, normed values, partial rotation, layer scalars; soft-cap before the Markov bias, embeddings scaled."""
    target = gemma_target()
    config, tensors = gemma4(k_eq_v, target)
    drafter = DSparkDrafter.from_pretrained(write(tmp_path, config, tensors)).bind(target)
    expected = Gemma4Reference(
        tensors,
        target.get_input_embeddings()(torch.arange(VOCAB)).detach(),
        target.get_output_embeddings().weight.detach(),
        LAYERS,
        4,
        1 if k_eq_v else 2,
        12,
        EPS,
        THETA,
        5,
        MASK,
        "vanilla",
        True,
        activation="gelu",
        softcap=2.0,
        rotated=0.25,
    )
    judge(drafter, expected)
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 16, "do_sample": False}
    assert torch.equal(target.generate(ids, **options), target.generate(ids, **options, assistant_model=drafter))


def test_gemma4_survives_deepspecs_format_and_back(tmp_path) -> None:
    """Written as DeepSpec writes it and read again, weights are bit for bit and drafts equal; speculators cannot hold it."""
    target = gemma_target()
    config, tensors = gemma4(True, target)
    source = write(tmp_path / "source", config, tensors)
    again = DSparkDrafter.from_pretrained(convert(str(source), tmp_path / "again", "deepspec", target=target)).bind(target)
    state = again.state_dict()
    assert all(torch.equal(state[name], tensors[name]) for name in state)
    with pytest.raises(CheckpointError, match="Gemma 4 backbone"):
        convert(str(source), tmp_path / "other", "speculators", target=target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enable_moe_block": True}, "enable_moe_block"),
        ({"hidden_size_per_layer_input": 16}, "hidden_size_per_layer_input"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}}, "proportional"),
    ],
)
def test_gemma4_variants_are_refused(tmp_path, change: dict[str, Any], message: str) -> None:
    """Mixtures of experts, per-layer inputs and other rotations are named, not ignored."""
    config, tensors = gemma4(True, gemma_target())
    with pytest.raises(CheckpointError, match=message):
        DSparkDrafter.from_pretrained(write(tmp_path, config | change, tensors))


# ----------------------------------------------------------------------------------------------------------- refusing


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
    ],
)
def test_what_a_reader_does_not_have_is_refused(tmp_path, make, change: dict[str, Any], message: str) -> None:
    """Keys that would change the meaning of the tensors are named, instead of being left out."""
    found = make()
    with pytest.raises(CheckpointError, match=message):
        DSparkDrafter.from_pretrained(write(tmp_path, found["config"] | change, found["stored"]))


def test_mask_embedding_in_a_pickle_is_refused(tmp_path) -> None:
    """A mask row beside the weights, in a pickle, is neither read nor ignored."""
    found = zlab()
    folder = write(tmp_path, found["config"], found["stored"])
    (folder / "mask_embedding.pt").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"mask_embedding\.pt"):
        DSparkDrafter.from_pretrained(folder)


def test_disagreeing_vocabulary_maps_are_refused(tmp_path) -> None:
    """d2t and t2d must name the same tokens, and d2t must stay inside the target's vocabulary."""
    found = speculators("vanilla", reduced=True)
    stored = found["stored"]
    with pytest.raises(CheckpointError, match="different draft vocabularies"):
        DSparkDrafter.from_pretrained(write(tmp_path / "a", found["config"], stored | {"t2d": stored["t2d"].roll(1)}))
    with pytest.raises(CheckpointError, match="distinct ids"):
        DSparkDrafter.from_pretrained(write(tmp_path / "b", found["config"], stored | {"d2t": stored["d2t"] + V}))


def test_reduced_copies_of_the_head_are_compared_with_the_targets_rows(tmp_path) -> None:
    """A speculators file for other weights of the target is refused when it is bound."""
    found = speculators("vanilla", reduced=True)
    stored = found["stored"] | {"lm_head.weight": found["stored"]["lm_head.weight"] + 0.5}
    drafter = DSparkDrafter.from_pretrained(write(tmp_path, found["config"], stored))
    with pytest.raises(BindingError, match=r"lm_head\.weight"):
        drafter.bind(tiny_target("qwen3"))


def test_native_dflash_is_checked_against_its_target_when_bound(tmp_path) -> None:
    """A format that does not say how deep its target is is refused by a target whose last layer it taps."""
    found = native(sliding=False)
    drafter = DSparkDrafter.from_pretrained(write(tmp_path, found["config"] | {"target_layer_ids": [1, 3]}, found["stored"]))
    with pytest.raises(BindingError, match="last layer"):
        drafter.bind(tiny_target("qwen3"))


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if not name.startswith("model-optimizer-sliding")])
@pytest.mark.parametrize("to", ["hf-dspark", "speculators", "deepspec"])
def test_convert_round_trip_keeps_weights_and_behaviour(tmp_path, name: str, to: str) -> None:
    """Each readable checkpoint, written in each format that can hold it and read again, has the same bits and drafts the same."""
    found = CHECKPOINTS[name]()
    target = tiny_target("qwen3")
    source = write(tmp_path / "source", found["config"], found["stored"])
    first = DSparkDrafter.from_pretrained(source).bind(target)
    holds_not = {
        "deepspec": found["slot"] == 1 or found.get("sees") or found.get("draft_ids") is not None,
        "speculators": found.get("sees") and not name.startswith("speculators"),
        "hf-dspark": False,
    }[to]
    if holds_not:
        with pytest.raises(CheckpointError, match="cannot hold"):
            convert(str(source), tmp_path / "made", to, target=target)
        assert not (tmp_path / "made").exists()
        return
    again = DSparkDrafter.from_pretrained(convert(str(source), tmp_path / "made", to, target=target)).bind(target)
    before, after = first.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    judge(again, reference(found, target))


def test_converted_reduced_vocabulary_holds_the_targets_rows(tmp_path) -> None:
    """speculators' files carry lm_head rows, offsets and a mask that agree, in the dtypes that it checks."""
    found = speculators("vanilla", reduced=True)
    target = tiny_target("qwen3")
    source = write(tmp_path / "source", found["config"], found["stored"])
    own = convert(str(source), tmp_path / "own")
    made = convert(str(own), tmp_path / "made", "speculators", target=target)
    tensors, stored = load_file(made / "model.safetensors"), found["stored"]
    assert tensors.keys() == stored.keys()
    assert all(torch.equal(tensors[key], stored[key]) and tensors[key].dtype == stored[key].dtype for key in stored)
    with pytest.raises(CheckpointError, match="--target"):
        convert(str(own), tmp_path / "none", "speculators")


def test_adapters_and_what_speculators_cannot_say_are_not_converted(tmp_path) -> None:
    """An adapter's folder is refused, and so is a recurrent head behind a slot that does not predict."""
    from hf_dspark.adapters.lora import add_lora
    from tests.tiny import tiny_drafter

    target = tiny_target("qwen3")
    add_lora(tiny_drafter(target), rank=2)
    tiny_drafter(target).save_pretrained(tmp_path / "base")
    add_lora(DSparkDrafter.from_pretrained(tmp_path / "base"), rank=2).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="Merge it first"):
        convert(str(tmp_path / "adapter"), tmp_path / "made", "speculators")
    tiny_drafter(target, "rnn", sample_from_anchor=False).save_pretrained(tmp_path / "rnn")
    with pytest.raises(CheckpointError, match="recurrent head"):
        convert(str(tmp_path / "rnn"), tmp_path / "made", "speculators", target=target)


def test_convert_writes_into_a_new_folder_only(tmp_path) -> None:
    """A folder with files is refused; a format of no name is a ValueError."""
    found = deepspec("vanilla")
    source = write(tmp_path / "source", found["config"], found["stored"])
    with pytest.raises(CheckpointError, match="not empty"):
        convert(str(source), source)
    with pytest.raises(ValueError, match="allowed: hf-dspark"):
        convert(str(source), tmp_path / "x", "gguf")


# -------------------------------------------------------------------------------------------------------- temperatures


@pytest.mark.parametrize(
    "file",
    [
        {"temperatures": [0.5, 0.6, 0.7, 0.8, 0.9], "dataset": "x", "num_samples": 100, "ece_before": [0.1], "ece_after": [0.0]},
        {"sts_temperatures": [0.5, 0.6, 0.7, 0.8, 0.9]},
    ],
)
def test_temperatures_of_sglang_and_tensorrt_are_read(tmp_path, file: dict[str, Any]) -> None:
    """A calibration.json without our format's number is read by the keys that SGLang or TensorRT-LLM write."""
    found = deepspec("vanilla")
    folder = write(tmp_path, found["config"], found["stored"])
    (folder / "calibration.json").write_text(json.dumps(file))
    drafter = DSparkDrafter.from_pretrained(folder)
    assert drafter.config.confidence_temperatures == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert describe(str(folder))["temperatures"] == [0.5, 0.6, 0.7, 0.8, 0.9]


def test_temperatures_in_a_foreign_config_are_read(tmp_path) -> None:
    """`sts_temperatures` of a config.json calibrate as `confidence_temperatures` do, and travel through a conversion."""
    found = speculators("vanilla")
    temperatures = [0.5, 0.6, 0.7, 0.8, 0.9]
    folder = write(tmp_path / "source", found["config"] | {"sts_temperatures": temperatures}, found["stored"])
    assert DSparkDrafter.from_pretrained(folder).config.confidence_temperatures == temperatures
    made = convert(str(folder), tmp_path / "made", "deepspec", target=tiny_target("qwen3"))
    assert json.loads((made / "config.json").read_text())["confidence_temperatures"] == temperatures


# ------------------------------------------------------------------------------------------------------------ describe


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_info_tells_format_block_and_taps_without_weights(tmp_path, name: str) -> None:
    """What `describe` says agrees with the loaded drafter, and needs no more than config and headers."""
    found = CHECKPOINTS[name]()
    folder = write(tmp_path, found["config"], found["stored"])
    drafter = DSparkDrafter.from_pretrained(folder)
    facts = describe(str(folder))
    assert name.startswith(facts["format"].replace("dflash", "zlab") if facts["format"] == "dflash" else facts["format"])
    assert facts["block_size"] == found["gamma"]
    assert facts["first_predicting_slot"] == found["slot"]
    assert facts["taps"] == TAPS
    assert facts["confidence_head"] == (drafter.confidence_head is not None)
    assert facts["parameters"] == sum(tensor.numel() for tensor in found["stored"].values())
