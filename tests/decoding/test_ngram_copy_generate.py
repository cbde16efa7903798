"""Drafts mixed with copies of the text, in every loop and through every door: plain greedy text, more of it accepted, and what is kept."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from transformers import DynamicCache

import hf_dspark
from hf_dspark import CheckpointError, DSparkDrafter
from hf_dspark.budgets.named import make_budget
from hf_dspark.checkpoints.convert import convert
from hf_dspark.decoding import candidate_generator as candidates
from hf_dspark.decoding.candidate_generator import stock_loop
from hf_dspark.decoding.options import Options
from hf_dspark.evaluation.serving import serve
from tests.helpers import BUDGETS, NEVER, counts, left_padded, make_world, plain, speculate, talking_target
from tests.searched import agreed, searched
from tests.tiny import tiny_drafter, tiny_target

WEIGHTS = [0.2, 0.5, 0.8]
TABLE = [[0.0, 1.0, 0.0, 0.0], [2.0, 0.5, 0.5, 0.0], [0.0, 0.1, 1.0, 0.0], [-1.0, 1.0, 0.0, 0.0]]
RECORD = {"format": 1, "temperatures": [0.9] * 5, "copying": {"weights": WEIGHTS, "confidence": TABLE}}
# Texts that say things twice, so that copies are found from the first round on.
REPEATING = [[7, 8, 9, 10, 11, 7, 8, 9], [20, 21, 20, 21, 22, 20], [5], [30, 31, 32, 33, 30, 31, 32, 33, 30]]


def copying_drafter(target, **fields):
    return tiny_drafter(target, **{"copy_weights": WEIGHTS, "copy_confidence": TABLE, **fields})


@pytest.mark.parametrize("budget", [*BUDGETS, "load-aware"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_greedy_text_is_the_plain_text(family, budget, monkeypatch):
    """Rows of different length, copies found and not, whatever is verified."""
    from tests.costs import made_costs

    target = talking_target(family)
    drafter = copying_drafter(target)
    chosen = make_budget(budget)
    if budget == "load-aware":
        chosen.costs = made_costs(lambda b: 0.02 + 0.001 * b, lambda r, n: 0.0001 * r * n, 5, (1, 4))
    inputs = left_padded(REPEATING)
    out = hf_dspark.generate(target, drafter, **inputs, max_new_tokens=24, do_sample=False, eos_token_id=NEVER, budget=chosen)
    assert torch.equal(out, plain(target, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("reduced", [False, True], ids=["whole", "reduced"])
def test_copies_are_accepted(reduced):
    """A drafter that knows nothing is right where the target repeats itself, with copies and not without; `copying=False` is the drafter
    without weights."""
    target = talking_target(loudness=200.0)  # its next token depends on little but the last
    inputs = left_padded(REPEATING)
    assert len(set(plain(target, inputs, max_new_tokens=96)[0, -48:].tolist())) < 12  # so it goes in circles
    ids = torch.tensor([4, 5, 6]) if reduced else None
    drafter = copying_drafter(target, draft_token_ids=ids)
    with torch.no_grad():
        drafter.markov_head.markov_w2.weight.normal_()
    options = {"max_new_tokens": 96, "do_sample": False, "eos_token_id": NEVER, "budget": "full", "return_dict_in_generate": True}
    with_copies = hf_dspark.generate(target, drafter, **inputs, **options)
    without = hf_dspark.generate(target, drafter, **inputs, **options, copying=False)
    drafter.config.copy_weights = drafter.config.copy_confidence = None
    unweighted = hf_dspark.generate(target, drafter, **inputs, **options)
    assert torch.equal(with_copies.sequences, plain(target, inputs, max_new_tokens=96))
    assert torch.equal(with_copies.sequences, without.sequences)
    assert with_copies.stats.tau > 3.0
    assert without.stats.tau < 2.0
    assert counts(without) == counts(unweighted)


def test_processors_that_forbid_repeating_end_copies():
    """With no_repeat_ngram_size no copy that it forbids is drafted, and the text is the plain one."""
    world = make_world(talking_target())
    world.drafter.config.copy_weights = WEIGHTS
    inputs = left_padded(REPEATING)
    options = {"no_repeat_ngram_size": 2, "repetition_penalty": 1.2}
    assert torch.equal(speculate(world.target, world.drafter, inputs, **options), plain(world.target, inputs, **options))


def test_a_cache_over_turns_keeps_the_whole_text_in_view():
    """The second turn copies from the first, and its text is the plain one."""
    target = talking_target()
    drafter = copying_drafter(target)
    cache = DynamicCache(config=target.config)
    first = speculate(target, drafter, left_padded([REPEATING[0]]), past_key_values=cache)
    again = {"input_ids": torch.cat([first, torch.tensor([REPEATING[3]])], dim=1)}
    again["attention_mask"] = torch.ones_like(again["input_ids"])
    second = speculate(target, drafter, again, past_key_values=cache)
    assert torch.equal(second, plain(target, again))


def test_the_stock_loop_copies_too():
    """transformers' own assisted loop gives the plain text with this drafter's copies."""
    target = talking_target()
    drafter = copying_drafter(target)
    inputs = left_padded([REPEATING[0]])
    hf_dspark.uninstall()
    try:
        with stock_loop(target, drafter, Options(budget="full")):
            out = speculate(target, drafter, inputs)
        with stock_loop(target, drafter, Options(budget="full", copying=False)):
            without = speculate(target, drafter, inputs)
    finally:
        hf_dspark.install()
    assert torch.equal(out, plain(target, inputs))
    assert torch.equal(without, plain(target, inputs))


def test_requests_that_join_and_leave_copy_from_their_own_text():
    """Served two at a time, six requests answer as each does alone."""
    target = talking_target()
    drafter = copying_drafter(target)
    prompts = [*REPEATING, REPEATING[0][:5], REPEATING[3][:6]]
    limits = [9, 24, 17, 5, 24, 12]
    served = serve(target, drafter, prompts, concurrency=2, max_new_tokens=limits, budget=make_budget("full"), end_ids=[NEVER])
    for prompt, limit, answer in zip(prompts, limits, served.tokens, strict=True):
        alone = plain(target, left_padded([prompt]), max_new_tokens=limit)
        assert answer == alone[0, len(prompt) :].tolist()


class Rounds:
    """A round callback that keeps what it is told."""

    temperatures = None
    wants_copy_features = True

    def __init__(self):
        self.finished = []

    def on_round_end(self, finished):
        self.finished.append(finished)


def test_confidences_are_told_where_copies_stand():
    """Served two at a time, of each round's first drafted token: whether its copy stands before the answer, and how often the text went on
    so, are what a search of the request's own prompt and answer finds.
    """
    target, rounds = talking_target(loudness=200.0), Rounds()
    drafter = copying_drafter(target)
    said = [plain(target, left_padded([prompt]), max_new_tokens=16)[0].tolist() for prompt in REPEATING[:3]]
    # What the target will say stands there already, once or in two ways.
    prompts = [*REPEATING, [*said[0], *said[0][:8]], [*said[1], 7, *said[1][4:9], 9, *said[1][:6]]]
    served = serve(
        target, drafter, prompts, concurrency=2, max_new_tokens=[40, 24, 33, 12, 40, 24], budget=make_budget("threshold:0.3"),
        end_ids=[NEVER], round_callback=rounds,
    )  # fmt: skip
    known = dict.fromkeys(range(len(prompts)), 1)  # committed tokens of each answer
    kinds = set()
    for finished in rounds.finished:
        for row, (request, accepted) in enumerate(zip(finished.requests, finished.accepted, strict=True)):
            text = [*prompts[request], *served.tokens[request][: known[request]]]
            known[request] += accepted + 1
            length, source = searched(text, len(WEIGHTS))
            relation, _, _, odds, _, from_prompt, agreement, *_ = finished.copy_features[row, 0].tolist()
            assert bool(relation) == bool(length)
            if length:
                before = source < len(prompts[request])
                follow = [text[end + 1] for end in range(len(text) - 1) if agreed(text, end) >= min(length, 2)]
                agreeing = follow.count(text[source])
                assert odds == pytest.approx(math.log(WEIGHTS[length - 1] / (1 - WEIGHTS[length - 1])), rel=1e-4)
                assert from_prompt == before
                assert agreement == pytest.approx(math.log((agreeing + 0.5) / (len(follow) - agreeing + 0.5)), abs=1e-5)
                kinds.add((before, len(set(follow)) > 1))
    assert {True, False} == {before for before, _ in kinds} == {differs for _, differs in kinds}


def test_the_stock_loop_knows_where_its_answer_began(monkeypatch):
    """Its copies count as of the prompt up to there, round after round."""
    target, began = talking_target(), []
    drafter = copying_drafter(target)
    draft = candidates.draft_block

    def watched(*args, **options):
        began.append(options["copies"].prompt_ends.tolist())
        return draft(*args, **options)

    monkeypatch.setattr(candidates, "draft_block", watched)
    hf_dspark.uninstall()
    try:
        with stock_loop(target, drafter, Options(budget="full")):
            speculate(target, drafter, left_padded([REPEATING[0]]))
    finally:
        hf_dspark.install()
    assert len(began) > 1
    assert began == [[len(REPEATING[0])]] * len(began)


def test_copying_goes_with_the_calibration(tmp_path):
    """Weights, table and temperatures are set, saved, loaded, and dropped together; a record without copying turns it off."""
    target = tiny_target()
    drafter = tiny_drafter(target).set_calibration(RECORD)
    assert drafter.config.copy_weights == WEIGHTS
    drafter.save_pretrained(tmp_path / "one")
    loaded = DSparkDrafter.from_pretrained(tmp_path / "one")
    assert (loaded.config.copy_weights, loaded.config.copy_confidence) == (WEIGHTS, TABLE)
    assert loaded.calibration["copying"]["weights"] == WEIGHTS
    loaded.config.copy_weights = [0.1]
    loaded.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="different things about temperatures or copying"):
        DSparkDrafter.from_pretrained(tmp_path / "other")
    drafter.set_calibration({"format": 1, "temperatures": [1.0] * 5})
    assert drafter.config.copy_weights is None
    drafter.set_calibration(RECORD).drop_calibration()
    assert drafter.config.copy_weights is None
    assert drafter.config.copy_confidence is None


def test_other_formats_go_without_copies_and_say_so(tmp_path, caplog):
    """DeepSpec's format has no word for copies: neither they nor temperatures that hold with them only go over."""
    target = tiny_target("qwen3")
    tiny_drafter(target).set_calibration(RECORD).save_pretrained(tmp_path / "own")
    with caplog.at_level(logging.WARNING):
        convert(DSparkDrafter.from_pretrained(tmp_path / "own"), tmp_path / "deepspec", "deepspec", target=target)
    assert "calibrate --copying 0" in caplog.text
    converted = DSparkDrafter.from_pretrained(tmp_path / "deepspec")
    assert converted.config.copy_weights is None
    assert converted.config.confidence_temperatures is None
    assert not (tmp_path / "deepspec" / "calibration.json").exists()


