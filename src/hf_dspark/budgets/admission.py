"""Which drafted tokens a pass takes: Algorithm 1 and the searches beside it, over survivals and costs. Pure numbers; knows no budget.

Source: paper section 3.2.2, Algorithm 1, and section 5.2 (the lagged variant). Differs: the objective is tokens over the time of the whole
round, draft included, not tokens a verification pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_dspark.budgets.cost_model import PassCosts


def survivals(confidence: np.ndarray) -> np.ndarray:
    """a_j = prod_{i<=j} c_i, `(R, n)`, float64; a confidence that is not a number ends the row."""
    return np.cumprod(np.where(np.isnan(confidence), 0.0, confidence.astype(np.float64)), axis=1)


def admission_order(survival: np.ndarray) -> np.ndarray:
    """All (row, position) pairs by survival, highest first; of equal ones the earlier position first, then the earlier row.

    Args:
        survival (`numpy.ndarray` of shape `(R, n)`): a_{r,j}, non-increasing along each row.
    Returns:
        `numpy.ndarray` of shape `(n * R,)`: indices into the transposed, flattened survivals: j * R + r.
    """
    return np.argsort(-survival.T.ravel(), kind="stable")


def _gains(survival: np.ndarray, limits: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The admissible pairs in order, and their survivals."""
    open_ = np.arange(survival.shape[1])[:, None] < np.asarray(limits)[None, :]
    order = admission_order(np.where(open_.T, survival, -1.0))[: int(open_.sum())]
    return order, survival.T.ravel()[order]


def _lengths(order: np.ndarray, rows: int) -> list[int]:
    return np.bincount(order % rows, minlength=rows).tolist()


def rate(
    gains: np.ndarray, rows: int, round_s: np.ndarray, order: np.ndarray | None = None, wide_s: np.ndarray | None = None
) -> np.ndarray:
    """Theta of admitting the first 0, 1, .. tokens: expected tokens of the round over its seconds, `(1 + len(gains),)`.

    Args:
        gains (`numpy.ndarray` of shape `(n,)`): survivals in the order of admission.
        rows (`int`): live rows.
        round_s (`numpy.ndarray` of shape `(>= 1 + n,)`): seconds with 0, 1, .. drafted tokens in the pass.
        order (`numpy.ndarray` of shape `(n,)`, *optional*): from `admission_order`; with it
        wide_s (`numpy.ndarray` of shape `(1 + gamma,)`): seconds to add, by drafted tokens of the longest row.
    """
    seconds = round_s[: len(gains) + 1]
    if order is not None and wide_s is not None:
        seconds = seconds + wide_s[longest_row(order // rows)]
    return (rows + from_none(gains)) / seconds


def from_none(values: np.ndarray) -> np.ndarray:
    """Running sums along the last dimension, beginning with the sum of nothing."""
    return np.concatenate((np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)), axis=-1)


def longest_row(places: np.ndarray) -> np.ndarray:
    """Drafted tokens of the longest row with the first 0, 1, .. tokens admitted.

    Args:
        places (`numpy.ndarray` of shape `(.., n)`): block position (from 0) of each token in the order of admission; -1 where it counts for
            nothing.
    """
    nothing = np.zeros((*places.shape[:-1], 1), dtype=np.int64)
    return np.concatenate((nothing, np.maximum.accumulate(places + 1, axis=-1)), axis=-1)


def admit_early_stop(survival: np.ndarray, limits: Sequence[int], round_s: np.ndarray, most: int | None = None) -> list[int]:
    """Algorithm 1: admit tokens by survival while Theta strictly grows, stop at the first that does not help.

    The stop is what keeps the output exact: whether a token is admitted depends on larger survivals only, so on earlier tokens of its row.

    Args:
        survival (`numpy.ndarray` of shape `(R, n)`): a_{r,j} = prod_{i<=j} c_{r,i}.
        limits (`Sequence[int]`): most tokens of each row.
        round_s (`numpy.ndarray` of shape `(>= 1 + sum(limits),)`): seconds of the round with 0, 1, .. drafted tokens in its pass.
        most (`int`, *optional*): tokens in all.
    Returns:
        `list[int]`: l_r of each row.
    """
    order, gains = _gains(survival, limits)
    theta = rate(gains, len(limits), round_s)
    worse = np.flatnonzero(theta[1:] <= theta[:-1])
    count = int(worse[0]) if len(worse) else len(gains)
    return _lengths(order[: count if most is None else min(count, most)], len(limits))


def best_count(survival: np.ndarray, limits: Sequence[int], round_s: np.ndarray, wide_s: np.ndarray | None = None) -> int:
    """How many tokens the unconstrained search admits: the arg-max of Theta over all of them, whatever lies between.

    Not to be applied to the tokens whose survivals it has read: it looks past the cut.
    """
    order, gains = _gains(survival, limits)
    return int(rate(gains, len(limits), round_s, order, wide_s).argmax())


def admit_top(survival: np.ndarray, limits: Sequence[int], count: int) -> list[int]:
    """The `count` tokens of highest survival: by rank alone, so exact however `count` was found from finished rounds."""
    order, _ = _gains(survival, limits)
    return _lengths(order[:count], len(limits))


def early_stop_s(passes: PassCosts, rows: int, length: int, start: float = 0.0) -> np.ndarray:
    """Seconds that Algorithm 1 reckons with, by drafted tokens in the pass, with `length` tokens drafted for each of `rows` rows.

    Convex, so that no step of the costs stops it: from `start` drafted tokens a row on as close to what passes cost as can be, and before
    that as if they had always been so dear. And with the width that the pass may come to have, so that the first token of a position does
    not pay for all. Whether so long rows pay, and from where on to look, was settled by what passes really cost, before the draft.
    """
    return passes.convex_s(rows * length, int(rows * start)) + passes.wide_s[length]
