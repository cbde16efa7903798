"""What drafting is expected to give, by the survivals that finished rounds have shown, and when to probe what is not drafted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hf_dspark.budgets.admission import admission_order, from_none, longest_row
from hf_dspark.budgets.cost_model import PassCosts

# Latest blocks of a row whose survivals stand for those to come: fewer are noise, and survival drifts within some ten rounds. In
# simulations 4 and 16 are within 0.7% of 8, either way.
ROW_BLOCKS = 8
# Latest blocks of all rows, which stand for a row's own as long as it has none. With 8 a single hopeless request decides for the next one.
POOL_BLOCKS = 64
# Rounds between two plans, and before the first probe. Re-planning every round costs four times the host's time and gains 0.1-0.5%,
# every 8 rounds loses 0.2-0.5%.
PLAN_ROUNDS = 4
# What probes may cost, as a share of the throughput: what is expected to lose 10% is probed every 20 rounds. In simulations 0.02 loses
# up to 7% where drafts never pay, and 0.003 or 0.01 are within 1.5%.
PROBE_LOSS = 0.005


@dataclass
class Backoff:
    """When to probe again: after PLAN_ROUNDS rounds, then after twice as many each time, as long as probes cost less than PROBE_LOSS."""

    wait: int = PLAN_ROUNDS
    left: int = PLAN_ROUNDS

    def due(self, loss: float) -> bool:
        """Count a round; whether it is to probe, which is expected to lose this share of the round."""
        self.left -= 1
        if self.left > 0:
            return False
        self.wait = self.left = max(min(2 * self.wait, int(loss / PROBE_LOSS)), 1)
        return True


@dataclass
class RowHistory:
    """What finished rounds say of one row: its latest blocks' survivals, each `(gamma,)`, `own` of which it has shown itself."""

    blocks: deque[np.ndarray]
    own: int = 0
    backoff: Backoff = field(default_factory=Backoff)


class History:
    """Survivals of recent blocks, row by row."""

    def __init__(self) -> None:
        self.rows: dict[int, RowHistory] = {}
        self.pool: deque[np.ndarray] = deque(maxlen=POOL_BLOCKS)
        self._next = 0

    def sync(self, requests: Sequence[int]) -> None:
        """Forget rows that are gone; new ones take blocks of the pool, each other ones."""
        for gone in self.rows.keys() - set(requests):
            del self.rows[gone]
        for request in requests:
            if request not in self.rows and self.pool:
                blocks = [self.pool[(self._next - w) % len(self.pool)] for w in range(ROW_BLOCKS)]
                self.rows[request] = RowHistory(deque(blocks, maxlen=ROW_BLOCKS))
                self._next += ROW_BLOCKS

    def add(self, requests: Sequence[int], survival: np.ndarray, block_size: int) -> None:
        """Take in a round's blocks, `(R, n)`; positions up to gamma that were not drafted go on as the block did until there."""
        missing = block_size - survival.shape[1]
        if missing:
            last = survival[:, -1:]
            survival = np.concatenate((survival, last * (last ** (1 / survival.shape[1])) ** np.arange(1, missing + 1)), axis=1)
        for request, block in zip(requests, survival, strict=True):
            row = self.rows.setdefault(request, RowHistory(deque([block] * ROW_BLOCKS, maxlen=ROW_BLOCKS)))
            row.blocks.append(block)
            row.own += 1
        self.pool.extend(survival)

    def samples(self, requests: Sequence[int]) -> np.ndarray:
        """Plausible survivals of the coming round, `(W, R, gamma)`."""
        return np.array([self.rows[request].blocks for request in requests]).swapaxes(0, 1)


@dataclass(frozen=True)
class Forecast:
    """What drafting `length` tokens is expected to give: tokens a second, and for each row the seconds that drafting for it saves."""

    length: int
    rate: float
    net_s: np.ndarray


def forecast(
    samples: np.ndarray,
    limits: np.ndarray,
    passes: PassCosts,
    draft_s: Callable[[int, int], float],
    *,
    others: int = 0,
    room: int,
    early_stop: bool,
) -> Forecast:
    """The best draft length for these rows, over sampled survivals.

    Args:
        samples (`numpy.ndarray` of shape `(W, R, n)`): plausible survivals; n is the longest draft to consider.
        limits (`numpy.ndarray` of shape `(R,)`): most tokens of each row.
        passes (`PassCosts`): of passes of all live rows.
        draft_s (`Callable`): seconds of drafting for so many rows so many tokens.
        others (`int`): live rows that are not drafted for; their anchors go into the pass, and each gives a token.
        room (`int`): drafted tokens that the pass can take.
        early_stop (`bool`): tokens will be admitted by Algorithm 1; by an unconstrained search otherwise.
    """
    width, rows, longest = samples.shape
    order, gains = admission_order(samples, limits)
    places = order // rows
    # Every length at once, along a first dimension; tokens behind a length neither count nor give.
    lengths = np.arange(1, longest + 1)
    drafts = np.array([draft_s(rows, int(length)) for length in lengths])[:, None, None]
    inside = places < np.minimum(limits[order % rows], lengths[:, None, None])
    counts = from_none(inside).astype(np.int64)
    tokens = rows + others + from_none(gains * inside)
    seconds = passes.verify_s[counts] + passes.wide_s[longest_row(np.where(inside, places, -1))] + drafts
    allowed = counts <= room
    if early_stop:
        believed = tokens / (passes.convex_s[counts] + passes.wide_s[lengths][:, None, None] + drafts)
        stops = (believed[..., 1:] <= believed[..., :-1]) & inside
        allowed[..., 1:] &= ~np.logical_or.accumulate(stops, axis=-1)
        cut = allowed.sum(axis=-1) - 1
    else:
        cut = np.where(allowed, tokens / seconds, 0.0).argmax(axis=-1)
    at = cut[..., None]
    rates = np.take_along_axis(tokens, at, axis=-1).sum(axis=(1, 2)) / np.take_along_axis(seconds, at, axis=-1).sum(axis=(1, 2))
    best = int(rates.argmax())
    rate, length = float(rates[best]), int(lengths[best])
    admitted = (np.arange(gains.shape[1]) < cut[best, :, None]) & inside[best]
    gained = np.bincount(order[admitted] % rows, weights=gains[admitted], minlength=rows) / width
    verified = np.bincount(order[admitted] % rows, minlength=rows) / width
    mean = float(verified.sum())
    token_s = (np.interp(mean, np.arange(len(passes.verify_s)), passes.verify_s) - passes.verify_s[0]) / mean if mean else 0.0
    row_s = max(draft_s(rows, length) - draft_s(rows - 1, length), 0.0)
    return Forecast(length, rate, gained / rate - verified * token_s - row_s)