def test_a_folder_of_another_format_keeps_copies_in_its_calibration_alone(tmp_path):
    """Other servers read its config, where temperatures that hold with copies only must not stand; loaded here, it copies."""
    import json

    from hf_dspark.calibration.records import note_calibration, write_calibration
    from hf_dspark.checkpoints.inspect import describe

    target = tiny_target("qwen3")
    tiny_drafter(target).save_pretrained(tmp_path / "own")
    folder = convert(DSparkDrafter.from_pretrained(tmp_path / "own"), tmp_path / "deepspec", "deepspec", target=target)
    config = json.loads((folder / "config.json").read_text())
    before = dict(config)
    note_calibration(config, RECORD, foreign=True)
    assert config == before
    write_calibration(folder, RECORD)
    assert DSparkDrafter.from_pretrained(folder).config.copy_weights == WEIGHTS
    assert describe(str(folder))["copies"] == 3
    note_calibration(config, RECORD, foreign=False)
    assert (config["copy_weights"], config["copy_confidence"], config["confidence_temperatures"]) == (WEIGHTS, TABLE, [0.9] * 5)


def test_what_the_caller_says_of_copies_wins(tmp_path):
    """Fields of the config given to `from_pretrained` override the stored ones, calibration.json or not; nonsense is refused."""
    target = tiny_target()
    tiny_drafter(target).set_calibration(RECORD).save_pretrained(tmp_path)
    assert DSparkDrafter.from_pretrained(tmp_path, copy_weights=None, copy_confidence=None).config.copy_weights is None
    assert DSparkDrafter.from_pretrained(tmp_path, copy_weights=[0.5], copy_confidence=TABLE).config.copy_weights == [0.5]
    wrong = DSparkDrafter.from_pretrained(tmp_path)
    wrong.config.copy_weights = [1.5]
    with pytest.raises(ValueError, match="below 1"):
        hf_dspark.generate(target, wrong, **left_padded(REPEATING), max_new_tokens=4, budget="full")


