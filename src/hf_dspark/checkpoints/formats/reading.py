"""Recognises a checkpoint's format by its `config.json` and reads it, or refuses it by name.

Every format is brought to the same flat keys first: those of DeepSpec, whose names this package shares, and those of `DSparkConfig` for
what DeepSpec does not have. Taps become outputs of decoder layers, the first predicting slot a flag, windows count as in `DSparkConfig`.
What a key that is not understood would change silently is refused, all of it at once.

Source: deepseek-ai/DeepSpec, vllm-project/speculators, z-lab/dflash, sgl-project/SpecForge, NVIDIA/Model-Optimizer, transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedConfig, Qwen3Config

from hf_dspark.checkpoints.formats.own import MODEL_TYPE, REQUIRED, check_plausible, clean_errors
from hf_dspark.configuration_dspark import DSparkConfig
from hf_dspark.errors import CheckpointError

logger = logging.getLogger(__name__)

Flat = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """One format.

    Args:
        name (`str`): short, as `hf-dspark info` and `convert` show it.
        title (`str`): for messages.
        flatten (`Callable`): from the parsed `config.json` and its source to flat keys.
        prefixes: stored beginnings of tensor names, and what they are called here.
        carries: whether copies of the target's embedding and head must lie in the files, or may.
        requires: flat keys that must be there beside those that every format needs.
    """

    name: str
    title: str
    flatten: Callable[[Mapping[str, Any], str], Flat]
    prefixes: tuple[tuple[str, str], ...] = ()
    carries: Literal["must", "may"] = "may"
    requires: tuple[str, ...] = ()

    def rename(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """The same records under this package's names; where an old and a new name meet, the new one wins."""
        renamed: dict[str, Any] = {}
        for name, record in stored.items():
            for old, new in self.prefixes:
                if name.startswith(old):
                    renamed.setdefault(new + name[len(old) :], record)
                    break
            else:
                renamed[name] = record
        return renamed


# --------------------------------------------------------------------------------------------------------- recognising


def recognise_format(config: Mapping[str, Any], source: str) -> Format | None:
    """Say which format a `config.json` belongs to, or refuse it by name.

    Args:
        config (`Mapping`): the parsed `config.json`.
        source (`str`): path or repository, for the message.
    Returns:
        `Format`, or None for this package's own.
    Raises:
        CheckpointError: for every other format, saying which one it is and why it cannot be read.
    """
    architectures = [str(name) for name in _list(config.get("architectures"))]
    model_type = config.get("model_type")
    dflash = config.get("dflash_config")
    dflash = dflash if isinstance(dflash, Mapping) else {}
    projector = dflash.get("projector_type")
    if "speculators_model_type" in config or "speculators_config" in config:
        kind = config.get("speculators_model_type")
        if kind in ("dspark", "dflash"):
            return SPECULATORS
        found = f"a speculators checkpoint of type {kind!r}, which is no DSpark or DFlash drafter"
    elif "Gemma4DSparkModel" in architectures:
        return DEEPSPEC_GEMMA4
    elif model_type == "muse_glimmer_assistant":
        return TRANSFORMERS_DFLASH
    elif any("DFlash2" in name for name in architectures) or {"selector_rank", "conv_kernel_size"} & set(dflash):
        found = "z-lab's DFlash 2, whose convolutions and candidate selector this package does not have"
    elif projector == "domino":
        found = "SpecForge's Domino drafter, whose recurrent head this package does not have"
    elif "DSparkDraftModel" in architectures:
        return SPECFORGE
    elif "DFlashDraftModel" in architectures:
        return MODEL_OPTIMIZER if projector == "dspark" else ZLAB_DFLASH
    elif any(str(key).startswith("dspark_") for key in config):
        found = "a DeepSeek-V4 checkpoint with its own dspark_* keys, which needs that target's kernels"
    elif model_type == MODEL_TYPE:
        return None
    elif "Qwen3DSparkModel" in architectures:
        return SPECFORGE if dflash else DEEPSPEC
    elif any(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in architectures):
        names = ", ".join(architectures)
        found = f"a target model ({names}), not a drafter; DSparkDrafter.from_target makes a drafter for it"
    else:
        found = f"an unknown format (model_type {model_type!r}, architectures {architectures})"
    raise CheckpointError(
        f"{source!r} is {found}. Readable are this package's own format (model_type 'dspark') and "
        f"{', '.join(one.title for one in FORMATS)}. Convert it, or choose another checkpoint."
    )


