"""Tables rendered from hand-made result files, and the repository's own markdown files against theirs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from hf_dspark.errors import DataError
from hf_dspark.evaluation.load import summary
from hf_dspark.evaluation.report import TABLES, in_sync, main, plots, render, sections, updated
from hf_dspark.evaluation.training_tables import plot_matched, render_decoded

ROOT = Path(__file__).resolve().parents[2]

MACHINE = {
    "device": "cpu",
    "cpu": "Some CPU",
    "cpu_count": 2,
    "torch_threads": 2,
    "memory_gib": 23.4,
    "platform": "Linux",
    "versions": {"python": "3.11.7", "hf_dspark": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
}
_PART = {
    "tau": 2.173,
    "conditional_acceptance": [0.5, 0.484, None],
    "speedup": 1.566,
    "prompt_lookup_speedup": 1.5,
    "plain_tokens_per_s": 20.04,
    "dspark_tokens_per_s": 31.38,
    "prompt_lookup_tokens_per_s": 30.06,
    "rows": 8,
}
EVAL: dict[str, Any] = {
    **_PART,
    "rows": 16,
    "tau": 2.0,
    "files": {"gsm8k": _PART, "mbpp": {**_PART, "conditional_acceptance": [0.6], "tau": None}},
    "settings": {
        "max_new_tokens": 128,
        "temperature": 0.0,
        "top_p": 1.0,
        "batch_size": 1,
        "budget": "full",
        "seed": 0,
        "target_dtype": "bfloat16",
    },
    "machine": MACHINE,
}
_TIMES = {"median_ms": 96.4, "p20_ms": 95.0, "p80_ms": 99.6}
PASSES = {
    "machine": MACHINE,
    "dtype": "bfloat16",
    "seed": 0,
    "verify_pass": [
        {
            "rows": 16,
            "tokens": 64,
            "padded_tokens": 128,
            "times": dict.fromkeys(("ragged", "equal", "padded"), _TIMES),
            "ragged_over_equal": 1.042,
            "ragged_over_padded": 0.728,
        }
    ],
    "round": [
        {"rows": 1, "median_ms": 60.0, "draft_share": 0.1, "verify_share": 0.85, "overhead_share": 0.05},
        {"rows": 8, "median_ms": 120.0, "draft_share": 0.1, "verify_share": 0.86, "overhead_share": 0.04},
    ],
    "round_b8_over_b1": 2.0,
    "overhead_share_b1": 0.05,
}


def _counts(identical: int, explained: int) -> dict[str, int]:
    return {
        "rows": 8,
        "identical": identical,
        "diverged": 8 - identical,
        "explained": explained,
        "explained_by_plain_passes": explained - 1 if explained else 0,
    }


DIVERGENCE = {
    "dtype": "bfloat16",
    "settings": {"max_new_tokens": 96, "batch_size": 8, "budget": "full"},
    "methods": {"plain_batched": _counts(6, 2), "dspark": _counts(5, 3)},
    "divergences": [{"method": "dspark", "gap": 0.125}, {"method": "dspark", "gap": 0.0}],
    "fp32": {"methods": {"plain_batched": _counts(8, 0), "dspark": _counts(8, 0)}},
    "machine": MACHINE,
}
_POINT = {"step": 700, "minutes": 30.0, "T=0": {"tau_greedy": 2.2}, "T=1": {"tau_sampled": 1.75}}
SETTINGS = {
    "batch_size": 4,
    "accumulation": 1,
    "num_anchors": 128,
    "learning_rate": 0.0015,
    "weight_decay": 0.0,
    "ce_start": 1.0,
    "ce_end": 0.1,
    "ce_anneal": 0.3,
    "soft_labels": 0.5,
    "total_variation": 0.9,
    "confidence": 1.0,
    "decay": 4.0,
}
DATA = {
    "rows": {"train": 6117, "held_out": 171},
    "response_tokens": {"train": 1274798, "held_out": 36240},
    "held_out_share": 0.03,
    "left_out": {},
    "by_source": {"gsm8k": 1716, "self-chat": 4401},
    "by_temperature": {"0": 3000, "1": 3117},
    "folders": [{"target": "some/target", "thinking": False}],
}
RECIPE: dict[str, Any] = {
    "arguments": {
        "shape": {
            "layers": 2,
            "block_size": 7,
            "rank": 48,
            "head": "vanilla",
            "mask_token": "<gh_stars>",
            "draft_vocab": 12288,
            "start": "target",
            "head_start": "target",
        },
        "training": SETTINGS,
        "options": {"target": "some/target"},
    },
    "parameters": 11690225,
    "trainable_parameters": 11690225,
    "weight_bytes": 23479010,
    "mask_token_id": 7,
    "taps": [1, 8, 14],
    "draft_vocabulary": {"held_out_tokens_inside": 9, "held_out_tokens": 10, "share": 0.9},
    "data": DATA,
    "machine": {
        "cpu": "Some CPU",
        "cpu_count": 2,
        "torch_threads": 2,
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
    },
    "seed": 0,
    "result": {
        "steps": 1400,
        "minutes": 61.6,
        "epochs": 0.915,
        "tokens": 1000,
        "anchors": 716800,
        "best_step": 700,
        "best_score": 1.98,
    },
    "curve": [{**_POINT, "step": 350, "minutes": 15.0}, _POINT],
}
FINETUNED: dict[str, Any] = {
    **RECIPE,
    "arguments": {"training": SETTINGS, "options": {"target": "some/target"}},
    "base": "some/drafter",
    "base_fingerprint": "0123456789abcdef0123",
    "lora": {"rank": 16, "targets": ["q_proj", "markov_w2"]},
    "trainable_parameters": 116902,
}
_MACHINE = RECIPE["machine"]
DECODED: dict[str, Any] = {
    "settings": {"sets": ["a", "b"], "limit": 4, "max_new_tokens": 32, "batch_size": 8, "dtype": "bfloat16"},
    "decoded": {
        "tau": 1.9,
        "prompts": 8,
        "T=0": {"tau": 2.1, "acceptance": [0.6, None], "by_source": {"a": 2.2, "b": 2.0}},
        "T=1": {"tau": 1.7, "acceptance": [0.5, 0.25], "by_source": {"a": 1.8, "b": 1.5}},
    },
    "machine": _MACHINE,
    "seed": 0,
}


def _matched(tau: float, acceptance: list[float | None]) -> dict[str, Any]:
    part = {"by_set": {"a": tau, "b": tau + 0.5}, "macro": tau + 0.25, "acceptance": acceptance}
    return {"parameters": 11_700_000, "decoded": {"T=0": part, "T=1": {**part, "macro": tau}}}


MATCHED: dict[str, Any] = {
    "settings": {
        "sets": ["a", "b"],
        "prompts": 4,
        "max_new_tokens": 32,
        "temperatures": ["T=0", "T=1"],
        "training": {"steps": 100, "batch_size": 4, "num_anchors": 128, "optimizer": "muon", "seed": 0},
        "data": {"rows": {"train": 5000}},
    },
    "drafters": {"dspark, 2 layers": _matched(2.0, [0.5, 0.5]), "dflash, 2 layers": _matched(1.6, [0.5, None])},
    "machine": _MACHINE,
    "seed": 0,
}
SHIFT: dict[str, Any] = {
    "settings": {"sets": ["json", "a"], "prompts": 4, "max_new_tokens": 32, "temperatures": ["T=0", "T=1"]},
    "drafters": {
        "before": {
            "trained_parameters": None,
            "minutes": None,
            "stored_bytes": 23_500_000,
            "decoded": {key: {"by_source": {"json": 1.5, "a": 2.0}} for key in ("T=0", "T=1")},
        },
        "LoRA": {
            "trained_parameters": 1_375_504,
            "minutes": 3.25,
            "stored_bytes": 2_760_000,
            "decoded": {key: {"by_source": {"json": 2.5, "a": 1.9}} for key in ("T=0", "T=1")},
        },
    },
    "machine": _MACHINE,
    "seed": 0,
}


def _cell(concurrency: int, budget: str, rate: float, verified: float | None = None) -> dict[str, Any]:
    return {
        "concurrency": concurrency,
        "budget": budget,
        "tokens_per_s": rate,
        "tokens_per_s_lowest": rate - 2,
        "tokens_per_s_highest": rate + 3,
        "user_tokens_per_s_median": rate / concurrency,
        "verified_tokens_per_request": verified,
    }


_CELLS = [_cell(n, name, n * rate, v) for n in (1, 8) for name, rate, v in (("plain", 40, 0.0), ("full", 50, 7.0), ("load-aware", 60, 2.5))]
LOAD: dict[str, Any] = {
    "cells": _CELLS,
    "summary": summary(_CELLS),
    "prompt_files": ["a.jsonl"],
    "settings": {
        "concurrency": [1, 8],
        "budgets": ["plain", "full", "load-aware"],
        "temperature": 0.0,
        "max_new_tokens": 64,
        "seconds": 4.0,
        "repeats": 2,
        "target_dtype": "bfloat16",
        "seed": 0,
    },
    "machine": _MACHINE,
}
REPLAY: dict[str, Any] = LOAD | {"settings": LOAD["settings"] | {"answers": 9, "places": 1000, "requests": 20, "orders": 2, "noise": 0.1}}
REPLAY |= {
    "costs_file": "bench.json",
    "costs_machine": _MACHINE | {"cpu": "Another CPU"},
    "misjudged": [
        {"tokens_taken_for": 0.3, "budget": "load-aware", "follows_costs": follows, "over_best_fixed": [ratio, 1.0]}
        for follows, ratio in ((False, 0.9), (True, 1.1))
    ],
}
_QUALITY = {"rounds": 900, "ece": 0.05, "auc": 0.85, "brier": 0.12, "positions": [{"ece": 0.04}, {"ece": 0.06}]}
_JUDGED = {"before": _QUALITY, "after": {**_QUALITY, "ece": 0.012, "positions": [{"ece": 0.01}, {"ece": None}]}}
CALIBRATION: dict[str, Any] = {
    "temperatures": [1.5, 0.8],
    "sampling": {"temperature": 0.0, "top_p": 1.0},
    "data": [{"file": "a", "prompts": 9, "rounds_fitted": 1000, "rounds_judged": 900}],
    "bins": 10,
    "files": {"a": _JUDGED},
    "others": {"b": _JUDGED},
    "machine": _MACHINE,
}
_PHASE = {"tokens_per_s": 80.0, "tau": 2.0, "verified_tokens_per_request": 3.0}
DRIFT: dict[str, Any] = {
    "prompts_of_each": 4,
    "settings": {"concurrency": 4, "budget": "load-aware", "window": 1000, "seed": 0},
    "runs": {
        name: {"phases": {"a": _PHASE, "b": _PHASE}, "checks": [{"phase": "b", "ece": e} for e in errors]}
        for name, errors in (("watched", (0.05, 0.06)), ("followed", (0.05, 0.02)))
    },
    "machine": _MACHINE,
}
TRAINING: dict[str, Any] = {
    "shape": {"batch_size": 4, "length_tokens": 330, "num_anchors": 128, "num_hidden_layers": 2, "block_size": 7, "markov_rank": 48},
    "ours": {"full": {"anchors_per_s": 200.4, "anchors_per_s_without_target": 300.2, "peak_rss_bytes": 2 * 2**30}},
    "others": [
        {
            "what": "another program",
            "anchors_per_s": {"median": 100.1},
            "peak_rss_bytes": 4 * 2**30,
            "ratios": {"full": {"anchors_per_s": 2.0, "anchors_per_s_without_target": 3.0}},
        }
    ],
    "machine": _MACHINE,
    "seed": 0,
}
RECORDS = {
    "eval": EVAL,
    "passes": PASSES,
    "divergence": DIVERGENCE,
    "recipe": RECIPE,
    "machine": EVAL,
    "decoded": DECODED,
    "matched": MATCHED,
    "positions": MATCHED,
    "shift": SHIFT,
    "training": TRAINING,
    "load": LOAD,
    "calibration": CALIBRATION,
    "drift": DRIFT,
    "replay": REPLAY,
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with one result file of each kind."""
    for name, record in RECORDS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    return tmp_path


