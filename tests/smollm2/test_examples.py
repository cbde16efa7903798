"""The examples run as they stand, in an interpreter of their own, and print what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def lines_of(example: str) -> list[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, str(ROOT / "examples" / example)], capture_output=True, text=True, env=environment, check=False)
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
