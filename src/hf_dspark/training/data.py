"""Training sets out of data folders and files of response rows, and padded batches out of training sets."""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from hf_dspark.errors import DataError
from hf_dspark.training.data_folder import check_target, read_manifest, shards, target_fingerprint
from hf_dspark.training.rows import ResponseRow, read_responses

logger = logging.getLogger(__name__)

_POOL_BATCHES = 32  # batches whose rows are sorted by length together: little padding, still a shuffle
HELD_OUT_SHARE = 0.04  # of prompts, where no manifest says otherwise


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right with 0."""

    input_ids: Tensor  # (batch, sequence)
    loss_mask: Tensor  # (batch, sequence), bool, True on response tokens
    lengths: Tensor  # (batch,), tokens of each row without padding


@dataclass(frozen=True)
class DataSet:
    """Rows of one target, split; held-out rows are in the order of their prompts' hashes. `left_out` counts the others by reason."""

    manifests: list[dict[str, Any]]
    train_rows: list[ResponseRow]
    held_out_rows: list[ResponseRow]
    held_out_share: float
    left_out: dict[str, int] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Counts, and what the manifests say, as JSON takes it."""
        told = ("target", "sampling", "seed", "thinking", "prompts", "self_prompting", "exclude")
        sides = {"train": self.train_rows, "held_out": self.held_out_rows}
        return {
            "rows": {side: len(rows) for side, rows in sides.items()},
            "response_tokens": {side: sum(map(response_tokens, rows)) for side, rows in sides.items()},
            "held_out_share": self.held_out_share,
            "left_out": dict(self.left_out),
            "by_source": dict(sorted(Counter(row.source for row in self.train_rows).items())),
            "by_temperature": dict(sorted(Counter(f"{row.temperature:g}" for row in self.train_rows).items())),
            "folders": [{name: manifest[name] for name in told if name in manifest} for manifest in self.manifests],
        }


def load_data(
    paths: str | Path | Iterable[str | Path],
    target: PreTrainedModel | None = None,
    *,
    max_tokens: int | None = None,
) -> DataSet:
    """Read what `hf-dspark data` wrote, and files of response rows, and split them.

    Args:
        paths: folders with a manifest, or files `*.jsonl`, `*.jsonl.gz`, `*.parquet`; one or several.
        target (`PreTrainedModel`, *optional*): the model to train for; manifests of another one are refused, as are ids outside its
            vocabulary.
        max_tokens (`int`, *optional*): longer rows are left out.
    Returns:
        `DataSet`: split by the largest held-out share that the manifests name, else 0.04; rows too short to train on are left out and
            counted, as are those beyond `max_tokens`.
    Raises:
        DataError: for a manifest of another target, a corrupt file (naming file and line), or nothing to train on.
    """
    rows, manifests = load_responses(paths, target)
    held_out_share = max((manifest["held_out"] for manifest in manifests), default=HELD_OUT_SHARE)
    chosen, left_out = [], Counter[str]()
    for row in rows:
        if not can_train(row):
            left_out["one response token"] += 1
        elif max_tokens is not None and len(row) > max_tokens:
            left_out[f"over {max_tokens} tokens"] += 1
        else:
            chosen.append(row)
    for reason, count in left_out.items():
        logger.warning("%d of %d rows are left out: %s.", count, len(rows), reason)
    train, held_out = split_rows(chosen, held_out_fraction=held_out_share)
    if not train:
        raise DataError(f"no rows to train on: {len(rows)} read, left out {dict(left_out)}, held out {len(held_out)}. Generate more rows.")
    return DataSet(manifests, train, held_out, held_out_share, dict(left_out))


def load_responses(
    paths: str | Path | Iterable[str | Path], target: PreTrainedModel | None = None
) -> tuple[list[ResponseRow], list[dict[str, Any]]]:
    """Rows of folders and files, each once, and the folders' manifests; arguments and errors as in `load_data`."""
    fingerprint = None if target is None else target_fingerprint(target)
    manifests: list[dict[str, Any]] = []
    files: list[Path] = []
    for path in [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]:
        if not path.is_dir():
            files.append(path)
            continue
        manifest = read_manifest(path)
        if manifest is None:
            raise DataError(f"{path} holds no manifest.json; allowed: a folder that `hf-dspark data` wrote, or files of response rows.")
        if fingerprint is not None:
            check_target(manifest, path, fingerprint)
        manifests.append(manifest)
        files += shards(path)
    vocab_size = None if target is None else target.config.get_text_config(decoder=True).vocab_size
    return read_responses(files, vocab_size=vocab_size), manifests


def response_tokens(row: ResponseRow) -> int:
    """Tokens of all responses of a row."""
    return sum(end - begin for begin, end in row.spans)


def can_train(row: ResponseRow) -> bool:
    """Whether a row holds at least one anchor: a response token followed by another of the same response."""
    return any(end - begin >= 2 for begin, end in row.spans)


def prompt_hash(row: ResponseRow) -> int:
    """A 64-bit hash of the ids up to the conversation's first response, the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(repr(row.opening or row.prompt_ids).encode()).digest()[:8], "big")


def split_rows(rows: Sequence[ResponseRow], *, held_out_fraction: float) -> tuple[list[ResponseRow], list[ResponseRow]]:
    """Training rows, and held-out ones: those whose prompt's hash is in the lowest fraction, so that no prompt is on both sides and more
    data moves no row across. Held-out rows come in the order of their hashes, so that a prefix of them is a fair sample."""
    limit = int(held_out_fraction * 2**64)
    hashed = [(prompt_hash(row), i) for i, row in enumerate(rows)]
    return [rows[i] for h, i in hashed if h >= limit], [rows[i] for h, i in sorted(hashed) if h < limit]


def epoch_batches(lengths: Sequence[int], *, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row indices of one epoch's batches: a shuffle whose batches hold rows of similar length, a pure function of its arguments."""
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    pool = batch_size * _POOL_BATCHES
    batches = []
    for start in range(0, len(order), pool):
        chunk = sorted(order[start : start + pool], key=lambda index: lengths[index])
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    rng.shuffle(batches)
    return batches


def collate(rows: Sequence[ResponseRow]) -> Batch:
    """Pad rows on the right into one batch; the loss mask covers the response tokens."""
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    loss_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for mask, row in zip(loss_mask, rows, strict=True):
        for begin, end in row.spans:
            mask[begin:end] = True
    return Batch(input_ids, loss_mask, lengths)
