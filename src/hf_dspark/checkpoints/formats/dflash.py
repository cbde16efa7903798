"""Formats around DFlash, read only: z-lab's own, SpecForge's and Model-Optimizer's DSpark drafters, whose heads are told in a nested
`dflash_config`, and transformers' DFlash class.

Source: z-lab/dflash, sgl-project/SpecForge, NVIDIA/Model-Optimizer, transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_dspark.checkpoints.formats.foreign import Flat, Format, target_keys, temperatures, windows
from hf_dspark.errors import CheckpointError

_NO_HEADS = {"markov_rank": 0, "markov_head_type": "vanilla", "enable_confidence_head": False}


def _nested(raw: Mapping[str, Any]) -> dict[str, Any]:
    return dict(raw.get("dflash_config") or {})


def _get(raw: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """A key of `dflash_config`, else of the config itself."""
    found = _nested(raw).get(name)
    return raw.get(name, default) if found is None else found


def _zlab(raw: Mapping[str, Any], source: str) -> Flat:
    nested = _nested(raw)
    flat = {key: value for key, value in raw.items() if key not in ("dflash_config", "is_causal", "auto_map", "shift_label")}
    from_anchor = bool(_get(raw, "shift_label", False))
    for name, neutral in (("input_embedding_scale", 1.0), ("output_multiplier", 1.0), ("final_logit_softcapping", 0.0)):
        value = _get(raw, name)
        flat.pop(name, None)
        if value is not None and float(value) != neutral and not (name == "final_logit_softcapping" and float(value) < 0):
            flat[name] = value  # refused by its name
    causal = nested.get("causal", raw.get("is_causal"))
    layers = windows(raw, raw.get("sliding_window"))
    if nested.get("use_swa"):  # Model-Optimizer: all layers, whatever layer_types says
        layers = windows({"layer_types": ["sliding_attention"] * raw["num_hidden_layers"]}, nested["swa_window_size"])
        causal = bool(causal)
    if causal and "full_attention" in layers["layer_types"]:
        raise CheckpointError(f"{source!r} has full-attention layers with causal blocks (is_causal), which are not readable.")
    block = _get(raw, "block_size", 16)
    return {
        **flat,
        **layers,
        **temperatures(raw),
        **target_keys(raw),
        **_NO_HEADS,
        "block_size": block if from_anchor else block - 1,
        "sample_from_anchor": from_anchor,
        "target_layer_ids": _get(raw, "target_layer_ids") or _zlab_taps(raw["num_target_layers"], raw["num_hidden_layers"]),
        "mask_token_id": _get(raw, "mask_token_id"),
        "num_target_layers": raw.get("num_target_layers"),
        "causal_sliding_block": causal is not False,
        "raw_embeddings": True,
    }


def _zlab_taps(target_layers: int, layers: int) -> list[int]:
    """Where DFlash taps a target when its config does not say."""
    return [target_layers // 2] if layers == 1 else [round(1 + i * (target_layers - 4) / (layers - 1)) for i in range(layers)]


def _specforge(raw: Mapping[str, Any], source: str) -> Flat:
    projector = _nested(raw).get("projector_type", "dspark")
    if projector != "dspark":
        raise CheckpointError(f"{source!r}: projector_type {projector!r} is not readable; allowed: 'dspark'.")
    confidence = bool(_get(raw, "enable_confidence_head", _get(raw, "confidence_head_alpha", 0.0) > 0))
    return {
        **{key: value for key, value in raw.items() if key not in ("dflash_config", "auto_map", "confidence_head_alpha")},
        **windows(raw, raw.get("sliding_window")),
        **temperatures(raw),
        **target_keys(raw),
        **{key: _get(raw, key) for key in ("block_size", "target_layer_ids", "mask_token_id")},
        "num_target_layers": raw.get("num_target_layers"),
        "markov_rank": _get(raw, "markov_rank", 0),
        "markov_head_type": _get(raw, "markov_head_type", "vanilla"),
        "enable_confidence_head": confidence,
        "confidence_head_with_markov": bool(_get(raw, "confidence_head_with_markov", False)) if confidence else False,
        "causal_sliding_block": True,
        "raw_embeddings": True,
    }


def _model_optimizer(raw: Mapping[str, Any], source: str) -> Flat:
    nested = _nested(raw)
    confidence = bool(nested.get("use_confidence_head", False))
    return {
        **_zlab({**raw, "dflash_config": {**nested, "shift_label": nested.get("shift_label", True)}}, source),
        "markov_rank": nested.get("markov_rank"),
        "markov_head_type": nested.get("markov_head_type", "vanilla"),
        "enable_confidence_head": confidence,
        "confidence_head_with_markov": confidence,
        "causal_sliding_block": bool(nested.get("causal", False)),
        "raw_embeddings": False,
    }


def _transformers(raw: Mapping[str, Any], source: str) -> Flat:
    if raw.get("is_causal"):
        raise CheckpointError(f"{source!r} has causal blocks (is_causal), which transformers' own DFlash does not have either.")
    kinds = raw.get("layer_types") or ["sliding_attention"] * raw.get("num_hidden_layers", 5)
    return {
        **{key: value for key, value in raw.items() if key != "is_causal"},
        **windows({"layer_types": kinds}, raw.get("sliding_window", 2048), inclusive=True),
        **_NO_HEADS,
        "rope_parameters": raw.get("rope_parameters") or {"rope_type": "default", "rope_theta": 500000.0},
        "vocab_size": raw.get("vocab_size") or 0,
        "attention_bias": False,
        "hidden_act": raw.get("hidden_act", "silu"),
        "block_size": raw["block_size"] - 1,
        "sample_from_anchor": False,
        **dict.fromkeys(("num_target_layers", "target_model_type", "target_name")),
    }


ZLAB_DFLASH = Format("dflash", "z-lab DFlashDraftModel", _zlab)
SPECFORGE = Format(
    "specforge",
    "SpecForge DSparkDraftModel",
    _specforge,
    prefixes=(("logit_head.markov_head.", "markov_head."), ("logit_head.confidence_head.", "confidence_head.")),
)
MODEL_OPTIMIZER = Format(
    "model-optimizer",
    "NVIDIA Model-Optimizer DFlashDraftModel with projector_type 'dspark'",
    _model_optimizer,
    prefixes=(
        *((f"{name}.", f"markov_head.{name}.") for name in ("markov_w1", "markov_w2", "gate_proj", "joint_proj")),
        ("confidence_proj.", "confidence_head.proj."),
    ),
)
TRANSFORMERS_DFLASH = Format(
    "transformers-dflash",
    "transformers' native DFlash (muse_glimmer_assistant)",
    _transformers,
    prefixes=(("encoder.fc.", "fc."), ("encoder.output_norm_enc.", "hidden_norm.")),
)
