"""What several commands share: devices, loading, progress on stderr, results on stdout. Loads torch and transformers only when called."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_dspark.models.modeling_dspark import DSparkDrafter

_LINE_SECONDS = 10.0  # between lines of progress where stderr is no terminal


def load_pair(
    target_name: str, drafter_name: str, dtype: str, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, DSparkDrafter]:
    """Loads a target, its tokenizer and its drafter, without the loaders' own progress bars."""
    from hf_dspark.models.loading import load_drafter, load_target, parse_dtype

    parse_dtype(dtype)
    place = pick_device(device)
    with load_quietly(f"{target_name} and {drafter_name}"):
        drafter = load_drafter(drafter_name, dtype=computing(dtype), device=place)  # first: it is small, and often the mistaken one
        target, tokenizer = load_target(target_name, dtype=computing(dtype), device=place)
    return target, tokenizer, drafter


@contextmanager
def load_quietly(what: str) -> Iterator[None]:
    """Shows one line while something loads, instead of the loaders' own progress bars and warnings."""
    import huggingface_hub
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()  # else every retry of an unreachable Hub is a line
    with Console(stderr=True).status(f"loading {what}"):
        yield


def pick_device(name: str) -> torch.device:
    """Returns the device of a name; `auto` is CUDA where there is one, else the CPU.

    Raises:
        ValueError: if torch has no such device, or the machine has not.
    """
    import torch

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
        raise ValueError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device


def computing(dtype: str) -> str:
    """The dtype to compute in, of what `--dtype` says: `auto` is the checkpoint's own where the device computes in it."""
    return "fast" if dtype == "auto" else dtype


def plain_name(target: str) -> str:
    """A target's name without folders, which differ from machine to machine."""
    return Path(target).expanduser().resolve().name if Path(target).expanduser().is_dir() else target


def check_parent(path: Path | None, option: str) -> None:
    """Refuses an output file whose folder does not exist, before anything is measured."""
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"the folder {path.absolute().parent} does not exist.", param_hint=f"'{option}'")


@contextmanager
def progress(what: str, total: int, *, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Shows progress on stderr: a bar on a terminal, else a line every ten seconds; yields a function of the steps just done."""
    console = Console(stderr=True)
    if show and not console.is_terminal:
        yield _lines(what, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not show) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def _lines(what: str, total: int) -> Callable[[int], None]:
    count, last = 0, time.monotonic()

    def advance(done: int) -> None:
        nonlocal count, last
        count += done
        if time.monotonic() - last >= _LINE_SECONDS or count == total:
            last = time.monotonic()
            print(f"{what}: {count} of {total}", file=sys.stderr, flush=True)

    return advance


def print_json(record: dict[str, Any]) -> None:
    """Prints one JSON object on one line of stdout."""
    print(json.dumps(record, ensure_ascii=False, allow_nan=False), flush=True)


def figure(value: float | None, digits: int) -> str:
    """Returns a number for a table, `-` where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"
