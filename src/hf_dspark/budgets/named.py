"""Budgets by name: `full`, `static:N`, `threshold:P`, `load-aware`, `load-aware-lag2`."""

from __future__ import annotations

from hf_dspark.budgets.budget import Budget, CappedBudget, FullBudget, StaticBudget, ThresholdBudget, check_cap
from hf_dspark.budgets.load_aware import LaggedLoadAwareBudget, LoadAwareBudget

BUDGET_NAMES = "'full', 'static:N' (N tokens), 'threshold:P' (P in 0..1), 'load-aware' and 'load-aware-lag2'"


def make_budget(budget: str | Budget, max_verify_tokens: int | None = None) -> Budget:
    """Turn a name (`full`, `static:N`, `threshold:P`, `load-aware`, `load-aware-lag2`) into a budget; a `Budget` passes as it is.

    Args:
        budget (`str` or `Budget`): what to verify.
        max_verify_tokens (`int`, *optional*): most tokens of one verification pass, anchors included; caps any budget.
    Raises:
        ValueError: for an unknown name or an impossible parameter.
    """
    check_cap(max_verify_tokens)
    made = _named(budget) if isinstance(budget, str) else budget
    if not isinstance(made, Budget):
        raise ValueError(f"A budget is a name ({BUDGET_NAMES}) or an instance of hf_dspark.Budget; got {budget!r}.")
    if max_verify_tokens is None:
        return made
    if isinstance(made, LoadAwareBudget):
        return made.with_cap(max_verify_tokens)  # its search stays within the cap, and admits the best tokens, not the first
    return CappedBudget(made, max_verify_tokens)


def _named(name: str) -> Budget:
    kind, colon, parameter = name.partition(":")
    try:
        if kind == "full" and not colon:
            return FullBudget()
        if kind == "load-aware" and not colon:
            return LoadAwareBudget()
        if kind == "load-aware-lag2" and not colon:
            return LaggedLoadAwareBudget()
        if kind == "static" and colon:
            return StaticBudget(int(parameter))
        if kind == "threshold" and colon:
            return ThresholdBudget(float(parameter))
    except ValueError as error:
        raise ValueError(f"Budget {name!r} has a parameter that cannot be used ({error}).") from None
    raise ValueError(f"Unknown budget {name!r}; allowed are {BUDGET_NAMES}.")