def rows(table: str) -> list[list[str]]:
    """The cells of the lines of a markdown table, heading and rule included."""
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines() if line.startswith("|")]


def with_markers(folder: Path, *names: str, inside: str = "old\n") -> Path:
    """A markdown file with one marked part a name."""
    parts = [f"<!-- begin: {n} {n.split('_')[0]}.json -->\n{inside}<!-- end: {n} -->" for n in names]
    path = folder / "page.md"
    path.write_text("before\n\n" + "\n\nbetween\n\n".join(parts) + "\n\nafter\n", encoding="utf-8")
    return path


def test_the_eval_table_has_a_row_a_file_and_one_for_all(folder):
    """Figures are rounded, absent ones are dashes, and shorter blocks are filled up."""
    heading, rule, *body = rows(render("eval", folder / "eval.json"))
    assert heading[:3] == ["prompts", "rows", "tau"]
    assert heading[-3:] == ["c1", "c2", "c3"]
    assert len(rule) == len(heading)
    assert body == [
        ["gsm8k", "8", "2.17", "1.57", "20.0", "31.4", "30.1", "1.50", "0.50", "0.48", "-"],
        ["mbpp", "8", "-", "1.57", "20.0", "31.4", "30.1", "1.50", "0.60", "-", "-"],
        ["all", "16", "2.00", "1.57", "20.0", "31.4", "30.1", "1.50", "0.50", "0.48", "-"],
    ]


