"""Divergences between greedy texts: how they are judged, and the scoring of one prefix in passes of many shapes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers
from examples.benchmarks.divergence import METHODS, Divergence, compare, main, shape_differences
from packaging.version import Version

from hf_dspark.evaluation.prompts import user_turn
from hf_dspark.evaluation.speed import Bench, Run, Sampling
from tests.tiny import VOCAB, tiny_drafter, tiny_llama, tiny_target
from tests.words import word_tokenizer

PROMPTS = [user_turn(text) for text in ("w5 w9 w40", "w17 w8 w33 w21 w60 w7", "w11", "w30 w31 w32 w33 w34")]


@pytest.fixture(scope="module")
def bench() -> Bench:
    """A tiny fp32 Llama and a random drafter."""
    target = tiny_llama()
    return Bench(target, tiny_drafter(target, "vanilla"), word_tokenizer(target.config), max_new_tokens=12)


def divergence(gap: float, **differences: float) -> Divergence:
    return Divergence("dspark", 0, 3, 7, 8, gap, gap, {"generate": gap, **differences})


@pytest.mark.parametrize(
    ("gap", "others", "explained"),
    [
        (0.0, [0.0, 0.0], True),  # an exact tie
        (0.125, [0.125, 0.125], False),  # nothing moves: rounding cannot turn the choice
        (0.125, [0.0, 0.0625], True),  # moves to a tie
        (0.125, [-0.25, 0.125], True),  # turned round
        (0.5, [0.375, 0.5], False),  # moves, but not far enough
    ],
)
def test_a_divergence_is_explained_by_noise_as_wide_as_the_gap(gap, others, explained):
    """The verdict compares the gap with the largest movement of the same difference of logits."""
    one = divergence(gap, **{f"block_{k}": value for k, value in enumerate(others)})
    assert one.explained is explained
    assert one.to_json()["explained"] is explained


def test_noise_of_plain_passes_leaves_ragged_ones_out():
    """Movement that only this package's own passes show is not counted as the plain target's."""
    one = divergence(0.25, full=0.25, block_2=0.125, **{"ragged_1[8]": -0.5})
    assert one.noise == 0.75
    assert one.plain_noise == 0.125


# Before 5.20 a sliding-window cache that is full takes no pass of several tokens, so those shapes cannot be scored there.
_SLIDING = ["mistral", "gemma3"] if Version(transformers.__version__) >= Version("5.20") else []


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", *_SLIDING])
def test_every_shape_scores_the_prefix_as_one_forward_does(family):
    """In fp32 all shapes agree with the model's own single forward, and all of them are there."""
    target = tiny_target(family)
    prefix = torch.randint(4, VOCAB, (23,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = target(input_ids=prefix[None], use_cache=False).logits[0, -1]
    differences = shape_differences(target, prefix, 5, 9, prompt_tokens=10)
    assert differences == pytest.approx(dict.fromkeys(differences, (logits[5] - logits[9]).item()), abs=2e-4)
    blocks = range(1, 9)
    assert set(differences) == {
        "full",
        "batch_8",
        "padded_8",
        *(f"block_{k}" for k in blocks),
        *(f"decode_{k}" for k in blocks if k > 1),
        *(f"ragged_{rows}[{k}]" for rows in (1, 8) for k in blocks),
    }


def test_short_prefixes_are_scored_in_the_shapes_that_fit():
    """A prefix of three tokens has blocks of one and two; one of a single token is refused."""
    target = tiny_llama()
    found = shape_differences(target, torch.tensor([5, 6, 7]), 1, 2)
    assert {name for name in found if name.startswith("block")} == {"block_1", "block_2"}
    with pytest.raises(ValueError, match="at least two tokens"):
        shape_differences(target, torch.tensor([5]), 1, 2)


def test_fp32_texts_are_identical_by_every_method(bench):
    """No method parts from plain generation where there is no rounding to speak of."""
    done = []
    result = compare(bench, PROMPTS, batch_size=3, on_rows=done.append)
    assert result.divergences == []
    assert [result.identical(method) for method in METHODS] == [len(PROMPTS)] * len(METHODS)
    assert done == [3, 1]
    record = result.to_json()
    assert record["dtype"] == "float32"
    assert record["methods"]["dspark"] == {
        "rows": 4,
        "identical": 4,
        "diverged": 0,
        "explained": 0,
        "explained_by_plain_passes": 0,
    }


class WrongAtFive(Bench):
    """A bench whose speculated texts have another token at place 5, as a verifier with a fault would leave it."""

    def run(self, method, inputs, **options) -> Run:
        run = super().run(method, inputs, **options)
        if method != "dspark":
            return run
        wrong = [[*row[:5], (row[5] + 1) % VOCAB, *row[6:]] for row in run.tokens]
        return dataclasses.replace(run, tokens=wrong)


def test_a_wrong_text_is_not_explained(bench):
    """Negative control: a token that the target did not all but choose is found at its place and stays unexplained."""
    wrong = WrongAtFive(bench.target, bench.drafter, bench.tokenizer, max_new_tokens=12)
    plain = bench.run("plain", bench.inputs(PROMPTS[:1])).tokens[0]
    result = compare(wrong, PROMPTS[:1], methods=("plain_batched", "dspark"))
    assert [(one.method, one.row, one.position) for one in result.divergences] == [("dspark", 0, 5)]
    (found,) = result.unexplained
    assert (found.plain_token, found.other_token) == (plain[5], (plain[5] + 1) % VOCAB)
    assert found.gap >= found.top_two_gap > 0
    assert found.noise < 1e-3 < found.gap


def test_the_gap_is_the_plain_runs_own(bench):
    """Gap and top-two gap are differences of the logits that the plain run chose from."""
    wrong = WrongAtFive(bench.target, bench.drafter, bench.tokenizer, max_new_tokens=12)
    (found,) = compare(wrong, PROMPTS[1:2], methods=("dspark",)).divergences
    inputs = bench.inputs(PROMPTS[1:2])
    ids = bench.target.generate(**inputs, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        logits = bench.target(ids).logits[0, -1]
    best = logits.topk(2).values
    assert found.gap == pytest.approx((logits[found.plain_token] - logits[found.other_token]).item(), abs=2e-4)
    assert found.top_two_gap == pytest.approx((best[0] - best[1]).item(), abs=2e-4)


def test_bad_input_is_refused(bench):
    """Unknown methods, no prompts, and sampling."""
    with pytest.raises(ValueError, match="beam"):
        compare(bench, PROMPTS, methods=("beam",))
    with pytest.raises(ValueError, match="at least one prompt"):
        compare(bench, [])
    sampling = Bench(bench.target, bench.drafter, bench.tokenizer, sampling=Sampling(temperature=1.0))
    with pytest.raises(ValueError, match="greedy"):
        compare(sampling, PROMPTS)


def test_the_command_writes_one_record(bench, tmp_path, capsys):
    """Models, prompts and settings by name in; a JSON file and the same JSON on the last line out."""
    bench.target.save_pretrained(tmp_path / "target")
    bench.tokenizer.save_pretrained(tmp_path / "target")
    bench.drafter.save_pretrained(tmp_path / "drafter")
    prompts = tmp_path / "some.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p[0]["content"]}) + "\n" for p in PROMPTS), encoding="utf-8")
    words = ["--target", str(tmp_path / "target"), "--drafter", str(tmp_path / "drafter"), "--prompts", str(prompts)]
    assert main([*words, "--limit", "3", "--max-new-tokens", "8", "--json", str(tmp_path / "out.json")]) in (0, 1)
    record = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert record == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["dtype"] == "bfloat16"
    assert record["fp32"]["dtype"] == "float32"
    assert record["fp32_identical"] is True
    assert record["prompts"] == {"some.jsonl": 3}
    for counts in record["methods"].values():
        assert counts["identical"] + counts["diverged"] == counts["rows"] == 3
    assert record["machine"]["versions"]["torch"] == torch.__version__


def test_bad_input_of_the_command_is_one_line(tmp_path, capsys):
    """Exit code 2, and the line names the file."""
    assert main(["--prompts", str(tmp_path / "none.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "none.jsonl" in error
    assert error.count("\n") == 1
