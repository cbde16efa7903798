"""Sequential Temperature Scaling of confidences, and measures of their error.

Of each round of a row the confidence logits of the drafted tokens are recorded, how many were judged, and how many accepted. The outcome at
position k is known where k or more were judged; the prefix survived where k or more were accepted.

Source: paper section 3.2.1. Differs: of temperatures whose error is within the noise of the least, the one with the lowest Brier score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

BINS = 10
FORMAT = 1  # of calibration.json
# Rounds below which temperatures would be fitted to noise.
FEWEST_ROUNDS = 400
_GRID = np.exp(np.linspace(np.log(0.1), np.log(10.0), 121))


@dataclass(frozen=True)
class Rounds:
    """Confidences and their outcomes, a round of a row each.

    Attributes:
        logits (`numpy.ndarray` of shape `(N, gamma)`): of the confidence head, before calibration; NaN beyond what was drafted.
        judged (`numpy.ndarray` of shape `(N,)`): verified tokens whose outcome is known.
        accepted (`numpy.ndarray` of shape `(N,)`): accepted tokens.
    """

    logits: np.ndarray
    judged: np.ndarray
    accepted: np.ndarray

    def __len__(self) -> int:
        return len(self.judged)

    @property
    def block_size(self) -> int:
        """gamma."""
        return self.logits.shape[1]

    def part(self, rows: np.ndarray) -> Rounds:
        """Some of the rounds, by index or mask."""
        return Rounds(self.logits[rows], self.judged[rows], self.accepted[rows])

    @classmethod
    def join(cls, parts: Sequence[Rounds]) -> Rounds:
        """Several records as one."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("logits", "judged", "accepted")))

    def survival(self, temperatures: Sequence[float] | None) -> np.ndarray:
        """a_k = prod_{i<=k} sigmoid(logit_i / T_i), `(N, gamma)`."""
        scale = np.ones(self.block_size) if temperatures is None else np.asarray(temperatures, dtype=np.float64)
        if scale.shape != (self.block_size,):
            raise ValueError(f"There are {scale.size} temperatures for blocks of {self.block_size} tokens; give one for each position.")
        return np.cumprod(_sigmoid(self.logits / scale), axis=1)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def expected_calibration_error(predicted: np.ndarray, observed: np.ndarray, bins: int = BINS) -> float:
    """ECE: mean gap between predicted probability and observed frequency, over equally wide bins, weighted by their counts.

    Source: Guo et al. 2017 (arXiv 1706.04599), Eq. 3. On N samples even a perfect forecast shows about 0.8 sqrt(p (1 - p) bins / N).

    Args:
        predicted (`numpy.ndarray` of shape `(N,)`): in [0, 1].
        observed (`numpy.ndarray` of shape `(N,)`): 0 or 1.
        bins (`int`): how many.
    Returns:
        `float`: NaN without samples.
    """
    if len(predicted) == 0:
        return float("nan")
    where = np.minimum((predicted * bins).astype(np.int64), bins - 1)
    gap = np.bincount(where, weights=predicted - observed, minlength=bins)
    return float(np.abs(gap).sum() / len(predicted))


def noise_of_error(predicted: np.ndarray, bins: int = BINS) -> tuple[float, float]:
    """Mean and standard deviation of the calibration error that a perfect forecast would show on samples as many as these.

    Sums of a bin are near normal with variance sum p (1 - p), and the error is the sum of their absolute values.

    Args:
        predicted (`numpy.ndarray` of shape `(N,)`), bins (`int`): as above.
    """
    where = np.minimum((predicted * bins).astype(np.int64), bins - 1)
    variance = np.bincount(where, weights=predicted * (1 - predicted), minlength=bins)
    mean = np.sqrt(2 / np.pi) * np.sqrt(variance).sum() / len(predicted)
    return float(mean), float(np.sqrt((1 - 2 / np.pi) * variance.sum()) / len(predicted))


def area_under_curve(predicted: np.ndarray, observed: np.ndarray) -> float:
    """Probability that a token that survived had more confidence than one that did not, ties counting half (AUC-ROC).

    Args:
        predicted (`numpy.ndarray` of shape `(N,)`), observed (`numpy.ndarray` of shape `(N,)`): as above.
    Returns:
        `float`: NaN where only one outcome was seen.
    """
    positive = int(observed.sum())
    negative = len(observed) - positive
    if not positive or not negative:
        return float("nan")
    _, inverse, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    return float((ranks[inverse][observed.astype(bool)].sum() - positive * (positive + 1) / 2) / (positive * negative))


def brier_score(predicted: np.ndarray, observed: np.ndarray) -> float:
    """Mean squared gap between forecast and outcome; NaN without samples."""
    return float(np.square(predicted - observed).mean()) if len(predicted) else float("nan")


