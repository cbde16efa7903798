"""What a round costs: measured seconds and their interpolation, or a prior where nothing was measured.

Source: SPS(B) of the paper's Algorithm 1, as seconds a pass, and with the draft beside it: a round of R rows costs
draft(R, n) + verify(R, B), B tokens in the pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

# Of `prior_costs`. On a CPU each token adds this share of a pass of one token a row. In the measured profiles of a model of 135M, from one
# token a row to eight, at 1, 2, 4, 8, 16 rows: 0.022, 0.029, 0.025, 0.019, 0.013 in bfloat16, and 0.111, 0.058, 0.023, 0.016, 0.019 in
# float32 (bench.json and bench_fp32.json of model_cards/smollm2-dspark/results). Rounds correct it; a profile knows better from the start.
CPU_TOKEN_SHARE = 0.025
# On an accelerator a pass is bound by memory up to about the tokens at which computing takes as long as reading the weights: FLOP/s over
# bytes/s, in bfloat16 150 on an A100 and 300 on an H100.
ACCELERATOR_FLAT_TOKENS = 200

_CONTEXT_STEP = 64  # contexts this close share one cached table


@dataclass(frozen=True)
class RowCosts:
    """Measured seconds of rounds with a fixed number of rows R; what is not the draft (pass, acceptance, bookkeeping) counts as the pass.

    A pass costs by its tokens and by its width: linear layers see the sum of the rows, attention rows as wide as the longest.

    Args:
        verify_s (`dict[int, dict[int, float]]`): rows of equal length, by context tokens a row, then by tokens a row in the pass (anchor
            included). The first context has the whole curve; of the others the least number of tokens counts.
        draft_s (`dict[int, float]`): drafts for all rows, by tokens drafted a row.
        long_s (`dict[int, dict[int, float]]`): one row with n drafted tokens beside R - 1 with none, by context, then by n.
        few_s (`dict[int, float]`): n < R rows with one drafted token beside R - n with none, by n, at the first context: where costs rise
            by steps these do not lie on a straight line.
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

    def pass_s(self, rows: int, block_size: int, context_tokens: float, drafted: np.ndarray) -> tuple[np.ndarray, float]:
        """What tokens cost, and what width costs.

        Args:
            rows (`int`): R, that this table was measured with.
            block_size (`int`): gamma.
            context_tokens (`float`): tokens that rows hold.
            drafted (`numpy.ndarray` of shape `(n,)`): drafted tokens a row, 0..gamma.
        Returns:
            `numpy.ndarray` of shape `(n,)`: seconds without width, non-decreasing.
            `float`: seconds for each drafted token of the longest row.
        """
        first, *others = sorted(self.verify_s)
        column = self.verify_s[first]
        even = interpolate(np.arange(1, block_size + 2), sorted(column), _envelope([column[n] for n in sorted(column)]))
        bases = {first: float(even[0])} | {context: self.verify_s[context][min(self.verify_s[context])] for context in others}
        widths = {c: _width_s(rows, self.long_s[c], bases[c], even[1] - even[0]) for c in bases if self.long_s.get(c)}
        narrow = {n / rows: seconds - widths.get(first, 0.0) for n, seconds in self.few_s.items()}
        narrow |= {n: seconds - n * widths.get(first, 0.0) for n, seconds in enumerate(even)}
        curve = _envelope([narrow[n] for n in sorted(narrow)])
        base = interpolate(context_tokens, list(bases), list(bases.values()))
        width = float(interpolate(context_tokens, list(widths), list(widths.values()))) if widths else 0.0
        return np.interp(drafted, sorted(narrow), curve) - curve[0] + base, max(width, 0.0)

    def to_json(self) -> dict[str, Any]:
        """The table with its numbers as they were measured."""

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
        """Read what `to_json` wrote.

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


def _width_s(rows: int, long_s: Mapping[int, float], base: float, even_s: float) -> float:
    """Seconds of width w for each drafted token of the longest row; a token costs t.

    From n (t + w) = long_s[n] - base, by least squares over n, and R t + w = `even_s`, what one drafted token in every row adds.
    """
    lengths = np.array(sorted(long_s))
    both = float(lengths @ (np.array([long_s[n] for n in lengths]) - base) / (lengths @ lengths))
    return max(both - max(even_s - both, 0.0) / max(rows - 1, 1), 0.0)


@dataclass
class PassCosts:
    """What rounds with a given number of rows and context cost without their draft.

    Args:
        verify_s (`numpy.ndarray` of shape `(1 + R * gamma,)`): seconds by drafted tokens in the pass, non-decreasing, without width.
        wide_s (`numpy.ndarray` of shape `(1 + gamma,)`): seconds to add, by drafted tokens of the longest row.
    """

    verify_s: np.ndarray
    wide_s: np.ndarray

    @cached_property
    def convex_s(self) -> np.ndarray:
        """The greatest convex curve nowhere above `verify_s` from one drafted token on, and at none the same line: for Algorithm 1.

        Costs rise by steps, and a search that stops at the first token that does not pay would stop before each. The first token, which may
        cost as much as many, counts like those behind it: whether to draft at all was settled before, by what passes really cost.
        """
        curve, corners = self.verify_s, [1]
        for j in range(2, len(curve)):
            while len(corners) > 1 and (curve[j] - curve[corners[-2]]) * (corners[-1] - corners[-2]) <= (
                curve[corners[-1]] - curve[corners[-2]]
            ) * (j - corners[-2]):
                corners.pop()
            corners.append(j)
        if len(curve) < 3:
            return curve
        convex = np.interp(np.arange(len(curve)), corners, curve[corners])
        convex[0] = 2 * convex[1] - convex[2]
        return convex

    def scaled(self, factor: float) -> PassCosts:
        """The same with drafted tokens that cost `factor` times as much."""
        base = self.verify_s[0]
        scaled = PassCosts(base + factor * (self.verify_s - base), factor * self.wide_s)
        scaled.convex_s = base + factor * (self.convex_s - base)  # spares the search
        return scaled


@dataclass
class Costs:
    """Seconds of rounds for any number of rows: measured at some, by straight lines between and beyond them.

    Args:
        rows (`dict[int, RowCosts]`): by number of rows.
        block_size (`int`): gamma, the longest block that was measured.
    """

    rows: Mapping[int, RowCosts]
    block_size: int
    _passes: dict[tuple[int, int], PassCosts] = field(default_factory=dict, repr=False)
    _drafts: dict[tuple[int, int], float] = field(default_factory=dict, repr=False)

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
        if key not in self._passes:
            gamma, known, context = self.block_size, sorted(self.rows), (key[1] + 0.5) * _CONTEXT_STEP
            drafted = np.arange(rows * gamma + 1) / rows
            curves, widths = zip(*(self.rows[r].pass_s(r, gamma, context, drafted) for r in known), strict=True)
            # More rows never cost less than fewer, nor more tokens.
            curve = np.maximum.accumulate(interpolate(rows, known, np.maximum.accumulate(np.stack(curves))))
            width = max(float(interpolate(rows, known, widths)), 0.0)
            self._passes[key] = PassCosts(curve, width * np.arange(gamma + 1))
        return self._passes[key]

    def draft_s(self, rows: int, length: int) -> float:
        """Seconds of drafting `length` tokens for each of `rows` rows; 0 for nothing."""
        if rows == 0 or length == 0:
            return 0.0
        key = (rows, length)
        if key not in self._drafts:
            columns = [self.rows[r].draft_s for r in sorted(self.rows)]
            times = [interpolate(length, sorted(column), [column[n] for n in sorted(column)]) for column in columns]
            self._drafts[key] = max(float(interpolate(rows, sorted(self.rows), times)), 0.0)
        return self._drafts[key]


def prior_costs(block_size: int, draft_share: float, device_type: str) -> Costs:
    """Costs guessed from sizes, for a target and drafter that were not measured; relative to a pass of one token.

    Args:
        block_size (`int`): gamma.
        draft_share (`float`): weights of the drafter over those of the target; a draft costs this share of a pass of as many tokens.
        device_type (`str`): `"cpu"`, or an accelerator's, such as `"cuda"`.
    """

    def pass_s(tokens: int) -> float:
        if device_type == "cpu":
            return 1 + CPU_TOKEN_SHARE * (tokens - 1)
        return float(np.hypot(1.0, tokens / ACCELERATOR_FLAT_TOKENS))  # flat, then linear

    lengths = range(1, block_size + 2)
    return Costs(
        {
            r: RowCosts({0: {n: pass_s(r * n) for n in lengths}}, {n: max(draft_share, 1e-9) * pass_s(r * n) for n in lengths})
            for r in (1, 2, 4, 8, 16, 32, 64, 128)
        },
        block_size,
    )


def _envelope(seconds: ArrayLike) -> np.ndarray:
    """Noise only adds time, so nothing costs more than what is larger: the least of each time and those behind it."""
    return np.minimum.accumulate(np.asarray(seconds, dtype=np.float64)[::-1])[::-1]


def interpolate(at: ArrayLike, known: ArrayLike, values: ArrayLike) -> np.ndarray:
    """Straight lines between known points along the first dimension of `values`; flat before the first, the last line goes on behind.

    Args:
        at (`ArrayLike` of shape `(*s,)`): where.
        known (`ArrayLike` of shape `(n,)`): ascending.
        values (`ArrayLike` of shape `(n, *v)`): at these.
    Returns:
        `numpy.ndarray` of shape `(*s, *v)`.
    """
    at, known, values = np.asarray(at), np.asarray(known), np.asarray(values)
    if len(known) == 1:
        return np.broadcast_to(values[0], at.shape + values.shape[1:])
    right = np.clip(np.searchsorted(known, at), 1, len(known) - 1)
    share = np.maximum((at - known[right - 1]) / (known[right] - known[right - 1]), 0.0)
    share = np.reshape(share, at.shape + (1,) * (values.ndim - 1))
    return (1 - share) * values[right - 1] + share * values[right]
