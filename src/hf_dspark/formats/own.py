"""This package's own format: `config.json` of a `DSparkConfig`, and tensors under their own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_dspark.errors import CheckpointError

MODEL_TYPE = "dspark"

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "block_size",
    "target_layer_ids",
    "mask_token_id",
    "markov_rank",
    "enable_confidence_head",
)


def check_own_config(raw: Mapping[str, Any], source: str) -> None:
    """Refuse a config of this package's own format that leaves out keys which defaults would fill silently.

    Args:
        raw (`Mapping`): the parsed `config.json`.
        source (`str`): path or repository, for the message.
    Raises:
        CheckpointError: listing every missing key.
    """
    missing = [key for key in (*REQUIRED, "markov_head_type", "rope_parameters") if raw.get(key) is None]
    if "num_target_layers" not in raw:
        missing.append("num_target_layers")
    if missing:
        raise CheckpointError(
            f"config.json of {source!r} lacks {', '.join(missing)}. Save the drafter again with save_pretrained, or download it again."
        )
