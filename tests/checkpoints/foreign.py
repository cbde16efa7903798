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

from hf_dspark.models.modeling_dspark import DSparkDrafter
from tests.models.drafting import draft
from tests.reference import ReferenceDrafter
from tests.tiny import HIDDEN, MASK, VOCAB, tiny_target

V, D, R, HEADS, KV, HEAD_DIM, MLP, TAPS, LAYERS = VOCAB, HIDDEN, 6, 4, 2, 8, 48, [0, 2], 2
EPS, THETA, WINDOW = 1e-6, 5000.0, 6

# config.json as DeepSpec writes it with transformers 4: the target's config and its own keys.
_DEEPSPEC = """{
    "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "rope_scaling": null,
    "initializer_range": 0.02, "max_position_embeddings": 512, "max_window_layers": 36, "model_type": "qwen3", "num_target_layers": 4,
    "rms_norm_eps": 1e-6, "rope_theta": 5000.0, "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "float32",
    "transformers_version": "4.57.1", "use_cache": true, "use_sliding_window": false
}"""
SHAPE = {"vocab_size": V, "hidden_size": D, "intermediate_size": MLP, "num_hidden_layers": LAYERS}
SHAPE |= {"num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": HEAD_DIM}
QWEN3: dict[str, Any] = {**json.loads(_DEEPSPEC), **SHAPE, "layer_types": ["full_attention"] * LAYERS}
HEAD_FIELDS = {"markov_rank": R, "markov_head_type": "vanilla", "enable_confidence_head": True, "confidence_head_with_markov": True}
BLOCK_FIELDS = {"block_size": 5, "mask_token_id": MASK, "target_layer_ids": TAPS}


def deepspec_config_json(**changes: Any) -> dict[str, Any]:
    return {"architectures": ["Qwen3DSparkModel"], **QWEN3, **HEAD_FIELDS, **BLOCK_FIELDS, "num_anchors": 512, **changes}


def layer_shapes(size: int = HEAD_DIM, kv: int = KV) -> dict[str, tuple[int, ...]]:
    """Parameters of a layer that Qwen3's and Gemma 4's have."""
    norms = {f"{name}.weight": (D,) for name in ("input_layernorm", "post_attention_layernorm")}
    norms |= {f"self_attn.{name}.weight": (size,) for name in ("q_norm", "k_norm")}
    attention = {"q_proj": (HEADS * size, D), "k_proj": (kv * size, D), "v_proj": (kv * size, D), "o_proj": (D, HEADS * size)}
    mlp = {"gate_proj": (MLP, D), "up_proj": (MLP, D), "down_proj": (D, MLP)}
    parts = (("self_attn", attention), ("mlp", mlp))
    return norms | {f"{part}.{name}.weight": shape for part, shapes in parts for name, shape in shapes.items()}


def deepspec_tensors(
    target: torch.nn.Module, head: str = "vanilla", confidence: bool = True, layer: dict[str, tuple[int, ...]] | None = None
) -> dict[str, torch.Tensor]:
    """Random weights under the exact names of FORMATS: backbone, heads, embedding and head."""
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (D, len(TAPS) * D), "hidden_norm.weight": (D,), "norm.weight": (D,)}
    shapes |= {f"layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in (layer or layer_shapes()).items()}
    heads: dict[str, dict[str, tuple[int, ...]]] = {
        "none": {},
        "vanilla": {},
        "gated": {"gate_proj.weight": (R, D + R), "gate_proj.bias": (R,)},
        "rnn": {"joint_proj.weight": (3 * R, 2 * R + D), "joint_proj.bias": (3 * R,)},
    }
    both = {} if head == "none" else {"markov_w1.weight": (V, R), "markov_w2.weight": (V, R)}
    shapes |= {f"markov_head.{name}": shape for name, shape in (both | heads[head]).items()}
    shapes |= {"confidence_head.proj.weight": (1, D + R), "confidence_head.proj.bias": (1,)} if confidence else {}
    generator = torch.Generator().manual_seed(7)
    tensors = {name: 0.3 * torch.randn(*shape, generator=generator) + ("norm" in name) for name, shape in shapes.items()}
    copies = {"embed_tokens.weight": target.get_input_embeddings(), "lm_head.weight": target.get_output_embeddings()}
    return tensors | {name: module.weight.detach().clone() for name, module in copies.items()}


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


NO_COPIES = ("embed_tokens.weight", "lm_head.weight")


def without_copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in NO_COPIES}


def per_query(window: int, causal: bool) -> Callable[[int, int, int], bool]:
    """Keys fewer than `window` positions before the query; nothing behind it where causal."""
    return lambda query, key, anchor: query - key < window and (key <= query or not causal)


def made(config: dict[str, Any], stored: dict[str, torch.Tensor], head: str, *, slot: int = 0, **more: Any) -> dict[str, Any]:
    """A tiny checkpoint: config, tensors as stored, the same under DeepSpec's names (`own`), and what its project's forward does: gamma,
    first slot, what a query of a sliding layer sees, and the head."""
    return {"config": config, "stored": stored, "own": stored, "gamma": 5, "slot": slot, "head": head, "sees": None, **more}


