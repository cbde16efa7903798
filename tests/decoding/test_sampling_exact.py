"""Sampled output against the exact distribution of the target, and wrong decoders that the same test must catch.

False alarms: each chi-square test fails on a right decoder with probability ALARM = 1e-4 (joint distribution of the first
three tokens, or of the first two where samples are drawn call by call; outcomes with fewer than 5 expected samples
pooled). There are about 100 of them on the right decoder, so the whole file fails on one with 1%. Seeds are fixed: a test
that passes keeps passing until the code or torch's generator changes.
Power: every negative control below is caught on the same target and drafter, at the same sample size or a smaller one:
2048 rows in one call; one row and four equal rows call by call; 300 calls of four ragged rows, since 60 do not suffice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import CompileConfig

import hf_dspark
from hf_dspark.budgets.budget import Budget, Drafts
from hf_dspark.cache.layout import RowLayout
from hf_dspark.decoding import draft as drafting
from hf_dspark.decoding import loop as decoding
from hf_dspark.decoding import verify as verification
from hf_dspark.decoding.candidate_generator import stock_loop
from hf_dspark.decoding.ngram_copy import adjusted
from hf_dspark.decoding.options import Options
from hf_dspark.decoding.sampling import draw
from hf_dspark.decoding.verify import DraftBlock, Verdict
from tests.exact import (
    EOS,
    Fit,
    Tokens,
    Warping,
    chi_square,
    exact_distribution,
    outcomes,
    small_drafter,
    small_llama,
)

pytestmark = pytest.mark.slow

ALARM = 1e-4
SAMPLES = 2048
TOKENS = 3  # The joint distribution of so many tokens is compared ..
GENERATED = 5  # .. and two more are generated, so that max_length does not shorten the blocks that decide about them.

HEADS = ["vanilla", "gated", "rnn", "none"]
BUDGETS = ["full", "static:1", "static:2", "threshold:0.5"]
# Of the tests call by call; at these sample sizes, or smaller ones, the wrong verifier below is caught.
LOOP_HEADS = ["vanilla", "gated", "rnn"]
LOOP_BUDGETS = ["full", "static:0", "static:2", "threshold:0.5"]
CALLS_B1, CALLS_B4, CALLS_RAGGED = 200, 80, 300
WARPINGS = [
    Warping(),
    Warping(temperature=0.6),
    Warping(temperature=1.5),
    Warping(temperature=1.3, top_k=3),
    Warping(top_p=0.85),
    Warping(temperature=1.2, top_k=4, top_p=0.9),
]
PROMPT = (3, 1, 4, 1)
RAGGED = ((5, 2), (3, 1, 4, 1, 5, 2, 4), (4,), (1, 1, 3, 5))
REDUCED = torch.tensor([0, 1, 3, 5])
COPY_WEIGHTS = [0.3, 0.6, 0.8]
# Confidences that depend strongly on the copy, so on the tokens drafted so far.
COPY_CONFIDENCE = [
    [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [3.0, 0.0, 1.0, 0.0, -3.0, 1.0, 2.0, 0.0],
    [-3.0, 0.5, 1.0, 0.0, 3.0, 2.0, -2.0, -1.0],
    [1.0, -1.0, 0.0, 1.0, -2.0, -1.0, 2.0, 0.5],
]


@cache
def target() -> Any:
    return small_llama()


@cache
def drafter(head: str, reduced: bool = False, copying: bool = False) -> Any:
    fields = {"copy_weights": COPY_WEIGHTS, "copy_confidence": COPY_CONFIDENCE} if copying else {}
    return small_drafter(target(), head, draft_token_ids=REDUCED if reduced else None, **fields)


@cache
def exact(prompt: Tokens, warping: Warping, tokens: int = TOKENS) -> dict[Tokens, float]:
    return exact_distribution(target(), prompt, tokens, warping)


def batch(prompts: tuple[Tokens, ...]) -> dict[str, torch.Tensor]:
    """Left-padded prompts as a tokenizer gives them."""
    longest = max(map(len, prompts))
    ids = [[EOS] * (longest - len(p)) + list(p) for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def sample(
    prompts: tuple[Tokens, ...], warping: Warping, draft: Any, budget: Any, tokens: int = TOKENS, **options: Any
) -> list[list[Tokens]]:
    """One call; for each prompt the outcomes of its `num_return_sequences` rows."""
    times = options.get("num_return_sequences", 1)
    inputs = batch(prompts)
    out = hf_dspark.generate(target(), draft, **inputs, **warping.arguments(), budget=budget, max_new_tokens=GENERATED, **options)
    drawn = outcomes(out, inputs["input_ids"].shape[1], tokens)
    return [drawn[i * times : (i + 1) * times] for i in range(len(prompts))]


def fit_batch(
    warping: Warping,
    draft: Any,
    budget: Any = "full",
    prompts: tuple[Tokens, ...] = (PROMPT,),
    seed: int = 11,
    samples: int = SAMPLES,
    **options: Any,
) -> Fit:
    """Many rows in one call, split evenly over the prompts, each prompt's rows against its own distribution."""
    drawn = sample(prompts, warping, draft, budget, num_return_sequences=samples // len(prompts), seed=seed, **options)
    fits = [chi_square(d, exact(p, warping)) for p, d in zip(prompts, drawn, strict=True)]
    return sum(fits[1:], fits[0])


def fit_loop(
    calls: int, warping: Warping, draft: Any, budget: Any, prompts: tuple[Tokens, ...], tokens: int, seed: int = 12, **options: Any
) -> Fit:
    """Many small calls from one generator: B = the number of prompts."""
    generator = torch.Generator().manual_seed(seed)
    gathered: dict[Tokens, list[Tokens]] = {p: [] for p in prompts}
    for _ in range(calls):
        drawn = sample(prompts, warping, draft, budget, tokens, generator=generator, **options)
        for prompt, (outcome,) in zip(prompts, drawn, strict=True):
            gathered[prompt].append(outcome)
    fits = [chi_square(d, exact(p, warping, tokens)) for p, d in gathered.items()]
    return sum(fits[1:], fits[0])


# ----------------------------------------------------------------------------------------------------- right decoders


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("head", HEADS)
def test_every_head_under_every_budget_keeps_the_distribution(head: str, budget: str) -> None:
    """Three sampled tokens are distributed as the target's, whatever drafts and however much of it is verified."""
    warping = WARPINGS[(HEADS.index(head) + 3 * BUDGETS.index(budget)) % len(WARPINGS)]
    assert fit_batch(warping, drafter(head), budget).p_value > ALARM


@pytest.mark.parametrize("budget", ["full", "threshold:0.5"])
@pytest.mark.parametrize("warping", WARPINGS, ids=str)
def test_every_warping_keeps_the_distribution(warping: Warping, budget: str) -> None:
    """Temperature, top-k and top-p give exactly the distribution that transformers' own warpers give."""
    assert fit_batch(warping, drafter("vanilla"), budget, seed=21).p_value > ALARM


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_reduced_draft_vocabulary_keeps_the_distribution(budget: str) -> None:
    """Tokens that the drafter can never propose come out as often as they should."""
    assert len(drafter("gated", reduced=True).draft_token_ids) < target().config.vocab_size
    warping = WARPINGS[2 + BUDGETS.index(budget)]
    assert fit_batch(warping, drafter("gated", reduced=True), budget, seed=22).p_value > ALARM


@pytest.mark.parametrize("reduced", [False, True], ids=["whole", "reduced"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_copying_keeps_the_distribution(budget: str, reduced: bool) -> None:
    """Drafts mixed with what the row repeats, tokens outside the draft vocabulary among it, come out as often as they should."""
    warping = WARPINGS[(BUDGETS.index(budget) + 4 * reduced) % len(WARPINGS)]
    assert fit_batch(warping, drafter("gated", reduced, copying=True), budget, seed=26).p_value > ALARM


@pytest.mark.parametrize("budget", ["full", "threshold:0.5"])
def test_copying_keeps_the_distribution_of_ragged_rows_under_a_penalty(budget: str) -> None:
    """A processor that looks at ids, rows of different prompts, copies of each row's own text."""
    warping = Warping(temperature=1.2, top_k=5, repetition_penalty=1.4)
    prompts = tuple((EOS, *prompt) for prompt in RAGGED)
    assert fit_batch(warping, drafter("vanilla", copying=True), budget, prompts, seed=27).p_value > ALARM


def test_copying_keeps_the_distribution_of_single_rows() -> None:
    """B = 1, call by call."""
    assert fit_loop(CALLS_B1, WARPINGS[2], drafter("rnn", copying=True), "full", (PROMPT,), tokens=2).p_value > ALARM


@pytest.mark.parametrize(
    ("head", "budget", "reduced"),
    [("rnn", "full", False), ("vanilla", "threshold:0.5", False), ("vanilla", "full", True)],
)
def test_repetition_penalty_keeps_the_distribution(head: str, budget: str, reduced: bool) -> None:
    """A processor that looks at the tokens before each position, drafted ones included, is followed exactly."""
    warping = Warping(temperature=1.3, repetition_penalty=1.6)
    assert fit_batch(warping, drafter(head, reduced), budget, seed=23, samples=SAMPLES // 2).p_value > ALARM


@pytest.mark.parametrize("budget", BUDGETS)
def test_ragged_rows_each_keep_their_own_distribution(budget: str) -> None:
    """Prompts of 1 to 7 tokens in one left-padded batch are each distributed as if alone."""
    head, warping = HEADS[BUDGETS.index(budget)], WARPINGS[(BUDGETS.index(budget) + 2) % len(WARPINGS)]
    assert fit_batch(warping, drafter(head), budget, RAGGED, seed=24).p_value > ALARM


def test_ragged_rows_keep_their_distribution_under_a_repetition_penalty() -> None:
    """Each row's penalty follows its own prompt and tokens.

    The prompts begin with the pad token, so that it does not matter whether a penalty counts padding (transformers
    changed that).
    """
    warping = Warping(temperature=1.2, top_k=5, repetition_penalty=1.4)
    prompts = tuple((EOS, *prompt) for prompt in RAGGED)
    assert fit_batch(warping, drafter("gated"), "static:2", prompts, seed=25, samples=SAMPLES // 2).p_value > ALARM


@pytest.mark.parametrize("budget", LOOP_BUDGETS)
@pytest.mark.parametrize("head", LOOP_HEADS)
def test_single_rows_keep_the_distribution(head: str, budget: str) -> None:
    """B = 1, call by call."""
    warping = WARPINGS[(LOOP_HEADS.index(head) + 3 * LOOP_BUDGETS.index(budget)) % len(WARPINGS)]
    assert fit_loop(CALLS_B1, warping, drafter(head), budget, (PROMPT,), tokens=2).p_value > ALARM


@pytest.mark.parametrize("budget", LOOP_BUDGETS)
@pytest.mark.parametrize("head", LOOP_HEADS)
def test_batches_of_four_keep_the_distribution(head: str, budget: str) -> None:
    """B = 4, call by call: by turns the same prompt four times, and four prompts of different length."""
    turn = LOOP_HEADS.index(head) + LOOP_BUDGETS.index(budget)
    prompts = (PROMPT,) * 4 if turn % 2 else RAGGED
    warping = WARPINGS[(LOOP_HEADS.index(head) + 3 * LOOP_BUDGETS.index(budget) + 2) % len(WARPINGS)]
    calls = CALLS_RAGGED if prompts is RAGGED else CALLS_B4
    assert fit_loop(calls, warping, drafter(head), budget, prompts, tokens=2, seed=14).p_value > ALARM


@pytest.mark.parametrize("copying", [False, True], ids=["heads", "copying"])
def test_the_stock_loop_keeps_the_distribution(copying: bool) -> None:
    """Driven by transformers' own assisted loop, with the same p_d handed over, the drafter gives the same
    distribution.
    """
    warping, draft = WARPINGS[2], drafter("gated", reduced=copying, copying=copying)
    drawn: list[Tokens] = []
    hf_dspark.uninstall()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(13)
            for _ in range(200):
                with stock_loop(target(), draft, Options(budget="full")):
                    out = target().generate(**batch((PROMPT,)), **warping.arguments(), max_new_tokens=GENERATED, assistant_model=draft)
                drawn += outcomes(out, len(PROMPT), 2)
    finally:
        hf_dspark.install()
    assert chi_square(drawn, exact(PROMPT, warping, 2)).p_value > ALARM


@pytest.mark.parametrize("verification", ["block", "token"])
@pytest.mark.parametrize("head", HEADS)
def test_both_verifications_keep_the_distribution(head: str, verification: str) -> None:
    """Judged over the block or token by token, under a budget that reads confidences, with copies, from a reduced vocabulary."""
    draft = drafter(head, reduced=head == "rnn", copying=head in ("gated", "rnn"))
    warping = WARPINGS[2 + HEADS.index(head)]
    drawn = sample((PROMPT,), warping, draft, "threshold:0.5", num_return_sequences=SAMPLES, seed=28, verification=verification)[0]
    assert chi_square(drawn, exact(PROMPT, warping)).p_value > ALARM


@pytest.mark.parametrize("verification", ["block", "token"])
@pytest.mark.parametrize("head", HEADS)
def test_compiled_rounds_keep_the_distribution(head: str, verification: str) -> None:
    """Ragged rows in one call, with copies and reduced vocabularies, under a budget that reads confidences, as traced graphs."""
    draft = drafter(head, reduced=head in ("rnn", "none"), copying=head in ("gated", "rnn"))
    warping = WARPINGS[2 + HEADS.index(head)]
    how = {"compile": True, "compile_config": CompileConfig(backend="eager", fullgraph=True), "verification": verification}
    assert fit_batch(warping, draft, "threshold:0.5", RAGGED, seed=29, **how).p_value > ALARM


@pytest.mark.parametrize("dynamic", [None, False], ids=["any size", "buckets"])
@pytest.mark.parametrize("prompts", [(PROMPT,), RAGGED], ids=["one row", "four rows"])
def test_compiled_rounds_keep_the_distribution_call_by_call(prompts: tuple[Tokens, ...], dynamic: bool | None) -> None:
    """B = 1 and B = 4, graphs of any size and of fixed ones."""
    config = CompileConfig(backend="eager", fullgraph=True, dynamic=dynamic)
    draft = drafter("vanilla", copying=True)
    assert fit_loop(CALLS_B1, WARPINGS[1], draft, "full", prompts, 2, seed=15, compile=True, compile_config=config).p_value > ALARM


def test_drafts_are_both_accepted_and_rejected() -> None:
    """The drafter is neither right nor wrong too often for the tests above to mean something."""
    warping = WARPINGS[2]
    for head in HEADS:
        out = hf_dspark.generate(
            target(),
            drafter(head),
            **batch((PROMPT,) * 256),
            **warping.arguments(),
            max_new_tokens=GENERATED,
            budget="threshold:0.5",
            return_dict_in_generate=True,
            seed=1,
        )
        rows = out.stats.rows
        verified, accepted, rounds = (sum(getattr(r, n) for r in rows) for n in ("verified", "accepted", "rounds"))
        assert 0.2 < accepted / verified < 0.8
        assert 0.1 < verified / (3 * rounds) < 0.7  # The budget really cuts, and not always.


@pytest.mark.parametrize("rule", ["block", "token"])
def test_a_head_in_bfloat16_leaves_the_distribution_as_it_is(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    """p_d is recorded in the dtype of the logits, which rounds it; tokens are drawn from what is recorded."""
    draft, seen = drafter("gated", copying=True), set()
    right = type(draft).base_logits
    monkeypatch.setattr(type(draft), "base_logits", lambda self, h: right(self, h).to(torch.bfloat16))

    def watched(p_t: torch.Tensor, block: DraftBlock, layout: RowLayout, u: torch.Tensor, **how: bool) -> Verdict:
        seen.add((block.probs.dtype, block.mass is not None))
        return right_accept(p_t, block, layout, u, **how)

    monkeypatch.setattr(decoding, "accept_sampled", watched)
    assert fit_batch(CONTROL, draft, seed=31, verification=rule).p_value > ALARM
    assert seen == {(torch.bfloat16, True)}


# ----------------------------------------------------------------------------------------------------- wrong decoders

Accept = Callable[..., Verdict]
right_accept = verification.accept_sampled


def forgets_p_d(p_t: torch.Tensor, block: DraftBlock, layout: RowLayout, u: torch.Tensor, **rule: bool) -> Verdict:
    """Accepts with probability p_t."""
    return right_accept(p_t, replace(block, drawn=torch.ones_like(block.drawn)), layout, u, **rule)


def residual_is_p_t(p_t: torch.Tensor, block: DraftBlock, layout: RowLayout, u: torch.Tensor, **rule: bool) -> Verdict:
    """Draws corrections from p_t instead of norm(max(p_t - p_d, 0))."""
    accepted = right_accept(p_t, block, layout, u, **rule).accepted
    after = p_t[layout.padded_index[torch.arange(len(accepted)), accepted]]
    return Verdict(accepted, draw(after, u[:, -1]))


def q_before_temperature(p_t: torch.Tensor, block: DraftBlock, layout: RowLayout, u: torch.Tensor, **rule: bool) -> Verdict:
    """Believes that drafts were drawn at temperature 1."""
    q = (block.probs.log() * CONTROL.temperature).softmax(-1)
    return right_accept(p_t, replace(block, probs=q, drawn=q.gather(-1, block.tokens[..., None])[..., 0]), layout, u, **rule)


def wrong_rows_p_d(p_t: torch.Tensor, block: DraftBlock, layout: RowLayout, u: torch.Tensor, **rule: bool) -> Verdict:
    """Compares each row with the draft distribution of the row before it."""
    q = block.probs.roll(1, dims=0)
    return right_accept(p_t, replace(block, probs=q, drawn=q.gather(-1, block.tokens[..., None])[..., 0]), layout, u, **rule)


def looks_past_the_end(p_t: torch.Tensor, block: DraftBlock, layout: RowLayout, u: torch.Tensor, **rule: bool) -> Verdict:
    """Keeps the longest prefix whose own weight stands, though longer ones that were tried make it likelier."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "_prefix_chances", lambda weights, *_: weights)
        return right_accept(p_t, block, layout, u, **rule)


class PeekingBudget(Budget):
    """Verifies x_k only where c_{k+1}, which x_k decides, is high."""

    needs_confidence = True

    def plan(self, drafts: Drafts) -> list[int]:
        lengths = (drafts.confidence[:, 1:] >= 0.5).long().cumprod(dim=1).sum(dim=1).tolist()
        return [min(length, limit) for length, limit in zip(lengths, drafts.limits, strict=True)]


CONTROL = Warping(temperature=1.5)


@pytest.mark.parametrize("rule", ["block", "token"])
@pytest.mark.parametrize("wrong", [forgets_p_d, residual_is_p_t, q_before_temperature, wrong_rows_p_d])
def test_a_wrong_verifier_is_caught(monkeypatch: pytest.MonkeyPatch, wrong: Accept, rule: str) -> None:
    """The test that the right decoder passes fails on a verifier with one mistake in it."""
    assert fit_batch(CONTROL, drafter("gated"), seed=31, verification=rule).p_value > ALARM
    monkeypatch.setattr(decoding, "accept_sampled", wrong)
    assert fit_batch(CONTROL, drafter("gated"), seed=31, verification=rule).p_value < ALARM


def test_a_verifier_that_forgets_what_else_it_tries_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake that token by token nobody could make."""
    monkeypatch.setattr(decoding, "accept_sampled", looks_past_the_end)
    assert fit_batch(CONTROL, drafter("gated"), seed=31, samples=4 * SAMPLES).p_value < ALARM


def residual_forgets_copies(p_t: torch.Tensor, block: DraftBlock, layout: RowLayout, u: torch.Tensor, **rule: bool) -> Verdict:
    """Draws corrections from norm(max(p_t - p_d, 0)) though the draft was drawn from p_d and copies."""
    return right_accept(p_t, replace(block, copied=None), layout, u, **rule)


def accepts_by_p_d(p_t: torch.Tensor, block: DraftBlock, layout: RowLayout, u: torch.Tensor, **rule: bool) -> Verdict:
    """Accepts with probability p_t / p_d though the draft was drawn from p_d and copies."""
    drawn = block.probs.gather(-1, block.tokens[..., None])[..., 0]
    return right_accept(p_t, replace(block, drawn=drawn), layout, u, **rule)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (residual_forgets_copies, "token"),
        (residual_forgets_copies, "block"),
        (accepts_by_p_d, "token"),
        (accepts_by_p_d, "block"),
    ],
)
def test_a_verifier_that_knows_no_copies_is_caught(monkeypatch: pytest.MonkeyPatch, wrong: Accept, rule: str) -> None:
    """The test that copying passes fails on a verifier that was not told of it."""
    draft = drafter("gated", copying=True)
    assert fit_batch(CONTROL, draft, seed=31, samples=2 * SAMPLES, verification=rule).p_value > ALARM
    monkeypatch.setattr(decoding, "accept_sampled", wrong)
    assert fit_batch(CONTROL, draft, seed=31, samples=2 * SAMPLES, verification=rule).p_value < ALARM


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_a_budget_that_peeks_is_caught(head: str) -> None:
    """Letting x_k decide whether x_k is verified biases the output, and the test sees it."""
    assert fit_batch(CONTROL, drafter(head), PeekingBudget(), seed=31).p_value < ALARM


def test_a_confidence_that_knows_the_next_copy_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """What copies say one position later follows from x_k, so it must not decide whether x_k is verified; the test sees where it does."""
    draft = drafter("gated", copying=True)
    assert fit_batch(CONTROL, draft, "threshold:0.5", seed=31).p_value > ALARM

    def too_late(features: torch.Tensor, table: Any) -> torch.Tensor:
        return adjusted(torch.cat([features[:, 1:], features[:, -1:]], dim=1), table)

    monkeypatch.setattr(drafting, "adjusted", too_late)
    assert fit_batch(CONTROL, draft, "threshold:0.5", seed=31).p_value < ALARM


@pytest.mark.parametrize("wrong", [forgets_p_d, wrong_rows_p_d])
def test_a_wrong_verifier_is_caught_on_ragged_rows(monkeypatch: pytest.MonkeyPatch, wrong: Accept) -> None:
    """A mistake cannot hide behind rows of different prompts."""
    monkeypatch.setattr(decoding, "accept_sampled", wrong)
    assert fit_batch(CONTROL, drafter("gated"), "full", RAGGED, seed=31).p_value < ALARM


@pytest.mark.parametrize("prompts", [(PROMPT,), (PROMPT,) * 4, RAGGED], ids=["B1", "B4-same", "B4-ragged"])
def test_a_wrong_verifier_is_caught_call_by_call(monkeypatch: pytest.MonkeyPatch, prompts: tuple[Tokens, ...]) -> None:
    """The smaller samples of the loops over calls suffice too."""
    monkeypatch.setattr(decoding, "accept_sampled", forgets_p_d)
    calls = {(PROMPT,): 160, (PROMPT,) * 4: 60, RAGGED: CALLS_RAGGED}[prompts]
    assert fit_loop(calls, WARPINGS[2], drafter("gated"), "full", prompts, tokens=2).p_value < ALARM
