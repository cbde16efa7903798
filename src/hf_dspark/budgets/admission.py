"""Which drafted tokens a pass takes: Algorithm 1 and the searches beside it, over survivals and costs.

Source: paper section 3.2.2, Algorithm 1, and section 5.2 (the lagged variant). Differs: the objective is tokens over the time of the whole
round, draft included, not tokens a verification pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def survivals(confidence: np.ndarray) -> np.ndarray:
    """a_j = prod_{i<=j} c_i, `(R, n)`, float64; a confidence that is not a number ends the row."""
    return np.cumprod(np.where(np.isnan(confidence), 0.0, confidence.astype(np.float64)), axis=1)


def admission_order(survival: np.ndarray, limits: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All (row, position) pairs by survival, highest first; of equal ones the earlier position first, then the earlier row.

    Args:
        survival (`numpy.ndarray` of shape `(.., R, n)`): a_{r,j}, non-increasing along each row.
        limits (`Sequence[int]` of length R): most tokens of each row; pairs beyond come last, with a survival of 0.
    Returns:
        `numpy.ndarray` of shape `(.., n * R)`: indices j * R + r.
        `numpy.ndarray` of shape `(.., n * R)`: their survivals.
    """
    outside = np.arange(survival.shape[-1])[:, None] >= np.asarray(limits)
    values = np.where(outside, -1.0, survival.swapaxes(-1, -2)).reshape(*survival.shape[:-2], -1)
    order = np.argsort(-values, axis=-1, kind="stable")
    return order, np.maximum(np.take_along_axis(values, order, axis=-1), 0.0)


def from_none(values: np.ndarray) -> np.ndarray:
    """Running sums along the last dimension, beginning with the sum of nothing."""
    return np.concatenate((np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)), axis=-1)


def longest_row(places: np.ndarray) -> np.ndarray:
    """Drafted tokens of the longest row with the first 0, 1, .. tokens admitted.

    Args:
        places (`numpy.ndarray` of shape `(.., n)`): block position (from 0) of each token in the order of admission; -1 for no token.
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
    order, gains = admission_order(survival, limits)
    count = sum(limits)
    theta = (len(limits) + from_none(gains[:count])) / round_s[: count + 1]
    worse = np.flatnonzero(theta[1:] <= theta[:-1])
    count = int(worse[0]) if len(worse) else count
    return _lengths(order[: count if most is None else min(count, most)], len(limits))


def best_count(survival: np.ndarray, limits: Sequence[int], round_s: np.ndarray, wide_s: np.ndarray | None = None) -> int:
    """How many tokens the unconstrained search admits: the arg-max of Theta over all of them, whatever lies between.

    Not to be applied to the tokens whose survivals it has read: it looks past the cut.

    Args:
        survival, limits, round_s: as in `admit_early_stop`.
        wide_s (`numpy.ndarray` of shape `(1 + gamma,)`, *optional*): seconds to add, by drafted tokens of the longest row.
    """
    order, gains = admission_order(survival, limits)
    count = sum(limits)
    seconds = round_s[: count + 1]
    if wide_s is not None:
        seconds = seconds + wide_s[longest_row(order[:count] // len(limits))]
    return int(((len(limits) + from_none(gains[:count])) / seconds).argmax())


def admit_top(survival: np.ndarray, limits: Sequence[int], count: int) -> list[int]:
    """The `count` tokens of highest survival: by rank alone, so exact however `count` was found from finished rounds."""
    order, _ = admission_order(survival, limits)
    return _lengths(order[: min(count, sum(limits))], len(limits))


def _lengths(order: np.ndarray, rows: int) -> list[int]:
    return np.bincount(order % rows, minlength=rows).tolist()
