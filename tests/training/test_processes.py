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

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def launch(output: Path, *arguments: str, processes: int = 1) -> dict[str, Any]:
    """Run the tiny training under torch's launcher, as `accelerate launch` does, and return what its first process printed."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(
        [*command, str(HERE / "run_tiny_training.py"), str(output), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().rsplit("\n", 1)[-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The same run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    return launch(folder), folder


def assert_same_run(found: dict[str, Any], folder: Path, expected: dict[str, Any], expected_folder: Path) -> None:
    """Loss curve, held-out curve and final weights agree within float noise."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-5)
    assert len(found["losses"]) == 8
    assert found["losses"][-1] != pytest.approx(found["losses"][0], rel=1e-2)  # it did learn something
    mine, theirs = (load_file(path / "final" / "model.safetensors") for path in (folder, expected_folder))
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_two_processes_have_the_loss_curve_of_one(tmp_path: Path, alone: tuple[dict[str, Any], Path]) -> None:
    """Two processes that share each step's rows take the steps of one process with the same global batch."""
    found = launch(tmp_path, processes=2)
    assert found["processes"] == 2
    assert_same_run(found, tmp_path, *alone)


@pytest.mark.slow
def test_two_processes_with_accumulation_have_the_loss_curve_of_one(tmp_path: Path, alone: tuple[dict[str, Any], Path]) -> None:
    """Rows shared by two processes, each in two parts, and a last batch of an epoch too short for all of them."""
    found = launch(tmp_path, "--accumulation", "2", processes=2)
    assert_same_run(found, tmp_path, *alone)


def test_accumulated_parts_take_the_step_of_the_whole(tmp_path: Path, alone: tuple[dict[str, Any], Path]) -> None:
    """One process that runs each step in three parts takes the same steps."""
    found = launch(tmp_path, "--accumulation", "3")
    assert_same_run(found, tmp_path, *alone)


@pytest.mark.slow
def test_sharded_weights_have_the_loss_curve_of_one(tmp_path: Path, alone: tuple[dict[str, Any], Path]) -> None:
    """Fully sharded over two processes (FSDP2), weights, gradients and optimizer state in shards, the run is the same."""
    found = launch(tmp_path, "--fsdp", processes=2)
    assert_same_run(found, tmp_path, *alone)


@pytest.mark.slow
def test_two_processes_resume_what_two_processes_began(tmp_path: Path, alone: tuple[dict[str, Any], Path]) -> None:
    """Stopped after three steps and launched again, two processes end where one uninterrupted process does."""
    launch(tmp_path, "--stop-after", "3", processes=2)
    found = launch(tmp_path, processes=2)
    assert len(found["losses"]) == 8
    assert_same_run(found, tmp_path, *alone)
