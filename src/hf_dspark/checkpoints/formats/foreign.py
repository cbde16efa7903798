"""What the formats of other projects share: how their configs become a `DSparkConfig`, and how tensors are written for them.

A reader brings its format to flat keys first: those of DeepSpec, whose names this package shares, and those of `DSparkConfig` for what
DeepSpec does not have. Taps become outputs of decoder layers, the first predicting slot a flag, windows count as in `DSparkConfig`. A key
that would change the meaning of the tensors is refused, all such keys at once.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_dspark.checkpoints.formats.own import REQUIRED, check_plausible, clean_errors
from hf_dspark.configuration_dspark import DSparkConfig
from hf_dspark.errors import CheckpointError

logger = logging.getLogger(__name__)

Flat = dict[str, Any]
Written = tuple[dict[str, Any], dict[str, torch.Tensor]]

BACKBONE_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_bias", "attention_dropout"),
    *("rope_parameters", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types", "tie_word_embeddings", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
HEAD_KEYS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
DEEPSPEC_KEYS = {
    *(*HEAD_KEYS, "block_size", "num_target_layers", "target_layer_ids", "mask_token_id", "num_anchors", "confidence_temperatures")
}
# Fields of a config, without those that no other project writes: in its files they are not read.
_KNOWN_KEYS = {field.name for field in dataclasses.fields(DSparkConfig)} - {"copy_weights", "copy_confidence", "target_hidden_size"}
# Keys of backbones and heads that this package does not have: each changes what the same tensors mean.
_FOREIGN_KEYS = (
    *("dflash_config", "shift_label", "projector_type", "aux_hidden_state_layer_ids", "transformer_layer_config"),
    *("final_logit_softcapping", "logit_scale", "logits_scaling", "attn_logit_softcapping", "query_pre_attn_scalar"),
    *("quantization_config", "input_embedding_scale", "output_multiplier", "attention_sink_bias", "attention_value_scale"),
    *("enable_moe_block", "hidden_size_per_layer_input", "is_causal"),
)
_HARMLESS_KEYS = {
    *("torch_dtype", "dtype", "rope_theta", "rope_scaling", "auto_map", "_name_or_path", "name_or_path", "_attn_implementation"),
    *("_attn_implementation_autoset", "attn_implementation", "model_type", "architectures", "transformers_version", "output_attentions"),
}


@dataclasses.dataclass(frozen=True)
class Format:
    """One format: how its config becomes flat keys, and its tensor names ours."""

    name: str  # as `hf-dspark info` and `convert` show it
    title: str  # for messages
    flatten: Callable[[Mapping[str, Any], str], Flat]  # from the parsed `config.json` and its source
    prefixes: tuple[tuple[str, str], ...] = ()  # stored beginnings of tensor names, and what they are called here
    must_carry: bool = False  # whether copies of the target's embedding and head must lie in the files
    requires: tuple[str, ...] = ()  # flat keys that must be there beside those that every format needs
    refuses: tuple[str, ...] = ()  # keys of other formats that must not be set

    def rename(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """The same records under this package's names; where an old and a new name meet, the new one wins."""
        renamed = {}
        for name, record in stored.items():
            old, new = next((pair for pair in self.prefixes if name.startswith(pair[0])), ("", ""))
            renamed[new + name[len(old) :]] = stored.get(new + name[len(old) :], record)
        return renamed

    def read_config(self, raw: Mapping[str, Any], source: str, **overrides: Any) -> DSparkConfig:
        """Translate a config, refusing missing keys and those that would change the meaning of the tensors; `overrides` win over it."""
        try:
            flat = self.flatten({key: value for key, value in raw.items() if key not in self.refuses}, source)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError) as error:
            if isinstance(error, CheckpointError):
                raise
            reason = f"Missing keys: {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
            raise CheckpointError(f"config.json of {source!r} is not a {self.title} config that can be read. {reason}.") from error
        required = [*REQUIRED, *self.requires]
        required += ["markov_head_type"] if flat.get("markov_rank") else []
        required += ["confidence_head_with_markov"] if flat.get("enable_confidence_head") else []
        missing = [key for key in dict.fromkeys(required) if flat.get(key) is None]
        missing += [] if flat.get("rope_parameters") or flat.get("rope_theta") else ["rope_theta (or rope_parameters)"]
        check_plausible(flat, source)
        foreign = [f"{key}={raw[key]!r}" for key in self.refuses if raw.get(key) not in (None, False)]
        foreign += [f"{key}={flat[key]!r}" for key in _FOREIGN_KEYS if flat.get(key) not in (None, False)]
        if missing or foreign:
            raise CheckpointError(
                f"config.json of {source!r} is not a {self.title} config that can be read. Missing keys: {', '.join(missing) or 'none'}. "
                f"Keys that this reader does not understand: {', '.join(foreign) or 'none'}."
            )
        unknown = sorted(str(key) for key in flat if key not in _KNOWN_KEYS | _HARMLESS_KEYS)
        if unknown:
            logger.warning("config.json of %r has keys that are not used: %s.", source, ", ".join(unknown))
        fields = {key: value for key, value in flat.items() if key in _KNOWN_KEYS - _HARMLESS_KEYS}
        # DeepSpec's own model reads RoPE from rope_parameters first, then from the older pair of keys.
        fields.update({key: flat[key] for key in ("rope_theta", "rope_scaling") if flat.get(key) is not None})
        with clean_errors(source):
            return DSparkConfig(**{**fields, "architectures": ["DSparkDrafter"], **overrides})


