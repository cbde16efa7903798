"""What a round costs on this machine: a table of measured times and its lookup. Pure numbers; knows no model and no clock.

Source: SPS(B) of the paper's Algorithm 1, as seconds a pass, and with the draft beside it: a round of R rows costs
draft(R, n) + verify(R, B), B tokens in the pass.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Contexts that share one dense table.
_CONTEXT_STEP = 64


@dataclass(frozen=True)
class RowCosts:
    """Measured times with a fixed number of rows.

    Args:
        verify_s (`dict[int, dict[int, float]]`): by context tokens a row, then by tokens a row in the pass (anchor included): seconds
            of everything in a round but the draft: the target's pass, acceptance, bookkeeping.
        draft_s (`dict[int, float]`): by tokens drafted a row: seconds of drafting for all rows.
        pad_s (`float`): seconds that each further token of the longest row costs all rows, over a pass of as many tokens in which rows
            are equal: attention works on rows as long as the longest.
    Raises:
        ValueError: for an empty table or a time that is not positive and finite.
    """

    verify_s: Mapping[int, Mapping[int, float]]
    draft_s: Mapping[int, float]
    pad_s: float = 0.0

    def __post_init__(self) -> None:
        times = [*self.draft_s.values(), *(s for column in self.verify_s.values() for s in column.values())]
        if not self.draft_s or not self.verify_s or not all(self.verify_s.values()):
            raise ValueError("A cost table needs at least one time of a pass and one of a draft; got none. Measure again.")
        if not all(0 < s < float("inf") for s in times) or not 0 <= self.pad_s < float("inf"):
            raise ValueError(f"Times of a cost table must be positive and finite; got {times}. Measure again.")

    def per_row(self, block_size: int, context_tokens: int) -> np.ndarray:
        """Seconds of a pass with 1, 2, .. 1 + gamma tokens a row, `(1 + gamma,)`, non-decreasing."""
        counts = np.arange(1, block_size + 2)
        contexts = sorted(self.verify_s)
        curves = []
        for context in contexts:
            known = sorted(self.verify_s[context])
            curves.append(_line(counts, known, [self.verify_s[context][n] for n in known]))
        curve = curves[0] if len(contexts) == 1 else _between(context_tokens, contexts, curves)
        return np.maximum.accumulate(curve)

    def to_json(self) -> dict[str, Any]:
        """Returns the table with its numbers as they were measured."""
        return {
            "verify_s": {str(c): {str(n): s for n, s in sorted(column.items())} for c, column in sorted(self.verify_s.items())},
            "draft_s": {str(n): s for n, s in sorted(self.draft_s.items())},
            "pad_s": self.pad_s,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> RowCosts:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: if it is something else.
        """
        try:
            return cls(
                {int(c): {int(n): float(s) for n, s in column.items()} for c, column in record["verify_s"].items()},
                {int(n): float(s) for n, s in record["draft_s"].items()},
                float(record["pad_s"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a cost table ({type(error).__name__}: {error})") from None


@dataclass
class Costs:
    """Times of rounds for any number of rows: measured at some, read in between by straight lines.

    Lookups go to dense arrays, made once for each number of rows and step of context.

    Args:
        rows (`dict[int, RowCosts]`): by number of rows.
        block_size (`int`): gamma.
    """

    rows: Mapping[int, RowCosts]
    block_size: int
    _verify: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)
    _draft: dict[tuple[int, int], float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.rows or min(self.rows) < 1:
            raise ValueError(f"Costs need times for at least one number of rows, 1 or more; got {sorted(self.rows)}.")

    def verify_s(self, rows: int, context_tokens: int = 0) -> np.ndarray:
        """Seconds of a round without its draft, by drafted tokens in the pass.

        Args:
            rows (`int`): live rows R.
            context_tokens (`int`): tokens that the longest row holds.
        Returns:
            `numpy.ndarray` of shape `(1 + R * gamma,)`: entry j is a pass of R + j tokens; non-decreasing.
        """
        key = (rows, context_tokens // _CONTEXT_STEP)
        table = self._verify.get(key)
        if table is None:
            middle = key[1] * _CONTEXT_STEP + _CONTEXT_STEP // 2
            known = sorted(self.rows)
            curves = [self.rows[r].per_row(self.block_size, middle) for r in known]
            curve = curves[0] if len(known) == 1 else _between(rows, known, curves)
            curve = np.maximum(curve, curves[0])  # Noise must not let more rows cost less than the fewest that were measured.
            tokens = rows + np.arange(rows * self.block_size + 1)
            table = self._verify[key] = np.maximum.accumulate(_line(tokens, rows * np.arange(1, self.block_size + 2), curve))
        return table

    def pad_s(self, rows: int) -> float:
        """Seconds that each token by which the longest row exceeds the mean adds to a pass.

        Args:
            rows (`int`): live rows R.
        """
        known = sorted(self.rows)
        values = [np.array(self.rows[r].pad_s) for r in known]
        return max(float(values[0] if len(known) == 1 else _between(rows, known, values)), 0.0)

    def draft_s(self, rows: int, length: int) -> float:
        """Seconds of drafting `length` tokens for each of `rows` rows; 0 for nothing.

        Args:
            rows (`int`): rows that are drafted for.
            length (`int`): tokens a row.
        """
        if rows == 0 or length == 0:
            return 0.0
        key = (rows, length)
        if key not in self._draft:
            known = sorted(self.rows)
            times = []
            for r in known:
                lengths = sorted(self.rows[r].draft_s)
                times.append(_line(np.array([length]), lengths, [self.rows[r].draft_s[n] for n in lengths]))
            value = times[0] if len(known) == 1 else _between(rows, known, times)
            self._draft[key] = max(float(value[0]), 0.0)
        return self._draft[key]


def _line(at: np.ndarray, known: Sequence[int] | np.ndarray, values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Straight lines between known points, made monotone; beyond the last the last slope goes on, before the first the first value."""
    values = np.maximum.accumulate(np.asarray(values, dtype=np.float64))
    out = np.interp(at, known, values)
    if len(known) > 1:
        slope = (values[-1] - values[-2]) / (known[-1] - known[-2])
        out = np.where(at > known[-1], values[-1] + slope * (at - known[-1]), out)
    return out


def _between(at: float, known: Sequence[int], curves: Sequence[np.ndarray]) -> np.ndarray:
    """The curve at `at` by a straight line between the two nearest known ones; beyond them the outer line goes on."""
    right = min(max(bisect_left(known, at), 1), len(known) - 1)
    low, high = known[right - 1], known[right]
    share = max((at - low) / (high - low), 0.0)
    return (1 - share) * curves[right - 1] + share * curves[right]
