"""Measures budgets under load: throughput and speed per user with N requests in flight. Knows serving and `generate`; knows no command.

At each concurrency every contender is a server that keeps running, on the same prompts in the same order. All go on side by side: one after
the other, in an order drawn anew each time, gives a few tokens, and a turn is over when each has given as many, so that greedy contenders
write the same texts in it. A machine whose speed swings within seconds slows all alike then, as it does not where each has the machine for
seconds.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_dspark.budgets.budget import FinishedRound, StaticBudget
from hf_dspark.budgets.cost_model import Costs
from hf_dspark.budgets.load_aware import LoadAwareBudget
from hf_dspark.budgets.named import make_budget
from hf_dspark.calibration.online import OnlineCalibration
from hf_dspark.decoding.profiler import CostProfile
from hf_dspark.decoding.verify import DEFAULT_VERIFICATION, check_verification
from hf_dspark.evaluation.metrics import machine_record
from hf_dspark.evaluation.serving import Served, Server
from hf_dspark.evaluation.speed import Sampling, new_tokens

# Contenders that are no budgets: this loop without drafting, transformers' batched call, and its lookup decoding.
PLAIN, GENERATE, LOOKUP = "plain", "generate", "prompt-lookup"
# `name` follows drifts of confidences online, and a load-aware budget those of costs; `name@fixed` takes confidences as the checkpoint is
# calibrated and costs as they were measured; `name@raw` is uncalibrated.
VARIANTS = ("", "@fixed", "@raw")
_LOOKUP_TOKENS = 10


@dataclass(frozen=True)
class Contender:
    """One column of the table.

    Args:
        name (`str`): a budget's name, with `@fixed` or `@raw` behind it or nothing, or `plain`, `generate`, `prompt-lookup`.
    Raises:
        ValueError: for an unknown name.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in (PLAIN, GENERATE, LOOKUP):
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
        found = self.name[len(self.budget) :]
        if found not in VARIANTS:
            raise ValueError(f"Unknown variant {found!r} of budget {self.budget!r}; allowed are @fixed, @raw, or nothing.")
        return found

    @property
    def drafts(self) -> bool:
        """Whether this package's drafter takes part."""
        return self.name not in (PLAIN, GENERATE, LOOKUP)


class _Raw:
    """A listener that takes all calibration away."""

    def __init__(self, block_size: int) -> None:
        self.temperatures = [1.0] * block_size

    def learn(self, finished: FinishedRound) -> None:
        pass


@dataclass
class _Cell:
    """One contender at one concurrency: a list entry for each repeat."""

    turns: list[tuple[int, float]] = field(default_factory=list)  # tokens and seconds of each
    users: list[float] = field(default_factory=list)
    rounds: int = 0  # of rows
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("prefill", "draft", "verify", "rest"), 0.0))

    def add(self, *runs: Served) -> None:
        """Count one turn of this package's loop, of one run or several."""
        self.turns.append((sum(served.emitted for served in runs), sum(served.seconds for served in runs)))
        for served in runs:
            self._add_counts(served)

    def _add_counts(self, served: Served) -> None:
        for row in served.stats.rows:
            self.rounds += row.rounds
            self.drafted += row.drafted
            self.verified += row.verified
            self.accepted += row.accepted
        stats = served.stats
        for part, seconds in zip(self.parts, (stats.t_prefill_s, stats.t_draft_s, stats.t_verify_s, stats.t_rest_s), strict=True):
            self.parts[part] += seconds

    def add_call(self, tokens: Sequence[int], seconds: float) -> None:
        """Count one call of transformers' `generate` as part of a turn: new tokens of each row, and its time."""
        self.users += [n / seconds for n in tokens]

    def to_json(self, concurrency: int, name: str) -> dict[str, Any]:
        """Returns the cell of the result file: what all turns gave, and each of them."""
        users = sorted(self.users)
        tokens, seconds = (sum(values) for values in zip(*self.turns, strict=True))
        rates = [of_turn / took for of_turn, took in self.turns]
        total = sum(self.parts.values())
        return {
            "concurrency": concurrency,
            "budget": name,
            "tokens_per_s": tokens / seconds,
            "tokens_per_s_lowest": min(rates),
            "tokens_per_s_highest": max(rates),
            "user_tokens_per_s_median": statistics.median(users) if users else None,
            "user_tokens_per_s_p5": users[int(0.05 * len(users))] if users else None,
            "tau": (self.accepted + self.rounds) / self.rounds if self.rounds else None,
            "verified_tokens_per_request": self.verified / self.rounds if self.rounds else None,
            "drafted_tokens_per_request": self.drafted / self.rounds if self.rounds else None,
            "acceptance_rate": self.accepted / self.verified if self.verified else None,
            "time_shares": {part: seconds / total for part, seconds in self.parts.items()} if total else None,
            "tokens": tokens,
            "seconds": seconds,
            "turn_tokens": [of_turn for of_turn, _ in self.turns],
            "turn_seconds": [took for _, took in self.turns],
        }


