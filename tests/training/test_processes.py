"""Several processes and accumulated parts train as one process does: real processes over gloo, float32, tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.tiny_runs import losses, tiny_trainer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def launch(output: Path, *arguments: str) -> dict[str, Any]:
    """Run the tiny training in two processes under torch's launcher, as `accelerate launch` does; what the first one printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command += [str(HERE / "run_tiny_training.py"), str(output), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().rsplit("\n", 1)[-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The same run in this one process."""
    folder = tmp_path_factory.mktemp("alone")
    tiny_trainer(folder, rows=14, held_out=6, steps=8, batch_size=4).train()
    return {"losses": losses(folder)}, folder


def assert_same_run(found: dict[str, Any], folder: Path, expected: dict[str, Any], expected_folder: Path) -> None:
    """Loss curve, held-out curve and final weights agree within float noise."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-5)
    assert len(found["losses"]) == 8
    assert found["losses"][-1] != pytest.approx(found["losses"][0], rel=1e-2)  # it did learn something
    mine, theirs = (load_file(path / "final" / "model.safetensors") for path in (folder, expected_folder))
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--accumulation", "2"), ("--fsdp",)], ids=["accumulated", "sharded"])
def test_shared_steps_have_the_loss_curve_of_one_process(tmp_path: Path, alone: tuple[dict[str, Any], Path], arguments) -> None:
    """Rows shared by two processes and parts, a last batch of an epoch too short for all of them, and weights in shards (FSDP2)."""
    found = launch(tmp_path, *arguments)
    assert found["processes"] == 2
    assert_same_run(found, tmp_path, *alone)


@pytest.mark.slow
def test_two_processes_resume_what_two_processes_began(tmp_path: Path, alone: tuple[dict[str, Any], Path]) -> None:
    """Stopped after three steps and launched again, two processes end where one uninterrupted process does."""
    launch(tmp_path, "--stop-after", "3")
    assert_same_run(launch(tmp_path), tmp_path, *alone)
