"""The drafter's forward passes against the straight-line reference; casts, copies and pickles."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch

from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.cache.layout import RowLayout
from hf_dspark.configuration_dspark import DSparkConfig
from hf_dspark.models.modeling_dspark import DSparkDrafter
from tests.models.drafting import draft, random_taps
from tests.reference import reference_of
from tests.tiny import HIDDEN, VOCAB, tiny_drafter, tiny_llama, tiny_target

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def greedy_chain(drafter: DSparkDrafter, h: torch.Tensor, anchors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and logits of the sequential stage, through the head's step."""
    u, head, previous, tokens, logits = drafter.base_logits(h), drafter.markov_head, anchors, [], []
    state = None if head is None else head.initial_state(h[:, 0])
    for k in range(h.shape[1]):
        step_logits = u[:, k]
        if head is not None:
            latent, state = head.step(previous, h[:, k], state)
            step_logits = step_logits + head.project(latent)
        previous = drafter.to_target_ids(step_logits.argmax(-1))
        tokens.append(previous)
        logits.append(step_logits)
    return torch.stack(tokens, 1), torch.stack(logits, 1)


# ------------------------------------------------------------------------------------------------------------- drafting


@torch.no_grad()
@pytest.mark.parametrize(
    ("head", "reduced"), [("vanilla", False), ("vanilla", True), ("gated", False), ("rnn", True), ("none", False), ("none", True)]
)
def test_block_equals_the_straight_line_reference(head: str, reduced: bool) -> None:
    """Hidden states, base logits, greedy chain and confidence of three ragged rows equal the reference row by row."""
    target = tiny_llama()
    drafter = tiny_drafter(target, head, draft_token_ids=torch.arange(1, VOCAB, 3) if reduced else None)
    reference = reference_of(drafter, target)
    taps, anchors = [random_taps(drafter, n, seed=n) for n in (4, 9, 1)], [11, 5, 60]
    h = draft(drafter, taps, anchors)
    tokens, logits = greedy_chain(drafter, h, torch.tensor(anchors))
    confidence = drafter.confidence(h, torch.cat((torch.tensor(anchors)[:, None], tokens[:, :-1]), 1))
    for row, (anchor, context) in enumerate(zip(anchors, taps, strict=True)):
        expected = reference.hidden(anchor, context)
        torch.testing.assert_close(h[row], expected, **TOLERANCE)
        torch.testing.assert_close(drafter.base_logits(h[row]), reference.base_logits(expected), **TOLERANCE)
        expected_tokens, expected_logits = reference.chain(anchor, expected)
        assert tokens[row].tolist() == expected_tokens
        torch.testing.assert_close(logits[row], expected_logits, **TOLERANCE)
        torch.testing.assert_close(confidence[row], reference.confidence(anchor, expected_tokens, expected), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(("family", "gamma"), [("gemma3", 5), ("gpt2", 5), ("qwen3", 3)])
def test_other_families_and_shorter_blocks_equal_the_reference(family: str, gamma: int) -> None:
    """Scaled embeddings, GELU, head sizes that differ from width / heads, and a block of fewer tokens than trained for."""
    target = tiny_target(family)
    drafter = tiny_drafter(target, "gated")
    reference, taps = dataclasses.replace(reference_of(drafter, target), gamma=gamma), random_taps(drafter, 5)
    torch.testing.assert_close(draft(drafter, [taps], [17], gamma)[0], reference.hidden(17, taps), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("head", ["vanilla", "none"])
def test_confidence_without_the_markov_feature(head: str) -> None:
    """Without the Markov feature the confidence depends on the hidden state alone, as in the reference."""
    target = tiny_llama()
    drafter = tiny_drafter(target, head, confidence_head_with_markov=False)
    h = torch.randn(1, 5, HIDDEN)
    for previous in (0, 8):
        found = drafter.confidence(h, torch.full((1, 5), previous))
        torch.testing.assert_close(found[0], reference_of(drafter, target).confidence(9, [0] * 5, h[0]), **TOLERANCE)


def test_no_confidence_head_gives_none() -> None:
    """A drafter without a confidence head returns None."""
    drafter = tiny_drafter(tiny_llama(), enable_confidence_head=False)
    assert drafter.confidence(torch.randn(1, 5, HIDDEN), torch.zeros(1, 5, dtype=torch.long)) is None


def test_context_in_pieces_equals_context_at_once() -> None:
    """Extending the context in ragged pieces, with a draft in between, gives the hidden states of one extension."""
    drafter = tiny_drafter(tiny_llama())
    taps, anchors = [random_taps(drafter, n, seed=n) for n in (7, 12)], [4, 8]
    cache, starts = RowCache(), [0, 0]
    cache.add_rows(2)
    for counts in ([1, 6], [4, 1], [2, 5]):
        pieces = torch.cat([t[s : s + c] for t, s, c in zip(taps, starts, counts, strict=True)])
        drafter.extend_context(pieces, RowLayout(starts, counts), cache)
        starts = [s + c for s, c in zip(starts, counts, strict=True)]
        drafter.draft_hidden(torch.tensor([30, 31]), starts, cache)  # leaves scratch behind
    torch.testing.assert_close(drafter.draft_hidden(torch.tensor(anchors), starts, cache), draft(drafter, taps, anchors), **TOLERANCE)


@pytest.mark.parametrize("gamma", [0, 6])
def test_a_block_longer_than_the_checkpoints_is_refused(gamma: int) -> None:
    """Drafting more tokens than trained for, or none, is a ValueError that names the limit."""
    drafter = tiny_drafter(tiny_llama())
    with pytest.raises(ValueError, match=rf"1\.\.5, .* trained for; got {gamma}"):
        draft(drafter, [random_taps(drafter, 2)], [5], gamma)


def test_a_drafter_needs_a_mask_token() -> None:
    """A config without a mask token cannot become a drafter."""
    with pytest.raises(ValueError, match="mask_token_id is None"):
        DSparkDrafter(DSparkConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1, head_dim=8))


# ------------------------------------------------------------------------------------------------------------- training


def test_training_hidden_equals_draft_hidden_for_each_anchor() -> None:
    """Every anchor's block, trained beside others, equals that block drafted alone after the context before it."""
    drafter = tiny_drafter(tiny_llama())
    taps = random_taps(drafter, 2, 10)
    ids, positions = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([[1, 4, 9], [3, 3, 7]])
    trained = drafter.training_hidden(taps, ids, positions)
    assert trained.shape == (2, 3, 5, HIDDEN)
    for b in range(2):
        contexts = [taps[b, :position] for position in positions[b]]
        torch.testing.assert_close(trained[b], draft(drafter, contexts, ids[b].tolist()), **TOLERANCE)


def test_training_ignores_what_the_context_mask_hides() -> None:
    """Padding behind false entries of the mask can hold anything."""
    drafter = tiny_drafter(tiny_llama())
    taps, mask = random_taps(drafter, 1, 8), torch.tensor([[True] * 5 + [False] * 3])
    noisy = taps.clone()
    noisy[:, 5:] = 99.0
    a, b = (drafter.training_hidden(t, torch.tensor([[5]]), torch.tensor([[8]]), context_mask=mask) for t in (taps, noisy))
    torch.testing.assert_close(a, b)


def test_gradients_reach_every_parameter_and_nothing_of_the_target() -> None:
    """A loss through hidden states, head and confidence trains all of the drafter, and only it."""
    target = tiny_llama()
    drafter = tiny_drafter(target, "rnn").train()
    h = drafter(random_taps(drafter, 1, 6), torch.tensor([[5, 6]]), torch.tensor([[2, 4]]))
    previous = torch.randint(VOCAB, (1, 2, 5))
    logits = drafter.base_logits(h) + drafter.markov_head.project(drafter.markov_head.block(previous, h))
    (logits.logsumexp(-1).sum() + drafter.confidence(h, previous).sum()).backward()
    assert [name for name, p in drafter.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert all(p.grad is None for p in target.parameters())


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    """Recomputing layers in the backward pass changes no gradient."""
    drafter = tiny_drafter(tiny_llama()).train()
    taps, ids, positions = random_taps(drafter, 1, 6), torch.tensor([[5, 6]]), torch.tensor([[2, 4]])
    gradients = []
    for enable in (False, True):
        if enable:
            drafter.gradient_checkpointing_enable()
        drafter.zero_grad()
        drafter(taps, ids, positions).square().sum().backward()
        gradients.append(drafter.fc.weight.grad.clone())
    torch.testing.assert_close(*gradients)


# ----------------------------------------------------------------------------------------------- casts, copies, pickles


def test_a_cast_leaves_the_target_and_the_frequencies_alone() -> None:
    """A drafter cast to bfloat16 drafts with its float32 target; RoPE frequencies stay exactly what they were."""
    target = tiny_llama()
    exact, drafter = tiny_drafter(target), tiny_drafter(target).to(torch.bfloat16)
    assert {p.dtype for p in target.parameters()} == {torch.float32}
    assert torch.equal(drafter.rotary_emb.inv_freq, exact.rotary_emb.inv_freq)
    taps = random_taps(drafter, 4)
    h = draft(drafter, [taps], [5])
    assert h.dtype == torch.bfloat16
    assert drafter.base_logits(h).dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(h.float().flatten(), draft(exact, [taps], [5]).flatten(), dim=0) > 0.99


def test_a_deep_copy_shares_the_target_and_nothing_else() -> None:
    """Copying a drafter copies its own weights and stays bound to the same target."""
    target = tiny_llama()
    drafter = tiny_drafter(target)
    twin = copy.deepcopy(drafter)
    assert twin.target is target
    assert {p.data_ptr() for p in twin.parameters()}.isdisjoint(p.data_ptr() for p in drafter.parameters())
    taps = random_taps(drafter, 3)
    torch.testing.assert_close(draft(twin, [taps], [5]), draft(drafter, [taps], [5]))


def test_a_pickled_drafter_comes_back_unbound_and_small() -> None:
    """A pickle holds the drafter's weights, not the target's, and binds again to the same results."""
    target = tiny_llama()
    drafter = tiny_drafter(target, draft_token_ids=torch.arange(30))
    data = pickle.dumps(drafter)
    own = sum(t.numel() * t.element_size() for t in drafter.state_dict().values())
    assert len(data) < own + 60_000
    assert target.get_input_embeddings().weight.detach().numpy().tobytes() not in data
    again = pickle.loads(data)
    assert not again.bound
    taps = random_taps(drafter, 3)
    torch.testing.assert_close(draft(again.bind(target), [taps], [5]), draft(drafter, [taps], [5]))
