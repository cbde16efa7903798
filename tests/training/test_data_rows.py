"""Rows with several responses, the files and folders they lie in, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch

from hf_dspark.errors import DataError
from hf_dspark.training.blocks import sample_anchors
from hf_dspark.training.data import (
    ResponseRow,
    can_train,
    collate,
    coverage,
    frequent_tokens,
    load_data,
    load_responses,
    prompt_hash,
    read_responses,
    split_rows,
)
from hf_dspark.training.manifest import FORMAT, FORMAT_VERSION, same_target, target_fingerprint, write_manifest
from tests.tiny import tiny_target

TWO_TURNS = {"source": "chat", "temperature": 1.0, "ended": True, "ids": [1, 5, 7, 2, 6, 8, 9, 2], "spans": [[2, 4], [5, 8]]}


def write(path: Path, *records: object) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
    return path


def folder_of(path: Path, records: list[dict], *, fingerprint: str = "a-b", held_out: float = 0.1) -> Path:
    path.mkdir()
    write(path / "responses-00000.jsonl", *records)
    write_manifest(
        path,
        {"format": FORMAT, "version": FORMAT_VERSION, "target": {"name": "its-target", "fingerprint": fingerprint}, "held_out": held_out},
    )
    return path


def many(count: int, first: int = 0) -> list[dict]:
    return [{"ids": [1, 3 + n // 50, 3 + n % 50, 7, 8, 2], "spans": [[3, 6]]} for n in range(first, first + count)]


def test_a_row_of_several_responses_keeps_their_places():
    """The prompt ends at the first response; ids are all tokens; responses are the spans' tokens."""
    row = ResponseRow("chat", (1, 5), (7, 2, 6, 8, 9, 2), 1.0, True, ((2, 4), (5, 8)))
    assert row.ids == (1, 5, 7, 2, 6, 8, 9, 2)
    assert row.responses == [(7, 2), (8, 9, 2)]
    assert ResponseRow("chat", (1, 5), (7, 2), 1.0, True).spans == ((2, 4),)


def test_old_rows_and_new_rows_and_parquet_rows_are_read_alike(tmp_path):
    """A single response is the same row whether it is written as prompt and response, as ids and a span, or in Parquet."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    old = {"source": "chat", "prompt_ids": [1, 5], "response_ids": [7, 2], "temperature": 1.0, "ended": True}
    new = {"source": "chat", "ids": [1, 5, 7, 2], "spans": [[2, 4]], "temperature": 1.0, "ended": True}
    parquet.write_table(pyarrow.Table.from_pylist([new, TWO_TURNS]), tmp_path / "c.parquet")
    row = ResponseRow("chat", (1, 5), (7, 2), 1.0, True)
    assert read_responses([write(tmp_path / "a.jsonl", old)]) == [row]
    assert read_responses([write(tmp_path / "b.jsonl.gz", new)]) == [row]
    assert read_responses([tmp_path / "c.parquet"]) == [row, *read_responses([write(tmp_path / "d.jsonl", TWO_TURNS)])]


def test_only_response_tokens_are_trained_on_and_counted(tmp_path):
    """Mask, anchors, frequent tokens and coverage see the responses, and not the user's turns between them."""
    (row,) = read_responses([write(tmp_path / "a.jsonl", TWO_TURNS)])
    batch = collate([row])
    assert batch.input_ids.tolist() == [[1, 5, 7, 2, 6, 8, 9, 2]]
    assert batch.loss_mask.int().tolist() == [[0, 0, 1, 1, 0, 1, 1, 1]]
    anchors, valid = sample_anchors(batch.loss_mask, batch.lengths, 16)
    assert anchors[valid].tolist() == [2, 5, 6]
    assert frequent_tokens([row], 4, vocab_size=10).tolist() == [2, 7, 8, 9]
    assert coverage([row], torch.tensor([2, 6])) == (2, 5)


def test_a_row_trains_where_one_response_has_two_tokens():
    """Two responses of one token each hold no anchor."""
    assert not can_train(ResponseRow("a", (1,), (5, 6, 7), 0.0, True, ((1, 2), (3, 4))))
    assert can_train(ResponseRow("a", (1,), (5, 6, 7, 8), 0.0, True, ((1, 2), (3, 5))))


def test_prompt_hashes_stay_what_they_were():
    """The side of a single-turn row is decided by the digest of its prompt's ids, as in data made before; later turns do not matter."""
    expected = int.from_bytes(hashlib.sha256(b"(1, 5)").digest()[:8], "big")
    assert prompt_hash(ResponseRow("a", (1, 5), (7, 2), 0.0, True)) == expected
    assert prompt_hash(ResponseRow("b", (1, 5), (7, 2, 6, 8), 1.0, True, ((2, 4), (5, 6)))) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spans": [[0, 2]]}, r"line 2: span \[0, 2\) of 8 ids"),
        ({"spans": [[2, 9]]}, r"line 2: span \[2, 9\)"),
        ({"spans": [[2, 5], [4, 6]]}, r"line 2: span \[4, 6\)"),
        ({"spans": [[2]]}, "line 2: spans is"),
        ({"spans": None}, "line 2: spans is null"),
        ({"ids": [1, "a"]}, "line 2: ids is list"),
        ({"ids": [1, 5, 7, 2, 6, 8, 9, 10]}, "line 2: ids holds id 10; allowed: 0 to 9"),
    ],
)
def test_impossible_spans_and_ids_are_named_by_file_and_line(tmp_path, change, message):
    """The error says where the row is, what it holds and what is allowed."""
    path = write(tmp_path / "bad.jsonl", TWO_TURNS, {**TWO_TURNS, **change})
    with pytest.raises(DataError, match=message) as error:
        read_responses([path], vocab_size=10)
    assert "bad.jsonl" in str(error.value)


