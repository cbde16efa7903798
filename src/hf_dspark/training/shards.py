"""A data folder while it is written: rows are appended, a kill at any time costs the row being written and no other. Knows files and ids;
knows no tokens' meaning and no model."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_dspark.errors import DataError
from hf_dspark.training.manifest import FORMAT, FORMAT_VERSION, read_manifest, shards, write_manifest
from hf_dspark.training.rows import parquet, read_records

logger = logging.getLogger(__name__)

_SKIPPED = "skipped.jsonl"


class AppendFile:
    """A file of JSON lines that only grows, by whole groups of lines.

    Args:
        path (`Path`): made when the first line comes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self._size = 0

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Write all records, or none where there is no room.

        Raises:
            OSError: with the file as it was before.
        """
        if self._file is None:
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            self._size = os.fstat(self._file).st_size
        data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        try:
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def cut_half_written(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines whose writer may have been killed: a last line that is not whole is cut off, as are rows at the end whose
    conversation goes on in rows that were not written any more.

    Returns:
        `list[dict]`: the records that remain.
    Raises:
        DataError: naming file and line, where anything but the end is damaged.
    """
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        logger.warning("%s: a half-written last line (%d bytes) is cut off.", path, len(data) - whole)
        os.truncate(path, whole)
    records = [record for _, record in read_records(path)]
    waiting = 0
    while waiting < len(records) and records[-1 - waiting].get("more", 0) > waiting:
        waiting += 1
    if waiting:
        kept = b"".join(line + b"\n" for line in data[:whole].split(b"\n")[: len(records) - waiting])
        logger.warning("%s: %d rows of a conversation that was not finished are cut off.", path, waiting)
        os.truncate(path, len(kept))
        records = records[: len(records) - waiting]
    return records


