"""Turns result files into markdown tables and keeps the tables in markdown files equal to them. Knows the layout of the
JSON files, no models.

Between two lines such as

    <!-- begin: eval results/eval.json -->
    <!-- end: eval -->

stands the table `eval` of that file, whose path is relative to the markdown file. A name may carry an ending that tells
two tables of one kind apart: `eval_t1` is rendered as `eval`.

    python -m hf_dspark.evaluation.report README.md model_cards/smollm2-dspark/README.md [--check] [--plots DIR]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_dspark.errors import DataError
from hf_dspark.evaluation.load_tables import render_calibration, render_drift, render_load, render_replay
from hf_dspark.evaluation.recipes import plot_curve, render_recipe
from hf_dspark.evaluation.tables import empty_plot, judged, machine_line, markdown_table, number, percent, save_plot
from hf_dspark.evaluation.training_tables import render_decoded, render_matched, render_positions, render_shift, render_training

_MARKER = re.compile(r"^<!-- (begin|end): (.+?) -->[ \t]*$", re.MULTILINE)
_FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1[`~]*[ \t]*$", re.MULTILINE | re.DOTALL)


# ------------------------------------------------------------------------------------------------------------- tables


def render_eval(record: Mapping[str, Any]) -> str:
    """Acceptance and speed by prompt file and over all, from `hf-dspark eval`."""
    settings = record["settings"]
    gamma = len(record["conditional_acceptance"])
    heading = [
        "prompts",
        "rows",
        "tau",
        "speed-up",
        "plain",
        "DSpark",
        "prompt lookup",
        "lookup speed-up",
        *(f"c{k}" for k in range(1, gamma + 1)),
    ]
    rows = [
        [
            name,
            str(part["rows"]),
            number(part["tau"], 2),
            number(part["speedup"], 2),
            number(part["plain_tokens_per_s"], 1),
            number(part["dspark_tokens_per_s"], 1),
            number(part["prompt_lookup_tokens_per_s"], 1),
            number(part["prompt_lookup_speedup"], 2),
            *(number(value, 2) for value in _filled(part["conditional_acceptance"], gamma)),
        ]
        for name, part in _with_total(record)
    ]
    sampling = "greedy" if settings["temperature"] == 0 else f"T = {settings['temperature']:g}"
    if settings["top_p"] != 1:
        sampling += f", top-p {settings['top_p']:g}"
    if settings["temperature"] > 0:
        sampling += f", {judged(settings)}"
    copies = "" if "copying" not in settings else "with copies, " if settings["copying"] else "heads alone, "
    note = (
        f"Plain, DSpark and prompt lookup in tokens/s; c1..c{gamma}: acceptance where all before it stood. "
        f"{sampling[0].upper()}{sampling[1:]}, at most {settings['max_new_tokens']} new tokens, batch size "
        f"{settings['batch_size']}, budget `{settings['budget']}`, {copies}target {settings['target_dtype']}, "
        f"seed {settings['seed']}."
    )
    return f"{markdown_table(heading, rows)}\n\n{note}"


def render_passes(record: Mapping[str, Any]) -> str:
    """Cost of ragged verification passes and of rounds, from `examples.benchmarks.passes`."""
    passes = markdown_table(
        [
            "rows",
            "tokens",
            "ragged, ms",
            "equal rows, ms",
            "padded, ms",
            "ragged / equal",
            "ragged / padded",
        ],
        [
            [
                str(one["rows"]),
                f"{one['tokens']} ({one['padded_tokens']} padded)",
                *(_spread(one["times"][case]) for case in ("ragged", "equal", "padded")),
                number(one["ragged_over_equal"], 2),
                number(one["ragged_over_padded"], 2),
            ]
            for one in record["verify_pass"]
        ],
    )
    rounds = markdown_table(
        ["live rows", "round, ms", "draft", "verify", "outside both"],
        [
            [
                str(one["rows"]),
                number(one["median_ms"], 1),
                *(percent(one[share]) for share in ("draft_share", "verify_share", "overhead_share")),
            ]
            for one in record["round"]
        ],
    )
    sizes = [one["rows"] for one in record["round"]]
    return (
        f"{passes}\n\nMedian, in brackets 20th to 80th percentile. {record['dtype']}, seed {record['seed']}.\n\n"
        f"{rounds}\n\nA round of {sizes[-1]} rows costs {number(record['round_b8_over_b1'], 2)} times a round of "
        f"{sizes[0]}."
    )


_METHODS = {
    "plain_batched": "plain, batch of {batch}",
    "prompt_lookup": "prompt lookup",
    "dspark": "DSpark",
    "dspark_batched": "DSpark, batch of {batch}",
}


def render_divergence(record: Mapping[str, Any]) -> str:
    """How many texts equal plain `generate` at batch size 1, and whether rounding explains the others, from
    `examples.benchmarks.divergence`."""
    settings, exact = record["settings"], record["fp32"]
    widest = {
        method: max((one["gap"] for one in record["divergences"] if one["method"] == method), default=None) for method in record["methods"]
    }
    rows = [
        [
            _METHODS.get(method, method).format(batch=settings["batch_size"]),
            f"{exact['methods'][method]['identical']} of {exact['methods'][method]['rows']}",
            f"{counts['identical']} of {counts['rows']}",
            f"{counts['explained']} of {counts['diverged']}",
            f"{counts['explained_by_plain_passes']} of {counts['diverged']}",
            number(widest[method], 4),
        ]
        for method, counts in record["methods"].items()
    ]
    heading = [
        "against plain, one row at a time",
        "identical, fp32",
        f"identical, {record['dtype']}",
        "explained",
        "by plain passes alone",
        "widest gap",
    ]
    note = (
        "Explained: the plain run's own logits of the two tokens are no further apart (the gap) than their difference "
        "moves when passes of other shapes score the same prefix. "
        f"At most {settings['max_new_tokens']} new tokens, greedy, budget `{settings['budget']}`."
    )
    return f"{markdown_table(heading, rows)}\n\n{note}"


TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "eval": render_eval,
    "passes": render_passes,
    "divergence": render_divergence,
    "recipe": render_recipe,
    "decoded": render_decoded,
    "matched": render_matched,
    "positions": render_positions,
    "shift": render_shift,
    "training": render_training,
    "machine": machine_line,
    "load": render_load,
    "calibration": render_calibration,
    "drift": render_drift,
    "replay": render_replay,
}


def render(name: str, path: Path) -> str:
    """Returns the table `name` of a result file.

    Args:
        name: a key of `TABLES`, with or without an ending after `_` or `-`.
        path: the JSON file.
    Raises:
        DataError: if the name is unknown, or the file is missing, no JSON, or lacks what the table shows.
    """
    table = TABLES.get(re.split("[_-]", name, maxsplit=1)[0])
    if table is None:
        raise DataError(f"unknown table {name!r}; allowed: {', '.join(TABLES)}, each also with an ending such as {'eval_t1'!r}")
    record = _read(path)
    try:
        return table(record)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        missing = f"no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} is no result file for the table {name!r} ({missing}); was it written for another?") from error


# ----------------------------------------------------------------------------------------------------- markdown files


@dataclass(frozen=True)
class Section:
    """One marked part of a markdown file.

    Args:
        name: of the table.
        file: path as the marker gives it, relative to the markdown file.
        begin, end: offsets of the text between the markers.
    """

    name: str
    file: str
    begin: int
    end: int


def sections(text: str, where: str = "the text") -> list[Section]:
    """Finds the marked parts of a markdown text; markers inside code fences are examples, not markers.

    Raises:
        DataError: for a marker that is malformed, nested or without its partner; the message names the line.
    """
    fences = [(fence.start(), fence.end()) for fence in _FENCE.finditer(text)]
    found: list[Section] = []
    opened: tuple[str, str, int, str] | None = None
    for marker in _MARKER.finditer(text):
        if any(begin <= marker.start() < end for begin, end in fences):
            continue
        at = f"{where}, line {text.count(chr(10), 0, marker.start()) + 1}"
        words = marker[2].split()
        if marker[1] == "begin":
            if opened is not None:
                raise DataError(f"{at}: a table begins inside {opened[0]!r} of {opened[3]}; end that one first")
            if len(words) != 2:
                raise DataError(f"{at}: expected `<!-- begin: NAME FILE.json -->`, got {marker[0].strip()!r}")
            opened = (words[0], words[1], marker.end(), at)
        else:
            if opened is None or words != [opened[0]]:
                expected = "no table is open" if opened is None else f"expected `<!-- end: {opened[0]} -->`"
                raise DataError(f"{at}: got {marker[0].strip()!r}, but {expected}")
            found.append(Section(opened[0], opened[1], opened[2], marker.start()))
            opened = None
    if opened is not None:
        raise DataError(f"{opened[3]}: the table {opened[0]!r} has no `<!-- end: {opened[0]} -->`")
    return found


def updated(path: Path) -> str:
    """Returns a markdown file's text with every marked part rendered anew; the file stays as it is.

    Raises:
        DataError: if the file cannot be read, a marker is wrong, or a table cannot be rendered.
    """
    text = _text(path)
    parts, last = [], 0
    for section in sections(text, str(path)):
        try:
            table = render(section.name, path.parent / section.file)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        parts += [text[last : section.begin], f"\n{table}\n"]
        last = section.end
    return "".join(parts) + text[last:]


def in_sync(path: Path) -> bool:
    """Returns whether every marked part of a markdown file equals what its result file renders to."""
    return updated(path) == _text(path)


# -------------------------------------------------------------------------------------------------------------- plots


def plot_acceptance(record: Mapping[str, Any], path: Path) -> None:
    """Draws conditional acceptance by block position, by prompt file and over all, into a PNG.

    Raises:
        DataError: if matplotlib is not installed.
    """
    figure, axes = empty_plot()
    for name, part in _with_total(record):
        values = [float("nan") if value is None else value for value in part["conditional_acceptance"]]
        total = name == _TOTAL
        axes.plot(
            range(1, len(values) + 1),
            values,
            marker="o",
            markersize=3,
            linewidth=2.2 if total else 1,
            color="black" if total else None,
            label=name,
        )
    axes.set(xlabel="block position", ylabel="conditional acceptance", ylim=(0, 1))
    save_plot(figure, axes, path)


_PLOTS: Mapping[str, tuple[str, Callable[[Mapping[str, Any], Path], None]]] = {
    "eval": ("acceptance", plot_acceptance),
    "recipe": ("training_curve", plot_curve),
}


def plots(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Draws what the tables of markdown files show: one PNG for each `eval` and `recipe` file that they name.

    Args:
        paths: markdown files.
        folder: where the PNGs go; made where missing.
    Returns:
        the files written, named after the result file and the kind of plot.
    """
    written: list[Path] = []
    for path in paths:
        for section in sections(_text(path), str(path)):
            kind = re.split("[_-]", section.name, maxsplit=1)[0]
            if kind not in _PLOTS:
                continue
            source = path.parent / section.file
            ending, draw = _PLOTS[kind]
            image = folder / f"{source.stem}_{ending}.png"
            if image not in written:
                folder.mkdir(parents=True, exist_ok=True)
                draw(_read(source), image)
                written.append(image)
    return written