def bench(
    target: Any,
    drafter: Any,
    prompts: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    pad_id: int,
    concurrencies: Sequence[int],
    budgets: Sequence[str],
    sampling: Sampling | None = None,
    max_new_tokens: int = 128,
    seconds: float = 0.5,
    repeats: int = 24,
    seed: int = 0,
    costs: Costs | None = None,
    verification: str = DEFAULT_VERIFICATION,
    slice_seconds: float = 0.25,
    on_cell: Callable[[int, str], None] | None = None,
) -> dict[str, Any]:
    """Measure contenders at several concurrencies.

    Args:
        target (`PreTrainedModel`), drafter (`DSparkDrafter`): a pair.
        prompts (`list[list[int]]`): token ids; taken in order, over and over.
        end_ids (`list[int]`), pad_id (`int`): of the target.
        concurrencies (`list[int]`): requests in flight.
        budgets (`list[str]`): contenders, see `Contender`.
        sampling (`Sampling`, *optional*): greedy by default.
        max_new_tokens (`int`): of a request; those in flight when the clock starts are of all ages.
        seconds (`float`): of one turn of a contender of middling speed: a first turn of so many seconds, thrown away, tells how many tokens
            each contender has to give in the others.
        repeats (`int`): turns of each contender at each concurrency. `generate` and `prompt-lookup`, whose calls last longer than a turn,
            take every fourth, for `seconds` at least.
        seed (`int`): of draws.
        costs (`Costs`, *optional*): what rounds cost; the remembered profile by default.
        verification (`str`): how drawn tokens are judged, `"block"` or `"token"`; the remembered profile is of the first.
        slice_seconds (`float`): how long a contender of middling speed goes on before the next one does, within a turn; a round at least.
        on_cell (`Callable`, *optional*): called after each turn, the thrown away ones too.
    Returns:
        `dict`: `cells`, `summary`, and all that is needed to repeat it.
    """
    check_verification(verification)
    sampling = sampling or Sampling()
    contenders = [Contender(name) for name in budgets]
    drafter.bind(target)
    profile = None
    if costs is None and any(c.drafts and make_budget(c.budget).needs_confidence for c in contenders):
        profile = CostProfile.cached(target, drafter, rows=max(concurrencies), sample=not sampling.greedy)
        costs = profile.costs(not sampling.greedy)
    tell = on_cell or (lambda *_: None)
    runner = _Runner(target, drafter, prompts, list(end_ids), pad_id, sampling, max_new_tokens, seed, costs, verification)
    cells = {(n, c.name): _Cell() for n in concurrencies for c in contenders if c.name != LOOKUP or n == 1}
    if not all(any(name == c.name for _, name in cells) for c in contenders):
        raise ValueError(f"{LOOKUP} takes one request at a time; got concurrencies {list(concurrencies)}. Add 1, or leave it out.")
    shuffle = random.Random(seed)
    for concurrency in concurrencies:
        order = [c for c in contenders if (concurrency, c.name) in cells]
        runs = {c.name: _Run(runner, c, concurrency, seconds * (repeats + 2)) for c in order if c.name not in (GENERATE, LOOKUP)}
        quota, slices = _first_turns(list(runs.values()), seconds, slice_seconds)
        for contender in order:
            tell(concurrency, contender.name)
        for turn in range(repeats):
            _turn([(run, cells[concurrency, name]) for name, run in runs.items()], quota, slices, shuffle)
            for contender in order:
                if contender.name not in runs and turn % 4 == 0:
                    runner.stock(contender, concurrency, seconds, turn, cells[concurrency, contender.name])
                tell(concurrency, contender.name)
        for name, run in runs.items():
            cells[concurrency, name].users += run.server.speeds()
    rows = [cell.to_json(n, name) for (n, name), cell in cells.items()]
    return {
        "cells": rows,
        "summary": summary(rows),
        "settings": {
            "concurrency": list(concurrencies),
            "budgets": list(budgets),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "verification": verification,
            "max_new_tokens": max_new_tokens,
            "seconds": seconds,
            "slice_seconds": slice_seconds,
            "turns_end_by": "tokens",
            "repeats": repeats,
            "seed": seed,
            "prompts": len(prompts),
            "target_dtype": str(target.dtype).removeprefix("torch."),
            "drafter_dtype": str(drafter.dtype).removeprefix("torch."),
            "calibrated": drafter.config.confidence_temperatures is not None,
        },
        "profile": None if profile is None else _shareable(profile.to_json()),
        "machine": machine_record(target.device),
    }


