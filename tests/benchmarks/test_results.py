"""The shipped result files against the bounds that this project set itself. Reads JSON, runs no model and takes no time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).parents[2] / "model_cards" / "smollm2-dspark" / "results"
BLOCK_SIZE = 7


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def number(record: dict[str, Any], key: str) -> float:
    """A finite number, by its key."""
    value = record[key]
    assert isinstance(value, float | int)
    assert not isinstance(value, bool)
    assert math.isfinite(value), f"{key} is {value}"
    return value


@pytest.mark.parametrize(
    "name",
    [
        "passes",
        "demo",
        "eval_gsm8k",
        "eval_t0",
        "eval_t1",
        "divergence",
        "bench",
        "bench_fp32",
        "decoded",
        "matched",
        "matched_all",
        "replay",
    ],
)
def test_every_result_says_where_it_was_taken(name: str) -> None:
    """Processor, threads and the versions of torch and transformers."""
    machine = result(name)["machine"]
    assert machine["cpu"]
    assert machine["torch_threads"] >= 1
    assert machine["versions"].keys() >= {"python", "hf_dspark", "torch", "transformers"}


# --------------------------------------------------------------------------------------------------------------- passes


def verify_pass(rows: int) -> dict[str, Any]:
    (found,) = [one for one in result("passes")["verify_pass"] if one["rows"] == rows]
    return found


def test_little_of_a_round_is_spent_outside_the_forward_passes() -> None:
    """One row, bf16: below 8% of a round, by the loop's own clock."""
    record = result("passes")
    assert record["dtype"] == "bfloat16"
    assert 0 < number(record, "overhead_share_b1") < 0.08
    assert record["overhead_share_b1"] == next(one["overhead_share"] for one in record["round"] if one["rows"] == 1)


def test_a_ragged_pass_costs_about_as_much_as_an_equal_one() -> None:
    """16 rows of random lengths: within 10% of a plain pass over as many tokens without padding."""
    assert number(verify_pass(16), "ragged_over_equal") <= 1.10


def test_a_ragged_pass_costs_less_than_a_padded_one() -> None:
    """16 rows: at most three quarters of the padded pass."""
    assert number(verify_pass(16), "ragged_over_padded") <= 0.75


@pytest.mark.parametrize("rows", [16, 32])
def test_ratios_of_passes_are_those_of_their_medians(rows: int) -> None:
    """The ratios follow from the times beside them, over fewer tokens than the padded batch has."""
    record = verify_pass(rows)
    medians = {case: times["median_ms"] for case, times in record["times"].items()}
    assert record["ragged_over_equal"] == pytest.approx(medians["ragged"] / medians["equal"])
    assert record["ragged_over_padded"] == pytest.approx(medians["ragged"] / medians["padded"])
    assert rows <= record["tokens"] < record["padded_tokens"] == rows * (1 + BLOCK_SIZE)


def test_a_round_of_eight_rows_costs_less_than_two_and_a_half_of_one() -> None:
    """Eight rows share their passes."""
    record = result("passes")
    assert 0 < number(record, "round_b8_over_b1") < 2.5
    median = {one["rows"]: one["median_ms"] for one in record["round"]}
    assert record["round_b8_over_b1"] == pytest.approx(median[8] / median[1])


# ----------------------------------------------------------------------------------------------------- demo, evaluation


def check_speeds(record: dict[str, Any]) -> None:
    """The speed-up is the ratio of the speeds beside it, and more than one token comes of a round."""
    plain, dspark = (number(record, f"{method}_tokens_per_s") for method in ("plain", "dspark"))
    assert number(record, "speedup") == pytest.approx(dspark / plain)
    assert 1 < number(record, "tau") <= 1 + BLOCK_SIZE


def test_the_demo_is_faster_and_gives_the_same_text() -> None:
    """Speed-up above 1 in bf16, all fp32 texts identical."""
    record = result("demo")
    check_speeds(record)
    assert record["speedup"] > 1
    assert record["identical"] is True
    assert record["fp32_partings"] == []


def check_evaluation(record: dict[str, Any]) -> None:
    """The keys of `hf-dspark eval`, each agreeing with the counts behind it."""
    check_speeds(record)
    number(record, "prompt_lookup_tokens_per_s")
    counts = record["acceptance_counts"]
    assert record["tau"] == pytest.approx(1 + sum(counts["accepted"]) / counts["rounds"])
    conditional = record["conditional_acceptance"]
    assert isinstance(conditional, list)
    assert len(conditional) == BLOCK_SIZE
    for value, accepted, reached in zip(conditional, counts["accepted"], counts["reached"], strict=True):
        assert value == (pytest.approx(accepted / reached) if reached else None)
    assert 0 < conditional[0] < 1


