"""Appendix A of the paper by enumeration: p_t = (0.7, 0.3), p_d = (0.5, 0.5), tokens A and B, two drafted positions.
No sampling.

The confidences leak: c_1 = 0.8, and c_2 is 0.9 after A, 0 after B. Whoever lets c_2 decide whether x_1 is verified
outputs A too often.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch

from hf_dspark.budgets.admission import admit_top, best_count, survivals
from hf_dspark.budgets.budget import Drafts, LiveRows, Proposal
from hf_dspark.budgets.cost_model import Costs, RowCosts
from hf_dspark.budgets.load_aware import LaggedLoadAwareBudget, LoadAwareBudget
from hf_dspark.budgets.named import make_budget

P_T, P_D = (0.7, 0.3), (0.5, 0.5)
SPS = (1.0, 0.5, 0.45)  # of passes with 1, 2 and 3 tokens
DRAFTS = list(product((0, 1), repeat=2))
CONFIDENCE = torch.tensor([[0.8, 0.9 if x_1 == 0 else 0.0] for x_1, _ in DRAFTS])

Plan = Callable[[torch.Tensor], list[int]]


def first_token(plan: Plan) -> float:
    """Probability that the round's first output token is A, summed over all drafts and all verdicts."""
    total = 0.0
    for (x_1, x_2), length in zip(DRAFTS, plan(CONFIDENCE), strict=True):
        weight = P_D[x_1] * P_D[x_2]
        if length == 0:
            total += weight * P_T[0]
            continue
        accept = min(1.0, P_T[x_1] / P_D[x_1])
        residual = [max(t - d, 0.0) for t, d in zip(P_T, P_D, strict=True)]
        corrected = residual[0] / sum(residual)
        total += weight * (accept * (x_1 == 0) + (1.0 - accept) * corrected)
    return total


def theta(confidence: torch.Tensor, length: int) -> float:
    """Expected tokens a second of one request with `length` tokens verified: Algorithm 1."""
    survival = confidence.cumprod(0)[:length].sum().item()
    return (1.0 + survival) * SPS[length]


def global_search(confidence: torch.Tensor) -> list[int]:
    """The arg-max over all lengths: it sees c_2 before it decides about x_1."""
    return [max(range(3), key=lambda length, c=row: theta(c, length)) for row in confidence]


def early_stop(confidence: torch.Tensor) -> list[int]:
    """Algorithm 1: admit one token at a time, stop at the first that does not help."""
    lengths = []
    for row in confidence:
        length = 0
        while length < 2 and theta(row, length + 1) > theta(row, length):
            length += 1
        lengths.append(length)
    return lengths


def test_the_global_search_is_biased() -> None:
    """Peeking outputs A with probability 0.85 instead of 0.7, as the paper says."""
    assert global_search(CONFIDENCE) == [2, 2, 0, 0]
    assert first_token(global_search) == pytest.approx(0.85, abs=1e-9)


def test_the_early_stop_is_not() -> None:
    """Algorithm 1 with its early stop outputs A with probability 0.7."""
    assert first_token(early_stop) == pytest.approx(0.7, abs=1e-9)


@pytest.mark.parametrize(
    "name",
    [
        "full",
        *(f"static:{n}" for n in range(3)),
        *(f"threshold:{p}" for p in (0.0, 0.1, 0.5, 0.7999, 0.8001, 0.85, 0.9, 0.95, 1.0)),
    ],
)
def test_budgets_of_this_package_are_not(name: str) -> None:
    """Whether a budget admits both tokens, one or none, the first output token is A with probability 0.7."""
    budget = make_budget(name)

    def plan(confidence: torch.Tensor) -> list[int]:
        return budget.plan(Drafts((2,) * len(DRAFTS), confidence if budget.needs_confidence else None))

    assert first_token(plan) == pytest.approx(0.7, abs=1e-9)


def paper_costs() -> Costs:
    """SPS of the appendix as seconds a pass, with a draft that costs nothing."""
    return Costs({1: RowCosts({0: {1 + n: 1 / sps for n, sps in enumerate(SPS)}}, {1: 1e-12, 2: 1e-12})}, 2)


def planned(budget: LoadAwareBudget) -> Plan:
    """Each draft on its own, as the only row of a first round."""

    def plan(confidence: torch.Tensor) -> list[int]:
        lengths = []
        for row in confidence:
            fresh = budget.start(paper_costs(), learn_costs=False)
            live = LiveRows((0,), 2, (2,))
            assert fresh.propose(live) == Proposal(2)
            lengths += fresh.plan(Drafts((2,), row[None], live))
        return lengths

    return plan


@pytest.mark.parametrize("budget", [LoadAwareBudget(), LaggedLoadAwareBudget()], ids=repr)
def test_the_load_aware_budgets_are_not(budget: LoadAwareBudget) -> None:
    """With the paper's costs the early stop outputs A with probability 0.7, and so does the lagged search."""
    assert first_token(planned(budget)) == pytest.approx(0.7, abs=1e-9)


def test_the_load_aware_budget_without_its_stop_is_biased() -> None:
    """The same class with the unconstrained search on today's confidences outputs A with probability 0.85: the control."""

    class Peeking(LoadAwareBudget):
        def plan(self, drafts):
            survival = survivals(drafts.confidence.numpy())
            return admit_top(survival, drafts.limits, best_count(survival, drafts.limits, self.costs.passes(drafts.rows).verify_s))

    assert first_token(planned(Peeking())) == pytest.approx(0.85, abs=1e-9)


def test_the_threshold_does_depend_on_the_draft() -> None:
    """The example bites: the threshold verifies two tokens after A and one after B, and is right all the same."""
    assert make_budget("threshold:0.5").plan(Drafts((2,) * len(DRAFTS), CONFIDENCE)) == [2, 2, 1, 1]
