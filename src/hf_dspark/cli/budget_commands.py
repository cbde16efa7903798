"""What `hf-dspark profile`, `calibrate` and `bench` do: read, load, run, print. Knows the package's public doors, not its loop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from hf_dspark.calibration.records import note_calibration, write_calibration
from hf_dspark.checkpoints.formats.reading import recognise_format
from hf_dspark.cli.commands import figure, load_pair, pick_device, print_json, progress
from hf_dspark.decoding.profiler import CostProfile
from hf_dspark.evaluation.calibrate import calibrate
from hf_dspark.evaluation.load import Contender, bench
from hf_dspark.evaluation.load_plots import plot_costs, plot_load, plot_reliability
from hf_dspark.evaluation.prompts import encode, read_prompts
from hf_dspark.evaluation.speed import Sampling, end_ids_of
from hf_dspark.models.loading import load_drafter, parse_dtype


def run_profile(
    target_name: str,
    drafter_name: str,
    *,
    rows: int,
    sample: bool,
    refresh: bool,
    plot: Path | None,
    dtype: str,
    device: str,
    as_json: bool,
) -> None:
    """Measures or reads the profile, prints it as a table or a JSON object."""
    parse_dtype(dtype)
    target, _, drafter = load_pair(target_name, drafter_name, dtype=dtype, device=pick_device(device))
    with Console(stderr=True).status("measuring rounds"):
        profile = CostProfile.cached(target, drafter, rows=rows, sample=sample, refresh=refresh)
    record = profile.to_json()
    if plot is not None:
        plot_costs(record, plot)
    if as_json:
        print_json(record)
        return
    costs, gamma = profile.costs(sample), profile.block_size
    table = Table(title=f"milliseconds of a {'drawn' if sample else 'greedy'} round: draft, and the rest by tokens a row in the pass")
    counts = sorted({1, 2, 3, 1 + (gamma + 1) // 2, 1 + gamma})
    for heading in ("rows", *(f"draft {n}" for n in (1, gamma)), *(f"verify {n}" for n in counts)):
        table.add_column(heading, justify="right", no_wrap=True)
    for count in sorted(profile.tables["sample" if sample else "greedy"]):
        passes = costs.passes(count, 128)
        cells = [*(costs.draft_s(count, n) for n in (1, gamma)), *(passes.verify_s[count * (n - 1)] + passes.wide_s[n - 1] for n in counts)]
        table.add_row(str(count), *(figure(1e3 * float(s), 1) for s in cells))
    Console().print(table)


def run_calibrate(
    target_name: str,
    drafter_name: str,
    *,
    prompts: Sequence[Path],
    others: Sequence[Path],
    limit: int | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    concurrency: int,
    copying: int | None,
    output: Path | None,
    replace: bool,
    plots: Path | None,
    dtype: str,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """Fits, judges, saves, prints."""
    Sampling(temperature, top_p)
    parse_dtype(dtype)
    own = Path(drafter_name).expanduser()
    if output is None and not own.is_dir():
        raise ValueError(f"--output FOLDER is needed: {drafter_name!r} is no folder on this disk that the calibration could be saved into")
    if own.is_dir() and output is None and not (own / "config.json").is_file():
        raise ValueError(f"{own} holds no config.json to note the temperatures in (an adapter?); name a folder for the whole with --output")
    texts = {path.stem: read_prompts(path, limit) for path in [*prompts, *others]}
    if len(texts) != len(prompts) + len(others):
        raise ValueError("two prompt files have the same name, and results are reported under it; rename one")
    target, tokenizer, drafter = load_pair(target_name, drafter_name, dtype=dtype, device=pick_device(device))
    if drafter.config.confidence_temperatures is not None and not replace:
        raise ValueError(
            f"{drafter_name!r} is calibrated already (temperatures {drafter.config.confidence_temperatures}); a confidence is calibrated "
            "once. Give --replace to fit anew, from confidences before calibration."
        )
    ids = {name: _encoded(tokenizer, rows) for name, rows in texts.items()}
    with progress("decoding files", len(texts)) as advance:
        record = calibrate(
            target,
            drafter,
            {path.stem: ids[path.stem] for path in prompts},
            others={path.stem: ids[path.stem] for path in others},
            end_ids=sorted(end_ids_of(target)),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            concurrency=concurrency,
            copying=copying,
            seed=seed,
            on_file=lambda _: advance(1),
        )
    record = {"target": target_name, **record}
    _save_calibration(drafter_name, drafter, record, own if own.is_dir() else None, output)
    if plots is not None:
        plot_reliability(record, plots)
    if as_json:
        print_json(record)
    else:
        _print_calibration(record)


def _save_calibration(name: str, drafter: Any, record: dict[str, Any], own: Path | None, output: Path | None) -> None:
    """Beside the weights where they are already; else a whole drafter."""
    drafter.set_calibration(record)
    if output is not None and (own is None or output.resolve() != own.resolve()):
        stored = load_drafter(name)  # in the dtype of its files, whatever was computed in
        stored.set_calibration(record)
        stored.save_pretrained(output)
        return
    assert own is not None
    config = json.loads((own / "config.json").read_text(encoding="utf-8"))
    note_calibration(config, record, foreign=recognise_format(config, str(own)) is not None)
    draft = own / "config.json.tmp"
    draft.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_calibration(own, record)
    draft.replace(own / "config.json")


def run_bench(
    target_name: str,
    drafter_name: str,
    *,
    prompts: Sequence[Path],
    concurrencies: list[int],
    budgets: list[str],
    limit: int | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seconds: float,
    repeats: int,
    output: Path | None,
    plots: Path | None,
    dtype: str,
    device: str,
    seed: int,
    verification: str,
) -> None:
    """Measures, writes, prints a table, draws."""
    sampling = Sampling(temperature, top_p)
    parse_dtype(dtype)
    for name in budgets:
        Contender(name)
    files = [read_prompts(path, limit) for path in prompts]
    target, tokenizer, drafter = load_pair(target_name, drafter_name, dtype=dtype, device=pick_device(device))
    longest = max(map(len, files))
    mixed = [rows[i % len(rows)] for i in range(longest) for rows in files]
    runs = (repeats + 1) * sum(1 for n in concurrencies for name in budgets if name != "prompt-lookup" or n == 1)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(end_ids_of(target))
    with progress("measuring", runs) as advance:
        record = bench(
            target,
            drafter,
            _encoded(tokenizer, mixed[:512]),
            end_ids=sorted(end_ids_of(target)),
            pad_id=pad,
            concurrencies=concurrencies,
            budgets=budgets,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            seconds=seconds,
            repeats=repeats,
            seed=seed,
            verification=verification,
            on_cell=lambda *_: advance(1),
        )
    record = {"target": target_name, "drafter": drafter_name, "prompt_files": [path.name for path in prompts], "limit": limit, **record}
    if output is not None:
        output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if plots is not None:
        plot_load(record, plots)
    _print_load(record)


def _encoded(tokenizer: transformers.PreTrainedTokenizerBase, conversations: Sequence[Any]) -> list[list[int]]:
    rows = [encode(tokenizer, [conversation])["input_ids"][0] for conversation in conversations]
    return [row.tolist() if isinstance(row, torch.Tensor) else list(row) for row in rows]


def _print_calibration(record: dict[str, Any]) -> None:
    table = Table(title="calibration of predicted prefix survival, mean over block positions")
    table.add_column("prompts")
    for heading in ("rounds", "ECE before", "ECE after", "AUC", "Brier before", "Brier after"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = {**{f"{name} (held out)": part for name, part in record["files"].items()}, **record["others"]}
    for name, part in rows.items():
        before, after = part["before"], part["after"]
        table.add_row(
            name,
            str(after["rounds"]),
            _percent(before["ece"]),
            _percent(after["ece"]),
            figure(after["auc"], 3),
            figure(before["brier"], 4),
            figure(after["brier"], 4),
        )
    console = Console()
    console.print(table)
    console.print("temperatures: " + " ".join(f"{t:.2f}" for t in record["temperatures"]), highlight=False)
    if "copying" in record:
        console.print("weights of copies: " + " ".join(f"{w:.2f}" for w in record["copying"]["weights"]), highlight=False)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}%"


def _print_load(record: dict[str, Any]) -> None:
    concurrencies, budgets = record["settings"]["concurrency"], record["settings"]["budgets"]
    cells = {(c["concurrency"], c["budget"]): c for c in record["cells"]}
    table = Table(title="tokens/s in all (per user, median) by requests in flight")
    table.add_column("budget")
    for n in concurrencies:
        table.add_column(str(n), justify="right", no_wrap=True)
    for name in budgets:
        found = [cells.get((n, name)) for n in concurrencies]
        table.add_row(name, *("-" if c is None else f"{c['tokens_per_s']:.0f} ({figure(c['user_tokens_per_s_median'], 0)})" for c in found))
    console = Console()
    console.print(table)
    for row in record["summary"]:
        over = {k.removeprefix("load_aware_over_"): v for k, v in row.items() if k.startswith("load_aware_over") and isinstance(v, float)}
        ratios = ", ".join(f"{what} {ratio:.2f}" for what, ratio in over.items())
        if ratios:
            console.print(f"{row['concurrency']} in flight: {row['best_load_aware']} over {ratios}", highlight=False)
