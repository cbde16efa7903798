"""Online calibration: predicted against observed survival over a sliding window, and temperatures that are refitted when they drift.

Temperatures change between rounds and from finished rounds only, so the output stays exact.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_dspark.budgets.budget import FinishedRound
from hf_dspark.calibration.temperature_scaling import (
    FEWEST_ROUNDS,
    FORMAT,
    Rounds,
    expected_calibration_error,
    fit_temperatures,
    noise_of_error,
)
from hf_dspark.configuration_dspark import DSparkConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OnlineState:
    """Result of a check of the window."""

    seen: int  # rounds of rows so far
    ece: float  # mean over positions of the window's calibration error, with the temperatures in force until now
    excess: float  # largest calibration error over positions, less what chance would show
    drifted: bool  # whether a position's error is beyond chance
    temperatures: tuple[float, ...]  # in force from now on


# A window of a few thousand rounds cannot tell temperatures apart that are closer than a fifth.
_COARSE_GRID = np.geomspace(0.1, 10, 27).tolist()


class OnlineCalibration:
    """A round callback that monitors a drafter's confidences and refits their temperatures when they drift.

    Give the same object to every call of `hf_dspark.generate(.., online_calibration=..)`: its window goes on from call to call.

    Args:
        window (`int`): latest rounds of rows that count.
        every (`int`): rounds between checks; half a window after a refit.
        tolerance (`float`): calibration error beyond chance that is never a drift.
        alarm (`float`): standard deviations, of the error that chance shows, beyond which it is one.
        adapt (`bool`): refit temperatures on a drift; False only monitors.
    Raises:
        ValueError: for a window too small to fit temperatures to.
    """

    wants_copy_features = False

    def __init__(self, *, window: int = 2000, every: int = 250, tolerance: float = 0.01, alarm: float = 3.0, adapt: bool = True) -> None:
        if window < FEWEST_ROUNDS or every < 1:
            raise ValueError(f"The window holds at least {FEWEST_ROUNDS} rounds, and checks are 1 or more apart; got {window} and {every}.")
        self.window = window
        self.every = every
        self.tolerance = tolerance
        self.alarm = alarm
        self.adapt = adapt
        self.temperatures: list[float] | None = None
        self.history: list[OnlineState] = []
        self.seen = 0
        self._next_check = every
        self._block_size = 0
        self._verification: str | None = None
        self._copying: tuple[Sequence[float] | None, list[list[float]] | None] = (None, None)
        self._rounds: deque[tuple[np.ndarray, int, int]] = deque(maxlen=window)  # logits, judged, accepted of a round

    def check(self, config: DSparkConfig, copying: bool = True, verification: str | None = None) -> None:
        """Attach to a drafter; the first call starts from its temperatures, or from ones where they do not hold.

        Args:
            config (`DSparkConfig`): of the drafter.
            copying (`bool`): whether n-gram copying is on.
            verification (`str`, *optional*): how drawn tokens are verified; None where none are drawn.
        Raises:
            ValueError: after a drafter with another block size or n-gram copying, or another verification.
        """
        copies = (config.copy_weights, config.copy_confidence) if copying else (None, None)
        refused = None
        if None not in (self._verification, verification) and self._verification != verification:
            refused = f"tokens drawn with verification={self._verification!r}, of which others survive than with {verification!r}"
        elif self._block_size and self._copying != copies:
            refused = "drafts with other n-gram copying (copying=, copy_weights), with which confidences mean something else"
        elif self._block_size and self._block_size != config.block_size:
            refused = f"blocks of {self._block_size} tokens; the drafter's have {config.block_size}"
        if refused is not None:
            raise ValueError(f"This OnlineCalibration has seen {refused}. Use one object for each.")
        self._verification = verification or self._verification
        if not self._block_size:
            self._block_size, self._copying = config.block_size, copies
            fitted = config.confidence_temperatures if copying or config.copy_weights is None else None
            self.temperatures = [1.0] * self._block_size if fitted is None else list(fitted)

    def on_round_end(self, finished: FinishedRound) -> None:
        """Take in a finished round, and check the window every `every` rounds."""
        if finished.confidence_logits is None:
            return
        logits = finished.confidence_logits.double().numpy()
        for row, drafted, judged, accepted in zip(logits, finished.drafted, finished.judged, finished.accepted, strict=True):
            if judged:
                self._rounds.append((np.append(row[:drafted], [np.nan] * (self._block_size - drafted)), judged, accepted))
                self.seen += 1
        if self.seen >= self._next_check:
            self._check_window()

    def record(self) -> dict[str, Any]:
        """The calibration record, for `drafter.set_calibration`, which saves it with the drafter.

        Raises:
            RuntimeError: before the first call.
        """
        if self.temperatures is None:
            raise RuntimeError("There are no rounds yet; give this object to hf_dspark.generate(.., online_calibration=..) first.")
        weights, table = self._copying
        return {
            "format": FORMAT,
            "temperatures": list(self.temperatures),
            **({} if weights is None else {"copying": {"weights": weights, "confidence": table}}),
            "data": [{"online": True, "rounds": self.seen, "window": len(self._rounds)}],
            "ece": self.history[-1].ece if self.history and self.history[-1].ece == self.history[-1].ece else None,
        }

    def _check_window(self) -> None:
        rounds, temperatures = Rounds(*map(np.array, zip(*self._rounds, strict=True))), self.temperatures
        assert temperatures is not None
        errors: list[float] = []
        worst, drifted = 0.0, False
        for predicted, observed in rounds.positions(temperatures):
            if len(predicted) < FEWEST_ROUNDS // 4:
                continue
            errors.append(expected_calibration_error(predicted, observed))
            mean, deviation = noise_of_error(predicted)
            excess = errors[-1] - mean
            worst = max(worst, excess)
            drifted |= excess > max(self.tolerance, self.alarm * deviation)
        self._next_check = self.seen + self.every
        if drifted and self.adapt:
            temperatures = self._refit(rounds, temperatures)
            # A fit costs as much as a round or two: the next check waits until half of the window is new, or all of it where temperatures
            # do not cure the drift.
            self._next_check = self.seen + (self.window if self.temperatures == temperatures else max(self.every, self.window // 2))
            self.temperatures = temperatures
        ece = float(np.mean(errors)) if errors else float("nan")
        self.history.append(OnlineState(self.seen, ece, worst, drifted, tuple(temperatures)))

    def _refit(self, rounds: Rounds, old: list[float]) -> list[float]:
        """New temperatures of the leading positions that were judged often enough; those of the others stay."""
        deep = sum(int((rounds.judged > k).sum()) >= FEWEST_ROUNDS for k in range(rounds.block_size))
        if deep == 0:
            return old
        head = Rounds(rounds.logits[:, :deep], np.minimum(rounds.judged, deep), np.minimum(rounds.accepted, deep))
        fitted = fit_temperatures(head, _COARSE_GRID)
        logger.info("Confidence has drifted after %d rounds; temperatures %s -> %s.", self.seen, old[:deep], fitted)
        return [*fitted, *old[deep:]]
