"""Measures budgets under load: throughput and speed per user with N requests in flight.

At each concurrency every contender is a server that stays running, on the same prompts in the same order. All advance side by side, a
few tokens each, in an order drawn anew each time; a turn is over when each has emitted as many, so that greedy contenders write the same
texts in it. A machine whose speed swings within seconds then slows all alike.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_dspark.budgets.budget import Budget, StaticBudget
from hf_dspark.budgets.cost_model import Costs
from hf_dspark.budgets.named import make_budget
from hf_dspark.calibration.online import OnlineCalibration
from hf_dspark.decoding.kept_graphs import compiled_graphs
from hf_dspark.decoding.profiler import CostProfile, costs_at_hand
from hf_dspark.evaluation.metrics import AcceptanceCounts, Throughput, machine_record, round_times
from hf_dspark.evaluation.serving import Server
from hf_dspark.evaluation.speed import Bench
from hf_dspark.utils.graphs import Graphs
from hf_dspark.utils.tokens import eos_token_ids

if TYPE_CHECKING:
    from hf_dspark.decoding.statistics import DecodingStats

# Contenders that are not budgets: this loop without drafting, transformers' batched call, and its prompt lookup.
PLAIN, GENERATE, LOOKUP = "plain", "generate", "prompt-lookup"
# Behind a budget's name: nothing (calibration and load-aware costs learn online), `@fixed` (neither does), `@raw` (uncalibrated).
VARIANTS = ("", "@fixed", "@raw")
_CALLS_EVERY = 4  # turns between transformers' own calls, which last longer than a turn


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Args:
        name (`str`): a budget's name, with `@fixed` or `@raw` behind it or nothing, or `plain`, `generate`, `prompt-lookup`.
    Raises:
        ValueError: for an unknown name.
    """

    name: str

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"Unknown variant {self.variant!r} in {self.name!r}; allowed are @fixed, @raw, or nothing.")
        try:
            needs_confidence = self.budget.needs_confidence
        except ValueError as error:
            raise ValueError(f"{error} Also allowed here: {PLAIN!r}, {GENERATE!r}, {LOOKUP!r}.") from None
        if self.variant and not needs_confidence:
            raise ValueError(f"{self.name!r} reads no confidences; leave {self.variant} out.")

    @property
    def variant(self) -> str:
        """`@fixed`, `@raw` or nothing."""
        return self.name[len(self.name.split("@")[0]) :]

    @property
    def budget(self) -> Budget:
        """Its budget; one that drafts nothing where it has none."""
        return make_budget(self.name.split("@")[0]) if self.drafts else StaticBudget(0)

    @property
    def drafts(self) -> bool:
        """Whether this package's drafter takes part."""
        return self.name not in (PLAIN, GENERATE, LOOKUP)

    @property
    def serves(self) -> bool:
        """Whether this package's loop runs, rather than a call of transformers."""
        return self.name not in (GENERATE, LOOKUP)


@dataclass(frozen=True)
class Load:
    """What all contenders have in common.

    Args:
        bench: target, drafter and settings; those in flight when the clock starts are of all ages.
        prompts: token ids; taken in order, over and over.
        seconds: of one turn of a contender of median speed: a first turn of so many seconds, thrown away, sets how many tokens each
            contender emits in the others.
        slice_seconds: how long a contender of median speed advances before the next one does, within a turn; a round at least.
        repeats: turns of each contender at each concurrency. `generate` and `prompt-lookup` take every fourth, for `seconds` at least.
    """

    bench: Bench
    prompts: Sequence[Sequence[int]]
    seconds: float = 0.5
    slice_seconds: float = 0.25
    repeats: int = 24

    def settings(self) -> dict[str, Any]:
        """What the result file says of it."""
        of_bench = self.bench.settings()
        names = ("temperature", "top_p", "verification", "max_new_tokens", "seed", "compiled", "target_dtype", "drafter_dtype")
        return {
            **{name: of_bench[name] for name in names},
            **{name: getattr(self, name) for name in ("seconds", "slice_seconds", "repeats")},
            "turns_end_by": "tokens",
            "prompts": len(self.prompts),
            "calibrated": self.bench.drafter.config.confidence_temperatures is not None,
        }


