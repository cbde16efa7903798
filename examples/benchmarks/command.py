"""What the benchmarks' command lines share: options, one line for bad input, result files that appear whole."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_dspark.utils.files import atomic_write_json


def options(description: str | None, *, dtype: str = "bf16", prompts: bool = False, **numbers: int | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark takes, `--prompts FILE`, and options that are whole numbers, by their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--drafter", default="smollm2-dspark")
    parser.add_argument("--dtype", default=dtype)
    parser.add_argument("--json", type=Path, required=True, help="result file")
    if prompts:
        parser.add_argument("--prompts", type=Path, action="append", required=True, help="prompt file; repeat it for more")
    for name, default in {"seed": 0, **numbers}.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    return parser


def chosen(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Some of the options, for a record."""
    return {name: getattr(args, name) for name in names}


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
