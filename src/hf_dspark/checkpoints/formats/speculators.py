"""speculators' checkpoints of its types dspark and dflash, which vLLM and llama.cpp's converter read: the backbone's config nested, rows of
the target's head beside a reduced vocabulary, windows that count from the anchor.

Source: vllm-project/speculators.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_dspark.checkpoints.formats.foreign import (
    BACKBONE_KEYS,
    HEAD_KEYS,
    Flat,
    Format,
    Written,
    own_tensors,
    refuse,
    target_matrix,
    target_scales,
    temperatures,
    windows,
)
from hf_dspark.checkpoints.tensor_files import LM_HEAD_KEY, TensorRecord
from hf_dspark.configuration_dspark import DSparkConfig
from hf_dspark.errors import CheckpointError

VERSION = "0.9.0"  # the release whose layout is written


def _flat(raw: Mapping[str, Any], source: str) -> Flat:
    kind = raw.get("speculators_model_type")
    layer = {key: value for key, value in raw["transformer_layer_config"].items() if key not in ("model_type", "rope_parameters")}
    settings = raw.get("speculators_config") or {}
    block, taps, from_anchor = raw["block_size"], raw.get("aux_hidden_state_layer_ids"), raw.get("sample_from_anchor")
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
    confidence = bool(raw.get("enable_confidence_head", True)) if kind == "dspark" else False
    reduced = raw.get("draft_vocab_size")
    rope = raw["transformer_layer_config"].get("rope_parameters")
    if isinstance(rope, Mapping) and not rope.get("rope_type") and isinstance(rope.get("sliding_attention"), Mapping):
        rope = rope["sliding_attention"]
    return {
        **layer,
        **windows(layer, layer.get("sliding_window"), inclusive=True),
        **temperatures(raw),
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
        "draft_vocab_size": None if reduced in (None, layer.get("vocab_size")) else reduced,
        "window_from_anchor": True,
        "causal_sliding_block": not raw.get("sliding_window_non_causal", False),
        "raw_embeddings": True,
        "target_name": (settings.get("verifier") or {}).get("name_or_path"),
        "target_model_type": None,
    }


SPECULATORS = Format("speculators", "speculators dspark or dflash", _flat)


def to_speculators(drafter: PreTrainedModel, target: PreTrainedModel | None, carried: Mapping[str, TensorRecord]) -> Written:
    """Config and tensors as speculators' trainer writes them since its release 0.8, with rows of the target's head where the draft
    vocabulary is reduced."""
    config: DSparkConfig = drafter.config
    slides = "sliding_attention" in (config.layer_types or ())
    refuse(
        "speculators",
        {
            "a Gemma 4 backbone": config.backbone != "qwen3",
            "windows that count from each slot": slides and not config.window_from_anchor,
            "embeddings or logits that the target's family scales": not config.raw_embeddings and target_scales(target, config),
            "a recurrent head behind a slot that does not predict": config.markov_head_type == "rnn"
            and config.markov_rank > 0
            and not config.sample_from_anchor,
            "a vocabulary whose size is not known": not config.vocab_size,
        },
    )
    layer = {key: getattr(config, key) for key in BACKBONE_KEYS} | {"model_type": "qwen3"}
    if slides:
        layer["sliding_window"] = config.sliding_window - 1
    kind = "dspark" if config.markov_rank or config.enable_confidence_head or config.sample_from_anchor else "dflash"
    proposal = {"proposal_type": "greedy", "speculative_tokens": config.block_size, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    fields = {
        "architectures": ["DSparkDraftModel" if kind == "dspark" else "DFlashDraftModel"],
        "speculators_model_type": kind,
        "speculators_version": VERSION,
        "transformer_layer_config": layer,
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "block_size": config.block_slots,
        "target_hidden_size": config.target_hidden_size,
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.sample_from_anchor,
        "sliding_window_non_causal": not config.causal_sliding_block,
        **({key: getattr(config, key) for key in HEAD_KEYS} if kind == "dspark" else {}),
        **({"confidence_temperatures": config.confidence_temperatures} if config.confidence_temperatures else {}),
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": config.target_name, "architectures": [type(target).__name__] if target is not None else []},
        },
        "tie_word_embeddings": False,
        "dtype": str(drafter.dtype).removeprefix("torch."),
    }
    tensors = own_tensors(drafter)
    if config.draft_vocab_size is not None:
        ids = drafter.draft_token_ids.cpu()
        tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
        head = carried[LM_HEAD_KEY].read() if LM_HEAD_KEY in carried else target_matrix(target, "get_output_embeddings", drafter.dtype)[ids]
        tensors[LM_HEAD_KEY] = head.contiguous()
    return fields, tensors
