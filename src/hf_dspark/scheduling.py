"""Budgets: how many drafted tokens of each row go to verification. Pure policy over confidences; knows no model and
no loop.

A budget may look at c_1..c_k when it decides about token k + 1 or any later one, never at anything that depends on
the token it decides about: c_{k+1} depends on x_k, so looking ahead of the cut would let x_k decide whether x_k is
verified, and bias the output (paper, Appendix A).
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch


@runtime_checkable
class Budget(Protocol):
    """Decides l_r for each live row, once a round.

    `needs_confidence` says whether `plan` reads its first argument; where it does not, the loop never waits for the
    device. A budget that never asks for more than some number of tokens may say so in an attribute `longest`, and no
    more are drafted.
    """

    needs_confidence: bool

    def plan(self, confidence: torch.Tensor | None, rows: int, block_size: int) -> list[int]:
        """Verified lengths, one a row, each 0..block_size.

        Args:
            confidence (`torch.Tensor` of shape `(rows, block_size)`, *optional*): c_k, calibrated, on the host.
            rows (`int`): live rows R.
            block_size (`int`): gamma.
        """
        ...


class FullBudget:
    """Verify the whole block: l_r = gamma."""

    needs_confidence = False

    def plan(self, confidence: torch.Tensor | None, rows: int, block_size: int) -> list[int]:
        return [block_size] * rows

    def __repr__(self) -> str:
        return "full"


class StaticBudget:
    """Verify the first `tokens` of every block."""

    needs_confidence = False

    def __init__(self, tokens: int) -> None:
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0:
            raise ValueError(f"A static budget is a whole number of tokens, 0 or more; got {tokens!r}. Example: 'static:4'.")
        self.tokens = tokens

    @property
    def longest(self) -> int:
        """Nothing beyond is ever verified, so nothing beyond is drafted; 0 skips the drafter."""
        return self.tokens

    def plan(self, confidence: torch.Tensor | None, rows: int, block_size: int) -> list[int]:
        return [min(self.tokens, block_size)] * rows

    def __repr__(self) -> str:
        return f"static:{self.tokens}"


class ThresholdBudget:
    """Verify up to, and not including, the first token whose confidence c_k is below `probability`."""

    needs_confidence = True

    def __init__(self, probability: float) -> None:
        if not isinstance(probability, (int, float)) or not 0.0 <= probability <= 1.0:
            raise ValueError(f"A confidence threshold lies between 0 and 1; got {probability!r}. Example: 'threshold:0.5'.")
        self.probability = float(probability)

    def plan(self, confidence: torch.Tensor | None, rows: int, block_size: int) -> list[int]:
        if confidence is None:
            raise ValueError(
                f"Budget {self!r} needs a drafter with a confidence head; this one has none. Use 'full' or 'static:N', "
                "or train the drafter with a confidence head."
            )
        return (confidence >= self.probability).long().cumprod(dim=1).sum(dim=1).tolist()

    def __repr__(self) -> str:
        return f"threshold:{self.probability:g}"


def make_budget(budget: str | Budget) -> Budget:
    """Turn a name (`full`, `static:N`, `threshold:P`) into a budget; an object with the right methods passes as it is.

    Raises:
        ValueError: for an unknown name or an impossible parameter.
    """
    if not isinstance(budget, str):
        if isinstance(budget, Budget) and not isinstance(budget, type):
            return budget
        raise ValueError(f"A budget is a name or an object with `needs_confidence` and `plan`; got {budget!r}.")
    kind, colon, parameter = budget.partition(":")
    try:
        if kind == "full" and not colon:
            return FullBudget()
        if kind == "static" and colon:
            return StaticBudget(int(parameter))
        if kind == "threshold" and colon:
            return ThresholdBudget(float(parameter))
    except ValueError as error:
        raise ValueError(f"Budget {budget!r} has a parameter that cannot be used ({error}).") from None
    raise ValueError(f"Unknown budget {budget!r}; allowed are 'full', 'static:N' (N tokens) and 'threshold:P' (P in 0..1).")
