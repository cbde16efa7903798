"""The command `data`: read prompts, load the target, let it answer. torch is loaded when it runs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from hf_dspark.cli.common import computing, load_quietly, pick_device, plain_name, print_json
from hf_dspark.cli.dataclass_options import field_options, take
from hf_dspark.cli.options import Device, Dtype, Json, Target
from hf_dspark.cli.progress import RunBar
from hf_dspark.errors import DataError
from hf_dspark.training.configuration import DataSettings, Opening

if TYPE_CHECKING:
    from hf_dspark.training.prompts import Prompt


@dataclass(frozen=True)
class DataOptions:
    """What a run needs beside how responses are made."""

    output: Annotated[Path, typer.Option(file_okay=False, help="The data folder. What it holds already is not made again.")]
    target: Target = "smollm2"
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="A file *.jsonl, *.jsonl.gz or *.parquet, or a Hub data set `owner/name[:split]`; repeat it for more."),
    ] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each file to use, from its top.")] = None
    exclude: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, readable=True, help="A prompt file (an evaluation set) whose prompts are left out."),
    ] = None
    system: Annotated[list[str] | None, typer.Option(help="System prompt under which it writes them; one a domain.")] = None
    begin: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, readable=True, help='JSON lines of first words: {"source": "code", "begin": "Write a"}.'),
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in flight; a row that ends makes room for the next.")] = 64
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Stop by the clock; the same command goes on later.")] = None
    format: Annotated[Literal["jsonl", "parquet"], typer.Option(help="jsonl, or parquet once all is answered.")] = "jsonl"
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the target on the Hub.")] = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    as_json: Json = False


@field_options(DataOptions, DataSettings)
def data(**options: Any) -> None:
    """Let the target write the responses that its drafter learns from.

    A prompt row is {"turns": ["text", ..]} (every turn is answered), {"messages": [..]} (answers in it are made anew) or {"text": ".."}
    (raw text, continued). Run the same command again after an interruption, even a kill: nothing is lost, nothing is made twice.
    """
    run = DataOptions(**take(DataOptions, options))
    from hf_dspark.models.loading import load_target, parse_dtype
    from hf_dspark.training.data_generation import ResponseMaker, make_folder
    from hf_dspark.training.dialogues import ChatTemplate
    from hf_dspark.training.memory import keep_freed_memory
    from hf_dspark.training.prompts import prompt_key, read_openings, read_prompts
    from hf_dspark.training.rows import parquet

    # What can be wrong by itself is found before the target is loaded.
    openings = [Opening(f"self-{number}", system=system) for number, system in enumerate(run.system or (), start=1)]
    openings += [opening for path in run.begin or () for opening in read_openings(path)]
    settings = DataSettings(**{**take(DataSettings, options), "openings": tuple(openings) or (Opening(),)})
    parse_dtype(run.dtype)
    if not run.prompts and not settings.self_prompts:
        raise DataError("nothing to answer: give --prompts FILE, --self-prompt N, or both.")
    if openings and not settings.self_prompts:
        raise DataError("--system and --begin go with --self-prompt N, the number of prompts that the target is to write.")
    if run.format == "parquet":
        parquet()
    device = pick_device(run.device)
    prompts = [prompt for name in run.prompts or () for prompt in read_prompts(name, run.limit)]
    excluded = frozenset(prompt_key([turn]) for path in run.exclude or () for prompt in read_prompts(str(path)) for turn in prompt.turns)
    if device.type == "cpu":
        keep_freed_memory()
    with load_quietly(run.target):
        target, tokenizer = load_target(run.target, dtype=computing(run.dtype), device=device, revision=run.revision)
    template = ChatTemplate(tokenizer, thinking=settings.thinking)
    folder = make_folder(run.output, target, template, settings, name=plain_name(run.target))
    with folder.open():
        maker = ResponseMaker(target, template, settings, folder, batch_size=run.batch_size)
        folder.save(_facts(run, settings, prompts, excluded))
        started = time.monotonic()
        with RunBar("responses") as bar:

            def show() -> None:
                speed = maker.tokens / max(time.monotonic() - started, 1e-9)
                bar.update(maker.done, maker.total, f"{maker.done}/{maker.total} prompts, {speed:.0f} tokens/s, {folder.rows} rows")

            done = maker.run(prompts, excluded=excluded, minutes=run.minutes, on_round=show)
        seconds = time.monotonic() - started
        folder.save({"complete": done})
        if done and run.format == "parquet":
            folder.compact()
    if run.as_json:
        speed = {"tokens": maker.tokens, "seconds": seconds, "tokens_per_s": maker.tokens / seconds if maker.tokens else None}
        counts = {"rows": folder.rows, "response_tokens": folder.response_tokens, "skipped": folder.skipped}
        print_json({"output": str(run.output), "complete": done, **counts, "run": speed})
        return
    end = "" if done else "; not complete, run the same command again to go on"
    lines = [f"{folder.rows} rows, {folder.response_tokens:,} response tokens in {run.output}{end}"]
    lines += [f"skipped {count}: {reason}" for reason, count in folder.skipped.items()]
    Console().print("\n".join(lines), highlight=False, soft_wrap=True)


def _facts(run: DataOptions, settings: DataSettings, prompts: list[Prompt], excluded: frozenset[str]) -> dict[str, Any]:
    """What the manifest says of this run beside what must stay the same."""
    import torch
    import transformers

    from hf_dspark.version import __version__

    self_prompting = {
        "prompts": settings.self_prompts,
        "temperature": settings.self_temperature,
        "max_tokens": settings.self_tokens,
        "openings": [{name: value for name, value in vars(opening).items() if value} for opening in settings.openings],
    }
    return {
        "prompts": {"files": [Path(name).name for name in run.prompts or ()], "rows": len(prompts)},
        "self_prompting": self_prompting if settings.self_prompts else None,
        "exclude": {"files": [path.name for path in run.exclude or ()], "prompts": len(excluded)},
        "versions": {"hf_dspark": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__},
        "complete": False,
    }
