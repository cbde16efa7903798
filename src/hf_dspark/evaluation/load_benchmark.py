"""Measures budgets under load: throughput and speed per user with N requests in flight.

At each concurrency every contender is a server that stays running, on the same prompts in the same order. All advance side by side, a
few tokens each, in an order drawn anew each time; a turn is over when each has emitted as many, so that greedy contenders write the same
texts in it. A machine whose speed swings within seconds then slows all alike.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_dspark.budgets.budget import StaticBudget
from hf_dspark.budgets.cost_model import Costs
from hf_dspark.budgets.named import make_budget
from hf_dspark.calibration.online import OnlineCalibration
from hf_dspark.decoding.profiler import CostProfile, costs_at_hand
from hf_dspark.decoding.verify import DEFAULT_VERIFICATION, check_verification
from hf_dspark.evaluation.metrics import AcceptanceCounts, Throughput, machine_record, round_times
from hf_dspark.evaluation.prompts import left_padded
from hf_dspark.evaluation.serving import Served, Server
from hf_dspark.evaluation.speed import PROMPT_LOOKUP_TOKENS, Sampling, new_tokens, synchronize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_dspark.decoding.statistics import DecodingStats
    from hf_dspark.models.modeling_dspark import DSparkDrafter

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
        if not self.drafts:
            return
        if self.variant not in VARIANTS:
            raise ValueError(f"Unknown variant {self.variant!r} of budget {self.budget!r}; allowed are @fixed, @raw, or nothing.")
        try:
            budget = make_budget(self.budget)
        except ValueError as error:
            raise ValueError(f"{error} Also allowed here: {PLAIN!r}, {GENERATE!r}, {LOOKUP!r}.") from None
        if self.variant and not budget.needs_confidence:
            raise ValueError(f"{self.name!r}: {self.budget!r} reads no confidences; write {self.budget!r}.")

    @property
    def budget(self) -> str:
        """The budget's name."""
        return self.name.split("@")[0]

    @property
    def variant(self) -> str:
        """`@fixed`, `@raw` or nothing."""
        return self.name[len(self.budget) :]

    @property
    def drafts(self) -> bool:
        """Whether this package's drafter takes part."""
        return self.name not in (PLAIN, GENERATE, LOOKUP)

    @property
    def serves(self) -> bool:
        """Whether this package's loop runs, rather than a call of transformers."""
        return self.name not in (GENERATE, LOOKUP)

    @property
    def needs_confidence(self) -> bool:
        """Whether its budget reads confidences."""
        return self.drafts and make_budget(self.budget).needs_confidence


