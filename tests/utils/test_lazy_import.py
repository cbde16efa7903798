"""Work that waits for an import: once, after it, however it comes about."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest

from hf_dspark.utils.lazy_import import when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that can be imported, and the file to write it to."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    name = f"lazy_{tmp_path.name.replace('-', '_')}"
    yield name, tmp_path / f"{name}.py"
    sys.modules.pop(name, None)


@pytest.mark.parametrize("looked_up_before", [False, True])
def test_the_action_follows_the_import(module, looked_up_before):
    """It runs once, with the module complete, also where somebody has only asked for the module's spec before."""
    name, file = module
    file.write_text("value = 3\n")
    seen = []
    when_imported(name, lambda: seen.append(sys.modules[name].value))
    if looked_up_before:
        assert importlib.util.find_spec(name) is not None
    assert not seen
    importlib.import_module(name)
    importlib.import_module(name)
    assert seen == [3]


def test_an_import_that_fails_is_waited_for_again(module):
    """The action runs after the first import that succeeds."""
    name, file = module
    file.write_text("raise RuntimeError('not yet')\n")
    seen = []
    when_imported(name, lambda: seen.append(sys.modules[name].value))
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module(name)
    assert not seen
    file.write_text("value = 4  # longer, so that no stale bytecode counts\n")
    importlib.invalidate_caches()
    importlib.import_module(name)
    assert seen == [4]


def test_what_is_imported_already_needs_no_waiting():
    """At once."""
    seen = []
    when_imported("json", lambda: seen.append(1))
    assert seen == [1]