def _listener(contender: Contender, config: Any) -> Any:
    """What stands between the confidences and the budget of a contender."""
    if contender.variant == "@fixed":
        return None
    if contender.variant == "@raw":
        return _Raw(config.block_size)
    online = OnlineCalibration()
    online.check(config)
    return online


def _shareable(profile: dict[str, Any]) -> dict[str, Any]:
    """A profile's record without folders of the machine it was made on."""
    return {**profile, "key": {**profile["key"], "target": Path(profile["key"]["target"] or "").name}}


def summary(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each concurrency: the best fixed choice (plain, full, static), the best load-aware budget, and the ratios that matter.

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
            row["best_fixed"] = _fastest(rates, fixed)
        if aware:
            chosen = rates[row.setdefault("best_load_aware", _fastest(rates, aware))]
            others = {"best_fixed": row.get("best_fixed"), **{name: name for name in (PLAIN, "full", GENERATE, LOOKUP)}}
            for what, name in others.items():
                if name in rates:
                    row[f"load_aware_over_{what}"] = chosen["tokens_per_s"] / rates[name]["tokens_per_s"]
                    row[f"load_aware_over_{what}_interval"] = _interval(chosen, rates[name])
        out.append(row)
    return out


def _fastest(cells: dict[str, dict[str, Any]], names: Sequence[str]) -> str:
    return max(names, key=lambda name: cells[name]["tokens_per_s"])


def _interval(one: dict[str, Any], other: dict[str, Any], draws: int = 2000) -> list[float] | None:
    """Of the ratio of two contenders' tokens a second, from the 5th to the 95th percentile of draws of turns."""
    turns = [np.array([cell.get("turn_tokens", []), cell.get("turn_seconds", [])]) for cell in (one, other)]
    count = turns[0].shape[1]
    if count != turns[1].shape[1] or count < 2:
        return None
    drawn = np.random.default_rng(0).integers(0, count, (draws, count))
    (tokens, seconds), (other_tokens, other_seconds) = (both[:, drawn].sum(axis=-1) for both in turns)
    low, high = np.quantile(tokens / seconds / (other_tokens / other_seconds), [0.05, 0.95])
    return [float(low), float(high)]


class _Run:
    """A contender at one concurrency, from turn to turn."""

    def __init__(self, runner: _Runner, contender: Contender, concurrency: int, seconds: float) -> None:
        self.runner, self.contender, self.concurrency, self.seconds = runner, contender, concurrency, seconds
        self._begin()

    def _begin(self) -> None:
        self.server = self.runner.server(self.contender, self.concurrency, self.seconds)
        self.goal = 0
        self.largest = self.runner.drafter.config.block_size + 1  # tokens of a row in one round

    def go_on(self, tokens: int, cell: _Cell) -> list[Served]:
        """Give so many more tokens than were asked for before; nothing where they are out already."""
        self.goal += tokens
        runs = []
        while self.server.emitted < self.goal:
            runs.append(self.server.run(steady=True, tokens=self.goal))
            if self.server.exhausted:
                cell.users += self.server.speeds()
                missing = self.goal - self.server.emitted
                self._begin()
                self.goal = max(missing, 0)
        return runs


def _turn(runs: Sequence[tuple[_Run, _Cell]], quota: int, slices: int, shuffle: random.Random) -> None:
    """So many tokens of every contender, in slices, into its cell; in an order drawn anew for each slice."""
    taken: list[list[Served]] = [[] for _ in runs]
    for part in range(slices):
        tokens = quota * (part + 1) // slices - quota * part // slices
        for index in shuffle.sample(range(len(runs)), len(runs)):
            run, cell = runs[index]
            taken[index] += run.go_on(tokens, cell)
    for (_, cell), served in zip(runs, taken, strict=True):
        cell.add(*served)


def _first_turns(runs: Sequence[_Run], seconds: float, slice_seconds: float) -> tuple[int, int]:
    """Let every contender run for some time, then bring all to the same place; the tokens of a turn, those that one of middling speed gave,
    and in how many slices to give them.
    """
    emitted = []
    for run in runs:
        run.server.run(steady=True, seconds=seconds)
        emitted.append(run.server.emitted)
    for run in runs:
        run.go_on(max(emitted), _Cell())
    if not runs:
        return 0, 1
    # A server's first tokens are those of prompts, which all began at once: they belong to no turn. And a turn holds rounds enough to bring
    # contenders of any length of rounds to about the same place.
    concurrency = runs[0].concurrency
    given = max(int(statistics.median(emitted)) - concurrency, 1)
    quota = max(given, 2 * concurrency * runs[0].largest)
    return quota, max(1, quota // max(round(given * slice_seconds / seconds), concurrency))


@dataclass
class _Runner:
    """Makes servers for contenders, and runs transformers' own calls."""

    target: Any
    drafter: Any
    prompts: Sequence[Sequence[int]]
    end_ids: list[int]
    pad_id: int
    sampling: Sampling
    max_new_tokens: int
    seed: int
    costs: Costs | None
    verification: str

    def server(self, contender: Contender, concurrency: int, seconds: float) -> Server:
        """A contender with requests for so many seconds, whatever its speed; those in flight at first are of all ages."""
        queue = self._queue(0)
        wanted = concurrency + 8 + int(max(20, 4 * concurrency) * seconds)
        ages = [max(self.max_new_tokens * (i + 1) // concurrency, 1) for i in range(concurrency)]
        budget = StaticBudget(0) if contender.name == PLAIN else make_budget(contender.budget)
        if isinstance(budget, LoadAwareBudget):
            budget.follow_costs = contender.variant != "@fixed"
        listens = contender.drafts and budget.needs_confidence
        return Server(
            self.target,
            self.drafter if contender.drafts else None,
            [next(queue) for _ in range(wanted)],
            concurrency=concurrency,
            max_new_tokens=[*ages, *[self.max_new_tokens] * (wanted - concurrency)],
            budget=budget.start(self._costs),
            end_ids=self.end_ids,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            seed=self.seed,
            listener=_listener(contender, self.drafter.config) if listens else None,
            verification=self.verification,
        )

    def _costs(self) -> Costs:
        if self.costs is None:
            raise RuntimeError("a budget asked for costs that were not measured; please report this")
        return self.costs

    def _queue(self, repeat: int) -> Iterator[Sequence[int]]:
        place = 7 * repeat
        while True:
            yield self.prompts[place % len(self.prompts)]
            place += 1

    def stock(self, contender: Contender, concurrency: int, seconds: float, turn: int, cell: _Cell) -> None:
        """transformers' own calls, batch after batch, until the time is over."""
        queue = self._queue(turn)
        options = self.sampling.options() | {"max_new_tokens": self.max_new_tokens, "pad_token_id": self.pad_id}
        if contender.name == LOOKUP:
            options["prompt_lookup_num_tokens"] = _LOOKUP_TOKENS
        torch.manual_seed(self.seed)
        tokens, spent = 0, 0.0
        while spent < seconds:
            rows = [list(next(queue)) for _ in range(concurrency)]
            width = max(map(len, rows))
            ids = torch.tensor([[self.pad_id] * (width - len(row)) + row for row in rows], device=self.target.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.target.device)
            begin = time.perf_counter()
            output = self.target.generate(input_ids=ids, attention_mask=mask, **options)
            if self.target.device.type == "cuda":
                torch.cuda.synchronize(self.target.device)
            took = time.perf_counter() - begin
            counts = [len(row) for row in new_tokens(output, width, frozenset(self.end_ids))]
            cell.add_call(counts, took)
            tokens, spent = tokens + sum(counts), spent + took
        cell.turns.append((tokens, spent))