def foreign_config(form: Format, raw: Mapping[str, Any], source: str, **overrides: Any) -> DSparkConfig:
    """Translate another format's config into this package's.

    Args:
        form (`Format`): from `recognise_format`.
        raw (`Mapping`): the parsed `config.json`.
        source (`str`): path or repository, for messages.
        overrides: fields of `DSparkConfig` that the caller wants otherwise.
    Returns:
        `DSparkConfig`.
    Raises:
        CheckpointError: listing every key that is missing, and every key that would change the tensors' meaning.
    """
    try:
        flat = form.flatten(raw, source)
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"config.json of {source!r} is not a {form.title} config that can be read. Missing keys: {error}.") from error
    except (TypeError, AttributeError, ValueError, IndexError, OverflowError) as error:
        raise CheckpointError(f"config.json of {source!r} is not one of {form.title}: {type(error).__name__}: {error}.") from error
    required = [*REQUIRED, *form.requires]
    if flat.get("markov_rank"):
        required.append("markov_head_type")
    if flat.get("enable_confidence_head"):
        required.append("confidence_head_with_markov")
    missing = [key for key in dict.fromkeys(required) if flat.get(key) is None]
    if not (flat.get("rope_parameters") or flat.get("rope_theta")):
        missing.append("rope_theta (or rope_parameters)")
    check_plausible(flat, source)
    known = {*Qwen3Config().to_dict(), *PreTrainedConfig().to_dict(), *_DEEPSPEC_KEYS, *_OWN_KEYS}
    foreign = [f"{key}={flat[key]!r}" for key in _FOREIGN_KEYS if flat.get(key) not in (None, False)]
    if missing or foreign:
        raise CheckpointError(
            f"config.json of {source!r} is not a {form.title} config that can be read. "
            f"Missing keys: {', '.join(missing) or 'none'}. Keys that this reader does not understand: "
            f"{', '.join(foreign) or 'none'}."
        )
    unknown = sorted(str(key) for key in flat if key not in known | _HARMLESS_KEYS)
    if unknown:
        logger.warning("config.json of %r has keys that are not used: %s.", source, ", ".join(unknown))
    fields = {key: value for key, value in flat.items() if key in known and key not in _HARMLESS_KEYS}
    # The stored value is the target's; DeepSpec's own model reads RoPE from rope_parameters first, then from the older
    # pair of keys.
    fields.update({key: flat[key] for key in ("rope_theta", "rope_scaling") if flat.get(key) is not None})
    fields.pop("dtype", None)
    with clean_errors(source):
        return DSparkConfig(**{**fields, "architectures": ["DSparkDrafter"], **overrides})


_DEEPSPEC_KEYS = {
    *("block_size", "num_target_layers", "target_layer_ids", "mask_token_id", "num_anchors", "markov_rank", "markov_head_type"),
    *("enable_confidence_head", "confidence_head_with_markov", "confidence_temperatures"),
}
_OWN_KEYS = {
    *("sample_from_anchor", "draft_vocab_size", "backbone", "attention_k_eq_v", "raw_embeddings", "window_from_anchor"),
    *("causal_sliding_block", "target_model_type", "target_name"),
}
# Keys of backbones and heads that this package does not have: each changes what the same tensors mean.
_FOREIGN_KEYS = (
    *("dflash_config", "shift_label", "projector_type", "aux_hidden_state_layer_ids", "transformer_layer_config"),
    *("final_logit_softcapping", "logit_scale", "logits_scaling", "attn_logit_softcapping", "query_pre_attn_scalar"),
    *("quantization_config", "input_embedding_scale", "output_multiplier", "attention_sink_bias", "attention_value_scale"),
    *("enable_moe_block", "hidden_size_per_layer_input", "is_causal"),
)
_HARMLESS_KEYS = {
    *("torch_dtype", "rope_theta", "rope_scaling", "auto_map", "_name_or_path", "name_or_path", "_attn_implementation"),
    *("_attn_implementation_autoset", "attn_implementation", "model_type", "architectures", "transformers_version"),
}


# ----------------------------------------------------------------------------------------------------------- flattening


def _of_target(raw: Mapping[str, Any]) -> Flat:
    return {"target_model_type": raw.get("model_type"), "target_name": raw.get("_name_or_path") or None}


def _temperatures(raw: Mapping[str, Any]) -> Flat:
    """Calibration under the name that TensorRT-LLM gives it."""
    found = raw.get("confidence_temperatures") or raw.get("sts_temperatures")
    return {"confidence_temperatures": found} if found else {}


