"""Tables in Markdown files, made from result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from examples.benchmarks.report import main, render

from hf_dspark.errors import DataError
from hf_dspark.evaluation.load_benchmark import summary

MACHINE = {"cpu": "Some CPU", "cpu_count": 2, "torch_threads": 1, "versions": {"python": "3", "torch": "2", "transformers": "5"}}
_CELLS = [
    {
        "concurrency": n,
        "budget": name,
        "tokens_per_s": n * rate,
        "tokens_per_s_lowest": n * rate - 2,
        "tokens_per_s_highest": n * rate + 3,
        "turn_tokens": [100, 100],
        "turn_seconds": [100 / (n * rate)] * 2,
    }
    for n in (1, 8)
    for name, rate in (("plain", 40), ("full", 50), ("load-aware", 60))
]
_SETTINGS = {"temperature": 0.0, "max_new_tokens": 64, "target_dtype": "float32", "seed": 0}
LOAD = {
    "cells": _CELLS,
    "summary": summary(_CELLS),
    "prompt_files": ["a.jsonl"],
    "settings": {"concurrency": [1, 8], "budgets": ["plain", "full", "load-aware"], "repeats": 2, "seconds": 1.0, **_SETTINGS},
    "machine": MACHINE,
}
REPLAY = {**LOAD, "settings": {**LOAD["settings"], "answers": 9, "places": 1000}}
_PART = {
    "rows": 8, "tau": 2.173, "speedup": 1.566, "conditional_acceptance": [0.5, None],
    "plain_tokens_per_s": 20.04, "dspark_tokens_per_s": 31.38, "prompt_lookup_tokens_per_s": 30.06,
}  # fmt: skip
EVAL = {**_PART, "files": {"gsm8k": _PART}, "settings": {**_SETTINGS, "batch_size": 1, "budget": "full"}, "machine": MACHINE}
EVAL_COMPILED = {
    **EVAL,
    "files": {"gsm8k": {**_PART, "plain_compiled_tokens_per_s": 25.04, "speedup_over_compiled": 1.253}},
    "settings": {**EVAL["settings"], "compiled": True, "first_runs_s": {"plain": 1.0, "dspark": 100.4}},
}
_PLAIN = {"tokens_per_s": 20.0, "first_call_s": 1.0}
_ROUND = {"tokens_per_s": 30.04, "first_call_s": 99.6, "round_ms": 50.04, "draft_ms": 9.9, "verify_ms": 39.0, "rest_ms": 1.1}
ROUNDS = {
    "settings": {"repeats": 3, "max_new_tokens": 64, "budget": "full", "dtype": "fp32", "acceptance_is_forced": False},
    "rounds": [
        {"rows": 1, "plain": _PLAIN, "plain_compiled": _PLAIN, "compiled_over_eager": 0.749}
        | {key: {**_ROUND, "launches": 9.2} for key in ("dspark", "dspark_compiled")}
    ],
    "machine": MACHINE,
}  # fmt: skip
_QUALITY = {"rounds": 900, "ece": 0.05, "auc": 0.85, "brier": 0.12}
CALIBRATION = {
    "files": {"here": {"before": _QUALITY, "after": {**_QUALITY, "ece": 0.012}}},
    "others": {},
    "data": [{"rounds_fitted": 700}],
    "bins": 10,
    "temperatures": [1.5],
    "sampling": {"temperature": 1.0, "verification": "block"},
    "machine": MACHINE,
}


@pytest.mark.parametrize(
    ("name", "record", "line"),
    [
        ("load_fp32", LOAD, "| load-aware over that best | 1.20 (1.20-1.20) | 1.20 (1.20-1.20) |"),
        ("replay", REPLAY, "| `full` | 50.0 | 400.0 |"),
        ("eval_compiled", EVAL_COMPILED, "| gsm8k | 8 | 2.17 | 1.57 | 20.0 | 31.4 | 30.1 | 25.0 | 1.25 | 0.50 | - |"),
        ("rounds", ROUNDS, "| 1 | `dspark_compiled` | 30.0 | 50.0 | 9.9 | 39.0 | 1.1 | 9 | 100 |"),
        ("eval", EVAL, "| gsm8k | 8 | 2.17 | 1.57 | 20.0 | 31.4 | 30.1 | 0.50 | - |"),
        ("calibration", CALIBRATION, "| here, held out | 900 | 5.0% | 1.2% | 0.850 | 0.1200 | 0.1200 |"),
    ],
)
def test_tables_show_the_figures(tmp_path: Path, name: str, record: dict, line: str) -> None:
    """A table's line by hand, and the machine below it. `decoded`, `divergence` and `matched` are made beside their benchmarks."""
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    table = render(name, path)
    assert line in table.splitlines()
    assert table.endswith("Some CPU, 2 cores, 1 torch threads; python 3, torch 2, transformers 5.")


def test_a_file_is_refreshed_between_its_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only between them, not in fenced examples; `--check` writes nothing and tells by its exit code."""
    (tmp_path / "eval.json").write_text(json.dumps(EVAL), encoding="utf-8")
    path = tmp_path / "README.md"
    text = "top\n```\n<!-- begin: eval x.json -->\n```\n<!-- begin: eval eval.json -->\n{}<!-- end: eval -->\nbottom\n"
    path.write_text(text.format("old\n"), encoding="utf-8")
    assert main([str(path), "--check"]) == 1
    assert path.read_text(encoding="utf-8") == text.format("old\n")
    assert main([str(path)]) == 0
    assert path.read_text(encoding="utf-8") == text.format(render("eval", tmp_path / "eval.json") + "\n")
    assert main([str(path), "--check"]) == 0


@pytest.mark.parametrize(
    "text",
    [
        "<!-- begin: eval eval.json -->\n",
        "<!-- end: eval -->\n",
        "<!-- begin: eval eval.json -->\n<!-- end: load -->\n",
        "<!-- begin: eval eval.json -->\n<!-- begin: eval eval.json -->\n<!-- end: eval -->\n",
        "<!-- begin: eval -->\n<!-- end: eval -->\n",
    ],
)
def test_markers_without_a_partner_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    """With file and line, before anything is written."""
    (tmp_path / "eval.json").write_text(json.dumps(EVAL), encoding="utf-8")
    path = tmp_path / "README.md"
    path.write_text("\n" + text, encoding="utf-8")
    assert main([str(path)]) == 2
    assert "README.md, line 2: expected" in capsys.readouterr().err


def test_other_files_are_refused(tmp_path: Path) -> None:
    """An unknown table, and a file without what the table shows."""
    path = tmp_path / "record.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="unknown table 'speed'"):
        render("speed", path)
    with pytest.raises(DataError, match=r"not a result file for the table 'eval' \(KeyError: 'settings'\)"):
        render("eval", path)
