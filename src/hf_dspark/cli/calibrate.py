"""The commands `calibrate` and `profile`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hf_dspark.cli import options as opt
from hf_dspark.cli.common import figure, figures_table, print_json, read_files
from hf_dspark.cli.dataclass_options import field_options
from hf_dspark.cli.progress import progress

if TYPE_CHECKING:
    from hf_dspark.models.modeling_dspark import DSparkDrafter


@field_options(opt.Settings, only=opt.PAIR | {"compile"})
def profile(
    rows: Annotated[int, typer.Option(min=1, max=64, help="Largest batch to measure; 1, 2, 4 .. up to it are.")] = 32,
    sample: Annotated[bool, typer.Option("--sample", help="Rounds that draw tokens, instead of greedy ones.")] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again what is stored.")] = False,
    json: opt.Json = False,
    **options: Any,
) -> None:
    """Measure what rounds cost on this machine, and store it for the load-aware budgets.

    Without a stored profile they start from a guess and learn from their own rounds. Measure again after the machine has changed.
    """
    from hf_dspark.decoding.profiler import CostProfile

    bench = opt.chosen(options).bench()
    with Console(stderr=True).status("measuring rounds"):
        found = CostProfile.cached(bench.target, bench.drafter, rows=rows, sample=sample, compiled=bench.compile, refresh=refresh)
    if json:
        print_json(found.to_json())
        return
    costs, gamma = found.costs(sample), found.block_size
    counts = sorted({1, 2, 3, 1 + (gamma + 1) // 2, 1 + gamma})
    title = f"milliseconds of a {'drawn' if sample else 'greedy'} round: draft, and all else by tokens a row in the pass"
    table = figures_table(title, "rows", "draft 1", f"draft {gamma}", *(f"verify {n}" for n in counts))
    for count in sorted(found.tables["sample" if sample else "greedy"]):
        passes = costs.passes(count, 128)
        times = [*(costs.draft_s(count, n) for n in (1, gamma)), *(passes.verify_s[count * (n - 1)] + passes.wide_s[n - 1] for n in counts)]
        table.add_row(str(count), *(figure(1e3 * float(seconds), 1) for seconds in times))
    Console().print(table)


@field_options(opt.Settings, only=opt.PAIR | opt.SAMPLING)
def calibrate(
    prompts: opt.PromptFiles,
    others: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, readable=True, help="Prompts of another domain to judge on, not to fit; repeat it."),
    ] = None,
    limit: opt.Limit = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    copying: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=64,
            help="Fit the weights of n-gram copies too, for matches of up to so many tokens; 0: no copying. Default: as it is.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder for the calibrated drafter. Default: the drafter's own folder, where it has one."),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Fit anew what is calibrated already.")] = False,
    plots: Annotated[Path | None, typer.Option(file_okay=False, help="Draw reliability diagrams into this folder.")] = None,
    json: opt.Json = False,
    **options: Any,
) -> None:
    """Fit the temperatures of a drafter's confidences on decoded prompts, and judge them on prompts held out.

    Half of the prompts, by their hash, are for judging. The record is saved with the drafter as calibration.json.
    """
    from hf_dspark.evaluation.calibrate import calibrate as run
    from hf_dspark.evaluation.plots import plot_reliability
    from hf_dspark.evaluation.prompts import prompt_ids
    from hf_dspark.utils.tokens import eos_token_ids

    how = opt.chosen(options)
    folder = _folder(how.drafter, output)
    paths = [*prompts, *(others or [])]
    texts = read_files(paths, limit)
    bench = how.bench()
    target, drafter = bench.target, bench.drafter
    if drafter.config.confidence_temperatures is not None and not replace:
        raise ValueError(
            f"{how.drafter!r} is calibrated already (temperatures {drafter.config.confidence_temperatures}); a confidence is calibrated "
            "once. Give --replace to fit anew, from confidences before calibration."
        )
    ids = {name: prompt_ids(bench.tokenizer, rows) for name, rows in texts.items()}
    fit, judge = ({path.stem: ids[path.stem] for path in group} for group in (prompts, others or []))
    with progress("decoding files", len(texts)) as advance:
        record = run(
            target, drafter, fit, others=judge, end_ids=eos_token_ids(target), max_new_tokens=how.max_new_tokens,
            temperature=how.temperature, top_p=how.top_p, concurrency=concurrency, copying=copying, seed=how.seed,
            on_file=lambda: advance(1),
        )  # fmt: skip
    record = {"target": how.target, **record}
    _save(how.drafter, drafter, record, folder)
    if plots is not None:
        plot_reliability(record, plots)
    if json:
        print_json(record)
    else:
        _print_calibration(record)


def _folder(drafter: str, output: Path | None) -> Path:
    """Where the calibration goes; refused before anything is decoded."""
    own = Path(drafter).expanduser()
    if output is not None:
        return output
    if not own.is_dir():
        raise ValueError(f"--output FOLDER is needed: {drafter!r} is not a folder on this disk that the calibration could be saved into")
    if not (own / "config.json").is_file():
        raise ValueError(f"{own} holds no config.json to note the temperatures in (an adapter?); name a folder for the whole with --output")
    return own


def _save(name: str, drafter: DSparkDrafter, record: dict[str, Any], folder: Path) -> None:
    """Beside the weights where these are in the folder already; else a whole drafter, in the dtype of its files."""
    import json

    from hf_dspark.calibration.records import note_calibration, write_calibration
    from hf_dspark.checkpoints.formats import recognise_format
    from hf_dspark.models.loading import load_drafter
    from hf_dspark.utils.files import atomic_write_json

    drafter.set_calibration(record)
    if folder.resolve() != Path(name).expanduser().resolve():
        stored = load_drafter(name)
        stored.set_calibration(record)
        stored.save_pretrained(folder)
        return
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    note_calibration(config, record, foreign=recognise_format(config, str(folder)) is not None)
    write_calibration(folder, record)
    atomic_write_json(folder / "config.json", config, sort_keys=True)


def _print_calibration(record: Mapping[str, Any]) -> None:
    title = "calibration of predicted prefix survival, mean over block positions"
    table = figures_table(title, "prompts", "rounds", "ECE before", "ECE after", "AUC", "Brier before", "Brier after")
    for name, part in {**{f"{name} (held out)": part for name, part in record["files"].items()}, **record["others"]}.items():
        before, after = part["before"], part["after"]
        errors = [figure(None if one["ece"] is None else 100 * one["ece"], 2) + "%" for one in (before, after)]
        table.add_row(name, str(after["rounds"]), *errors, figure(after["auc"], 3), figure(before["brier"], 4), figure(after["brier"], 4))
    console = Console()
    console.print(table)
    console.print("temperatures: " + " ".join(f"{t:.2f}" for t in record["temperatures"]), highlight=False)
    if "copying" in record:
        console.print("weights of n-gram copies: " + " ".join(f"{w:.2f}" for w in record["copying"]["weights"]), highlight=False)
