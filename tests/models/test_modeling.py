"""The drafter against the straight-line reference, and its manners: borrowing, copying, saving, refusing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from hf_dspark.cache.kv_cache import RowCache, RowLayout
from hf_dspark.configuration_dspark import DSparkConfig
from hf_dspark.errors import BindingError, CheckpointError, UnboundDrafterError
from hf_dspark.models.modeling_dspark import DSparkDrafter, choose_mask_token_id
from tests.reference import ReferenceDrafter
from tests.tiny import EOS, HIDDEN, MASK, PAD, VOCAB, tiny_drafter, tiny_llama, tiny_target

HEADS = ["vanilla", "gated", "rnn", "none"]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def reference_of(drafter: DSparkDrafter, target: nn.Module) -> ReferenceDrafter:
    config = drafter.config
    return ReferenceDrafter(
        weights={name: tensor.detach() for name, tensor in drafter.state_dict().items()},
        embedding=target.get_input_embeddings()(torch.arange(VOCAB)).detach(),
        lm_head=target.get_output_embeddings().weight.detach(),
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
        theta=config.rope_parameters["rope_theta"],
        gamma=config.block_size,
        mask_id=config.mask_token_id,
        head_type="none" if config.markov_rank == 0 else config.markov_head_type,
        confidence_with_markov=bool(config.confidence_head_with_markov),
        draft_ids=drafter.draft_token_ids,
        activation=config.hidden_act,
    )


def random_taps(drafter: DSparkDrafter, *shape: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randn(*shape, len(drafter.config.target_layer_ids) * HIDDEN, generator=generator)


def draft(drafter: DSparkDrafter, taps: list[torch.Tensor], anchors: list[int], gamma: int | None = None) -> tuple[torch.Tensor, RowCache]:
    """Hidden states of one block a row, after contexts of different lengths."""
    cache, starts = RowCache(), [len(t) for t in taps]
    cache.add_rows(len(taps))
    drafter.extend_context(torch.cat(taps), RowLayout([0] * len(taps), starts), cache)
    cache.lengths = starts
    return drafter.draft_hidden(torch.tensor(anchors), starts, cache, gamma), cache


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


# --------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("reduced", [False, True])
def test_block_equals_the_straight_line_reference(head: str, reduced: bool) -> None:
    """Hidden states, base logits, greedy chain and confidence of three ragged rows equal the reference row by row."""
    target = tiny_llama()
    ids = torch.arange(1, VOCAB, 3) if reduced else None
    drafter = tiny_drafter(target, head, draft_token_ids=ids)
    reference = reference_of(drafter, target)
    taps, anchors = [random_taps(drafter, n, seed=n) for n in (4, 9, 1)], [11, 5, 60]
    with torch.no_grad():
        h, _ = draft(drafter, taps, anchors)
        tokens, logits = greedy_chain(drafter, h, torch.tensor(anchors))
        previous = torch.cat((torch.tensor(anchors)[:, None], tokens[:, :-1]), 1)
        confidence = drafter.confidence(h, previous)
        for row, (anchor, context) in enumerate(zip(anchors, taps, strict=True)):
            expected = reference.hidden(anchor, context)
            torch.testing.assert_close(h[row], expected, **TOLERANCE)
            torch.testing.assert_close(drafter.base_logits(h[row]), reference.base_logits(expected), **TOLERANCE)
            expected_tokens, expected_logits = reference.chain(anchor, expected)
            assert tokens[row].tolist() == expected_tokens
            torch.testing.assert_close(logits[row], expected_logits, **TOLERANCE)
            torch.testing.assert_close(confidence[row], reference.confidence(anchor, expected_tokens, expected), **TOLERANCE)


@pytest.mark.parametrize("head", ["vanilla", "none"])
def test_confidence_without_the_markov_feature(head: str) -> None:
    """Without the Markov feature the confidence depends on the hidden state alone, as in the reference."""
    target = tiny_llama()
    drafter = tiny_drafter(target, head, confidence_head_with_markov=False)
    reference, taps = reference_of(drafter, target), random_taps(drafter, 6)
    assert drafter.confidence_head.proj.weight.shape == (1, HIDDEN)
    with torch.no_grad():
        h, _ = draft(drafter, [taps], [9])
        expected = reference.hidden(9, taps)
        for previous in (torch.zeros(1, 5, dtype=torch.long), torch.full((1, 5), 8)):
            torch.testing.assert_close(drafter.confidence(h, previous)[0], reference.confidence(9, [0] * 5, expected), **TOLERANCE)


def test_no_confidence_head_gives_none() -> None:
    """A drafter without a confidence head says None, not a made-up number."""
    drafter = tiny_drafter(tiny_llama(), enable_confidence_head=False)
    assert drafter.confidence(torch.randn(1, 5, HIDDEN), torch.zeros(1, 5, dtype=torch.long)) is None


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "qwen3"])
def test_other_families_equal_the_reference_too(family: str) -> None:
    """Scaled embeddings, GELU and head sizes that differ from width / heads come out right."""
    target = tiny_target(family)
    drafter = tiny_drafter(target, "gated")
    reference, taps = reference_of(drafter, target), random_taps(drafter, 5)
    with torch.no_grad():
        h, _ = draft(drafter, [taps], [17])
    torch.testing.assert_close(h[0], reference.hidden(17, taps), **TOLERANCE)


def test_context_in_pieces_equals_context_at_once() -> None:
    """Extending the context in ragged pieces, with a draft in between, gives the hidden states of one extension."""
    drafter = tiny_drafter(tiny_llama())
    taps, anchors = [random_taps(drafter, n, seed=n) for n in (7, 12)], [4, 8]
    whole, _ = draft(drafter, taps, anchors)
    cache, starts = RowCache(), [0, 0]
    cache.add_rows(2)
    for counts in ([1, 6], [4, 1], [2, 5]):
        pieces = torch.cat([t[s : s + c] for t, s, c in zip(taps, starts, counts, strict=True)])
        drafter.extend_context(pieces, RowLayout(starts, counts), cache)
        starts = cache.lengths = [s + c for s, c in zip(starts, counts, strict=True)]
        drafter.draft_hidden(torch.tensor([30, 31]), starts, cache)  # leaves scratch behind
    torch.testing.assert_close(drafter.draft_hidden(torch.tensor(anchors), starts, cache), whole, **TOLERANCE)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Drafting a row alone and between rows of other lengths gives the same hidden states."""
    drafter = tiny_drafter(tiny_llama())
    taps = [random_taps(drafter, n, seed=n) for n in (3, 20, 8)]
    together, _ = draft(drafter, taps, [5, 6, 7])
    for row in range(3):
        alone, _ = draft(drafter, [taps[row]], [5 + row])
        torch.testing.assert_close(together[row], alone[0], **TOLERANCE)


