"""Rows out of files and folders, and the training sets and batches made of them."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch

from hf_dspark.errors import DataError
from hf_dspark.training.blocks import sample_anchors
from hf_dspark.training.data import can_train, collate, epoch_batches, load_data, load_responses, prompt_hash, split_rows
from hf_dspark.training.data_folder import FORMAT, FORMAT_VERSION, same_target, target_fingerprint
from hf_dspark.training.rows import ResponseRow, read_responses
from tests.tiny import tiny_target
from tests.training.tiny_runs import write

TWO_TURNS = {"source": "chat", "temperature": 1.0, "ended": True, "ids": [1, 5, 7, 2, 6, 8, 9, 2], "spans": [[2, 4], [5, 8]]}


def record(**changes: object) -> dict[str, object]:
    """A row in the older form, of one response."""
    return {"source": "chat", "prompt_ids": [1, 5], "response_ids": [7, 8, 2], "temperature": 1.0, "ended": True, **changes}


def folder_of(path: Path, records: list[dict], *, fingerprint: str = "a-b", held_out: float = 0.1) -> Path:
    path.mkdir()
    write(path / "responses-00000.jsonl", *records)
    target = {"name": "its-target", "fingerprint": fingerprint}
    write(path / "manifest.json", {"format": FORMAT, "version": FORMAT_VERSION, "target": target, "held_out": held_out})
    return path


def many(count: int, first: int = 0) -> list[dict]:
    return [{"ids": [1, 3 + n // 50, 3 + n % 50, 7, 8, 2], "spans": [[3, 6]]} for n in range(first, first + count)]


def test_old_rows_and_new_rows_and_parquet_rows_are_read_alike(tmp_path):
    """A single response is the same row whether it is written as prompt and response, as ids and a span, gzipped, or in Parquet; of several
    responses each has its place."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    new = {"source": "chat", "ids": [1, 5, 7, 8, 2], "spans": [[2, 5]], "temperature": 1.0, "ended": True}
    parquet.write_table(pyarrow.Table.from_pylist([new, TWO_TURNS]), tmp_path / "c.parquet")
    row = ResponseRow("chat", (1, 5), (7, 8, 2), 1.0, True)
    assert read_responses([write(tmp_path / "a.jsonl", record())]) == [row]
    assert read_responses([write(tmp_path / "b.jsonl.gz", new)]) == [row]
    both = read_responses([tmp_path / "c.parquet"])
    assert both == [row, *read_responses([write(tmp_path / "d.jsonl", TWO_TURNS)])]
    assert (both[0].spans, both[1].ids, both[1].responses) == (((2, 5),), (1, 5, 7, 2, 6, 8, 9, 2), [(7, 2), (8, 9, 2)])


def test_a_row_that_two_files_hold_is_read_once(tmp_path):
    """Other fields of a row do not matter; U+2028 and U+0085 inside a JSON string are text, where str.splitlines would break the line."""
    first = write(tmp_path / "a.jsonl", record(), record(response_ids=[9, 9]))
    second = write(tmp_path / "b.jsonl.gz", record(prompt="one\u2028two\x85three"), record(temperature=0))
    rows = read_responses([first, second], vocab_size=10)
    assert [(row.response_ids, row.temperature) for row in rows] == [((7, 8, 2), 1.0), ((9, 9), 1.0), ((7, 8, 2), 0.0)]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record(prompt_ids=[]), r"prompt_ids is \[\]"),
        (record(response_ids=[7, 10]), r"response_ids holds id 10; allowed: 0 to 9"),
        (record(prompt_ids=[-1]), "prompt_ids holds id -1"),
        (record(response_ids="7 8"), 'response_ids is "7 8"; allowed: a list'),
        (record(response_ids=[1.5]), r"response_ids is \[1\.5\]"),
        (record(temperature=-1), "temperature is -1"),
        ('{"prompt_ids": [1', "not JSON"),
        ("[1, 2]", "a list"),
        ({**TWO_TURNS, "spans": [[0, 2]]}, r"spans is \[\[0, 2\]\] of 8 ids"),
        ({**TWO_TURNS, "spans": [[2, 9]]}, r"spans is \[\[2, 9\]\]"),
        ({**TWO_TURNS, "spans": [[2, 5], [4, 6]]}, r"spans is \[\[2, 5\], \[4, 6\]\]"),
        ({**TWO_TURNS, "spans": [[2]]}, "spans is"),
        ({**TWO_TURNS, "spans": None}, "spans is null"),
        ({**TWO_TURNS, "ids": [1, "a"]}, 'ids is .1, "a"'),
    ],
)
def test_unusable_rows_are_named_by_file_and_line(tmp_path, bad, message):
    """The error says where the row is, what it holds and what is allowed."""
    path = write(tmp_path / "bad.jsonl", record(), bad)
    with pytest.raises(DataError, match=rf"bad\.jsonl, line 2: {message}"):
        read_responses([path], vocab_size=10)