@dataclass
class _Cell:
    """One contender at one concurrency: its turns, and the counts of all of them."""

    turns: list[Throughput] = field(default_factory=list)
    users: list[float] = field(default_factory=list)
    stats: list[DecodingStats] = field(default_factory=list)

    def add(self, runs: Sequence[Served]) -> None:
        """Count one turn of a server, in one run or several."""
        self.turns.append(sum((Throughput(run.emitted, run.seconds) for run in runs), start=Throughput()))
        self.stats += [run.stats for run in runs]

    def to_json(self, concurrency: int, name: str) -> dict[str, Any]:
        """Returns the cell of the result file: figures over all turns, and each turn."""
        users, counts = sorted(self.users), AcceptanceCounts.sum(map(AcceptanceCounts.of, self.stats))
        whole = sum(self.turns, start=Throughput())
        rates = [turn.tokens / turn.seconds for turn in self.turns]
        parts = {part.removesuffix("_s"): seconds or 0.0 for part, seconds in round_times(self.stats).items() if part.endswith("_s")}
        total = sum(parts.values())
        return {
            "concurrency": concurrency,
            "budget": name,
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


@dataclass(frozen=True)
class Load:
    """What all contenders have in common.

    Args:
        target, drafter: a pair.
        prompts: token ids; taken in order, over and over.
        end_ids, pad_id: of the target.
        sampling: greedy by default.
        max_new_tokens: of a request; those in flight when the clock starts are of all ages.
        seconds: of one turn of a contender of median speed: a first turn of so many seconds, thrown away, sets how many tokens each
            contender emits in the others.
        slice_seconds: how long a contender of median speed advances before the next one does, within a turn; a round at least.
        repeats: turns of each contender at each concurrency. `generate` and `prompt-lookup` take every fourth, for `seconds` at least.
        seed: of draws.
        verification: how drawn tokens are verified, `"block"` or `"token"`.
    """

    target: PreTrainedModel
    drafter: DSparkDrafter
    prompts: Sequence[Sequence[int]]
    end_ids: Sequence[int]
    pad_id: int
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 128
    seconds: float = 0.5
    slice_seconds: float = 0.25
    repeats: int = 24
    seed: int = 0
    verification: str = DEFAULT_VERIFICATION

    def __post_init__(self) -> None:
        check_verification(self.verification)

    def settings(self) -> dict[str, Any]:
        """What the result file says of it."""
        return {
            **asdict(self.sampling),
            **{name: getattr(self, name) for name in ("verification", "max_new_tokens", "seconds", "slice_seconds", "repeats", "seed")},
            "turns_end_by": "tokens",
            "prompts": len(self.prompts),
            "target_dtype": str(self.target.dtype).removeprefix("torch."),
            "drafter_dtype": str(self.drafter.dtype).removeprefix("torch."),
            "calibrated": self.drafter.config.confidence_temperatures is not None,
        }

    def server(self, contender: Contender, concurrency: int, costs: Costs) -> Server:
        """A contender with requests for about all turns; those in flight at first are of all ages."""
        requests = concurrency + 8 + int(max(20, 4 * concurrency) * self.seconds * (self.repeats + 2))
        ages = [max(self.max_new_tokens * (i + 1) // concurrency, 1) for i in range(concurrency)]
        budget = make_budget(contender.budget) if contender.drafts else StaticBudget(0)
        return Server(
            self.target,
            self.drafter if contender.drafts else None,
            list(islice(cycle(self.prompts), requests)),
            concurrency=concurrency,
            max_new_tokens=[*ages, *[self.max_new_tokens] * (requests - concurrency)],
            budget=budget.start(costs, learn_costs=contender.variant != "@fixed"),
            end_ids=self.end_ids,
            **asdict(self.sampling),
            seed=self.seed,
            round_callback=self._callback(contender),
            verification=self.verification,
        )

    def _callback(self, contender: Contender) -> OnlineCalibration | None:
        if not contender.needs_confidence or contender.variant == "@fixed":
            return None
        online = OnlineCalibration(adapt=contender.variant != "@raw")
        online.check(self.drafter.config)
        if contender.variant == "@raw":
            online.temperatures = [1.0] * self.drafter.config.block_size
        return online

    def call(self, contender: Contender, concurrency: int, turn: int, cell: _Cell) -> None:
        """One turn of transformers' own calls: batch after batch until the time is over."""
        queue = islice(cycle(self.prompts), 7 * turn, None)
        options = self.sampling.options() | {"max_new_tokens": self.max_new_tokens, "pad_token_id": self.pad_id}
        if contender.name == LOOKUP:
            options["prompt_lookup_num_tokens"] = PROMPT_LOOKUP_TOKENS
        torch.manual_seed(self.seed)
        done = Throughput()
        while done.seconds < self.seconds:
            inputs = left_padded(list(islice(queue, concurrency)), self.pad_id, self.target.device)
            begin = time.perf_counter()
            output = self.target.generate(**inputs, **options)
            synchronize(self.target.device)
            took = time.perf_counter() - begin
            counts = [len(row) for row in new_tokens(output, inputs["input_ids"].shape[1], self.end_ids)]
            cell.users += [count / took for count in counts]
            done += Throughput(sum(counts), took)
        cell.turns.append(done)


class Running:
    """A contender's server at one concurrency, from turn to turn; begins anew when its requests are used up."""

    def __init__(self, make: Callable[[], Server]) -> None:
        self._make = make
        self.server, self.goal = make(), 0

    def advance(self, tokens: int, cell: _Cell) -> list[Served]:
        """Emit so many tokens beyond the goal so far; nothing where they are out already."""
        self.goal += tokens
        runs = []
        while self.server.emitted < self.goal:
            runs.append(self.server.run(steady=True, tokens=self.goal))
            if self.server.exhausted:
                cell.users += self.server.speeds()
                self.goal = max(self.goal - self.server.emitted, 0)
                self.server = self._make()
        return runs


def _first_turn(load: Load, running: Sequence[Running], concurrency: int) -> tuple[int, int]:
    """Run every contender for some time, then bring all to the same place. Returns the tokens of a turn, those that one of median speed
    emitted, and in how many slices to emit them.
    """
    for run in running:
        run.server.run(steady=True, seconds=load.seconds)
    emitted = [run.server.emitted for run in running]
    for run in running:
        run.advance(max(emitted), _Cell())
    # A server's first tokens are those of prompts, which all began at once: they belong to no turn. And a turn holds rounds enough to bring
    # contenders with any length of rounds to about the same place.
    given = max(int(statistics.median(emitted)) - concurrency, 1)
    quota = max(given, 2 * concurrency * (load.drafter.config.block_size + 1))
    return quota, max(1, quota // max(round(given * load.slice_seconds / load.seconds), concurrency))


def _turn(running: Sequence[tuple[Running, _Cell]], quota: int, slices: int, shuffle: random.Random) -> None:
    """So many tokens of every contender, in slices, into its cell; in an order drawn anew for each slice."""
    taken: list[list[Served]] = [[] for _ in running]
    for part in range(slices):
        tokens = quota * (part + 1) // slices - quota * part // slices
        for index in shuffle.sample(range(len(running)), len(running)):
            run, cell = running[index]
            taken[index] += run.advance(tokens, cell)
    for (_, cell), served in zip(running, taken, strict=True):
        cell.add(served)


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
    contenders, sample = [Contender(name) for name in budgets], not load.sampling.greedy
    if any(c.name == LOOKUP for c in contenders) and 1 not in concurrencies:
        raise ValueError(f"{LOOKUP} takes one request at a time; got concurrencies {list(concurrencies)}. Add 1, or leave it out.")
    profile = None
    if costs is None and any(c.needs_confidence for c in contenders):
        measured = CostProfile.cached(load.target, load.drafter, rows=max(concurrencies), sample=sample)
        costs, profile = measured.costs(sample), measured.to_json()
        profile["key"]["target"] = Path(profile["key"]["target"] or "").name  # no folders of this machine
    costs = costs or costs_at_hand(load.target, load.drafter, sample)
    record: dict[str, Any] = {
        "cells": [],
        "summary": [],
        "settings": {"concurrency": list(concurrencies), "budgets": list(budgets), **load.settings()},
        "profile": profile,
        "machine": machine_record(load.target.device),
    }
    shuffle = random.Random(load.seed)
    for concurrency in concurrencies:
        cells = {c: _Cell() for c in contenders if c.name != LOOKUP or concurrency == 1}
        _measure(load, cells, concurrency, costs, shuffle, on_turn)
        record["cells"] += [cell.to_json(concurrency, c.name) for c, cell in cells.items()]
        record["summary"] = summary(record["cells"])
        on_concurrency(record)
    return record


def _measure(
    load: Load, cells: Mapping[Contender, _Cell], concurrency: int, costs: Costs, shuffle: random.Random, on_turn: Callable[[], None]
) -> None:
    """All turns of one concurrency."""
    running = {c: Running(partial(load.server, c, concurrency, costs)) for c in cells if c.serves}
    quota, slices = _first_turn(load, list(running.values()), concurrency) if running else (0, 0)
    on_turn()
    for turn in range(load.repeats):
        _turn([(run, cells[c]) for c, run in running.items()], quota, slices, shuffle)
        for contender, cell in cells.items():
            if not contender.serves and turn % _CALLS_EVERY == 0:
                load.call(contender, concurrency, turn, cell)
        on_turn()
    for contender, run in running.items():
        cells[contender].users += run.server.speeds()


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