def target_keys(raw: Mapping[str, Any]) -> Flat:
    """The target, as formats tell it whose config is a copy of the target's."""
    return {"target_model_type": raw.get("model_type"), "target_name": raw.get("_name_or_path") or None}


def temperatures(raw: Mapping[str, Any]) -> Flat:
    """Calibration, also under the name that TensorRT-LLM gives it."""
    found = raw.get("confidence_temperatures") or raw.get("sts_temperatures")
    return {"confidence_temperatures": found} if found else {}


def windows(raw: Mapping[str, Any], window: Any, *, inclusive: bool = False) -> Flat:
    """Layer types, and a window that counts as ours: keys fewer than so many positions before; `inclusive` windows reach one further."""
    kinds = list(raw.get("layer_types") or ["full_attention"] * raw["num_hidden_layers"])
    if "sliding_attention" not in kinds:
        return {"layer_types": kinds, "use_sliding_window": False, "sliding_window": None}
    if not isinstance(window, int) or window < 1:
        raise CheckpointError(f"layers have sliding attention, but sliding_window is {window!r}; allowed: a positive number.")
    return {"layer_types": kinds, "use_sliding_window": True, "sliding_window": window + (1 if inclusive else 0)}


def refuse(form: str, reasons: Mapping[str, bool]) -> None:
    """Raise a `CheckpointError` that lists the reasons that apply."""
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise CheckpointError(f"The format {form!r} cannot hold {', '.join(found)}. Convert to another one.")


def own_tensors(drafter: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Copies of a drafter's tensors, on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in drafter.state_dict().items()}


def target_matrix(target: PreTrainedModel | None, getter: str, dtype: torch.dtype) -> torch.Tensor:
    """A copy of the target's embedding or head, on the CPU."""
    weight = getattr(getattr(target, getter)(), "weight", None) if target is not None else None
    if weight is None or not weight.is_floating_point() or weight.device.type == "meta":
        raise CheckpointError(
            "This format holds a copy of the target's embedding or head, and the drafter has none. Give the target (--target), unquantized."
        )
    return weight.detach().to("cpu", dtype, copy=True).contiguous()


def target_scales(target: PreTrainedModel | None, config: DSparkConfig | None = None) -> bool:
    """Whether a target's family puts a scale around its embedding or a soft-cap around its logits; by its name where it is not at hand."""
    if target is None:
        return config is not None and str(config.target_model_type or "").startswith("gemma")
    text = target.config.get_text_config(decoder=True)
    return type(target.get_input_embeddings()) is not torch.nn.Embedding or getattr(text, "final_logit_softcapping", None) is not None
