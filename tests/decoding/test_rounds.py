"""What happens inside rounds: every draft against the straight-line reference on the committed text, and what caches hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Qwen3Config

import hf_dspark
from hf_dspark.configuration_dspark import DSparkConfig
from hf_dspark.decoding import loop as decoding
from hf_dspark.models.backbone import DSparkRotaryEmbedding
from hf_dspark.utils.compat import CACHE
from tests.reference import HEADS, reference_of
from tests.tiny import PAD, tiny_drafter, tiny_llama, tiny_target

PROMPTS = [[11, 5, 60, 7], [9, 4, 33, 8, 70, 71, 12], [21]]


def left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
    }


@torch.no_grad()
def plain_taps(target: Any, ids: list[int], layers: list[int]) -> torch.Tensor:
    """Outputs of layers for a text, from a plain forward: layer i is hidden_states[i + 1]."""
    states = target(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    return torch.cat([states[i + 1][0] for i in layers], dim=-1)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Notes what goes into each draft and what comes out; changes nothing."""
    noted: list[dict[str, Any]] = []

    def note(drafter: Any, anchors: torch.Tensor, starts: list[int], cache: Any, **options: Any) -> Any:
        block = right(drafter, anchors, starts, cache, **options)
        noted.append({"anchors": anchors.tolist(), "starts": list(starts), "block": block})
        return block

    right = decoding.draft_block
    monkeypatch.setattr(decoding, "draft_block", note)
    return noted


def committed_texts(output: Any) -> list[list[int]]:
    width = max(map(len, PROMPTS))
    return [p + output.sequences[row, width:].tolist() for row, p in enumerate(PROMPTS)]


def rows_of(noted: dict[str, Any], texts: list[list[int]]) -> list[int]:
    """Which rows of the batch a round's rows are: all in order, or, where some have left, those whose text goes on at
    the anchor.
    """
    if len(noted["anchors"]) == len(texts):
        return list(range(len(texts)))
    found = []
    for anchor, start in zip(noted["anchors"], noted["starts"], strict=True):
        fitting = [row for row, text in enumerate(texts) if start < len(text) and text[start] == anchor and row not in found]
        assert len(fitting) == 1  # the seed is such that texts tell rows apart
        found += fitting
    return found


@pytest.mark.parametrize("head", HEADS)
def test_every_draft_is_the_references_on_the_committed_text(rounds: list[dict[str, Any]], head: str) -> None:
    """In every round and row the greedy block equals the reference's, given taps of a plain forward over what was
    committed before the anchor.

    This fails when the anchor is not the first predicting slot, sits one position off, taps are one layer or one
    token off, or anything rejected stays in the drafter's context.
    """
    target = tiny_llama(3)
    drafter = tiny_drafter(target, head)
    reference, layers = reference_of(drafter, target), drafter.config.target_layer_ids
    out = hf_dspark.generate(
        target,
        drafter,
        **left_padded(PROMPTS),
        max_new_tokens=6,
        eos_token_id=[],
        budget="full",
        return_dict_in_generate=True,
    )
    texts = committed_texts(out)
    assert len(rounds) >= 3
    for noted in rounds:
        for index, row in enumerate(rows_of(noted, texts)):
            anchor, start = noted["anchors"][index], noted["starts"][index]
            assert texts[row][start] == anchor
            h = reference.hidden(anchor, plain_taps(target, texts[row][:start], layers))
            assert noted["block"].tokens[index].tolist() == reference.chain(anchor, h)[0]


