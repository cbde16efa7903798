"""Targets that the user has compiled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.helpers import make_world, plain, speculate, talking_target

COMPILED: dict[str, Callable[[Any], Any]] = {
    "forward": lambda target: setattr(target, "forward", torch.compile(target.forward, backend="eager")),
    "in place": lambda target: target.compile(backend="eager"),
    "a layer": lambda target: target.model.layers[1].compile(backend="eager"),
}


@pytest.fixture(autouse=True)
def graphs() -> Iterator[None]:
    """Each test counts its own."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_target_is_not_compiled_round_after_round(how: str) -> None:
    """The text is plain's, at most two graphs are made however many rounds there are, and plain calls are compiled as before."""
    w = make_world(talking_target())
    expected = plain(w.target, w.inputs(3))
    COMPILED[how](w.target)
    assert torch.equal(speculate(w.target, w.drafter, w.inputs(3)), expected)
    assert counters["stats"]["unique_graphs"] <= 2
    assert torch.equal(plain(w.target, w.inputs(3)), expected)
    assert counters["stats"]["unique_graphs"] > 0


def test_two_threads_leave_torch_as_it_was() -> None:
    """Whoever ends last lets compiled code run again."""
    w = make_world(talking_target())
    expected = plain(w.target, w.inputs(3))
    w.target.compile(backend="eager")
    texts: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: texts.append(speculate(w.target, w.drafter, w.inputs(3)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [torch.equal(text, expected) for text in texts] == [True] * 3
    before = counters["stats"]["unique_graphs"]
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(3))
    assert counters["stats"]["unique_graphs"] == before + 1
