"""The commands about budgets: profile, calibrate, bench. Knows what a user may type; imports what does the work only when one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_dspark.cli.options import (
    Device,
    Drafter,
    Dtype,
    Json,
    Limit,
    MaxNewTokens,
    PromptFiles,
    Seed,
    Target,
    Temperature,
    TopP,
    Verification,
)

DEFAULT_BUDGETS = "plain,full,static:1,static:2,static:4,threshold:0.5,load-aware,load-aware-lag2"


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers of 1 or more, such as 1,4,16.")
    return found


def profile(
    target: Target = "smollm2",
    drafter: Drafter = "smollm2-dspark",
    rows: Annotated[int, typer.Option(min=1, max=64, help="Largest batch to measure; 1, 2, 4 .. up to it are.")] = 32,
    sample: Annotated[bool, typer.Option("--sample", help="Rounds that draw tokens, instead of greedy ones.")] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again what is remembered.")] = False,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="Draw the times to this file (.png).")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure what rounds cost on this machine, and remember it for the load-aware budgets.

    They measure it themselves where it is missing; this command shows it, and measures it again after the machine has changed.
    """
    from hf_dspark.cli.budget_commands import run_profile

    run_profile(target, drafter, rows=rows, sample=sample, refresh=refresh, plot=plot, dtype=dtype, device=device, as_json=json)


def calibrate(
    prompts: PromptFiles,
    target: Target = "smollm2",
    drafter: Drafter = "smollm2-dspark",
    others: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, readable=True, help="Prompts of another domain to judge on, not to fit; repeat it."),
    ] = None,
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    copying: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=64,
            help="Fit how far the drafter may copy what the text repeats, matches of up to so many tokens told apart (64 is most); 0: it "
            "shall not. Default: as it does now.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder for the calibrated drafter. Default: the drafter's own folder, where it has one."),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Fit anew what is calibrated already.")] = False,
    plots: Annotated[Path | None, typer.Option(file_okay=False, help="Draw reliability diagrams into this folder.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Fit the temperatures of a drafter's confidences on decoded prompts, and judge them on prompts held out.

    Half of the prompts, by their hash, are for judging. The record is saved with the drafter as calibration.json.
    """
    from hf_dspark.cli.budget_commands import run_calibrate

    run_calibrate(
        target,
        drafter,
        prompts=prompts,
        others=others or [],
        limit=limit,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        concurrency=concurrency,
        copying=copying,
        output=output,
        replace=replace,
        plots=plots,
        dtype=dtype,
        device=device,
        seed=seed,
        as_json=json,
    )


def bench(
    prompts: PromptFiles,
    target: Target = "smollm2",
    drafter: Drafter = "smollm2-dspark",
    concurrency: Annotated[str, typer.Option(help="Requests in flight: a list of numbers.")] = "1,2,4,8,16,32",
    budgets: Annotated[
        str,
        typer.Option(
            help="What to compare: budgets (behind one that reads confidences, @raw is without calibration, @fixed without its online "
            "part), `plain` (no drafting), `generate` (transformers' batched call), `prompt-lookup` (its lookup, at concurrency 1)."
        ),
    ] = DEFAULT_BUDGETS,
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of a turn, about; it ends after as many tokens for all contenders.")] = 0.5,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each contender at each concurrency.")] = 24,
    json: Annotated[Path | None, typer.Option(dir_okay=False, writable=True, help="Write everything to this file.")] = None,
    plots: Annotated[Path | None, typer.Option(file_okay=False, help="Draw plots into this folder.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    verification: Verification = "block",
) -> None:
    """Compare budgets under load: total tokens a second and tokens a second per user, with N requests in flight.

    As one request ends the next joins, so the number in flight holds. Prompts of several files take turns.
    """
    if json is not None and not json.absolute().parent.is_dir():
        raise typer.BadParameter(f"the folder {json.absolute().parent} does not exist.", param_hint="'--json'")
    from hf_dspark.cli.budget_commands import run_bench

    run_bench(
        target,
        drafter,
        prompts=prompts,
        concurrencies=_numbers(concurrency),
        budgets=[name.strip() for name in budgets.split(",")],
        limit=limit,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seconds=seconds,
        repeats=repeats,
        output=json,
        plots=plots,
        dtype=dtype,
        device=device,
        seed=seed,
        verification=verification,
    )