def test_the_eval_table_of_one_file_has_no_total(folder):
    """A total over a single file would say the same twice."""
    one = {**EVAL, "files": {"gsm8k": _PART}}
    (folder / "eval.json").write_text(json.dumps(one), encoding="utf-8")
    assert [row[0] for row in rows(render("eval", folder / "eval.json"))] == ["prompts", "---", "gsm8k"]


def test_the_eval_note_says_how_it_was_taken(folder):
    """Greedy or the temperature, lengths, batch, budget, dtype and seed."""
    assert "Greedy, at most 128 new tokens, batch size 1, budget `full`" in render("eval", folder / "eval.json")
    warm = copy.deepcopy(EVAL)
    warm["settings"] |= {"temperature": 0.8, "top_p": 0.9}
    (folder / "eval.json").write_text(json.dumps(warm), encoding="utf-8")
    assert "T = 0.8, top-p 0.9, judged token by token, at most" in render("eval", folder / "eval.json")


def test_the_passes_table(folder):
    """Medians with percentiles, both ratios, and where a round's time goes."""
    text = render("passes", folder / "passes.json")
    body = rows(text)
    assert body[2] == ["16", "64 (128 padded)", *["96 (95-100)"] * 3, "1.04", "0.73"]
    assert body[-1] == ["8", "120.0", "10.0%", "86.0%", "4.0%"]
    assert "8 rows costs 2.00 times a round of 1" in text


