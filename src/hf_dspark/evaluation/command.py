"""How a measuring module behaves as a command: results are files, bad input is one line and exit code 2. Knows no measurement."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_dspark.errors import DataError


def run_command(run: Callable[[], None]) -> int:
    """Run a command's work; returns 0, or 2 after one line `error: ..` where the input cannot be used."""
    try:
        run()
    except (DataError, ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a result file, whole or not at all."""
    waiting = path.with_suffix(".tmp")
    waiting.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    waiting.replace(path)