def _deepspec(raw: Mapping[str, Any], source: str) -> Flat:
    flat = {key: value for key, value in raw.items() if key not in ("attention_k_eq_v", "sample_from_anchor", "draft_vocab_size")}
    for key in ("attention_k_eq_v", "sample_from_anchor", "draft_vocab_size", "backbone"):
        if raw.get(key) not in (None, False):
            raise CheckpointError(
                f"config.json of {source!r} is not a DeepSpec Qwen3DSparkModel config that can be read. Missing keys: none. Keys that this "
                f"reader does not understand: {key}={raw[key]!r}."
            )
    flat.pop("sts_temperatures", None)
    return {**flat, **_of_target(raw), **_temperatures(raw)}


def _deepspec_gemma4(raw: Mapping[str, Any], source: str) -> Flat:
    """DeepSpec's copy of Gemma 4's text config: every drafter layer has the global layers' head size and rotation."""
    shared = {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps", "attention_bias"),
        *("attention_dropout", "max_position_embeddings", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id"),
    }
    flat = {key: value for key, value in raw.items() if key in _DEEPSPEC_KEYS | shared}
    of_global = {}
    per_layer = raw.get("per_layer_config")
    if isinstance(per_layer, Mapping) and isinstance(per_layer.get("full_attention"), Mapping):
        of_global = dict(per_layer["full_attention"])
    k_eq_v = bool(raw.get("attention_k_eq_v"))
    global_kv = raw.get("num_global_key_value_heads") or of_global.get("num_key_value_heads")
    rope = raw.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope) if isinstance(rope, Mapping) else rope
    if isinstance(rope, Mapping) and rope.get("rope_type") not in (None, "proportional"):
        raise CheckpointError(
            f"config.json of {source!r}: rope_type {rope.get('rope_type')!r} on Gemma 4's global layers; readable is 'proportional'."
        )
    if raw.get("use_double_wide_mlp") and raw.get("num_kv_shared_layers"):
        raise CheckpointError(f"config.json of {source!r}: layers of twice the width (use_double_wide_mlp) are not readable.")
    extra = {key: raw[key] for key in ("enable_moe_block", "hidden_size_per_layer_input", "quantization_config") if raw.get(key)}
    return {
        **flat,
        **extra,
        **_temperatures(raw),
        "backbone": "gemma4",
        "head_dim": raw.get("global_head_dim") or of_global.get("head_dim"),
        "num_key_value_heads": (global_kv if k_eq_v else raw.get("num_key_value_heads")),
        "attention_k_eq_v": k_eq_v,
        "hidden_act": raw.get("hidden_activation") or raw.get("hidden_act"),
        "rope_parameters": {"rope_type": "proportional", **rope} if isinstance(rope, Mapping) and rope else None,
        "markov_head_type": raw.get("markov_head_type") or ("vanilla" if not raw.get("markov_rank") else None),
        "target_model_type": raw.get("target_text_model_type") or raw.get("model_type"),
        "target_name": raw.get("_name_or_path") or None,
    }


