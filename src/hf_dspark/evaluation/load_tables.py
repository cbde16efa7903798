"""Tables of load benchmarks, calibrations and drifts. Knows result records; knows no models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_dspark.evaluation.tables import judged, machine_line, markdown_table, number, percent


def render_load(record: Mapping[str, Any]) -> str:
    """Throughput of every contender at every concurrency, and what the load-aware budgets make of it, from `hf-dspark bench`."""
    settings = record["settings"]
    cells = {(cell["concurrency"], cell["budget"]): cell for cell in record["cells"]}
    sizes = settings["concurrency"]

    def row(name: str) -> list[str]:
        found = [cells.get((n, name)) for n in sizes]
        return [f"`{name}`", *("-" if c is None else _rate(c) for c in found)]

    rates = markdown_table(["tokens/s in all, by requests in flight", *map(str, sizes)], [row(name) for name in settings["budgets"]])
    summary = record["summary"]
    ratios = markdown_table(
        ["best load-aware budget, by requests in flight", *map(str, sizes)],
        [
            ["budget", *(f"`{one.get('best_load_aware', '-')}`" for one in summary)],
            ["best of plain, full, static", *(f"`{one.get('best_fixed', '-')}`" for one in summary)],
            *(
                [f"over {what}", *(_with_spread(one, f"load_aware_over_{key}") for one in summary)]
                for what, key in (("that best", "best_fixed"), ("plain", "plain"), ("full", "full"))
            ),
            *(
                [f"verified tokens a request, `{name}`", *(number(cells[n, name]["verified_tokens_per_request"], 2) for n in sizes)]
                for name in settings["budgets"]
                if name in ("load-aware", "load-aware-lag2")
            ),
        ],
    )
    sampling = "Greedy" if settings["temperature"] == 0 else f"T = {settings['temperature']:g}, {judged(settings)}"
    turns, where = f"{settings['repeats']} turns of", f"on the same prompts ({', '.join(record['prompt_files'])})."
    if settings.get("turns_end_by") == "tokens":
        how = "go on side by side, a few tokens at a time, in turns" if settings.get("slice_seconds") else "keep running and take turns,"
        method = (
            f"Over {turns} about {settings['seconds']:g} s, in brackets the slowest and fastest; behind ratios what 90% of draws of turns "
            f"give. Contenders {how} of as many tokens each, {where}"
        )
    else:
        method = (
            f"Median of {turns} {settings['seconds']:g} s, in brackets lowest to highest; ratios turn by turn, in brackets their quartiles."
            f" Contenders keep running and take turns {where}"
        )
    note = (
        f"{method} {sampling}, at most {settings['max_new_tokens']} new tokens, target {settings['target_dtype']}, seed {settings['seed']}."
        f" {machine_line(record)}"
    )
    return f"{rates}\n\n{ratios}\n\n{note}"


def render_replay(record: Mapping[str, Any]) -> str:
    """What budgets give on the same recorded blocks with the cost profile for a clock, from `python -m examples.benchmarks.replay`."""
    settings = record["settings"]
    cells = {(cell["concurrency"], cell["budget"]): cell for cell in record["cells"]}
    sizes = settings["concurrency"]
    rates = [[f"`{name}`", *(number(cells[n, name]["tokens_per_s"], 1) for n in sizes)] for name in settings["budgets"]]
    best = (number(one.get("load_aware_over_best_fixed"), 3) for one in record["summary"])
    ratios = [["**best load-aware over the best of plain, full, static**", *best]]
    misled = record.get("misjudged", [])
    for row in misled:
        what = "as they are" if row["tokens_taken_for"] == 1 else f"at {row['tokens_taken_for']:g} of their cost"
        how = "follows costs" if row["follows_costs"] else "does not follow"
        ratios.append([f"`{row['budget']}`, tokens {what}, {how}", *(number(ratio, 3) for ratio in row["over_best_fixed"])])
    heard = (
        " Below it, over the same best: budgets whose profile takes drafted tokens for more or less than the clock does, and which hear "
        f"of passes' times {100 * settings['noise']:g}% off, of one in fifty as five times as long."
        if misled
        else ""
    )
    source = f" in {record['costs_file']} ({machine_line({'machine': record['costs_machine']})[:-1]})" if record.get("costs_file") else ""
    note = (
        f"{settings['answers']} greedy answers ({', '.join(record['prompt_files'])}), a block drafted at each of their "
        f"{settings['places']:,} places; {settings['requests']} answers served in {settings['orders']} orders; seconds from the cost "
        f"profile{source}, prompt passes and the budgets' own time left out.{heard} Seed {settings['seed']}. {machine_line(record)}"
    )
    return f"{markdown_table(['tokens/s, by requests in flight', *map(str, sizes)], [*rates, *ratios])}\n\n{note}"


def _with_spread(row: Mapping[str, Any], key: str) -> str:
    ends = row.get(f"{key}_interval") or row.get(f"{key}_quartiles")
    spread = f" ({ends[0]:.2f}-{ends[1]:.2f})" if ends and ends[0] != ends[1] else ""
    return f"{number(row.get(key), 2)}{spread}"


def _rate(cell: Mapping[str, Any]) -> str:
    return f"{cell['tokens_per_s']:.0f} ({cell['tokens_per_s_lowest']:.0f}-{cell['tokens_per_s_highest']:.0f})"


def render_calibration(record: Mapping[str, Any]) -> str:
    """Calibration error, AUC and Brier score before and after, from `calibration.json`."""
    together = {"all of these together": record} if len(record["files"]) > 1 else {}
    parts = {**{f"{name}, held out": part for name, part in record["files"].items()}, **together, **record["others"]}
    table = markdown_table(
        ["prompts", "rounds", "ECE before", "ECE after", "AUC", "Brier before", "Brier after", "ECE after, by position"],
        [
            [
                name,
                str(part["after"]["rounds"]),
                percent(part["before"]["ece"]),
                percent(part["after"]["ece"]),
                number(part["after"]["auc"], 3),
                number(part["before"]["brier"], 4),
                number(part["after"]["brier"], 4),
                " ".join(percent(one["ece"]) for one in part["after"]["positions"]),
            ]
            for name, part in parts.items()
        ],
    )
    fitted = sum(one["rounds_fitted"] for one in record["data"])
    temperature = record["sampling"]["temperature"]
    return (
        f"{table}\n\nPredicted prefix survival against what the target accepted, means over positions; {record['bins']} bins. Temperatures "
        f"{' '.join(f'{t:.2f}' for t in record['temperatures'])}, fitted on {fitted} other rounds, "
        f"{'greedy' if temperature == 0 else f'T = {temperature:g}'}. {machine_line(record)}"
    )


def render_drift(record: Mapping[str, Any]) -> str:
    """What online calibration does when traffic changes, from `examples.benchmarks.drift`."""
    rows = []
    for name, run in record["runs"].items():
        for phase, part in run["phases"].items():
            errors = [check["ece"] for check in run["checks"] if check["phase"] == phase]
            rows.append(
                [
                    f"{phase}, {name}",
                    number(part["tokens_per_s"], 1),
                    number(part["tau"], 2),
                    number(part["verified_tokens_per_request"], 2),
                    percent(errors[0]) if errors else "-",
                    percent(errors[-1]) if errors else "-",
                ]
            )
    settings = record["settings"]
    return (
        f"{markdown_table(['traffic', 'tokens/s', 'tau', 'verified', 'first ECE', 'last ECE'], rows)}\n\n"
        f"{record['prompts_of_each']} prompts of each kind, {settings['concurrency']} in flight, budget `{settings['budget']}`, window of "
        f"{settings['window']} rounds, seed {settings['seed']}. {machine_line(record)}"
    )
