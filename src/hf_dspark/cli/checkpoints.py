"""The commands about checkpoints: info, convert, push."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_dspark.cli.options import Json

Name = Annotated[str, typer.Argument(help="`smollm2-dspark` (bundled), a folder or a Hub id.")]
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
    from rich.console import Console
    from rich.table import Table

    from hf_dspark.checkpoints.inspect import describe

    facts = describe(name, revision=revision, subfolder=subfolder)
    if json:
        _print(facts)
        return
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), _cell(key, value))
    Console().print(table)


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
    from hf_dspark.checkpoints.convert import convert as write
    from hf_dspark.models.loading import load_drafter, load_target

    drafter = load_drafter(source, revision=revision)
    model = load_target(target, dtype=drafter.dtype)[0] if target is not None else None
    folder = write(drafter, destination, to, target=model)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    if json:
        _print({"source": source, "to": to, "folder": str(folder), "files": files})
    else:
        print(f"{source} -> {folder} ({to}): {', '.join(files)}")


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
    from hf_dspark.checkpoints.push import push_calibration, push_drafter
    from hf_dspark.hub.names import resolve_drafter
    from hf_dspark.models.loading import load_drafter

    place: dict[str, Any] = {"private": private or None, "token": token, "revision": revision, "create_pr": create_pr}
    if calibration_only:
        commit = push_calibration(resolve_drafter(source), repo_id, commit_message=message or "Upload calibration", **place)
    else:
        commit = push_drafter(load_drafter(source), repo_id, commit_message=message, licence=licence, tags=tag, **place)
    if json:
        _print({"repository": repo_id, "commit": commit.commit_url, "pull_request": commit.pr_url})
    else:
        print(commit.pr_url or commit.commit_url)


def _print(record: dict[str, Any]) -> None:
    print(json_module.dumps(record, ensure_ascii=False), flush=True)


def _cell(key: str, value: Any) -> str:
    if value is None or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "bytes":
        return f"{value / 1e6:.1f} MB"
    if key == "ece_after":
        return f"{100 * value:.1f}%"
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
