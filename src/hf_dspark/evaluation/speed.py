"""Measures a drafter against the plain target and against prompt lookup, in one run.

The three methods take turns on the same batches, and which goes first rotates from batch to batch: a machine that warms up, throttles or is
shared slows all three alike. Every method runs once, untimed, before the first batch.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import CompileConfig

from hf_dspark.decoding.api import generate
from hf_dspark.decoding.verify import DEFAULT_VERIFICATION
from hf_dspark.evaluation.metrics import AcceptanceCounts, Throughput, machine_record, round_times
from hf_dspark.evaluation.prompts import Conversation, encode
from hf_dspark.utils.tokens import eos_token_ids

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from hf_dspark.budgets.budget import Budget
    from hf_dspark.decoding.statistics import DecodingStats
    from hf_dspark.models.modeling_dspark import DSparkDrafter

METHODS = ("plain", "dspark", "prompt_lookup")
# What is measured too where rounds are compiled: transformers' own static cache.
PLAIN_COMPILED = "plain_compiled"
PROMPT_LOOKUP_TOKENS = 10
_WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, the same for every method: temperature (0 is greedy) and nucleus, in (0, 1]; checked."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.greedy and self.top_p != 1:
            raise ValueError(f"top_p {self.top_p} has no effect at temperature 0 (greedy); set a temperature above 0 or leave top_p out")

    @property
    def greedy(self) -> bool:
        """True where the arg-max is taken."""
        return self.temperature == 0

    def options(self) -> dict[str, Any]:
        """Returns the options of `generate`, which switch off a top-k of the model's own generation config."""
        if self.greedy:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass(frozen=True)
class Run:
    """What one method made of one batch: new tokens of each row (the end-of-text token included, padding not), and wall-clock seconds,
    prefill included. `stats` are the loop's own, None for methods other than `dspark`.
    """

    tokens: list[list[int]]
    seconds: float
    stats: DecodingStats | None = None

    @property
    def throughput(self) -> Throughput:
        """New tokens of all rows over the time."""
        return Throughput(sum(map(len, self.tokens)), self.seconds)


@dataclass
class Measured:
    """Every method's runs on the same batches, and their figures."""

    runs: dict[str, list[Run]] = field(default_factory=lambda: defaultdict(list))

    def throughput(self, method: str) -> Throughput:
        """Of all runs of a method."""
        return sum((run.throughput for run in self.runs[method]), start=Throughput())

    @property
    def _stats(self) -> list[DecodingStats]:
        return [run.stats for run in self.runs["dspark"] if run.stats is not None]

    @property
    def acceptance(self) -> AcceptanceCounts:
        """Of all speculative runs."""
        return AcceptanceCounts.of(row for stats in self._stats for row in stats.rows)

    @property
    def time(self) -> dict[str, float | None]:
        """`round_times` of all speculative runs."""
        return round_times(self._stats)

    def to_json(self, *, comparable: bool) -> dict[str, Any]:
        """Returns ratios first, then the counts behind them; texts are compared where they are greedy and of one dtype."""
        speed, counts = {method: self.throughput(method) for method in (*METHODS, *self.runs)}, self.acceptance
        plain, dspark = ([row for run in self.runs[method] for row in run.tokens] for method in ("plain", "dspark"))
        return {
            "tau": counts.tau,
            "conditional_acceptance": counts.conditional_acceptance,
            "speedup": speed["dspark"].over(speed["plain"]),
            "prompt_lookup_speedup": speed["prompt_lookup"].over(speed["plain"]),
            **({"speedup_over_compiled": speed["dspark"].over(speed[PLAIN_COMPILED])} if PLAIN_COMPILED in speed else {}),
            **{f"{method}_tokens_per_s": figure.tokens_per_s for method, figure in speed.items()},
            "rows": len(plain),
            "identical_rows": sum(a == b for a, b in zip(plain, dspark, strict=True)) if comparable else None,
            "acceptance_rate": counts.acceptance_rate,
            "acceptance_counts": asdict(counts),
            "throughput": {method: figure.to_json() for method, figure in speed.items()},
            "time": self.time,
        }


