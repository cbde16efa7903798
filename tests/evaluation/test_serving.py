"""Requests that come and go: every one gets its own text, the number in flight holds, and the clock counts what it should."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch

from hf_dspark.budgets.load_aware import LaggedLoadAwareBudget, LoadAwareBudget
from hf_dspark.budgets.named import make_budget
from hf_dspark.calibration.temperature_scaling import FEWEST_ROUNDS
from hf_dspark.configuration_dspark import COPY_FEATURES
from hf_dspark.decoding import loop as decoding
from hf_dspark.errors import CheckpointError, DataError
from hf_dspark.evaluation import load_benchmark
from hf_dspark.evaluation.calibrate import calibrate, held_out, record_rounds
from hf_dspark.evaluation.load_benchmark import Contender, bench, summary
from hf_dspark.evaluation.serving import Server, serve
from hf_dspark.evaluation.speed import Sampling
from hf_dspark.models.modeling_dspark import DSparkDrafter
from tests.costs import full_machine, middling
from tests.helpers import NEVER, bigram_drafter, plain, random_prompts, talking_target
from tests.tiny import tiny_drafter, tiny_target

LENGTHS = (9, 4, 13, 1, 7, 5, 11, 2, 6, 3)
LIMITS = [20, 5, 12, 1, 30, 8, 17, 24, 2, 11]


@functools.cache
def pair():
    target = tiny_target("llama")
    return target, bigram_drafter(target, random_prompts(LENGTHS))


@functools.cache
def alone(request: int) -> list[int]:
    """Plain generation of one request by itself."""
    prompt = random_prompts(LENGTHS)[request]
    out = plain(pair()[0], {"input_ids": torch.tensor([prompt])}, max_new_tokens=LIMITS[request])
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("budget", ["full", "static:2", "threshold:0.5", "load-aware", "load-aware-lag2", "plain"])
@pytest.mark.parametrize("concurrency", [1, 3, 16])
def test_every_request_gets_its_own_text(budget, concurrency):
    """However many are in flight, each request's greedy tokens are those of plain generation of it alone."""
    target, drafter = pair()
    made = make_budget("static:0" if budget == "plain" else budget).start(middling(drafter.config.block_size), learn_costs=False)
    served = serve(
        target, None if budget == "plain" else drafter, random_prompts(LENGTHS), concurrency=concurrency, max_new_tokens=LIMITS,
        budget=made, end_ids=[NEVER],
    )  # fmt: skip
    assert served.tokens == [alone(r) for r in range(len(LENGTHS))]
    assert served.emitted == sum(LIMITS)
    assert all(span is not None and span[0] <= span[1] for span in served.spans)


def test_the_number_in_flight_holds():
    """In a steady run as many rows are live in every round as were asked for, and the clock covers these rounds only."""
    target, drafter = pair()
    seen = []

    class Watch:
        temperatures, wants_copy_features = None, False

        def on_round_end(self, finished):
            seen.append(len(finished.requests))

    prompts = random_prompts(LENGTHS * 3)
    served = serve(
        target, drafter, prompts, concurrency=4, max_new_tokens=LIMITS * 3, budget=make_budget("full"), end_ids=[NEVER],
        round_callback=Watch(), steady=True,
    )  # fmt: skip
    assert set(seen) == {4}
    assert served.row_rounds == 4 * len(seen) == sum(row.rounds for row in served.stats.rows)
    assert served.seconds > 0
    assert served.emitted < sum(LIMITS * 3)


def test_a_request_that_ends_by_itself_frees_its_place():
    """An end-of-text token ends a request and is kept."""
    target, drafter = pair()
    ends = alone(4)[6]
    served = serve(target, drafter, random_prompts(LENGTHS), concurrency=2, max_new_tokens=30, budget=make_budget("full"), end_ids=[ends])
    assert served.tokens[4] == alone(4)[: alone(4).index(ends) + 1]


# ------------------------------------------------------------------------------------------------------------------ calibrating


def many_prompts(n: int, seed: int = 3) -> list[list[int]]:
    return random_prompts((5,) * n, seed)


def test_rounds_are_recorded_as_they_happened():
    """What the recorder says was accepted adds up to what the loop's statistics say, and every block position was judged."""
    target, drafter = pair()
    found = record_rounds(
        target, drafter, many_prompts(12), end_ids=[NEVER], max_new_tokens=20, temperature=0.0, top_p=1.0, concurrency=5, seed=0
    )
    rounds, requests = found.rounds, found.requests
    assert rounds.logits.shape[1] == drafter.config.block_size
    assert len(rounds) == len(requests)
    served = serve(target, drafter, many_prompts(12), concurrency=5, max_new_tokens=20, budget=make_budget("full"), end_ids=[NEVER])
    assert int(rounds.accepted.sum()) == sum(sum(row.accepted_at) for row in served.stats.rows)
    assert np.bincount(requests, minlength=12).tolist() == [row.verified_at[0] for row in served.stats.rows]