def test_the_divergence_table(folder):
    """Counts of both precisions by method, and the widest gap."""
    body = rows(render("divergence", folder / "divergence.json"))[2:]
    assert body == [
        ["plain, batch of 8", "8 of 8", "6 of 8", "2 of 2", "1 of 2", "-"],
        ["DSpark", "8 of 8", "5 of 8", "3 of 3", "2 of 3", "0.1250"],
    ]


def test_the_recipe_table(folder):
    """Model, data, run and the kept checkpoint's own held-out tau."""
    text = render("recipe", folder / "recipe.json")
    facts = dict(rows(text)[2:])
    assert facts["block"] == "7 tokens; mask token `<gh_stars>` (id 7)"
    assert facts["size"] == "11.7 M parameters, 23.5 MB"
    assert facts["rows for training"] == "6,117 (1,274,798 response tokens): 3,000 at T = 0, 3,117 at T = 1"
    assert facts["by kind"] == "self-chat 4,401, gsm8k 1,716"
    assert facts["backbone"] == "2 layers, started from the target's last layers; taps 1, 8, 14"
    assert facts["sequential head"] == "vanilla, rank 48, started from the target"
    assert facts["loss"] == "CE (50.0% of it against p_t) 1 falling to 0.1 over 30.0% of the run, L1 0.9, confidence 1, decay 4"
    assert facts["thinking mode of the data"].startswith("off")
    assert facts["run"] == "1,400 steps, 62 minutes, 716,800 anchors, 0.92 passes over the data"
    assert facts["kept"] == "step 700; held out, teacher-forced: tau 2.20 at T = 0, tau 1.75 at T = 1"
    assert text.endswith("Trained on Some CPU, 2 cores, 2 torch threads; python 3.11.7, torch 2.13.0+cpu, transformers 5.23.0. Seed 0.")


