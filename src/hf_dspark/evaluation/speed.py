"""Measures a drafter against the plain target and against prompt lookup, in one run. Knows `generate` from outside, not
its insides.

The three methods take turns on the same batches, and who goes first rotates from batch to batch: a machine that warms
up, throttles or is shared slows all three alike. Every method runs once, untimed, before the first batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hf_dspark.decoding.verify import DEFAULT_VERIFICATION
from hf_dspark.evaluation.metrics import (
    AcceptanceCounts,
    RoundTime,
    Throughput,
    common_prefix,
    machine_record,
    speed_ratio,
)
from hf_dspark.evaluation.prompts import Conversation, encode

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

    from hf_dspark.budgets.budget import Budget
    from hf_dspark.decoding.statistics import DecodingStats, RowStats
    from hf_dspark.models.modeling_dspark import DSparkDrafter

METHODS = ("plain", "dspark", "prompt_lookup")
_WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, the same for every method.

    Args:
        temperature: 0 for greedy.
        top_p: nucleus, in (0, 1]; 1 keeps all tokens.
    Raises:
        ValueError: for a value outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0 and self.top_p != 1:
            raise ValueError(f"top_p {self.top_p} has no effect at temperature 0 (greedy); set a temperature above 0 or leave top_p out")

    @property
    def greedy(self) -> bool:
        """True where the arg-max is taken."""
        return self.temperature == 0

    def options(self) -> dict[str, Any]:
        """Returns the options of `generate`; they switch off a top-k that the model's own generation config may
        carry."""
        if self.greedy:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass(frozen=True)
class Run:
    """What one method made of one batch.

    Args:
        tokens: new tokens of each row, the end-of-text token included, padding not.
        seconds: wall-clock time, prefill included.
        stats: the loop's own statistics; only of the method `dspark`.
    """

    tokens: list[list[int]]
    seconds: float
    stats: DecodingStats | None = None

    @property
    def throughput(self) -> Throughput:
        """New tokens of all rows over the time."""
        return Throughput(sum(len(row) for row in self.tokens), self.seconds)


@dataclass(frozen=True)
class Measured:
    """Totals over a prompt file, or over all of them.

    Args:
        rows: prompts.
        identical_rows: rows where speculation gave the plain target's tokens exactly (asked under greedy decoding
            only).
        throughput: by method.
        acceptance: of the drafts.
        time: where the time of speculative decoding went.
    """

    rows: int = 0
    identical_rows: int = 0
    throughput: dict[str, Throughput] = field(default_factory=lambda: dict.fromkeys(METHODS, Throughput()))
    acceptance: AcceptanceCounts = field(default_factory=lambda: AcceptanceCounts.sum(()))
    time: RoundTime = field(default_factory=RoundTime)

    def __add__(self, other: Measured) -> Measured:
        return Measured(
            self.rows + other.rows,
            self.identical_rows + other.identical_rows,
            {method: self.throughput[method] + other.throughput[method] for method in METHODS},
            AcceptanceCounts.sum((self.acceptance, other.acceptance)),
            self.time + other.time,
        )

    def to_json(self, *, greedy: bool) -> dict[str, Any]:
        """Returns ratios first, then the counts behind them."""
        plain = self.throughput["plain"]
        return {
            "tau": self.acceptance.tau,
            "conditional_acceptance": self.acceptance.conditional_acceptance,
            "speedup": speed_ratio(self.throughput["dspark"], plain),
            "prompt_lookup_speedup": speed_ratio(self.throughput["prompt_lookup"], plain),
            **{f"{method}_tokens_per_s": self.throughput[method].tokens_per_s for method in METHODS},
            "rows": self.rows,
            "identical_rows": self.identical_rows if greedy else None,
            "acceptance_rate": self.acceptance.acceptance_rate,
            "acceptance_counts": self.acceptance.to_json()["acceptance_counts"],
            "throughput": {method: self.throughput[method].to_json() for method in METHODS},
            "time": self.time.to_json(),
        }


@dataclass(frozen=True)
class Evaluation:
    """The outcome of `evaluate`, with everything needed to repeat it.

    Args:
        files: totals by prompt file.
        settings: what was asked for, seed included.
        machine: hardware and versions (`machine_record`).
    """

    files: dict[str, Measured]
    settings: dict[str, Any]
    machine: dict[str, Any]

    @property
    def overall(self) -> Measured:
        """Totals over all files."""
        return sum(self.files.values(), start=Measured())

    def to_json(self) -> dict[str, Any]:
        """Returns the overall figures at the top, then each file, the settings and the machine."""
        greedy = self.settings["temperature"] == 0
        return {
            **self.overall.to_json(greedy=greedy),
            "files": {name: measured.to_json(greedy=greedy) for name, measured in self.files.items()},
            "settings": self.settings,
            "machine": self.machine,
        }


class Bench:
    """One target and its drafter, ready to run batches by either method under the same settings.

    Args:
        target: the causal LM.
        drafter: a drafter that fits it.
        tokenizer: the target's.
        sampling: how the next token is chosen.
        max_new_tokens: new tokens a row at most.
        budget: verified tokens a round, a name or an object; None uses `drafter.budget`.
        copying: draft what the text repeats too, where the drafter has weights for that.
        verification: how drawn tokens are judged, `block` or `token`.
        seed: random state at the start of every run.
        prompt_lookup_tokens: candidates a round of transformers' prompt lookup.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: DSparkDrafter,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int = 128,
        budget: str | Budget | None = None,
        copying: bool = True,
        verification: str = DEFAULT_VERIFICATION,
        seed: int = 0,
        prompt_lookup_tokens: int = 10,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.target = target
        self.drafter = drafter
        self.tokenizer = tokenizer
        self.sampling = sampling if sampling is not None else Sampling()
        self.max_new_tokens = max_new_tokens
        self.budget = budget
        self.copying = copying
        self.verification = verification
        self.seed = seed
        self.prompt_lookup_tokens = prompt_lookup_tokens
        self.end_ids = end_ids_of(target)

    def inputs(self, conversations: Sequence[Conversation]) -> BatchEncoding:
        """Returns the tokenized batch on the target's device, padded on the left."""
        return encode(self.tokenizer, conversations).to(self.target.device)

    def run(self, method: str, inputs: BatchEncoding, *, max_new_tokens: int | None = None, streamer: Any = None) -> Run:
        """Generates one batch and takes the time.

        transformers' prompt lookup takes one row at a time; a batch is given to it row by row, each without its
        padding.

        Args:
            method: one of `METHODS`.
            inputs: from `inputs`.
            max_new_tokens: overrides the bench's own.
            streamer: gets the tokens as they are decided (one row only).
        """
        options = self.sampling.options() | {
            "max_new_tokens": self.max_new_tokens if max_new_tokens is None else max_new_tokens,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        if streamer is not None:
            options["streamer"] = streamer
        if method == "plain":
            return self._timed(lambda: self.target.generate(**inputs, **options), inputs)
        if method == "dspark":
            from hf_dspark import generate

            options |= {"budget": self.budget, "copying": self.copying, "verification": self.verification, "return_dict_in_generate": True}
            return self._timed(lambda: generate(self.target, self.drafter, **inputs, **options), inputs)
        if method == "prompt_lookup":
            lookup = partial(self.target.generate, **options, prompt_lookup_num_tokens=self.prompt_lookup_tokens)
            runs = [self._timed(partial(lookup, **row), row) for row in _rows(inputs)]
            return Run([tokens for run in runs for tokens in run.tokens], sum(run.seconds for run in runs))
        raise ValueError(f"unknown method {method!r}; allowed: {', '.join(METHODS)}")

    def warm_up(self, inputs: BatchEncoding, methods: Sequence[str] = METHODS) -> None:
        """Runs every method for a few tokens: first-use costs (kernels, allocator, the target's self-test) stay out of
        the figures."""
        for method in methods:
            self.run(method, inputs, max_new_tokens=min(_WARM_UP_TOKENS, self.max_new_tokens))

    def _timed(self, call: Callable[[], Any], inputs: Mapping[str, torch.Tensor]) -> Run:
        torch.manual_seed(self.seed)
        self._wait()
        start = time.perf_counter()
        output = call()
        self._wait()
        seconds = time.perf_counter() - start
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        stats = None if isinstance(output, torch.Tensor) else output.stats
        return Run(new_tokens(sequences, inputs["input_ids"].shape[1], self.end_ids), seconds, stats)

    def _wait(self) -> None:
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)


