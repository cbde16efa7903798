"""Turns response rows into training sets and padded batches. Does not know models, blocks or losses."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_dspark.errors import DataError
from hf_dspark.training.manifest import check_target, read_manifest, shards, target_fingerprint
from hf_dspark.training.rows import ResponseRow, read_responses

__all__ = [
    "Batch", "DataSet", "ResponseRow", "can_train", "collate", "coverage", "epoch_batches", "frequent_tokens", "load_data",
    "load_responses", "ordered_batches", "prompt_hash", "read_responses", "split_rows",
]  # fmt: skip

logger = logging.getLogger(__name__)

_POOL_BATCHES = 32  # batches whose rows are sorted by length together: little padding, still a shuffle
HELD_OUT_SHARE = 0.04  # of prompts, where no manifest says otherwise


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right.

    Args:
        input_ids (`torch.Tensor` of shape `(batch, sequence)`): whole rows, padded with 0.
        loss_mask (`torch.Tensor` of shape `(batch, sequence)`): bool, True on response tokens.
        lengths (`torch.Tensor` of shape `(batch,)`): tokens of each row without padding.
        rows (`tuple[ResponseRow, ...]`): where they came from.
    """

    input_ids: Tensor
    loss_mask: Tensor
    lengths: Tensor
    rows: tuple[ResponseRow, ...]

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.input_ids.to(device), self.loss_mask.to(device), self.lengths.to(device), self.rows)


@dataclass(frozen=True)
class DataSet:
    """Rows of one target, split.

    Args:
        manifests (`list[dict]`): of the folders, in the order given; files without one have none.
        train_rows (`list[ResponseRow]`): to learn from.
        held_out_rows (`list[ResponseRow]`): never to be learnt from, in the order of their prompts' hashes.
        held_out_share (`float`): expected share of held-out prompts.
        left_out (`dict[str, int]`): rows that are on neither side, by reason.
    """

    manifests: list[dict[str, Any]]
    train_rows: list[ResponseRow]
    held_out_rows: list[ResponseRow]
    held_out_share: float
    left_out: dict[str, int] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Counts, and what the manifests say, as JSON takes it."""
        kept = ("target", "sampling", "seed", "thinking", "prompts", "self_prompting", "exclude")
        return {
            "rows": {"train": len(self.train_rows), "held_out": len(self.held_out_rows)},
            "response_tokens": {"train": _response_tokens(self.train_rows), "held_out": _response_tokens(self.held_out_rows)},
            "held_out_share": self.held_out_share,
            "left_out": dict(self.left_out),
            "by_source": _count(row.source for row in self.train_rows),
            "by_temperature": _count(f"{row.temperature:g}" for row in self.train_rows),
            "folders": [{name: manifest[name] for name in kept if name in manifest} for manifest in self.manifests],
        }


def load_data(
    paths: str | Path | Iterable[str | Path], target: Any = None, *, held_out_share: float | None = None, max_tokens: int | None = None
) -> DataSet:
    """Read what `hf-dspark data` wrote, and files of response rows, and split them.

    Args:
        paths: folders with a manifest, or files `*.jsonl`, `*.jsonl.gz`, `*.parquet`; one or several.
        target (`PreTrainedModel`, *optional*): the model to train for; manifests of another one are refused, as are ids outside its
            vocabulary.
        held_out_share (`float`, *optional*): share of held-out prompts; default the largest that the manifests name, else 0.04.
        max_tokens (`int`, *optional*): longer rows are left out.
    Returns:
        `DataSet`: rows too short to train on are left out and counted, as are those beyond `max_tokens`.
    Raises:
        DataError: for a manifest of another target, a corrupt file (naming file and line), or nothing to train on.
    """
    fingerprint = None if target is None else target_fingerprint(target)
    vocab_size = None if target is None else target.config.get_text_config(decoder=True).vocab_size
    rows, manifests = load_responses(paths, target_fingerprint=fingerprint, vocab_size=vocab_size)
    if held_out_share is None:
        held_out_share = max((manifest["held_out"] for manifest in manifests), default=HELD_OUT_SHARE)
    left_out = {
        "one response token": sum(not can_train(row) for row in rows),
        f"over {max_tokens} tokens": sum(can_train(row) and max_tokens is not None and len(row) > max_tokens for row in rows),
    }
    left_out = {reason: count for reason, count in left_out.items() if count}
    for reason, count in left_out.items():
        logger.warning("%d of %d rows are left out: %s.", count, len(rows), reason)
    kept = [row for row in rows if can_train(row) and (max_tokens is None or len(row) <= max_tokens)]
    train, held_out = split_rows(kept, held_out_fraction=held_out_share)
    if not train:
        raise DataError(f"no rows to train on: {len(rows)} read, left out {left_out}, held out {len(held_out)}. Generate more rows.")
    return DataSet(manifests, train, held_out, held_out_share, left_out)


def load_responses(
    paths: str | Path | Iterable[str | Path], *, target_fingerprint: str | None = None, vocab_size: int | None = None
) -> tuple[list[ResponseRow], list[dict[str, Any]]]:
    """Read rows from folders and files, and check that the folders' manifests name the target.

    Args:
        paths: folders with a manifest, or files of rows; one or several.
        target_fingerprint (`str`, *optional*): from `manifest.target_fingerprint`.
        vocab_size (`int`, *optional*): ids at or above it are refused.
    Returns:
        `tuple[list[ResponseRow], list[dict]]`: rows in the order of their ids, each once, and the folders' manifests.
    Raises:
        DataError: for a manifest of another target, or a corrupt file, naming file and line.
    """
    manifests: list[dict[str, Any]] = []
    files: list[Path] = []
    for path in [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]:
        if path.is_dir():
            manifest = read_manifest(path)
            if manifest is None:
                raise DataError(f"{path} holds no manifest.json; allowed: a folder that `hf-dspark data` wrote, or files of response rows.")
            check_target(manifest, path, target_fingerprint)
            manifests.append(manifest)
            files += shards(path)
        else:
            files.append(path)
    return read_responses(files, vocab_size=vocab_size), manifests


def _count(values: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return dict(sorted(counts.items()))


def _response_tokens(rows: Iterable[ResponseRow]) -> int:
    return sum(end - begin for row in rows for begin, end in row.spans)


def can_train(row: ResponseRow) -> bool:
    """Whether a row holds at least one anchor: a response token followed by another of the same response."""
    return any(end - begin >= 2 for begin, end in row.spans)


def prompt_hash(row: ResponseRow) -> int:
    """A 64-bit hash of the ids up to the conversation's first response, the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(repr(row.opening or row.prompt_ids).encode()).digest()[:8], "big")


