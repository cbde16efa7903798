"""Hyper-parameters: ranges, schedules, and that they load no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hf_dspark.errors import DataError
from hf_dspark.training.configuration import DataSettings, DrafterShape, TrainingConfig


def test_schedule_rises_over_the_warm_up_and_falls_to_zero():
    """Linear to the peak at 4%, cosine to 0; CE weight from 1.0 to 0.1 over the first 30%."""
    config = TrainingConfig(steps=100, learning_rate=1.0)
    assert [config.learning_rate_at(f) for f in (0.02, 0.04, 0.52, 1.0)] == pytest.approx([0.5, 1.0, 0.5, 0.0])
    assert [config.loss_weights_at(f).cross_entropy for f in (0.0, 0.15, 0.3, 1.0)] == pytest.approx([1.0, 0.55, 0.1, 0.1])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: TrainingConfig(), "exactly one"),
        (lambda: TrainingConfig(steps=3, minutes=1.0), "exactly one"),
        (lambda: TrainingConfig(steps=3, batch_size=0), "batch_size is 0; allowed: at least 1"),
        (lambda: TrainingConfig(steps=3, warmup=1.0), r"warmup is 1\.0; allowed: at least 0 and below 1"),
        (lambda: TrainingConfig(steps=3, decay=float("nan")), "decay is nan; allowed: above 0"),
        (lambda: TrainingConfig(steps=3, optimizer="sgd"), "optimizer is 'sgd'; allowed: adamw, muon"),
        (lambda: DrafterShape(head="lstm"), "head is 'lstm'; allowed: vanilla, gated, rnn, none"),
        (lambda: DrafterShape(layers=0), "layers is 0; allowed: at least 1"),
        (lambda: DataSettings(temperatures=(0.5, -1.0)), r"temperatures is \(0.5, -1.0\); allowed: at least 0"),
        (lambda: DataSettings(temperatures=()), "allowed: one or more"),
        (lambda: DataSettings(top_p=0.0), r"top_p is 0\.0; allowed: above 0 and at most 1"),
        (lambda: DataSettings(self_tokens=3), "self_tokens is 3; allowed: at least 4"),
    ],
)
def test_values_outside_their_range_are_refused(made, message):
    """The error names the field, what it is and what is allowed."""
    with pytest.raises(ValueError, match=message):
        made()


def test_settings_of_data_raise_an_error_of_the_package():
    """The command line turns it into one line."""
    with pytest.raises(DataError, match="held_out is 1"):
        DataSettings(held_out=1.0)


def test_the_configuration_loads_no_torch():
    """The command line builds its options from it."""
    code = "import hf_dspark.training.configuration, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
