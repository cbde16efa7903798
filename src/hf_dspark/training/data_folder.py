"""A data folder: shards of response rows, and a manifest that says which target wrote them, and how.

A kill at any time loses the row being written and no other.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import PreTrainedModel

from hf_dspark.errors import DataError
from hf_dspark.training.rows import parquet, read_records
from hf_dspark.utils.files import atomic_path, atomic_write_json

logger = logging.getLogger(__name__)

FORMAT = "hf-dspark responses"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"

_CONFIG_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
)  # fmt: skip
_SAMPLES = 4  # values of each parameter that go into the fingerprint
_SMALL = 1e-4  # float16 holds smaller values less precisely than bfloat16


def target_fingerprint(model: PreTrainedModel) -> str:
    """A short text that tells targets apart: digests of the architecture and of a few values of every weight, whatever their dtype.

    Where weights are not in memory (offloaded), it ends with a dash and fits every target of the same architecture.
    """
    config = model.config.get_text_config(decoder=True)
    fields = {name: getattr(config, name, None) for name in _CONFIG_FIELDS}
    shape = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        if parameter.device.type == "meta":
            return f"{shape}-"
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        flat = parameter.detach().reshape(-1)
        last = flat.numel() - 1
        values = flat[[last * k // (_SAMPLES - 1) for k in range(_SAMPLES)]].float().cpu()
        values = torch.where(values.abs() < _SMALL, 0.0, values).to(torch.bfloat16)
        digest.update(repr((last, values.tolist())).encode())
    return f"{shape}-{digest.hexdigest()[:16]}"


def same_target(one: str, other: str) -> bool:
    """Whether two fingerprints are of one target, as far as both say."""
    return one == other or (one.split("-")[0] == other.split("-")[0] and (one.endswith("-") or other.endswith("-")))


def check_target(manifest: dict[str, Any], folder: Path, fingerprint: str) -> None:
    """Raise a `DataError` that names both where another target wrote a folder's responses."""
    theirs = manifest["target"]
    if not same_target(theirs["fingerprint"], fingerprint):
        raise DataError(
            f"{folder}: the responses are those of the target {theirs['name']!r} (fingerprint {theirs['fingerprint']}), not of this one "
            f"(fingerprint {fingerprint}). A drafter learns from its own target's responses: generate them with `hf-dspark data`, or name "
            "the right --target."
        )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, None where it has none; a `DataError` if it is not whole, or of another format than this version reads."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"], manifest["version"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} cannot be read ({error!r}). Restore it, or write to a new folder.") from error
    if found != (FORMAT, FORMAT_VERSION):
        raise DataError(f"{path} is of format {found}; allowed: {(FORMAT, FORMAT_VERSION)}. Use the version of hf-dspark that wrote it.")
    if missing := {"target", "held_out"} - manifest.keys():
        raise DataError(f"{path} lacks {sorted(missing)}. Restore it, or write to a new folder.")
    return manifest


def shards(folder: Path) -> list[Path]:
    """The files of rows of a folder, in order. Where a compaction was interrupted, a Parquet file stands for its JSONL file."""
    whole = sorted(folder.glob("responses-*.parquet"))
    done = {path.stem for path in whole}
    return sorted([*whole, *(path for path in folder.glob("responses-*.jsonl") if path.stem not in done)])


