"""What drafting is expected to give, from the survivals that finished rounds have shown. Pure numbers; knows no budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hf_dspark.budgets.admission import early_stop_s, from_none, longest_row
from hf_dspark.budgets.cost_model import PassCosts

# Recent blocks of a row, and of all rows, whose survivals stand for those to come.
_ROW_SAMPLES = 8
_KNOWN_BLOCKS = 4  # of its own after which it is said of a row whether it pays
_POOL_SAMPLES = 64
# Rounds after which what was left undrafted is tried again, at first.
FIRST_REST = 4
# Costs that rise steeply at first and then less so: Algorithm 1 may look at them from no tokens on, or from so many tokens a row. One row
# alone, whose pass of two tokens can cost half as much again as that of one, and as much as that of eight, needs the last.
_STARTS = (0.0, 0.5, 1.0)


@dataclass
class _Row:
    """What finished rounds say of one row."""

    survivals: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=_ROW_SAMPLES))
    idle: int = 0
    rest: int = FIRST_REST


class Memory:
    """Survivals of recent blocks, row by row and of all rows; later positions than were drafted are continued at the usual rate."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.rows: dict[int, _Row] = {}
        self.pool: deque[np.ndarray] = deque(maxlen=_POOL_SAMPLES)
        self._mean = np.ones(block_size)

    def keep(self, requests: Sequence[int]) -> None:
        """Forget rows that are gone."""
        for gone in self.rows.keys() - set(requests):
            del self.rows[gone]
        for request in requests:
            self.rows.setdefault(request, _Row())

    def continued(self, survival: np.ndarray) -> np.ndarray:
        """The survivals of whole blocks, `(R, gamma)`, of which the first n were seen, `(R, n)`."""
        known = survival.shape[1]
        if known == self.block_size:
            return survival
        later = self._mean[known:] / max(self._mean[known - 1], 1e-9)
        return np.concatenate((survival, survival[:, -1:] * later), axis=1)

    def add(self, requests: Sequence[int], survival: np.ndarray) -> None:
        """Take in a round's blocks, `(R, n)`."""
        whole = self.continued(survival)
        for request, block in zip(requests, whole, strict=True):
            self.rows.setdefault(request, _Row()).survivals.append(block)
        if survival.shape[1] == self.block_size:
            kept = 0.95 ** len(whole) if self.pool else 0.0
            self._mean = kept * self._mean + (1 - kept) * whole.mean(axis=0)
        self.pool.extend(whole)

    def known(self, requests: Sequence[int]) -> np.ndarray:
        """Which rows have shown enough blocks of their own."""
        return np.array([len(self.rows[request].survivals) >= _KNOWN_BLOCKS for request in requests])

    def samples(self, requests: Sequence[int]) -> np.ndarray | None:
        """Plausible survivals of the coming round, `(W, R, gamma)`: a row's own, else other rows', nothing before any was seen."""
        if not self.pool:
            return None
        out = np.empty((_ROW_SAMPLES, len(requests), self.block_size))
        for r, request in enumerate(requests):
            own = self.rows[request].survivals or self.pool
            for w in range(_ROW_SAMPLES):
                out[w, r] = own[-1 - (w + (0 if own is not self.pool else _ROW_SAMPLES * r)) % len(own)]  # the newest
        return out


@dataclass(frozen=True)
class Outlook:
    """What drafting `length` tokens for some rows is expected to give."""

    length: int
    rate: float
    hopeful: np.ndarray  # for each row: whether any of its tokens would be verified
    net_s: np.ndarray  # for each row: time that drafting for it saves, in seconds a round
    start: float  # drafted tokens a row from which the costs that Algorithm 1 reckons with are close to the real ones


def outlook(
    samples: np.ndarray,
    limits: np.ndarray,
    passes: PassCosts,
    draft_s: Callable[[int, int], float],
    lengths: Sequence[int],
    *,
    others: int = 0,
    room: int | None = None,
    early_stop: bool = False,
) -> Outlook:
    """The best of some draft lengths, over sampled survivals, with each of these rows drafted for.

    Args:
        samples (`numpy.ndarray` of shape `(W, R, gamma)`): plausible survivals.
        limits (`numpy.ndarray` of shape `(R,)`): most tokens of each row.
        passes (`PassCosts`): of passes of all live rows.
        draft_s (`Callable`): seconds of drafting for so many rows so many tokens.
        lengths (`Sequence[int]`): draft lengths to choose from.
        others (`int`): live rows that are not drafted for; their anchors go into the pass, and each gives a token.
        room (`int`, *optional*): drafted tokens that the pass can take.
        early_stop (`bool`): tokens will be admitted by Algorithm 1, which stops where the rate first does not grow.
    """
    width, rows, gamma = samples.shape
    positions = np.repeat(np.arange(gamma), rows)
    flat = np.where(np.arange(gamma)[:, None] < limits, samples.transpose(0, 2, 1), 0.0).reshape(width, -1)
    order = np.argsort(-flat, axis=1, kind="stable")
    gains, places = np.take_along_axis(flat, order, axis=1), positions[order]
    # Every length at once, along a first dimension; where the search stops early, from every place that its costs may begin to be convex.
    starts = {int(rows * start): start for start in _STARTS} if early_stop else {0: 0.0}
    how = [(length, start) for length in lengths for start in starts.values()]
    drafts = np.array([draft_s(rows, length) for length, _ in how])
    inside = places < np.array([length for length, _ in how])[:, None, None]
    counts = from_none(inside).astype(np.int64)
    tokens = rows + others + from_none(gains * inside)
    seconds = passes.verify_s[counts] + passes.wide_s[longest_row(np.where(inside, places, -1))] + drafts[:, None, None]
    if early_stop:
        believed = np.stack([early_stop_s(passes, rows, length, start)[count] for (length, start), count in zip(how, counts, strict=True)])
        theta = tokens / (believed + drafts[:, None, None])
        worse = (theta[..., 1:] <= theta[..., :-1]) & inside
        cut = np.where(worse.any(axis=-1), worse.argmax(axis=-1), worse.shape[-1])
    else:
        cut = (tokens / seconds).argmax(axis=-1)
    if room is not None:
        cut = np.minimum(cut, (counts <= room).sum(axis=-1) - 1)
    at = cut[..., None]
    values = np.take_along_axis(tokens, at, axis=-1).sum(axis=(1, 2)) / np.take_along_axis(seconds, at, axis=-1).sum(axis=(1, 2))
    best = int(values.argmax())
    admitted = (np.arange(gains.shape[1]) < cut[best, :, None]) & inside[best]
    by_row = order[admitted] % rows
    gained = np.bincount(by_row, weights=gains[admitted], minlength=rows) / width
    verified = np.bincount(by_row, minlength=rows) / width
    mean, verify_s = verified.sum(), passes.verify_s
    token_s = (np.interp(mean, np.arange(len(verify_s)), verify_s) - verify_s[0]) / mean if mean else 0.0
    length, start = how[best]
    row_s = drafts[best] - draft_s(rows - 1, length)
    return Outlook(length, float(values[best]), verified > 0, gained / values[best] - verified * token_s - max(row_s, 0.0), start)
