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
    """Measured times with a fixed number of rows R: seconds of everything in a round but the draft: the target's pass, acceptance,
    bookkeeping.

    What a pass costs is split into what its tokens cost and what its width costs: linear layers see the sum of the rows, attention works
    on rows as wide as the widest.

    Args:
        verify_s (`dict[int, dict[int, float]]`): of rows of equal length, by context tokens a row, then by tokens a row in the pass
            (anchor included); the shape of the curve is taken at the first context, at others their least time.
        draft_s (`dict[int, float]`): by tokens drafted a row: seconds of drafting for all rows.
        long_s (`dict[int, dict[int, float]]`): of rows of which one has n drafted tokens and the others none, by context, then by n.
        few_s (`dict[int, float]`): of rows of which n < R have one drafted token and the others none, by n, at the first context: kernels
            work by steps, so these do not lie on a straight line.
    Raises:
        ValueError: for an empty table or a time that is not positive and finite.
    """

    verify_s: Mapping[int, Mapping[int, float]]
    draft_s: Mapping[int, float]
    long_s: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    few_s: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns = [*self.verify_s.values(), *self.long_s.values(), self.few_s, self.draft_s]
        times = [seconds for column in columns for seconds in column.values()]
        if not self.draft_s or not self.verify_s or not all(self.verify_s.values()):
            raise ValueError("A cost table needs at least one time of a pass and one of a draft; got none. Measure again.")
        if not all(0 < s < float("inf") for s in times):
            raise ValueError(f"Times of a cost table must be positive and finite; got {times}. Measure again.")

    def curves(self, rows: int, block_size: int, context_tokens: int) -> tuple[np.ndarray, float]:
        """What tokens cost, and what width costs.

        Args:
            rows (`int`): R, that this table was measured with.
            block_size (`int`): gamma.
            context_tokens (`int`): tokens that rows hold.
        Returns:
            `numpy.ndarray`: seconds at `token_grid(gamma)` drafted tokens a row, non-decreasing, the width left out.
            `float`: seconds added for each drafted token of the longest row.
        """
        contexts = sorted(self.verify_s)
        first = contexts[0]
        wide = self._wide(rows, block_size)
        places, seconds = self._bare(rows, block_size, wide)
        even = self._even(block_size)
        passes, widths = [], []
        for context in contexts:
            # What tokens cost does not depend on what rows hold; what the rows cost does, and their width.
            fewest = min(self.verify_s[context])
            here = seconds + self.verify_s[context][fewest] - even[fewest - 1]
            long_s = self.long_s.get(context) if context != first else None
            passes.append(np.interp(token_grid(block_size), places, here))
            widths.append(np.array(_width(rows, long_s, places, here) if long_s else wide))
        if len(contexts) == 1:
            return passes[0], wide
        return _between(context_tokens, contexts, passes), max(float(_between(context_tokens, contexts, widths)), 0.0)

    def _even(self, block_size: int) -> np.ndarray:
        """Seconds of rows of equal length at the first context, by drafted tokens a row, `(1 + gamma,)`."""
        column = self.verify_s[min(self.verify_s)]
        known = sorted(column)
        return _line(np.arange(1, block_size + 2), known, [column[n] for n in known])

    def _bare(self, rows: int, block_size: int, wide_s: float) -> tuple[np.ndarray, np.ndarray]:
        """Drafted tokens a row, and seconds of passes with so many when the price of their width is taken off; both non-decreasing."""
        even, few, whole = self._even(block_size), sorted(self.few_s), np.arange(block_size + 1)
        seconds = [even[0], *(self.few_s[n] - wide_s for n in few), *(even - wide_s * whole)[1:]]
        return np.array([0.0, *(n / rows for n in few), *whole[1:]]), _rising(seconds)

    def _wide(self, rows: int, block_size: int) -> float:
        """Seconds for each drafted token of the longest row at the first context: what is left of passes with one long row when the price
        of their tokens is taken off, which itself is what is left of the other passes when width is taken off.
        """
        long_s, wide = self.long_s.get(min(self.verify_s)), 0.0
        for _ in range(16 if long_s else 0):
            assert long_s is not None
            wide = _width(rows, long_s, *self._bare(rows, block_size, wide))
        return wide

    def to_json(self) -> dict[str, Any]:
        """Returns the table with its numbers as they were measured."""

        def plain(column: Mapping[int, float]) -> dict[str, float]:
            return {str(n): seconds for n, seconds in sorted(column.items())}

        return {
            "verify_s": {str(c): plain(column) for c, column in sorted(self.verify_s.items())},
            "draft_s": plain(self.draft_s),
            "long_s": {str(c): plain(column) for c, column in sorted(self.long_s.items())},
            "few_s": plain(self.few_s),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> RowCosts:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: if it is something else.
        """

        def column(values: Mapping[str, float]) -> dict[int, float]:
            return {int(n): float(seconds) for n, seconds in values.items()}

        try:
            return cls(
                {int(c): column(values) for c, values in record["verify_s"].items()},
                column(record["draft_s"]),
                {int(c): column(values) for c, values in record["long_s"].items()},
                column(record["few_s"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a cost table ({type(error).__name__}: {error})") from None


def _width(rows: int, long_s: Mapping[int, float], places: np.ndarray, seconds: np.ndarray) -> float:
    """By least squares, seconds for each drafted token of the longest row, in passes with one long row, over what their tokens cost."""
    lengths = np.array(sorted(long_s))
    left = np.array([long_s[n] for n in lengths]) - np.interp(lengths / rows, places, seconds)
    return max(float(lengths @ left / (lengths @ lengths)), 0.0)


def token_grid(block_size: int) -> np.ndarray:
    """Drafted tokens a row at which times are held: eighths up to one, then whole numbers up to gamma."""
    return np.concatenate((np.arange(8) / 8, np.arange(1, block_size + 1)))


@dataclass
class PassCosts:
    """What rounds cost with a given number of rows and context.

    Attributes:
        verify_s (`numpy.ndarray` of shape `(1 + R * gamma,)`): seconds of a round without its draft, by drafted tokens in the pass;
            non-decreasing; the width left out.
        wide_s (`numpy.ndarray` of shape `(1 + gamma,)`): seconds to add, by drafted tokens of the longest row.
    """

    verify_s: np.ndarray
    wide_s: np.ndarray
    _convex: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)

    def convex_s(self, tokens: int, start: int = 0) -> np.ndarray:
        """The greatest convex curve that is nowhere above `verify_s` from `start` up to `tokens` drafted tokens, `(1 + tokens,)`; before
        `start` its first slope holds.

        Where costs rise by steps, a search that stops at the first token that does not pay would stop before each; on this curve it walks
        on to the end of the step.
        """
        key = (tokens, start)
        if key not in self._convex:
            curve = self.verify_s[: tokens + 1]
            corners = [start]
            for j in range(start + 1, len(curve)):
                while len(corners) > 1 and (curve[j] - curve[corners[-2]]) * (corners[-1] - corners[-2]) <= (
                    curve[corners[-1]] - curve[corners[-2]]
                ) * (j - corners[-2]):
                    corners.pop()
                corners.append(j)
            whole = np.arange(len(curve))
            convex = np.interp(whole, corners, curve[corners])
            if start < tokens:
                convex[:start] = convex[start] - (convex[start + 1] - convex[start]) * (start - whole[:start])
            self._convex[key] = convex
        return self._convex[key]


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
    _passes: dict[tuple[int, int], PassCosts] = field(default_factory=dict, repr=False)
    _draft: dict[tuple[int, int], float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.rows or min(self.rows) < 1:
            raise ValueError(f"Costs need times for at least one number of rows, 1 or more; got {sorted(self.rows)}.")

    def passes(self, rows: int, context_tokens: int = 0) -> PassCosts:
        """What rounds cost without their draft.

        Args:
            rows (`int`): live rows R.
            context_tokens (`int`): tokens that the longest row holds.
        """
        key = (rows, context_tokens // _CONTEXT_STEP)
        found = self._passes.get(key)
        if found is None:
            middle = key[1] * _CONTEXT_STEP + _CONTEXT_STEP // 2
            known = sorted(self.rows)
            both = [self.rows[r].curves(r, self.block_size, middle) for r in known]
            # Noise must not let more rows cost less than fewer.
            pass_s = list(np.stack([_rising(column) for column in np.stack([curve for curve, _ in both]).T]).T)
            wide_s = [np.array(wide) for _, wide in both]
            curve = pass_s[0] if len(known) == 1 else _between(rows, known, pass_s)
            wide = max(float(wide_s[0] if len(known) == 1 else _between(rows, known, wide_s)), 0.0)
            curve = np.maximum(curve, pass_s[0])
            tokens = np.arange(rows * self.block_size + 1) / rows
            table = np.maximum.accumulate(np.interp(tokens, token_grid(self.block_size), curve))
            found = self._passes[key] = PassCosts(table, wide * np.arange(self.block_size + 1))
        return found

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


def _rising(values: np.ndarray | Sequence[float]) -> np.ndarray:
    """The non-decreasing curve closest to these values, by least squares: neighbours that fall share their mean."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, size = float(value), 1
        while blocks and blocks[-1][0] > mean:
            other, count = blocks.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        blocks.append((mean, size))
    return np.repeat([mean for mean, _ in blocks], [size for _, size in blocks])


def _line(at: np.ndarray, known: Sequence[int] | np.ndarray, values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Straight lines between known points, made monotone; beyond the last the last slope goes on, before the first the first value."""
    values = _rising(values)
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


def prior_costs(block_size: int, draft_share: float, device_type: str) -> Costs:
    """What rounds cost before anything was measured, in passes of one row.

    Args:
        block_size (`int`): gamma.
        draft_share (`float`): the drafter's weights over the target's.
        device_type (`str`): `"cpu"`, `"cuda"`, ..
    """
    token = 0.12 if device_type == "cpu" else 0.002
    rows = {}
    for r in (1, 2, 4, 8, 16, 32, 64):
        verify = {128: {n: 1 + token * (r * n - 1) for n in (1, 2, 4, block_size + 1)}}
        rows[r] = RowCosts(verify, {n: draft_share * verify[128][1] * (1 + token * r * n) for n in (1, block_size)})
    return Costs(rows, block_size)
