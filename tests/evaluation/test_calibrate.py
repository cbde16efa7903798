"""Calibration on decoded prompts: what is recorded, fitted, judged and kept."""

from __future__ import annotations

import copy
import functools
import json

import numpy as np
import pytest

from hf_dspark.budgets.named import make_budget
from hf_dspark.calibration.temperature_scaling import FEWEST_ROUNDS
from hf_dspark.configuration_dspark import COPY_FEATURES
from hf_dspark.errors import CheckpointError, DataError
from hf_dspark.evaluation.calibrate import calibrate, held_out, record_rounds
from hf_dspark.evaluation.serving import serve
from hf_dspark.models.modeling_dspark import DSparkDrafter
from tests.evaluation.test_serving import pair
from tests.helpers import NEVER, random_prompts, talking_target
from tests.tiny import tiny_drafter


def many_prompts(n: int, seed: int = 3) -> list[list[int]]:
    return random_prompts((5,) * n, seed)


def test_rounds_are_recorded_as_they_happened():
    """What the recorder says was accepted adds up to what the loop's statistics say, and every block position was judged."""
    target, drafter = pair()
    how = {"end_ids": [NEVER], "max_new_tokens": 20, "concurrency": 5}
    found = record_rounds(target, drafter, many_prompts(12), **how)
    assert found.block_size == drafter.config.block_size
    assert len(found) == len(found.requests)
    served = serve(target, drafter, many_prompts(12), budget=make_budget("full"), **how)
    assert int(found.accepted.sum()) == sum(sum(row.accepted_at) for row in served.stats.rows)
    assert np.bincount(found.requests, minlength=12).tolist() == [row.verified_at[0] for row in served.stats.rows]


def test_prompts_are_held_out_by_their_hash():
    """About half of them, the same ones every time."""
    prompts = many_prompts(400)
    chosen = [held_out(p) for p in prompts]
    assert chosen == [held_out(p) for p in prompts]
    assert 150 < sum(chosen) < 250


@functools.cache
def calibrated() -> dict:
    files, others = {"here": many_prompts(150)}, {"there": many_prompts(60, 9)}
    return calibrate(*pair(), files, others=others, end_ids=[NEVER], max_new_tokens=24, concurrency=32)


def test_calibration_helps_on_prompts_that_it_has_not_seen():
    """The confidences of an untrained head are wrong; temperatures make them less so on the held-out half, which was not fitted on."""
    record = calibrated()
    assert record["files"]["here"]["after"]["ece"] < record["files"]["here"]["before"]["ece"]
    (data,) = record["data"]
    assert data["rounds_fitted"] >= FEWEST_ROUNDS
    assert data["rounds_judged"] == record["files"]["here"]["after"]["rounds"]
    assert set(record["others"]) == {"there"}


def test_a_calibrated_drafter_keeps_its_calibration(tmp_path):
    """Saved with the drafter, read with it, applied to its confidences, and its own budget is the load-aware one."""
    drafter = pair()[1]
    copy.deepcopy(drafter).set_calibration(calibrated()).save_pretrained(tmp_path)
    loaded = DSparkDrafter.from_pretrained(tmp_path)
    assert loaded.calibration == calibrated()
    assert loaded.config.confidence_temperatures == calibrated()["temperatures"]
    assert (loaded.budget, drafter.budget) == ("load-aware", "full")
    shorter = DSparkDrafter.from_pretrained(tmp_path, block_size=3)
    assert shorter.config.confidence_temperatures == calibrated()["temperatures"][:3]


def test_a_calibration_file_and_a_config_must_agree(tmp_path):
    """A confidence is calibrated once: two different sets of temperatures are refused."""
    copy.deepcopy(pair()[1]).set_calibration(calibrated()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["confidence_temperatures"][0] += 1.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"calibration\.json .* and config\.json .* say different things"):
        DSparkDrafter.from_pretrained(tmp_path)
    config["confidence_temperatures"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert DSparkDrafter.from_pretrained(tmp_path).config.confidence_temperatures == calibrated()["temperatures"]


@pytest.mark.slow
def test_copying_is_fitted_with_the_calibration():
    """On a target that repeats itself an untrained drafter learns to copy, the longer the match the surer; confidences know of it."""
    target = talking_target(loudness=60.0)
    drafter = tiny_drafter(target)
    record = calibrate(target, drafter, {"here": many_prompts(150)}, end_ids=[NEVER], max_new_tokens=40, concurrency=32, copying=4)
    weights = record["copying"]["weights"]
    assert len(weights) == 4
    assert all(0.0 < w < 1.0 for w in weights)
    assert weights[3] > weights[0]
    part = record["files"]["here"]
    assert part["after"]["ece"] < part["before"]["ece"]
    assert part["after"]["auc"] > part["before"]["auc"] + 0.1
    again = copy.deepcopy(drafter).set_calibration(record)
    assert again.config.copy_weights == weights == drafter.config.copy_weights
    assert again.config.copy_confidence == record["copying"]["confidence"]
    assert [len(row) for row in again.config.copy_confidence] == [len(COPY_FEATURES)] * 4


def test_copying_can_be_fitted_away():
    """`copying=0` calibrates a drafter that copies for doing without; the record says nothing of copies then."""
    target = talking_target(loudness=60.0)
    drafter = tiny_drafter(target, copy_weights=[0.5])
    record = calibrate(target, drafter, {"here": many_prompts(150)}, end_ids=[NEVER], max_new_tokens=24, concurrency=32, copying=0)
    assert "copying" not in record
    assert drafter.config.copy_weights is None
    with pytest.raises(ValueError, match="0 \\(none\\) to 64"):
        calibrate(target, drafter, {"here": many_prompts(4)}, end_ids=[NEVER], copying=65)


def test_what_cannot_be_calibrated_is_refused():
    """Too few rounds, with the counts; and, before anything is decoded, a drafter without a confidence head."""
    target, drafter = pair()
    with pytest.raises(DataError, match=r"at least 400 rounds.*rounds_fitted"):
        calibrate(target, drafter, {"few": many_prompts(4)}, end_ids=[NEVER], max_new_tokens=6)
    with pytest.raises(DataError, match="no confidence head"):
        calibrate(target, tiny_drafter(target, enable_confidence_head=False), {"x": many_prompts(2)}, end_ids=[NEVER])
