"""What `hf-dspark data` does: read prompts, load the target, let it answer, tell what came of it. Knows the training package's doors, not
its loop."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hf_dspark.cli.commands import computing, load_quietly, pick_device, plain_name, print_json
from hf_dspark.errors import DataError
from hf_dspark.models.loading import load_target, parse_dtype
from hf_dspark.training.conversations import ChatTemplate, Opening, Prompt, prompt_key, read_openings, read_prompts
from hf_dspark.training.memory import keep_freed_memory
from hf_dspark.training.responses import DataSettings, ResponseMaker, make_folder
from hf_dspark.training.responses import Progress as Standing
from hf_dspark.training.rows import parquet
from hf_dspark.training.shards import ResponseFolder
from hf_dspark.version import __version__

FORMATS = ("jsonl", "parquet")
_BAR_SECONDS = 0.5
_LINE_SECONDS = 60.0


@dataclass(frozen=True)
class DataOptions:
    """What a run needs beside how responses are made.

    Args:
        target (`str`): name, folder or Hub id.
        output (`Path`): the data folder.
        prompts (`tuple[str, ...]`): files or Hub data sets.
        exclude (`tuple[Path, ...]`): prompt files whose prompts must not be trained on.
        systems (`tuple[str, ...]`): system prompts for self-prompting.
        begins (`tuple[Path, ...]`): files of openings for self-prompting.
        limit (`int`, *optional*): rows of each file.
        minutes (`float`, *optional*): stop by the clock.
        batch_size (`int`): rows in flight.
        dtype, device (`str`): of the target.
        revision (`str`, *optional*): of the target on the Hub.
        format (`str`): `jsonl` or `parquet`.
        as_json (`bool`): print the counts as one JSON object on the last line.
    """

    target: str
    output: Path
    prompts: tuple[str, ...] = ()
    exclude: tuple[Path, ...] = ()
    systems: tuple[str, ...] = ()
    begins: tuple[Path, ...] = ()
    limit: int | None = None
    minutes: float | None = None
    batch_size: int = 64
    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None
    format: str = "jsonl"
    as_json: bool = False


def openings_of(systems: tuple[str, ...], begins: tuple[Path, ...]) -> tuple[Opening, ...]:
    """What self-prompts begin with: one opening for each system prompt, those of the files, or a bare one where there are none."""
    found = [Opening(f"self-{number}", system=system) for number, system in enumerate(systems, start=1)]
    found += [opening for path in begins for opening in read_openings(path)]
    return tuple(found) or (Opening(),)


def run_data(options: DataOptions, settings: DataSettings) -> None:
    """Generates, or goes on generating, and prints what the folder holds."""
    _check(options, settings)
    place = pick_device(options.device)
    prompts = [prompt for name in options.prompts for prompt in read_prompts(name, options.limit)]
    excluded = frozenset(prompt_key([turn]) for path in options.exclude for prompt in read_prompts(str(path)) for turn in prompt.turns)
    if place.type == "cpu":
        keep_freed_memory()
    with load_quietly(options.target):
        target, tokenizer = load_target(options.target, dtype=computing(options.dtype), device=place, revision=options.revision)
    template = ChatTemplate(tokenizer, thinking=settings.thinking)
    folder = make_folder(options.output, target, template, settings, name=plain_name(options.target))
    with folder.open():
        maker = ResponseMaker(target, template, settings, folder, batch_size=options.batch_size)
        folder.save(_facts(options, settings, prompts, excluded))
        with _Bar() as bar:
            done = maker.run(prompts, excluded=excluded, minutes=options.minutes, on_progress=bar)
        folder.save({"complete": done})
        if done and options.format == "parquet":
            folder.compact()
    _tell(options, folder, done, bar.last)


def _check(options: DataOptions, settings: DataSettings) -> None:
    parse_dtype(options.dtype)
    if not options.prompts and not settings.self_prompts:
        raise DataError("nothing to answer: give --prompts FILE, --self-prompt N, or both.")
    if (options.systems or options.begins) and not settings.self_prompts:
        raise DataError("--system and --begin go with --self-prompt N, the number of prompts that the target is to write.")
    if options.format not in FORMATS:
        raise DataError(f"unknown format {options.format!r}; allowed: {', '.join(FORMATS)}.")
    if options.format == "parquet":
        parquet()


def _facts(options: DataOptions, settings: DataSettings, prompts: list[Prompt], excluded: frozenset[str]) -> dict[str, Any]:
    openings = [{name: value for name, value in vars(opening).items() if value} for opening in settings.openings]
    self_prompting = {
        "prompts": settings.self_prompts,
        "temperature": settings.self_temperature,
        "max_tokens": settings.self_tokens,
        "openings": openings,
    }
    return {
        "prompts": {"files": [Path(name).name for name in options.prompts], "rows": len(prompts)},
        "self_prompting": self_prompting if settings.self_prompts else None,
        "exclude": {"files": [path.name for path in options.exclude], "prompts": len(excluded)},
        "versions": {"hf_dspark": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__},
        "complete": False,
    }


def _tell(options: DataOptions, folder: ResponseFolder, done: bool, last: Standing | None) -> None:
    skipped = folder.skipped
    seconds = last.seconds if last is not None else 0.0
    tokens = last.tokens if last is not None else 0
    if options.as_json:
        print_json(
            {
                "output": str(options.output),
                "complete": done,
                "rows": folder.rows,
                "response_tokens": folder.response_tokens,
                "skipped": skipped,
                "run": {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds if seconds else None},
            }
        )
        return
    console = Console()
    console.print(
        f"{folder.rows} rows, {folder.response_tokens:,} response tokens in {options.output}"
        f"{'' if done else '; not complete, run the same command again to go on'}",
        highlight=False,
        soft_wrap=True,
    )
    for reason, count in skipped.items():
        console.print(f"skipped {count}: {reason}", highlight=False, soft_wrap=True)


class _Bar:
    """A progress bar on stderr: prompts that are through, tokens/s of this run, time left. Where stderr is a file, a line a minute."""

    def __init__(self) -> None:
        columns = (
            TextColumn("responses"),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        self.lines = not console.is_terminal
        # The time left follows the last quarter of an hour: the first rows to finish are short ones.
        self.bar = Progress(*columns, console=console, speed_estimate_period=900, disable=self.lines)
        self.task = self.bar.add_task("responses", total=None, speed="")
        self.first: Standing | None = None
        self.last: Standing | None = None
        self._shown = 0.0

    def __enter__(self) -> _Bar:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.last is not None:
            self._show(self.last)
        self.bar.stop()

    def __call__(self, standing: Standing) -> None:
        if self.first is None:  # What was done before this run says nothing about its speed.
            self.first = standing
            self.bar.reset(self.task, completed=standing.done, total=standing.total)
        self.last = standing
        if time.monotonic() - self._shown >= (_LINE_SECONDS if self.lines else _BAR_SECONDS):
            self._show(standing)

    def _show(self, standing: Standing) -> None:
        self._shown = time.monotonic()
        speed = f"{standing.tokens / standing.seconds:.0f} tokens/s, {standing.rows} rows" if standing.seconds else ""
        self.bar.update(self.task, completed=standing.done, total=standing.total, speed=speed)
        if self.lines:
            made = standing.done - (self.first.done if self.first is not None else 0)
            left = f", {standing.seconds * (standing.total - standing.done) / made / 60:.0f} min left" if made else ""
            print(f"{standing.done}/{standing.total} prompts, {speed}{left}", file=sys.stderr, flush=True)
