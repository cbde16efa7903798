"""The embedded target with its drafter: the same text as plain `generate`, and in bf16 only differences that rounding
explains."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from examples.benchmarks.divergence import METHODS, Comparison, compare, shape_differences

import hf_dspark
from hf_dspark.budgets.named import make_budget
from hf_dspark.evaluation.prompts import encode
from hf_dspark.evaluation.speed import Bench
from hf_dspark.models.loading import load_drafter, load_target
from hf_dspark.utils.hardware import has_bf16
from tests.costs import flat, full_machine, middling
from tests.smollm2_helpers import DRAFTER, NEW_TOKENS, PROCESSORS, PROMPTS, plain

pytestmark = pytest.mark.slow


class Pair:
    """Target, tokenizer and drafter in one precision, and their greedy texts, each computed once."""

    def __init__(self, dtype: str) -> None:
        self.target, self.tokenizer = load_target("smollm2", dtype=dtype)
        self.drafter = load_drafter(DRAFTER, dtype=dtype)

    def inputs(self, rows: int) -> Any:
        return encode(self.tokenizer, PROMPTS[:rows])

    @functools.cache  # noqa: B019 (as long-lived as the session)
    def plain(self, rows: int, processors: str) -> torch.Tensor:
        return plain(self.target, self.inputs(rows), **PROCESSORS[processors])

    @functools.cache  # noqa: B019
    def speculated(self, rows: int, processors: str) -> hf_dspark.GenerateDSparkOutput:
        options = {"assistant_model": self.drafter, "return_dict_in_generate": True, **PROCESSORS[processors]}
        return plain(self.target, self.inputs(rows), **options)


@pytest.fixture(scope="session")
def exact() -> Pair:
    """fp32."""
    return Pair("fp32")


@pytest.fixture(scope="session")
def rounded() -> Pair:
    """bf16."""
    return Pair("bf16")


@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_fp32_greedy_equals_plain_generate(exact, rows, processors):
    """Token for token at every batch size, with and without processors, on left-padded chat prompts of many lengths."""
    output = exact.speculated(rows, processors)
    assert torch.equal(output.sequences, exact.plain(rows, processors))
    assert all(row.rounds > 0 for row in output.stats.rows if row.generated > 1)


@pytest.mark.parametrize(
    ("kind", "costs"),
    [
        *((kind, costs) for kind in ("load-aware", "load-aware-lag2") for costs in (flat, middling, full_machine)),
        *((kind, flat) for kind in ("threshold:0.3", "static:2", "capped")),
    ],
)
def test_fp32_greedy_equals_plain_generate_under_every_budget(exact, kind, costs):
    """Eight rows of the real target, on machines of every kind: with drafts for all, for some, and hardly ever for any."""
    made = make_budget("full", 20) if kind == "capped" else make_budget(kind)
    budget = made.start(costs(exact.drafter.config.block_size), learn_costs=False)
    output = hf_dspark.generate(
        exact.target,
        exact.drafter,
        **exact.inputs(8),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        budget=budget,
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences, exact.plain(8, "none"))


def test_the_prompts_are_what_these_tests_need(exact):
    """Prompts of eight rows differ in length, and some texts end early while others reach the limit."""
    mask = exact.inputs(8)["attention_mask"]
    assert len(set(mask.sum(1).tolist())) >= 6
    new = exact.plain(8, "none")[:, mask.shape[1] :]
    ended = (new == exact.target.generation_config.eos_token_id).any(1)
    assert 0 < ended.sum() < 8


@pytest.mark.parametrize("budget", ["static:3", "threshold:0.4"])
def test_budgets_do_not_change_the_text(exact, budget):
    """The API with fewer tokens verified gives the same tokens."""
    output = hf_dspark.generate(exact.target, exact.drafter, **exact.inputs(3), max_new_tokens=NEW_TOKENS, do_sample=False, budget=budget)
    assert torch.equal(output, exact.plain(3, "none"))


def test_the_drafter_is_of_use(exact):
    """A trained drafter's tokens are accepted often: well above one token a round, and in blocks of several."""
    stats = exact.speculated(8, "none").stats
    assert stats.tau > 1.3
    assert sum(row.accepted_at[2] for row in stats.rows) > 0


@pytest.fixture(scope="session")
def comparison(rounded) -> Comparison:
    """All methods on three prompts in bf16."""
    bench = Bench(rounded.target, rounded.drafter, rounded.tokenizer, max_new_tokens=24)
    return compare(bench, PROMPTS[::3], batch_size=3)


def test_bf16_divergences_are_explained(comparison):
    """A bf16 text parts from the plain one only where rounding moves the two logits by as much as lies between them."""
    assert comparison.rows == 3
    assert comparison.methods == METHODS
    assert comparison.unexplained == []


def test_the_shape_of_a_pass_moves_logits_in_bf16_and_not_in_fp32(exact, rounded):
    """What divergences are measured against: in bf16 the plain target's own passes disagree by fractions of a logit, where the CPU computes
    in it. One that does not adds up in one order whatever the shape.
    """
    prefix = exact.inputs(1)["input_ids"][0]
    spread = {}
    for name, pair in (("fp32", exact), ("bf16", rounded)):
        with torch.no_grad():
            first, second = pair.target(input_ids=prefix[None]).logits[0, -1].topk(2).indices.tolist()
        found = shape_differences(pair.target, prefix, first, second)
        plain_passes = [value for shape, value in found.items() if not shape.startswith("ragged")]
        spread[name] = max(plain_passes) - min(plain_passes)
    assert spread["fp32"] < 1e-3
    assert spread["bf16"] < 1
    assert spread["bf16"] > 0.01 or not has_bf16(torch.device("cpu"))
