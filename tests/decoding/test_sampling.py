"""Drawing tokens by the inverse of the distribution function.

False alarms: the statistical test fails on right code with probability 1e-6 a case; seeds are fixed.
"""

from __future__ import annotations

import pytest
import torch

from hf_dspark.decoding.sampling import draw, uniform
from tests.exact import chi_square

ALARM = 1e-6
WEIGHTS = torch.tensor([0.5, 0.0, 0.2, 0.05, 0.0, 0.25])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frequencies_fit(drawn: torch.Tensor, probabilities: torch.Tensor) -> bool:
    exact = {(i,): p for i, p in enumerate(probabilities.double().tolist()) if p > 0}
    total = sum(exact.values())
    return chi_square([(i,) for i in drawn.tolist()], {k: p / total for k, p in exact.items()}).p_value > ALARM


def drawn_with(weights: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return draw(weights, uniform(tuple(weights.shape[:-1]), weights.device, generator(seed)))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 37.0])
def test_draws_are_proportional_to_weights(scale: float) -> None:
    """Weights need no normalisation, and a weight of zero is never drawn."""
    drawn = drawn_with((scale * WEIGHTS).expand(20_000, -1))
    assert frequencies_fit(drawn, WEIGHTS)


def test_each_index_is_drawn_for_a_share_of_the_unit_interval_that_is_its_weight() -> None:
    """Over an even grid of uniform numbers every index comes up in proportion; over a million indices too, each once."""
    u = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    counts = draw(WEIGHTS.expand(100, -1), u).bincount(minlength=len(WEIGHTS))
    assert counts.tolist() == [50, 0, 20, 5, 0, 25]
    size = 1_000_000
    u = (torch.tensor([0, 1, size // 3, size - 1], dtype=torch.float64) + 0.5) / size
    assert draw(torch.full((4, size), 1 / size), u).tolist() == [0, 1, size // 3, size - 1]


@pytest.mark.parametrize("weights", [[0.0, 1.0, 0.0], [0.0, 1e-30, 0.3, 0.0], [3.0, 0.0]])
def test_no_number_draws_an_index_without_weight(weights: list[float]) -> None:
    """Neither 0 nor the largest number below 1 falls beside the weights."""
    u = torch.tensor([0.0, 1 - 2**-50], dtype=torch.float64)
    w = torch.tensor(weights)
    positive = w.nonzero()[:, 0]
    assert draw(w.expand(2, -1), u).tolist() == [positive[0], positive[-1]]


def test_a_certain_token_is_always_drawn() -> None:
    """One-hot weights leave no choice, in any leading shape."""
    ids = torch.randint(0, 9, (4, 25), generator=generator())
    assert torch.equal(drawn_with(torch.nn.functional.one_hot(ids, 9).float()), ids)


def test_the_same_seed_draws_the_same_tokens() -> None:
    """A generator decides everything; torch's own is left alone."""
    weights, before = WEIGHTS.expand(100, -1), torch.get_rng_state()
    assert torch.equal(drawn_with(weights, 5), drawn_with(weights, 5))
    assert not torch.equal(drawn_with(weights, 5), drawn_with(weights, 6))
    assert torch.equal(torch.get_rng_state(), before)
