"""Calibration while generating: predicted against observed survival over a sliding window, and temperatures that follow a drift. Knows
finished rounds; knows no model and no loop.

Temperatures change between rounds and from finished rounds only, so the output stays exact.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_dspark.budgets.budget import FinishedRound
from hf_dspark.calibration.temperature_scaling import FEWEST_ROUNDS, FORMAT, Rounds, calibration_errors, fit_temperatures

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OnlineState:
    """What a check of the window found.

    Attributes:
        seen (`int`): rounds of rows seen so far.
        ece (`float`): mean over positions of the window's calibration error, with the temperatures in force until now.
        excess (`float`): largest calibration error over positions, less what chance would show.
        drifted (`bool`): whether a position's error is beyond chance.
        temperatures (`tuple[float, ...]`): in force from now on.
    """

    seen: int
    ece: float
    excess: float
    drifted: bool
    temperatures: tuple[float, ...]


# A window of a few thousand rounds tells no more temperatures apart than these, a fifth from one another.
_COARSE = np.geomspace(0.1, 10, 27).tolist()


class OnlineCalibration:
    """Watches a drafter's confidences while it generates, and refits their temperatures where they drift.

    Give the same object to every call of `hf_dspark.generate(.., online_calibration=..)`: its window goes on from call to call.

    Args:
        window (`int`): rounds of rows that count, the latest.
        every (`int`): rounds between checks; after temperatures were changed, half a window.
        tolerance (`float`): calibration error beyond chance that is never called a drift.
        alarm (`float`): by how many standard deviations, of the error that chance shows, it must exceed chance to count as one.
        adapt (`bool`): change temperatures on a drift; False only watches.
    Raises:
        ValueError: for a window that no temperatures can be fitted to.
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
        self._next_look = every
        self._block_size = 0
        self._verification: str | None = None
        self._copying: tuple[list[float] | None, list[list[float]] | None] = (None, None)
        self._logits = np.empty((0, 0))
        self._judged = np.empty(0, dtype=np.int64)
        self._accepted = np.empty(0, dtype=np.int64)

    def check(self, config: Any, copying: bool = True, verification: str | None = None) -> None:
        """Fit this object to a drafter: its temperatures are where the first call begins, or ones where they do not hold.

        Args:
            config (`DSparkConfig`): of the drafter.
            copying (`bool`): whether it drafts the copies that it has weights for.
            verification (`str`, *optional*): how drawn tokens are judged; None where none are drawn.
        Raises:
            ValueError: if the object has watched a drafter with another block size, one that copies otherwise, or drawn tokens that were
                judged otherwise.
        """
        if None not in (self._verification, verification) and self._verification != verification:
            raise ValueError(
                f"This OnlineCalibration has watched drawn tokens judged by verification={self._verification!r}, of which others survive "
                f"than with {verification!r}. Use one object for each."
            )
        copies = (config.copy_weights, config.copy_confidence) if copying else (None, None)
        if self._block_size and self._copying != copies:
            raise ValueError(
                "This OnlineCalibration has watched drafts with other copies (copying=, copy_weights), beside which confidences mean "
                "something else. Use one object for each."
            )
        if self._block_size and self._block_size != config.block_size:
            raise ValueError(
                f"This OnlineCalibration has watched blocks of {self._block_size} tokens; the drafter's have {config.block_size}. "
                "Use one object for each drafter."
            )
        self._verification = verification or self._verification
        if not self._block_size:
            self._block_size = config.block_size
            self._copying = copies
            self._logits = np.full((self.window, self._block_size), np.nan)
            self._judged = np.zeros(self.window, dtype=np.int64)
            self._accepted = np.zeros(self.window, dtype=np.int64)
            hold = config.confidence_temperatures is not None and (copying or config.copy_weights is None)
            self.temperatures = list(config.confidence_temperatures) if hold else [1.0] * self._block_size

    def on_round_end(self, finished: FinishedRound) -> None:
        """Take in a finished round, and check the window when it is time."""
        if finished.confidence_logits is None:
            return
        logits = finished.confidence_logits.numpy()
        for r, judged in enumerate(finished.judged):
            if judged:
                place = self.seen % self.window
                self._logits[place] = np.nan
                self._logits[place, : finished.drafted[r]] = logits[r, : finished.drafted[r]]
                self._judged[place] = judged
                self._accepted[place] = finished.accepted[r]
                self.seen += 1
        if self.seen >= self._next_look:
            self._look()

    @property
    def rounds(self) -> Rounds:
        """The rounds in the window, in no particular order."""
        held = min(self.seen, self.window)
        return Rounds(self._logits[:held], self._judged[:held], self._accepted[:held])

    def record(self) -> dict[str, Any]:
        """What was found, for `drafter.set_calibration`, which saves it with the drafter.

        Raises:
            RuntimeError: before the first call that watched.
        """
        if self.temperatures is None:
            raise RuntimeError("Nothing was watched yet; give this object to hf_dspark.generate(.., online_calibration=..) first.")
        weights, table = self._copying
        return {
            "format": FORMAT,
            "temperatures": list(self.temperatures),
            **({} if weights is None else {"copying": {"weights": weights, "confidence": table}}),
            "data": [{"online": True, "rounds": self.seen, "window": min(self.seen, self.window)}],
            "ece": self.history[-1].ece if self.history and self.history[-1].ece == self.history[-1].ece else None,
        }

    def _look(self) -> None:
        rounds = self.rounds
        temperatures = self.temperatures
        assert temperatures is not None
        errors: list[float] = []
        worst, drifted = 0.0, False
        for samples, error, mean, deviation in calibration_errors(rounds, temperatures):
            if samples < FEWEST_ROUNDS // 4:
                continue
            errors.append(error)
            excess = error - mean
            worst = max(worst, excess)
            drifted |= excess > max(self.tolerance, self.alarm * deviation)
        self._next_look = self.seen + self.every
        if drifted and self.adapt:
            temperatures = self._refit(rounds, temperatures)
            # Fitting costs as much as a round or two. What was just fitted is judged again when half of the window is new, and where
            # temperatures do not cure it nothing changes before all of it is.
            self._next_look = self.seen + (self.window if self.temperatures == temperatures else max(self.every, self.window // 2))
            self.temperatures = temperatures
        ece = float(np.mean(errors)) if errors else float("nan")
        self.history.append(OnlineState(self.seen, ece, worst, drifted, tuple(temperatures)))

    def _refit(self, rounds: Rounds, old: Sequence[float]) -> list[float]:
        """Temperatures of the leading positions that were judged often enough; the others keep theirs."""
        deep = 0
        while deep < rounds.block_size and (rounds.judged > deep).sum() >= FEWEST_ROUNDS:
            deep += 1
        if deep == 0:
            return list(old)
        known = rounds.judged > 0
        head = Rounds(rounds.logits[known][:, :deep], np.minimum(rounds.judged[known], deep), np.minimum(rounds.accepted[known], deep))
        fitted = fit_temperatures(head, _COARSE)
        logger.info("Confidence has drifted after %d rounds; temperatures %s -> %s.", self.seen, list(old[:deep]), fitted)
        return [*fitted, *old[deep:]]
