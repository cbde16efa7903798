"""Sequential Temperature Scaling of confidences, and measures of their error.

The outcome at block position k of a round is known where k or more tokens were judged; the prefix survived where k or more were accepted.

Source: paper section 3.2.1. Differs: of temperatures whose error is within the noise of the least, the one with the lowest Brier score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
        requests (`numpy.ndarray` of shape `(N,)`, *optional*): number of each round's request.
        features (`numpy.ndarray` of shape `(N, gamma, 9)`, *optional*): `FinishedRound.copy_features`, with n-gram copying.
    """

    logits: np.ndarray
    judged: np.ndarray
    accepted: np.ndarray
    requests: np.ndarray | None = None
    features: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.judged)

    @property
    def block_size(self) -> int:
        """gamma."""
        return self.logits.shape[1]

    def part(self, rows: np.ndarray) -> Rounds:
        """Some of the rounds, by index or mask."""
        return Rounds(*(None if values is None else values[rows] for values in vars(self).values()))  # type: ignore[arg-type]

    @classmethod
    def join(cls, parts: Sequence[Rounds]) -> Rounds:
        """Several records of the same kind as one."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(None if values[0] is None else np.concatenate(values) for values in columns))  # type: ignore[arg-type]

    def positions(self, temperatures: Sequence[float] | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each block position, a_k = prod_{i<=k} sigmoid(logit_i / T_i) and its outcome, 0 or 1, of the rounds where that is known."""
        survival = np.cumprod(_sigmoid(self.logits / (1.0 if temperatures is None else np.asarray(temperatures))), axis=1)
        for k in range(self.block_size):
            known = self.judged > k
            yield survival[known, k], (self.accepted[known] > k).astype(np.float64)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _in_bins(predicted: np.ndarray, weights: np.ndarray | None, bins: int) -> np.ndarray:
    """Sums of weights (counts where None) over equally wide bins of predicted probability."""
    return np.bincount(np.minimum((predicted * bins).astype(np.int64), bins - 1), weights=weights, minlength=bins)


def expected_calibration_error(predicted: np.ndarray, observed: np.ndarray, bins: int = BINS) -> float:
    """ECE: mean gap between predicted probability and observed frequency over equally wide bins, weighted by counts.

    Source: Guo et al. 2017 (arXiv 1706.04599), Eq. 3. On N samples even a perfect forecast shows about 0.8 sqrt(p (1 - p) bins / N).

    Args:
        predicted (`numpy.ndarray` of shape `(N,)`): in [0, 1].
        observed (`numpy.ndarray` of shape `(N,)`): 0 or 1.
        bins (`int`): how many.
    """
    return float(np.abs(_in_bins(predicted, predicted - observed, bins)).sum() / len(predicted))


def noise_of_error(predicted: np.ndarray, bins: int = BINS) -> tuple[float, float]:
    """Mean and standard deviation of the calibration error that a perfect forecast would show on samples `(N,)` as many as these.

    Sums of a bin are near normal with variance sum p (1 - p), and the error is the sum of their absolute values.
    """
    variance = _in_bins(predicted, predicted * (1 - predicted), bins)
    mean = np.sqrt(2 / np.pi) * np.sqrt(variance).sum() / len(predicted)
    return float(mean), float(np.sqrt((1 - 2 / np.pi) * variance.sum()) / len(predicted))


def area_under_curve(predicted: np.ndarray, observed: np.ndarray) -> float | None:
    """AUC-ROC: probability that a token that survived had more confidence than one that did not; None where only one outcome was seen."""
    positive = int(observed.sum())
    negative = len(observed) - positive
    if not positive or not negative:
        return None
    _, inverse, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    return float((ranks[inverse][observed.astype(bool)].sum() - positive * (positive + 1) / 2) / (positive * negative))


def brier_score(predicted: np.ndarray, observed: np.ndarray) -> float:
    """Mean squared gap between forecast and outcome."""
    return float(np.square(predicted - observed).mean())


def reliability(predicted: np.ndarray, observed: np.ndarray, bins: int = BINS) -> list[dict[str, float]]:
    """The points of a reliability diagram: mean prediction, observed frequency and count of each bin that holds samples."""
    counts, mean, hits = (_in_bins(predicted, weights, bins) for weights in (None, predicted, observed))
    return [{"predicted": mean[b] / n, "observed": hits[b] / n, "count": int(n)} for b, n in enumerate(counts.tolist()) if n]


def quality(rounds: Rounds, temperatures: Sequence[float] | None) -> list[dict[str, Any]]:
    """For each block position, how good predicted prefix survival is; temperatures are ones where None.

    Returns:
        `list[dict]`: `rounds` in which the position was judged, by an earlier rejection too; the share that `survived`; `ece`, `auc`,
        `brier`; None where undefined.
    """
    measures = {"ece": expected_calibration_error, "auc": area_under_curve, "brier": brier_score}
    return [
        {
            "rounds": len(observed),
            "survived": float(observed.mean()) if len(observed) else None,
            **{name: measure(predicted, observed) if len(observed) else None for name, measure in measures.items()},
        }
        for predicted, observed in rounds.positions(temperatures)
    ]


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
    counts = [int((rounds.judged > k).sum()) for k in range(rounds.block_size)]
    if min(counts, default=0) < FEWEST_ROUNDS:
        raise ValueError(
            f"Calibration needs at least {FEWEST_ROUNDS} judged rounds at every block position; got {counts}. Decode more prompts, with "
            "the full budget."
        )
    candidates = _GRID if grid is None else np.asarray(grid, dtype=np.float64)
    before = np.ones(len(rounds))
    temperatures: list[float] = []
    for k in range(rounds.block_size):
        known = rounds.judged > k
        head, logits, observed = before[known], rounds.logits[known, k], (rounds.accepted[known] > k).astype(np.float64)
        scores = []
        for temperature in candidates.tolist():
            predicted = head * _sigmoid(logits / temperature)
            error, brier = expected_calibration_error(predicted, observed), brier_score(predicted, observed)
            scores.append((error, brier, temperature, noise_of_error(predicted)[1]))
        least, _, _, deviation = min(scores)
        _, chosen = min((brier, temperature) for error, brier, temperature, _ in scores if error <= least + deviation)
        temperatures.append(chosen)
        before = before * _sigmoid(rounds.logits[:, k] / chosen)
    return temperatures


def calibrated(logits: torch.Tensor, temperatures: Sequence[float] | torch.Tensor | None) -> torch.Tensor:
    """c_k = sigmoid(logit_k / T_k).

    Source: paper section 3.2.1.

    Args:
        logits (`torch.Tensor` of shape `(..., n)`): of the first n block positions, float32.
        temperatures (`list[float]` or `torch.Tensor`, *optional*): T_1..T_gamma, n or more; ones where None.
    """
    if temperatures is not None:
        logits = logits / torch.as_tensor(temperatures[: logits.shape[-1]], dtype=logits.dtype, device=logits.device)
    return logits.sigmoid()
