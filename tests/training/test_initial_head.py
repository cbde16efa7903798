"""The sequential head's start from the target's own next-token logits, against plain linear algebra."""

from __future__ import annotations

import pytest
import torch

from hf_dspark.training.initial_head import low_rank_bigram, start_sequential_head
from hf_dspark.training.target_states import TargetStates
from tests.training.tiny_runs import tiny_drafter, tiny_rows, tiny_target


def centred(states: torch.Tensor, head: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The doubly centred table, entry by entry."""
    logits = states @ head.T
    return logits - (p[:, None] * logits).sum(0) - (logits * q).sum(1, keepdim=True) + (p[:, None] * logits * q).sum()


def weighted_error(table: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p[:, None] * q * (table - w1 @ w2.T).square()).sum())


def test_factors_are_the_best_of_their_rank():
    """The weighted error equals the tail of the singular values of the weighted table itself (Eckart-Young), which no factors beat."""
    rank = 3
    torch.manual_seed(0)
    states, head = torch.randn(20, 5), torch.randn(12, 5)
    counts, following = torch.rand(20) + 0.1, torch.rand(12) + 0.1
    p, q = counts / counts.sum(), following / following.sum()
    w1, w2 = low_rank_bigram(states, head, counts, following, rank)
    table = centred(states, head, p, q)
    singular = torch.linalg.svdvals(p.sqrt()[:, None] * table * q.sqrt())
    assert weighted_error(table, w1, w2, p, q) == pytest.approx(float(singular[rank:].square().sum()), rel=1e-3)
    for _ in range(20):  # no neighbour is better
        moved = weighted_error(table, w1 + 0.05 * torch.randn_like(w1), w2 + 0.05 * torch.randn_like(w2), p, q)
        assert moved > weighted_error(table, w1, w2, p, q)


def test_rank_beyond_the_table_is_filled_with_zeros():
    """Columns that the table has no use for are zero, and the product is the table."""
    torch.manual_seed(0)
    states, head = torch.randn(9, 2), torch.randn(7, 2)
    w1, w2 = low_rank_bigram(states, head, torch.ones(9), torch.ones(7), 4)
    assert w1.shape == (9, 4)
    assert not w1[:, 2:].any()
    table = centred(states, head, torch.full((9,), 1 / 9), torch.full((7,), 1 / 7))
    torch.testing.assert_close(w1 @ w2.T, table, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_every_head_starts_near_the_table_of_mean_states(kind):
    """B of a started head correlates with what the last token adds to the target's logits, seen tokens only; a random one's does not."""
    target, rows = tiny_target(), tiny_rows(40)
    states = TargetStates(target, [0, 2])
    drafter = tiny_drafter(target, markov_head_type=kind, markov_rank=24)
    prev = torch.tensor([t for row in rows for t in row.response_ids[:-1]])
    hidden = torch.randn(len(prev), 1, 32)

    def bias(model):
        with torch.no_grad():
            return model.markov_head.project(model.markov_head.block(prev[:, None], hidden))[:, 0]

    sums, counts = torch.zeros(60, 60), torch.zeros(60)
    for row in rows:
        ids = torch.tensor(row.prompt_ids + row.response_ids)
        with torch.no_grad():
            logits = target(ids[None]).logits[0]
        begin = len(row.prompt_ids) - 1
        sums.index_add_(0, ids[begin:], logits[begin:])
        counts.index_add_(0, ids[begin:], torch.ones(len(ids) - begin))
    expected = (sums / counts.clamp(min=1)[:, None])[prev]

    def correlation(a, b):
        a, b = (x - x.mean(0) - x.mean(1, keepdim=True) + x.mean() for x in (a, b))
        return float((a * b).sum() / (a.norm() * b.norm()))

    before = correlation(bias(drafter), expected)
    other = {name: weight.clone() for name, weight in drafter.state_dict().items() if not name.startswith("markov_head")}
    assert start_sequential_head(drafter, target, rows, states) > 0
    assert abs(before) < 0.3
    assert correlation(bias(drafter), expected) > 0.9
    assert all(torch.equal(drafter.state_dict()[name], weight) for name, weight in other.items())
