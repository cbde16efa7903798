"""Drawing tokens: exponential race and Gumbel form.

False alarms: the two statistical tests fail on right code with probability 1e-6 each; seeds are fixed.
"""

from __future__ import annotations

import pytest
import torch

from hf_dspark.decoding.sampling import draw, draw_from_logits, exponential_noise
from tests.exact import chi_square

ALARM = 1e-6
WEIGHTS = torch.tensor([0.5, 0.0, 0.2, 0.05, 0.0, 0.25])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frequencies_fit(drawn: torch.Tensor, probabilities: torch.Tensor) -> bool:
    exact = {(i,): p for i, p in enumerate(probabilities.double().tolist()) if p > 0}
    total = sum(exact.values())
    return chi_square([(i,) for i in drawn.tolist()], {k: p / total for k, p in exact.items()}).p_value > ALARM


def test_noise_is_exponential_and_never_zero() -> None:
    """A million variates are positive and finite, and their mean and survival at 1 are those of Exp(1)."""
    noise = exponential_noise((1000, 1000), torch.empty(0), generator())
    assert noise.dtype == torch.float32
    assert noise.min() > 0
    assert torch.isfinite(noise).all()
    assert noise.double().mean().item() == pytest.approx(1.0, abs=5e-3)  # five standard deviations
    assert (noise > 1.0).double().mean().item() == pytest.approx(0.36788, abs=2.5e-3)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 37.0])
def test_draws_are_proportional_to_weights(scale: float) -> None:
    """Weights need no normalisation, and a weight of zero is never drawn."""
    drawn = draw((scale * WEIGHTS).expand(20_000, -1), generator())
    assert frequencies_fit(drawn, WEIGHTS)


def test_draws_from_logits_are_softmax_draws() -> None:
    """Logits with -inf among them give softmax probabilities, none to -inf."""
    logits = (WEIGHTS.log() + 3.0).expand(20_000, -1)
    noise = exponential_noise(tuple(logits.shape), logits, generator())
    assert frequencies_fit(draw_from_logits(logits, noise), WEIGHTS)


def test_both_forms_agree_on_the_same_noise() -> None:
    """The race and the Gumbel trick are the same draw."""
    logits = torch.randn(500, 50, generator=generator(1))
    noise = exponential_noise((500, 50), logits, generator(2))
    assert torch.equal(draw_from_logits(logits, noise), draw(logits.softmax(-1), generator(2)))


def test_a_certain_token_is_always_drawn() -> None:
    """One-hot weights leave no choice, in any leading shape."""
    ids = torch.randint(0, 9, (4, 25), generator=generator())
    assert torch.equal(draw(torch.nn.functional.one_hot(ids, 9).float(), generator()), ids)


def test_the_same_seed_draws_the_same_tokens() -> None:
    """A generator decides everything; torch's own is left alone."""
    weights, before = WEIGHTS.expand(100, -1), torch.get_rng_state()
    assert torch.equal(draw(weights, generator(5)), draw(weights, generator(5)))
    assert not torch.equal(draw(weights, generator(5)), draw(weights, generator(6)))
    assert torch.equal(torch.get_rng_state(), before)
