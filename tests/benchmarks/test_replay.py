"""Budgets played against recorded blocks: what a budget with fixed lengths gets there is what the real loop gets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from examples.benchmarks.replay import main, play, record_walks

import hf_dspark
from hf_dspark.budgets.named import make_budget
from tests.costs import flat, middling
from tests.helpers import bigram_drafter, left_padded, random_prompts
from tests.tiny import tiny_target


@pytest.mark.parametrize("budget", ["full", "static:2", "threshold:0.4"])
def test_a_replay_accepts_what_the_real_loop_accepts(budget: str) -> None:
    """One request at a time, so that rounds do not mix: drafted, verified and accepted tokens equal those of `generate`, one by one."""
    target = tiny_target("llama")
    prompts = random_prompts((5, 3, 9))
    drafter = bigram_drafter(target, prompts)
    walks = record_walks(target, drafter, prompts, end_ids=[], max_new_tokens=24, concurrency=2)
    for prompt, walk in zip(prompts, walks, strict=True):
        options = {"max_new_tokens": 24, "eos_token_id": 98, "return_dict_in_generate": True, "do_sample": False}
        out = hf_dspark.generate(target, drafter, **left_padded([prompt]), budget=budget, **options)
        row = out.stats.rows[0]
        played = play(make_budget(budget), [walk], flat(drafter.config.block_size), 1, requests=0)
        assert (played.rounds, played.drafted, played.verified, played.accepted) == (
            row.rounds, row.drafted, row.verified, row.accepted,
        )  # fmt: skip


def test_the_clock_is_the_table_of_costs() -> None:
    """Plain rounds of four answers cost what the table says of four rows."""
    target = tiny_target("llama")
    prompts = random_prompts((5, 3, 9, 4))
    drafter = bigram_drafter(target, prompts)
    walks = record_walks(target, drafter, prompts, end_ids=[], max_new_tokens=8)
    costs = middling(drafter.config.block_size)
    played = play(make_budget("static:0"), walks, costs, 4, requests=4)
    assert played.seconds == pytest.approx(played.rounds / 4 * costs.passes(4).verify_s[0])
    assert played.tokens == played.rounds


@pytest.mark.parametrize("content", ["", "{}", '{"profile": {"format": 1}, "machine": {}}'])
def test_costs_that_are_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    """With the file's name and where a good one comes from, before any model is loaded."""
    (tmp_path / "bench.json").write_text(content)
    (tmp_path / "p.jsonl").write_text('{"turns": ["hi"]}\n')
    files = ["--prompts", str(tmp_path / "p.jsonl"), "--json", str(tmp_path / "out.json"), "--costs", str(tmp_path / "bench.json")]
    assert main(["--target", "/nowhere", *files]) == 2
    assert re.search(r"bench\.json holds no cost profile.*hf-dspark bench --json", capsys.readouterr().err)
