"""Greedy text with a drafter equals plain `generate` token for token, in fp32: families, batches, budgets, processors,
ends of text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
)

from tests.helpers import (
    BUDGETS,
    NEVER,
    World,
    counts,
    left_padded,
    make_world,
    plain,
    plain_tokens,
    random_prompts,
    speculate,
    talking_target,
    world,
)
from tests.tiny import BOS, EOS, FAMILIES, MASK, PAD, VOCAB, tiny_drafter


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_batch_and_budget_gives_the_plain_text(family, rows, budget, monkeypatch):
    """Ragged left-padded prompts; with drafts some tokens are accepted and some are rejected, so both paths are
    walked."""
    w = world(family)
    monkeypatch.setattr(w.drafter, "budget", budget)
    out = speculate(w.target, w.drafter, w.inputs(rows), return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain_tokens(family, rows))
    accepted, verified = counts(out)
    if budget == "full":
        assert 0 < accepted < verified
    if budget == "static:0":
        assert verified == 0
        assert all(r.rounds == 23 for r in out.stats.rows)


def test_a_threshold_verifies_some_tokens_and_not_all(monkeypatch):
    """The budget that reads confidences is at work in these tests: lengths vary."""
    w = world()
    monkeypatch.setattr(w.drafter, "budget", "threshold:0.5")
    out = speculate(w.target, w.drafter, w.inputs(8), return_dict_in_generate=True)
    assert 0 < sum(r.verified for r in out.stats.rows) < sum(r.drafted for r in out.stats.rows)


# ----------------------------------------------------------------------------------------------------------- processors


class RowBound(LogitsProcessor):
    """Adds another bias in every row of the batch, and insists on the whole batch."""

    def __init__(self, rows: int) -> None:
        self.bias = 3.0 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(5))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert input_ids.shape[0] == scores.shape[0] == self.bias.shape[0]
        return scores + self.bias


class ByLengthAndLastToken(LogitsProcessor):
    """Favours a token that follows from the length of the text, its padding included, and its last two tokens."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        favourite = (input_ids.shape[1] + input_ids[:, -1] + 3 * input_ids[:, -2:].sum(1)) % VOCAB
        return scores.scatter_add(1, favourite[:, None], torch.full_like(scores[:, :1], 4.0))


class Overwriting(LogitsProcessor):
    """Changes the scores it is given in place."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 10:50] -= 3.0
        return scores


def _only_thirds(row: int, ids: torch.Tensor) -> list[int]:
    return list(range(4 + (row + len(ids)) % 3, VOCAB, 3))


PROCESSORS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "no repeated token": {"no_repeat_ngram_size": 1, "max_new_tokens": 16},
    "prompt left out": {"logits_processor": [RepetitionPenaltyLogitsProcessor(1.6, prompt_ignore_length=9)]},
    "min_length": {"min_length": 19, "eos_token_id": list(range(4, 50))},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": list(range(4, 50))},
    "bad_words": {"bad_words_ids": [[n] for n in range(20, 40)] + [[50, 51], [7, 8, 9]]},
    "suppress_tokens": {"suppress_tokens": list(range(30, 60))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(4, 90))},
    "sequence_bias": {"sequence_bias": [[[n], 4.0] for n in range(60, 70)] + [[[61, 62], 5.0]]},
    "forced_eos": {"forced_eos_token_id": 5, "eos_token_id": 5},
    "exponential_decay": {"exponential_decay_length_penalty": (3, 1.6), "eos_token_id": [5, 41]},
    "prefix_allowed_tokens": {"prefix_allowed_tokens_fn": _only_thirds},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 1.3},
    "all at once": {
        "repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "min_new_tokens": 5, "suppress_tokens": [9, 10],
        "eos_token_id": [5, 6, 7],
    },
}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("name", PROCESSORS)
def test_logits_processors_give_the_plain_text(name, rows):
    """Each processor of `generate` sees every row at its own length, drafted tokens included."""
    w = world()
    expected = plain(w.target, w.inputs(rows), **PROCESSORS[name])
    assert torch.equal(speculate(w.target, w.drafter, w.inputs(rows), **PROCESSORS[name]), expected)
    if rows == 8:
        assert not torch.equal(expected, plain_tokens("llama", rows)), "the option changes nothing here, so this test would show nothing"


@pytest.mark.parametrize("banned", [[[5]], [[], [7]]])
def test_bad_words_of_which_nothing_is_left_ban_nothing(banned: list[list[int]]) -> None:
    """transformers takes end-of-text ids out of them, and lets empty ones be."""
    w, options = world(), {"bad_words_ids": banned, "eos_token_id": 5}
    assert torch.equal(speculate(w.target, w.drafter, w.inputs(3), **options), plain(w.target, w.inputs(3), **options))


@pytest.mark.parametrize("make", [RowBound, lambda rows: ByLengthAndLastToken(), lambda rows: Overwriting()])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_processors_of_the_callers_own_give_the_plain_text(make, rows):
    """Also ones that depend on the row's place in the batch, on its length with padding, or that write in place."""
    w = world()
    processors = LogitsProcessorList([make(rows)])
    expected = plain(w.target, w.inputs(rows), logits_processor=processors)
    assert torch.equal(speculate(w.target, w.drafter, w.inputs(rows), logits_processor=processors), expected)
    assert not torch.equal(expected, plain_tokens("llama", rows))


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "qwen3_moe"])
def test_processors_and_several_eos_on_other_families(family):
    """The rules of a call do not depend on the architecture."""
    w = world(family)
    options = {
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 4,
        "eos_token_id": list(range(10, 20)),
    }
    assert torch.equal(speculate(w.target, w.drafter, w.inputs(8), **options), plain(w.target, w.inputs(8), **options))


