"""The training-step benchmark on a tiny target: its fields, and figures that agree with an independent count."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
from examples.benchmarks.training_step import StepShape, measure, spread, summarize_ours, synthetic_rows, time_steps

from examples.benchmarks import training_step
from tests.tiny import MASK, VOCAB, tiny_llama
from tests.words import word_tokenizer

SHAPE = StepShape(
    batch_size=3, num_anchors=5, length_tokens=14, response_tokens=8, block_size=3, num_hidden_layers=1, markov_rank=4, chunk_positions=16
)


@pytest.fixture(scope="module")
def figures() -> dict:
    return time_steps(tiny_llama(), SHAPE, mask_token_id=MASK, steps=3, warmup=1, seed=5)


def test_anchors_and_positions_are_those_of_the_shape(figures):
    """8 response tokens hold 7 anchors, of which 5 are drawn; what they supervise follows from where they lie."""
    assert figures["anchors"] == 3 * 3 * 5
    assert figures["anchors"] < figures["positions"] <= 3 * 3 * 5 * 3
    every = StepShape(**{**vars(SHAPE), "num_anchors": 50})
    whole = time_steps(tiny_llama(), every, mask_token_id=MASK, steps=1, warmup=0)
    assert whole["anchors"] == 3 * 7
    assert whole["positions"] == 3 * (5 * 3 + 2 + 1)  # the last two blocks run into the end of the row
    assert whole["loss"][0] > 0


def test_seconds_add_up(figures):
    """A step's stages follow one another, so their sum is the step but for the drawing of anchors."""
    assert set(figures["stages"]) == set(training_step.STAGES)
    assert len(figures["step_s"]) == 3
    for number, whole in enumerate(figures["step_s"]):
        parts = [figures["stages"][name][number] for name in training_step.STAGES]
        assert all(part > 0 for part in parts)
        assert sum(parts) <= whole
    assert figures["anchors_per_s"] == pytest.approx(figures["anchors"] / sum(figures["step_s"]))


def test_a_step_leaves_nothing_on_the_disk(figures):
    """Neither new files nor, where the kernel counts them, any written byte."""
    assert figures["hidden_state_disk_bytes"] == 0
    assert figures["written_bytes"] in (0, None)


def test_memory_is_that_of_a_process_with_torch(figures):
    """The peak is at least what an imported torch takes, and no smaller than before the steps by more than freed pages."""
    assert 50e6 < figures["peak_rss_bytes"] < 100e9
    assert figures["loaded_rss_bytes"] is None or figures["loaded_rss_bytes"] > 50e6


def test_a_reduced_vocabulary_has_fewer_parameters(figures):
    """Only the sequential head's second matrix shrinks."""
    reduced = time_steps(tiny_llama(), SHAPE, draft_vocab_size=40, mask_token_id=MASK, steps=1, warmup=0)
    assert (figures["draft_vocab_size"], reduced["draft_vocab_size"]) == (VOCAB, 40)
    assert figures["trainable_parameters"] - reduced["trainable_parameters"] == (VOCAB - 40) * SHAPE.markov_rank


def test_the_same_seed_gives_the_same_losses(figures):
    """Rows, weights and anchors follow from the seed."""
    again = time_steps(tiny_llama(), SHAPE, mask_token_id=MASK, steps=3, warmup=1, seed=5)
    assert again["loss"] == pytest.approx(figures["loss"], rel=1e-5)
    assert synthetic_rows(SHAPE, 2, vocab_size=VOCAB, seed=1) != synthetic_rows(SHAPE, 2, vocab_size=VOCAB, seed=2)


def record(step_s: list[float], target_s: float, peak: int) -> dict:
    stages = {name: [target_s if name == "target_s" else 0.01] * len(step_s) for name in training_step.STAGES}
    return {
        "anchors_per_s": 10 * len(step_s) / sum(step_s),
        "anchors": 10 * len(step_s),
        "step_s": step_s,
        "stages": stages,
        "peak_rss_bytes": peak,
        "loaded_rss_bytes": 100,
        "hidden_state_disk_bytes": 0,
        "written_bytes": 0,
    }


