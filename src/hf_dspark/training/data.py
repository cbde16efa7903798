"""Reads response rows and turns them into padded batches. Does not know models, blocks or losses."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_dspark.errors import DataError

_POOL_BATCHES = 32  # batches whose rows are sorted by length together: little padding, still a shuffle


@dataclass(frozen=True)
class ResponseRow:
    """One prompt and the target's own response to it, as token ids of the target's tokenizer.

    Args:
        source (`str`): the prompt's domain, used to group the held-out metrics.
        prompt_ids (`tuple[int, ...]`): the chat-templated prompt.
        response_ids (`tuple[int, ...]`): what the target answered; never empty.
        temperature (`float`): the temperature the response was drawn at (0 is greedy).
        ended (`bool`): True where the response stopped by itself rather than at a length cap.
    """

    source: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    temperature: float
    ended: bool

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right.

    Args:
        input_ids (`torch.Tensor` of shape `(batch, sequence)`): prompt then response, padded with 0.
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


def _token_ids(record: dict[str, Any], field: str, vocab_size: int | None, where: str) -> tuple[int, ...]:
    ids = record.get(field)
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise DataError(f"{where}: {field} is {type(ids).__name__}; allowed: a list of integers. Regenerate this row.")
    if not ids:
        raise DataError(f"{where}: {field} holds no tokens; allowed: one or more. Remove the row or regenerate it.")
    low, high = min(ids), max(ids)
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        limit = "" if vocab_size is None else f" to {vocab_size - 1}"
        raise DataError(
            f"{where}: {field} holds id {low if low < 0 else high}; allowed: 0{limit}, the target's vocabulary. "
            "The responses must come from this target's own tokenizer."
        )
    return tuple(ids)


def read_responses(paths: Iterable[str | Path], *, vocab_size: int | None = None) -> list[ResponseRow]:
    """Read response rows from JSONL files, plain or gzipped, one line at a time.

    Args:
        paths: files named `*.jsonl` or `*.jsonl.gz`; each line an object with `prompt_ids`, `response_ids` and,
            where known, `source`, `temperature`, `ended`.
        vocab_size (`int`, *optional*): ids at or above it are refused.
    Returns:
        `list[ResponseRow]`: in file order; a row that an earlier file or line already holds is kept once.
    Raises:
        DataError: naming file and line where a row is no JSON object, has no response tokens, or holds ids outside
            the vocabulary; also when there is no row at all.
    """
    rows: dict[ResponseRow, None] = {}
    names = [Path(path) for path in paths]
    for path in names:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{where}: not JSON ({error}); allowed: one JSON object a line. Cut a half-written line off.") from None
                if not isinstance(record, dict):
                    raise DataError(f"{where}: a {type(record).__name__}; allowed: a JSON object with prompt_ids and response_ids.")
                temperature = record.get("temperature", 0.0)
                if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature < float("inf"):
                    raise DataError(f"{where}: temperature is {temperature!r}; allowed: a number of 0 or more. Correct this row.")
                row = ResponseRow(
                    source=str(record.get("source", "unknown")),
                    prompt_ids=_token_ids(record, "prompt_ids", vocab_size, where),
                    response_ids=_token_ids(record, "response_ids", vocab_size, where),
                    temperature=float(temperature),
                    ended=bool(record.get("ended", False)),
                )
                rows[row] = None
    if not rows:
        raise DataError(
            f"no response rows in {[str(name) for name in names]}; allowed: one or more. Generate responses with the target first."
        )
    return list(rows)


def can_train(row: ResponseRow) -> bool:
    """Whether a row holds at least one anchor: a response token followed by another."""
    return len(row.response_ids) >= 2


def prompt_hash(row: ResponseRow) -> int:
    """A 64-bit hash of the prompt's ids, the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(repr(row.prompt_ids).encode()).digest()[:8], "big")


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
        input_ids[i, : len(row)] = torch.tensor(row.prompt_ids + row.response_ids)
        loss_mask[i, len(row.prompt_ids) : len(row)] = True
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
        ids = torch.tensor(row.response_ids)
        counts.index_add_(0, ids, torch.ones_like(ids))
    counts[forced] = torch.iinfo(torch.long).max
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def coverage(rows: Iterable[ResponseRow], token_ids: Tensor) -> tuple[int, int]:
    """Response tokens inside a draft vocabulary, and response tokens in all (numerator, denominator)."""
    known = set(token_ids.tolist())
    inside = total = 0
    for row in rows:
        inside += sum(token in known for token in row.response_ids)
        total += len(row.response_ids)
    return inside, total
