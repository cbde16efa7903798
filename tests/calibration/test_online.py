"""Online calibration: drifts are found and followed, chance is not taken for a drift.

False alarms: without a drift a check alarms where a position's calibration error is 3 standard deviations above its mean under chance, with
odds of about 0.2% (the error is near normal, with a longer tail); over the 10 checks, which overlap, and 3 positions of the quiet test that
is under 6% for a fresh seed. Seeds are fixed.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_dspark.budgets.budget import FinishedRound
from hf_dspark.calibration.online import OnlineCalibration
from hf_dspark.configuration_dspark import DSparkConfig
from tests.calibration.test_temperature_scaling import simulated
from tests.tiny import tiny_drafter, tiny_target

GAMMA = 3


def config(temperatures: list[float] | None = None, block_size: int = GAMMA) -> DSparkConfig:
    return DSparkConfig(block_size=block_size, confidence_temperatures=temperatures)


def attached(temperatures: list[float] | None = None, *, window: int = 1500, every: int = 500, adapt: bool = True) -> OnlineCalibration:
    online = OnlineCalibration(window=window, every=every, adapt=adapt)
    online.check(config(temperatures))
    return online


def feed(online: OnlineCalibration, true: list[float], n: int, seed: int = 0, verified: int = GAMMA) -> None:
    """Rounds of four rows whose confidences are right at these temperatures."""
    rounds = simulated(true, n, seed)
    whole = FinishedRound((0, 1, 2, 3), (GAMMA,) * 4, (verified,) * 4, (), (verified,) * 4)
    for i in range(0, n, 4):
        accepted = tuple(np.minimum(rounds.accepted[i : i + 4], verified).tolist())
        online.on_round_end(replace(whole, accepted=accepted, confidence_logits=torch.from_numpy(rounds.logits[i : i + 4]).float()))


def test_a_drift_is_followed() -> None:
    """When confidences become twice as sure as they should, the temperatures follow, and the error falls back."""
    online = attached([1.0] * GAMMA)
    feed(online, [1.0] * GAMMA, 2000)
    assert not any(state.drifted for state in online.history)
    feed(online, [2.5] * GAMMA, 4000, seed=1)
    assert any(state.drifted for state in online.history)
    assert online.temperatures == pytest.approx([2.5] * GAMMA, rel=0.4)
    assert online.history[-1].ece < 0.5 * max(state.ece for state in online.history)


def test_monitoring_alone_changes_nothing() -> None:
    """With adapt=False the drift is reported, and the temperatures stay."""
    online = attached([1.0] * GAMMA, adapt=False)
    feed(online, [2.5] * GAMMA, 1500)
    assert online.history[-1].drifted
    assert online.temperatures == [1.0] * GAMMA


def test_quiet_traffic_leaves_temperatures_alone() -> None:
    """Right confidences are left as they are, check after check."""
    online = attached([1.3, 0.8, 1.0], window=2000)
    feed(online, [1.3, 0.8, 1.0], 5000)
    assert len(online.history) == 10
    assert online.temperatures == [1.3, 0.8, 1.0]


def test_positions_that_are_never_verified_keep_their_temperature() -> None:
    """What a budget cuts off is not judged, so nothing is concluded about it."""
    online = attached([1.0, 1.0, 7.0])
    feed(online, [2.5, 2.5, 2.5], 3000, verified=2)
    assert online.temperatures[2] == 7.0
    assert online.temperatures[:2] == pytest.approx([2.5, 2.5], rel=0.4)


def test_it_begins_where_the_checkpoint_is() -> None:
    """The first call takes the checkpoint's temperatures, ones where it has none; later calls go on from what was found."""
    online = attached()
    assert online.temperatures == [1.0] * GAMMA
    online.temperatures = [2.0] * GAMMA
    online.check(config([5.0] * GAMMA))
    assert online.temperatures == [2.0] * GAMMA


def test_what_cannot_be_watched_is_refused() -> None:
    """Another block size, a window too small to fit temperatures to, no distance between checks."""
    with pytest.raises(ValueError, match="blocks of 3 tokens; the drafter's have 4"):
        attached().check(config(block_size=4))
    for wrong in ({"window": 10}, {"every": 0}):
        with pytest.raises(ValueError, match="at least 400"):
            attached(**wrong)


def test_what_was_found_can_be_saved_with_the_drafter() -> None:
    """`record` gives a calibration that a drafter takes."""
    drafter = tiny_drafter(tiny_target("llama"), block_size=GAMMA)
    online = OnlineCalibration(window=1500, every=500)
    with pytest.raises(RuntimeError, match="no rounds yet"):
        online.record()
    online.check(drafter.config)
    feed(online, [2.0] * GAMMA, 1000)
    drafter.set_calibration(online.record())
    assert drafter.config.confidence_temperatures == online.temperatures
