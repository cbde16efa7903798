"""Writes a drafter in the formats of DeepSpec and speculators, which vLLM, SGLang and llama.cpp's converter read. Knows configs and
tensors; knows no network.

Weights go over bit for bit. What a format cannot say is refused, by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3Config

from hf_dspark.checkpoints.tensor_files import EMBEDDING_KEY, LM_HEAD_KEY, TensorRecord
from hf_dspark.configuration_dspark import DSparkConfig
from hf_dspark.errors import CheckpointError

SPECULATORS_VERSION = "0.9.0"  # the release whose layout is written
_HEAD_KEYS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
_BACKBONE_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_bias", "attention_dropout"),
    *("rope_parameters", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types", "tie_word_embeddings", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)

Written = tuple[dict[str, Any], dict[str, torch.Tensor]]


def to_deepspec(drafter: Any, target: PreTrainedModel | None, carried: dict[str, TensorRecord]) -> Written:
    """Config and tensors as DeepSpec writes them: a copy of the target's embedding and head lies among the tensors.

    Args:
        drafter (`DSparkDrafter`): whose weights are written.
        target (`PreTrainedModel`, *optional*): whose embedding and head are copied; not needed where `carried` has them.
        carried (`dict`): copies that the drafter's own files carried.
    Raises:
        CheckpointError: for a reduced vocabulary, windows or a first slot that DeepSpec does not have, or without the target's weights.
    """
    config: DSparkConfig = drafter.config
    _refuse(
        "deepspec",
        {
            "a reduced draft vocabulary": config.draft_vocab_size is not None,
            "an anchor slot that does not predict": not config.sample_from_anchor,
            "sliding-window layers": "sliding_attention" in (config.layer_types or ()),
            "embeddings without the target's scaling": config.raw_embeddings and _scales(target),
            "a target whose number of layers is not known": config.num_target_layers is None and target is None,
            "a Gemma 4 backbone with other than proportional RoPE": config.backbone == "gemma4"
            and (config.rope_parameters or {}).get("rope_type") != "proportional",
        },
    )
    of_target = target.config.get_text_config(decoder=True) if target is not None else None
    fields = {
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "num_target_layers": config.num_target_layers or of_target.num_hidden_layers,  # type: ignore[union-attr]
        "target_layer_ids": list(config.target_layer_ids),
        "num_anchors": config.num_anchors,
        "markov_rank": config.markov_rank,
        "enable_confidence_head": config.enable_confidence_head,
        **({"markov_head_type": config.markov_head_type} if config.markov_rank else {}),
        **({"confidence_head_with_markov": config.confidence_head_with_markov} if config.enable_confidence_head else {}),
        **({"confidence_temperatures": config.confidence_temperatures} if config.confidence_temperatures else {}),
        "torch_dtype": str(drafter.dtype).removeprefix("torch."),
        "_name_or_path": config.target_name,
    }
    if config.backbone == "gemma4":
        shape = {
            key: getattr(config, key)
            for key in _BACKBONE_KEYS
            if key not in ("rope_parameters", "head_dim", "hidden_act", "num_key_value_heads")
        }
        fields |= {
            **shape,
            "architectures": ["Gemma4DSparkModel"],
            "model_type": config.target_model_type or "gemma4_text",
            "attention_k_eq_v": config.attention_k_eq_v,
            "enable_moe_block": False,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
            "global_head_dim": config.head_dim,
            "num_key_value_heads": config.num_key_value_heads,
            "num_global_key_value_heads": config.num_key_value_heads if config.attention_k_eq_v else None,
            "hidden_activation": config.hidden_act,
            "rope_parameters": {"full_attention": dict(config.rope_parameters or {})},
        }
    else:
        fields |= {key: getattr(config, key) for key in _BACKBONE_KEYS}
        fields |= {"architectures": ["Qwen3DSparkModel"], "model_type": config.target_model_type or Qwen3Config.model_type}
    tensors = _own(drafter)
    for key, module in ((EMBEDDING_KEY, "get_input_embeddings"), (LM_HEAD_KEY, "get_output_embeddings")):
        tensors[key] = carried[key].read() if key in carried else _matrix(target, module, drafter.dtype)
    return fields, tensors


def to_speculators(drafter: Any, target: PreTrainedModel | None, carried: dict[str, TensorRecord]) -> Written:
    """Config and tensors as speculators' trainer writes them since its release 0.8.

    Args:
        drafter (`DSparkDrafter`): whose weights are written.
        target (`PreTrainedModel`, *optional*): whose head's rows are copied where the draft vocabulary is reduced.
        carried (`dict`): copies that the drafter's own files carried.
    Raises:
        CheckpointError: for a backbone or windows that speculators does not have, or without the target's weights where they are needed.
    """
    config: DSparkConfig = drafter.config
    slides = "sliding_attention" in (config.layer_types or ())
    _refuse(
        "speculators",
        {
            "a Gemma 4 backbone": config.backbone != "qwen3",
            "windows that count from each slot": slides and not config.window_from_anchor,
            "embeddings or logits that the target's family scales": not config.raw_embeddings and _scales(target, config),
            "a recurrent head behind a slot that does not predict": config.markov_head_type == "rnn"
            and config.markov_rank > 0
            and not config.sample_from_anchor,
            "a vocabulary whose size is not known": not config.vocab_size,
        },
    )
    layer = {key: getattr(config, key) for key in _BACKBONE_KEYS} | {"model_type": "qwen3"}
    if slides:
        layer["sliding_window"] = config.sliding_window - 1
    kind = "dspark" if config.markov_rank or config.enable_confidence_head or config.sample_from_anchor else "dflash"
    slots = config.block_slots
    fields = {
        "architectures": ["DSparkDraftModel" if kind == "dspark" else "DFlashDraftModel"],
        "speculators_model_type": kind,
        "speculators_version": SPECULATORS_VERSION,
        "transformer_layer_config": layer,
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "block_size": slots,
        "target_hidden_size": config.target_hidden_size,
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.sample_from_anchor,
        "sliding_window_non_causal": not config.causal_sliding_block,
        **({key: getattr(config, key) for key in _HEAD_KEYS} if kind == "dspark" else {}),
        **({"confidence_temperatures": config.confidence_temperatures} if config.confidence_temperatures else {}),
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": config.block_size, "verifier_accept_k": 1, "accept_tolerance": 0.0}
            ],
            "verifier": {"name_or_path": config.target_name, "architectures": [type(target).__name__] if target is not None else []},
        },
        "tie_word_embeddings": False,
        "dtype": str(drafter.dtype).removeprefix("torch."),
    }
    tensors = _own(drafter)
    if config.draft_vocab_size is not None:
        ids = drafter.draft_token_ids.cpu()
        tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
        head = carried[LM_HEAD_KEY].read() if LM_HEAD_KEY in carried else _matrix(target, "get_output_embeddings", drafter.dtype)[ids]
        tensors[LM_HEAD_KEY] = head.contiguous()
    return fields, tensors


def _own(drafter: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in drafter.state_dict().items()}


def _matrix(target: PreTrainedModel | None, getter: str, dtype: torch.dtype) -> torch.Tensor:
    module = getattr(target, getter)() if target is not None else None
    weight = getattr(module, "weight", None)
    if weight is None or not weight.is_floating_point() or weight.device.type == "meta":
        raise CheckpointError(
            "This format holds a copy of the target's embedding or head, and the drafter has none. Give the target (--target), unquantized."
        )
    return weight.detach().to("cpu", dtype, copy=True).contiguous()


def _scales(target: PreTrainedModel | None, config: DSparkConfig | None = None) -> bool:
    """Whether a target's family puts a scale around its embedding or a soft-cap around its logits; by its name where it is not at hand."""
    if target is None:
        return config is not None and str(config.target_model_type or "").startswith("gemma")
    text = target.config.get_text_config(decoder=True)
    return type(target.get_input_embeddings()) is not torch.nn.Embedding or getattr(text, "final_logit_softcapping", None) is not None


def _refuse(form: str, reasons: dict[str, bool]) -> None:
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise CheckpointError(f"The format {form!r} cannot hold {', '.join(found)}. Convert to another one: {', '.join(WRITTEN)}.")


WRITTEN = ("hf-dspark", "deepspec", "speculators")


def fresh_folder(folder: str | Path) -> Path:
    """The folder to write into, which must be new or empty."""
    path = Path(folder).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is not empty. Name a new folder.")
    return path