class ResponseFolder:
    """A folder of shards `responses-*.jsonl`, its `manifest.json`, and `skipped.jsonl`, which names prompts that came to nothing.

    `identity` is what must stay the same when the folder is continued: target, sampling, seed ..
    """

    def __init__(self, path: Path, identity: dict[str, Any], *, rows_a_shard: int = 4096) -> None:
        self.path, self.identity, self.rows_a_shard = path, identity, rows_a_shard
        self.keys: dict[str, str] = {}  # id to normalised prompt of every row
        self.turn_keys: set[str] = set()  # normalised turns of conversations of several
        self.skips: dict[str, str] = {}  # id to reason of every prompt that came to nothing
        self.rows = self.tokens = self.response_tokens = 0
        self.by_source: dict[str, Counter[str]] = {}
        self.by_temperature: dict[str, Counter[str]] = {}
        self._shard: Path | None = None
        self._shard_rows = 0
        self._extra: dict[str, Any] = {}

    @contextmanager
    def open(self) -> Iterator[ResponseFolder]:
        """Lock the folder, repair its ends, and read what it holds; on leaving, the manifest is up to date. A `DataError` says if another
        process writes to it, its manifest says something else, or a shard is corrupt."""
        lock = FileLock(self.path / ".lock")
        with self._room():
            self.path.mkdir(parents=True, exist_ok=True)
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
            lock.release()

    def append(self, records: list[dict[str, Any]]) -> None:
        """Add the rows of one prompt, or, where the disk is full (a `DataError`), none."""
        if len(records) > 1:
            records = [{**record, "more": len(records) - 1 - n} for n, record in enumerate(records)]
        if self._shard is None or self._shard_rows >= self.rows_a_shard:
            numbers = [int(path.stem.split("-")[1]) for path in shards(self.path)]
            self._shard, self._shard_rows = self.path / f"responses-{max(numbers, default=-1) + 1:05d}.jsonl", 0
        with self._room():
            _append_lines(self._shard, records)
        self._shard_rows += len(records)
        for record in records:
            self._count(record)

    def skip(self, id: str, reason: str) -> None:
        """Record that a prompt comes to nothing, so that it is not tried again."""
        with self._room():
            _append_lines(self.path / "skipped.jsonl", [{"id": id, "reason": reason}])
        self.skips[id] = reason

    def save(self, extra: dict[str, Any]) -> None:
        """Write the manifest: what must stay the same, counts, and `extra`, which stays from one call to the next."""
        self._extra |= extra
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            **self.identity,
            "rows": self.rows,
            "tokens": {"all": self.tokens, "responses": self.response_tokens},
            "by_source": {name: dict(counts) for name, counts in sorted(self.by_source.items())},
            "by_temperature": {name: dict(counts) for name, counts in sorted(self.by_temperature.items())},
            **self._extra,
            "skipped": self.skipped,
        }
        with self._room():
            atomic_write_json(self.path / MANIFEST, manifest, indent=1)

    @property
    def skipped(self) -> dict[str, int]:
        """Prompts without a row, by reason; those of the prompt files as the last run counted them."""
        return dict(sorted((Counter(self.skips.values()) + Counter(self._extra.get("skipped", {}))).items()))

    def compact(self) -> None:
        """Turn JSONL shards into Parquet ones; interrupted, it leaves both or one, never none."""
        pyarrow_parquet = parquet()
        import pyarrow

        self._shard = None
        for path in self.path.glob("responses-*.jsonl"):
            records = [record for _, record in read_records(path)]
            with self._room(), atomic_path(path.with_suffix(".parquet")) as waiting:
                pyarrow_parquet.write_table(pyarrow.Table.from_pylist(records), waiting, compression="zstd")
            path.unlink()

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
        for half_written in self.path.glob(".*.tmp"):
            half_written.unlink()
        files = shards(self.path)
        for path in self.path.glob("responses-*.jsonl"):
            if path not in files:
                path.unlink()  # Its Parquet file is whole; the kill came before this.
        for path in files:
            last = path == files[-1] and path.suffix == ".jsonl"
            records = _repair_end(path) if last else [record for _, record in read_records(path)]
            for record in records:
                self._count(record)
            if last and len(records) < self.rows_a_shard:
                self._shard, self._shard_rows = path, len(records)
        if (self.path / "skipped.jsonl").exists():
            self.skips = {record["id"]: record["reason"] for record in _repair_end(self.path / "skipped.jsonl")}

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


def _append_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write all records behind a file's JSON lines, or, where there is no room, none."""
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise


def _repair_end(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines whose writer may have been killed: a last line that is not whole is cut off, as are rows at the
    end whose conversation goes on in rows that were not written any more."""
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
        logger.warning("%s: %d rows of a conversation that was not finished are cut off.", path, waiting)
        lines = data[:whole].splitlines(keepends=True)
        os.truncate(path, sum(map(len, lines[:-waiting])))
    return records[: len(records) - waiting]
