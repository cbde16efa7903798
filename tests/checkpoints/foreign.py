"""Tiny checkpoints in the formats of the field, with the exact key names and shapes, and their judge.

The judge is the straight-line reference, which knows what the forward of each project does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.cache.layout import RowLayout
from hf_dspark.models.modeling_dspark import DSparkDrafter
from tests.reference import ReferenceDrafter
from tests.tiny import HIDDEN, MASK, VOCAB, tiny_target

V, D, R, HEADS, KV, HEAD_DIM, MLP, TAPS, LAYERS = VOCAB, HIDDEN, 6, 4, 2, 8, 48, [0, 2], 2


def deepspec_config_json(**changes: Any) -> dict[str, Any]:
    """config.json as DeepSpec writes it with transformers 4: the target's config and its own keys."""
    return {
        "architectures": ["Qwen3DSparkModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": 5,
        "bos_token_id": 1,
        "confidence_head_with_markov": True,
        "enable_confidence_head": True,
        "eos_token_id": 2,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": D,
        "initializer_range": 0.02,
        "intermediate_size": MLP,
        "layer_types": ["full_attention"] * LAYERS,
        "markov_head_type": "vanilla",
        "markov_rank": R,
        "mask_token_id": MASK,
        "max_position_embeddings": 512,
        "max_window_layers": 36,
        "model_type": "qwen3",
        "num_anchors": 512,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV,
        "num_target_layers": 4,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 5000.0,
        "sliding_window": None,
        "target_layer_ids": TAPS,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.57.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": V,
        **changes,
    }


def deepspec_tensors(target: torch.nn.Module, head: str = "vanilla", confidence: bool = True) -> dict[str, torch.Tensor]:
    """Random weights under the exact names of FORMATS: backbone, heads, embedding and head."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    tensors = {
        "fc.weight": random(D, len(TAPS) * D),
        "hidden_norm.weight": 1 + random(D),
        "norm.weight": 1 + random(D),
        "embed_tokens.weight": target.get_input_embeddings().weight.detach().clone(),
        "lm_head.weight": target.get_output_embeddings().weight.detach().clone(),
    }
    for i in range(LAYERS):
        p = f"layers.{i}"
        tensors |= {
            f"{p}.input_layernorm.weight": 1 + random(D),
            f"{p}.post_attention_layernorm.weight": 1 + random(D),
            f"{p}.self_attn.q_proj.weight": random(HEADS * HEAD_DIM, D),
            f"{p}.self_attn.k_proj.weight": random(KV * HEAD_DIM, D),
            f"{p}.self_attn.v_proj.weight": random(KV * HEAD_DIM, D),
            f"{p}.self_attn.o_proj.weight": random(D, HEADS * HEAD_DIM),
            f"{p}.self_attn.q_norm.weight": 1 + random(HEAD_DIM),
            f"{p}.self_attn.k_norm.weight": 1 + random(HEAD_DIM),
            f"{p}.mlp.gate_proj.weight": random(MLP, D),
            f"{p}.mlp.up_proj.weight": random(MLP, D),
            f"{p}.mlp.down_proj.weight": random(D, MLP),
        }
    if head != "none":
        tensors |= {"markov_head.markov_w1.weight": random(V, R), "markov_head.markov_w2.weight": random(V, R)}
    if head == "gated":
        tensors |= {"markov_head.gate_proj.weight": random(R, D + R), "markov_head.gate_proj.bias": random(R)}
    if head == "rnn":
        tensors |= {
            "markov_head.joint_proj.weight": random(3 * R, 2 * R + D),
            "markov_head.joint_proj.bias": random(3 * R),
        }
    if confidence:
        tensors |= {"confidence_head.proj.weight": random(1, D + R), "confidence_head.proj.bias": random(1)}
    return tensors


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


EPS, THETA, WINDOW = 1e-6, 5000.0, 6
_HEADS = ("confidence_head_with_markov", "enable_confidence_head", "markov_head_type", "markov_rank", "num_anchors", "target_layer_ids")
_OWN = ("architectures", "block_size", "mask_token_id", *_HEADS)
QWEN3 = {key: value for key, value in deepspec_config_json().items() if key not in _OWN} | {"num_target_layers": 4}
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
    "speculators-dspark-rnn": lambda: speculators("rnn"),
    "speculators-dspark-reduced": lambda: speculators("vanilla", reduced=True),
    "speculators-dspark-sliding": lambda: speculators("vanilla", sliding=True),
    "speculators-dspark-old": lambda: speculators("vanilla", old=True),
    "speculators-dflash-reduced": lambda: speculators("none", kind="dflash", reduced=True),
    "speculators-dflash-old": lambda: speculators("none", kind="dflash", old=True),
    "zlab": zlab,
    "zlab-nested": lambda: zlab(nested_block=True),
    "zlab-sliding": lambda: zlab(sliding=True),
    "zlab-sliding-bidirectional": lambda: zlab(sliding=True, causal=False),
    "specforge-vanilla": lambda: specforge("vanilla"),
    "specforge-rnn-old": lambda: specforge("rnn", old=True),
    "specforge-normalised": lambda: specforge("vanilla", normalised=True),
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
