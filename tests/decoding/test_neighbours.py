"""A row's text and counts depend on the row alone: not on its neighbours, its place in the batch, or padding."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import BUDGETS, World, left_padded, speculate, world


def _row_results(w: World, rows: list[int], width: int = 0, **options) -> dict[int, tuple]:
    inputs = left_padded([w.prompts[r] for r in rows], width)
    out = speculate(w.target, w.drafter, inputs, return_dict_in_generate=True, **options)
    start = inputs["input_ids"].shape[1]
    results = {}
    for row, ids, stats in zip(rows, out.sequences, out.stats.rows, strict=True):
        results[row] = (
            ids[start : start + stats.generated].tolist(),
            stats.rounds,
            stats.drafted,
            stats.verified,
            stats.accepted,
            stats.accepted_at,
        )
    return results


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "gpt2"])
def test_a_row_alone_and_in_a_batch_of_eight(family, budget, monkeypatch):
    """Text, rounds, verified and accepted counts of every row equal those of the row generated alone."""
    w = world(family)
    monkeypatch.setattr(w.drafter, "budget", budget)
    together = _row_results(w, list(range(8)))
    for row in (0, 3, 5):
        assert _row_results(w, [row]) == {row: together[row]}


def test_order_of_the_batch():
    """Rows in another order give the same rows in that order."""
    w = world()
    assert _row_results(w, [5, 2, 7, 0, 1, 6, 3, 4]) == _row_results(w, list(range(8)))


@pytest.mark.parametrize("rows", [[0], [0, 1, 2]])
def test_more_left_padding(rows):
    """Padding beyond the longest row changes nothing, at batch size one either."""
    w = world()
    assert _row_results(w, rows, width=29) == _row_results(w, rows)


def test_neighbours_that_end_early():
    """A row goes on as if alone when its neighbours leave the batch round by round."""
    w = world()
    tokens = speculate(w.target, w.drafter, w.inputs(8))
    eos = [int(tokens[row, -24 + place]) for row, place in enumerate([20, 1, 4, 7, 9, 2, 12, 15])]
    together = _row_results(w, list(range(8)), eos_token_id=eos)
    assert len({len(result[0]) for result in together.values()}) > 3
    for row in range(8):
        assert _row_results(w, [row], eos_token_id=eos) == {row: together[row]}


def test_token_ids_under_padding_do_not_matter():
    """What the attention mask leaves out is not read, whatever ids stand there."""
    w = world()
    inputs = w.inputs(3)
    other = dict(inputs, input_ids=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 17))
    a, b = speculate(w.target, w.drafter, inputs), speculate(w.target, w.drafter, other)
    assert torch.equal(a[:, -24:], b[:, -24:])
