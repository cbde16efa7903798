"""Refreshes the tables of Markdown files from result files.

Between two lines such as

    <!-- begin: eval results/eval.json -->
    <!-- end: eval -->

stands the table `eval` of that file, whose path is relative to the Markdown file. A name may carry an ending that tells two tables of one
kind apart: `eval_t1` is rendered as `eval`.

    python -m examples.benchmarks.report README.md docs/*.md [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.benchmarks.command import run_command

from hf_dspark.errors import DataError
from hf_dspark.utils.files import atomic_write_text

Record = Mapping[str, Any]
_BLOCK = re.compile(r"^<!-- begin: (\S+) (\S+) -->[ \t]*\n(.*?)^<!-- end: (.+?) -->[ \t]*$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"^<!-- (?:begin|end):", re.MULTILINE)
_FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1[`~]*[ \t]*$", re.MULTILINE | re.DOTALL)


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, all columns but the first aligned to the right."""
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    """A number, `-` where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    """A share in percent, `-` where there is none."""
    return "-" if share is None else f"{100 * share:.1f}%"


def machine(record: Record) -> str:
    """Machine and versions of a result file, in one line."""
    one = record["machine"]
    hardware = [
        *([one["gpu"]] if one.get("gpu") else []),
        f"{one['cpu']}, {one['cpu_count']} cores",
        f"{one['torch_threads']} torch threads",
    ]
    versions = [f"{name} {one['versions'][name]}" for name in ("python", "torch", "transformers")]
    return f"{', '.join(hardware)}; {', '.join(versions)}."


def sampling(settings: Record) -> str:
    """How tokens were chosen. Result files from before there was a choice of verification do not name it."""
    if settings["temperature"] == 0:
        return "greedy"
    return f"T = {settings['temperature']:g}, {settings.get('verification', 'token')} verification"


# ------------------------------------------------------------------------------------------------------------------- tables


def render_eval(record: Record) -> str:
    """Acceptance and speed by prompt file and over all, from `hf-dspark eval`."""
    settings, gamma = record["settings"], len(record["conditional_acceptance"])
    figures = {"tau": 2, "speedup": 2, "plain_tokens_per_s": 1, "dspark_tokens_per_s": 1, "prompt_lookup_tokens_per_s": 1}
    compiled = settings.get("compiled", False)
    figures |= {"plain_compiled_tokens_per_s": 1, "speedup_over_compiled": 2} if compiled else {}
    parts = {**record["files"], **({"all": record} if len(record["files"]) > 1 else {})}
    rows = [
        [
            name,
            str(part["rows"]),
            *(number(part[key], digits) for key, digits in figures.items()),
            *(number(value) for value in [*part["conditional_acceptance"], *[None] * gamma][:gamma]),
        ]
        for name, part in parts.items()
    ]
    over = ["plain compiled", "over it"] if compiled else []
    heading = ["prompts", "rows", "tau", "speed-up", "plain", "DSpark", "prompt lookup", *over, *(f"c{k}" for k in range(1, gamma + 1))]
    first = settings.get("first_runs_s", {})
    mode = ", DSpark in compiled rounds" if compiled else ""
    how = "".join(f"; first run of {name} {seconds:.0f} s" for name, seconds in first.items() if name in ("dspark", "plain_compiled"))
    return (
        f"{table(heading, rows)}\n\nPlain, DSpark and prompt lookup in tokens/s; c1..c{gamma}: acceptance given that all before it were "
        f"accepted; {sampling(settings)}, at most {settings['max_new_tokens']} new tokens, batch size {settings['batch_size']}, budget "
        f"`{settings['budget']}`{mode}, target {dtypes(settings)}, seed {settings['seed']}{how}. "
        f"{machine(record)}"
    )


def render_rounds(record: Record) -> str:
    """Rounds, eager and compiled, beside plain decoding, from `examples.benchmarks.rounds`."""
    settings = record["settings"]
    rows = []
    for one in record["rounds"]:
        for name in ("plain", "plain_compiled", "dspark", "dspark_compiled"):
            part = one[name]
            times = [number(part.get(f"{key}_ms"), 1) for key in ("round", "draft", "verify", "rest")]
            counts = [number(part.get("launches"), 0), number(part["first_call_s"], 0)]
            rows.append([str(one["rows"]), f"`{name}`", number(part["tokens_per_s"], 1), *times, *counts])
    heading = ["rows", "", "tokens/s", "round ms", "draft", "verify", "rest", "launches", "first call s"]
    ratios = ", ".join(f"{one['compiled_over_eager']:.2f} of {one['rows']}" for one in record["rounds"])
    tokens = settings["max_new_tokens"]
    forced = f"; acceptance forced to {settings['accept']} tokens" if settings["acceptance_is_forced"] else ""
    return (
        f"{table(heading, rows)}\n\nMedians of {settings['repeats']} calls that take turns, {tokens} new tokens, budget "
        f"`{settings['budget']}`, {settings['dtype']}{forced}; launches a round, outside graphs. A compiled round over an eager one, "
        f"median of pairs, by rows: {ratios}. {machine(record)}"
    )


def render_launches(record: Record) -> str:
    """Kernels of an eager round by stage, from `examples.benchmarks.launches`."""
    rows = [
        [
            str(one["rows"]),
            "sampled" if one["sample"] else "greedy",
            f"`{one['budget']}`",
            *(f"{one[n]:.0f}" for n in ("draft", "verify", "rest", "waits")),
        ]
        for one in record["calls"]
    ]
    heading = ["rows", "", "budget", "draft", "pass", "rest", "waits"]
    return (
        f"{table(heading, rows)}\n\nMedians over the rounds of calls of {record['settings']['max_new_tokens']} new tokens; the rest is "
        f"verdict and commit. {machine(record)}"
    )


def dtypes(settings: Record) -> str:
    """The target's dtype, and plain decoding's where that was measured in one of its own."""
    own, plain = settings["target_dtype"], settings.get("plain_dtype", settings["target_dtype"])
    return own if plain == own else f"{own} (plain decoding in {plain}, where it is faster)"


def render_decoded(record: Record) -> str:
    """Tau by prompt set and temperature, and acceptance by block position, from `hf_dspark.evaluation.decoded`."""
    settings = record["settings"]
    kinds = {"decoded": "", "token_by_token": ", token verification", "without_copying": ", without n-gram copying"}
    parts = [
        (key.replace("=", " = ") + name, part)
        for kind, name in kinds.items()
        for key, part in record.get(kind, {}).items()
        if key.startswith("T=")
    ]
    gamma = max(len(part["acceptance"]) for _, part in parts)
    rows = []
    for name, part in parts:
        taus = [part["by_source"][one] for one in settings["sets"]]
        positions = [*part["acceptance"], *[None] * gamma][:gamma]
        rows.append([name, *map(number, taus), number(sum(taus) / len(taus)), *map(number, positions)])
    heading = ["", *settings["sets"], "mean", *(f"c{k}" for k in range(1, gamma + 1))]
    return (
        f"{table(heading, rows)}\n\nTau, bonus token included; c1..c{gamma}: acceptance given that all before it were accepted. "
        f"{settings['limit']} prompts a set, at most {settings['max_new_tokens']} new tokens, target {settings['dtype']}, seed "
        f"{record['seed']}; at T > 0 {settings.get('verification', 'token')} verification where nothing else is said. {machine(record)}"
    )


def render_load(record: Record) -> str:
    """Throughput of every contender at every concurrency, and the best load-aware budget against others, from `hf-dspark bench`."""
    settings, summary = record["settings"], record["summary"]
    cells = {(cell["concurrency"], cell["budget"]): cell for cell in record["cells"]}
    sizes = settings["concurrency"]

    def rate(cell: Record | None) -> str:
        if cell is None:
            return "-"
        return f"{cell['tokens_per_s']:.0f} ({cell['tokens_per_s_lowest']:.0f}-{cell['tokens_per_s_highest']:.0f})"

    def ratio(row: Record, key: str) -> str:
        ends = row.get(f"load_aware_over_{key}_interval")
        return number(row.get(f"load_aware_over_{key}")) + (f" ({ends[0]:.2f}-{ends[1]:.2f})" if ends else "")

    rates = [[f"`{name}`", *(rate(cells.get((n, name))) for n in sizes)] for name in settings["budgets"]]
    ratios = [
        ["best load-aware budget", *(f"`{row.get('best_load_aware', '-')}`" for row in summary)],
        ["best of plain, full, static", *(f"`{row.get('best_fixed', '-')}`" for row in summary)],
        *(
            [f"load-aware over {name}", *(ratio(row, key) for row in summary)]
            for name, key in (("that best", "best_fixed"), ("plain", "plain"), ("full", "full"))
        ),
    ]
    return (
        f"{table(['tokens/s in all, by requests in flight', *map(str, sizes)], [*rates, *ratios])}\n\nOver {settings['repeats']} turns of "
        f"about {settings['seconds']:g} s, in brackets the slowest and fastest; behind ratios the interval of 90% of bootstrap draws of "
        f"turns. Prompts: {', '.join(record['prompt_files'])}; {sampling(settings)}, at most {settings['max_new_tokens']} new tokens, "
        f"target {settings['target_dtype']}, seed {settings['seed']}. {machine(record)}"
    )


def render_replay(record: Record) -> str:
    """Budgets on the same recorded blocks with a cost profile for a clock, from `examples.benchmarks.replay`."""
    settings = record["settings"]
    cells = {(cell["concurrency"], cell["budget"]): cell for cell in record["cells"]}
    sizes = settings["concurrency"]
    rows = [[f"`{name}`", *(number(cells[n, name]["tokens_per_s"], 1) for n in sizes)] for name in settings["budgets"]]
    best = (number(row.get("load_aware_over_best_fixed"), 3) for row in record["summary"])
    rows.append(["**best load-aware over the best of plain, full, static**", *best])
    for wrong in record.get("misjudged", []):
        how = "online costs" if wrong["follows_costs"] else "fixed costs"
        drafts = f", drafts x{wrong['drafts_taken_for']:g}" if wrong.get("drafts_taken_for", 1) != 1 else ""
        name = f"`{wrong['budget']}`, profile of tokens x{wrong['tokens_taken_for']:g}{drafts}, {how}"
        rows.append([name, *(number(value, 3) for value in wrong["over_best_fixed"])])
    return (
        f"{table(['tokens/s, by requests in flight', *map(str, sizes)], rows)}\n\n{settings['answers']} greedy answers "
        f"({', '.join(record['prompt_files'])}), a block drafted at each of {settings['places']:,} places; seconds from the cost profile, "
        f"prompt passes and the budgets' own time left out. Rows with another profile of tokens are over the same best. Seed "
        f"{settings['seed']}. {machine(record)}"
    )


def render_calibration(record: Record) -> str:
    """Calibration error, AUC and Brier score before and after, from `calibration.json`."""
    together = {"all of these": record} if len(record["files"]) > 1 else {}
    parts = {**{f"{name}, held out": part for name, part in record["files"].items()}, **together, **record["others"]}
    rows = [
        [
            name,
            str(part["after"]["rounds"]),
            *(percent(part[when]["ece"]) for when in ("before", "after")),
            number(part["after"]["auc"], 3),
            *(number(part[when]["brier"], 4) for when in ("before", "after")),
        ]
        for name, part in parts.items()
    ]
    fitted = sum(one["rounds_fitted"] for one in record["data"])
    return (
        f"{table(['prompts', 'rounds', 'ECE before', 'ECE after', 'AUC', 'Brier before', 'Brier after'], rows)}\n\nPredicted prefix "
        f"survival against what the target accepted, means over block positions, {record['bins']} bins; temperatures "
        f"{' '.join(f'{t:.2f}' for t in record['temperatures'])}, fitted on {fitted} other rounds, {sampling(record['sampling'])}. "
        f"{machine(record)}"
    )


def render_matched(record: Record) -> str:
    """Tau of drafters that differ in one thing, by prompt set and temperature, from `examples.benchmarks.matched`."""
    settings = record["settings"]
    sets, temperatures, training = settings["sets"], settings["temperatures"], settings["training"]
    rows = []
    for name, found in record["drafters"].items():
        taus = [part for key in temperatures for part in (*map(found["decoded"][key]["by_set"].get, sets), found["decoded"][key]["macro"])]
        rows.append([name, f"{found['parameters'] / 1e6:.1f} M", *map(number, taus)])
    heading = ["drafter", "parameters", *(f"{name} {key}" for key in temperatures for name in [*sets, "mean"])]
    return (
        f"{table(heading, rows)}\n\nTau, bonus token included, {settings['prompts']} prompts a set, at most {settings['max_new_tokens']} "
        f"new tokens. Each drafter: {training['steps']} steps of {training['batch_size']} rows x {training['num_anchors']} anchors, "
        f"{training['optimizer']}, {settings['data']['rows']['train']:,} rows of data, seed {training['seed']}. {machine(record)}"
    )


def render_divergence(record: Record) -> str:
    """How many texts equal plain `generate` at batch size 1, and whether rounding explains the others, from
    `examples.benchmarks.divergence`."""
    exact, settings = record["fp32"]["methods"], record["settings"]
    rows = [
        [
            method.replace("_", " "),
            f"{exact[method]['identical']} of {exact[method]['rows']}",
            f"{counts['identical']} of {counts['rows']}",
            f"{counts['explained']} of {counts['diverged']}",
            number(max((one["gap"] for one in record["divergences"] if one["method"] == method), default=None), 4),
        ]
        for method, counts in record["methods"].items()
    ]
    heading = ["against plain, one row at a time", "identical, fp32", f"identical, {record['dtype']}", "explained", "widest gap"]
    return (
        f"{table(heading, rows)}\n\nExplained: the plain run's own logits of the two tokens are no further apart (the gap) than their "
        f"difference moves when passes of other shapes score the same prefix. At most {settings['max_new_tokens']} new tokens, greedy, "
        f"budget `{settings['budget']}`. {machine(record)}"
    )


TABLES: Mapping[str, Callable[[Record], str]] = {
    "calibration": render_calibration,
    "decoded": render_decoded,
    "divergence": render_divergence,
    "eval": render_eval,
    "rounds": render_rounds,
    "launches": render_launches,
    "load": render_load,
    "matched": render_matched,
    "replay": render_replay,
}


# ----------------------------------------------------------------------------------------------------------- Markdown files


def render(name: str, path: Path) -> str:
    """The table `name` of a result file.

    Raises:
        DataError: if the name is unknown, or the file is missing, not JSON, or lacks what the table shows.
    """
    renderer = TABLES.get(re.split("[_-]", name, maxsplit=1)[0])
    if renderer is None:
        raise DataError(f"unknown table {name!r}; allowed: {', '.join(TABLES)}, each also with an ending such as 'eval_t1'")
    try:
        return renderer(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path} is not a result file for the table {name!r} ({type(error).__name__}: {error})") from error


def updated(path: Path) -> str:
    """A Markdown file's text with every marked part rendered anew; markers inside code fences are examples.

    Raises:
        DataError: for a marker without its partner, or a table that cannot be rendered.
    """
    text = path.read_text(encoding="utf-8")
    shown = _FENCE.sub(lambda fence: re.sub(".", " ", fence[0]), text)
    blocks = list(_BLOCK.finditer(shown))
    for marker in _MARKER.finditer(shown):
        inside = [block for block in blocks if block.start() <= marker.start() < block.end()]
        if not inside or inside[0][1] != inside[0][4] or _MARKER.search(inside[0][3]):
            line = text.count("\n", 0, marker.start()) + 1
            raise DataError(f"{path}, line {line}: expected `<!-- begin: NAME FILE.json -->` with `<!-- end: NAME -->` behind it")
    for block in reversed(blocks):
        text = text[: block.start(3)] + render(block[1], path.parent / block[2]) + "\n" + text[block.end(3) :]
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrites the tables of Markdown files; returns 1 where `--check` finds a file that differs, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("markdown", type=Path, nargs="+")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file differs")
    args = parser.parse_args(arguments)
    stale: list[Path] = []

    def refresh() -> None:
        texts = {path: updated(path) for path in args.markdown}  # all are rendered before one is written
        for path, text in texts.items():
            if text != path.read_text(encoding="utf-8"):
                stale.append(path)
                if not args.check:
                    atomic_write_text(path, text)
                print(f"{'differs' if args.check else 'rewrote'}: {path}")

    return run_command(refresh) or int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