@pytest.mark.parametrize(
    "empty", [{"prompt_ids": [1], "response_ids": []}, {"ids": [1, 2], "spans": []}, {"ids": [1, 2], "spans": [[1, 1]]}]
)
def test_rows_without_a_response_are_left_out_and_counted(tmp_path, caplog, empty):
    """The other rows of the file are read, and the log says how many were left out of which file."""
    path = write(tmp_path / "a.jsonl", empty, TWO_TURNS, empty)
    with caplog.at_level(logging.WARNING):
        assert len(read_responses([path])) == 1
    assert "a.jsonl: 2 rows without response tokens" in caplog.text


def test_damaged_files_are_named(tmp_path):
    """A cut gzip file, bytes that are no text, a file that is no Parquet, and none at all."""
    whole = write(tmp_path / "a.jsonl.gz", *[TWO_TURNS] * 200).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "b.jsonl").write_bytes(json.dumps(TWO_TURNS).encode() + b"\n\xff\xfe\n")
    for name, message in (("a.jsonl.gz", "broken gzip"), ("b.jsonl", "not UTF-8"), ("missing.jsonl", "No such file")):
        with pytest.raises(DataError, match=message) as error:
            read_responses([tmp_path / name])
        assert name in str(error.value)
    pytest.importorskip("pyarrow")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"c\.parquet.*not a whole Parquet"):
        read_responses([tmp_path / "c.parquet"])


# -- folders -------------------------------------------------------------------------------------------------------


def test_a_data_set_is_the_split_of_its_folders_and_files(tmp_path):
    """Folders and bare files together, each row once; the share is the manifests' largest; the split is that of the rows."""
    first = folder_of(tmp_path / "one", many(300), held_out=0.1)
    second = folder_of(tmp_path / "two", many(300, 200), held_out=0.3)
    bare = write(tmp_path / "bare.jsonl", *many(50, 600))
    data = load_data([first, second, bare])
    rows = read_responses([first / "responses-00000.jsonl", second / "responses-00000.jsonl", bare])
    assert len(rows) == 550
    assert data.held_out_share == 0.3
    assert (data.train_rows, data.held_out_rows) == split_rows(rows, held_out_fraction=0.3)
    assert data.summary()["rows"] == {"train": len(data.train_rows), "held_out": len(data.held_out_rows)}
    json.dumps(data.summary())
    assert len(load_data(first).train_rows) > len(load_data(first, held_out_share=0.5).train_rows)


def test_no_prompt_is_on_both_sides_even_in_folders_of_different_shares(tmp_path):
    """Two folders that hold the same prompts with other answers and other shares agree on every prompt's side."""
    other = [{**record, "ids": [*record["ids"][:3], 9, 9, 2]} for record in many(400)]
    data = load_data([folder_of(tmp_path / "one", many(400), held_out=0.05), folder_of(tmp_path / "two", other, held_out=0.4)])
    train, held_out = ({row.prompt_ids for row in rows} for rows in (data.train_rows, data.held_out_rows))
    assert len(data.train_rows) + len(data.held_out_rows) == 800
    assert held_out
    assert not train & held_out


def test_rows_too_long_or_too_short_are_left_out_and_counted(tmp_path, caplog):
    """Neither side holds them, and the summary says how many there were."""
    short, long = {"ids": [1, 2], "spans": [[1, 2]]}, {"ids": [1] * 99, "spans": [[3, 99]]}
    with caplog.at_level(logging.WARNING):
        data = load_data(folder_of(tmp_path / "one", [*many(20), short, long]), max_tokens=50, held_out_share=0.0)
    assert len(data.train_rows) == 20
    assert data.summary()["left_out"] == {"one response token": 1, "over 50 tokens": 1}
    assert "over 50 tokens" in caplog.text
    with pytest.raises(DataError, match="no rows to train on"):
        load_data(write(tmp_path / "b.jsonl", short))


def test_responses_of_another_target_are_refused_by_name(tmp_path):
    """The error names the manifest's target and both fingerprints; the right target passes."""
    target = tiny_target("llama")
    right = folder_of(tmp_path / "right", many(40), fingerprint=target_fingerprint(target), held_out=0.0)
    assert len(load_data(right, target).train_rows) == 40
    with pytest.raises(DataError, match=r"right: the responses are those of the target 'its-target'") as error:
        load_data(right, tiny_target("llama", seed=1))
    assert target_fingerprint(target) in str(error.value)
    assert target_fingerprint(tiny_target("llama", seed=1)) in str(error.value)


def test_folders_without_a_fit_manifest_are_refused(tmp_path):
    """No manifest, a broken one, and one of a later format."""
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"empty holds no manifest\.json"):
        load_responses(empty)
    (empty / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_responses(empty)
    write_manifest(empty, {"format": FORMAT, "version": FORMAT_VERSION + 1})
    with pytest.raises(DataError, match="is of format"):
        load_responses(empty)


def test_a_fingerprint_tells_weights_apart_and_not_dtypes():
    """The same weights in bfloat16 have the fingerprint of float32; other weights, a changed layer and another shape do not."""
    target = tiny_target("llama")
    own = target_fingerprint(target)
    assert target_fingerprint(tiny_target("llama").to(torch.bfloat16)) == own
    changed = tiny_target("llama")
    with torch.no_grad():
        changed.model.layers[2].mlp.down_proj.weight.add_(0.05)
    others = [target_fingerprint(model) for model in (changed, tiny_target("llama", seed=1), tiny_target("qwen3"))]
    assert len({own, *others}) == 4
    assert same_target(own.split("-")[0] + "-", own)
    assert not same_target(others[2].split("-")[0] + "-", own)