def _speculators(raw: Mapping[str, Any], source: str) -> Flat:
    kind = raw.get("speculators_model_type")
    layer = dict(raw["transformer_layer_config"])
    layer.pop("model_type", None)
    settings = raw.get("speculators_config") or {}
    block, taps = raw["block_size"], raw.get("aux_hidden_state_layer_ids")
    from_anchor = raw.get("sample_from_anchor")
    if from_anchor is None:  # the writers' defaults have differed: what the file proposes decides
        proposed = [one.get("speculative_tokens") for one in settings.get("proposal_methods", [])]
        if len(proposed) != 1 or proposed[0] not in (block, block - 1):
            raise CheckpointError(
                f"config.json of {source!r} does not say which slot predicts first: sample_from_anchor is absent, block_size is {block}, "
                f"speculative_tokens {proposed}. Write sample_from_anchor into it."
            )
        from_anchor = proposed[0] == block
    head, rank = raw.get("markov_head_type", "vanilla"), raw.get("markov_rank", 256) if kind == "dspark" else 0
    if rank and head == "rnn" and not from_anchor:
        raise CheckpointError(f"{source!r} has a recurrent head that starts before the first predicting slot, which is not readable.")
    vocabulary, reduced = layer.get("vocab_size"), raw.get("draft_vocab_size")
    confidence = bool(raw.get("enable_confidence_head", True)) if kind == "dspark" else False
    rope = layer.pop("rope_parameters", None)
    if isinstance(rope, Mapping) and not rope.get("rope_type") and isinstance(rope.get("sliding_attention"), Mapping):
        rope = rope["sliding_attention"]
    verifier = settings.get("verifier") or {}
    return {
        **layer,
        **_windows(layer, layer.get("sliding_window"), inclusive=True),
        **_temperatures(raw),
        **({"rope_parameters": rope} if rope else {}),
        **({"quantization_config": raw["quantization_config"]} if raw.get("quantization_config") else {}),
        "block_size": block if from_anchor else block - 1,
        "sample_from_anchor": bool(from_anchor),
        "target_layer_ids": [int(i) - 1 for i in taps] if taps else None,
        "mask_token_id": raw.get("mask_token_id"),
        "num_target_layers": None,
        "markov_rank": rank,
        "markov_head_type": head,
        "enable_confidence_head": confidence,
        "confidence_head_with_markov": bool(raw.get("confidence_head_with_markov", True)) if confidence else False,
        "draft_vocab_size": None if reduced in (None, vocabulary) else reduced,
        "window_from_anchor": True,
        "causal_sliding_block": not raw.get("sliding_window_non_causal", False),
        "raw_embeddings": True,
        "target_name": verifier.get("name_or_path"),
        "target_model_type": None,
    }


def _zlab(raw: Mapping[str, Any], source: str) -> Flat:
    nested = dict(raw.get("dflash_config") or {})
    flat = {key: value for key, value in raw.items() if key not in ("dflash_config", "is_causal", "auto_map")}

    def get(name: str, default: Any = None) -> Any:
        return nested[name] if nested.get(name) is not None else raw.get(name, default)

    from_anchor = bool(get("shift_label", False))
    for name, neutral in (("input_embedding_scale", 1.0), ("output_multiplier", 1.0), ("final_logit_softcapping", 0.0)):
        value = get(name)
        flat.pop(name, None)
        if value is not None and float(value) != neutral and not (name == "final_logit_softcapping" and float(value) < 0):
            flat[name] = value
    flat.pop("shift_label", None)
    causal = nested.get("causal", raw.get("is_causal"))
    windows = _windows(raw, raw.get("sliding_window"))
    if nested.get("use_swa"):  # Model-Optimizer: all layers, whatever layer_types says
        windows = _windows({"layer_types": ["sliding_attention"] * raw["num_hidden_layers"]}, nested["swa_window_size"])
        causal = bool(causal)
    if causal and "full_attention" in windows["layer_types"]:
        raise CheckpointError(f"{source!r} has full-attention layers with causal blocks (is_causal), which are not readable.")
    block = get("block_size", 16)
    return {
        **flat,
        **windows,
        **_temperatures(raw),
        "block_size": block if from_anchor else block - 1,
        "sample_from_anchor": from_anchor,
        "target_layer_ids": get("target_layer_ids") or _zlab_taps(raw["num_target_layers"], raw["num_hidden_layers"]),
        "mask_token_id": get("mask_token_id"),
        "num_target_layers": raw.get("num_target_layers"),
        "markov_rank": 0,
        "markov_head_type": "vanilla",
        "enable_confidence_head": False,
        "causal_sliding_block": causal is not False,
        "raw_embeddings": True,
        **_of_target(raw),
    }