# ------------------------------------------------------------------------------------------------------------ helpers

_TOTAL = "all"


def _with_total(record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from record["files"].items()
    if len(record["files"]) > 1:
        yield _TOTAL, record


def _spread(times: Mapping[str, float]) -> str:
    return f"{times['median_ms']:.0f} ({times['p20_ms']:.0f}-{times['p80_ms']:.0f})"


def _filled(values: Sequence[float | None], length: int) -> list[float | None]:
    return [*values, *[None] * (length - len(values))]


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error.msg}, line {error.lineno}") from error
    if not isinstance(record, dict):
        raise DataError(f"{path} holds a {type(record).__name__}; a result file is one JSON object")
    return record


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text ({error.reason})"
        raise DataError(f"cannot read {path}: {reason}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrites the tables of markdown files; returns 1 where `--check` finds a file out of step, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("markdown", type=Path, nargs="+")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not in sync")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="also draw acceptance and training curve there")
    args = parser.parse_args(arguments)
    stale = []
    try:
        texts = {path: updated(path) for path in args.markdown}  # all are rendered before one is written
        for path, text in texts.items():
            if text != _text(path):
                stale.append(path)
                if not args.check:
                    path.write_text(text, encoding="utf-8")
                    print(f"rewrote {path}")
        if args.plots is not None:
            for image in plots(args.markdown, args.plots):
                print(f"drew {image}")
    except (DataError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    if args.check and stale:
        names = " ".join(map(str, stale))
        print(f"not in sync: {names}; run: python -m hf_dspark.evaluation.report {names}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