def test_rows_without_a_response_are_left_out_and_counted(tmp_path, caplog):
    """The other rows of the file are read, and the log says how many were left out of which file; nothing at all is an error."""
    empty = [{"prompt_ids": [1], "response_ids": []}, {"ids": [1, 2], "spans": []}, {"ids": [1, 2], "spans": [[1, 1]]}]
    with caplog.at_level(logging.WARNING):
        assert len(read_responses([write(tmp_path / "a.jsonl", *empty, TWO_TURNS)])) == 1
    assert "a.jsonl: 3 rows without response tokens" in caplog.text
    with pytest.raises(DataError, match="no response rows"):
        read_responses([write(tmp_path / "b.jsonl", *empty)])


def test_damaged_files_are_named(tmp_path):
    """A cut gzip file, bytes that are no text, a file that is no Parquet, and none at all."""
    whole = write(tmp_path / "a.jsonl.gz", *[TWO_TURNS] * 200).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "b.jsonl").write_bytes(json.dumps(TWO_TURNS).encode() + b"\n\xff\xfe\n")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    pytest.importorskip("pyarrow")
    expected = {"a.jsonl.gz": "ended before", "b.jsonl": "after line.*utf-8", "missing.jsonl": "No such file", "c.parquet": "not a whole"}
    for name, message in expected.items():
        with pytest.raises(DataError, match=rf"{name}.*{message}"):
            read_responses([tmp_path / name])


def test_only_response_tokens_are_trained_on(tmp_path):
    """Mask and anchors cover the responses, and neither the user's turns between them nor the padding; responses of one token each hold no
    anchor."""
    (row,) = read_responses([write(tmp_path / "a.jsonl", TWO_TURNS)])
    batch = collate([row, ResponseRow("a", (5, 6), (7,), 0.0, True)])
    assert batch.input_ids.tolist() == [[1, 5, 7, 2, 6, 8, 9, 2], [5, 6, 7, 0, 0, 0, 0, 0]]
    assert batch.loss_mask.int().tolist() == [[0, 0, 1, 1, 0, 1, 1, 1], [0, 0, 1, 0, 0, 0, 0, 0]]
    assert batch.lengths.tolist() == [8, 3]
    anchors, valid = sample_anchors(batch.loss_mask, 16)
    assert anchors[valid].tolist() == [2, 5, 6]
    assert can_train(row)
    assert not can_train(ResponseRow("a", (1,), (5, 6, 7), 0.0, True, ((1, 2), (3, 4))))


def test_a_prompt_is_on_one_side_of_the_split_whatever_else_is_in_the_data():
    """Rows of the same prompt stay together, and adding rows moves none across."""
    rows = [ResponseRow("chat", (i,), (1, 2), float(t), True) for i in range(200) for t in (0, 1)]
    train, held_out = split_rows(rows, held_out_fraction=0.2)
    assert not {row.prompt_ids for row in train} & {row.prompt_ids for row in held_out}
    assert len(train) + len(held_out) == 400
    assert 40 <= len(held_out) <= 120
    assert set(split_rows(rows[:100], held_out_fraction=0.2)[1]) <= set(held_out)


