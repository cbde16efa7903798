"""How many kernels an eager round launches, by stage: the same on every device.

    python -m examples.benchmarks.launches --rows 1,8 --json launches.json

A launch is a call of aten that is no view and does not hand back what it was given. `rest` is verdict, commit and whatever else is neither
draft nor pass; sampled without warpers.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import torch
from examples.benchmarks.command import chosen, options, run_command, write_record
from examples.benchmarks.rounds import counted_rounds, inputs_of

import hf_dspark
from hf_dspark.budgets.budget import Budget
from hf_dspark.budgets.cost_model import prior_costs
from hf_dspark.budgets.load_aware import LaggedLoadAwareBudget
from hf_dspark.evaluation.metrics import machine_record
from hf_dspark.models.loading import load_drafter, load_target


def launches(
    target: Any, drafter: Any, inputs: dict[str, torch.Tensor], args: Any, budget: str | Budget, *, sample: bool
) -> dict[str, Any]:
    """Medians over the rounds of a call."""
    how = {"do_sample": sample, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    with counted_rounds() as rounds:
        hf_dspark.generate(
            target,
            drafter,
            **inputs,
            **how,
            seed=args.seed,
            budget=budget,
            max_new_tokens=args.max_new_tokens,
            eos_token_id=[target.config.vocab_size],
        )
    stages = {stage: statistics.median(getattr(one, stage) for one in rounds) for stage in ("draft", "verify", "rest", "waits")}
    return {"rows": len(inputs["input_ids"]), "sample": sample, "budget": str(budget), "rounds": len(rounds), **stages}


def main() -> int:
    parser = options(__doc__, dtype="fp32", max_new_tokens=64)
    parser.add_argument("--rows", default="1,8", help="batch sizes")
    args = parser.parse_args()

    def run() -> None:
        target, tokenizer = load_target(args.target, dtype=args.dtype)
        drafter = load_drafter(args.drafter, dtype=args.dtype)
        args.device = target.device
        lagged = LaggedLoadAwareBudget(prior_costs(drafter.config.block_size, 0.1, "cpu"), learn_costs=False)  # decides without a clock
        found = [
            launches(target, drafter, inputs_of(args, tokenizer, int(rows)), args, budget, sample=sample)
            for rows in args.rows.split(",")
            for sample, budget in ((False, "full"), (False, lagged), (True, "full"))
        ]
        settings = chosen(args, "target", "drafter", "dtype", "seed", "max_new_tokens")
        write_record(args.json, {"settings": settings, "calls": found, "machine": machine_record(target.device)})
        for one in found:
            print(one)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
