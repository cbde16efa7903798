"""Acceptance, throughput and where the time went, as numerators and denominators so that rows, files and runs add up exactly.

A ratio is taken last, and is None where its denominator is zero.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any

import torch

from hf_dspark.decoding.statistics import DecodingStats, RowStats
from hf_dspark.utils.hardware import cpu_name
from hf_dspark.version import __version__


@dataclass(frozen=True)
class AcceptanceCounts:
    """What happened to the drafts of one row, or of many rows added up.

    Source: paper sections 3.1 and 4 (accepted length, conditional acceptance). Differs: no.
    """

    rounds: int  # verification rounds (draft, verify, accept); the prefill is not one
    drafted: int
    verified: int  # drafted tokens sent to the target, the sum of l_r
    accepted: tuple[int, ...]  # for each block position k, the rounds in which token k was accepted
    reached: tuple[int, ...]  # for each block position k, the rounds in which token k was verified and tokens 1..k-1 were accepted

    @classmethod
    def of(cls, rows: Iterable[RowStats]) -> AcceptanceCounts:
        """Counts of some rows of generations, added up; shorter blocks never reach the later positions."""
        rows = list(rows)
        rounds, drafted, verified = (sum(getattr(row, name) for row in rows) for name in ("rounds", "drafted", "verified"))
        accepted, reached = (
            tuple(map(sum, zip_longest(*(getattr(row, name) for row in rows), fillvalue=0))) for name in ("accepted_at", "reached_at")
        )
        return cls(rounds, drafted, verified, accepted, reached)

    @property
    def tau(self) -> float | None:
        """Accepted length a round INCLUDING the target's own bonus token, also where the end of a row cuts that token off."""
        return (sum(self.accepted) + self.rounds) / self.rounds if self.rounds else None

    @property
    def conditional_acceptance(self) -> list[float | None]:
        """For each block position k: P(token k accepted | tokens 1..k-1 accepted and token k verified)."""
        return [a / r if r else None for a, r in zip(self.accepted, self.reached, strict=True)]

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted drafted tokens over verified ones."""
        return sum(self.accepted) / self.verified if self.verified else None


@dataclass(frozen=True)
class Throughput:
    """New tokens (the end-of-text token included, padding not) and the wall-clock seconds they took, prefill included."""

    tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: Throughput) -> Throughput:
        return Throughput(self.tokens + other.tokens, self.seconds + other.seconds)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else None

    def over(self, plain: Throughput) -> float | None:
        """Tokens a second over those of `plain`: above 1 is faster."""
        return self.tokens_per_s / plain.tokens_per_s if self.tokens_per_s and plain.tokens_per_s else None

    def to_json(self) -> dict[str, Any]:
        """Returns the counts and their ratio."""
        return {**asdict(self), "tokens_per_s": self.tokens_per_s}


def round_times(stats: Iterable[DecodingStats]) -> dict[str, float | None]:
    """Where the time of generations went, in seconds, by the loop's own clock.

    Returns:
        `dict`: the target's passes over prompts, the drafter's passes with its sequential stage, the target's verification passes, and all
        else; `overhead_share`: of the time after the prompts, what is in neither model's passes, in [0, 1].
    """
    columns = [(one.t_prefill_s, one.t_draft_s, one.t_verify_s, one.t_rest_s) for one in stats]
    prefill, draft, verify, rest = map(sum, zip(*columns, strict=True)) if columns else [0.0] * 4
    rounds = draft + verify + rest
    return {"prefill_s": prefill, "draft_s": draft, "verify_s": verify, "rest_s": rest, "overhead_share": rest / rounds if rounds else None}


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Returns how many tokens two sequences share from their start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def machine_record(device: torch.device | str) -> dict[str, Any]:
    """The hardware and software that a measurement on `device` was taken with, ready for JSON."""
    device = torch.device(device)
    record: dict[str, Any] = {
        "device": device.type,
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1) if hasattr(os, "sysconf") else None,
        "platform": platform.platform(),
        "commit": _commit(),
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


def _commit() -> str | None:
    """The commit of the checkout that this package runs from; None for an installed one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # An installed package may lie in somebody else's repository, which does not track it.
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)
        return subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
