"""Made-up cost tables for tests."""

from __future__ import annotations

from collections.abc import Callable

from hf_dspark.budgets.cost_model import Costs, RowCosts


def made_costs(
    pass_s: Callable[[int], float], draft_s: Callable[[int, int], float], block_size: int, rows: tuple[int, ...] = (1, 2, 4, 8)
) -> Costs:
    """A table in which a pass of B tokens costs `pass_s(B)` and a draft of n tokens for R rows `draft_s(R, n)`."""
    return Costs(
        {
            r: RowCosts(
                {0: {n: pass_s(r * n) for n in range(1, block_size + 2)}},
                {n: draft_s(r, n) for n in range(1, block_size + 1)},
                {},
                {n: pass_s(r + n) for n in range(1, r)},
            )
            for r in rows
        },
        block_size,
    )


def flat(block_size: int) -> Costs:
    """A machine with time to spare: more tokens hardly cost anything, and drafts nothing."""
    return made_costs(lambda b: 1.0 + 1e-6 * b, lambda r, n: 1e-9, block_size)


def full_machine(block_size: int) -> Costs:
    """A machine at its limit: each token costs the same, and drafts cost more than they can give."""
    return made_costs(lambda b: float(b), lambda r, n: 2.0 * r * n, block_size)


def middling(block_size: int) -> Costs:
    """A machine on which likely tokens pay and others do not, with moderate costs of drafts."""
    return made_costs(lambda b: 2.0 + 0.5 * b, lambda r, n: 0.02 * r + 0.01 * n, block_size)


def jagged(block_size: int) -> Costs:
    """Passes cost by steps of four tokens."""
    return made_costs(lambda b: 1.0 + 0.6 * -(-b // 4), lambda r, n: 1e-3, block_size)


def machine(tokens_s: Callable[[int], float], width: float = 0.02, draft: float = 1.0) -> Costs:
    """A machine for 1 .. 32 rows and blocks of 7, by what so many tokens in a pass cost, and the longest row in it."""
    gamma = 7
    return Costs(
        {
            r: RowCosts(
                {0: {n: tokens_s(r * n) + width * r * (n - 1) for n in range(1, gamma + 2)}},
                {n: (3.0 + 0.05 * r * n) * draft for n in range(1, gamma + 1)},
                {0: {n: tokens_s(r + n) + width * r * n for n in range(1, gamma + 1)}} if r > 1 else {},
                {n: tokens_s(r + n) + width * r for n in range(1, r)},
            )
            for r in (1, 2, 4, 8, 16, 32)
        },
        gamma,
    )