def test_online_calibration_keeps_the_copies_that_its_temperatures_hold_with():
    """Its record sets a drafter up to go on copying; it refuses to watch the same drafter without copies, where T_k do not hold."""
    target = talking_target()
    drafter = tiny_drafter(target).set_calibration(RECORD)
    inputs = left_padded(REPEATING)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": NEVER, "budget": "full"}
    online, without = hf_dspark.OnlineCalibration(), hf_dspark.OnlineCalibration()
    hf_dspark.generate(target, drafter, **inputs, **options, online_calibration=online)
    assert online.temperatures == [0.9] * 5
    again = tiny_drafter(target).set_calibration(online.record())
    assert (again.config.copy_weights, again.config.copy_confidence) == (WEIGHTS, TABLE)
    with pytest.raises(ValueError, match="other n-gram copying"):
        hf_dspark.generate(target, drafter, **inputs, **options, online_calibration=online, copying=False)
    hf_dspark.generate(target, drafter, **inputs, **options, online_calibration=without, copying=False)
    assert without.temperatures == [1.0] * 5
    assert "copying" not in without.record()


def test_online_calibration_watches_one_way_of_judging():
    """Of tokens judged over the block others survive than one by one, so one object is refused both; greedy calls may share it."""
    target = talking_target()
    drafter, online = tiny_drafter(target), hf_dspark.OnlineCalibration()

    def call(verification, do_sample):
        hf_dspark.generate(
            target, drafter, **left_padded(REPEATING), max_new_tokens=4, eos_token_id=NEVER, budget="full", online_calibration=online,
            verification=verification, do_sample=do_sample,
        )  # fmt: skip

    call("token", False)
    call("block", True)
    call("token", False)
    call("block", True)
    with pytest.raises(ValueError, match="verification='block'"):
        call("token", True)


