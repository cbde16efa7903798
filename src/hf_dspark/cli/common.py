"""What several commands share: devices, loading, results on stdout. Loads torch and transformers only when called."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import torch


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


def read_files(paths: Sequence[Path], limit: int | None) -> dict[str, list[Any]]:
    """The conversations of prompt files, by the names that results are reported under."""
    from hf_dspark.evaluation.prompts import read_prompts

    files = {path.stem: read_prompts(path, limit) for path in paths}
    if len(files) < len(paths) or "all" in files:
        raise ValueError(f"results are reported under files' names: {', '.join(map(str, paths))}; rename one of the same name, or `all`")
    return files


def print_json(record: dict[str, Any]) -> None:
    """Prints one JSON object on one line of stdout."""
    print(json.dumps(record, ensure_ascii=False, allow_nan=False), flush=True)


def figures_table(title: str, *headings: str) -> Table:
    """A table whose columns hold figures, but for the first."""
    table = Table(title=title)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=place > 0)
    return table


def figure(value: float | None, digits: int) -> str:
    """Returns a number for a table, `-` where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"
