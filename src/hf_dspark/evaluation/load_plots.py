"""Plots of profiles, calibrations and load benchmarks. Knows result records; knows no models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_dspark.errors import DataError
from hf_dspark.evaluation.tables import empty_plot, save_plot


def plot_load(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw total throughput against speed per user, and verified tokens against concurrency.

    Source: paper Figures 7 and 8.

    Args:
        record (`dict`): what `hf-dspark bench --json` wrote.
        folder (`Path`): made where it is missing; gets frontier.png and budget.png.
    Returns:
        `list[Path]`: the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_budget: dict[str, list[Mapping[str, Any]]] = {}
    for cell in record["cells"]:
        by_budget.setdefault(cell["budget"], []).append(cell)

    figure, axes = empty_plot(6.5, 4.5)
    for name, cells in by_budget.items():
        points = [(c["user_tokens_per_s_median"], c["tokens_per_s"]) for c in cells if c["user_tokens_per_s_median"]]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **_style(name))
    axes.set_xlabel("tokens/s per user (median)")
    axes.set_ylabel("tokens/s in all")
    frontier = folder / "frontier.png"
    save_plot(figure, axes, frontier)

    figure, axes = empty_plot(6.5, 4)
    for name, cells in by_budget.items():
        points = [(c["concurrency"], c["verified_tokens_per_request"]) for c in cells if c["verified_tokens_per_request"] is not None]
        if points and any(y for _, y in points):
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **_style(name))
    axes.set_xscale("log", base=2)
    axes.set_xlabel("requests in flight")
    axes.set_ylabel("verified tokens a request and round")
    budget = folder / "budget.png"
    save_plot(figure, axes, budget)
    return [frontier, budget]


def _style(name: str) -> dict[str, Any]:
    return {"linewidth": 2.2} if name.startswith("load-aware") else {"linewidth": 1, "linestyle": "--"}


def plot_reliability(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw observed against predicted prefix survival, before and after calibration, for each block position.

    Args:
        record (`dict`): what `calibration.json` holds.
        folder (`Path`): made where it is missing; gets reliability.png, and reliability_NAME.png for each file of another domain.
    Returns:
        `list[Path]`: the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, part in {"": record, **{f"_{name}": part for name, part in record["others"].items()}}.items():
        path = folder / f"reliability{name}.png"
        _reliability(part, path)
        paths.append(path)
    return paths


def _reliability(part: Mapping[str, Any], path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("plots need matplotlib, which is not installed; run: pip install 'hf-dspark[plots]'") from error
    positions = len(part["after"]["positions"])
    figure = Figure(figsize=(2.2 * positions, 2.6))
    FigureCanvasAgg(figure)
    for k in range(positions):
        axes = figure.add_subplot(1, positions, k + 1)
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        for when, style in (("before", "--"), ("after", "-")):
            points = part[when]["reliability"][k]
            axes.plot([p["predicted"] for p in points], [p["observed"] for p in points], style, marker="o", markersize=3, label=when)
        axes.set_title(f"k = {k + 1}", fontsize=9)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.tick_params(labelsize=7)
        if k == 0:
            axes.set_ylabel("observed survival", fontsize=8)
            axes.legend(fontsize=7)
        axes.set_xlabel("predicted", fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def plot_costs(record: Mapping[str, Any], path: Path) -> None:
    """Draw the measured times of rounds by tokens in the pass, one line for each number of rows.

    Args:
        record (`dict`): a profile's JSON.
        path (`Path`): the file.
    """
    figure, axes = empty_plot(6, 4)
    for mode, table in record["tables"].items():
        for rows, costs in table.items():
            context, column = next(iter(costs["verify_s"].items()))
            points = sorted((int(rows) * int(n), 1e3 * seconds) for n, seconds in column.items())
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{rows} rows, {context} tokens each, {mode}")
    axes.set_xlabel("tokens in the pass")
    axes.set_ylabel("milliseconds, draft left out")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_plot(figure, axes, path)
