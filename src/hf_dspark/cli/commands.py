"""What `hf-dspark generate` and `hf-dspark eval` do: read, load, run, print. Knows the package's public doors, not its
loop.

Progress goes to stderr, results to stdout; a JSON object is one line and the last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hf_dspark.budgets.named import make_budget
from hf_dspark.evaluation.metrics import AcceptanceCounts, RoundTime, Throughput, machine_record
from hf_dspark.evaluation.prompts import Conversation, read_prompts, user_turn
from hf_dspark.evaluation.speed import Bench, Measured, Run, Sampling, acceptance_of, evaluate, time_of
from hf_dspark.models.loading import FAST, load_drafter, load_target, parse_dtype


def run_generate(
    target_name: str,
    drafter_name: str,
    *,
    prompt: str | None,
    prompts: Path | None,
    limit: int | None,
    batch_size: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    budget: str | None,
    copying: bool,
    verification: str,
    max_verify_tokens: int | None = None,
    seed: int,
    stream: bool,
    dtype: str,
    device: str,
    as_json: bool,
) -> None:
    """Generates for one prompt or a file of them, and prints the texts."""
    sampling = Sampling(temperature, top_p)
    _check_early(budget, dtype)
    place = pick_device(device)
    conversations = read_prompts(prompts, limit) if prompts is not None else [user_turn(prompt or "")]
    target, tokenizer, drafter = load_pair(target_name, drafter_name, dtype=dtype, device=place)
    chosen = make_budget(drafter.budget if budget is None else budget, max_verify_tokens)
    options: dict[str, Any] = {
        "sampling": sampling,
        "max_new_tokens": max_new_tokens,
        "budget": chosen,
        "copying": copying,
        "verification": verification,
        "seed": seed,
    }
    bench = Bench(target, drafter, tokenizer, **options)
    results: list[dict[str, Any]] = []
    runs: list[Run] = []
    with progress("generating", len(conversations), show=not stream) as advance:
        for first in range(0, len(conversations), batch_size):
            batch = conversations[first : first + batch_size]
            streamer = None
            if stream:
                print(f"{'' if first == 0 else chr(10)}> {batch[0][-1]['content']}", flush=True)
                streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            run = bench.run("dspark", bench.inputs(batch), streamer=streamer)
            runs.append(run)
            results += _texts(batch, run, tokenizer)
            advance(len(batch))
    if not as_json and not stream:
        for number, result in enumerate(results):
            print(f"{'' if number == 0 else chr(10)}> {result['prompt']}\n{result['text']}")
    acceptance = AcceptanceCounts.sum(acceptance_of(run.stats) for run in runs if run.stats is not None)
    speed = sum((run.throughput for run in runs), start=Throughput())
    if as_json:
        print_json(
            {
                "target": target_name,
                "drafter": drafter_name,
                "results": results,
                "tau": acceptance.tau,
                "conditional_acceptance": acceptance.conditional_acceptance,
                "tokens_per_s": speed.tokens_per_s,
                "tokens": speed.tokens,
                "seconds": speed.seconds,
                "time": sum((time_of(run.stats) for run in runs if run.stats is not None), start=RoundTime()).to_json(),
                "settings": {
                    "batch_size": batch_size,
                    "temperature": temperature,
                    "top_p": top_p,
                    "max_new_tokens": max_new_tokens,
                    "budget": str(chosen),
                    "seed": seed,
                    "target_dtype": str(target.dtype).removeprefix("torch."),
                },
                "machine": machine_record(target.device),
            }
        )
    else:
        Console(stderr=True).print(
            f"[dim]{speed.tokens} tokens, {figure(speed.tokens_per_s, 1)} tokens/s (not warmed up), "
            f"tau {figure(acceptance.tau, 2)} (bonus token included)[/dim]"
        )


def run_eval(
    target_name: str,
    drafter_name: str,
    *,
    prompts: list[Path],
    limit: int | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    batch_size: int,
    budget: str | None,
    copying: bool,
    verification: str,
    dtype: str,
    device: str,
    seed: int,
    as_json: bool,
    output: Path | None,
) -> None:
    """Measures over prompt files, prints a table or a JSON object, and writes the object to a file where one is
    named."""
    Sampling(temperature, top_p)
    _check_early(budget, dtype)
    place = pick_device(device)
    files: dict[str, list[Conversation]] = {}
    for path in prompts:
        if path.stem in files or path.stem == "all":
            raise ValueError(f"{path}: the name {path.stem!r} is taken, and results are reported under the file's name; rename it")
        files[path.stem] = read_prompts(path, limit)
    target, tokenizer, drafter = load_pair(target_name, drafter_name, dtype=dtype, device=place)
    with progress("evaluating", sum(len(rows) for rows in files.values())) as advance:
        evaluation = evaluate(
            target,
            drafter,
            tokenizer,
            files,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            batch_size=batch_size,
            budget=budget,
            copying=copying,
            verification=verification,
            seed=seed,
            on_batch=lambda _, rows: advance(rows),
        )
    record = {
        "target": target_name,
        "drafter": drafter_name,
        "prompts": [path.name for path in prompts],
        "limit": limit,
    }
    record |= evaluation.to_json()
    if output is not None:
        output.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if as_json:
        print_json(record)
    else:
        _print_table(evaluation.files | {"all": evaluation.overall}, greedy=temperature == 0)


def load_pair(
    target_name: str, drafter_name: str, *, dtype: str, device: torch.device
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase, Any]:
    """Loads a target with its tokenizer and its drafter, without the loader's own progress bars."""
    with load_quietly(f"{target_name} and {drafter_name}"):
        dtype = computing(dtype)
        drafter = load_drafter(drafter_name, dtype=dtype, device=device)  # first: it is small, and often the mistaken one
        target, tokenizer = load_target(target_name, dtype=dtype, device=device)
    return target, tokenizer, drafter