def evaluate(
    target: PreTrainedModel,
    drafter: DSparkDrafter,
    tokenizer: PreTrainedTokenizerBase,
    prompt_files: Mapping[str, Sequence[Conversation]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 1,
    budget: str | Budget | None = None,
    copying: bool = True,
    verification: str = DEFAULT_VERIFICATION,
    seed: int = 0,
    prompt_lookup_tokens: int = 10,
    on_batch: Callable[[str, int], None] | None = None,
) -> Evaluation:
    """Measures tau, conditional acceptance and tokens a second against the plain target and prompt lookup, in one run.

    Args:
        target: the causal LM.
        drafter: a drafter that fits it.
        tokenizer: the target's.
        prompt_files: conversations by the name they are reported under.
        max_new_tokens: new tokens a row at most.
        temperature: 0 for greedy.
        top_p: nucleus, in (0, 1].
        batch_size: rows a batch; prompt lookup, which takes one row at a time, gets a batch row by row.
        budget: verified tokens a round, a name or an object; None uses `drafter.budget`.
        copying: draft what the text repeats too, where the drafter has weights for that.
        verification: how drawn tokens are judged, `block` or `token`.
        seed: random state at the start of every run of every method.
        prompt_lookup_tokens: candidates a round of prompt lookup.
        on_batch: called after each batch with the file's name and the rows done.
    Raises:
        ValueError: if there are no prompts, or a setting is outside its range.
    """
    if not prompt_files or not all(prompt_files.values()):
        raise ValueError("nothing to evaluate: every prompt file needs at least one prompt")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    sampling = Sampling(temperature, top_p)
    bench = Bench(
        target,
        drafter,
        tokenizer,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        budget=budget,
        copying=copying,
        verification=verification,
        seed=seed,
        prompt_lookup_tokens=prompt_lookup_tokens,
    )
    bench.warm_up(bench.inputs(next(iter(prompt_files.values()))[:batch_size]))
    files = dict.fromkeys(prompt_files, Measured())
    turn = 0
    for name, conversations in prompt_files.items():
        for first in range(0, len(conversations), batch_size):
            inputs = bench.inputs(conversations[first : first + batch_size])
            order = METHODS[turn % len(METHODS) :] + METHODS[: turn % len(METHODS)]
            runs = {method: bench.run(method, inputs) for method in order}
            files[name] += _measured(runs, greedy=sampling.greedy)
            turn += 1
            if on_batch is not None:
                on_batch(name, len(inputs["input_ids"]))
    settings = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "batch_size": batch_size,
        "budget": str(budget if budget is not None else drafter.budget),
        "copying": len(drafter.config.copy_weights or ()) if copying else 0,
        "verification": verification,
        "seed": seed,
        "prompt_lookup_tokens": prompt_lookup_tokens,
        "prompt_lookup_batch_size": 1,
        "target_dtype": str(target.dtype).removeprefix("torch."),
        "drafter_dtype": str(drafter.dtype).removeprefix("torch."),
    }
    return Evaluation(files, settings, machine_record(target.device))


