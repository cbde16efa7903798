"""Sampled output under the load-aware budgets against the exact distribution of the target, with confidences that give the drafts away.

The confidence of position k + 1 is 0.98 after some values of x_k and 0.02 after the others, so a budget that lets it decide about x_k
is wrong by a wide margin, and the control shows that the test sees it. Saturated confidences make ties.

False alarms: each chi-square test fails on a right decoder with probability ALARM = 1e-4; there are 30, so the file fails on one with 0.3%.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

import hf_dspark
from hf_dspark.budgets.admission import admit_top, best_count, survivals
from hf_dspark.budgets.budget import Budget
from hf_dspark.budgets.cost_model import Costs
from hf_dspark.budgets.load_aware import LaggedLoadAwareBudget, LoadAwareBudget
from tests.costs import flat, full_machine, jagged, middling
from tests.exact import Tokens, Warping, chi_square, exact_distribution, outcomes, small_drafter, small_llama

ALARM = 1e-4
TOKENS = 3
GAMMA = 3
WARPING = Warping(temperature=1.5)
PROMPT = (3, 1, 4, 1)
RAGGED = ((5, 2), (3, 1, 4, 1, 5, 2, 4), (4,), (1, 1, 3, 5))
COSTS: dict[str, Callable[[int], Costs]] = {"flat": flat, "middling": middling, "jagged": jagged, "full": full_machine}
CALLS = {1: 500, 4: 400}


@cache
def target() -> Any:
    return small_llama()


@cache
def drafter(saturated: bool) -> Any:
    """Its c_k is 0.98 or 0.02 by x_{k-1} alone; saturated, exactly one or zero."""
    made = small_drafter(target(), "vanilla")
    if saturated:
        with torch.no_grad():
            made.confidence_head.proj.weight.mul_(100.0)
            made.confidence_head.proj.bias.mul_(100.0)
    return made


def fit(budget: Any, prompts: tuple[Tokens, ...], saturated: bool = False, seed: int = 5, calls: int = 0) -> float:
    """p-value of many small calls from one generator: B = the number of prompts, more tokens generated than compared."""
    generator = torch.Generator().manual_seed(seed)
    width = max(map(len, prompts))
    inputs = {
        "input_ids": torch.tensor([[2] * (width - len(p)) + list(p) for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }
    gathered: dict[int, list[Tokens]] = {r: [] for r in range(len(prompts))}
    for _ in range(calls or CALLS[len(prompts)]):
        out = hf_dspark.generate(
            target(), drafter(saturated), **inputs, **WARPING.arguments(), budget=budget, max_new_tokens=6, generator=generator
        )
        for r, outcome in enumerate(outcomes(out, width, TOKENS)):
            gathered[r].append(outcome)
    fits = [chi_square(drawn, exact_distribution(target(), prompts[r], TOKENS, WARPING)) for r, drawn in gathered.items()]
    return sum(fits[1:], fits[0]).p_value


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [(PROMPT,), RAGGED], ids=["R1", "R4"])
@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("kind", [LoadAwareBudget, LaggedLoadAwareBudget])
def test_load_aware_budgets_keep_the_distribution(kind: type[LoadAwareBudget], costs: str, prompts: tuple[Tokens, ...]) -> None:
    """Whatever passes cost, with back-off and probes, the first three tokens are distributed as the target's."""
    assert fit(kind(COSTS[costs](GAMMA)), prompts) > ALARM


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [(PROMPT,), RAGGED], ids=["R1", "R4"])
@pytest.mark.parametrize("kind", [LoadAwareBudget, LaggedLoadAwareBudget])
def test_saturated_confidences_keep_the_distribution(kind: type[LoadAwareBudget], prompts: tuple[Tokens, ...]) -> None:
    """Confidences of exactly zero and one, and the ties that they make, do no harm."""
    assert fit(kind(middling(GAMMA)), prompts, saturated=True) > ALARM


@pytest.mark.slow
@pytest.mark.parametrize("kind", [LoadAwareBudget, LaggedLoadAwareBudget])
def test_a_cap_keeps_the_distribution(kind: type[LoadAwareBudget]) -> None:
    """Rows that compete for few places are each distributed as if alone."""
    assert fit(kind(flat(GAMMA), max_verify_tokens=9), RAGGED) > ALARM


class Peeking(LoadAwareBudget):
    """The unconstrained search on the confidences of the very round."""

    def plan(self, drafts):
        survival = survivals(drafts.confidence.numpy())
        passes = self.costs.passes(drafts.rows)
        return admit_top(survival, drafts.limits, best_count(survival, drafts.limits, passes.verify_s, passes.wide_s))


@pytest.mark.slow
def test_a_search_that_peeks_is_caught() -> None:
    """The control: the same confidences, the same test, a budget without the early stop on costs with a cliff."""
    from tests.costs import made_costs

    cliff = made_costs(lambda b: 1.0 + 1.2 * min(b - 1, 1) + 0.05 * b, lambda r, n: 1e-6, GAMMA)
    drafts_always = {"propose": Budget.propose}
    assert fit(type("Peeks", (Peeking,), drafts_always)(cliff), (PROMPT,), calls=2000) < ALARM
    for kind in (LoadAwareBudget, LaggedLoadAwareBudget):
        assert fit(type("Drafts", (kind,), drafts_always)(cliff), (PROMPT,), calls=2000) > ALARM
