"""Sequential Temperature Scaling and its measures, against values by hand, brute force and known temperatures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_dspark.calibration.records import check_calibration, read_calibration, write_calibration
from hf_dspark.calibration.temperature_scaling import (
    FEWEST_ROUNDS,
    Rounds,
    area_under_curve,
    brier_score,
    calibrated,
    expected_calibration_error,
    fit_temperatures,
    noise_of_error,
    quality,
    reliability,
)
from hf_dspark.errors import CheckpointError


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def simulated(true: list[float], n: int = 20000, seed: int = 0, spread: float = 3.0, mean: float = 0.5) -> Rounds:
    """Rounds whose token k survives with probability sigmoid(logit_k / T_k), given that the tokens before did."""
    random = np.random.default_rng(seed)
    logits = spread * random.standard_normal((n, len(true))) + mean
    stands = random.random(logits.shape) < sigmoid(logits / np.array(true))
    accepted = np.cumprod(stands, axis=1).sum(axis=1)
    return Rounds(logits, np.full(n, len(true)), accepted)


def test_errors_by_hand() -> None:
    """ECE of two bins: one predicts 0.2 and 0.3 where one of two survives, the other 0.9 where all do. Brier: mean of squared gaps."""
    assert brier_score(np.array([0.5, 1.0]), np.array([1.0, 0.0])) == pytest.approx((0.25 + 1.0) / 2)
    predicted, observed = np.array([0.2, 0.3, 0.9, 0.9, 0.9]), np.array([0.0, 1.0, 1.0, 1.0, 1.0])
    expected = (2 / 5) * abs(0.5 - 0.25) + (3 / 5) * abs(1.0 - 0.9)
    assert expected_calibration_error(predicted, observed, bins=2) == pytest.approx(expected)
    assert expected_calibration_error(np.ones(4), np.array([1.0, 1.0, 1.0, 0.0])) == pytest.approx(0.25)  # the last bin is closed


@pytest.mark.parametrize("seed", range(2))
def test_auc_equals_a_count_of_pairs(seed: int) -> None:
    """Over all pairs of one that survived and one that did not, wins and half the ties."""
    random = np.random.default_rng(seed)
    predicted, observed = random.choice([0.1, 0.2, 0.5, 0.7], 60), (random.random(60) < 0.4).astype(float)
    pairs = [(p, q) for p, o in zip(predicted, observed, strict=True) if o for q, u in zip(predicted, observed, strict=True) if not u]
    expected = sum((p > q) + 0.5 * (p == q) for p, q in pairs) / len(pairs)
    assert area_under_curve(predicted, observed) == pytest.approx(expected)


def test_a_reliability_diagram_adds_up() -> None:
    """Counts cover all samples; the gaps weighted by them are the calibration error."""
    rounds = simulated([1.0], 500)
    predicted, observed = sigmoid(rounds.logits[:, 0]), (rounds.accepted > 0).astype(float)
    points = reliability(predicted, observed)
    assert sum(p["count"] for p in points) == 500
    gap = sum(p["count"] * abs(p["predicted"] - p["observed"]) for p in points) / 500
    assert gap == pytest.approx(expected_calibration_error(predicted, observed))


@pytest.mark.parametrize("true", [[1.0, 1.0, 1.0], [0.5, 3.0, 1.0]])
def test_known_temperatures_are_found(true: list[float]) -> None:
    """From 20,000 simulated rounds each comes back within 15%, and the error falls from several times the noise of the estimate to it.
    No ranking changes at the first position: its AUC is the same before and after.
    """
    rounds = simulated(true)
    fitted = fit_temperatures(rounds)
    assert fitted == pytest.approx(true, rel=0.15)
    fresh = simulated(true, seed=1)
    assert np.mean([q["ece"] for q in quality(fresh, fitted)]) < 0.012
    assert true == [1.0, 1.0, 1.0] or np.mean([q["ece"] for q in quality(fresh, None)]) > 0.04
    assert quality(fresh, fitted)[0]["auc"] == pytest.approx(quality(fresh, None)[0]["auc"], abs=1e-12)


def test_positions_are_fitted_left_to_right() -> None:
    """T_1 is the grid's best for position 1 alone; T_2 the best for the product, with T_1 in it: by separate code, on a grid so coarse that
    no two temperatures are within the noise of each other.
    """
    rounds, grid = simulated([2.0, 0.5], 6000), [0.1, 0.5, 2.0, 8.0]

    def error(predicted: np.ndarray, observed: np.ndarray) -> float:
        total = 0.0
        for low in range(10):
            inside = [i for i, p in enumerate(predicted) if low <= min(p * 10, 9.999999) < low + 1]
            if inside:
                total += abs(sum(predicted[i] for i in inside) - sum(observed[i] for i in inside))
        return total / len(predicted)

    first = min(grid, key=lambda t: error(sigmoid(rounds.logits[:, 0] / t), rounds.accepted > 0))
    head = sigmoid(rounds.logits[:, 0] / first)
    second = min(grid, key=lambda t: error(head * sigmoid(rounds.logits[:, 1] / t), rounds.accepted > 1))
    assert fit_temperatures(rounds, grid) == [first, second]


def test_few_survivors_do_not_drive_temperatures_to_extremes() -> None:
    """Where hardly a token survives any temperature gives a small error; the choice stays within a factor of the truth."""
    assert all(0.4 < t < 2.5 for t in fit_temperatures(simulated([1.0] * 3, 3000, seed=8, spread=1.0, mean=-3.0)))


def test_positions_that_were_not_judged_do_not_count() -> None:
    """Rounds cut short teach nothing about later positions, whatever the cut left in their places."""
    whole = simulated([1.5, 0.7], 4000)
    cut = simulated([1.5, 9.0], 4000, seed=3)
    cut.logits[:, 1] = np.nan
    both = Rounds.join([whole, Rounds(cut.logits, np.ones(4000, dtype=int), np.minimum(cut.accepted, 1))])
    assert fit_temperatures(both)[1] == pytest.approx(0.7, rel=0.2)
    assert quality(both, [1.5, 0.7])[1]["rounds"] == 4000


def test_the_noise_of_the_error_is_what_chance_shows() -> None:
    """Over 400 draws from perfect forecasts the error has the mean and the deviation that the formula says, within a tenth."""
    random = np.random.default_rng(0)
    predicted = random.random(2000) ** 2
    errors = [expected_calibration_error(predicted, (random.random(2000) < predicted).astype(float)) for _ in range(400)]
    mean, deviation = noise_of_error(predicted)
    assert np.mean(errors) == pytest.approx(mean, rel=0.05)
    assert np.std(errors) == pytest.approx(deviation, rel=0.15)


def test_too_few_rounds_are_refused() -> None:
    """With what is needed and what is there."""
    with pytest.raises(ValueError, match=rf"at least {FEWEST_ROUNDS} judged rounds.*\[399, 399\]"):
        fit_temperatures(simulated([1.0, 1.0], 399))


RECORD = {"format": 1, "temperatures": [1.5, 0.5], "data": []}


def test_a_record_survives_the_file(tmp_path: Path) -> None:
    """What was written is read back; it is refused for a block of another length."""
    write_calibration(tmp_path / "new", RECORD)
    assert read_calibration(str(tmp_path / "new")) == RECORD
    assert read_calibration(str(tmp_path)) is None
    with pytest.raises(CheckpointError, match="one temperature for each of the 3 block positions; got 2"):
        check_calibration(RECORD, 3, "somewhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "not one that this version reads"),
        (json.dumps({**RECORD, "format": 2}), "not one that this version reads"),
        (json.dumps({**RECORD, "temperatures": "1"}), "not one that this version reads"),
        (json.dumps({**RECORD, "temperatures": [1.0, "x"]}), "not numbers"),
        (json.dumps({**RECORD, "temperatures": [1.0, -1.0]}), "positive"),
        (json.dumps({**RECORD, "temperatures": [1.0, float("inf")]}), "positive and finite"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    """One error that names the folder."""
    (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_calibration(str(tmp_path))


def test_confidence_is_the_sigmoid_of_the_scaled_logit() -> None:
    """c_k = sigmoid(logit_k / T_k), also for fewer positions than temperatures, and with T_k = 1 where there are none."""
    logits = torch.tensor([[1.0, -2.0, 0.5]])
    for temperatures, scaled in (([1.0, 2.0, 0.5, 4.0], [1.0, -1.0, 1.0]), (None, [1.0, -2.0, 0.5])):
        expected = torch.tensor([[1 / (1 + math.exp(-x)) for x in scaled]])
        torch.testing.assert_close(calibrated(logits, temperatures), expected)