def reliability(predicted: np.ndarray, observed: np.ndarray, bins: int = BINS) -> list[dict[str, float]]:
    """The points of a reliability diagram: mean prediction, observed frequency and count of each bin that holds samples."""
    where = np.minimum((predicted * bins).astype(np.int64), bins - 1)
    counts = np.bincount(where, minlength=bins)
    mean = np.bincount(where, weights=predicted, minlength=bins)
    hits = np.bincount(where, weights=observed, minlength=bins)
    return [{"predicted": mean[b] / n, "observed": hits[b] / n, "count": int(n)} for b, n in enumerate(counts.tolist()) if n]


@dataclass(frozen=True)
class PositionQuality:
    """Quality of predicted prefix survival at one block position.

    Attributes:
        rounds (`int`): rounds in which this position was judged, by an earlier rejection too.
        survived (`float`): share of them in which the prefix up to here was accepted.
        ece, auc, brier (`float`): of predicted prefix survival; NaN where undefined.
    """

    rounds: int
    survived: float
    ece: float
    auc: float
    brier: float


def quality(rounds: Rounds, temperatures: Sequence[float] | None) -> list[PositionQuality]:
    """Measure predicted prefix survival, position by position.

    Args:
        rounds (`Rounds`): recorded rounds.
        temperatures (`Sequence[float]`, *optional*): T_1..T_gamma; ones where None.
    Returns:
        `list[PositionQuality]`: one for each block position.
    """
    survival = rounds.survival(temperatures)
    out = []
    for k in range(rounds.block_size):
        predicted, observed = _position(rounds, survival[:, k], k)
        share = float(observed.mean()) if len(observed) else float("nan")
        scores = expected_calibration_error(predicted, observed), area_under_curve(predicted, observed), brier_score(predicted, observed)
        out.append(PositionQuality(len(observed), share, *scores))
    return out


def calibration_errors(rounds: Rounds, temperatures: Sequence[float] | None) -> list[tuple[int, float, float, float]]:
    """For each block position: samples, calibration error, and mean and deviation of what chance would show; NaN without samples."""
    survival = rounds.survival(temperatures)
    out = []
    for k in range(rounds.block_size):
        predicted, observed = _position(rounds, survival[:, k], k)
        chance = noise_of_error(predicted) if len(predicted) else (float("nan"), float("nan"))
        out.append((len(predicted), expected_calibration_error(predicted, observed), *chance))
    return out


def _position(rounds: Rounds, survival: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and outcomes at block position k (from 0), where the outcome is known."""
    known = rounds.judged > k
    return survival[known], (rounds.accepted[known] > k).astype(np.float64)


def fit_temperatures(rounds: Rounds, grid: Sequence[float] | None = None) -> list[float]:
    """Sequential Temperature Scaling: T_1, then T_2 given T_1, .., each minimising the ECE of the cumulative product.

    The error of a sample is noisy: of the temperatures within a standard deviation of the least error the one with the lowest Brier score
    is taken, which keeps temperatures sane where few tokens survive.

    Source: paper section 3.2.1. Order-preserving at each position: every T is positive.

    Args:
        rounds (`Rounds`): from decoding with the full budget, not yet calibrated.
        grid (`Sequence[float]`, *optional*): temperatures to try; 121 from 0.1 to 10, evenly in the logarithm, by default.
    Returns:
        `list[float]`: T_1..T_gamma.
    Raises:
        ValueError: for fewer than 400 rounds, or a position that was hardly ever judged.
    """
    known = [int((rounds.judged > k).sum()) for k in range(rounds.block_size)]
    if min(known, default=0) < FEWEST_ROUNDS:
        raise ValueError(
            f"Calibration needs at least {FEWEST_ROUNDS} judged rounds at every block position; got {known}. Decode more prompts, with the "
            "full budget."
        )
    candidates = _GRID if grid is None else np.asarray(grid, dtype=np.float64)
    before = np.ones(len(rounds))
    temperatures = []
    for k in range(rounds.block_size):
        scores = []
        for temperature in candidates.tolist():
            predicted, observed = _position(rounds, before * _sigmoid(rounds.logits[:, k] / temperature), k)
            error, brier = expected_calibration_error(predicted, observed), brier_score(predicted, observed)
            scores.append((error, brier, temperature, noise_of_error(predicted)[1]))
        least, _, _, deviation = min(scores)
        _, chosen = min((brier, temperature) for error, brier, temperature, _ in scores if error <= least + deviation)
        temperatures.append(chosen)
        before = before * _sigmoid(rounds.logits[:, k] / chosen)
    return temperatures


def calibrated(logits: torch.Tensor, temperatures: Sequence[float] | None) -> torch.Tensor:
    """c_k = sigmoid(logit_k / T_k).

    Source: paper section 3.2.1.

    Args:
        logits (`torch.Tensor` of shape `(..., n)`): of the first n block positions, float32.
        temperatures (`list[float]`, *optional*): T_1..T_gamma, n or more; ones where None.
    """
    if temperatures is not None:
        logits = logits / torch.tensor(temperatures[: logits.shape[-1]], device=logits.device)
    return logits.sigmoid()