@contextmanager
def load_quietly(what: str) -> Iterator[None]:
    """Shows one line while something loads, instead of the loaders' own progress bars and warnings."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()  # else every retry of an unreachable Hub is a line
    with Console(stderr=True).status(f"loading {what}"):
        yield


def pick_device(name: str) -> torch.device:
    """Returns the device of a name; `auto` is CUDA where there is one, else the CPU.

    Raises:
        ValueError: if torch does not know the name, or the machine has no such device.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # Of several launched processes each has its own.
        local = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; write auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} asked for, but torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device


def computing(dtype: str) -> str:
    """The dtype to compute in, of what `--dtype` says: `auto` is the checkpoint's own where the device computes in it."""
    return FAST if dtype == "auto" else dtype


def plain_name(target: str) -> str:
    """A target's name without folders, which differ from machine to machine."""
    return Path(target).expanduser().resolve().name if Path(target).expanduser().is_dir() else target


@contextmanager
def progress(what: str, rows: int, *, show: bool = True) -> Iterator[Any]:
    """Shows a progress bar on stderr; the value is a function that is called with the rows just done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as bar:
        task = bar.add_task(what, total=rows)
        yield lambda done: bar.advance(task, done)


def print_json(record: dict[str, Any]) -> None:
    """Prints one JSON object on one line of stdout."""
    print(json.dumps(record, ensure_ascii=False, allow_nan=False), flush=True)


def figure(value: float | None, digits: int) -> str:
    """Returns a number for a table, `-` where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def _check_early(budget: str | None, dtype: str) -> None:
    """Refuses names that no loading is needed to refuse."""
    parse_dtype(dtype)
    if budget is not None:
        make_budget(budget)


def _texts(batch: list[Conversation], run: Run, tokenizer: transformers.PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    return [
        {
            "prompt": conversation[-1]["content"],
            "text": tokenizer.decode(tokens, skip_special_tokens=True),
            "tokens": len(tokens),
        }
        for conversation, tokens in zip(batch, run.tokens, strict=True)
    ]


def _print_table(measured: dict[str, Measured], *, greedy: bool) -> None:
    console = Console()
    table = Table(title="tokens/s and acceptance (tau counts the target's bonus token)")
    table.add_column("prompts")
    for heading in ("rows", "tau", "plain", "DSpark", "lookup", "speed-up", *(("same text",) if greedy else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in measured.items():
        row = result.to_json(greedy=greedy)
        cells = [
            name,
            str(result.rows),
            figure(row["tau"], 2),
            figure(row["plain_tokens_per_s"], 1),
            figure(row["dspark_tokens_per_s"], 1),
            figure(row["prompt_lookup_tokens_per_s"], 1),
            figure(row["speedup"], 2),
        ]
        table.add_row(*cells, *([f"{result.identical_rows}/{result.rows}"] if greedy else []))
    console.print(table)
    by_position = " ".join(figure(value, 2) for value in measured["all"].acceptance.conditional_acceptance)
    console.print(f"conditional acceptance by position: {by_position}", highlight=False)
