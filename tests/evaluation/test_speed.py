"""The speed of one pair by several methods, with compiled rounds among them."""

from __future__ import annotations

import pytest
from transformers import CompileConfig

from hf_dspark.decoding import kept_graphs
from hf_dspark.decoding.profiler import CostProfile, profile_key
from hf_dspark.evaluation import speed
from hf_dspark.evaluation.prompts import user_turn
from hf_dspark.evaluation.speed import Bench, evaluate
from hf_dspark.utils.graphs import Graphs
from tests.chat import chat_target
from tests.tiny import tiny_drafter, tiny_target


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Graphs]:
    """Graphs as they are traced, and all that were asked for: what is measured here does not depend on the compiler."""
    made: list[Graphs] = []

    def graphs(device, config):
        made.append(Graphs(device, config or CompileConfig(backend="eager")))
        return made[-1]

    monkeypatch.setattr(kept_graphs, "Graphs", graphs)
    monkeypatch.setattr(speed, "CompileConfig", lambda: CompileConfig(backend="eager"))
    return made


def test_plain_decoding_with_a_static_cache_is_measured_beside_compiled_rounds(traced: list[Graphs]) -> None:
    """All methods write the same text; no graph is made after the untimed runs, which are stated apart."""
    target, tokenizer = chat_target()
    bench = Bench(target, tiny_drafter(target), tokenizer, max_new_tokens=12, budget="full", compile=True)
    before: list[int] = []
    record = evaluate(bench, {"a": [user_turn("w5 w6"), user_turn("w7 w8 w9")]}, on_batch=lambda _: before.append(traced[0].made))
    assert record["rows"] == record["identical_rows"] == 2
    assert record["settings"]["compiled"]
    assert set(record["settings"]["first_runs_s"]) == set(bench.methods)
    assert record["speedup_over_compiled"] == pytest.approx(record["dspark_tokens_per_s"] / record["plain_compiled_tokens_per_s"])
    assert len(set(before)) == 1
    assert before[0] > 3


def test_compiled_rounds_have_a_profile_of_their_own(traced: list[Graphs]) -> None:
    """Their times are not taken for those of eager rounds."""
    target = tiny_target()
    drafter = tiny_drafter(target)
    profile = CostProfile.measure(target, drafter, rows=2, compiled=True)
    assert profile.key == profile_key(target, drafter, compiled=True) != profile_key(target, drafter)
    assert sorted(profile.tables["greedy"]) == [1, 2]
    assert traced[0].made > 3