def test_the_recipe_table_of_a_finetuned_drafter(folder):
    """Base with its fingerprint, what was trained, and how much of it."""
    (folder / "recipe.json").write_text(json.dumps(FINETUNED), encoding="utf-8")
    facts = dict(rows(render("recipe", folder / "recipe.json"))[2:])
    assert facts["base"] == "some/drafter, fingerprint `0123456789abcdef`"
    assert facts["trained"] == "LoRA of rank 16 on q_proj, markov_w2: 0.12 M of 11.7 M parameters (1.0%)"


def test_tau_with_and_without_copies_is_told_row_by_row() -> None:
    """A record that has both names the second one for what it is; one that has not says nothing of copies."""
    both = render_decoded({**DECODED, "without_copying": {**DECODED["decoded"], "T=0": {**DECODED["decoded"]["T=0"], "acceptance": [0.1]}}})
    assert "| T = 0 | 2.20 | 2.00 |" in both
    assert "| T = 0, heads alone | 2.20 | 2.00 | 2.10 | 0.10 | - |" in both
    assert "heads alone" not in render_decoded(DECODED)
    assert "| T = 0, token by token" not in render_decoded(DECODED)
    assert render_decoded(DECODED).endswith("At T > 0 judged token by token.")  # as files were before they said it
    block = {**DECODED, "settings": {**DECODED["settings"], "verification": "block"}}
    assert render_decoded(block).endswith("At T > 0 judged over the block.")
    assert "| T = 0, token by token | 2.20 | 2.00 |" in render_decoded({**DECODED, "token_by_token": DECODED["decoded"]})


def test_a_recipe_tells_what_was_decoded(folder):
    """Where an evaluation decoded for real, the kept checkpoint's figures are told beside the estimate."""
    decoded = {"tau": 1.9, "prompts": 16, "T=0": {"tau": 2.1}, "T=1": {"tau": 1.7}}
    record = {**RECIPE, "curve": [{**_POINT, "decoded": decoded}]}
    (folder / "recipe.json").write_text(json.dumps(record), encoding="utf-8")
    assert dict(rows(render("recipe", folder / "recipe.json"))[2:])["kept"].endswith(
        "decoded on 16 held-out prompts: tau 2.10 at T = 0, 1.70 at T = 1"
    )


def test_the_table_of_decoded_tau(folder):
    """Tau of each set, the mean of sets, and acceptance by position, at each temperature."""
    body = rows(render("decoded", folder / "decoded.json"))
    assert body[0] == ["", "a", "b", "mean of sets", "c1", "c2"]
    assert body[2:] == [["T = 0", "2.20", "2.00", "2.10", "0.60", "-"], ["T = 1", "1.80", "1.50", "1.65", "0.50", "0.25"]]


def test_the_table_of_matched_drafters_tells_the_gain_over_dflash(folder):
    """2.25 over 1.85 is 21.6% more, and 2.0 over 1.6 is 25%."""
    text = render("matched", folder / "matched.json")
    assert rows(text)[2] == ["dspark, 2 layers", "11.7 M", "2.00", "2.50", "2.25", "2.00", "2.50", "2.00"]
    assert "128 anchors, Muon, 5,000 rows to learn from, seed 0." in text
    assert "DSpark over DFlash, mean of sets, 2 layers: 21.6% at T = 0 and 25.0% at T = 1." in text
    assert rows(render("positions", folder / "positions.json"))[3:5] == [
        ["dspark, 2 layers, T = 1", "0.50", "0.50"],
        ["dflash, 2 layers, T = 0", "0.50", "-"],
    ]


def test_matched_drafters_are_drawn(tmp_path):
    """Acceptance along the block, and tau by depth."""
    images = plot_matched(MATCHED, tmp_path / "plots")
    assert [image.name for image in images] == ["matched_acceptance.png", "matched_layers.png"]
    assert all(image.read_bytes().startswith(b"\x89PNG") for image in images)
    assert [image.name for image in plot_matched(MATCHED, tmp_path, "other")] == ["other_acceptance.png", "other_layers.png"]


