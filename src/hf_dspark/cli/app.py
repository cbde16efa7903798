"""The command line's table of contents. Its modules import torch only when a command runs, so that `--help` answers at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from hf_dspark.cli.calibrate import calibrate, profile
from hf_dspark.cli.checkpoints import convert, info, push
from hf_dspark.cli.data import data
from hf_dspark.cli.demo import demo
from hf_dspark.cli.evaluate import bench, evaluate
from hf_dspark.cli.generate import generate
from hf_dspark.cli.train import finetune, train
from hf_dspark.version import __version__

app = typer.Typer(name="hf-dspark", add_completion=False, rich_markup_mode=None)
COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "generate": generate,
    "eval": evaluate,
    "profile": profile,
    "calibrate": calibrate,
    "bench": bench,
    "data": data,
    "train": train,
    "finetune": finetune,
    "info": info,
    "convert": convert,
    "push": push,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Lossless speculative decoding with DSpark drafters for transformers."""
    if version:
        typer.echo(f"hf-dspark {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise typer.BadParameter(f"no command given; choose one of {', '.join(COMMANDS)}.")