# --------------------------------------------------------------------------------------------------------- ends of text


def _eos_at(tokens: torch.Tensor, prompt: int, places: list[int]) -> list[int]:
    return [int(row[prompt + place]) for row, place in zip(tokens, places, strict=False)]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_eos_inside_blocks_ends_rows_at_different_times(family, budget, monkeypatch):
    """Every row's text has an end-of-sequence id at another place; behind it there is padding only, as in a plain
    call."""
    w = world(family)
    monkeypatch.setattr(w.drafter, "budget", budget)
    eos = _eos_at(plain_tokens(family, 8), w.inputs(8)["input_ids"].shape[1], [3, 17, 6, 10, 13, 1, 8, 20])
    expected = plain(w.target, w.inputs(8), eos_token_id=eos)
    out = speculate(w.target, w.drafter, w.inputs(8), eos_token_id=eos, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    generated = [r.generated for r in out.stats.rows]
    assert len(set(generated)) > 3


@pytest.mark.parametrize("place", range(0, 12, 2))
def test_eos_at_every_place_of_a_block(place):
    """Whichever position of a round the end falls on, the text ends there and statistics count no token behind it."""
    w = world()
    tokens = plain_tokens("llama", 1)
    prompt = w.inputs(1)["input_ids"].shape[1]
    eos = _eos_at(tokens, prompt, [place])
    out = speculate(w.target, w.drafter, w.inputs(1), eos_token_id=eos, return_dict_in_generate=True)
    expected = plain(w.target, w.inputs(1), eos_token_id=eos)
    assert torch.equal(out.sequences, expected)
    assert out.stats.rows[0].generated == expected.shape[1] - prompt


@pytest.mark.parametrize("rows", [1, 3])
def test_eos_as_the_very_first_token(rows):
    """Rows that end with their first token never take part in a round; the others go on."""
    w = world()
    width = w.inputs(rows)["input_ids"].shape[1]
    tokens = plain_tokens("llama", rows)
    for ends in ([tokens[0, width]], list(tokens[:, width])):
        eos = [int(t) for t in ends]
        out = speculate(w.target, w.drafter, w.inputs(rows), eos_token_id=eos, return_dict_in_generate=True)
        assert torch.equal(out.sequences, plain(w.target, w.inputs(rows), eos_token_id=eos))
        assert out.stats.rows[0].rounds == 0
    assert out.sequences.shape[1] == width + 1


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 5, 6, 8, 11])
def test_length_limit_inside_a_block(new_tokens):
    """The text has exactly as many new tokens as allowed, wherever in a round the limit falls."""
    w = world()
    out = speculate(w.target, w.drafter, w.inputs(3), max_new_tokens=new_tokens)
    width = w.inputs(3)["input_ids"].shape[1]
    assert torch.equal(out, plain_tokens("llama", 3)[:, : width + new_tokens])


def test_max_length_counts_prompt_and_padding():
    """`max_length` means the same as in a plain call."""
    w = world()
    options = {"max_new_tokens": None, "max_length": 21}
    assert torch.equal(speculate(w.target, w.drafter, w.inputs(3), **options), plain(w.target, w.inputs(3), **options))


def test_the_targets_own_eos_is_used_when_none_is_given():
    """Defaults come from the target's generation config."""
    w = world()
    tokens = plain_tokens("llama", 3)
    target = talking_target()
    target.generation_config.eos_token_id = [int(tokens[0, -10]), int(tokens[1, -4])]
    expected = target.generate(**w.inputs(3), max_new_tokens=24, do_sample=False)
    assert torch.equal(target.generate(**w.inputs(3), max_new_tokens=24, do_sample=False, assistant_model=w.drafter), expected)