def test_gsm8k() -> None:
    """24 prompts, 128 new tokens, greedy, one row at a time: faster than the plain target."""
    record = result("eval_gsm8k")
    check_evaluation(record)
    assert record["speedup"] > 1
    assert record["rows"] == 24
    settings = record["settings"]
    assert (settings["max_new_tokens"], settings["temperature"], settings["batch_size"]) == (128, 0, 1)


@pytest.mark.parametrize(("name", "temperature"), [("eval_t0", 0), ("eval_t1", 1)])
def test_four_domains(name: str, temperature: float) -> None:
    """Four prompt files, as many prompts of each, at the temperature that the file's name says."""
    record = result(name)
    check_evaluation(record)
    assert record["settings"]["temperature"] == temperature
    rows = [part["rows"] for part in record["files"].values()]
    assert len(rows) == 4
    assert len(set(rows)) == 1
    assert record["rows"] == sum(rows)


def test_decoded_tau_is_what_was_asked_for() -> None:
    """Greedy, 16 prompts a set: at least 2.8 on GSM8K and MBPP, 2.2 on HumanEval, 1.9 on MT-Bench; and copies add to every set."""
    record = result("decoded")
    asked = {"gsm8k": 2.8, "mbpp": 2.8, "humaneval": 2.2, "mt-bench": 1.9}
    found, alone = (record[kind]["T=0"]["by_source"] for kind in ("decoded", "without_copying"))
    assert all(found[name] >= least for name, least in asked.items())
    assert all(found[name] > alone[name] for name in asked)


def test_decoded_tau_at_temperature_1_is_what_was_asked_for() -> None:
    """The mean of the four sets is at least 2.0, judged over the block, which keeps more on every set than token by token."""
    record = result("decoded")
    over_the_block, token_by_token = (record[kind]["T=1"]["by_source"] for kind in ("decoded", "token_by_token"))
    assert sum(over_the_block.values()) / len(over_the_block) >= 2.0
    assert all(tau > token_by_token[name] for name, tau in over_the_block.items())


# ----------------------------------------------------------------------------------------------------------- divergence


def test_matched_drafters_are_of_every_head_and_depth() -> None:
    """The three sequential heads and none, and one to three layers, from the same run; every one with a sequential head beats DFlash on
    every set at either temperature.
    """
    drafters = result("matched_all")["drafters"]
    plain = drafters.pop("dflash, 2 layers")["decoded"]
    assert drafters.keys() == {
        "dspark, 2 layers", "dspark gated, 2 layers", "dspark rnn, 2 layers", "dspark, 1 layer", "dspark, 3 layers",
    }  # fmt: skip
    for found in drafters.values():
        for temperature in ("T=0", "T=1"):
            for name, tau in plain[temperature]["by_set"].items():
                assert found["decoded"][temperature]["by_set"][name] > tau


def test_every_bf16_divergence_is_explained() -> None:
    """Nowhere do the two logits lie further apart than passes of other shapes move them."""
    record = result("divergence")
    assert record["dtype"] == "bfloat16"
    assert [one for one in record["divergences"] if not one["explained"] or one["gap"] > one["noise"]] == []
    assert record["all_explained"] is True
    for counts in record["methods"].values():
        assert counts["explained"] == counts["diverged"]


def test_plain_batches_are_counted_beside_speculation() -> None:
    """The plain target in a batch, and transformers' prompt lookup, are judged on the same prompts by the same rule."""
    record = result("divergence")
    prompts = sum(record["prompts"].values())
    assert record["methods"].keys() == {"plain_batched", "prompt_lookup", "dspark", "dspark_batched"}
    for method, counts in record["methods"].items():
        assert counts["rows"] == prompts
        assert counts["identical"] + counts["diverged"] == prompts
        assert counts["diverged"] == sum(one["method"] == method for one in record["divergences"])


def test_every_fp32_text_is_identical() -> None:
    """In fp32 no method parts from plain `generate` anywhere."""
    record = result("divergence")
    assert record["fp32"]["dtype"] == "float32"
    assert record["fp32"]["divergences"] == []
    assert record["fp32_identical"] is True
    assert all(counts["identical"] == counts["rows"] for counts in record["fp32"]["methods"].values())


# ------------------------------------------------------------------------------------------------------- budgets and calibration