def test_only_processors_that_go_by_token_forbid_copies():
    """A penalised, suppressed or repeated n-gram's token is ruled out or not by what that processor says of it; top-k is not asked."""
    from transformers.generation import logits_process as lp

    from hf_dspark.decoding.row_processors import RowProcessors
    from hf_dspark.decoding.state import State

    state = State(torch.device("cpu"))
    state.add_rows([0, 1], list(torch.tensor([[5, 6, 7, 5, 6], [8, 9, 8, 9, 10]])))
    rules = [lp.RepetitionPenaltyLogitsProcessor(1.5), lp.NoRepeatNGramLogitsProcessor(3), lp.SuppressTokensLogitsProcessor([11])]
    processors = RowProcessors([*rules, lp.TemperatureLogitsWarper(0.7), lp.TopKLogitsWarper(1)], 2)
    prefixes, values = processors.prefixes(state, [0, 1], [0, 0]), processors.values([0, 1], state.device)

    def allowed(*tokens):
        return processors.allowed(torch.tensor(tokens), 16, prefixes, values).tolist()

    assert allowed(7, 7) == [False, True]
    assert allowed(6, 11) == [True, False]
    assert allowed(8, 9) == [True, True]


def test_measuring_costs_leaves_torchs_random_state_alone():
    """The same seed gives the same text whether or not the profile had to be measured first."""
    from hf_dspark.decoding.profiler import CostProfile

    target = tiny_target()
    for fields in ({}, {"copy_weights": WEIGHTS}):
        drafter = tiny_drafter(target, **fields)
        torch.manual_seed(5)
        before = torch.get_rng_state()
        CostProfile.measure(target, drafter, rows=1)
        assert torch.equal(torch.get_rng_state(), before)
