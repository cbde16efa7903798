"""The load-aware budgets in the real loop: same text as plain generation, whoever rests and whoever is drafted for."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

import hf_dspark
from hf_dspark import CostProfile, LaggedLoadAwareBudget, LoadAwareBudget, OnlineCalibration
from hf_dspark.budgets.budget import LiveRows, Proposal
from hf_dspark.decoding.profiler import profile_key, profile_path, row_grid
from tests.costs import flat, full_machine, jagged, middling
from tests.helpers import RAGGED, bigram_drafter, left_padded, plain, random_prompts
from tests.tiny import tiny_drafter, tiny_target

GAMMA = 5


@pytest.fixture(scope="module")
def pair():
    target = tiny_target("llama")
    prompts = random_prompts(RAGGED)
    return target, bigram_drafter(target, prompts), left_padded(prompts)


@pytest.mark.parametrize("costs", [flat, middling, jagged, full_machine])
@pytest.mark.parametrize("kind", [LoadAwareBudget, LaggedLoadAwareBudget])
def test_greedy_text_is_plain_generation(pair, kind, costs):
    """Whatever rounds cost, eight ragged rows get plain generation's tokens."""
    target, drafter, inputs = pair
    out = hf_dspark.generate(
        target, drafter, **inputs, budget=kind(costs(drafter.config.block_size)), max_new_tokens=24, eos_token_id=98, do_sample=False
    )
    assert torch.equal(out, plain(target, inputs))


class Turns(hf_dspark.Budget):
    """Drafts for another part of the rows in each round: none, some that do not follow each other, one, all."""

    def __init__(self) -> None:
        self.round = 0

    def propose(self, live: LiveRows) -> Proposal:
        rows = range(len(live.requests))
        parts = [tuple(rows[::2]), (), tuple(rows[-1:]), tuple(rows), tuple(rows[1:3]), tuple(rows[::3])]
        part = parts[self.round % len(parts)]
        self.round += 1
        return Proposal(3 if self.round % 2 else live.block_size, part) if part else Proposal(0)

    def plan(self, drafts):
        return list(drafts.limits)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("sample", [False, True])
def test_any_part_of_the_rows_can_be_drafted_for(family, sample):
    """Rows that sit a round out, and catch up later, are decoded exactly; greedy text is plain generation's, drawn text repeats by seed."""
    target = tiny_target(family)
    prompts = random_prompts(RAGGED)
    drafter, inputs = bigram_drafter(target, prompts), left_padded(prompts)
    options = {"max_new_tokens": 24, "eos_token_id": 98, "return_dict_in_generate": True, "repetition_penalty": 1.2}
    if sample:
        first, again = (hf_dspark.generate(target, drafter, **inputs, budget=Turns(), do_sample=True, seed=3, **options) for _ in range(2))
        assert torch.equal(first.sequences, again.sequences)
        return
    out = hf_dspark.generate(target, drafter, **inputs, budget=Turns(), do_sample=False, **options)
    assert torch.equal(out.sequences, plain(target, inputs, repetition_penalty=1.2))
    assert sum(row.accepted for row in out.stats.rows) > 0
    assert all(0 < row.drafted < drafter.config.block_size * row.rounds for row in out.stats.rows)


def test_hidden_states_do_not_pile_up_while_nothing_is_drafted(pair):
    """The drafter reads them every so many tokens, and the text stays plain generation's."""
    target, drafter, inputs = pair
    read: list[int] = []

    class Never(hf_dspark.Budget):
        def propose(self, live):
            return Proposal(0)

        def plan(self, drafts):
            raise AssertionError("nothing was drafted")

    hook = drafter.fc.register_forward_hook(lambda module, args, out: read.append(len(args[0])))
    try:
        out = hf_dspark.generate(
            target, drafter, **inputs, budget=Never(), prefill_chunk_size=20, max_new_tokens=24, eos_token_id=98, do_sample=False
        )
    finally:
        hook.remove()
    assert torch.equal(out, plain(target, inputs))
    prompts = sum(RAGGED)
    later = read[next(i for i in range(len(read)) if sum(read[: i + 1]) == prompts) + 1 :]
    assert len(later) > 3
    assert all(20 < count <= 20 + len(RAGGED) for count in later)