@dataclass
class Bench:
    """A target with its tokenizer and a drafter, ready to run batches by any method under the same settings; see `generate` for these.

    Every run starts from the seed. `compile` runs rounds as compiled graphs, and plain decoding with a static cache beside plain
    decoding as it is. `plain_target` is the target in another dtype, in which plain decoding is faster, None where it is not.
    """

    target: PreTrainedModel
    drafter: DSparkDrafter
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 128
    budget: str | Budget | None = None
    copying: bool = True
    verification: str = DEFAULT_VERIFICATION
    seed: int = 0
    plain_target: PreTrainedModel | None = None
    compile: bool = False
    compile_s: dict[str, float] = field(default_factory=dict)  # what the first runs took, by method

    @property
    def methods(self) -> tuple[str, ...]:
        """What is measured."""
        return (*METHODS, PLAIN_COMPILED) if self.compile else METHODS

    def inputs(self, conversations: Sequence[Conversation]) -> BatchEncoding:
        """Returns the tokenized batch on the target's device, padded on the left."""
        return encode(self.tokenizer, conversations).to(self.target.device)

    def run(self, method: str, inputs: BatchEncoding, *, max_new_tokens: int | None = None, streamer: BaseStreamer | None = None) -> Run:
        """Generates one batch by one of `METHODS` and takes the time; a streamer gets the tokens as they are decided (one row only).

        transformers' prompt lookup takes one row at a time; it gets a batch row by row, each without its padding.
        """
        options = self.sampling.options() | {
            "max_new_tokens": max_new_tokens or self.max_new_tokens,
            "pad_token_id": self.tokenizer.pad_token_id,
            "streamer": streamer,
        }
        if method == PLAIN_COMPILED:
            how = CompileConfig()
            how._compile_all_devices = True
            options |= {"cache_implementation": "static", "compile_config": how}
        if method in ("plain", PLAIN_COMPILED):
            return self._timed(partial((self.plain_target or self.target).generate, **inputs, **options), inputs)
        if method == "dspark":
            options |= {"budget": self.budget, "copying": self.copying, "verification": self.verification, "return_dict_in_generate": True}
            options |= {"compile": self.compile}
            return self._timed(partial(generate, self.target, self.drafter, **inputs, **options), inputs)
        if method != "prompt_lookup":
            raise ValueError(f"unknown method {method!r}; allowed: {', '.join(self.methods)}")
        lookup = partial(self.target.generate, **options, prompt_lookup_num_tokens=PROMPT_LOOKUP_TOKENS)
        counts = inputs["attention_mask"].sum(1).tolist()
        rows = [{name: values[r : r + 1, -count:] for name, values in inputs.items()} for r, count in enumerate(counts)]
        runs = [self._timed(partial(lookup, **row), row) for row in rows]
        return Run([tokens for run in runs for tokens in run.tokens], sum(run.seconds for run in runs))

    def warm_up(self, inputs: BatchEncoding, methods: Sequence[str] | None = None) -> None:
        """Runs every method for a few tokens: first-use costs (kernels, the target's self-test, compilation) stay out of the figures.

        Args:
            inputs (`BatchEncoding`): the longest batch, for which a static cache is made.
            methods (`Sequence[str]`, *optional*): all where None.
        """
        for method in methods or self.methods:
            first = self.run(method, inputs, max_new_tokens=self.max_new_tokens if method == PLAIN_COMPILED else self._few)
            self.compile_s[method] = first.seconds
        if self.compile:  # a budget may come to any of these lengths
            for length in (0, 2, 4, self.drafter.config.block_size):
                self.compile_s["dspark"] += replace(self, budget=f"static:{length}").run("dspark", inputs, max_new_tokens=self._few).seconds

    @property
    def _few(self) -> int:
        return min(_WARM_UP_TOKENS, self.max_new_tokens)

    def settings(self) -> dict[str, Any]:
        """Returns all that a result file says of the run."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "budget": str(self.budget if self.budget is not None else self.drafter.budget),
            "copying": len(self.drafter.config.copy_weights or ()) if self.copying else 0,
            "verification": self.verification,
            "seed": self.seed,
            "compiled": self.compile,
            **({"first_runs_s": dict(self.compile_s)} if self.compile else {}),
            "prompt_lookup_tokens": PROMPT_LOOKUP_TOKENS,
            "prompt_lookup_batch_size": 1,
            "target_dtype": str(self.target.dtype).removeprefix("torch."),
            "plain_dtype": str((self.plain_target or self.target).dtype).removeprefix("torch."),
            "drafter_dtype": str(self.drafter.dtype).removeprefix("torch."),
        }

    def _timed(self, call: Callable[[], Any], inputs: Mapping[str, torch.Tensor]) -> Run:
        torch.manual_seed(self.seed)
        synchronize(self.target.device)
        start = time.perf_counter()
        output = call()
        synchronize(self.target.device)
        seconds = time.perf_counter() - start
        sequences, stats = (output, None) if isinstance(output, torch.Tensor) else (output.sequences, output.stats)
        return Run(new_tokens(sequences, inputs["input_ids"].shape[1], eos_token_ids(self.target)), seconds, stats)


def evaluate(
    bench: Bench,
    prompt_files: Mapping[str, Sequence[Conversation]],
    *,
    batch_size: int = 1,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:
    """Measures tau, conditional acceptance and tokens a second against the plain target and prompt lookup, in one run.

    Args:
        prompt_files: conversations by the name they are reported under.
        on_batch: called after each batch with the rows done.
    Returns:
        the overall figures at the top, then `files` with those of each file, `settings` and `machine`.
    """
    longest = max(
        (c for conversations in prompt_files.values() for c in conversations), key=lambda c: bench.inputs([c])["input_ids"].shape[1]
    )
    bench.warm_up(bench.inputs([longest] * batch_size))
    files, overall, turn = {name: Measured() for name in prompt_files}, Measured(), 0
    for name, conversations in prompt_files.items():
        for first in range(0, len(conversations), batch_size):
            inputs = bench.inputs(conversations[first : first + batch_size])
            for method in bench.methods[turn % len(bench.methods) :] + bench.methods[: turn % len(bench.methods)]:
                run = bench.run(method, inputs)
                files[name].runs[method].append(run)
                overall.runs[method].append(run)
            turn += 1
            on_batch(len(inputs["input_ids"]))
    comparable = bench.sampling.greedy and bench.plain_target is None
    return {
        **overall.to_json(comparable=comparable),
        "files": {name: measured.to_json(comparable=comparable) for name, measured in files.items()},
        "settings": {**bench.settings(), "batch_size": batch_size},
        "machine": machine_record(bench.target.device),
    }


def new_tokens(sequences: torch.Tensor, prompt_length: int, end_ids: Sequence[int]) -> list[list[int]]:
    """Returns each row's tokens after a left-padded prompt, up to and including its first end-of-text token, of ids `(batch, length)`."""
    rows = []
    for row in sequences[:, prompt_length:].tolist():
        end = next((index for index, token in enumerate(row) if token in end_ids), len(row) - 1)
        rows.append(row[: end + 1])
    return rows


def synchronize(device: torch.device) -> None:
    """Waits for an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
