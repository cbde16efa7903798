"""Shows what online calibration does when traffic changes: one kind of prompts, then another, with and without it. Knows serving; knows no
internals of it.

    python -m examples.benchmarks.drift --first gsm8k.jsonl --then mt-bench.jsonl --json results/drift.json --plots results/

Both runs decode the same requests in the same order with the load-aware budget; one only watches its confidences, one follows the drift.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_dspark.budgets.named import make_budget
from hf_dspark.calibration.online import OnlineCalibration
from hf_dspark.decoding.profiler import CostProfile
from hf_dspark.evaluation.command import run_command, write_record
from hf_dspark.evaluation.metrics import machine_record
from hf_dspark.evaluation.prompts import encode, read_prompts
from hf_dspark.evaluation.serving import serve
from hf_dspark.evaluation.speed import end_ids_of
from hf_dspark.evaluation.tables import empty_plot, save_plot
from hf_dspark.models.loading import load_drafter, load_target


def shift(
    target: Any,
    drafter: Any,
    phases: Mapping[str, Sequence[Sequence[int]]],
    *,
    adapt: bool,
    budget: str,
    concurrency: int,
    max_new_tokens: int,
    window: int,
    every: int,
    seed: int,
) -> dict[str, Any]:
    """Serve the phases one after the other with one watch over all.

    Args:
        target (`PreTrainedModel`), drafter (`DSparkDrafter`): a pair.
        phases (`dict[str, list[list[int]]]`): prompts by name, in the order of traffic.
        adapt (`bool`): follow drifts, or only watch.
        budget (`str`): name.
        concurrency, max_new_tokens, seed: of serving.
        window, every (`int`): of `OnlineCalibration`.
    Returns:
        `dict`: for each phase its throughput and tau, and the checks of the watch with the phase they fell into.
    """
    online = OnlineCalibration(window=window, every=every, adapt=adapt)
    online.check(drafter.config)
    profile = CostProfile.cached(target, drafter, rows=concurrency)
    parts: dict[str, Any] = {}
    checks: list[dict[str, Any]] = []
    for name, prompts in phases.items():
        before = len(online.history)
        served = serve(
            target,
            drafter,
            prompts,
            concurrency=concurrency,
            max_new_tokens=max_new_tokens,
            budget=make_budget(budget).start(profile.costs),
            end_ids=sorted(end_ids_of(target)),
            seed=seed,
            listener=online,
        )
        rows = served.stats.rows
        rounds = sum(row.rounds for row in rows)
        parts[name] = {
            "requests": len(prompts),
            "tokens": served.emitted,
            "seconds": served.seconds,
            "tokens_per_s": served.emitted / served.seconds,
            "tau": served.stats.tau,
            "verified_tokens_per_request": sum(row.verified for row in rows) / rounds,
        }
        checks += [{"phase": name, **asdict(state)} for state in online.history[before:]]
    return {"phases": parts, "checks": checks}


def plot_drift(record: dict[str, Any], path: Path) -> None:
    """Draw the window's calibration error over rounds, with and without adapting."""
    figure, axes = empty_plot(6.5, 3.5)
    for name, run in record["runs"].items():
        points = [(c["seen"], 100 * c["ece"]) for c in run["checks"] if c["ece"] == c["ece"]]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    last = list(record["runs"]["watched"]["phases"])[-1]
    begin = next((c["seen"] for c in record["runs"]["watched"]["checks"] if c["phase"] == last), None)
    if begin is not None:
        axes.axvline(begin, color="0.6", linestyle=":")
    axes.set_xlabel("rounds of rows")
    axes.set_ylabel("ECE of the window, %")
    save_plot(figure, axes, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison from the command line; returns 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--drafter", default="smollm2-dspark")
    parser.add_argument("--first", type=Path, required=True, help="prompts of the traffic until the shift")
    parser.add_argument("--then", type=Path, required=True, help="prompts of the traffic after it")
    parser.add_argument("--limit", type=int, default=48, help="prompts of each file")
    parser.add_argument("--budget", default="load-aware")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--window", type=int, default=1000)
    parser.add_argument("--every", type=int, default=250)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plots", type=Path)
    args = parser.parse_args(arguments)
    return run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    files = {path.stem: read_prompts(path, args.limit) for path in (args.first, args.then)}
    target, tokenizer = load_target(args.target, dtype=args.dtype)
    drafter = load_drafter(args.drafter, dtype=args.dtype).bind(target)
    phases = {name: [encode(tokenizer, [c])["input_ids"][0].tolist() for c in rows] for name, rows in files.items()}
    settings = {name: getattr(args, name) for name in ("budget", "concurrency", "max_new_tokens", "window", "every", "seed")}
    runs = {name: shift(target, drafter, phases, adapt=name == "followed", **settings) for name in ("watched", "followed")}
    record = {
        "target": args.target,
        "drafter": args.drafter,
        "dtype": args.dtype,
        "prompts_of_each": args.limit,
        "settings": settings,
        "runs": runs,
        "machine": machine_record(target.device),
    }
    write_record(args.json, record)
    if args.plots is not None:
        plot_drift(record, args.plots / "drift.png")
    for name, run in runs.items():
        for phase, part in run["phases"].items():
            errors = [c["ece"] for c in run["checks"] if c["phase"] == phase]
            shown = f"{100 * errors[-1]:.2f}%" if errors else "-"
            print(f"{name}, {phase}: {part['tokens_per_s']:.1f} tokens/s, tau {part['tau']:.2f}, last ECE {shown}")


if __name__ == "__main__":
    sys.exit(main())