def test_drafting_touches_no_committed_length() -> None:
    """Neither call moves the cache's lengths: committing is the loop's business."""
    drafter = tiny_drafter(tiny_llama())
    cache = RowCache()
    cache.add_rows(1)
    drafter.extend_context(random_taps(drafter, 4), RowLayout([0], [4]), cache)
    drafter.draft_hidden(torch.tensor([5]), [4], cache)
    assert cache.lengths == [0]


def test_the_anchor_sits_at_its_own_position() -> None:
    """The block starts at position S after S context tokens: moving it by one changes the hidden states."""
    drafter = tiny_drafter(tiny_llama())
    taps = random_taps(drafter, 6)
    right, _ = draft(drafter, [taps], [5])
    trained = drafter.training_hidden(taps[None], torch.tensor([[5]]), torch.tensor([[7]]))
    assert not torch.allclose(right[0], trained[0, 0], atol=1e-3)


def test_a_block_is_bidirectional_and_shorter_blocks_are_allowed() -> None:
    """Fewer tokens than the block give other hidden states, because each position sees all of them."""
    drafter = tiny_drafter(tiny_llama())
    taps = random_taps(drafter, 6)
    long, short = draft(drafter, [taps], [5])[0], draft(drafter, [taps], [5], gamma=3)[0]
    assert short.shape == (1, 3, HIDDEN)
    assert not torch.allclose(long[:, :3], short, atol=1e-3)