def test_the_table_of_a_domain_shift(folder):
    """What was trained, how much of it is stored, how long it took, and tau on both domains."""
    body = rows(render("shift", folder / "shift.json"))[2:]
    assert body[0] == ["before", "-", "23.5 MB", "-", "1.50", "2.00", "1.50", "2.00"]
    assert body[1][:5] == ["LoRA", "1.38 M", "2.8 MB", "3.2", "2.50"]


def test_the_table_of_budgets_under_load(folder):
    """Throughput with its spread, and the ratios of the best load-aware budget to the best fixed choice."""
    text = render("load", folder / "load.json")
    assert "| `load-aware` | 60 (58-63) | 480 (478-483) |" in text
    assert "| best of plain, full, static | `full` | `full` |" in text
    assert "| over that best | 1.20 | 1.20 |" in text
    assert "| over plain | 1.50 | 1.50 |" in text
    assert "| verified tokens a request, `load-aware` | 2.50 | 2.50 |" in text


def test_the_table_of_a_calibration(folder):
    """Held-out prompts of the fit's own domain first, then the others, with errors before and after."""
    body = rows(render("calibration", folder / "calibration.json"))[2:]
    assert body[0] == ["a, held out", "900", "5.0%", "1.2%", "0.850", "0.1200", "0.1200", "1.0% -"]
    assert body[1][0] == "b"


def test_a_calibration_on_several_files_tells_their_error_together_too(tmp_path):
    """Behind those of each, before those of other domains: bins of more rounds are less noisy."""
    better = {**_JUDGED["after"], "rounds": 1800, "ece": 0.009}
    record = {**CALIBRATION, "files": {"a": _JUDGED, "c": _JUDGED}, "before": _JUDGED["before"], "after": better}
    (tmp_path / "calibration.json").write_text(json.dumps(record), encoding="utf-8")
    body = rows(render("calibration", tmp_path / "calibration.json"))[2:]
    assert [row[0] for row in body] == ["a, held out", "c, held out", "all of these together", "b"]
    assert body[2][1:4] == ["1800", "5.0%", "0.9%"]


def test_the_table_of_a_replay(folder):
    """Throughput of each budget, and the best load-aware one over the best fixed one: 60 over 50 tokens a second."""
    body = rows(render("replay", folder / "replay.json"))[2:]
    assert body[1] == ["`full`", "50.0", "400.0"]
    assert body[3][1:] == ["1.200", "1.200"]
    assert body[4] == ["`load-aware`, tokens at 0.3 of their cost, does not follow", "0.900", "1.000"]
    assert body[5] == ["`load-aware`, tokens at 0.3 of their cost, follows costs", "1.100", "1.000"]
    assert "in bench.json (Another CPU" in render("replay", folder / "replay.json")


def test_the_table_of_a_drift(folder):
    """Each kind of traffic with and without following, with the error at the first and last check."""
    body = rows(render("drift", folder / "drift.json"))[2:]
    assert body[0] == ["a, watched", "80.0", "2.00", "3.00", "-", "-"]
    assert body[3] == ["b, followed", "80.0", "2.00", "3.00", "5.0%", "2.0%"]


def test_the_table_of_training_steps(folder):
    """Speed with and without the target's pass, memory, and the ratios to another program."""
    body = rows(render("training", folder / "training.json"))[2:]
    assert body == [
        ["hf_dspark, whole vocabulary", "200", "300", "2.00", "", ""],
        ["another program", "-", "100", "4.00", "2.00", "3.00"],
    ]


def test_a_recipe_of_a_run_under_way(folder):
    """Before the run has ended there is no result, and the table says so."""
    running = {key: value for key, value in RECIPE.items() if key not in ("result", "curve")}
    (folder / "recipe.json").write_text(json.dumps(running), encoding="utf-8")
    assert dict(rows(render("recipe", folder / "recipe.json"))[2:])["run"] == "not finished"


def test_the_machine_line(folder):
    """One line, with the GPU first where there is one."""
    expected = "Some CPU, 2 cores, 2 torch threads, 23 GiB; python 3.11.7, torch 2.13.0, transformers 5.23.0."
    assert render("machine", folder / "eval.json") == expected
    with_gpu = {**EVAL, "machine": {**MACHINE, "gpu": "Some GPU"}}
    (folder / "eval.json").write_text(json.dumps(with_gpu), encoding="utf-8")
    assert render("machine", folder / "eval.json") == f"Some GPU, {expected}"


