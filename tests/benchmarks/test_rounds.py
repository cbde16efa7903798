"""The benchmark of rounds, on a tiny random pair."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from examples.benchmarks import rounds
from transformers import CompileConfig

from hf_dspark.decoding import kept_graphs
from hf_dspark.utils.graphs import Graphs


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs as they are traced: the record's form does not depend on the compiler."""
    monkeypatch.setattr(kept_graphs, "Graphs", lambda device, config: Graphs(device, config or CompileConfig(backend="eager")))
    monkeypatch.setattr(rounds, "CompileConfig", lambda: CompileConfig(backend="eager"))


def test_rounds_are_measured_eager_and_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Forced acceptance gives every round as many tokens, so both run the same number; compiled ones launch a fraction outside graphs."""
    path = tmp_path / "rounds.json"
    options = ["--shape", "tiny", "--accept", "3", "--rows", "1,2", "--repeats", "1", "--max-new-tokens", "33", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["rounds", *options, "--json", str(path)])
    assert rounds.main() == 0
    record = json.loads(path.read_text())
    assert record["settings"]["acceptance_is_forced"]
    assert [one["rows"] for one in record["rounds"]] == [1, 2]
    for one in record["rounds"]:
        eager, fast = one["dspark"], one["dspark_compiled"]
        assert eager["rounds"] == fast["rounds"] == 8  # the first token of 33 comes from the prompt's pass, 4 from each round
        assert fast["launches"] < 60 < eager["launches"]
        assert one["compiled_over_eager"] > 0
        assert one["plain_compiled"]["tokens_per_s"] > 0