def calibration() -> dict[str, Any]:
    return json.loads((RESULTS.parent / "calibration.json").read_text(encoding="utf-8"))


def test_confidences_tell_survivors_from_casualties() -> None:
    """AUC of at least 0.80 on the held-out prompts and on every other domain."""
    record = calibration()
    for part in [*record["files"].values(), *record["others"].values()]:
        assert number(part["after"], "auc") >= 0.80


def test_calibrated_confidences_can_be_trusted() -> None:
    """At most 1.5% of calibration error, less than before, on held-out prompts of its own kinds, and 3% on chat and both kinds of code."""
    record = calibration()
    assert set(record["others"]) == {"mt-bench", "mbpp", "humaneval"}
    assert all(number(part["after"], "ece") <= 0.03 for part in record["others"].values())
    assert number(record["after"], "ece") <= 0.015
    assert number(record["after"], "ece") < number(record["before"], "ece")


def test_the_shipped_drafter_holds_its_calibration() -> None:
    """The temperatures of the config are those of the record, one a block position."""
    config = json.loads((RESULTS.parent / "config.json").read_text(encoding="utf-8"))
    assert config["confidence_temperatures"] == calibration()["temperatures"]
    assert len(calibration()["temperatures"]) == BLOCK_SIZE


def test_the_load_aware_budget_beats_verifying_everything_in_a_crowd() -> None:
    """At 16 and 32 requests in flight by a factor of 1.2 and more; and it verifies less of a block the more there are."""
    record = result("bench")
    ratios = {row["concurrency"]: row for row in record["summary"]}
    assert all(number(ratios[n], "load_aware_over_full") >= 1.2 for n in (16, 32))
    verified = [c["verified_tokens_per_request"] for c in record["cells"] if c["budget"] == "load-aware"]
    assert verified[0] > verified[3] > verified[5]


def test_in_float32_too_the_load_aware_budget_beats_verifying_everything_in_a_crowd() -> None:
    """The same on a CPU without bf16, with copies; there less of the block of a row alone is verified than of one of two."""
    record = result("bench_fp32")
    assert record["settings"]["target_dtype"] == "float32"
    ratios = {row["concurrency"]: row for row in record["summary"]}
    assert all(number(ratios[n], "load_aware_over_full") >= 1.2 for n in (16, 32))
    verified = [c["verified_tokens_per_request"] for c in record["cells"] if c["budget"] == "load-aware"]
    assert verified[1] > verified[3] > verified[5]


def test_load_aware_is_at_least_as_fast_as_the_best_fixed_choice() -> None:
    """0.98 of the best of plain, full and static ones in the same run and more, at every load; the ratio is that of the cells' own tokens
    and seconds.
    """
    record = result("bench_fp32")
    assert [row["concurrency"] for row in record["summary"]] == [1, 2, 4, 8, 16, 32]
    for row in record["summary"]:
        assert number(row, "load_aware_over_best_fixed") >= 0.98
        rates = {c["budget"]: c["tokens"] / c["seconds"] for c in record["cells"] if c["concurrency"] == row["concurrency"]}
        fixed = [rates[name] for name in ("plain", "full", "static:1", "static:2", "static:4")]
        assert max(rates["load-aware"], rates["load-aware-lag2"]) >= 0.98 * max(fixed)


def test_replayed_without_noise_no_fixed_choice_beats_load_aware() -> None:
    """On the same blocks, with the profile for a clock, at least 0.98 of the best of plain, full and static at every load."""
    record = result("replay")
    assert [one["concurrency"] for one in record["summary"]] == [1, 2, 4, 8, 16, 32]
    for one in record["summary"]:
        cells = {c["budget"]: c["tokens"] / c["seconds"] for c in record["cells"] if c["concurrency"] == one["concurrency"]}
        best = max(rate for name, rate in cells.items() if name in ("plain", "full") or name.startswith("static"))
        assert max(cells["load-aware"], cells["load-aware-lag2"]) >= 0.98 * best


def test_replayed_with_a_profile_that_is_wrong_costs_are_followed() -> None:
    """Where the profile takes tokens for 0.3 or 2.5 times their cost, load-aware that follows costs gives 0.98 of the best fixed choice at
    every load all the same; not following loses more than that somewhere.
    """
    rows = {(row["tokens_taken_for"], row["budget"], row["follows_costs"]): row["over_best_fixed"] for row in result("replay")["misjudged"]}
    for factor in (0.3, 2.5):
        assert min(rows[factor, "load-aware", True]) >= 0.98 > min(rows[factor, "load-aware", False])
