"""The benchmark of rounds, on a tiny random pair."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from examples.benchmarks import launches, rounds
from transformers import CompileConfig

from hf_dspark.decoding import kept_graphs
from hf_dspark.utils.graphs import Graphs
from tests.tiny import VOCAB, tiny_drafter, tiny_llama


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


def test_launches_are_counted_by_stage_and_do_not_grow_with_the_rows() -> None:
    """On a tiny pair: rows that leave are the only thing that more of them add to a median."""
    target = tiny_llama()
    drafter = tiny_drafter(target)
    ids = {rows: torch.randint(4, VOCAB, (rows, 9), generator=torch.Generator().manual_seed(0)) for rows in (2, 8)}
    args = argparse.Namespace(seed=0, max_new_tokens=16)
    found = {
        rows: launches.launches(target, drafter, {"input_ids": one, "attention_mask": torch.ones_like(one)}, args, "full", sample=True)
        for rows, one in ids.items()
    }
    for stage in ("draft", "verify", "rest"):
        assert 0 < found[8][stage] <= found[2][stage] + 8
    assert found[2]["waits"] == found[8]["waits"] == 1
