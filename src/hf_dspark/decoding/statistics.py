"""What a generation did and where its time went, row by row.

tau counts the target's own bonus token, as the paper does: tokens a round, at least 1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

import torch


def _at_least(counts: Sequence[int]) -> list[int]:
    """From how often each length came up, 0..gamma, how often it was at least 1, 2, .. gamma."""
    return list(accumulate(reversed(counts)))[-2::-1]


@dataclass
class RowStats:
    """One row's counts.

    Args:
        block_size (`int`): gamma.

    Attributes:
        rounds (`int`): draft-and-verify rounds.
        drafted (`int`): tokens drafted.
        verified (`int`): drafted tokens sent to verification.
        accepted (`int`): drafted tokens that stand.
        generated (`int`): tokens generated, the first one (from the prompt's own pass) included.
    """

    block_size: int
    rounds: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    generated: int = 0

    def __post_init__(self) -> None:
        self._verified, self._reached, self._accepted = ([0] * (self.block_size + 1) for _ in range(3))

    @property
    def verified_at(self) -> list[int]:
        """For each block position, the rounds in which it was verified."""
        return _at_least(self._verified)

    @property
    def reached_at(self) -> list[int]:
        """For each block position, the rounds in which it was judged: verified, with all positions before it standing."""
        return _at_least(self._reached)

    @property
    def accepted_at(self) -> list[int]:
        """For each block position, the rounds in which it and all positions before it stood."""
        return _at_least(self._accepted)

    @property
    def tau(self) -> float:
        """Tokens a round INCLUDING the target's bonus token; NaN before the first round."""
        return (self.accepted + self.rounds) / self.rounds if self.rounds else float("nan")

    def count_round(self, drafted: int, verified: int, accepted: int, kept: int) -> None:
        """Count one round.

        Args:
            drafted, verified, accepted (`int`): drafted tokens, those sent to the target, those that it let stand.
            kept (`int`): tokens that remained, the target's own included; fewer than accepted + 1 where the row ended in the block.
                What lies behind its end was neither reached nor accepted.
        """
        self._verified[verified] += 1
        self._reached[min(verified, accepted + 1, kept)] += 1
        accepted = min(accepted, kept)
        self._accepted[accepted] += 1
        self.rounds += 1
        self.drafted += drafted
        self.verified += verified
        self.accepted += accepted


@dataclass
class DecodingStats:
    """One call of generate. Times are wall-clock seconds; on an accelerator they are its own, measured by events.

    Attributes:
        block_size (`int`): gamma.
        by_request (`dict[int, RowStats]`): of each request that was live.
        rounds (`int`): rounds of the loop, each over all live rows.
        t_prefill_s, t_draft_s, t_verify_s (`float`): in prompt passes; in drafting (backbone, sequential head with its draws and
            processors, confidence, context); in the target's verification passes.
        t_total_s (`float`): the whole call.
    """

    block_size: int
    by_request: dict[int, RowStats] = field(default_factory=dict)
    rounds: int = 0
    t_prefill_s: float = 0.0
    t_draft_s: float = 0.0
    t_verify_s: float = 0.0
    t_total_s: float = 0.0

    @property
    def rows(self) -> list[RowStats]:
        """Counts of each row, by request number: in the order of the caller's batch."""
        return [self.by_request[request] for request in sorted(self.by_request)]

    @property
    def t_rest_s(self) -> float:
        """Time outside all forward passes: acceptance, processors, stopping, bookkeeping."""
        return max(self.t_total_s - self.t_prefill_s - self.t_draft_s - self.t_verify_s, 0.0)

    @property
    def tau(self) -> float:
        """Tokens a row and round INCLUDING the target's bonus token, over all rows."""
        rounds = sum(r.rounds for r in self.rows)
        return sum(r.accepted + r.rounds for r in self.rows) / rounds if rounds else float("nan")

    @property
    def overhead(self) -> float:
        """Share of the rounds' time (prompt passes left out) that is spent outside the target's and drafter's forward passes."""
        rounds_s = self.t_total_s - self.t_prefill_s
        return self.t_rest_s / rounds_s if rounds_s > 0 else 0.0

    def of(self, request: int) -> RowStats:
        """Counts of a request; new ones where it has none."""
        return self.by_request.setdefault(request, RowStats(self.block_size))

    def count_round(
        self, requests: Sequence[int], drafted: Sequence[int], verified: Sequence[int], accepted: Sequence[int], kept: Sequence[int]
    ) -> None:
        """Count one round of all live rows; see `RowStats.count_round`."""
        self.rounds += 1
        for request, *counts in zip(requests, drafted, verified, accepted, kept, strict=True):
            self.of(request).count_round(*counts)

    def set_times(self, seconds: Mapping[str, float]) -> None:
        """Take in what a `Stopwatch` has read."""
        for name, value in seconds.items():
            setattr(self, f"t_{name}_s", value)


class Stopwatch:
    """Adds up time by name: the device's own events on CUDA, read once at the end; elsewhere the host's clock.

    Args:
        device (`torch.device`): where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._begin = time.perf_counter()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(torch.cuda.current_stream(self._device))
            yield
            end.record(torch.cuda.current_stream(self._device))
            self._events.append((name, begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def so_far(self, name: str) -> float | None:
        """Seconds under a name, where they can be told without waiting for the device."""
        return self._seconds.get(name, 0.0) if self._device.type == "cpu" else None

    def read(self) -> dict[str, float]:
        """Seconds by name, and `total` since this stopwatch was made."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
            for name, begin, end in self._events:
                self._seconds[name] = self._seconds.get(name, 0.0) + begin.elapsed_time(end) / 1e3
            self._events.clear()
        return {**self._seconds, "total": time.perf_counter() - self._begin}