@pytest.mark.parametrize("gamma", [0, 6])
def test_a_block_longer_than_the_checkpoints_is_refused(gamma: int) -> None:
    """Drafting more tokens than trained for, or none, is a ValueError that names the limit."""
    drafter = tiny_drafter(tiny_llama())
    with pytest.raises(ValueError, match=r"trained for 1\.\.5"):
        draft(drafter, [random_taps(drafter, 2)], [5], gamma)


# ------------------------------------------------------------------------------------------------------------- training


def test_training_hidden_equals_draft_hidden_for_each_anchor() -> None:
    """Every anchor's block, trained beside others, equals that block drafted alone after the context before it."""
    drafter = tiny_drafter(tiny_llama())
    taps = random_taps(drafter, 2, 10)
    ids, positions = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([[1, 4, 9], [3, 3, 7]])
    trained = drafter.training_hidden(taps, ids, positions)
    assert trained.shape == (2, 3, 5, HIDDEN)
    for b in range(2):
        for a in range(3):
            alone, _ = draft(drafter, [taps[b, : positions[b, a]]], [int(ids[b, a])])
            torch.testing.assert_close(trained[b, a], alone[0], **TOLERANCE)


def test_training_ignores_what_the_context_mask_hides() -> None:
    """Padding behind false entries of the mask can hold anything."""
    drafter = tiny_drafter(tiny_llama())
    taps, mask = random_taps(drafter, 1, 8), torch.tensor([[True] * 5 + [False] * 3])
    ids, positions = torch.tensor([[5]]), torch.tensor([[8]])
    noisy = taps.clone()
    noisy[:, 5:] = 99.0
    a, b = (drafter.training_hidden(t, ids, positions, context_mask=mask) for t in (taps, noisy))
    torch.testing.assert_close(a, b)


def test_gradients_reach_every_parameter_and_nothing_of_the_target() -> None:
    """A loss through hidden states, head and confidence trains all of the drafter, and only it."""
    target = tiny_llama()
    drafter = tiny_drafter(target, "rnn").train()
    ids, positions = torch.tensor([[5, 6]]), torch.tensor([[2, 4]])
    h = drafter(random_taps(drafter, 1, 6), ids, positions)
    previous = torch.randint(VOCAB, (1, 2, 5))
    logits = drafter.base_logits(h) + drafter.markov_head.project(drafter.markov_head.block(previous, h))
    (logits.logsumexp(-1).sum() + drafter.confidence(h, previous).sum()).backward()
    assert [name for name, p in drafter.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert all(p.grad is None for p in target.parameters())


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    """Recomputing layers in the backward pass changes nothing but memory."""
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


# --------------------------------------------------------------------------------------------------- reduced vocabulary


def test_reduced_vocabulary_maps_and_widens() -> None:
    """Draft ids map to the given target ids, and widened probabilities keep their mass there and are zero elsewhere."""
    target, ids = tiny_llama(), torch.tensor([90, 2, 17, 40])
    drafter = tiny_drafter(target, draft_token_ids=ids)
    in_order = ids.sort().values
    assert torch.equal(drafter.to_target_ids(torch.arange(4)), in_order)
    p = torch.rand(2, 3, 4).softmax(-1)
    wide = drafter.widen(p)
    assert wide.shape == (2, 3, VOCAB)
    torch.testing.assert_close(wide[..., in_order], p)
    torch.testing.assert_close(wide.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(drafter.base_logits(torch.ones(HIDDEN)), target.lm_head.weight[in_order].sum(-1))


def test_reduced_logits_follow_a_head_that_changes() -> None:
    """The kept rows of the head are read again after the target's head was written to."""
    target = tiny_llama()
    drafter = tiny_drafter(target, draft_token_ids=torch.arange(0, 20))
    h = torch.randn(HIDDEN)
    before = drafter.base_logits(h)
    with torch.no_grad():
        target.lm_head.weight.mul_(2.0)
    torch.testing.assert_close(drafter.base_logits(h), 2.0 * before)


@pytest.mark.parametrize(
    ("ids", "message"),
    [([1, 97], r"0\.\.96"), ([1, 1], "must not repeat"), ([[1, 2]], "1-D"), ([], "non-empty"), ([0.5], "token ids")],
)
def test_impossible_draft_vocabularies_are_refused(ids: list, message: str) -> None:
    """Draft ids outside the vocabulary, repeated, or not a list of ids are a ValueError."""
    with pytest.raises(ValueError, match=message):
        tiny_drafter(tiny_llama(), draft_token_ids=torch.tensor(ids))


def test_whole_vocabulary_passes_through() -> None:
    """Without a reduced vocabulary, mapping and widening return what they got."""
    drafter, p = tiny_drafter(tiny_llama()), torch.rand(3, VOCAB)
    assert drafter.widen(p) is p
    assert drafter.draft_token_ids is None


# ------------------------------------------------------------------------------------------------------------- survival


def test_survival_is_the_running_product_of_calibrated_confidences() -> None:
    """a_k multiplies sigmoid(logit / T) over the positions so far, also for fewer positions than temperatures."""
    drafter = tiny_drafter(tiny_llama(), confidence_temperatures=[1.0, 2.0, 0.5, 1.0, 4.0])
    logits = torch.tensor([[1.0, -2.0, 0.5]])
    c = [1 / (1 + torch.exp(torch.tensor(-x))) for x in (1.0, -1.0, 1.0)]
    torch.testing.assert_close(drafter.survival(logits)[0], torch.stack([c[0], c[0] * c[1], c[0] * c[1] * c[2]]))
    drafter.config.confidence_temperatures = None
    torch.testing.assert_close(drafter.survival(logits)[0, 0], c[0])


# -------------------------------------------------------------------------------------------------------------- binding


def test_an_unbound_drafter_says_how_to_bind_it() -> None:
    """Every use of the target's embedding or head before bind names the fix."""
    drafter = DSparkDrafter(tiny_drafter(tiny_llama()).config)
    cache = RowCache()
    cache.add_rows(1)
    for use in (
        lambda: drafter.base_logits(torch.zeros(HIDDEN)),
        lambda: drafter.draft_hidden(torch.tensor([5]), [0], cache),
        lambda: drafter.training_hidden(random_taps(drafter, 1, 3), torch.tensor([[5]]), torch.tensor([[1]])),
    ):
        with pytest.raises(UnboundDrafterError, match=r"drafter\.bind\(target\)"):
            use()
    assert not drafter.bound
    assert drafter.target is None


def test_binding_lists_everything_that_does_not_fit() -> None:
    """Width, vocabulary and depth of another target are reported together."""
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            pad_token_id=0,
        )
    )
    with pytest.raises(BindingError) as caught:
        tiny_drafter(tiny_llama()).bind(other)
    for part in (
        "hidden size: the drafter was made for 32, the target has 16",
        "vocabulary",
        "decoder layers",
        "from_target",
    ):
        assert part in str(caught.value)


