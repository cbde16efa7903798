"""Response rows and the files that hold them: JSONL, plain or gzipped, and Parquet."""

from __future__ import annotations

import gzip
import json
import logging
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_dspark.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResponseRow:
    """One conversation with the target's own responses in it, as token ids of the target's tokenizer.

    Args:
        source (`str`): the prompt's domain, used to group the held-out metrics.
        prompt_ids (`tuple[int, ...]`): the chat-templated text up to the first response.
        response_ids (`tuple[int, ...]`): what follows, later turns included; never empty.
        temperature (`float`): that the responses were drawn at (0 is greedy).
        ended (`bool`): True where the last response stopped by itself rather than at a length cap.
        spans (`tuple[tuple[int, int], ...]`): where the responses are in `ids`, half-open, increasing, the first one right behind
            the prompt; left out, all of `response_ids` is one response.
        opening (`tuple[int, ...]`): of a later turn that is a row of its own, the prompt that its conversation began with.
    """

    source: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    temperature: float
    ended: bool
    spans: tuple[tuple[int, int], ...] = ()
    opening: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.spans:
            object.__setattr__(self, "spans", ((len(self.prompt_ids), len(self)),))

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens of the row."""
        return self.prompt_ids + self.response_ids

    @property
    def responses(self) -> list[tuple[int, ...]]:
        """The tokens of each response."""
        ids = self.ids
        return [ids[begin:end] for begin, end in self.spans]


def row_from_record(record: Any, *, vocab_size: int | None, where: str) -> ResponseRow | None:
    """One row out of a JSON object with `ids` and `spans`, or `prompt_ids` and `response_ids`; None where it holds no response tokens.

    Raises:
        DataError: beginning with `where` (file and line), for everything that is not such a row.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: a {type(record).__name__}; allowed: a JSON object with ids and spans, or prompt_ids and response_ids.")
    temperature = record.get("temperature", 0.0)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
        raise DataError(f"{where}: temperature is {temperature!r}; allowed: a number of 0 or more. Correct this row.")
    if "ids" in record:
        ids = _token_ids(record, "ids", vocab_size, where)
        spans = _spans(record.get("spans"), len(ids), where)
    else:
        prompt = _token_ids(record, "prompt_ids", vocab_size, where)
        ids = prompt + (() if record.get("response_ids") == [] else _token_ids(record, "response_ids", vocab_size, where))
        spans = ((len(prompt), len(ids)),) if len(ids) > len(prompt) else ()
    if not spans:
        return None
    opening = _token_ids(record, "opening", vocab_size, where) if "opening" in record else ()
    begin, end = spans[0][0], spans[-1][1]  # What the last response is followed by was never answered, and trains nothing.
    source, ended = str(record.get("source", "unknown")), bool(record.get("ended", False))
    return ResponseRow(source, ids[:begin], ids[begin:end], float(temperature), ended, spans, opening)


def _token_ids(record: dict[str, Any], field: str, vocab_size: int | None, where: str) -> tuple[int, ...]:
    ids = record.get(field)
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise DataError(f"{where}: {field} is {json.dumps(ids)[:60]}; allowed: a list of one token id or more. Regenerate this row.")
    low, high = min(ids), max(ids)
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        limit = "" if vocab_size is None else f" to {vocab_size - 1}"
        raise DataError(
            f"{where}: {field} holds id {low if low < 0 else high}; allowed: 0{limit}, the target's vocabulary. "
            "The responses must come from this target's own tokenizer."
        )
    return tuple(ids)


def _spans(spans: Any, length: int, where: str) -> tuple[tuple[int, int], ...]:
    good = isinstance(spans, list) and all(isinstance(s, list) and len(s) == 2 and all(type(i) is int for i in s) for s in spans)
    edges = [edge for span in spans for edge in span] if good else []
    # Something must stand before the first response.
    if not good or edges != sorted(edges) or (edges and not 1 <= edges[0] <= edges[-1] <= length):
        raise DataError(
            f"{where}: spans is {json.dumps(spans)[:60]} of {length} ids; allowed: a list of increasing [begin, end) pairs from 1 on, "
            "inside the row. Regenerate this row."
        )
    return tuple((begin, end) for begin, end in spans if begin < end)


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Every row of a `.jsonl`, `.jsonl.gz` or `.parquet` file, with where it stands ("FILE, line N").

    Raises:
        DataError: naming file and line, for a file that cannot be read or is corrupt.
    """
    number = 0
    try:
        if path.suffix == ".parquet":
            yield from _parquet_records(path)
            return
        opener = gzip.open if path.suffix == ".gz" else open
        # Line by line, and never str.splitlines(): that also breaks at U+2028 and its like, which JSON allows inside strings.
        with opener(path, "rt", encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{path}, line {number}: not JSON ({error}); allowed: one JSON object a line. Cut a half-written line off."
                    ) from None
                yield f"{path}, line {number}", record
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}, after line {number}: {error}. Restore it, or check its name and permissions.") from error


def parquet() -> Any:
    """The module `pyarrow.parquet`.

    Raises:
        DataError: if pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("Parquet files need pyarrow, which is not installed. Run: pip install pyarrow, or use JSONL.") from error
    return pyarrow.parquet


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    reader = parquet()
    import pyarrow

    number = 0
    try:
        with reader.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", {name: value for name, value in record.items() if value is not None}
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}, after row {number}: not a whole Parquet file ({error}). Restore the file.") from error


def read_responses(paths: Iterable[str | Path], *, vocab_size: int | None = None) -> list[ResponseRow]:
    """Read response rows from files `*.jsonl`, `*.jsonl.gz` or `*.parquet`; ids at or above `vocab_size` are refused.

    Returns:
        `list[ResponseRow]`: in file order; a row that an earlier file or line already holds is read once, rows without response tokens are
        left out, counted in the log.
    Raises:
        DataError: naming file and line of a malformed row; also when there is no row at all.
    """
    rows: dict[ResponseRow, None] = {}
    names = [Path(path) for path in paths]
    for path in names:
        found = [row_from_record(record, vocab_size=vocab_size, where=where) for where, record in read_records(path)]
        rows.update((row, None) for row in found if row is not None)
        if empty := found.count(None):
            logger.warning("%s: %d rows without response tokens are left out.", path, empty)
    if not rows:
        raise DataError(
            f"no response rows in {[str(name) for name in names]}; allowed: one or more. Generate responses with `hf-dspark data` first."
        )
    return list(rows)
