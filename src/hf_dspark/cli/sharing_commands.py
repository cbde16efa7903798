"""What `hf-dspark info`, `convert` and `push` do: describe, write, upload, print. Imports only what each of them needs: `info` is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def run_info(name: str, *, revision: str | None, subfolder: str | None, as_json: bool) -> None:
    """Prints the facts of a checkpoint as a table or a JSON object."""
    from hf_dspark.checkpoints.inspect import describe

    facts = describe(name, revision=revision, subfolder=subfolder)
    if as_json:
        print(json.dumps(facts, ensure_ascii=False), flush=True)
        return
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), _cell(key, value))
    Console().print(table)


def run_convert(source: str, destination: Path, *, to: str, target: str | None, revision: str | None, as_json: bool) -> None:
    """Writes the checkpoint and says where."""
    from hf_dspark.checkpoints.convert import convert

    folder = convert(source, destination, to, target=target, revision=revision)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    if as_json:
        print(json.dumps({"source": source, "to": to, "folder": str(folder), "files": files}), flush=True)
    else:
        Console().print(f"{source} -> {folder} ({to}): {', '.join(files)}", highlight=False)


def run_push(
    source: str,
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    message: str | None,
    licence: str | None,
    tags: list[str] | None,
    calibration_only: bool,
    token: str | None,
    as_json: bool,
) -> None:
    """Uploads, and prints the commit's address."""
    from hf_dspark.checkpoints.push import push_calibration, push_drafter
    from hf_dspark.hub.names import resolve_drafter
    from hf_dspark.models.loading import load_drafter

    place: dict[str, Any] = {"private": private, "token": token, "revision": revision, "create_pr": create_pr}
    if calibration_only:
        commit = push_calibration(resolve_drafter(source), repo_id, commit_message=message or "Upload calibration", **place)
    else:
        commit = push_drafter(load_drafter(source), repo_id, commit_message=message, licence=licence, tags=tags, **place)
    result = {"repository": repo_id, "commit": commit.commit_url, "pull_request": commit.pr_url}
    print(json.dumps(result) if as_json else commit.pr_url or commit.commit_url, flush=True)


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
