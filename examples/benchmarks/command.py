"""What the benchmarks' command lines share: options, one line for bad input, result files that appear whole."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_dspark.utils.files import atomic_write_json


def options(description: str | None, dtype: str = "bf16") -> argparse.ArgumentParser:
    """A parser with the options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--drafter", default="smollm2-dspark")
    parser.add_argument("--dtype", default=dtype)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True, help="result file")
    return parser


def run_command(run: Callable[[], None]) -> int:
    """Runs a command's work; returns 0, or 2 after one line `error: ..` where the input cannot be used."""
    try:
        run()
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes a result file, whole or not at all."""
    atomic_write_json(path, record, indent=1)