def test_ratios_against_other_programs():
    """Figures by hand: steps of 2 s, of which 1 s is the target's, against 2 and 4 anchors/s; the worst of both counts."""
    ours = {"full": [sys.executable, "-c", f"print({json.dumps(json.dumps(record([2.0, 2.0, 3.0], 1.0, 300)))})"]}
    slow = {"anchors_per_s": 2.0, "peak_rss_bytes": 600, "step_s": [5.0]}
    fast = {"anchors_per_s": 4.0, "peak_rss_bytes": 1200, "what": "fast"}
    compare = [f"{sys.executable} -c 'print(0); print({json.dumps(json.dumps(other))})'" for other in (slow, fast)]
    found = measure(ours, compare, repeats=2)
    full = found["ours"]["full"]
    assert full["anchors_a_step"] == 10
    assert full["step_s"]["median"] == 2
    assert (full["anchors_per_s"], full["anchors_per_s_without_target"]) == (5, 10)
    assert (full["peak_rss_bytes"], full["step_rss_bytes"]) == (300, 200)
    assert [other["what"] for other in found["others"]] == [None, "fast"]
    assert found["others"][0]["ratios"]["full"]["anchors_per_s"] == 2.5
    assert found["against_best"]["full"] == {
        "anchors_per_s": 1.25,
        "anchors_per_s_lowest": 1.25,
        "anchors_per_s_without_target": 2.5,
        "anchors_per_s_without_target_lowest": 2.5,
        "peak_rss": 0.5,
    }


def test_a_command_without_a_record_is_named():
    """The error says which command, what it printed, and how its errors end."""
    command = [sys.executable, "-c", "import sys; print('nothing'); sys.exit('broken')"]
    with pytest.raises(RuntimeError, match=r"status 1 and printed \['nothing'\].*broken"):
        training_step.last_json_line(command)


@pytest.mark.parametrize(
    ("change", "match"), [({"num_anchors": 0}, "num_anchors is 0"), ({"response_tokens": 14}, "response_tokens is 14")]
)
def test_impossible_shapes_are_refused(change, match):
    """Sizes are checked once, with what was found and what is allowed."""
    with pytest.raises(ValueError, match=match):
        StepShape(**{**vars(SHAPE), **change})


def test_spread_of_one_value_and_of_many():
    """Percentiles lie around the median; a single value is its own."""
    assert spread([3.0]) == {"median": 3.0, "p20": 3.0, "p80": 3.0}
    many = spread([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert many["median"] == statistics.median(range(1, 7))
    assert 1 <= many["p20"] < many["median"] < many["p80"] <= 6


def test_the_command_line_writes_a_complete_file(tmp_path, monkeypatch, capsys):
    """Machine, seed and shape are in the file, whose figures are those of the workers; the last printed line is the same object."""
    asked = []

    def worker(command):
        asked.append(command)
        return record([1.0], 0.5, 10)

    monkeypatch.setattr(training_step, "last_json_line", worker)
    path = tmp_path / "step.json"
    training_step.main(["--json", str(path), "--draft-vocab-size", "40", "--repeats", "2", "--seed", "3", "--batch-size", "2"])
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert found["machine"]["versions"]["torch"] == torch.__version__
    assert (found["seed"], found["repeats"], found["shape"]["batch_size"]) == (3, 2, 2)
    assert set(found["ours"]) == {"full", "reduced"}
    assert all(math.isclose(ours["anchors_per_s"], 10) for ours in found["ours"].values())
    assert ["--draft-vocab-size" in command for command in asked] == [False, True] * 2
    assert all("--worker" in command and command[command.index("--batch-size") + 1] == "2" for command in asked)
    assert "others" in found
    assert "against_best" not in found


def test_a_worker_measures_in_its_own_process(tmp_path):
    """The command that measures a variant runs by itself on a saved target and prints the record that the summary reads."""
    target = tiny_llama()
    target.save_pretrained(tmp_path)
    word_tokenizer(target.config).save_pretrained(tmp_path)
    counts = {"steps": 2, "warmup": 1, "seed": 0}
    command = training_step.worker_command(str(tmp_path), SHAPE, dtype="float32", draft_vocab_size=40, mask_token_id=MASK, **counts)
    found = summarize_ours([training_step.last_json_line(command)])
    assert found["anchors_a_step"] == 3 * 5
    assert found["step_without_target_s"]["median"] < found["step_s"]["median"]
    assert found["hidden_state_disk_bytes"] == 0
