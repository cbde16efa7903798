"""What is counted and how it is divided: acceptance, throughput, and the machine they were taken on. Knows numbers, no
models and no loops.

Everything is kept as numerator and denominator, so that parts (rows, files, runs) add up exactly; a ratio is taken
last. A ratio whose denominator is zero is None, never 0: nothing was seen there.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_dspark.utils.hardware import cpu_name
from hf_dspark.version import __version__


@dataclass(frozen=True)
class AcceptanceCounts:
    """What happened to the drafts of one row, or of many rows added up.

    Source: paper sections 3.1 and 4 (accepted length, conditional acceptance). Differs: no.

    Args:
        rounds: verification rounds (draft, verify, accept); the prefill is not one.
        drafted: tokens drafted.
        verified: drafted tokens sent to the target, the sum of l_r.
        accepted: for each block position k, the rounds in which token k was accepted. Length gamma, non-increasing.
        reached: for each block position k, the rounds in which token k was sent to the target and tokens 1..k-1 were
            accepted: the rounds in which token k was really judged. Length gamma, and
            accepted[k] <= reached[k] <= accepted[k-1].
    Raises:
        ValueError: if the counts contradict each other.
    """

    rounds: int
    drafted: int
    verified: int
    accepted: tuple[int, ...]
    reached: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.accepted) != len(self.reached):
            raise ValueError(
                f"accepted and reached must have one count for each block position, got {len(self.accepted)} and {len(self.reached)}"
            )
        before = self.rounds
        for k, (accepted, reached) in enumerate(zip(self.accepted, self.reached, strict=True), start=1):
            if not 0 <= accepted <= reached <= before:
                raise ValueError(
                    f"position {k}: expected 0 <= accepted <= reached <= {before} "
                    f"(the rounds that got past the position before), got accepted {accepted}, reached {reached}"
                )
            before = accepted
        if not sum(self.accepted) <= self.verified <= self.drafted:
            raise ValueError(f"expected accepted <= verified <= drafted, got {sum(self.accepted)}, {self.verified}, {self.drafted}")

    @classmethod
    def sum(cls, parts: Iterable[AcceptanceCounts]) -> AcceptanceCounts:
        """Adds counts up; shorter blocks count as never having reached the later positions."""
        rounds = drafted = verified = 0
        accepted: list[int] = []
        reached: list[int] = []
        for part in parts:
            rounds += part.rounds
            drafted += part.drafted
            verified += part.verified
            _add_to(accepted, part.accepted)
            _add_to(reached, part.reached)
        return cls(rounds, drafted, verified, tuple(accepted), tuple(reached))

    @property
    def tau(self) -> float | None:
        """Accepted length a round INCLUDING the target's own bonus token: (accepted + rounds) / rounds.

        The bonus token is counted in every round, as the paper does, also in a row's last one where end of text or a
        length limit may cut it off.
        """
        return (sum(self.accepted) + self.rounds) / self.rounds if self.rounds else None

    @property
    def conditional_acceptance(self) -> list[float | None]:
        """For each block position k: P(token k accepted | tokens 1..k-1 accepted and token k verified)."""
        return [a / r if r else None for a, r in zip(self.accepted, self.reached, strict=True)]

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted drafted tokens over verified ones."""
        return sum(self.accepted) / self.verified if self.verified else None

    def to_json(self) -> dict[str, Any]:
        """Returns ratios and the counts behind them."""
        return {
            "tau": self.tau,
            "conditional_acceptance": self.conditional_acceptance,
            "acceptance_rate": self.acceptance_rate,
            "acceptance_counts": {
                "rounds": self.rounds,
                "drafted": self.drafted,
                "verified": self.verified,
                "accepted": list(self.accepted),
                "reached": list(self.reached),
            },
        }


@dataclass(frozen=True)
class Throughput:
    """New tokens and the wall-clock seconds they took, prefill included.

    Args:
        tokens: tokens that the caller got: after the prompt, the end-of-text token included, padding not.
        seconds: wall-clock time.
    """

    tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: Throughput) -> Throughput:
        return Throughput(self.tokens + other.tokens, self.seconds + other.seconds)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else None

    def to_json(self) -> dict[str, Any]:
        """Returns the ratio and the counts behind it."""
        return {"tokens": self.tokens, "seconds": self.seconds, "tokens_per_s": self.tokens_per_s}


@dataclass(frozen=True)
class RoundTime:
    """Where the time of speculative decoding went, from the loop's own clock.

    Args:
        prefill_s: the target's pass over the prompts, in seconds.
        draft_s: the drafter's forward passes, sequential stage included, in seconds.
        verify_s: the target's verification passes, in seconds.
        rest_s: everything else: accepting, processors, stopping, bookkeeping, in seconds.
    """

    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    rest_s: float = 0.0

    def __add__(self, other: RoundTime) -> RoundTime:
        return RoundTime(
            self.prefill_s + other.prefill_s,
            self.draft_s + other.draft_s,
            self.verify_s + other.verify_s,
            self.rest_s + other.rest_s,
        )

    @property
    def overhead_share(self) -> float | None:
        """Share of the rounds' time that is neither the drafter's nor the target's forward passes, in [0, 1]."""
        rounds_s = self.draft_s + self.verify_s + self.rest_s
        return self.rest_s / rounds_s if rounds_s else None

    def to_json(self) -> dict[str, Any]:
        """Returns the parts and the share of the overhead."""
        return {**asdict(self), "overhead_share": self.overhead_share}


def speed_ratio(fast: Throughput, plain: Throughput) -> float | None:
    """Returns tokens a second of `fast` over those of `plain`: above 1 is faster."""
    if not fast.tokens_per_s or not plain.tokens_per_s:
        return None
    return fast.tokens_per_s / plain.tokens_per_s


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Returns how many tokens two sequences share from their start."""
    shared = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        shared += 1
    return shared


def machine_record(device: torch.device | str) -> dict[str, Any]:
    """Returns the hardware and software that a measurement on `device` was taken with, ready for JSON."""
    device = torch.device(device)
    record: dict[str, Any] = {
        "device": device.type,
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "platform": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            "hf_dspark": __version__,
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "accelerate")},
        },
    }
    if device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
        record["versions"]["cuda"] = torch.version.cuda
        record["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return record


def _add_to(totals: list[int], counts: Sequence[int]) -> None:
    totals.extend([0] * (len(counts) - len(totals)))
    for index, count in enumerate(counts):
        totals[index] += count


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):  # not a POSIX system
        return None