def new_tokens(sequences: torch.Tensor, prompt_length: int, end_ids: frozenset[int]) -> list[list[int]]:
    """Returns each row's tokens after the prompt, up to and including its first end-of-text token.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, length)`): prompt, answer, padding.
        prompt_length: columns of the (left-padded) prompt.
        end_ids: the target's end-of-text ids.
    """
    rows = []
    for row in sequences[:, prompt_length:].tolist():
        end = next((index for index, token in enumerate(row) if token in end_ids), len(row) - 1)
        rows.append(row[: end + 1])
    return rows


@dataclass(frozen=True)
class Parting:
    """Where a speculated text left the plain one, and how close the call was there.

    Args:
        position: index of the first new token that differs, from 0.
        plain_token: what the plain target wrote there; None where its text had ended.
        other_token: what speculation wrote there; None where its text had ended.
        gap: the plain target's own logit of its first choice less that of its second, at this position. In bf16 a logit
            near 20 has steps of 0.125: a gap of a step or two is a tie that a pass of another shape may break
            differently.
    """

    position: int
    plain_token: int | None
    other_token: int | None
    gap: float


def find_parting(bench: Bench, inputs: BatchEncoding, plain: Sequence[int], other: Sequence[int]) -> Parting | None:
    """Returns where two greedy texts of one prompt part, None where they are the same.

    The gap comes from the plain target generating again up to that position, through the same steps as before.
    """
    position = common_prefix(plain, other)
    if position == len(plain) == len(other):
        return None
    output = bench.target.generate(
        **inputs,
        **bench.sampling.options(),
        max_new_tokens=position + 1,
        pad_token_id=bench.tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    first, second = output.logits[-1][0].float().topk(2).values.tolist()
    return Parting(
        position,
        plain[position] if position < len(plain) else None,
        other[position] if position < len(other) else None,
        first - second,
    )


def acceptance_of(stats: DecodingStats) -> AcceptanceCounts:
    """Returns the loop's statistics, all rows added up."""
    return AcceptanceCounts.sum(acceptance_of_row(row) for row in stats.rows)


def acceptance_of_row(row: RowStats) -> AcceptanceCounts:
    """Returns one row's statistics."""
    return AcceptanceCounts(row.rounds, row.drafted, row.verified, tuple(row.accepted_at), tuple(row.reached_at))


def time_of(stats: DecodingStats) -> RoundTime:
    """Returns where the loop's time went."""
    return RoundTime(stats.t_prefill_s, stats.t_draft_s, stats.t_verify_s, stats.t_rest_s)


def _measured(runs: Mapping[str, Run], *, greedy: bool) -> Measured:
    plain, dspark = runs["plain"], runs["dspark"]
    if dspark.stats is None:
        raise RuntimeError("hf_dspark.generate returned no statistics although return_dict_in_generate was set; please report this")
    return Measured(
        rows=len(plain.tokens),
        identical_rows=sum(a == b for a, b in zip(plain.tokens, dspark.tokens, strict=True)) if greedy else 0,
        throughput={method: run.throughput for method, run in runs.items()},
        acceptance=acceptance_of(dspark.stats),
        time=time_of(dspark.stats),
    )


def end_ids_of(target: PreTrainedModel) -> frozenset[int]:
    """The ids that end a text of this model, as its generation config has them."""
    ids = target.generation_config.eos_token_id if target.generation_config is not None else None
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def _rows(inputs: BatchEncoding) -> list[dict[str, torch.Tensor]]:
    """Splits a left-padded batch into rows of one, each without its padding."""
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        kept = int(mask.sum())
        rows.append({"input_ids": ids[None, -kept:], "attention_mask": mask[None, -kept:]})
    return rows
