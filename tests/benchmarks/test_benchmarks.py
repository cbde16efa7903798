"""Each benchmark runs on a tiny pair and writes its result file; what it judges by has tests of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from examples.benchmarks import divergence, drift, matched, passes, shift, training_step
from examples.benchmarks.report import render

from hf_dspark.calibration.online import OnlineCalibration
from hf_dspark.evaluation import decoded
from hf_dspark.evaluation.prompts import user_turn
from hf_dspark.evaluation.speed import Bench, Run
from tests.benchmarks.conftest import Files
from tests.costs import middling
from tests.helpers import random_prompts
from tests.tiny import VOCAB, tiny_drafter, tiny_llama, tiny_target
from tests.words import word_tokenizer


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of response rows."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, VOCAB, (24,), generator=generator).tolist() for _ in range(40)]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    record = [{"source": "s", "prompt_ids": row[:8], "response_ids": row[8:], "ended": True} for row in ids]
    path.write_text("".join(json.dumps(row) + "\n" for row in record), encoding="utf-8")
    return path


def run(main, *arguments: object) -> dict:
    """Runs a benchmark, expects that it succeeds, and returns its result file."""
    out = Path(str(arguments[-1]))
    assert main([*map(str, arguments[:-1]), "--json", str(out)]) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def test_decoded(files: Files, tmp_path: Path) -> None:
    """Tau at both temperatures, in a file that its table can be made from."""
    record = run(decoded.main, *files.pair, "--prompts", files.prompts, "--max-new-tokens", 6, tmp_path / "decoded.json")
    assert record["decoded"]["T=0"]["tau"] >= 1
    assert "| T = 1, token verification |" in render("decoded", tmp_path / "decoded.json")


def test_divergence(files: Files, tmp_path: Path) -> None:
    """In fp32 no method differs from plain generation, in a file that its table can be made from."""
    record = run(divergence.main, *files.pair, "--prompts", files.prompts, "--max-new-tokens", 8, tmp_path / "divergence.json")
    assert {name: one["identical"] for name, one in record["fp32"]["methods"].items()} == dict.fromkeys(divergence.METHODS, 3)
    assert "| 3 of 3 |" in render("divergence", tmp_path / "divergence.json")


class WrongAtFive(Bench):
    """A bench whose speculated texts have another token at place 5, as a verifier with a fault would leave it."""

    def run(self, method, inputs, **options) -> Run:
        run = super().run(method, inputs, **options)
        if method != "dspark":
            return run
        return Run([[*row[:5], (row[5] + 1) % VOCAB, *row[6:]] if len(row) > 5 else row for row in run.tokens], run.seconds, run.stats)


def test_a_wrong_token_is_not_explained_by_rounding() -> None:
    """A fault in verification shows as a difference at its place whose gap is wider than the noise."""
    target = tiny_llama()
    bench = WrongAtFive(target, tiny_drafter(target), word_tokenizer(target.config), max_new_tokens=8)
    found = divergence.compare(bench, [user_turn("w5 w9 w40")]).unexplained
    assert [(one.method, one.position) for one in found] == [("dspark", 5), ("dspark_batched", 5)]
    assert all(one.gap > 10 * one.noise for one in found)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_shape_scores_the_prefix_as_one_forward_does(family: str) -> None:
    """In fp32 all shapes of `divergence` agree with the model's own single forward."""
    target = tiny_target(family)
    prefix = torch.randint(4, VOCAB, (23,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = target(input_ids=prefix[None], use_cache=False).logits[0, -1]
    found = divergence.shape_differences(target, prefix, 5, 9, prompt_tokens=10)
    assert found == pytest.approx(dict.fromkeys(found, (logits[5] - logits[9]).item()), abs=2e-4)
    assert len(found) == 3 + 8 + 7 + 16


def test_drift() -> None:
    """Each phase has its requests, and the checks fall into the phases."""
    target = tiny_llama()
    online = OnlineCalibration(window=400, every=10)
    phases = {"first": random_prompts((5, 4, 6)), "then": random_prompts((3, 7, 5), 1)}
    record = drift.shift(target, tiny_drafter(target), phases, online, middling(5), budget="full", max_new_tokens=8)
    assert {name: part["requests"] for name, part in record["phases"].items()} == {"first": 3, "then": 3}
    assert {check["phase"] for check in record["checks"]} == {"first", "then"}


def test_passes(files: Files, tmp_path: Path) -> None:
    """As many tokens in rows of unequal length as in equal rows, and fewer than in padded ones."""
    (found,) = run(passes.main, *files.pair, "--rows", 2, "--repeats", 1, tmp_path / "passes.json")["verify_pass"]
    assert found["tokens"] < found["padded_tokens"] == 2 * 8
    assert all(ms > 0 for ms in found["median_ms"].values())


def test_matched_and_shift(files: Files, rows: Path, tmp_path: Path) -> None:
    """Two variants are trained and decoded, and not trained again; a fine-tuned drafter is decoded on the new and the old domain."""
    shape = ["--rank", 4, "--draft-vocab", 40, "--mask-token", "w3", "--states-memory", 0, "--batch-size", 2, "--anchors", 4, "--steps", 2]
    variants = ["--variants", "dspark, 2 layers", "--variants", "dflash, 2 layers"]
    arguments = [*files.pair, "--data", rows, "--prompts", files.prompts, "--max-new-tokens", 4, *shape, *variants]
    record = run(matched.main, *arguments, tmp_path / "matched.json")
    assert all(found["decoded"]["T=0"]["macro"] >= 1 for found in record["drafters"].values())
    assert "| dflash, 2 layers |" in render("matched", tmp_path / "matched.json")
    assert run(matched.main, *arguments, tmp_path / "matched.json") == record

    tuned = tmp_path / "tuned"
    tiny_drafter(tiny_llama()).save_pretrained(tuned)
    (tuned / "recipe.json").write_text(json.dumps({"trainable_parameters": 1, "result": {"minutes": 1.0}}), encoding="utf-8")
    domains = ["--new", f"s={rows}", "--old", files.prompts, "--tuned", tuned, "--limit", 2, "--max-new-tokens", 4]
    record = run(shift.main, *files.pair, *domains, tmp_path / "shift.json")
    assert set(record["drafters"]) == {"before", str(tuned)}
    assert set(record["drafters"]["before"]["decoded"]["T=0"]["by_source"]) == {"s", "words"}


@pytest.mark.slow
def test_training_step(files: Files, tmp_path: Path) -> None:
    """Our step takes turns with another program's, in processes of their own; anchors are those of the shape, ratios of the rates."""
    other = f"{sys.executable} -c 'print(0); print({json.dumps(json.dumps({'anchors_per_s': 2.0, 'peak_rss_bytes': 600}))})'"
    shape = ["--batch-size", 3, "--num-anchors", 5, "--length-tokens", 14, "--response-tokens", 8, "--block-size", 3, "--markov-rank", 4]
    arguments = ["--mask-token-id", 3, "--steps", 2, "--repeats", 1, "--compare", other, *shape]
    found = run(training_step.main, *files.pair, *arguments, tmp_path / "step.json")["programs"]
    (ours,) = found["hf_dspark"]["runs"]
    assert ours["anchors"] == 2 * 3 * 5
    assert found[other]["speed_of_first_over_it"] == pytest.approx(ours["anchors_per_s"] / 2)
    with pytest.raises(ValueError, match="status 1"):
        training_step.last_json_line([sys.executable, "-c", "import sys; sys.exit('broken')"])
