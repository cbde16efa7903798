"""The commands about checkpoints: info, convert, push. Knows what a user may type; imports what does the work only when one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_dspark.cli.options import Json

Name = Annotated[str, typer.Argument(help="`smollm2-dspark` (embedded), a folder or a Hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]


def info(
    name: Name,
    revision: Revision = None,
    subfolder: Annotated[str | None, typer.Option(help="Folder inside the repository.")] = None,
    json: Json = False,
) -> None:
    """Tell what a checkpoint is, without loading its weights: format, target, heads, block, taps, calibration, size, limits.

    Reads every format that this package loads. From the Hub only configs and the headers of weight files are fetched.
    """
    from hf_dspark.cli.sharing_commands import run_info

    run_info(name, revision=revision, subfolder=subfolder, as_json=json)


def convert(
    source: Name,
    destination: Annotated[Path, typer.Argument(help="New or empty folder.", file_okay=False)],
    to: Annotated[str, typer.Option(help="hf-dspark, deepspec or speculators.")] = "hf-dspark",
    target: Annotated[str | None, typer.Option(help="The target, where the format holds a copy of its embedding or head.")] = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Write a drafter in another format: this package's, DeepSpec's (SGLang, vLLM) or speculators' (vLLM, llama.cpp).

    Weights stay bit for bit what they are; calibration temperatures go along.
    """
    from hf_dspark.cli.sharing_commands import run_convert

    run_convert(source, destination, to=to, target=target, revision=revision, as_json=json)


def push(
    source: Name,
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; made where it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made where it is missing.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="Licence for the card, as the Hub names it: apache-2.0, ..")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A further tag for the card; repeat it for more.")] = None,
    calibration_only: Annotated[bool, typer.Option("--calibration-only", help="Push calibration.json alone, without weights.")] = False,
    token: Annotated[str | None, typer.Option(help="Default: the one of `hf auth login`, or HF_TOKEN.")] = None,
    json: Json = False,
) -> None:
    """Push a drafter or adapter to the Hub: weights without the target's, config, calibration, results and a card, in one commit."""
    from hf_dspark.cli.sharing_commands import run_push

    run_push(
        source,
        repo_id,
        private=private or None,
        revision=revision,
        create_pr=create_pr,
        message=message,
        licence=licence,
        tags=tag,
        calibration_only=calibration_only,
        token=token,
        as_json=json,
    )