def test_prompts_are_held_out_by_their_hash():
    """About the share that was asked for, the same ones every time."""
    prompts = many_prompts(400)
    chosen = [held_out(p, 0.5) for p in prompts]
    assert chosen == [held_out(p, 0.5) for p in prompts]
    assert 150 < sum(chosen) < 250


@functools.cache
def calibrated() -> dict:
    target, drafter = pair()
    return calibrate(
        target, drafter, {"here": many_prompts(150)}, others={"there": many_prompts(60, 9)}, end_ids=[NEVER], max_new_tokens=24,
        concurrency=32,
    )  # fmt: skip


def test_calibration_helps_on_prompts_that_it_has_not_seen():
    """The confidences of an untrained head are wrong; temperatures make them less so on the held-out half, which was not fitted on."""
    record = calibrated()
    assert record["files"]["here"]["after"]["ece"] < record["files"]["here"]["before"]["ece"]
    (data,) = record["data"]
    assert data["rounds_fitted"] >= FEWEST_ROUNDS
    assert data["rounds_judged"] == record["files"]["here"]["after"]["rounds"]
    assert set(record["others"]) == {"there"}


def test_a_calibrated_drafter_keeps_its_calibration(tmp_path):
    """Saved with the drafter, read with it, applied to its confidences, and its own budget is the load-aware one."""
    drafter = pair()[1]
    again = copy.deepcopy(drafter)
    again.set_calibration(calibrated())
    again.save_pretrained(tmp_path)
    loaded = DSparkDrafter.from_pretrained(tmp_path)
    assert loaded.calibration == calibrated()
    assert loaded.config.confidence_temperatures == calibrated()["temperatures"]
    assert loaded.budget == "load-aware"
    assert drafter.budget == "full"
    shorter = DSparkDrafter.from_pretrained(tmp_path, block_size=3)
    assert shorter.config.confidence_temperatures == calibrated()["temperatures"][:3]