def test_prompt_hashes_stay_what_they_were():
    """The side of a row is decided by the digest of its prompt's ids, as in data made before; later turns do not matter."""
    expected = int.from_bytes(hashlib.sha256(b"(1, 5)").digest()[:8], "big")
    assert prompt_hash(ResponseRow("a", (1, 5), (7, 2), 0.0, True)) == expected
    assert prompt_hash(ResponseRow("b", (1, 5), (7, 2, 6, 8), 1.0, True, ((2, 4), (5, 6)))) == expected


def test_an_epoch_holds_every_row_once_in_batches_of_similar_length():
    """Batches are a partition of the rows, differ little in length within, and are a function of seed and epoch."""
    lengths = [3 + (i * 37) % 101 for i in range(203)]
    batches = epoch_batches(lengths, batch_size=4, seed=1, epoch=0)
    assert sorted(i for batch in batches for i in batch) == list(range(203))
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert sum(spread) / len(spread) < 8
    others = [epoch_batches(lengths, batch_size=4, seed=s, epoch=e) for s, e in ((1, 0), (1, 1), (2, 0))]
    assert [other == batches for other in others] == [True, False, False]


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


def test_rows_too_long_or_too_short_are_left_out_and_counted(tmp_path, caplog):
    """Neither side holds them, and the summary says how many there were."""
    short, long = {"ids": [1, 2], "spans": [[1, 2]]}, {"ids": [1] * 99, "spans": [[3, 99]]}
    with caplog.at_level(logging.WARNING):
        data = load_data(folder_of(tmp_path / "one", [*many(20), short, long], held_out=0.0), max_tokens=50)
    assert len(data.train_rows) == 20
    assert data.summary()["left_out"] == {"one response token": 1, "over 50 tokens": 1}
    assert "over 50 tokens" in caplog.text
    with pytest.raises(DataError, match="no rows to train on"):
        load_data(write(tmp_path / "b.jsonl", short))


def test_responses_of_another_target_are_refused_by_name(tmp_path):
    """The error names the manifest's target and both fingerprints; the right target passes."""
    target, other = tiny_target("llama"), tiny_target("llama", seed=1)
    right, wrong = target_fingerprint(target), target_fingerprint(other)
    folder = folder_of(tmp_path / "right", many(40), fingerprint=right, held_out=0.0)
    assert len(load_data(folder, target).train_rows) == 40
    with pytest.raises(DataError, match=rf"right: the responses are those of the target 'its-target' .*{right}.*{wrong}"):
        load_data(folder, other)


def test_folders_without_a_fit_manifest_are_refused(tmp_path):
    """No manifest, a broken one, and one of a later format."""
    later = {"format": FORMAT, "version": FORMAT_VERSION + 1}
    for manifest, message in ((None, r"holds no manifest\.json"), ("{", "cannot be read"), (later, "is of format")):
        if manifest is not None:
            write(tmp_path / "manifest.json", manifest)
        with pytest.raises(DataError, match=message):
            load_responses(tmp_path)


def test_a_fingerprint_tells_weights_apart_and_not_dtypes():
    """The same weights in bfloat16 have the fingerprint of float32; other weights, a changed layer and another shape do not."""
    own = target_fingerprint(tiny_target("llama"))
    assert target_fingerprint(tiny_target("llama").to(torch.bfloat16)) == own
    changed = tiny_target("llama")
    with torch.no_grad():
        changed.model.layers[2].mlp.down_proj.weight.add_(0.05)
    others = [target_fingerprint(model) for model in (changed, tiny_target("llama", seed=1), tiny_target("qwen3"))]
    assert len({own, *others}) == 4
    assert same_target(own.split("-")[0] + "-", own)
    assert not same_target(others[2].split("-")[0] + "-", own)
