"""The commands `eval` and `bench`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_dspark.cli import options as opt
from hf_dspark.cli.common import check_parent, figure, figures_table, print_json, read_files
from hf_dspark.cli.dataclass_options import field_options
from hf_dspark.cli.progress import progress

DEFAULT_BUDGETS = "plain,full,static:1,static:2,static:4,threshold:0.5,load-aware,load-aware-lag2"
_BENCH_PROMPTS = 512


@field_options(opt.Settings)
def evaluate(
    prompts: opt.PromptFiles,
    limit: opt.Limit = None,
    json: opt.Json = False,
    output: Annotated[Path | None, typer.Option(dir_okay=False, writable=True, help="Also write the JSON object to this file.")] = None,
    **options: Any,
) -> None:
    """Measure accepted length, acceptance by position, and speed against the plain target and prompt lookup.

    tau is the accepted length a round INCLUDING the target's own bonus token.
    """
    check_parent(output, "--output")
    how = opt.chosen(options)
    from hf_dspark.evaluation.speed import evaluate as run
    from hf_dspark.utils.files import atomic_write_json

    files = read_files(prompts, limit)
    bench = how.with_plain_target(how.bench())
    with progress("evaluating", sum(map(len, files.values()))) as advance:
        found = run(bench, files, batch_size=how.batch_size, on_batch=advance)
    record = {"target": how.target, "drafter": how.drafter, "prompts": [path.name for path in prompts], "limit": limit, **found}
    if output is not None:
        atomic_write_json(output, record)
    if json:
        print_json(record)
    else:
        _print_evaluation(record)


def _print_evaluation(record: Mapping[str, Any]) -> None:
    greedy = record["identical_rows"] is not None
    compiled = "plain_compiled_tokens_per_s" in record
    over = ["compiled", "over it"] if compiled else []
    headings = ["prompts", "rows", "tau", "plain", "DSpark", "lookup", "speed-up", *over, *(["same text"] if greedy else [])]
    table = figures_table("tokens/s and acceptance (tau counts the target's bonus token)", *headings)
    figures = {"tau": 2, "plain_tokens_per_s": 1, "dspark_tokens_per_s": 1, "prompt_lookup_tokens_per_s": 1, "speedup": 2}
    figures |= {"plain_compiled_tokens_per_s": 1, "speedup_over_compiled": 2} if compiled else {}
    for name, row in {**record["files"], "all": record}.items():
        same = [f"{row['identical_rows']}/{row['rows']}"] if greedy else []
        table.add_row(name, str(row["rows"]), *(figure(row[key], digits) for key, digits in figures.items()), *same)
    console = Console()
    console.print(table)
    by_position = " ".join(figure(value, 2) for value in record["conditional_acceptance"])
    console.print(f"conditional acceptance by position: {by_position}", highlight=False)
    if compiled:
        seconds = ", ".join(f"{method} {value:.0f}" for method, value in record["settings"]["first_runs_s"].items())
        console.print(f"DSpark in compiled rounds; seconds of the first runs, compilation included: {seconds}", highlight=False)
    plain, other = record["settings"]["plain_dtype"], record["settings"]["target_dtype"]
    if plain != other:
        console.print(f"plain in {plain}, the others in {other}: each in the dtype that is faster for it here", highlight=False)


@field_options(opt.Settings, only=opt.PAIR | opt.SAMPLING | {"verification", "compile"})
def bench(
    prompts: opt.PromptFiles,
    concurrency: Annotated[str, typer.Option(help="Requests in flight: a list of numbers.")] = "1,2,4,8,16,32",
    budgets: Annotated[
        str,
        typer.Option(
            help="What to compare: budgets (behind one that reads confidences, @raw is without calibration, @fixed without learning costs "
            "and calibration online), `plain` (no drafting), `generate` (transformers' batched call), `prompt-lookup` (its lookup, at "
            "concurrency 1)."
        ),
    ] = DEFAULT_BUDGETS,
    limit: opt.Limit = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of a turn, about; it ends after as many tokens for all contenders.")] = 0.5,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each contender at each concurrency.")] = 24,
    json: Annotated[
        Path | None, typer.Option(dir_okay=False, writable=True, help="Write everything to this file, after each concurrency what is done.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(file_okay=False, help="Draw plots into this folder.")] = None,
    **options: Any,
) -> None:
    """Compare budgets under load: total tokens a second and tokens a second per user, with N requests in flight.

    As one request ends the next joins, so the number in flight holds. Prompts of several files take turns.
    """
    check_parent(json, "--json")
    sizes, names = _numbers(concurrency), [name.strip() for name in budgets.split(",")]
    how = opt.chosen(options)
    from hf_dspark.evaluation.load_benchmark import Contender, Load
    from hf_dspark.evaluation.load_benchmark import bench as run
    from hf_dspark.evaluation.plots import plot_load
    from hf_dspark.evaluation.prompts import prompt_ids, read_prompts
    from hf_dspark.utils.files import atomic_write_json

    for name in names:
        Contender(name)
    files = [read_prompts(path, limit) for path in prompts]
    mixed = [rows[i % len(rows)] for i in range(max(map(len, files))) for rows in files][:_BENCH_PROMPTS]
    bench = how.bench()
    about = {"target": how.target, "drafter": how.drafter, "prompt_files": [path.name for path in prompts], "limit": limit}
    load = Load(bench, prompt_ids(bench.tokenizer, mixed), seconds=seconds, repeats=repeats)

    def done(record: dict[str, Any]) -> None:
        """Shows the cells of a concurrency that is done, and writes all so far."""
        for cell in record["cells"]:
            if cell["concurrency"] == record["cells"][-1]["concurrency"]:
                typer.echo(f"{cell['concurrency']} in flight, {cell['budget']}: {cell['tokens_per_s']:.1f} tokens/s", err=True)
        if json is not None:
            atomic_write_json(json, about | record, indent=1)

    typer.echo(f"{len(names)} contenders at {concurrency} requests in flight; a missing cost profile is measured first", err=True)
    with progress("measuring", (repeats + 1) * len(sizes)) as advance:
        record = about | run(load, concurrencies=sizes, budgets=names, on_turn=lambda: advance(1), on_concurrency=done)
    if plots is not None:
        plot_load(record, plots)
    _print_load(record)


def _numbers(text: str) -> list[int]:
    if not re.fullmatch(r" *[1-9]\d* *(, *[1-9]\d* *)*", text):
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers of 1 or more, such as 1,4,16.")
    return [int(part) for part in text.split(",")]


def _print_load(record: Mapping[str, Any]) -> None:
    cells, sizes = {(c["concurrency"], c["budget"]): c for c in record["cells"]}, record["settings"]["concurrency"]
    table = figures_table("tokens/s in all (per user, median) by requests in flight", "budget", *map(str, sizes))
    for name in record["settings"]["budgets"]:
        found = [cells.get((n, name)) for n in sizes]
        table.add_row(name, *("-" if c is None else f"{c['tokens_per_s']:.0f} ({figure(c['user_tokens_per_s_median'], 0)})" for c in found))
    console = Console()
    console.print(table)
    for row in record["summary"]:
        over = {k.removeprefix("load_aware_over_"): v for k, v in row.items() if k.startswith("load_aware_over") and isinstance(v, float)}
        if over:
            ratios = ", ".join(f"{what} {ratio:.2f}" for what, ratio in over.items())
            console.print(f"{row['concurrency']} in flight: {row['best_load_aware']} over {ratios}", highlight=False)
