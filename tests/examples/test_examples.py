"""The examples run as they stand, in an interpreter of their own, and print what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loopback_hub import TOKEN

ROOT = Path(__file__).resolve().parents[2]


def lines_of(example: str, *arguments: str, environment: dict[str, str] | None = None) -> list[str]:
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(ROOT / "examples" / example), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | path | (environment or {}), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_first_example_gives_the_same_text_in_fewer_passes() -> None:
    """01_generate: the drafted text is the plain one, and the target ran less often than it has tokens."""
    same, passes = lines_of("01_generate.py")
    assert same == "same text: True"
    ran, tokens = map(int, re.match(r"(\d+) target passes instead of (\d+)", passes).groups())
    assert ran < tokens


@pytest.mark.slow
def test_every_budget_of_the_second_example_gives_the_same_text() -> None:
    """02_batched_budget: four budgets, one text; the full budget verifies most and static:0 nothing."""
    rows = {line.split()[0]: line.split()[1:] for line in lines_of("02_batched_budget.py")[1:]}
    assert {row[-1] for row in rows.values()} == {"True"}
    verified = {name: int(row[1]) for name, row in rows.items()}
    assert verified["static:0"] == 0
    assert verified["full"] == max(verified.values())


@pytest.mark.slow
def test_the_third_example_calibrates_and_saves() -> None:
    """03_calibrate: rounds are fitted and judged apart, and the drafter decodes load-aware from then on."""
    rounds, error, temperatures, budget = lines_of("03_calibrate.py")
    fitted, judged = map(int, re.match(r"rounds: (\d+) to fit, (\d+) to judge", rounds).groups())
    assert min(fitted, judged) > 50
    assert re.match(r"calibration error: [\d.]+% -> [\d.]+%", error)
    assert len(temperatures.split()) == 8
    assert budget == "budget: load-aware"


@pytest.mark.slow
def test_the_fourth_example_trains_an_adapter_that_changes_no_text() -> None:
    """04_finetune_peft: the loss falls, the adapter is a few megabytes, and base, adapter and merged drafter give one text."""
    rows, loss, size, same = lines_of("04_finetune_peft.py")
    assert rows == "rows: 8 of the target's own answers"
    assert loss == "loss went down: True"
    assert float(re.match(r"adapter: ([\d.]+) MB", size)[1]) < 6
    assert same == "same text with base, adapter, and adapter merged: True"


@pytest.mark.slow
def test_the_fifth_example_pushes_and_pulls(hub, tmp_path) -> None:
    """05_push_pull: against a Hub on the loopback, one commit with everything, the same weights back, other temperatures on top."""
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    pushed, pulled, mine = lines_of("05_push_pull.py", "user", environment=environment)
    assert pushed == "pushed: drafter, card, calibration and results in one commit"
    assert pulled == "pulled: same weights True, budget load-aware"
    assert mine.endswith("[1.5, 1.4, 1.3, 1.2, 1.1, 1.0, 1.0]")
    assert {"README.md", "calibration.json", "config.json", "model.safetensors"} <= set(hub.repositories["user/smollm2-dspark"].files())
    assert set(hub.repositories["user/smollm2-dspark-temperatures"].files()) == {".gitattributes", "calibration.json"}


@pytest.mark.slow
def test_the_sixth_example_streams_the_pipelines_text() -> None:
    """06_pipeline_and_streaming: pipeline and streamer give plain text, in several pieces."""
    through_pipeline, streamed, pieces = lines_of("06_pipeline_and_streaming.py")
    assert through_pipeline == "pipeline, same text: True"
    assert streamed == "streamed, same text: True"
    assert int(pieces.split()[1]) > 1
