"""A data folder while it is written: kills, a full disk, locks, other settings, and Parquet."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from hf_dspark.errors import DataError
from hf_dspark.training.data_folder import ResponseFolder, read_manifest
from hf_dspark.training.rows import read_records, read_responses
from tests.training.tiny_runs import largest_file

IDENTITY = {"target": {"name": "tiny", "fingerprint": "a-b"}, "sampling": {"temperatures": [0.0]}, "seed": 0, "held_out": 0.04}


def record(name: str, tokens: int = 4, source: str = "chat") -> dict:
    return {
        "id": name,
        "source": source,
        "temperature": 0.0,
        "ended": True,
        "ids": [1, *range(3, 3 + tokens)],
        "spans": [[1, 1 + tokens]],
        "key": f"key-{name}",
    }


def folder(path: Path, **changes: object) -> ResponseFolder:
    return ResponseFolder(path, {**IDENTITY, **changes}, rows_a_shard=3)


def begun(path: Path, *names: str) -> Path:
    """A folder that holds a row of each name; its first shard."""
    with folder(path).open() as first:
        for name in names:
            first.append([record(name)])
    return path / "responses-00000.jsonl"


def ids(path: Path) -> list[str]:
    return [row["id"] for shard in sorted(path.glob("responses-*")) for _, row in read_records(shard)]


def test_a_folder_is_continued_where_it_was_left(tmp_path):
    """Rows, skips and counts of before are there; new rows fill the last shard, then the next."""
    with folder(tmp_path / "d").open() as first:
        for name in "ab":
            first.append([record(name)])
        first.skip("c", "empty response")
    with folder(tmp_path / "d").open() as second:
        assert (second.keys, second.skips) == ({"a": "key-a", "b": "key-b"}, {"c": "empty response"})
        for name in "def":
            second.append([record(name, tokens=2, source="code")])
    assert [len(list(read_records(path))) for path in sorted((tmp_path / "d").glob("responses-*"))] == [3, 2]
    manifest = read_manifest(tmp_path / "d")
    assert manifest is not None
    assert (manifest["rows"], manifest["tokens"], manifest["skipped"]) == (5, {"all": 19, "responses": 14}, {"empty response": 1})
    assert manifest["by_source"] == {"chat": {"rows": 2, "response_tokens": 8}, "code": {"rows": 3, "response_tokens": 6}}
    assert manifest["target"] == IDENTITY["target"]


def test_a_half_written_last_line_is_cut_off_at_every_length(tmp_path, caplog):
    """Wherever a kill cuts the last line, the rows before remain, one line of the log says so, and the row can be written again."""
    shard = begun(tmp_path / "d", "a", "b")
    whole = shard.read_bytes()
    begin = whole.index(b"\n") + 1
    for cut in (begin, begin + 1, begin + 40, len(whole) - 1):
        shard.write_bytes(whole[:cut])
        caplog.clear()
        with caplog.at_level(logging.WARNING), folder(tmp_path / "d").open() as again:
            assert list(again.keys) == ["a"]
            again.append([record("b")])
        assert len(caplog.records) == (cut > begin)
        assert shard.read_bytes() == whole


def test_rows_of_one_conversation_stay_together(tmp_path):
    """Where only some rows of a conversation were written, they are cut off, so that it is made again as a whole."""
    with folder(tmp_path / "d").open() as first:
        first.append([record("a")])
        first.append([record("b"), record("b.1"), record("b.2")])
    shard = tmp_path / "d" / "responses-00000.jsonl"
    lines = shard.read_bytes().split(b"\n")
    for count, expected in ((4, ["a", "b", "b.1", "b.2"]), (3, ["a"]), (2, ["a"]), (1, ["a"])):
        shard.write_bytes(b"\n".join(lines[:count]) + b"\n")
        with folder(tmp_path / "d").open() as again:
            assert list(again.keys) == expected
        assert ids(tmp_path / "d") == expected


def test_a_full_disk_is_one_clear_error_and_the_folder_goes_on(tmp_path):
    """The row that found no room is wholly gone, as is a new manifest; the message says that the others are safe, and with room it is
    written."""
    shard = begun(tmp_path / "d", "a")
    size = shard.stat().st_size
    with folder(tmp_path / "d").open() as again:
        before = (tmp_path / "d" / "manifest.json").read_bytes()
        with largest_file(size + 20), pytest.raises(DataError, match=r"the disk is full. The 1 rows in it are safe") as error:
            again.append([record("b")])
        assert "\n" not in str(error.value)
        assert shard.stat().st_size == size
        with largest_file(10), pytest.raises(DataError, match="the disk is full"):
            again.save({"note": "x"})
        assert (tmp_path / "d" / "manifest.json").read_bytes() == before
        again.append([record("b")])
    assert ids(tmp_path / "d") == ["a", "b"]


def test_damage_other_than_a_half_written_end_is_an_error(tmp_path):
    """A broken line in the middle, or a row of another making, is named by file and line or field."""
    shard = begun(tmp_path / "d", "a")
    whole, other = shard.read_text(), '{"prompt_ids": [1], "response_ids": [2]}\n'
    for text, message in (("{half\n" + whole, r"responses-00000\.jsonl, line 1: not JSON"), (whole + other, "a row lacks 'spans'")):
        shard.write_text(text)
        with pytest.raises(DataError, match=message):
            begun(tmp_path / "d")


@pytest.mark.parametrize("change", [{"seed": 1}, {"sampling": {"temperatures": [1.0]}}, {"target": {"name": "x", "fingerprint": "c-d"}}])
def test_a_folder_of_another_making_is_refused(tmp_path, change):
    """The error names what differs, both values, and the way out; the folder is as before."""
    begun(tmp_path / "d", "a")
    message = f"begun with {next(iter(change))} .*this run has .*--output"
    with pytest.raises(DataError, match=message), folder(tmp_path / "d", **change).open():
        pass
    with folder(tmp_path / "d").open() as again:
        assert list(again.keys) == ["a"]


def test_two_writers_never_share_a_folder(tmp_path):
    """While another process holds the folder it is refused; once that process is killed it is free."""
    begun(tmp_path / "d")
    lock = f"import filelock; lock = filelock.FileLock({str(tmp_path / 'd' / '.lock')!r}); lock.acquire(timeout=0)"
    hold = f"{lock}; print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(DataError, match="written to by another process"):
            begun(tmp_path / "d")
        other.kill()
    begun(tmp_path / "d")


def test_parquet_holds_the_same_rows_and_can_be_continued(tmp_path):
    """After compaction the rows read alike, further rows come behind them, and ids stay."""
    pytest.importorskip("pyarrow")
    begun(tmp_path / "d", *"abcd")
    before = read_responses(sorted((tmp_path / "d").glob("responses-*")))
    with folder(tmp_path / "d").open() as again:
        again.compact()
    assert {path.suffix for path in (tmp_path / "d").glob("responses-*")} == {".parquet"}
    assert read_responses(sorted((tmp_path / "d").glob("responses-*"))) == before
    with folder(tmp_path / "d").open() as again:
        assert list(again.keys) == list("abcd")
        again.append([record("e")])
    assert ids(tmp_path / "d") == list("abcde")


def test_an_interrupted_compaction_doubles_nothing(tmp_path):
    """A kill between the two files' renaming and removal leaves both; the Parquet file counts. A half-written one is removed."""
    pytest.importorskip("pyarrow")
    begun(tmp_path / "d", *"abcd")
    jsonl = {path: path.read_bytes() for path in (tmp_path / "d").glob("responses-*.jsonl")}
    with folder(tmp_path / "d").open() as again:
        again.compact()
    for path, content in jsonl.items():
        path.write_bytes(content)
    (tmp_path / "d" / ".responses-00009.parquet.0123.tmp").write_bytes(b"PAR1")
    with folder(tmp_path / "d").open() as again:
        assert again.rows == 4
        again.append([record("e")])
    assert ids(tmp_path / "d") == list("abcde")
    assert not list((tmp_path / "d").glob(".*.tmp"))
