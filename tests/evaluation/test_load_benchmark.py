"""The load benchmark: cells, turns that hold as many tokens for all, and the ratios between contenders."""

from __future__ import annotations

import numpy as np
import pytest

from hf_dspark.decoding import loop as decoding
from hf_dspark.evaluation import load_benchmark
from hf_dspark.evaluation.load_benchmark import Contender, Load, bench, summary
from hf_dspark.evaluation.speed import Bench, Sampling
from tests.costs import full_machine
from tests.evaluation.test_serving import pair
from tests.helpers import random_prompts
from tests.words import word_tokenizer


def measured(budgets: list[str], concurrencies: list[int], *, hooks: dict | None = None, how: dict, **options) -> dict:
    """A benchmark of the pair on a machine at its limit."""
    target, drafter = pair()
    load = Load(Bench(target, drafter, word_tokenizer(target.config), **how), random_prompts((5,) * 20, 3), **options)
    costs = full_machine(drafter.config.block_size)
    return bench(load, concurrencies=concurrencies, budgets=budgets, costs=costs, **(hooks or {}))


def test_cells_are_handed_over_as_concurrencies_finish():
    """After each concurrency the record so far, complete but for what was not measured yet; turns are counted, the first one too."""
    records, turns = [], []
    hooks = {
        "on_turn": lambda: turns.append(1),
        "on_concurrency": lambda found: records.append([(cell["concurrency"], cell["budget"]) for cell in found["cells"]]),
    }
    record = measured(["plain", "full"], [1, 2], hooks=hooks, how={"max_new_tokens": 6}, seconds=0.05, repeats=2)
    assert records == [[(1, "plain"), (1, "full")], [(1, "plain"), (1, "full"), (2, "plain"), (2, "full")]]
    assert len(turns) == 2 * (2 + 1)
    assert [row["concurrency"] for row in record["summary"]] == [1, 2]


@pytest.mark.slow
def test_the_benchmark_has_a_cell_for_everything():
    """Each concurrency and contender has its figures; lookup, which takes one row, only at one; ratios are of these figures."""
    names = ["plain", "full", "static:1", "threshold:0.5", "load-aware", "load-aware-lag2", "load-aware@raw", "generate", "prompt-lookup"]
    record = measured(names, [1, 3], how={"max_new_tokens": 16}, seconds=0.1, repeats=2)
    cells = {(c["concurrency"], c["budget"]): c for c in record["cells"]}
    assert set(cells) == {(n, name) for n in (1, 3) for name in names} - {(3, "prompt-lookup")}
    assert all(c["tokens_per_s"] > 0 for c in record["cells"])
    assert all(len(c["turn_seconds"]) == (1 if c["budget"] in ("generate", "prompt-lookup") else 2) for c in record["cells"])
    assert cells[3, "plain"]["tau"] == 1.0
    assert cells[3, "full"]["verified_tokens_per_request"] > cells[3, "load-aware"]["verified_tokens_per_request"]
    best = max(("plain", "full", "static:1"), key=lambda name: cells[1, name]["tokens_per_s"])
    aware = max(("load-aware", "load-aware-lag2"), key=lambda name: cells[1, name]["tokens_per_s"])
    ratio = cells[1, aware]["tokens_per_s"] / cells[1, best]["tokens_per_s"]
    assert summary(record["cells"])[0]["load_aware_over_best_fixed"] == pytest.approx(ratio)


def test_the_benchmark_judges_drawn_tokens_as_it_is_told(monkeypatch):
    """Its servers hand the rule to the loop, the record names it, and a rule that is none is refused before anything runs."""
    rules, original = [], decoding.accept_sampled
    monkeypatch.setattr(decoding, "accept_sampled", lambda *args, **kwargs: rules.append(kwargs["blockwise"]) or original(*args, **kwargs))
    how = {"max_new_tokens": 8, "sampling": Sampling(temperature=1.0)}
    for rule in ("token", "block"):
        rules.clear()
        record = measured(["full"], [1], how={**how, "verification": rule}, seconds=0.1, repeats=1)
        assert record["settings"]["verification"] == rule
        assert set(rules) == {rule == "block"}
    with pytest.raises(ValueError, match="'block'"):
        measured(["full"], [1], how={**how, "verification": "blocks"})


@pytest.mark.slow
def test_contenders_write_as_many_tokens_in_every_turn():
    """So that ratios of a turn are over the same texts: all cells of a concurrency hold the same tokens, but for a round's."""
    record = measured(["plain", "full", "load-aware"], [2, 4], how={"max_new_tokens": 16}, seconds=0.4, repeats=3)
    for n in (2, 4):
        tokens = [cell["tokens"] for cell in record["cells"] if cell["concurrency"] == n]
        assert max(tokens) - min(tokens) <= 2 * n * (pair()[1].config.block_size + 2)
        assert min(tokens) > 3 * (max(tokens) - min(tokens))


@pytest.mark.slow
def test_contenders_go_on_side_by_side(monkeypatch):
    """In a turn of many slices none is ever further ahead of another than a slice and what a round gives beyond it: a machine that is slow
    for a while is slow for all.
    """
    given, slices, ahead = {}, [], []
    go_on = load_benchmark.Cell.advance

    def watched(cell, tokens):
        before = cell.turn.tokens
        go_on(cell, tokens)
        if cell in given:
            given[cell] += cell.turn.tokens - before
            slices.append(tokens)
            ahead.append(max(given.values()) - min(given.values()))
        else:
            given[cell] = 0  # The first call brings contenders to the same place.

    monkeypatch.setattr(load_benchmark.Cell, "advance", watched)
    record = measured(["plain", "full", "static:1"], [2], how={"max_new_tokens": 48}, seconds=0.4, repeats=3, slice_seconds=0.02)
    assert record["settings"]["slice_seconds"] == 0.02
    assert 4 * max(slices) < record["cells"][0]["tokens"] / 3
    assert max(ahead) <= max(slices) + 2 * 2 * (pair()[1].config.block_size + 1)


def test_the_spread_of_a_ratio_is_that_of_turns_drawn_anew():
    """Two contenders on a machine that gets twice as fast and slow again keep the ratio that they have in every turn, so it has no spread;
    with times that are their own it has that of the mean, 1.64 standard errors each way.
    """
    random = np.random.default_rng(0)

    def compared(times: list[np.ndarray]) -> dict:
        cells = [
            {"concurrency": 1, "budget": name, "tokens_per_s": 100 * len(of) / of.sum(), "turn_tokens": [100] * len(of), "turn_seconds": of}
            for name, of in zip(("plain", "load-aware"), times, strict=True)
        ]
        return summary(cells)[0]

    speed = random.uniform(1.0, 2.0, 200)
    row = compared([1.1 * speed, speed])
    assert row["load_aware_over_best_fixed"] == pytest.approx(1.1)
    assert row["load_aware_over_best_fixed_interval"] == pytest.approx([1.1, 1.1])
    row = compared([np.full(200, 1.1), 1 + random.normal(0, 0.1, 200)])
    low, high = row["load_aware_over_best_fixed_interval"]
    assert low < row["load_aware_over_best_fixed"] < high
    assert (high - low) / 2 == pytest.approx(1.1 * 1.645 * 0.1 / np.sqrt(200), rel=0.2)


@pytest.mark.parametrize("wrong", ["fast", "full@raw", "load-aware@x", "static:x"])
def test_unknown_contenders_are_refused(wrong):
    """Before anything runs."""
    with pytest.raises(ValueError, match=r"Unknown|reads no|cannot be used"):
        Contender(wrong)