def deepspec(head: str) -> dict[str, Any]:
    return made(deepspec_config_json(markov_head_type=head), deepspec_tensors(tiny_target("qwen3"), head), head)


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
    layer |= {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
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
        config |= HEAD_FIELDS | {"markov_head_type": head}
    # The window counts from the anchor for all slots, and the block is causal.
    sees = (lambda query, key, anchor: key <= query and key >= anchor - WINDOW) if sliding else None
    own = {**tensors, **{k: v for k, v in stored.items() if "markov_w2" in k}}
    gamma, slot = (5, 0) if from_anchor else (4, 1)
    return made(config, stored, head, own=own, gamma=gamma, slot=slot, draft_ids=ids if reduced else None, sees=sees)


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
    return made(config, tensors, "none", slot=1, sees=sees, sliding=[1])


def specforge(head: str, *, old: bool = False, normalised: bool = False) -> dict[str, Any]:
    tensors = without_copies(deepspec_tensors(tiny_target("qwen3"), head))
    stored = tensors
    if old:
        stored = {("logit_head." + name if name.startswith(("markov_head", "confidence_head")) else name): t for name, t in tensors.items()}
    heads = HEAD_FIELDS | {"markov_head_type": head}
    dflash = {"projector_type": "dspark", "attention_mode": "gqa", "mask_token_id": MASK, "target_layer_ids": TAPS, **heads}
    config = QWEN3 | {"architectures": ["DSparkDraftModel"], "block_size": 5, "dflash_config": dflash}
    if normalised:  # as its script prepares a checkpoint for SGLang
        config |= {"architectures": ["Qwen3DSparkModel"], **heads}
    return made(config, stored, head, own=tensors)


def model_optimizer(head: str, *, sliding: bool = False) -> dict[str, Any]:
    tensors = without_copies(deepspec_tensors(tiny_target("qwen3"), head))
    stored = {n.removeprefix("markov_head.").replace("confidence_head.proj", "confidence_proj"): tensor for n, tensor in tensors.items()}
    dflash = {"mask_token_id": MASK, "target_layer_ids": TAPS, "projector_type": "dspark", "shift_label": True, "markov_rank": R}
    dflash |= {"markov_head_type": head, "use_confidence_head": True}
    config = QWEN3 | {"architectures": ["DFlashDraftModel"], "block_size": 5, "dflash_config": dflash}
    if sliding:  # on all layers, though layer_types says full
        config["sliding_window"] = WINDOW
        dflash |= {"use_swa": True, "swa_window_size": WINDOW, "causal": False}
    return made(config, stored, head, own=tensors, sees=per_query(WINDOW, False) if sliding else None)


def native(*, sliding: bool) -> dict[str, Any]:
    tensors = without_copies(deepspec_tensors(tiny_target("qwen3"), "none", confidence=False))
    names = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    config = {
        "architectures": ["MuseGlimmerAssistantModel"],
        "model_type": "muse_glimmer_assistant",
        **{key: value for key, value in SHAPE.items() if key != "vocab_size"},
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "max_position_embeddings": 512,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention" if sliding else "full_attention"] * LAYERS,
        **BLOCK_FIELDS,
        "block_size": 6,
        "pad_token_id": 0,
    }
    sees = per_query(WINDOW + 1, False) if sliding else None  # a distance of exactly the window is still seen
    stored = {names.get(name, name): tensor for name, tensor in tensors.items()}
    return made(config, stored, "none", slot=1, own=tensors, sees=sees)


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
        found["head"] != "none",
        draft_ids=found.get("draft_ids"),
        first_slot=found["slot"],
        sees=None if found["sees"] is None else dict.fromkeys(layers, found["sees"]),
    )


def judge(drafter: DSparkDrafter, expected: ReferenceDrafter) -> None:
    """Hidden states, logits of a greedy chain and confidences of one block equal the reference's."""
    taps = torch.randn(14, len(TAPS) * D, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        h = draft(drafter, [taps], [9])
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
    size, kv = 12, 1 if k_eq_v else 2
    layer = layer_shapes(size, kv) | {f"{name}_feedforward_layernorm.weight": (D,) for name in ("pre", "post")}
    if k_eq_v:
        del layer["self_attn.v_proj.weight"]
    tensors = deepspec_tensors(target, "vanilla", layer=layer)
    tensors |= {f"layers.{i}.layer_scalar": torch.tensor([0.7 + 0.2 * i]) for i in range(LAYERS)}
    kept = ("attention_bias", "attention_dropout", "max_position_embeddings", "num_target_layers", "rms_norm_eps", "tie_word_embeddings")
    config = {
        "architectures": ["Gemma4DSparkModel"],
        "model_type": "gemma4_text",
        "target_model_type": "gemma4",
        "target_text_model_type": "gemma4_text",
        **{key: QWEN3[key] for key in (*SHAPE, *kept, "layer_types")},
        **HEAD_FIELDS,
        **BLOCK_FIELDS,
        "num_global_key_value_heads": 1,
        "global_head_dim": size,
        "attention_k_eq_v": k_eq_v,
        **dict.fromkeys(("enable_moe_block", "use_double_wide_mlp"), False),
        **dict.fromkeys(("hidden_size_per_layer_input", "num_kv_shared_layers"), 0),
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": 30.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": THETA},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }
    return config, tensors


def gemma_target() -> Any:
    """A Gemma target with scaled embeddings and a soft-cap on its logits."""
    target = tiny_target("gemma3")
    target.config.final_logit_softcapping = 2.0
    return target
