"""This package's own format: the `config.json` of a `DSparkConfig`, and tensors under their own names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hf_dspark.configuration_dspark import DSparkConfig
from hf_dspark.errors import CheckpointError

MODEL_TYPE = "dspark"
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Keys that give the tensors their meaning, in every format.
REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rms_norm_eps", "block_size", "target_layer_ids", "mask_token_id", "markov_rank", "enable_confidence_head"),
)
# Far above any drafter, far below what would fill a memory before the files have been looked at.
_LARGEST = {
    **dict.fromkeys(("vocab_size", "draft_vocab_size", "mask_token_id", "num_anchors"), 1 << 24),
    **dict.fromkeys(("num_target_layers", "num_attention_heads", "num_key_value_heads"), 4096),
    **dict.fromkeys(("max_position_embeddings", "sliding_window"), 1 << 40),
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "markov_rank": 1 << 16,
    "head_dim": 1 << 14,
    "num_hidden_layers": 512,
    "block_size": 1024,
}


def own_config(raw: Mapping[str, Any], source: str, **overrides: Any) -> DSparkConfig:
    """The config of a checkpoint in this package's own format, where no default fills a key silently; `overrides` win over it."""
    missing = [key for key in (*REQUIRED, "markov_head_type", "rope_parameters") if raw.get(key) is None]
    missing += ["num_target_layers"] if "num_target_layers" not in raw else []
    if missing:
        raise CheckpointError(
            f"config.json of {source!r} lacks {', '.join(missing)}. Save the drafter again with save_pretrained, or download it again."
        )
    check_plausible(raw, source)
    dtype = raw.get("dtype")
    if dtype is not None and (not isinstance(dtype, str) or dtype not in DTYPES):
        raise CheckpointError(f"config.json of {source!r} cannot be used: dtype={dtype!r} (allowed: {', '.join(DTYPES)}).")
    with clean_errors(source):
        return DSparkConfig.from_dict({**raw, **overrides})


def check_plausible(fields: Mapping[str, Any], source: str) -> None:
    """Refuse sizes that are no whole numbers, or that nothing has, before anything is made of them; all of them in one error."""
    wrong = []
    for name, largest in _LARGEST.items():
        value = fields.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= largest):
            wrong.append(f"{name}={value!r} (allowed: a whole number up to {largest:,})")
    taps, kinds = fields.get("target_layer_ids"), fields.get("layer_types")
    if taps is not None and not (isinstance(taps, (list, tuple)) and len(taps) <= 512 and all(type(i) is int for i in taps)):
        wrong.append(f"target_layer_ids={str(taps)[:60]} (allowed: a list of layer numbers)")
    if kinds is not None and not (isinstance(kinds, (list, tuple)) and all(isinstance(kind, str) for kind in kinds)):
        wrong.append(f"layer_types={str(kinds)[:60]} (allowed: a list of names)")
    for name in ("rope_parameters", "rope_scaling"):
        if fields.get(name) is not None and not isinstance(fields[name], Mapping):
            wrong.append(f"{name}={str(fields[name])[:60]} (allowed: an object)")
    if wrong:
        raise CheckpointError(f"config.json of {source!r} cannot be used: {'; '.join(wrong)}. Download it again.")


@contextmanager
def clean_errors(source: str) -> Iterator[None]:
    """Whatever a config's values make the config's classes raise becomes one `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        # transformers and huggingface_hub validate with exceptions of their own, some of them outside ValueError.
        raise CheckpointError(f"config.json of {source!r} cannot be used: {str(error) or type(error).__name__}") from error
