"""Atomic writes: whole or not at all, with the permissions of any new file."""

from __future__ import annotations

import json

import pytest

from hf_dspark.utils.files import atomic_folder, atomic_path, atomic_write_json
from hf_dspark.utils.tokens import eos_token_ids
from tests.tiny import EOS, tiny_target


def fail(waiting, name: str) -> None:
    """What a process does that is stopped half-way."""
    waiting.joinpath(name).write_text("half")
    raise ArithmeticError


def test_a_write_that_fails_leaves_what_was_there(tmp_path) -> None:
    """An error inside the block keeps the file and the folder of before, and leaves nothing beside them."""
    atomic_write_json(tmp_path / "file", {"a": 1})
    with atomic_folder(tmp_path / "folder") as waiting:
        (waiting / "one").write_text("1")
    with pytest.raises(ArithmeticError), atomic_path(tmp_path / "file") as waiting:
        fail(waiting.parent, waiting.name)
    with pytest.raises(ArithmeticError), atomic_folder(tmp_path / "folder") as waiting:
        fail(waiting, "two")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "one"]
    assert json.loads((tmp_path / "file").read_text()) == {"a": 1}


def test_a_folder_is_replaced_whole_and_follows_the_umask(tmp_path) -> None:
    """Files of the earlier folder are gone, and a file made for its owner alone gets the permissions of any new file."""
    (tmp_path / "reference").touch()
    for name in ("one", "two"):
        with atomic_folder(tmp_path / "folder") as waiting:
            (waiting / name).touch(mode=0o600)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["two"]
    assert (tmp_path / "folder" / "two").stat().st_mode == (tmp_path / "reference").stat().st_mode


def test_eos_ids_come_from_models_configs_and_tokenizers() -> None:
    """Numbers, lists and None are taken together, each id once."""
    target = tiny_target()
    assert eos_token_ids(target) == [EOS]
    target.generation_config.eos_token_id = [7, EOS]
    assert eos_token_ids(target, target.config, None) == [EOS, 7]
    target.generation_config.eos_token_id = None
    assert eos_token_ids(target) == []