def test_rewriting_touches_only_what_is_marked(folder):
    """The text around the markers stays byte for byte, and a second run changes nothing."""
    path = with_markers(folder, "machine", "eval_t1")
    assert not in_sync(path)
    assert main([str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    table = render("eval", folder / "eval.json")
    line = render("machine", folder / "machine.json")
    assert text == (
        f"before\n\n<!-- begin: machine machine.json -->\n{line}\n<!-- end: machine -->\n\nbetween\n\n"
        f"<!-- begin: eval_t1 eval.json -->\n{table}\n<!-- end: eval_t1 -->\n\nafter\n"
    )
    assert in_sync(path)
    assert updated(path) == text


def test_empty_parts_are_filled(folder):
    """Markers with nothing between them are how a table is first asked for."""
    path = with_markers(folder, *TABLES, inside="")
    assert main([str(path)]) == 0
    assert in_sync(path)
    assert len(sections(path.read_text(encoding="utf-8"))) == len(TABLES)


def test_check_writes_nothing(folder, capsys):
    """--check exits 1, names the file, and leaves it alone; 0 once it is in sync."""
    path = with_markers(folder, "eval")
    before = path.read_text(encoding="utf-8")
    assert main([str(path), "--check"]) == 1
    assert str(path) in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == before
    main([str(path)])
    assert main([str(path), "--check"]) == 0


def test_nothing_is_written_when_one_file_is_bad(folder, capsys):
    """All files are rendered before the first is rewritten."""
    good = with_markers(folder, "eval")
    before = good.read_text(encoding="utf-8")
    bad = folder / "bad.md"
    bad.write_text("<!-- begin: nothing eval.json -->\n<!-- end: nothing -->\n", encoding="utf-8")
    assert main([str(good), str(bad)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert good.read_text(encoding="utf-8") == before


def test_markers_in_code_fences_are_examples(folder):
    """A page may show the markers without having them filled."""
    path = folder / "page.md"
    path.write_text("```md\n<!-- begin: eval FILE.json -->\n<!-- end: eval -->\n```\n", encoding="utf-8")
    assert sections(path.read_text(encoding="utf-8")) == []
    assert in_sync(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- begin: table eval.json -->\n<!-- end: table -->", r"unknown table 'table'; allowed: eval, passes"),
        ("\n<!-- begin: eval eval.json -->\n", r"line 2: the table 'eval' has no"),
        ("<!-- begin: eval -->\n<!-- end: eval -->", r"line 1: expected"),
        ("<!-- end: eval -->", r"no table is open"),
        ("<!-- begin: eval eval.json -->\n<!-- end: passes -->", r"line 2: got .* expected `<!-- end: eval -->`"),
        ("<!-- begin: eval eval.json -->\n<!-- begin: eval eval.json -->", r"line 2: a table begins inside 'eval'"),
        ("<!-- begin: eval none.json -->\n<!-- end: eval -->", r"cannot read .*none\.json"),
        ("<!-- begin: eval page.md -->\n<!-- end: eval -->", r"page\.md is not JSON"),
        ("<!-- begin: eval passes.json -->\n<!-- end: eval -->", r"passes\.json is no result file .*no 'settings'"),
    ],
)
def test_bad_markers_and_files_are_named(folder, text, message):
    """The error says which line, table or file is at fault."""
    path = folder / "page.md"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        updated(path)


def test_plots_are_png_files(folder):
    """One image for each eval and recipe file that a page names."""
    pytest.importorskip("matplotlib", reason="plots are an extra: pip install 'hf-dspark[plots]'")
    path = with_markers(folder, "eval", "eval_t1", "recipe", "machine")
    images = plots([path], folder / "images")
    assert [image.name for image in images] == ["eval_acceptance.png", "recipe_training_curve.png"]
    for image in images:
        assert image.read_bytes().startswith(b"\x89PNG")
        assert image.stat().st_size < 100_000


@pytest.mark.parametrize("name", ["README.md", "model_cards/smollm2-dspark/README.md"])
def test_the_repositorys_tables_are_in_sync_with_their_files(name):
    """Every figure in the README and the model card is what its result file renders to."""
    path = ROOT / name
    assert in_sync(path), f"run: python -m hf_dspark.evaluation.report {name}"