def test_binding_needs_a_causal_language_model() -> None:
    """A base model without a head is refused with the class to use."""
    target = tiny_llama()
    with pytest.raises(BindingError, match="AutoModelForCausalLM"):
        tiny_drafter(target).bind(target.model)


def test_rebinding_follows_the_new_target() -> None:
    """Binding twice to one target changes nothing; binding to another one uses that one's head."""
    first, second = tiny_llama(), tiny_llama(seed=5)
    drafter, h = tiny_drafter(first), torch.randn(HIDDEN)
    kept = drafter._borrowed
    assert drafter.bind(first)._borrowed is kept
    drafter.bind(second)
    assert drafter.target is second
    torch.testing.assert_close(drafter.base_logits(h), second.lm_head(h))


def test_a_peft_wrapped_target_can_be_bound() -> None:
    """A PEFT wrapper gives the embedding and head of the model inside, adapters included."""
    peft = pytest.importorskip("peft")
    target, drafter = tiny_llama(), tiny_drafter(tiny_llama())
    wrapped = peft.get_peft_model(target, peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    drafter.bind(wrapped)
    h = torch.randn(2, HIDDEN)
    torch.testing.assert_close(drafter.base_logits(h), wrapped.base_model.model.lm_head(h))


def test_peft_adapters_fit_the_drafter(tmp_path) -> None:
    """LoRA on the drafter changes its hidden states, saves, and loads back onto the same drafter."""
    peft = pytest.importorskip("peft")
    target = tiny_llama()
    drafter = tiny_drafter(target)
    taps, arguments = random_taps(drafter, 1, 6), (torch.tensor([[5]]), torch.tensor([[3]]))
    plain = drafter(taps, *arguments)
    base = copy.deepcopy(drafter)
    wrapped = peft.get_peft_model(drafter, peft.LoraConfig(target_modules=["q_proj", "fc"], init_lora_weights=False)).eval()
    adapted = wrapped(taps, *arguments)
    assert not torch.allclose(plain, adapted, atol=1e-3)
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(again(taps, *arguments), adapted)


def test_a_head_that_is_not_a_plain_linear_is_called() -> None:
    """A head with its own forward (quantized, adapted, hooked) is used through that forward, and reduced afterwards."""

    class Doubling(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * super().forward(x)

    target = tiny_llama()
    head = Doubling(HIDDEN, VOCAB, bias=False)
    target.set_output_embeddings(head)
    drafter, h = tiny_drafter(target, draft_token_ids=torch.arange(10, 20)), torch.randn(3, HIDDEN)
    torch.testing.assert_close(drafter.base_logits(h), 2.0 * (h @ head.weight.T)[:, 10:20])


def test_a_soft_capped_target_caps_the_base_logits() -> None:
    """A target whose config caps its logits caps U the same way, before any head adds to it."""
    target = tiny_target("gemma3")
    target.config.final_logit_softcapping = 3.0
    drafter, h = tiny_drafter(target), torch.randn(HIDDEN)
    torch.testing.assert_close(drafter.base_logits(h), 3.0 * torch.tanh(target.lm_head.weight @ h / 3.0))


# ----------------------------------------------------------------------------------------------- casts, copies, pickles


def test_casting_the_drafter_leaves_the_target_alone() -> None:
    """A drafter cast to bfloat16 still drafts with its float32 target, whose weights keep their dtype."""
    target = tiny_llama()
    drafter = tiny_drafter(target).to(torch.bfloat16)
    assert {p.dtype for p in target.parameters()} == {torch.float32}
    taps = random_taps(drafter, 4)
    h, _ = draft(drafter, [taps], [5])
    assert h.dtype == torch.bfloat16
    assert drafter.base_logits(h).dtype == torch.float32
    exact, _ = draft(tiny_drafter(target), [taps], [5])
    assert torch.nn.functional.cosine_similarity(h.float().flatten(), exact.flatten(), dim=0) > 0.99


def test_rope_frequencies_stay_float32_under_a_cast() -> None:
    """In bfloat16 the angles would be off by whole turns at long contexts, so a cast leaves them alone."""
    drafter = tiny_drafter(tiny_llama())
    before = drafter.rotary_emb.inv_freq.clone()
    drafter.to(torch.bfloat16)
    assert drafter.rotary_emb.inv_freq.dtype == torch.float32
    torch.testing.assert_close(drafter.rotary_emb.inv_freq, before, rtol=0, atol=0)


def test_parameters_train_and_the_target_is_not_among_them() -> None:
    """All parameters of the drafter require gradients; none is the target's embedding or head."""
    target = tiny_llama()
    drafter = tiny_drafter(target)
    assert all(p.requires_grad for p in drafter.parameters())
    assert {id(p) for p in drafter.parameters()}.isdisjoint({id(p) for p in target.parameters()})
    assert not any(word in name for name in drafter.state_dict() for word in ("embed_tokens", "lm_head", "inv_freq"))


def test_a_deep_copy_shares_the_target_and_nothing_else() -> None:
    """Copying a drafter copies its own weights and keeps borrowing the same embedding and head."""
    target = tiny_llama()
    drafter = tiny_drafter(target)
    twin = copy.deepcopy(drafter)
    assert twin.target is target
    assert twin._borrowed.embedding is target.get_input_embeddings()
    assert twin.fc.weight is not drafter.fc.weight
    taps = random_taps(drafter, 3)
    torch.testing.assert_close(draft(twin, [taps], [5])[0], draft(drafter, [taps], [5])[0])


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
    torch.testing.assert_close(draft(again.bind(target), [taps], [5])[0], draft(drafter, [taps], [5])[0])


# -------------------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("reduced", [False, True])
def test_save_and_load_round_trip(tmp_path, head: str, reduced: bool) -> None:
    """Every tensor comes back bit for bit, none is an embedding or head, and the loaded drafter drafts the same."""
    from safetensors import safe_open

    target = tiny_llama()
    drafter = tiny_drafter(target, head, draft_token_ids=torch.arange(0, 90, 2) if reduced else None)
    drafter.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    assert stored == set(drafter.state_dict())
    assert not [key for key in stored if "embed_tokens" in key or "lm_head" in key]
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is DSparkDrafter
    assert type(AutoConfig.from_pretrained(tmp_path)) is DSparkConfig
    assert all(torch.equal(a, loaded.state_dict()[name]) for name, a in drafter.state_dict().items())
    assert all(p.requires_grad for p in loaded.parameters())
    assert not loaded.training
    taps = random_taps(drafter, 4)
    torch.testing.assert_close(draft(loaded.bind(target), [taps], [5])[0], draft(drafter, [taps], [5])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frequencies_are_right_just_after_loading(tmp_path, dtype: torch.dtype) -> None:
    """Buffers that no file holds are computed on loading, exactly theta^(-2i/D) in float32, also for scaled RoPE."""
    target = tiny_llama()
    for rope in (
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    ):
        tiny_drafter(target, rope_parameters=dict(rope), dtype=dtype).save_pretrained(tmp_path)
        loaded = DSparkDrafter.from_pretrained(tmp_path)
        assert loaded.dtype == dtype
        expected = 500.0 ** (-torch.arange(0, 8, 2) / 8.0) / rope.get("factor", 1.0)
        torch.testing.assert_close(loaded.rotary_emb.inv_freq, expected)
        torch.testing.assert_close(loaded.rotary_emb.original_inv_freq, expected)


def test_a_sharded_save_loads(tmp_path) -> None:
    """Weights split over several files come back the same."""
    drafter = tiny_drafter(tiny_llama())
    drafter.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = DSparkDrafter.from_pretrained(tmp_path)
    assert all(torch.equal(a, loaded.state_dict()[name]) for name, a in drafter.state_dict().items())


def test_a_partial_own_checkpoint_is_refused_with_a_full_list(tmp_path) -> None:
    """Missing, unexpected, mis-shaped and mis-typed tensors are all named in one CheckpointError."""
    from safetensors.torch import load_file, save_file

    drafter = tiny_drafter(tiny_llama(), "gated", draft_token_ids=torch.arange(40))
    drafter.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["fc.weight"], tensors["layers.1.mlp.up_proj.weight"]
    tensors["layers.2.mlp.up_proj.weight"] = torch.zeros(3)
    tensors["hidden_norm.weight"] = torch.zeros(5)
    tensors["d2t"] = torch.zeros(40)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        DSparkDrafter.from_pretrained(tmp_path)
    message = str(caught.value)
    for line in (
        "2 missing, 1 unexpected, 1 mis-shaped, 1 mis-typed",
        "missing: fc.weight (32, 64)",
        "missing: layers.1.mlp.up_proj.weight",
        "unexpected: layers.2.mlp.up_proj.weight",
        "mis-shaped: hidden_norm.weight is (5,), expected (32,)",
        "mis-typed: d2t",
    ):
        assert line in message


def test_a_config_that_would_be_filled_with_defaults_is_refused(tmp_path) -> None:
    """Keys missing from config.json are named, instead of taking defaults of another model."""
    import json

    tiny_drafter(tiny_llama()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["target_layer_ids"], config["mask_token_id"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="lacks target_layer_ids, mask_token_id"):
        DSparkDrafter.from_pretrained(tmp_path)


def test_loading_with_a_longer_block_is_refused(tmp_path) -> None:
    """Overriding block_size upwards is a ValueError; downwards it loads."""
    tiny_drafter(tiny_llama()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"use 1\.\.5"):
        DSparkDrafter.from_pretrained(tmp_path, block_size=6)
    assert DSparkDrafter.from_pretrained(tmp_path, block_size=3).config.block_size == 3


def test_loading_in_another_dtype(tmp_path) -> None:
    """dtype= casts the parameters and leaves integer buffers integers."""
    tiny_drafter(tiny_llama(), draft_token_ids=torch.arange(40)).save_pretrained(tmp_path)
    loaded = DSparkDrafter.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.fc.weight.dtype == torch.bfloat16
    assert loaded.d2t.dtype == torch.int64


# ---------------------------------------------------------------------------------------------------------- from_target


def test_initialising_from_the_target_copies_its_last_layers() -> None:
    """Projections, MLP and norms of the last two layers and the final norm start the backbone."""
    target = tiny_llama()
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if "norm" in name:
                parameter.add_(torch.rand_like(parameter))
    drafter = DSparkDrafter.from_target(target, mask_token_id=MASK, init_from_target=True)
    theirs, own = target.state_dict(), drafter.state_dict()
    for i in range(2):
        for part in (
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
            *("input_layernorm", "post_attention_layernorm"),
        ):
            assert torch.equal(own[f"layers.{i}.{part}.weight"], theirs[f"model.layers.{i + 2}.{part}.weight"])
    assert torch.equal(own["norm.weight"], theirs["model.norm.weight"])


def test_initialising_from_gemma_translates_its_norms() -> None:
    """Gemma multiplies by one plus the weight, and calls the norm before the MLP otherwise."""
    target = tiny_target("gemma3")
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter))
    own = DSparkDrafter.from_target(target, mask_token_id=MASK, init_from_target=True).state_dict()
    layer = target.model.layers[3]
    torch.testing.assert_close(own["layers.1.input_layernorm.weight"], 1 + layer.input_layernorm.weight.detach())
    torch.testing.assert_close(own["layers.1.post_attention_layernorm.weight"], 1 + layer.pre_feedforward_layernorm.weight.detach())
    torch.testing.assert_close(own["layers.1.self_attn.q_norm.weight"], 1 + layer.self_attn.q_norm.weight.detach())


@pytest.mark.parametrize("mask", [EOS, PAD, VOCAB, -1])
def test_a_mask_token_in_use_or_outside_the_vocabulary_is_refused(mask: int) -> None:
    """The mask is neither the target's eos or pad token nor an id without an embedding row."""
    with pytest.raises(ValueError, match="mask_token_id"):
        DSparkDrafter.from_target(tiny_llama(), mask_token_id=mask)


def test_without_a_tokenizer_the_mask_token_must_be_given() -> None:
    """Nothing is guessed when there is nothing to choose from."""
    with pytest.raises(ValueError, match="tokenizer="):
        DSparkDrafter.from_target(tiny_llama())


def make_tokenizer(added: dict[str, bool], template: str | None = None, **special: str):
    """A word-level tokenizer of 10 words plus added tokens (text -> whether special)."""
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(10)}, unk_token="w0"))
    raw.add_tokens([AddedToken(text, special=is_special) for text, is_special in added.items()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("added", "special", "template", "vocab_size", "expected"),
    [
        ({"<eos>": True, "<mask>": True, "<x>": True}, {"eos_token": "<eos>", "mask_token": "<mask>"}, None, 13, 11),
        ({"<eos>": True, "<x>": True}, {"eos_token": "<eos>"}, None, 16, 15),
        ({"<eos>": True, "<gh_stars>": True, "<x>": True}, {"eos_token": "<eos>"}, None, 13, 11),
        ({"<reserved_0>": True, "<reserved_1>": True, "<eos>": True}, {"eos_token": "<eos>"}, None, 13, 11),
        ({"<eos>": True, "<x>": True, "<turn>": True}, {"eos_token": "<eos>"}, "<turn>{{ messages }}", 13, 11),
        ({"<eos>": True, "<unused0>": False}, {"eos_token": "<eos>"}, None, 12, 11),
    ],
)
def test_the_mask_token_is_one_that_text_does_not_use(added, special, template, vocab_size, expected) -> None:
    """Own mask token, unused embedding row, spare name, then any special token outside the chat template."""
    assert choose_mask_token_id(make_tokenizer(added, template, **special), vocab_size) == expected


def test_a_tokenizer_without_a_spare_token_asks_for_one() -> None:
    """GPT-2's kind, whose only special token ends the text, gives an error that names the argument."""
    with pytest.raises(ValueError, match="Pass mask_token_id="):
        choose_mask_token_id(make_tokenizer({"<eos>": True}, eos_token="<eos>"), 11)


def test_a_drafter_needs_a_mask_token() -> None:
    """A config without a mask token cannot become a drafter."""
    with pytest.raises(ValueError, match="mask_token_id is None"):
        DSparkDrafter(DSparkConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1, head_dim=8))
