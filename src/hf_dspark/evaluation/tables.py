"""Pieces that tables and plots are made of: markdown tables, figures as text, the machine in one line, an empty plot. Knows no file
layouts but the machine record, and no models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_dspark.errors import DataError


def machine_line(record: Mapping[str, Any]) -> str:
    """The machine and versions of any result file, in one line."""
    machine = record["machine"]
    versions = machine.get("versions") or record["versions"]
    cores = machine["cpu_count"] if "cpu_count" in machine else machine["cores"]
    threads = machine["torch_threads"] if "torch_threads" in machine else machine["threads"]
    parts = [f"{machine['cpu']}, {cores} cores", f"{threads} torch thread{'' if threads == 1 else 's'}"]
    if machine.get("gpu"):
        parts.insert(0, machine["gpu"])
    if machine.get("memory_gib"):
        parts.append(f"{machine['memory_gib']:.0f} GiB")
    names = [name for name in ("python", "torch", "transformers") if name in versions]
    return f"{', '.join(parts)}; {', '.join(f'{name} {versions[name]}' for name in names)}."


def judged(settings: Mapping[str, Any]) -> str:
    """How drawn tokens were judged; files from before there was a choice do not say."""
    return "judged over the block" if settings.get("verification") == "block" else "judged token by token"


def markdown_table(heading: Sequence[str], rows: Sequence[Sequence[str]], *, right: bool = True) -> str:
    """A markdown table; all columns but the first are aligned to the right where asked."""
    rule = ["---"] + ["---:" if right else "---"] * (len(heading) - 1)
    lines = [heading, rule, *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def empty_plot(width: float = 5, height: float = 3.2) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("plots need matplotlib, which is not installed; run: pip install 'hf-dspark[plots]'") from error
    figure = Figure(figsize=(width, height))  # not pyplot: it keeps global state and may want a display
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def save_plot(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