@pytest.mark.parametrize("budget", ["full", "static:2"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("processed", [{}, {"repetition_penalty": 1.2}], ids=["", "penalised"])
def test_long_texts_outgrow_every_buffer(processed, batch, budget):
    """More new tokens than any buffer starts with, so growing them is covered, by drafts that are written for processors to read too."""
    w = world()
    options = {"max_new_tokens": 400, **processed}
    inputs = left_padded(w.prompts[:batch])
    w.drafter.budget = budget
    try:
        assert torch.equal(speculate(w.target, w.drafter, inputs, **options), plain(w.target, inputs, **options))
    finally:
        w.drafter.budget = "full"


# ------------------------------------------------------------------------------------------------- drafters and targets


@pytest.mark.parametrize("head", ["gated", "rnn"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_head_gives_the_plain_text(head, budget):
    """Gated and recurrent heads, with much accepted and much rejected."""
    w = make_world(world().target, head)
    w.drafter.budget = budget
    out = speculate(w.target, w.drafter, w.inputs(3), return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain_tokens("llama", 3))
    accepted, verified = counts(out)
    if budget == "full":
        assert 0 < accepted < verified


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn", "none"])
def test_random_drafters_give_the_plain_text(head):
    """A drafter that is nearly always wrong costs time, never text; without a sequential head (DFlash) too."""
    target = world().target
    drafter = tiny_drafter(target, head)
    drafter.budget = "threshold:0.4"
    inputs = world().inputs(3)
    assert torch.equal(speculate(target, drafter, inputs), plain_tokens("llama", 3))
    drafter.budget = "full"
    assert torch.equal(speculate(target, drafter, inputs, repetition_penalty=1.3), plain(target, inputs, repetition_penalty=1.3))


@pytest.fixture(scope="module")
def reduced() -> World:
    """A drafter that can propose two thirds of the vocabulary only."""
    return make_world(talking_target(), draft_token_ids=torch.tensor([n for n in range(VOCAB) if n % 3]))


@pytest.mark.parametrize("name", ["none", "repetition_penalty", "suppress_tokens", "prefix_allowed_tokens", "sequence_bias", "forced_eos"])
def test_a_reduced_draft_vocabulary_gives_the_plain_text(reduced, name):
    """Draft ids are mapped to the target's before anything is compared or processed."""
    options = PROCESSORS.get(name, {})
    out = speculate(reduced.target, reduced.drafter, reduced.inputs(3), return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, plain(reduced.target, reduced.inputs(3), **options))
    accepted, verified = counts(out)
    if name == "none":
        assert 0 < accepted < verified


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_attention_implementations_give_the_plain_text(family, implementation):
    """Both of torch's attention paths; the implementation is what it was afterwards."""
    w = world(family)
    target = talking_target(family)
    target.set_attn_implementation(implementation)
    assert torch.equal(speculate(target, w.drafter, w.inputs(3)), plain(target, w.inputs(3)))
    assert target.config._attn_implementation == implementation


def test_prompts_longer_than_a_sliding_window():
    """Prompts of five windows, read in one pass and in pieces."""
    w = world("mistral")
    inputs = left_padded(random_prompts((45, 38, 3), seed=4))
    expected = plain(w.target, inputs)
    assert torch.equal(speculate(w.target, w.drafter, inputs), expected)
    assert torch.equal(speculate(w.target, w.drafter, inputs, prefill_chunk_size=7), expected)


@pytest.mark.parametrize("chunk", [1, 5, 8, 64])
def test_prompts_read_in_chunks(chunk):
    """`prefill_chunk_size` changes neither text nor what the drafter sees: as much is accepted as in one pass."""
    w = world()
    inputs = left_padded(random_prompts((40, 9, 23), seed=7))
    whole = speculate(w.target, w.drafter, inputs, return_dict_in_generate=True)
    pieces = speculate(w.target, w.drafter, inputs, return_dict_in_generate=True, prefill_chunk_size=chunk)
    assert torch.equal(whole.sequences, plain(w.target, inputs))
    assert torch.equal(pieces.sequences, whole.sequences)
    assert [r.accepted for r in pieces.stats.rows] == [r.accepted for r in whole.stats.rows]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_prompt_longer_than_one_pass(family):
    """2,100 tokens are more than a prompt pass takes; beside it a row of five tokens."""
    w = world(family)
    inputs = left_padded(random_prompts((2100, 5), seed=2))
    options = {"max_new_tokens": 10}
    assert torch.equal(speculate(w.target, w.drafter, inputs, **options), plain(w.target, inputs, **options))


_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
    "pad_token_id": PAD,
}


def _gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(
        Gemma2Config(
            **_SHAPE,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            attn_implementation="eager",
        )
    )


def _gpt_oss() -> PreTrainedModel:
    config = GptOssConfig(
        **_SHAPE,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    model = GptOssForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


@pytest.mark.parametrize("make", [_gemma2, _gpt_oss])
def test_soft_caps_and_attention_sinks(make):
    """Gemma2's capped scores and GPT-OSS's sinks are part of attention, in ragged passes too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        target = make().to(torch.float32).eval()
    w = make_world(target, mask_token_id=MASK)
    inputs = left_padded(random_prompts((20, 9, 13), seed=1))
    out = speculate(target, w.drafter, w.inputs(3), return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain(target, w.inputs(3)))
    assert counts(out)[0] > 0
    assert torch.equal(speculate(target, w.drafter, inputs), plain(target, inputs))


def test_a_never_emitted_eos_is_what_these_tests_mean_by_no_end():
    """The helpers' end id lies outside the vocabulary, so texts reach their full length."""
    assert NEVER >= VOCAB
    assert plain_tokens("llama", 3).shape[1] == world().inputs(3)["input_ids"].shape[1] + 24