def test_what_a_row_accepts_does_not_depend_on_when_it_last_drafted(pair):
    """A drafter that has caught up drafts what it would have drafted anyway: acceptance in full rounds is the same as without pauses.

    A budget that drafts in every second round is compared, row by row, with a drafter that is asked for the same positions.
    """
    target, drafter, inputs = pair

    class EverySecond(hf_dspark.Budget):
        def __init__(self, first: int) -> None:
            self.round = first

        def propose(self, live):
            self.round += 1
            return Proposal(live.block_size if self.round % 2 else 0)

        def plan(self, drafts):
            return [0 for _ in drafts.limits]  # nothing is verified, so rows advance token by token and positions agree

    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    class Ears(OnlineCalibration):
        def __init__(self, first: int) -> None:
            super().__init__()
            self.first = first

        def on_round_end(self, finished):
            seen[self.first].append(torch.empty(0) if finished.confidence_logits is None else finished.confidence_logits)

    for first in (0, 1):
        hf_dspark.generate(target, drafter, **inputs, budget=EverySecond(first), online_calibration=Ears(first), max_new_tokens=12)
    drafted = [a if len(a) else b for a, b in zip(seen[0], seen[1], strict=True)]
    whole: list[torch.Tensor] = []

    class Always(EverySecond):
        def propose(self, live):
            return Proposal(live.block_size)

    class AllEars(Ears):
        def on_round_end(self, finished):
            if finished.confidence_logits is not None:
                whole.append(finished.confidence_logits)

    hf_dspark.generate(target, drafter, **inputs, budget=Always(0), online_calibration=AllEars(0), max_new_tokens=12)
    assert len(drafted) == len(whole) > 5
    for a, b in zip(drafted, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_cap_bounds_every_pass(pair):
    """max_verify_tokens holds for every budget, and the text is the same."""
    target, drafter, inputs = pair
    for budget in ("full", "static:3", "threshold:0.2", LoadAwareBudget(flat(drafter.config.block_size))):
        out = hf_dspark.generate(
            target, drafter, **inputs, budget=budget, max_verify_tokens=11, max_new_tokens=24, eos_token_id=98, return_dict_in_generate=True
        )
        assert torch.equal(out.sequences, plain(target, inputs))
        assert sum(row.verified for row in out.stats.rows) <= 3 * out.stats.rounds + 8 * drafter.config.block_size


@pytest.mark.parametrize("wrong", [0, -3, 1.5, True])
def test_a_cap_is_a_positive_number(pair, wrong):
    """Refused by name."""
    target, drafter, inputs = pair
    with pytest.raises(ValueError, match="max_verify_tokens"):
        hf_dspark.generate(target, drafter, **inputs, max_verify_tokens=wrong, max_new_tokens=2)


# -------------------------------------------------------------------------------------------------------------- cost profiles


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DSPARK_CACHE", str(tmp_path))
    return tmp_path


def test_generate_measures_nothing(cache, caplog):
    """With or without a stored profile a call runs its own rounds only, and gives plain generation's text."""
    target, inputs = tiny_target("llama"), left_padded(random_prompts((5, 3, 9)))
    drafter = tiny_drafter(target)
    for _ in range(2):
        passes: list[int] = []
        hook = target.model.layers[0].register_forward_hook(lambda *_, passes=passes: passes.append(1))
        out = hf_dspark.generate(
            target, drafter, **inputs, budget="load-aware", max_new_tokens=24, eos_token_id=98, return_dict_in_generate=True
        )
        hook.remove()
        assert torch.equal(out.sequences, plain(target, inputs))
        assert len(passes) <= 1 + out.stats.rounds + 8  # the prompt's pass, and the self-test's on first use
        CostProfile.cached(target, drafter, rows=2)
    record = json.loads(profile_path(profile_key(target, drafter)).read_text())
    assert sorted(map(int, record["tables"]["greedy"])) == row_grid(2) == [1, 2]


def test_a_profile_is_measured_for_what_is_missing_only(cache):
    """A larger batch adds its rows, sampling adds its own table; what was there stays as it was."""
    target = tiny_target("llama")
    drafter = tiny_drafter(target)
    first = CostProfile.cached(target, drafter, rows=1)
    one = first.tables["greedy"][1]
    more = CostProfile.cached(target, drafter, rows=2, sample=True)
    assert more.tables["greedy"] == {1: one}
    assert sorted(more.tables["sample"]) == [1, 2]
    assert CostProfile.cached(target, drafter, rows=4).tables["greedy"][1] == one


@pytest.mark.parametrize(
    "content", ["", "{", '{"format": 99}', "[]", '{"format": 3, "key": {}, "block_size": 5, "tables": {"greedy": {"1": {}}}}']
)
def test_a_file_of_no_use_is_ignored_with_one_line(cache, caplog, content):
    """Corrupt, foreign or stale: measured anew, said once."""
    target = tiny_target("llama")
    drafter = tiny_drafter(target, block_size=4)
    folder = cache / "elsewhere"
    path = profile_path(profile_key(target, drafter), folder)
    path.parent.mkdir()
    path.write_text(content)
    with caplog.at_level(logging.WARNING, logger="hf_dspark.decoding.profiler"):
        profile = CostProfile.cached(target, drafter, rows=1, folder=folder)
    assert len(caplog.records) == 1
    assert "cannot be used" in caplog.text
    assert CostProfile.from_json(json.loads(path.read_text())).tables == profile.tables


def test_the_key_follows_what_times_depend_on(pair):
    """Another dtype, thread count or drafter is another profile."""
    target, drafter, _ = pair
    key = profile_key(target, drafter)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert profile_key(target, drafter) != key
    finally:
        torch.set_num_threads(threads)
    assert profile_key(target, tiny_drafter(target, markov_rank=3)) != key
    assert profile_key(tiny_target("llama").to(torch.bfloat16), drafter) != key
    assert profile_key(target, drafter) == key


def test_a_cache_that_cannot_be_written_is_said_once(tmp_path, caplog):
    """Generation goes on with what was measured."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    target = tiny_target("llama")
    with caplog.at_level(logging.WARNING, logger="hf_dspark.decoding.profiler"):
        profile = CostProfile.cached(target, tiny_drafter(target, markov_rank=2), rows=1, folder=blocked)
    assert profile.tables["greedy"]
    assert "cannot be" in caplog.text


def test_measured_times_are_times(pair):
    """Every measured pass and draft took time, and more rows are in the table as asked."""
    target, drafter, _ = pair
    profile = CostProfile.measure(target, drafter, rows=2)
    costs = profile.costs()
    assert sorted(profile.tables["greedy"]) == [1, 2]
    assert 0 < costs.passes(2).verify_s[0] < 5.0
    assert 0 < costs.draft_s(2, drafter.config.block_size) < 5.0
    with pytest.raises(ValueError, match="sample"):
        profile.costs(sample=True)
