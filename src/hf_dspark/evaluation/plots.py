"""Plots of load benchmarks and calibrations, from their JSON records. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_dspark.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with plots side by side; not pyplot, which holds global state and may want a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("plots need matplotlib, which is not installed; run: pip install 'hf-dspark[plots]'") from error
    figure = Figure(figsize=(width, height))
    return figure, [figure.add_subplot(1, columns, k + 1) for k in range(columns)]


def plot_load(record: Mapping[str, Any], folder: Path) -> None:
    """Draws frontier.png (total throughput against speed per user) and budget.png (verified tokens against concurrency) into a folder.

    Source: paper Figures 7 and 8. The record is what `hf-dspark bench --json` wrote.
    """
    by_budget: dict[str, list[Mapping[str, Any]]] = {}
    for cell in record["cells"]:
        by_budget.setdefault(cell["budget"], []).append(cell)
    for file, x, y, xlabel, ylabel in (
        ("frontier.png", "user_tokens_per_s_median", "tokens_per_s", "tokens/s per user (median)", "tokens/s in all"),
        ("budget.png", "concurrency", "verified_tokens_per_request", "requests in flight", "verified tokens a request and round"),
    ):
        figure, (axes,) = _figure(6.5, 4.5)
        for name, cells in by_budget.items():
            points = [(c[x], c[y]) for c in cells if c[x] and c[y] is not None]
            if any(height for _, height in points):
                _line(axes, points, name, bold=name.startswith("load-aware"))
        if x == "concurrency":
            axes.set_xscale("log", base=2)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        _save(figure, folder / file)


def plot_reliability(record: Mapping[str, Any], folder: Path) -> None:
    """Draws observed against predicted prefix survival, before and after calibration, for each block position of a `calibration.json`.

    The folder gets reliability.png, and reliability_NAME.png for each file of another domain.
    """
    for name, part in {"": record, **{f"_{name}": part for name, part in record["others"].items()}}.items():
        positions = len(part["after"]["positions"])
        figure, plots = _figure(2.2 * positions, 2.6, positions)
        for k, axes in enumerate(plots):
            axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
            for when, bold in (("before", False), ("after", True)):
                _line(axes, ((p["predicted"], p["observed"]) for p in part[when]["reliability"][k]), when, bold=bold)
            axes.set(title=f"k = {k + 1}", xlim=(0, 1), ylim=(0, 1), xlabel="predicted", ylabel="" if k else "observed survival")
        _save(figure, folder / f"reliability{name}.png")


def _line(axes: Axes, points: Iterable[tuple[float, float]], label: str, *, bold: bool) -> None:
    style: dict[str, Any] = {"linewidth": 2} if bold else {"linewidth": 1, "linestyle": "--"}
    axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label, **style)


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