def test_a_calibration_file_and_a_config_must_agree(tmp_path):
    """A confidence is calibrated once: two different sets of temperatures are refused."""
    import json

    drafter = copy.deepcopy(pair()[1])
    drafter.set_calibration(calibrated())
    drafter.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["confidence_temperatures"][0] += 1.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"calibration\.json .* and config\.json .* say different things"):
        DSparkDrafter.from_pretrained(tmp_path)
    config["confidence_temperatures"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert DSparkDrafter.from_pretrained(tmp_path).config.confidence_temperatures == calibrated()["temperatures"]


@functools.cache
def calibrated_with_copies():
    target = talking_target(loudness=60.0)
    drafter = tiny_drafter(target)
    record = calibrate(
        target, drafter, {"here": many_prompts(150)}, end_ids=[NEVER], max_new_tokens=40, concurrency=32, copying=4,
    )  # fmt: skip
    return record, drafter


@pytest.mark.slow
def test_copying_is_fitted_with_the_calibration():
    """On a target that repeats itself an untrained drafter learns to copy, the longer the match the surer; confidences know of it."""
    record, drafter = calibrated_with_copies()
    weights = record["copying"]["weights"]
    assert len(weights) == 4
    assert all(0.0 < w < 1.0 for w in weights)
    assert weights[3] > weights[0]
    part = record["files"]["here"]
    assert part["after"]["ece"] < part["before"]["ece"]
    assert part["after"]["auc"] > part["before"]["auc"] + 0.1
    again = copy.deepcopy(drafter).set_calibration(record)
    assert again.config.copy_weights == weights == drafter.config.copy_weights
    assert again.config.copy_confidence == record["copying"]["confidence"]
    assert [len(row) for row in again.config.copy_confidence] == [len(COPY_FEATURES)] * 4


def test_copying_can_be_fitted_away():
    """`copying=0` calibrates a drafter that copies for doing without; the record says nothing of copies then."""
    target = talking_target(loudness=60.0)
    drafter = tiny_drafter(target, copy_weights=[0.5])
    record = calibrate(target, drafter, {"here": many_prompts(150)}, end_ids=[NEVER], max_new_tokens=24, concurrency=32, copying=0)
    assert "copying" not in record
    assert drafter.config.copy_weights is None
    with pytest.raises(ValueError, match="0 \\(none\\) to 64"):
        calibrate(target, drafter, {"here": many_prompts(4)}, end_ids=[NEVER], copying=65)


def test_too_few_rounds_to_calibrate_are_refused():
    """With the counts."""
    target, drafter = pair()
    with pytest.raises(DataError, match=r"at least 400 rounds.*rounds_fitted"):
        calibrate(target, drafter, {"few": many_prompts(4)}, end_ids=[NEVER], max_new_tokens=6)


def test_a_drafter_without_confidences_cannot_be_calibrated():
    """Said before anything is decoded."""
    target, _ = pair()
    with pytest.raises(DataError, match="no confidence head"):
        calibrate(target, tiny_drafter(target, enable_confidence_head=False), {"x": many_prompts(2)}, end_ids=[NEVER])


# -------------------------------------------------------------------------------------------------------------------- bench


@pytest.mark.slow
def test_the_benchmark_has_a_cell_for_everything():
    """Each concurrency and contender has its figures; lookup, which takes one row, only at one; ratios are of these figures."""
    target, drafter = pair()
    names = ["plain", "full", "static:1", "threshold:0.5", "load-aware", "load-aware-lag2", "load-aware@raw", "generate", "prompt-lookup"]
    record = bench(
        target, drafter, many_prompts(20), end_ids=[NEVER], pad_id=0, concurrencies=[1, 3], budgets=names, max_new_tokens=16, seconds=0.1,
        repeats=2, costs=full_machine(drafter.config.block_size),
    )  # fmt: skip
    cells = {(c["concurrency"], c["budget"]): c for c in record["cells"]}
    assert set(cells) == {(n, name) for n in (1, 3) for name in names} - {(3, "prompt-lookup")}
    assert all(c["tokens_per_s"] > 0 for c in record["cells"])
    assert all(len(c["turn_seconds"]) == (1 if c["budget"] in ("generate", "prompt-lookup") else 2) for c in record["cells"])
    assert cells[3, "plain"]["tau"] == 1.0
    assert cells[3, "full"]["verified_tokens_per_request"] > cells[3, "load-aware"]["verified_tokens_per_request"]
    best = max(("plain", "full", "static:1"), key=lambda name: cells[1, name]["tokens_per_s"])
    aware = max(("load-aware", "load-aware-lag2"), key=lambda name: cells[1, name]["tokens_per_s"])
    ratio = cells[1, aware]["tokens_per_s"] / cells[1, best]["tokens_per_s"]
    assert summary(record["cells"])[0]["load_aware_over_best_fixed"] == pytest.approx(ratio)


def test_the_benchmark_judges_drawn_tokens_as_it_is_told():
    """Its servers hand the rule to the loop, the record names it, and a rule that is none is refused before anything runs."""
    target, drafter = pair()
    rules = []

    def one(verification: str) -> dict:
        return bench(
            target, drafter, many_prompts(4), end_ids=[NEVER], pad_id=0, concurrencies=[1], budgets=["full"], max_new_tokens=8, seconds=0.1,
            repeats=1, sampling=Sampling(temperature=1.0), verification=verification,
        )  # fmt: skip

    original = decoding.accept_sampled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "accept_sampled", lambda *args, **kwargs: rules.append(kwargs["blockwise"]) or original(*args, **kwargs))
        assert one("token")["settings"]["verification"] == "token"
        assert rules
        assert not any(rules)
        rules.clear()
        assert one("block")["settings"]["verification"] == "block"
        assert rules
        assert all(rules)
    with pytest.raises(ValueError, match="'block'"):
        bench(None, None, [], end_ids=[], pad_id=0, concurrencies=[], budgets=[], verification="blocks")


def test_a_server_that_pauses_gives_the_texts_of_one_that_does_not():
    """Run in slices of no time, a round each, every request's greedy tokens are those of plain generation of it alone."""
    target, drafter = pair()
    made = make_budget("load-aware").start(middling(drafter.config.block_size), learn_costs=False)
    server = Server(target, drafter, random_prompts(LENGTHS), concurrency=3, max_new_tokens=LIMITS, budget=made, end_ids=[NEVER])
    slices = [server.run(seconds=0.0)]
    while server.loop.state.num_rows:
        slices.append(server.run(seconds=0.0))
    assert len(slices) > max(LIMITS) / (drafter.config.block_size + 1)
    assert slices[-1].tokens == [alone(r) for r in range(len(LENGTHS))]
    assert sum(one.emitted for one in slices) == sum(LIMITS)
    assert len(server.speeds(fewest=1)) == len(LENGTHS)


@pytest.mark.parametrize("kind", [LoadAwareBudget, LaggedLoadAwareBudget])
def test_learning_costs_leaves_the_texts_as_they_are(kind):
    """With made-up costs that this machine's rounds correct as they go, every request's greedy tokens are those of plain generation."""
    target, drafter = pair()
    budget = kind().start(middling(drafter.config.block_size), learn_costs=True)
    served = serve(target, drafter, random_prompts(LENGTHS), concurrency=3, max_new_tokens=LIMITS, budget=budget, end_ids=[NEVER])
    assert served.tokens == [alone(r) for r in range(len(LENGTHS))]


