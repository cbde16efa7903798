"""The state of the live rows against plain lists."""

from __future__ import annotations

import random

import pytest
import torch

from hf_dspark.decoding.state import State


@pytest.mark.parametrize("seed", range(4))
def test_any_series_of_operations_equals_plain_lists(seed: int) -> None:
    """Rows that join with padding, commit parts of blocks, and leave, hold the ids that plain lists hold; drafts leave no trace."""
    dice, state = random.Random(seed), State(torch.device("cpu"))
    rows: dict[int, list[int]] = {}
    hidden: dict[int, int] = {}
    number = 0
    for _ in range(80):
        if not rows or (dice.random() < 0.2 and len(rows) < 6):
            texts = [[dice.randrange(50) for _ in range(dice.randint(1, 9))] for _ in range(dice.randint(1, 3))]
            padding = [dice.randint(0, 3) for _ in texts]
            numbers = range(number, number + len(texts))
            number += len(texts)
            padded = [torch.tensor([0] * pad + text) for pad, text in zip(padding, texts, strict=True)]
            masks = [torch.arange(len(text)) >= pad for pad, text in zip(padding, padded, strict=True)]
            first = state.num_rows
            state.add_rows(numbers, padded, masks)
            for name, ids, pad in zip(numbers, padded, padding, strict=True):
                rows[name], hidden[name] = ids.tolist(), pad
            tokens = torch.tensor([dice.randrange(50) for _ in texts])
            state.commit(tokens[:, None], [1] * len(texts), tokens, first)
            for name, token in zip(numbers, tokens.tolist(), strict=True):
                rows[name].append(token)
        elif dice.random() < 0.2:
            state.remove_rows(dice.sample(range(state.num_rows), dice.randint(1, state.num_rows)))
            rows = {name: rows[name] for name in state.requests}
        else:
            state.write_draft(torch.randint(50, (state.num_rows, 4)))
            block, counts = torch.randint(50, (state.num_rows, 5)), [dice.randint(1, 5) for _ in rows]
            state.commit(block, counts, block.gather(1, torch.tensor(counts)[:, None] - 1)[:, 0])
            for place, name in enumerate(state.requests):
                rows[name] += block[place, : counts[place]].tolist()
        assert sorted(state.requests) == sorted(rows)
        for place, name in enumerate(state.requests):
            assert state.prefix(place)[0].tolist() == rows[name]
            assert state.anchors[place] == rows[name][-1]
            assert state.context_lengths[place] == len(rows[name]) - hidden[name] - 1
            assert (state.masked_at is None and not hidden[name]) or int(state.masked_at[place].sum()) == hidden[name]


def test_a_finished_row_owns_its_ids() -> None:
    """What leaves is a copy: later rows write into the same place."""
    state = State(torch.device("cpu"))
    state.add_rows([4], [torch.tensor([1, 2])])
    state.commit(torch.tensor([[3]]), [1], torch.tensor([3]))
    (row,) = state.finish([0])
    state.remove_rows([0])
    state.add_rows([5], [torch.tensor([7, 7, 7])])
    assert (row.request, row.ids.tolist(), row.new_tokens) == (4, [1, 2, 3], [3])