@pytest.mark.parametrize("head", HEADS)
def test_p_d_is_the_references_after_the_users_warpers(rounds: list[dict[str, Any]], head: str) -> None:
    """In rounds with acceptances and rejections, p_d is the reference's distribution after temperature and top-k,
    given the tokens drawn.
    """
    target = tiny_llama(3)
    drafter = tiny_drafter(target, head)
    reference, layers = reference_of(drafter, target), drafter.config.target_layer_ids
    out = hf_dspark.generate(
        target,
        drafter,
        **left_padded(PROMPTS),
        max_new_tokens=10,
        eos_token_id=[],
        do_sample=True,
        temperature=4.0,
        top_k=90,
        seed=6,
        verification="token",  # the block rule keeps nearly all of the recurrent head's
        return_dict_in_generate=True,
    )
    texts, stats = committed_texts(out), out.stats
    accepted, verified = (sum(getattr(row, name) for row in stats.rows) for name in ("accepted", "verified"))
    assert 5 <= accepted <= verified - 5
    assert len(rounds) >= 3
    for noted in rounds:
        for index, row in enumerate(rows_of(noted, texts)):
            anchor, start, block = noted["anchors"][index], noted["starts"][index], noted["block"]
            assert texts[row][start] == anchor
            tokens = block.tokens[index].tolist()
            h = reference.hidden(anchor, plain_taps(target, texts[row][:start], layers))
            logits = reference.chain(anchor, h, forced=tokens)[1] / 4.0
            logits[logits < logits.topk(90).values[:, -1:]] = float("-inf")
            torch.testing.assert_close(block.probs[index], logits.softmax(-1), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(block.drawn[index], block.probs[index, range(5), tokens])
            assert (block.drawn[index] > 0).all()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@torch.no_grad()
def test_the_targets_cache_keeps_committed_tokens_only(family: str) -> None:
    """After rounds with rejections the caller's cache holds the keys and values of a plain forward over the output
    but its last token.
    """
    target = tiny_target(family)
    drafter, cache = tiny_drafter(target), DynamicCache()
    out = hf_dspark.generate(
        target,
        drafter,
        input_ids=torch.tensor([PROMPTS[1]]),
        max_new_tokens=12,
        **{CACHE: cache},
        return_dict_in_generate=True,
    )
    row = out.stats.rows[0]
    assert row.verified > row.accepted  # something was rejected
    plain = target(input_ids=out.sequences[:, :-1], use_cache=True)[CACHE]
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    for mine, theirs in zip(cache.layers, plain.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [0, 6])
def test_a_block_longer_than_the_checkpoints_is_refused_before_anything_runs(rounds: list[dict[str, Any]], gamma: int) -> None:
    """Acceptance collapses beyond the trained length, so it is an error that names the limit; shorter blocks are
    drafted.
    """
    target = tiny_llama()
    drafter = tiny_drafter(target)
    with pytest.raises(ValueError, match=r"1\.\.5"):
        hf_dspark.generate(target, drafter, **left_padded(PROMPTS), max_new_tokens=4, block_size=gamma)
    assert rounds == []
    hf_dspark.generate(target, drafter, **left_padded(PROMPTS), max_new_tokens=9, block_size=2)
    assert {noted["block"].block_size for noted in rounds} == {2}


def test_static_budgets_draft_no_more_than_they_verify(rounds: list[dict[str, Any]]) -> None:
    """static:2 draws two tokens of the block, static:0 does not ask the drafter at all: time is saved, not only
    counts.
    """
    target = tiny_llama()
    drafter = tiny_drafter(target)
    hf_dspark.generate(target, drafter, **left_padded(PROMPTS), max_new_tokens=9, budget="static:2")
    assert {noted["block"].block_size for noted in rounds} == {2}
    rounds.clear()
    hf_dspark.generate(target, drafter, **left_padded(PROMPTS), max_new_tokens=4, budget="static:0")
    assert rounds == []


@pytest.mark.parametrize("budget", ["full", "static:1", "static:3", "threshold:0.5"])
def test_the_target_sees_anchors_and_verified_tokens_only(monkeypatch: pytest.MonkeyPatch, budget: str) -> None:
    """Linear layers run over sum(1 + l_r) tokens: what the budget cuts, and rows that have ended, cost nothing."""
    target = tiny_llama()
    drafter = tiny_drafter(target)
    hf_dspark.generate(target, drafter, **left_padded(PROMPTS), max_new_tokens=1)  # binding and the self-test run passes of their own
    seen: list[int] = []
    handle = target.model.layers[0].mlp.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[0] * args[0].shape[1]))
    out = hf_dspark.generate(
        target,
        drafter,
        **left_padded(PROMPTS),
        max_new_tokens=12,
        eos_token_id=[],
        budget=budget,
        return_dict_in_generate=True,
    )
    handle.remove()
    prompts = sum(map(len, PROMPTS))
    assert sum(seen) == prompts + sum(row.rounds + row.verified for row in out.stats.rows)
    assert max(seen[1:]) <= len(PROMPTS) * 6


def test_yarn_frequencies_follow_its_formula() -> None:
    """A drafter for a YaRN target rotates as the target does: `rope_parameters` count, not a top-level theta.

    Source: Peng et al. 2023 (arXiv 2309.00071), sections 3.2 and 3.4.
    """
    theta, factor, original, dim = 1e6, 4.0, 256, 16
    rope = {"rope_type": "yarn", "rope_theta": theta, "factor": factor, "original_max_position_embeddings": original}
    target = Qwen3Config(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=dim, num_hidden_layers=4, vocab_size=50)
    target.rope_parameters = rope
    config = DSparkConfig.from_target_config(target, mask_token_id=3, num_hidden_layers=1)

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), dim - 1)
    expected = []
    for i in range(dim // 2):
        slow = min(max((i - low) / (high - low), 0.0), 1.0)
        frequency = theta ** (-2 * i / dim)
        expected.append(frequency * (1 - slow) + frequency / factor * slow)
    embedding = DSparkRotaryEmbedding(config)
    torch.testing.assert_close(embedding.inv_freq, torch.tensor(expected))
    assert embedding.attention_scaling == pytest.approx(0.1 * math.log(factor) + 1.0)