def test_a_server_that_stops_by_tokens_stops_within_a_round_of_them():
    """Counted from its beginning, over all its runs; the texts are those of one run."""
    target, drafter = pair()
    most = 3 * (drafter.config.block_size + 1)  # a round of three rows
    server = Server(
        target, drafter, random_prompts(LENGTHS), concurrency=3, max_new_tokens=LIMITS, budget=make_budget("full"), end_ids=[NEVER]
    )
    for goal in (20, 45, 90):
        served = server.run(tokens=goal)
        assert goal <= server.emitted < goal + most + 3
        assert server.emitted == sum(map(len, served.tokens))
    assert server.run().tokens == [alone(r) for r in range(len(LENGTHS))]
    assert server.emitted == sum(LIMITS)


@pytest.mark.slow
def test_contenders_write_as_many_tokens_in_every_turn():
    """So that ratios of a turn are over the same texts: all cells of a concurrency hold the same tokens, but for a round's."""
    target, drafter = pair()
    record = bench(
        target, drafter, many_prompts(20), end_ids=[NEVER], pad_id=0, concurrencies=[2, 4], budgets=["plain", "full", "load-aware"],
        max_new_tokens=16, seconds=0.4, repeats=3, costs=full_machine(drafter.config.block_size),
    )  # fmt: skip
    for n in (2, 4):
        tokens = [cell["tokens"] for cell in record["cells"] if cell["concurrency"] == n]
        assert max(tokens) - min(tokens) <= 2 * n * (drafter.config.block_size + 2)
        assert min(tokens) > 3 * (max(tokens) - min(tokens))


@pytest.mark.slow
def test_contenders_go_on_side_by_side(monkeypatch):
    """In a turn of many slices none is ever further ahead of another than a slice and what a round gives beyond it: a machine that is slow
    for a while is slow for all.
    """
    target, drafter = pair()
    given, slices, ahead = {}, [], []
    go_on = load_benchmark.Running.advance

    def watched(run, tokens, cell):
        served = go_on(run, tokens, cell)
        if run in given:
            given[run] += sum(one.emitted for one in served)
            slices.append(tokens)
            ahead.append(max(given.values()) - min(given.values()))
        else:
            given[run] = 0  # The first call brings contenders to the same place.
        return served

    monkeypatch.setattr(load_benchmark.Running, "advance", watched)
    record = bench(
        target, drafter, many_prompts(20), end_ids=[NEVER], pad_id=0, concurrencies=[2], budgets=["plain", "full", "static:1"],
        max_new_tokens=48, seconds=0.4, repeats=3, slice_seconds=0.02, costs=full_machine(drafter.config.block_size),
    )  # fmt: skip
    assert record["settings"]["slice_seconds"] == 0.02
    assert 4 * max(slices) < record["cells"][0]["tokens"] / 3
    assert max(ahead) <= max(slices) + 2 * 2 * (drafter.config.block_size + 1)


def test_the_spread_of_a_ratio_is_that_of_turns_drawn_anew():
    """Two contenders on a machine that gets twice as fast and slow again keep the ratio that they have in every turn, so it has no spread;
    with times that are their own it has that of the mean, 1.64 standard errors each way.
    """
    random = np.random.default_rng(0)

    def compared(times: list[np.ndarray]) -> dict:
        cells = [
            {"concurrency": 1, "budget": name, "tokens_per_s": 100 * len(of) / of.sum(), "turn_tokens": [100] * len(of), "turn_seconds": of}
            for name, of in zip(("plain", "load-aware"), times, strict=True)
        ]
        return summary(cells)[0]

    speed = random.uniform(1.0, 2.0, 200)
    row = compared([1.1 * speed, speed])
    assert row["load_aware_over_best_fixed"] == pytest.approx(1.1)
    assert row["load_aware_over_best_fixed_interval"] == pytest.approx([1.1, 1.1])
    row = compared([np.full(200, 1.1), 1 + random.normal(0, 0.1, 200)])
    low, high = row["load_aware_over_best_fixed_interval"]
    assert low < row["load_aware_over_best_fixed"] < high
    assert (high - low) / 2 == pytest.approx(1.1 * 1.645 * 0.1 / np.sqrt(200), rel=0.2)


@pytest.mark.parametrize("wrong", ["fast", "full@raw", "load-aware@x", "static:x"])
def test_unknown_contenders_are_refused(wrong):
    """Before anything runs."""
    with pytest.raises(ValueError, match=r"Unknown|reads no|cannot be used"):
        Contender(wrong)