class Cell:
    """One contender at one concurrency: its server, which goes on from turn to turn, its turns, and the counts of all of them."""

    def __init__(self, load: Load, contender: Contender, concurrency: int, costs: Costs) -> None:
        self.load, self.contender, self.concurrency, self.costs = load, contender, concurrency, costs
        self.turns: list[Throughput] = []
        self.forget()
        if contender.serves:
            self.server, self.goal = self._server(), 0

    def forget(self) -> None:
        """Count from here on."""
        self.turn, self.users = Throughput(), list[float]()
        self.stats: list[DecodingStats] = []

    def advance(self, tokens: int) -> None:
        """Emit so many tokens beyond the goal so far; nothing where they are out already. Begins anew when requests are used up."""
        self.goal += tokens
        while self.server.emitted < self.goal:
            served = self.server.run(steady=True, tokens=self.goal)
            self.turn += Throughput(served.emitted, served.seconds)
            self.stats.append(served.stats)
            if self.server.exhausted:
                self.users += self.server.speeds()
                self.goal = max(self.goal - self.server.emitted, 0)
                self.server = self._server()

    def call(self, number: int) -> None:
        """Use transformers' own calls: batch after batch until the time of a turn is over."""
        bench, method = self.load.bench, "prompt_lookup" if self.contender.name == LOOKUP else "plain"
        queue = islice(cycle(self.load.prompts), 7 * number, None)
        while self.turn.seconds < self.load.seconds:
            rows = {"input_ids": list(islice(queue, self.concurrency))}
            inputs = bench.tokenizer.pad(rows, padding_side="left", return_attention_mask=True, return_tensors="pt")
            run = bench.run(method, inputs.to(bench.target.device))
            self.users += [len(row) / run.seconds for row in run.tokens]
            self.turn += run.throughput

    def end_turn(self) -> None:
        """Keep the turn, if anything was done in it."""
        if self.turn.tokens:
            self.turns.append(self.turn)
            self.turn = Throughput()

    def _server(self) -> Server:
        """With requests for about all turns; those in flight at first are of all ages."""
        load, contender, bench, concurrency = self.load, self.contender, self.load.bench, self.concurrency
        requests = concurrency + 8 + int(max(20, 4 * concurrency) * load.seconds * (load.repeats + 2))
        ages = [max(bench.max_new_tokens * (i + 1) // concurrency, 1) for i in range(concurrency)]
        online = None
        if contender.budget.needs_confidence and contender.variant != "@fixed":
            online = OnlineCalibration(adapt=contender.variant != "@raw")
            online.check(bench.drafter.config)
            if contender.variant == "@raw":
                online.temperatures = [1.0] * bench.drafter.config.block_size
        longest = max(map(len, load.prompts)) + bench.max_new_tokens + bench.drafter.config.block_size
        graphs = compiled_graphs(bench.target, bench.drafter, bench.compile, bench.target.device, longest)
        if graphs is not None and not graphs.symbolic:
            graphs = Graphs(graphs.device)  # of its own: contenders take turns while their rows live
        return Server(
            bench.target,
            bench.drafter if contender.drafts else None,
            list(islice(cycle(load.prompts), requests)),
            concurrency=concurrency,
            max_new_tokens=[*ages, *[bench.max_new_tokens] * (requests - concurrency)],
            budget=contender.budget.start(self.costs, learn_costs=contender.variant != "@fixed"),
            end_ids=eos_token_ids(bench.target),
            **asdict(bench.sampling),
            seed=bench.seed,
            round_callback=online,
            verification=bench.verification,
            graphs=graphs,
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the cell of the result file: figures over all turns, and each turn."""
        users = sorted([*self.users, *(self.server.speeds() if self.contender.serves else [])])
        counts = AcceptanceCounts.of(row for stats in self.stats for row in stats.rows)
        whole = sum(self.turns, start=Throughput())
        rates = [turn.tokens / turn.seconds for turn in self.turns]
        parts = {part.removesuffix("_s"): seconds or 0.0 for part, seconds in round_times(self.stats).items() if part.endswith("_s")}
        total = sum(parts.values())
        return {
            "concurrency": self.concurrency,
            "budget": self.contender.name,
            "tokens_per_s": whole.tokens_per_s,
            "tokens_per_s_lowest": min(rates),
            "tokens_per_s_highest": max(rates),
            "user_tokens_per_s_median": statistics.median(users) if users else None,
            "user_tokens_per_s_p5": users[int(0.05 * len(users))] if users else None,
            "tau": counts.tau,
            "verified_tokens_per_request": counts.verified / counts.rounds if counts.rounds else None,
            "drafted_tokens_per_request": counts.drafted / counts.rounds if counts.rounds else None,
            "acceptance_rate": counts.acceptance_rate,
            "time_shares": {part: seconds / total for part, seconds in parts.items()} if total else None,
            "tokens": whole.tokens,
            "seconds": whole.seconds,
            "turn_tokens": [turn.tokens for turn in self.turns],
            "turn_seconds": [turn.seconds for turn in self.turns],
        }


def _first_turn(load: Load, cells: Sequence[Cell], concurrency: int) -> tuple[int, int]:
    """Run every server for some time, then bring all to the same place. Returns the tokens of a turn, those that one of median speed
    emitted, and in how many slices to emit them.
    """
    for cell in cells:
        cell.server.run(steady=True, seconds=load.seconds)
    emitted = [cell.server.emitted for cell in cells] or [0]
    for cell in cells:
        cell.advance(max(emitted))
        cell.forget()
    # A server's first tokens are those of prompts, which all began at once: they belong to no turn. And a turn holds rounds enough to bring
    # contenders with any length of rounds to about the same place.
    given = max(int(statistics.median(emitted)) - concurrency, 1)
    quota = max(given, 2 * concurrency * (load.bench.drafter.config.block_size + 1))
    return quota, max(1, quota // max(round(given * load.slice_seconds / load.seconds), concurrency))


def _measure(load: Load, cells: Sequence[Cell], concurrency: int, shuffle: random.Random, on_turn: Callable[[], None]) -> None:
    """All turns of one concurrency: so many tokens of every server, in slices, in an order drawn anew for each slice."""
    serving = [cell for cell in cells if cell.contender.serves]
    quota, slices = _first_turn(load, serving, concurrency)
    on_turn()
    for turn in range(load.repeats):
        for part in range(slices):
            for cell in shuffle.sample(serving, len(serving)):
                cell.advance(quota * (part + 1) // slices - quota * part // slices)
        for cell in cells:
            if not cell.contender.serves and turn % _CALLS_EVERY == 0:
                cell.call(turn)
            cell.end_turn()
        on_turn()


def bench(
    load: Load,
    *,
    concurrencies: Sequence[int],
    budgets: Sequence[str],
    costs: Costs | None = None,
    on_turn: Callable[[], None] = lambda: None,
    on_concurrency: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Measures contenders at several concurrencies.

    Args:
        load: target, drafter, prompts and settings.
        concurrencies: requests in flight.
        budgets: contenders, see `Contender`.
        costs: what rounds cost; by default the stored profile, with what is missing in it measured now.
        on_turn: called after each turn of all contenders, `repeats + 1` times a concurrency.
        on_concurrency: called after each concurrency with the record so far.
    Returns:
        `cells`, `summary`, and all that is needed to repeat it.
    """
    contenders, sample = [Contender(name) for name in budgets], not load.bench.sampling.greedy
    target, drafter = load.bench.target, load.bench.drafter
    if any(c.name == LOOKUP for c in contenders) and 1 not in concurrencies:
        raise ValueError(f"{LOOKUP} takes one request at a time; got concurrencies {list(concurrencies)}. Add 1, or leave it out.")
    profile = None
    if costs is None and any(c.budget.needs_confidence for c in contenders):
        measured = CostProfile.cached(target, drafter, rows=max(concurrencies), sample=sample, compiled=load.bench.compile)
        costs, profile = measured.costs(sample), measured.to_json()
        profile["key"]["target"] = Path(profile["key"]["target"] or "").name  # no folders of this machine
    costs = costs or costs_at_hand(target, drafter, sample, compiled=load.bench.compile)
    record: dict[str, Any] = {
        "cells": [],
        "summary": [],
        "settings": {"concurrency": list(concurrencies), "budgets": list(budgets), **load.settings()},
        "profile": profile,
        "machine": machine_record(target.device),
    }
    shuffle = random.Random(load.bench.seed)
    for concurrency in concurrencies:
        cells = [Cell(load, c, concurrency, costs) for c in contenders if c.name != LOOKUP or concurrency == 1]
        _measure(load, cells, concurrency, shuffle, on_turn)
        record["cells"] += [cell.to_json() for cell in cells]
        record["summary"] = summary(record["cells"])
        on_concurrency(record)
    return record


def summary(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each concurrency: the best fixed choice (plain, full, static), the best load-aware budget, and the ratios between them.

    Ratios are of tokens a second over all turns, with the interval in which 90% of them lie when turns are drawn anew with replacement,
    both contenders' together (bootstrap); no interval for cells without turns, or with other numbers of them.
    """
    out = []
    for concurrency in sorted({cell["concurrency"] for cell in cells}):
        rates = {cell["budget"]: cell for cell in cells if cell["concurrency"] == concurrency}
        fixed = [name for name in rates if name in (PLAIN, "full") or name.startswith("static:")]
        aware = [name for name in rates if name.startswith("load-aware") and "@" not in name]
        row: dict[str, Any] = {"concurrency": concurrency}
        if fixed:
            row["best_fixed"] = max(fixed, key=lambda name: rates[name]["tokens_per_s"])
        if aware:
            row["best_load_aware"] = max(aware, key=lambda name: rates[name]["tokens_per_s"])
            chosen = rates[row["best_load_aware"]]
            for what, name in {"best_fixed": row.get("best_fixed"), **{name: name for name in (PLAIN, "full", GENERATE, LOOKUP)}}.items():
                if name in rates:
                    row[f"load_aware_over_{what}"] = chosen["tokens_per_s"] / rates[name]["tokens_per_s"]
                    row[f"load_aware_over_{what}_interval"] = _interval(chosen, rates[name])
        out.append(row)
    return out


def _interval(one: Mapping[str, Any], other: Mapping[str, Any], draws: int = 2000) -> list[float] | None:
    """Of the ratio of two contenders' tokens a second, from the 5th to the 95th percentile of draws of turns."""
    turns = [np.array([cell.get("turn_tokens", []), cell.get("turn_seconds", [])]) for cell in (one, other)]
    count = turns[0].shape[1]
    if count != turns[1].shape[1] or count < 2:
        return None
    drawn = np.random.default_rng(0).integers(0, count, (draws, count))
    (tokens, seconds), (other_tokens, other_seconds) = (both[:, drawn].sum(axis=-1) for both in turns)
    low, high = np.quantile(tokens / seconds / (other_tokens / other_seconds), [0.05, 0.95])
    return [float(low), float(high)]