def split_rows(rows: Sequence[ResponseRow], *, held_out_fraction: float) -> tuple[list[ResponseRow], list[ResponseRow]]:
    """Split rows into training and held-out ones by a hash of the prompt, so that no prompt is on both sides.

    The side of a row depends on nothing but its prompt: adding data moves no row across. Held-out rows come back in
    the order of their hashes, so that a prefix of them is a fair sample.

    Args:
        rows: rows to split.
        held_out_fraction (`float`): expected share of held-out prompts, in [0, 1).
    Returns:
        `tuple[list[ResponseRow], list[ResponseRow]]`: training rows, held-out rows.
    Raises:
        ValueError: if the fraction is outside [0, 1).
    """
    if not 0 <= held_out_fraction < 1:
        raise ValueError(f"held_out_fraction is {held_out_fraction}; allowed: 0 up to, not including, 1. Use 0.03 for thousands of rows.")
    limit = int(held_out_fraction * 2**64)
    hashes = [prompt_hash(row) for row in rows]
    train = [row for row, h in zip(rows, hashes, strict=True) if h >= limit]
    held_out = sorted(((h, i) for i, h in enumerate(hashes) if h < limit))
    return train, [rows[i] for _, i in held_out]


def epoch_batches(lengths: Sequence[int], *, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row indices of one epoch's batches: a shuffle whose batches hold rows of similar length.

    A pure function of its arguments, so a resumed run sees the batches of the uninterrupted one.

    Args:
        lengths: tokens of each row.
        batch_size (`int`): rows a batch; the last batch of an epoch may be smaller.
        seed (`int`): of the run.
        epoch (`int`): from 0.
    Returns:
        `list[list[int]]`: every index exactly once.
    Raises:
        ValueError: if batch_size is below 1 or there are no rows.
    """
    if batch_size < 1 or not lengths:
        raise ValueError(f"batch_size is {batch_size} for {len(lengths)} rows; allowed: 1 or more of each. Check the data's split.")
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


def ordered_batches(rows: Sequence[ResponseRow], *, batch_size: int) -> Iterator[list[ResponseRow]]:
    """Batches of all rows in order of length, for evaluation."""
    ordered = sorted(rows, key=len)
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


def collate(rows: Sequence[ResponseRow]) -> Batch:
    """Pad rows on the right into one batch; the loss mask covers the response tokens."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    loss_mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row.ids)
        for begin, end in row.spans:
            loss_mask[i, begin:end] = True
    return Batch(input_ids, loss_mask, lengths, tuple(rows))


def frequent_tokens(rows: Iterable[ResponseRow], size: int, *, always: Iterable[int] = (), vocab_size: int) -> Tensor:
    """The most frequent response tokens: a reduced draft vocabulary.

    Args:
        rows: training rows only, or the coverage measured on held-out rows means nothing.
        size (`int`): ids to choose.
        always: ids that are in it whatever their count (those that end a text).
        vocab_size (`int`): of the target; ids never seen fill up from the lowest, should the data hold too few.
    Returns:
        `torch.Tensor` of shape `(size,)`: target ids, int64, increasing.
    Raises:
        ValueError: if size is not in 1..vocab_size or smaller than the ids that must be in it, or an id is outside.
    """
    forced = sorted(set(always))
    if not max(1, len(forced)) <= size <= vocab_size:
        raise ValueError(f"draft vocabulary of {size}; allowed: {max(1, len(forced))} to {vocab_size}. Choose another --draft-vocab.")
    if forced and not 0 <= forced[0] <= forced[-1] < vocab_size:
        raise ValueError(
            f"ids {forced} must be in the draft vocabulary; allowed: 0 to {vocab_size - 1}. Check the tokenizer's special ids."
        )
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for row in rows:
        ids = torch.tensor(list(chain.from_iterable(row.responses)))
        counts.index_add_(0, ids, torch.ones_like(ids))
    counts[forced] = torch.iinfo(torch.long).max
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def coverage(rows: Iterable[ResponseRow], token_ids: Tensor) -> tuple[int, int]:
    """Response tokens inside a draft vocabulary, and response tokens in all (numerator, denominator)."""
    known = set(token_ids.tolist())
    inside = total = 0
    for row in rows:
        inside += sum(token in known for response in row.responses for token in response)
        total += _response_tokens([row])
    return inside, total
