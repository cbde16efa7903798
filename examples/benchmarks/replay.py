"""Compares budgets without noise: blocks are drafted once at every place of the target's greedy answers, and budgets then play against
these with a cost profile for a clock. No model runs while budgets play.

    python -m examples.benchmarks.replay --prompts gsm8k.jsonl --prompts mt-bench.jsonl --json results/replay.json

With `--costs results/bench.json` the profile is the one that a benchmark recorded, on whatever machine.

Greedy answers do not depend on what is drafted or verified, so every budget finds the same blocks at the same places. What is left out is
what the table of costs leaves out: prompt passes, the budgets' own time, and how far the machine is from its profile. For the last,
load-aware budgets also play with profiles that misjudge tokens or drafts, with online cost estimation and without.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from examples.benchmarks.command import chosen, options, run_command, write_record
from examples.benchmarks.report import number

from hf_dspark.budgets.budget import Budget, Drafts, FinishedRound, LiveRows, Proposal, StaticBudget
from hf_dspark.budgets.cost_model import Costs, PassCosts
from hf_dspark.budgets.load_aware import LoadAwareBudget
from hf_dspark.budgets.named import make_budget
from hf_dspark.decoding.profiler import CostProfile
from hf_dspark.evaluation.load_benchmark import PLAIN, summary
from hf_dspark.evaluation.metrics import common_prefix, machine_record
from hf_dspark.evaluation.prompts import prompt_ids, read_prompts
from hf_dspark.evaluation.serving import Server
from hf_dspark.models.loading import load_drafter, load_target
from hf_dspark.utils.tokens import eos_token_ids


@dataclass(frozen=True)
class Walk:
    """One answer, and what would have been drafted after each of its tokens.

    Attributes:
        prompt (`int`): tokens of the prompt.
        limit (`int`): tokens that the answer might have had.
        accepted (`numpy.ndarray` of shape `(n,)`): of the block after each token but the last, how many tokens the answer goes on with.
        confidence (`numpy.ndarray` of shape `(n, gamma)`): calibrated c_k of each block.
    """

    prompt: int
    limit: int
    accepted: np.ndarray
    confidence: np.ndarray


class _DraftOnly(Budget):
    """Drafts whole blocks and verifies none of them, so that every place of an answer is drafted from."""

    needs_confidence = True

    def plan(self, drafts: Drafts) -> list[int]:
        return [0] * drafts.rows


def record_walks(
    target: Any, drafter: Any, prompts: Sequence[Sequence[int]], *, end_ids: Sequence[int], max_new_tokens: int, concurrency: int = 32
) -> list[Walk]:
    """Decode greedily, one token a round, and keep the block drafted at each. The one place that depends on the decoding loop's steps.

    Args:
        target (`PreTrainedModel`), drafter (`DSparkDrafter`): a pair; the drafter has a confidence head.
        prompts (`list[list[int]]`): token ids.
        end_ids (`list[int]`), max_new_tokens (`int`), concurrency (`int`): of serving.
    Raises:
        ValueError: for a drafter without a confidence head.
    """
    server = Server(target, drafter, prompts, concurrency=concurrency, max_new_tokens=max_new_tokens, budget=_DraftOnly(), end_ids=end_ids)
    draft = server.loop.draft
    blocks: list[list[tuple[list[int], list[float]]]] = [[] for _ in prompts]  # tokens and confidences, of each answer's rounds

    def record(proposal: Proposal) -> Any:
        block = draft(proposal)
        if block.confidence is None:
            raise ValueError("this drafter has no confidence head, so budgets have nothing to go by; train one with a confidence head")
        for request, tokens, confidence in zip(server.loop.state.requests, block.tokens.tolist(), block.confidence.tolist(), strict=True):
            blocks[request].append((tokens, confidence))
        return block

    server.loop.draft = record  # type: ignore[method-assign]
    walks = []
    for prompt, answer, found in zip(prompts, server.run().tokens, blocks, strict=True):
        if found:
            accepted = [common_prefix(tokens, answer[place + 1 :]) for place, (tokens, _) in enumerate(found)]
            walks.append(Walk(len(prompt), max_new_tokens, np.array(accepted), np.array([confidence for _, confidence in found])))
    return walks


@dataclass
class Played:
    """What a budget did: counts of rows and rounds, and seconds by the table of costs."""

    tokens: int = 0
    seconds: float = 0.0
    rounds: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0

    def to_json(self, concurrency: int, budget: str) -> dict[str, Any]:
        """Returns a cell as `hf-dspark bench` has it."""
        return {
            "concurrency": concurrency,
            "budget": budget,
            "tokens_per_s": self.tokens / self.seconds,
            "tau": (self.accepted + self.rounds) / self.rounds,
            "verified_tokens_per_request": self.verified / self.rounds,
            "drafted_tokens_per_request": self.drafted / self.rounds,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }


def play(
    budget: Budget, walks: Sequence[Walk], costs: Costs, concurrency: int, *, requests: int, seed: int = 0, noise: float = 0.0
) -> Played:
    """Let a budget serve answers, so many at a time, in an order of its own for each seed; ends with the last request that joins.

    Args:
        budget (`Budget`): started.
        walks (`list[Walk]`): taken over and over.
        costs (`Costs`): the clock.
        concurrency (`int`): answers in flight; the first ones are of all ages.
        requests (`int`): answers in all, of those that join after the first.
        seed (`int`): of the order.
        noise (`float`): standard deviation of the times of passes that the budget learns from, over the clock's; one in fifty is five times
            as long. Those of drafts are exact.
    """
    random = np.random.default_rng(seed + 1)
    order, gamma = np.random.default_rng(seed).permutation(len(walks)), costs.block_size
    live: list[tuple[int, Walk, int]] = []  # number, answer, place
    done, joined = Played(), 0
    while True:
        while len(live) < concurrency and joined < requests + concurrency:
            walk = walks[order[joined % len(walks)]]
            age = len(walk.accepted) * joined // concurrency if joined < concurrency else 0
            live.append((joined, walk, min(age, len(walk.accepted) - 1)))
            joined += 1
        if len(live) < concurrency:
            return done
        look = LiveRows(
            tuple(number for number, _, _ in live),
            gamma,
            tuple(min(gamma, walk.limit - place - 2) for _, walk, place in live),
            max(walk.prompt + place for _, walk, place in live),
        )
        proposal = Proposal(0) if budget.longest == 0 else budget.propose(look)
        chosen = set(range(concurrency) if proposal.rows is None else proposal.rows)
        drafted = tuple(proposal.length if r in chosen else 0 for r in range(concurrency))
        confidence, plan = None, (0,) * concurrency
        if proposal.length:
            confidence = torch.tensor(np.stack([walk.confidence[place, : proposal.length] for _, walk, place in live]))
            limits = tuple(map(min, drafted, look.room))
            plan = tuple(map(min, budget.plan(Drafts(limits, confidence, look)), limits))
        accepted = tuple(min(n, int(walk.accepted[place])) for n, (_, walk, place) in zip(plan, live, strict=True))
        passes = costs.passes(concurrency, look.context_tokens)
        pass_s = float(passes.verify_s[sum(plan)] + passes.wide_s[max(plan)])
        draft_s = costs.draft_s(sum(n > 0 for n in drafted), proposal.length)
        done.seconds += pass_s + draft_s
        factor = 1 + noise * random.normal() + (4 if noise and random.random() < 0.02 else 0)
        done.rounds += concurrency
        done.tokens += concurrency + sum(accepted)
        done.drafted, done.verified, done.accepted = (
            total + sum(counts)
            for total, counts in zip((done.drafted, done.verified, done.accepted), (drafted, plan, accepted), strict=True)
        )
        budget.learn(
            FinishedRound(
                look.requests, drafted, plan, accepted, plan, confidence, seconds=max(pass_s * factor, 0.0) + draft_s, draft_seconds=draft_s
            )
        )
        live = [(number, walk, place + 1 + n) for (number, walk, place), n in zip(live, accepted, strict=True)]
        live = [row for row in live if row[2] < len(row[1].accepted)]


class Misjudged(Costs):
    """A table by which drafted tokens and drafts cost so many times what they do in another one."""

    def __init__(self, costs: Costs, tokens: float, drafts: float) -> None:
        super().__init__(costs.rows, costs.block_size)
        self.tokens, self.drafts = tokens, drafts

    def passes(self, rows: int, context_tokens: int = 0) -> PassCosts:
        return super().passes(rows, context_tokens).scaled(self.tokens)

    def draft_s(self, rows: int, length: int) -> float:
        return super().draft_s(rows, length) * self.drafts


def main(arguments: Sequence[str] | None = None) -> int:
    """Record and play from the command line; returns 2 for bad input."""
    # So many requests each budget serves at each concurrency, in so many orders, each from a seed of its own.
    parser = options(__doc__, dtype="fast", prompts=True, limit=48, max_new_tokens=128, requests=96, orders=4)
    parser.add_argument("--concurrency", default="1,2,4,8,16,32")
    parser.add_argument("--budgets", default="plain,full,static:1,static:2,static:4,threshold:0.5,load-aware,load-aware-lag2")
    parser.add_argument("--costs", type=Path, help="a result of `hf-dspark bench` whose profile to take; measured here by default")
    parser.add_argument("--errors", default="0.3/1,1/1,2.5/1,1/0.4", help="what a profile takes tokens/drafts for, over what they cost")
    parser.add_argument("--noise", type=float, default=0.1, help="of the times that online cost estimation reads")
    args = parser.parse_args(arguments)
    return run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    sizes, names = [int(n) for n in args.concurrency.split(",")], args.budgets.split(",")
    budgets = {name: StaticBudget(0) if name == PLAIN else make_budget(name) for name in names}
    files = [read_prompts(path, args.limit) for path in args.prompts]
    recorded = None if args.costs is None else _recorded_profile(args.costs)
    errors = [tuple(map(float, pair.split("/"))) for pair in args.errors.split(",") if pair]
    target, tokenizer = load_target(args.target, dtype=args.dtype)
    drafter = load_drafter(args.drafter, dtype=args.dtype).bind(target)
    prompts = [ids for rows in files for ids in prompt_ids(tokenizer, rows)]
    profile, origin = recorded or (CostProfile.cached(target, drafter, rows=max(sizes)), machine_record(target.device))
    costs = profile.costs()
    if costs.block_size != drafter.config.block_size or max(costs.rows) < max(sizes):
        raise ValueError(
            f"The profile is of blocks of {costs.block_size} tokens and up to {max(costs.rows)} rows; wanted: {drafter.config.block_size} "
            f"and {max(sizes)}. Take another --costs, a smaller --concurrency, or measure here."
        )
    walks = record_walks(target, drafter, prompts, end_ids=eos_token_ids(target), max_new_tokens=args.max_new_tokens)

    def cell(name: str, budget: Budget, believed: Costs, size: int, *, learn: bool = False, noise: float = 0.0) -> dict[str, Any]:
        turns = [
            play(
                budget.start(believed, learn_costs=learn), walks, costs, size,
                requests=args.requests, seed=args.seed + turn, noise=noise,
            )
            for turn in range(args.orders)
        ]  # fmt: skip
        whole = Played(*(sum(values) for values in zip(*(vars(turn).values() for turn in turns), strict=True)))
        each = {"turn_tokens": [turn.tokens for turn in turns], "turn_seconds": [turn.seconds for turn in turns]}
        return whole.to_json(size, name) | each

    cells = [cell(name, budget, costs, size) for size in sizes for name, budget in budgets.items()]
    found = summary(cells)
    rates_of = {(c["concurrency"], c["budget"]): c["tokens_per_s"] for c in cells}
    best = {row["concurrency"]: rates_of[row["concurrency"], row["best_fixed"]] for row in found if "best_fixed" in row}
    misled = []
    for tokens, drafts in errors if best else ():
        believed = Misjudged(costs, tokens, drafts)
        for name, budget in budgets.items():
            for learn in (False, True) if isinstance(budget, LoadAwareBudget) else ():
                rates = {size: cell(name, budget, believed, size, learn=learn, noise=args.noise)["tokens_per_s"] for size in sizes}
                ratios = [rates[size] / best[size] for size in sizes]
                wrong = {"tokens_taken_for": tokens, "drafts_taken_for": drafts, "budget": name, "follows_costs": learn}
                misled.append(wrong | {"over_best_fixed": ratios})
    record = {
        "target": args.target,
        "drafter": args.drafter,
        "prompt_files": [path.name for path in args.prompts],
        "cells": cells,
        "summary": found,
        "misjudged": misled,
        "settings": chosen(args, "limit", "max_new_tokens", "requests", "orders", "dtype", "seed", "noise")
        | {"concurrency": sizes, "budgets": names, "answers": len(walks), "places": sum(len(walk.accepted) for walk in walks)},
        "costs": {mode: {str(r): table.to_json() for r, table in rows.items()} for mode, rows in profile.tables.items()},
        "costs_file": None if args.costs is None else args.costs.name,
        "costs_machine": origin,
        "machine": machine_record(target.device),
    }
    write_record(args.json, record)
    for one in found:
        ratio = number(one.get("load_aware_over_best_fixed"), 3)
        print(f"{one['concurrency']} in flight: {one.get('best_load_aware')} over {one.get('best_fixed')} {ratio}")
    for row in misled:
        how = "online costs" if row["follows_costs"] else "fixed costs"
        ratios = " ".join(number(ratio, 3) for ratio in row["over_best_fixed"])
        taken = f"tokens taken for {row['tokens_taken_for']:g}, drafts for {row['drafts_taken_for']:g} of their cost"
        print(f"{taken}, {row['budget']}, {how}: {ratios}")


def _recorded_profile(path: Path) -> tuple[CostProfile, dict[str, Any]]:
    """The profile in a result of `hf-dspark bench`, and the machine that it is of.

    Raises:
        ValueError: if there is none.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return CostProfile.from_json(record["profile"]), record["machine"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no cost profile ({type(error).__name__}: {error}); allowed: what `hf-dspark bench --json` wrote with a budget "
            "that reads costs among its contenders. Leave --costs out to measure here."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