class ResponseFolder:
    """A folder of shards `responses-*.jsonl`, its `manifest.json`, and `skipped.jsonl`, which names prompts that came to nothing.

    Args:
        path (`Path`): made where it does not exist.
        identity (`dict`): what must stay the same when a folder is gone on with: target, sampling, seed ..
        rows_a_shard (`int`): rows of one file.
    """

    def __init__(self, path: Path, identity: dict[str, Any], *, rows_a_shard: int = 4096) -> None:
        self.path = path
        self.identity = identity
        self.rows_a_shard = rows_a_shard
        self.keys: dict[str, str] = {}  # id to normalised prompt of every row
        self.turn_keys: set[str] = set()  # normalised turns of conversations of several
        self.skips: dict[str, str] = {}  # id to reason
        self.rows = self.tokens = self.response_tokens = 0
        self.by_source: dict[str, Counter[str]] = {}
        self.by_temperature: dict[str, Counter[str]] = {}
        self._shard: AppendFile | None = None
        self._shard_rows = 0
        self._skipped = AppendFile(path / _SKIPPED)
        self._extra: dict[str, Any] = {}

    @contextmanager
    def open(self) -> Iterator[ResponseFolder]:
        """Lock the folder, mend its ends, and read what it holds; on leaving, the manifest is up to date.

        Raises:
            DataError: if another process writes to it, its manifest says something else, or a shard is corrupt.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot make the folder {self.path}: {error.strerror}. Name another --output.") from error
        lock = FileLock(self.path / ".lock")
        with self._room():
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise DataError(f"{self.path} is being written to by another process. Wait for it, or name another --output.") from error
        try:
            self._check_identity()
            self._read()
            self.save({})
            yield self
            self.save({})
        finally:
            if self._shard is not None:
                self._shard.close()
            self._skipped.close()
            lock.release()

    def append(self, records: list[dict[str, Any]]) -> None:
        """Add the rows of one prompt, all or none.

        Raises:
            DataError: where the disk is full; the folder stays as it was.
        """
        records = [{**record, "more": len(records) - 1 - n} if len(records) > 1 else record for n, record in enumerate(records)]
        if self._shard is None or self._shard_rows >= self.rows_a_shard:
            self._next_shard()
        assert self._shard is not None
        with self._room():
            self._shard.append(records)
        self._shard_rows += len(records)
        for record in records:
            self._count(record)

    def skip(self, id: str, reason: str) -> None:
        """Remember that a prompt comes to nothing, so that it is not tried again."""
        with self._room():
            self._skipped.append([{"id": id, "reason": reason}])
        self.skips[id] = reason

    def save(self, extra: dict[str, Any]) -> None:
        """Write the manifest: what must stay the same, counts, and `extra`, which is kept from one call to the next."""
        self._extra |= extra
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            **self.identity,
            "rows": self.rows,
            "tokens": {"all": self.tokens, "responses": self.response_tokens},
            "by_source": {name: dict(counts) for name, counts in sorted(self.by_source.items())},
            "by_temperature": {name: dict(counts) for name, counts in sorted(self.by_temperature.items())},
            "skipped": self.skipped,
            **{name: value for name, value in self._extra.items() if name != "skipped"},
        }
        with self._room():
            write_manifest(self.path, manifest)

    @property
    def skipped(self) -> dict[str, int]:
        """Prompts without a row, by reason; those of the prompt files as the last run counted them."""
        return dict(sorted((Counter(self.skips.values()) + Counter(self._extra.get("skipped", {}))).items()))

    def compact(self) -> None:
        """Turn JSONL shards into Parquet ones; interrupted, it leaves both or one, never none."""
        pyarrow_parquet = parquet()
        import pyarrow

        if self._shard is not None:
            self._shard.close()
            self._shard = None
        for path in self.path.glob("responses-*.jsonl"):
            records = [record for _, record in read_records(path)]
            waiting = path.with_suffix(".parquet.tmp")
            with self._room():
                pyarrow_parquet.write_table(pyarrow.Table.from_pylist(records), waiting, compression="zstd")
                os.replace(waiting, path.with_suffix(".parquet"))
            path.unlink()

    # ------------------------------------------------------------------------------------------------------- its smaller steps

    def _check_identity(self) -> None:
        manifest = read_manifest(self.path)
        if manifest is None:
            if shards(self.path):
                raise DataError(f"{self.path} holds responses but no manifest.json. Restore it, or name another --output.")
            return
        for name, value in self.identity.items():
            if manifest.get(name) != value:
                raise DataError(
                    f"{self.path} was begun with {name} {json.dumps(manifest.get(name))}, this run has {json.dumps(value)}; a folder holds "
                    "rows of one making. Give the same options to go on, or name another --output."
                )
        self._extra = {name: manifest[name] for name in ("prompts", "self_prompting", "exclude") if name in manifest}

    def _read(self) -> None:
        for half in self.path.glob("*.tmp"):
            half.unlink()
        files = shards(self.path)
        for path in self.path.glob("responses-*.jsonl"):
            if path not in files:
                path.unlink()  # Its Parquet file is whole; the kill came before this.
        for path in files:
            last = path == files[-1] and path.suffix == ".jsonl"
            records = cut_half_written(path) if last else [record for _, record in read_records(path)]
            for record in records:
                self._count(record)
            if last and len(records) < self.rows_a_shard:
                self._shard, self._shard_rows = AppendFile(path), len(records)
        if self._skipped.path.exists():
            self.skips = {record["id"]: record["reason"] for record in cut_half_written(self._skipped.path)}

    def _next_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
        numbers = [int(path.stem.split("-")[1]) for path in shards(self.path)]
        self._shard = AppendFile(self.path / f"responses-{max(numbers, default=-1) + 1:05d}.jsonl")
        self._shard_rows = 0

    def _count(self, record: dict[str, Any]) -> None:
        try:
            responses = sum(end - begin for begin, end in record["spans"])
            source, temperature, length = record["source"], f"{record['temperature']:g}", len(record["ids"])
            self.keys[record["id"]] = record["key"]
            self.turn_keys.update(record.get("turn_keys", ()))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.path}: a row lacks {error}; allowed: rows as `hf-dspark data` writes them. Move it out.") from error
        self.rows += 1
        self.tokens += length
        self.response_tokens += responses
        for counts in (self.by_source.setdefault(source, Counter()), self.by_temperature.setdefault(temperature, Counter())):
            counts.update(rows=1, response_tokens=responses)

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Turn the system's refusal to write into one line that says what is safe and what to do."""
        try:
            yield
        except OSError as error:
            what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else error.strerror or str(error)
            raise DataError(
                f"cannot write to {self.path}: {what}. The {self.rows} rows in it are safe; make room or set it right, and run the same "
                "command again to go on."
            ) from error