def _zlab_taps(target_layers: int, layers: int) -> list[int]:
    """Where DFlash taps a target when its config does not say."""
    return [target_layers // 2] if layers == 1 else [round(1 + i * (target_layers - 4) / (layers - 1)) for i in range(layers)]


def _specforge(raw: Mapping[str, Any], source: str) -> Flat:
    nested = dict(raw.get("dflash_config") or {})
    flat = {key: value for key, value in raw.items() if key not in ("dflash_config", "auto_map")}
    if nested.get("projector_type", "dspark") != "dspark":
        raise CheckpointError(f"{source!r}: projector_type {nested['projector_type']!r} is not readable; allowed: 'dspark'.")

    def get(name: str, default: Any = None) -> Any:
        return nested[name] if nested.get(name) is not None else raw.get(name, default)

    rank = get("markov_rank", 0)
    confidence = bool(get("enable_confidence_head", get("confidence_head_alpha", 0.0) > 0))
    return {
        **{key: value for key, value in flat.items() if key not in ("confidence_head_alpha",)},
        **_windows(raw, raw.get("sliding_window")),
        **_temperatures(raw),
        "block_size": get("block_size"),
        "target_layer_ids": get("target_layer_ids"),
        "mask_token_id": get("mask_token_id"),
        "num_target_layers": raw.get("num_target_layers"),
        "markov_rank": rank,
        "markov_head_type": get("markov_head_type", "vanilla"),
        "enable_confidence_head": confidence,
        "confidence_head_with_markov": bool(get("confidence_head_with_markov", False)) if confidence else False,
        "causal_sliding_block": True,
        "raw_embeddings": True,
        **_of_target(raw),
    }


def _model_optimizer(raw: Mapping[str, Any], source: str) -> Flat:
    nested = dict(raw.get("dflash_config") or {})
    flat = _zlab({**raw, "dflash_config": {**nested, "shift_label": nested.get("shift_label", True)}}, source)
    confidence = bool(nested.get("use_confidence_head", False))
    return {
        **flat,
        "markov_rank": nested.get("markov_rank"),
        "markov_head_type": nested.get("markov_head_type", "vanilla"),
        "enable_confidence_head": confidence,
        "confidence_head_with_markov": confidence,
        "causal_sliding_block": bool(nested.get("causal", False)),
        "raw_embeddings": False,
    }


def _transformers_dflash(raw: Mapping[str, Any], source: str) -> Flat:
    if raw.get("is_causal"):
        raise CheckpointError(f"{source!r} has causal blocks (is_causal), which transformers' own DFlash does not have either.")
    layers = raw.get("num_hidden_layers", 5)
    kinds = {"layer_types": raw.get("layer_types") or ["sliding_attention"] * layers}
    return {
        **{key: value for key, value in raw.items() if key != "is_causal"},
        **_windows(kinds, raw.get("sliding_window", 2048), inclusive=True),
        "rope_parameters": raw.get("rope_parameters") or {"rope_type": "default", "rope_theta": 500000.0},
        "vocab_size": raw.get("vocab_size") or 0,
        "attention_bias": False,
        "hidden_act": raw.get("hidden_act", "silu"),
        "block_size": raw["block_size"] - 1,
        "sample_from_anchor": False,
        "target_layer_ids": raw.get("target_layer_ids"),
        "num_target_layers": None,
        "markov_rank": 0,
        "markov_head_type": "vanilla",
        "enable_confidence_head": False,
        "target_model_type": None,
        "target_name": None,
    }


def _windows(raw: Mapping[str, Any], window: Any, *, inclusive: bool = False) -> Flat:
    """Layer types, and a window that counts as ours: keys fewer than so many positions before; `inclusive` windows reach one further."""
    kinds = list(raw.get("layer_types") or ["full_attention"] * raw["num_hidden_layers"])
    if "sliding_attention" not in kinds:
        return {"layer_types": kinds, "use_sliding_window": False, "sliding_window": None}
    if not isinstance(window, int) or window < 1:
        raise CheckpointError(f"layers have sliding attention, but sliding_window is {window!r}; allowed: a positive number.")
    return {"layer_types": kinds, "use_sliding_window": True, "sliding_window": window + (1 if inclusive else 0)}


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


DEEPSPEC = Format("deepspec", "DeepSpec Qwen3DSparkModel", _deepspec, carries="must", requires=("num_target_layers",))
DEEPSPEC_GEMMA4 = Format("deepspec-gemma4", "DeepSpec Gemma4DSparkModel", _deepspec_gemma4, carries="must", requires=("num_target_layers",))
SPECULATORS = Format("speculators", "speculators dspark or dflash", _speculators)
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
        ("markov_w1.", "markov_head.markov_w1."),
        ("markov_w2.", "markov_head.markov_w2."),
        ("gate_proj.", "markov_head.gate_proj."),
        ("joint_proj.", "markov_head.joint_proj."),
        ("confidence_proj.", "confidence_head.proj."),
    ),
)
TRANSFORMERS_DFLASH = Format(
    "transformers-dflash",
    "transformers' native DFlash (muse_glimmer_assistant)",
    _transformers_dflash,
    prefixes=(("encoder.fc.", "fc."), ("encoder.output_norm_enc.", "hidden_norm.")),
)
FORMATS = (DEEPSPEC, DEEPSPEC_GEMMA4, SPECULATORS, ZLAB_DFLASH, SPECFORGE, MODEL_OPTIMIZER, TRANSFORMERS_DFLASH)
