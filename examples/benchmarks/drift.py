"""What online calibration does when traffic changes: one kind of prompts, then another, with and without it.

Both runs decode the same requests in the same order; one only watches its confidences (`watched`), one corrects them (`adapted`).

    python -m examples.benchmarks.drift --first gsm8k.jsonl --then mt-bench.jsonl --json drift.json
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from examples.benchmarks.command import chosen, options, run_command, write_record
from transformers import PreTrainedModel

from hf_dspark.budgets.cost_model import Costs
from hf_dspark.budgets.named import make_budget
from hf_dspark.calibration.online import OnlineCalibration
from hf_dspark.decoding.profiler import CostProfile
from hf_dspark.evaluation.metrics import AcceptanceCounts, machine_record
from hf_dspark.evaluation.prompts import prompt_ids, read_prompts
from hf_dspark.evaluation.serving import serve
from hf_dspark.models.loading import load_drafter, load_target
from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.utils.tokens import eos_token_ids


def shift(
    target: PreTrainedModel,
    drafter: DSparkDrafter,
    phases: Mapping[str, Sequence[Sequence[int]]],
    online: OnlineCalibration,
    costs: Costs,
    *,
    budget: str = "load-aware",
    concurrency: int = 4,
    max_new_tokens: int = 128,
    seed: int = 0,
) -> dict[str, Any]:
    """Serve the phases one after the other with one calibration over all.

    Returns:
        for each phase its throughput, tau and verified tokens, and the checks of the calibration with the phase they fell into.
    """
    online.check(drafter.config)
    parts: dict[str, Any] = {}
    checks: list[dict[str, Any]] = []
    for name, prompts in phases.items():
        before = len(online.history)
        served = serve(
            target, drafter, prompts, concurrency=concurrency, max_new_tokens=max_new_tokens, end_ids=eos_token_ids(target), seed=seed,
            budget=make_budget(budget).start(costs, learn_costs=False), round_callback=online,
        )  # fmt: skip
        counts = AcceptanceCounts.of(served.stats.rows)
        parts[name] = {
            "requests": len(prompts),
            "tokens": served.emitted,
            "tokens_per_s": served.emitted / served.seconds,
            "tau": counts.tau,
            "verified_tokens_per_request": counts.verified / counts.rounds,
        }
        checks += [{"phase": name, **asdict(state)} for state in online.history[before:]]
    return {"phases": parts, "checks": checks}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison from the command line; returns 2 for bad input."""
    parser = options(__doc__, limit=48, concurrency=4, max_new_tokens=128, window=1000)
    parser.add_argument("--first", type=Path, required=True, help="prompts of the traffic until the shift")
    parser.add_argument("--then", type=Path, required=True, help="prompts of the traffic after it")
    args = parser.parse_args(arguments)

    def run() -> None:
        target, tokenizer = load_target(args.target, dtype=args.dtype)
        drafter = load_drafter(args.drafter, dtype=args.dtype).bind(target)
        phases = {path.stem: prompt_ids(tokenizer, read_prompts(path, args.limit)) for path in (args.first, args.then)}
        costs = CostProfile.cached(target, drafter, rows=args.concurrency).costs()
        settings = chosen(args, "concurrency", "max_new_tokens", "seed")
        runs = {}
        for name in ("watched", "adapted"):
            online = OnlineCalibration(window=args.window, adapt=name == "adapted")
            runs[name] = shift(target, drafter, phases, online, costs, **settings)
            for phase, part in runs[name]["phases"].items():
                errors = [check["ece"] for check in runs[name]["checks"] if check["phase"] == phase]
                print(f"{name}, {phase}: {part['tokens_per_s']:.1f} tokens/s, tau {part['tau']:.2f}, ECE {errors[-1:]}")
        about = chosen(args, "target", "drafter", "dtype", "limit", "window")
        write_record(args.json, {**about, "settings": settings, "runs": runs, "machine": machine_record(target.device)})

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
