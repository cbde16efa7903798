"""DeepSpec's checkpoints, which SGLang, vLLM and llama.cpp's converter read: a copy of the target's config with DeepSpec's own keys, and
copies of the target's embedding and head among the tensors.

Source: deepseek-ai/DeepSpec.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, Qwen3Config

from hf_dspark.checkpoints.formats.foreign import (
    BACKBONE_KEYS,
    DEEPSPEC_KEYS,
    HEAD_KEYS,
    Flat,
    Format,
    Written,
    own_tensors,
    refuse,
    target_keys,
    target_matrix,
    target_scales,
    temperatures,
)
from hf_dspark.checkpoints.tensor_files import EMBEDDING_KEY, LM_HEAD_KEY, TensorRecord
from hf_dspark.configuration_dspark import DSparkConfig
from hf_dspark.errors import CheckpointError


def _qwen3(raw: Mapping[str, Any], source: str) -> Flat:
    return {**{key: value for key, value in raw.items() if key != "sts_temperatures"}, **target_keys(raw), **temperatures(raw)}


def _gemma4(raw: Mapping[str, Any], source: str) -> Flat:
    """A copy of Gemma 4's text config: every drafter layer has the global layers' head size and rotation."""
    per_layer = raw.get("per_layer_config")
    of_global = per_layer.get("full_attention") if isinstance(per_layer, Mapping) else None
    of_global = of_global if isinstance(of_global, Mapping) else {}
    k_eq_v = bool(raw.get("attention_k_eq_v"))
    rope = raw.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope) if isinstance(rope, Mapping) else rope
    if isinstance(rope, Mapping) and rope.get("rope_type") not in (None, "proportional"):
        raise CheckpointError(
            f"config.json of {source!r}: rope_type {rope.get('rope_type')!r} on Gemma 4's global layers; readable is 'proportional'."
        )
    if raw.get("use_double_wide_mlp") and raw.get("num_kv_shared_layers"):
        raise CheckpointError(f"config.json of {source!r}: layers of twice the width (use_double_wide_mlp) are not readable.")
    shared = {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps", "attention_bias"),
        *("attention_dropout", "max_position_embeddings", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id"),
    }
    return {
        **{key: value for key, value in raw.items() if key in DEEPSPEC_KEYS | shared},
        **{key: raw[key] for key in ("enable_moe_block", "hidden_size_per_layer_input", "quantization_config") if raw.get(key)},
        **temperatures(raw),
        "backbone": "gemma4",
        "head_dim": raw.get("global_head_dim") or of_global.get("head_dim"),
        "num_key_value_heads": raw.get("num_global_key_value_heads") or of_global.get("num_key_value_heads")
        if k_eq_v
        else raw.get("num_key_value_heads"),
        "attention_k_eq_v": k_eq_v,
        "hidden_act": raw.get("hidden_activation") or raw.get("hidden_act"),
        "rope_parameters": {"rope_type": "proportional", **rope} if isinstance(rope, Mapping) and rope else None,
        "markov_head_type": raw.get("markov_head_type") or ("vanilla" if not raw.get("markov_rank") else None),
        "target_model_type": raw.get("target_text_model_type") or raw.get("model_type"),
        "target_name": raw.get("_name_or_path") or None,
    }


DEEPSPEC = Format(
    "deepspec",
    "DeepSpec Qwen3DSparkModel",
    _qwen3,
    must_carry=True,
    requires=("num_target_layers",),
    refuses=("attention_k_eq_v", "sample_from_anchor", "draft_vocab_size", "backbone"),
)
DEEPSPEC_GEMMA4 = Format("deepspec-gemma4", "DeepSpec Gemma4DSparkModel", _gemma4, must_carry=True, requires=("num_target_layers",))


def to_deepspec(drafter: PreTrainedModel, target: PreTrainedModel | None, carried: Mapping[str, TensorRecord]) -> Written:
    """Config and tensors as DeepSpec writes them, with the target's matrices from `carried` (the drafter's own files) or the target."""
    config: DSparkConfig = drafter.config
    refuse(
        "deepspec",
        {
            "a reduced draft vocabulary": config.draft_vocab_size is not None,
            "an anchor slot that does not predict": not config.sample_from_anchor,
            "sliding-window layers": "sliding_attention" in (config.layer_types or ()),
            "embeddings without the target's scaling": config.raw_embeddings and target_scales(target),
            "a target whose number of layers is not known": config.num_target_layers is None and target is None,
            "a Gemma 4 backbone with other than proportional RoPE": config.backbone == "gemma4"
            and (config.rope_parameters or {}).get("rope_type") != "proportional",
        },
    )
    layers = config.num_target_layers or target.config.get_text_config(decoder=True).num_hidden_layers  # type: ignore[union-attr]
    heads = {key: getattr(config, key) for key in HEAD_KEYS}
    if not config.markov_rank:
        del heads["markov_head_type"]
    if not config.enable_confidence_head:
        del heads["confidence_head_with_markov"]
    fields = {
        **{key: getattr(config, key) for key in (*BACKBONE_KEYS, "block_size", "mask_token_id", "num_anchors")},
        **heads,
        **({"confidence_temperatures": config.confidence_temperatures} if config.confidence_temperatures else {}),
        "num_target_layers": layers,
        "target_layer_ids": list(config.target_layer_ids),
        "torch_dtype": str(drafter.dtype).removeprefix("torch."),
        "_name_or_path": config.target_name,
        "architectures": ["Qwen3DSparkModel"],
        "model_type": config.target_model_type or Qwen3Config.model_type,
    }
    if config.backbone == "gemma4":
        fields |= {
            "architectures": ["Gemma4DSparkModel"],
            "model_type": config.target_model_type or "gemma4_text",
            "attention_k_eq_v": config.attention_k_eq_v,
            "global_head_dim": fields.pop("head_dim"),
            "num_global_key_value_heads": config.num_key_value_heads if config.attention_k_eq_v else None,
            "hidden_activation": fields.pop("hidden_act"),
            "rope_parameters": {"full_attention": dict(config.rope_parameters or {})},
            "enable_moe_block": False,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
        }
    tensors = own_tensors(drafter)
    for key, getter in ((EMBEDDING_KEY, "get_input_embeddings"), (LM_HEAD_KEY, "get_output_embeddings")):
        tensors[key] = carried[key].read() if key in carried else target_matrix(target, getter, drafter.dtype)
    return fields, tensors
