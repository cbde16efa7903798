"""What cannot be honoured exactly is refused, early, with a message that says what to do; target and drafter stay as
they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    WatermarkingConfig,
)
from transformers.generation.logits_process import SynthIDTextWatermarkLogitsProcessor

import hf_dspark
from hf_dspark import BindingError, UnsupportedOptionError, UnsupportedTargetError
from hf_dspark.budgets.budget import Budget
from tests.helpers import (
    NEVER,
    World,
    left_padded,
    make_world,
    plain,
    plain_tokens,
    speculate,
    talking_target,
    world,
)
from tests.tiny import BOS, EOS, FAMILIES, HIDDEN, MASK, PAD, VOCAB, tiny_drafter, tiny_llama


def explicit(target: Any, drafter: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    return hf_dspark.generate(target, drafter, **inputs, **{"max_new_tokens": 24, "do_sample": False, "eos_token_id": NEVER, **options})


def _traces(target: PreTrainedModel) -> tuple:
    """What a call could leave behind on a target."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in target.modules()]
    # What transformers itself notes about static caches, before any decoding method is asked.
    return (
        hooks,
        target.config._attn_implementation,
        sorted(vars(target).keys() - {"_cache", "_previous_max_cache_length"}),
        target.training,
    )


@pytest.fixture
def w() -> World:
    """The llama world; after the test, target and drafter must still give the plain text."""
    w = world()
    before = _traces(w.target), w.drafter.budget
    yield w
    assert (_traces(w.target), w.drafter.budget) == before
    assert torch.equal(speculate(w.target, w.drafter, w.inputs(1), max_new_tokens=6), plain_tokens("llama", 1)[:, :-18])


# -------------------------------------------------------------------------------------------------------------- options


def _static(w: World) -> StaticCache:
    return StaticCache(config=w.target.config, max_cache_len=64)


OPTIONS: dict[str, tuple[Callable[[World], dict[str, Any]], str]] = {
    "use_cache=False": (lambda w: {"use_cache": False}, "use_cache=True"),
    "static cache object": (lambda w: {"past_key_values": _static(w)}, "static cache object"),
    "offloaded cache": (lambda w: {"cache_implementation": "offloaded"}, "offloaded cache"),
    "num_return_sequences": (
        lambda w: {"num_return_sequences": 2, "do_sample": True},
        "num_return_sequences has to be 1",
    ),
    "synced_gpus": (lambda w: {"synced_gpus": True}, "synced_gpus.*without a drafter"),
    "output_hidden_states": (
        lambda w: {"output_hidden_states": True, "return_dict_in_generate": True},
        "output_hidden_states",
    ),
    "output_attentions": (lambda w: {"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    "guidance_scale": (lambda w: {"guidance_scale": 2.0}, "guidance_scale"),
    "assistant_ensemble_weight": (lambda w: {"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight"),
    "inputs_embeds": (lambda w: {"inputs_embeds": torch.zeros(1, 9, HIDDEN)}, "inputs_embeds"),
    "position ids of one's own": (lambda w: {"position_ids": torch.arange(5, 14)[None]}, "position_ids other than"),
    "SynthID": (
        lambda w: {"logits_processor": [SynthIDTextWatermarkLogitsProcessor(3, [1, 2], 8, 8, 8, torch.device("cpu"))]},
        "SynthID.*keeps a state",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_cannot_be_honoured(w, name):
    """Each is refused by name with a ValueError."""
    make, message = OPTIONS[name]
    inputs = w.inputs(1)
    options = make(w)
    if "inputs_embeds" in options:
        inputs = {"attention_mask": torch.ones(1, 9, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        speculate(w.target, w.drafter, inputs, **options)


@pytest.mark.parametrize("where", ["argument", "given config", "target's config"])
def test_beams(where):
    """The explicit door refuses beams wherever they are asked for; for the plain call transformers warns, and searches
    without the drafter."""
    target, drafter, inputs = talking_target(), world().drafter, world().inputs(1)
    options: dict[str, Any] = {"num_beams": 3} if where == "argument" else {}
    if where == "given config":
        options = {"generation_config": GenerationConfig(num_beams=3, pad_token_id=PAD)}
    if where == "target's config":
        target.generation_config.num_beams = 3
    with pytest.raises(UnsupportedOptionError, match="num_beams=3"):
        explicit(target, drafter, inputs, **options)
    if where == "argument":
        assert torch.equal(speculate(target, drafter, inputs, **options), plain(target, inputs, **options))


def test_a_watermark_is_honoured_not_refused(w):
    """The watermark that depends on ids alone is an ordinary processor."""
    options = {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="lefthash")}
    expected = plain(w.target, w.inputs(3), **options)
    assert torch.equal(speculate(w.target, w.drafter, w.inputs(3), **options), expected)
    assert not torch.equal(expected, plain_tokens("llama", 3))


@pytest.mark.parametrize("block_size", [0, 6, -1])
def test_a_block_longer_than_the_checkpoints(w, block_size):
    """Acceptance collapses beyond the trained block, so it is capped with an error that names the bounds."""
    with pytest.raises(ValueError, match=rf"block_size must be 1\.\.5.*got {block_size}"):
        explicit(w.target, w.drafter, w.inputs(1), block_size=block_size)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("everything", r"Unknown budget 'everything'; allowed are 'full', 'static:N'"),
        ("static:-1", "0 or more"),
        ("static:x", "cannot be used"),
        ("threshold:1.5", "between 0 and 1"),
        ("full:3", "Unknown budget"),
        (7, "an instance of hf_dspark.Budget; got"),
    ],
)
def test_budgets_that_do_not_exist(w, budget, message):
    """The message names what was given and what is allowed."""
    with pytest.raises(ValueError, match=message):
        explicit(w.target, w.drafter, w.inputs(1), budget=budget)


@pytest.mark.parametrize("verification", ["blocks", "", None])
def test_verifications_that_do_not_exist(w, verification):
    """Said with what is allowed, before anything is computed."""
    with pytest.raises(ValueError, match=r"'block' .* or 'token' .*got"):
        hf_dspark.generate(w.target, w.drafter, **w.inputs(1), max_new_tokens=4, verification=verification)


def test_a_budget_that_plans_nonsense(w):
    """Lengths outside the block are caught in the round, and nothing stays behind."""

    class TooMany(Budget):
        def plan(self, drafts):
            return [limit + 1 for limit in drafts.limits]

    with pytest.raises(ValueError, match=r"planned \[6, 6, 6\] for 3 rows; allowed are 0\.\.5"):
        explicit(w.target, w.drafter, w.inputs(3), budget=TooMany())


def test_a_threshold_needs_a_confidence_head(w):
    """Said before anything is computed, with the budgets that do work."""
    drafter = tiny_drafter(w.target, enable_confidence_head=False)
    with pytest.raises(UnsupportedOptionError, match=r"needs a drafter with a confidence head.*'full' or 'static:N'"):
        explicit(w.target, drafter, w.inputs(1), budget="threshold:0.5")


def test_seed_and_generator_together(w):
    """Two sources of randomness contradict each other."""
    with pytest.raises(UnsupportedOptionError, match="either seed or generator"):
        explicit(w.target, w.drafter, w.inputs(1), seed=1, generator=torch.Generator())


def test_a_drafter_of_another_kind(w):
    """The explicit door takes DSpark drafters only."""
    with pytest.raises(UnsupportedOptionError, match="needs a DSparkDrafter; got LlamaForCausalLM"):
        explicit(w.target, tiny_llama(), w.inputs(1))


# -------------------------------------------------------------------------------------------------------------- prompts


def test_a_prompt_without_tokens(w):
    """An empty prompt has nothing to condition on. (Two of them are stopped by transformers itself, with an
    IndexError.)"""
    empty = torch.zeros(1, 0, dtype=torch.long)
    with pytest.raises(UnsupportedOptionError, match=r"length >= 1\); got \(1, 0\).*bos token"):
        speculate(w.target, w.drafter, {"input_ids": empty, "attention_mask": empty})


def test_a_row_that_is_padding_only(w):
    """It is named by its number."""
    inputs = w.inputs(3)
    inputs["attention_mask"][1] = 0
    with pytest.raises(UnsupportedOptionError, match=r"Rows \[1\] of the batch are empty prompts"):
        speculate(w.target, w.drafter, inputs)


def test_a_cache_for_several_rows(w):
    """Reuse over turns is for one row."""
    inputs = w.inputs(2)
    cache = plain(w.target, inputs, return_dict_in_generate=True).past_key_values
    longer = {name: torch.cat([v, v.new_ones(2, 26)], dim=1) for name, v in inputs.items()}
    with pytest.raises(UnsupportedOptionError, match="for a batch of 2; reuse over turns is for batch size 1"):
        speculate(w.target, w.drafter, longer, past_key_values=cache)


@pytest.mark.parametrize("padded", [False, True])
def test_only_the_new_tokens_of_a_turn(w, padded):
    """transformers also takes the new ids alone, beside a mask of the whole text; here that is refused, not misread."""
    first = speculate(w.target, w.drafter, w.inputs(1), return_dict_in_generate=True)
    mask = torch.ones(1, first.sequences.shape[1] + 2, dtype=torch.long)
    if padded:
        mask[0, 0] = 0
    with pytest.raises(UnsupportedOptionError, match="the whole text"):
        speculate(
            w.target,
            w.drafter,
            {"input_ids": torch.tensor([[30, 31, 32]]), "attention_mask": mask},
            past_key_values=first.past_key_values,
        )


def test_the_users_cache_survives_a_refusal(w):
    """A refused call leaves a cache of an earlier turn as it was, and the next call goes on from it."""
    first = speculate(w.target, w.drafter, w.inputs(1), return_dict_in_generate=True)
    cache = first.past_key_values
    keys = [layer.keys.clone() for layer in cache.layers]
    longer = left_padded([[*first.sequences[0].tolist(), 30]])
    with pytest.raises(UnsupportedOptionError, match="output_attentions"):
        speculate(w.target, w.drafter, longer, past_key_values=cache, output_attentions=True)
    assert all(torch.equal(layer.keys, before) for layer, before in zip(cache.layers, keys, strict=True))
    assert torch.equal(speculate(w.target, w.drafter, longer, past_key_values=cache), plain(w.target, longer))


# -------------------------------------------------------------------------------------------------------------- targets


def _llama(**changes: Any) -> PreTrainedModel:
    config = FAMILIES["llama"][1]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), **changes})).eval()


def test_another_vocabulary(w):
    """The explicit door names both sizes; the plain call is stopped by transformers' own check."""
    other = _llama(vocab_size=VOCAB + 7)
    with pytest.raises(BindingError, match=rf"vocabulary: the drafter was made for {VOCAB}, the target has {VOCAB + 7}"):
        explicit(other, w.drafter, w.inputs(1))
    with pytest.raises(ValueError, match="different tokenizers"):
        speculate(other, w.drafter, w.inputs(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 2 * HIDDEN, "head_dim": 8}, rf"hidden size: .* {HIDDEN}, the target has {2 * HIDDEN}"),
        ({"num_hidden_layers": 3}, "decoder layers: .* 4, the target has 3"),
    ],
)
@pytest.mark.parametrize("door", [speculate, explicit])
def test_another_shape(w, door, changes, message):
    """Everything that does not fit is listed, through either door, and the drafter stays bound to its own target."""
    with pytest.raises(BindingError, match=message):
        door(_llama(**changes), w.drafter, w.inputs(1))
    assert w.drafter.target is w.target


def test_a_mask_token_outside_the_embedding(w):
    """A config cannot name one, and a target whose embedding is smaller than its vocabulary says is caught on
    binding."""
    with pytest.raises(ValueError, match=rf"mask_token_id must be a row .* 0\.\.{VOCAB - 1}; got {VOCAB}|{VOCAB}"):
        tiny_drafter(w.target, mask_token_id=VOCAB)
    drafter = tiny_drafter(w.target, mask_token_id=VOCAB - 1)
    small = tiny_llama()
    small.set_input_embeddings(torch.nn.Embedding(VOCAB - 5, HIDDEN))
    with pytest.raises(BindingError, match=f"mask token id {VOCAB - 1}"):
        speculate(small, drafter, w.inputs(1))


@pytest.fixture(scope="module")
def recurrent() -> PreTrainedModel:
    """A tiny Qwen3-Next: three layers of linear attention, whose state cannot be rolled back, and a full one."""
    config = Qwen3NextConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        linear_num_value_heads=2, linear_num_key_heads=1, linear_key_head_dim=8, linear_value_head_dim=8,
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        eos_token_id=EOS, bos_token_id=BOS, pad_token_id=PAD,
    )  # fmt: skip
    return Qwen3NextForCausalLM(config).eval()


@pytest.mark.parametrize("rows", [1, 2])
def test_a_target_with_a_recurrent_state(recurrent, rows):
    """Linear-attention layers cannot take rejected tokens back: refused at any batch size, with no fall-back."""
    drafter = tiny_drafter(recurrent)
    with pytest.raises(ValueError, match=r"stateful|cannot take rejected tokens back"):
        speculate(recurrent, drafter, world().inputs(rows))


def test_an_encoder_decoder(w):
    """Refused with its kind, through either door."""
    config = T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=16,
        num_layers=4,
        num_heads=2,
        decoder_start_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    target = T5ForConditionalGeneration(config).eval()
    for door in (speculate, explicit):
        with pytest.raises(ValueError, match="encoder-decoder"):
            door(target, w.drafter, w.inputs(1))


def test_rope_that_changes_with_the_longest_row():
    """Dynamic scaling is refused only where it would act: beyond the original length."""
    target = _llama(max_position_embeddings=32, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    drafter = tiny_drafter(target)
    short = left_padded([[5, 6, 7], [8]])
    assert torch.equal(speculate(target, drafter, short, max_new_tokens=20), plain(target, short, max_new_tokens=20))
    with pytest.raises(UnsupportedTargetError, match=r"dynamic.*beyond 32 tokens, and max_length is 63"):
        speculate(target, drafter, short, max_new_tokens=60)


def test_the_self_test_catches_what_no_list_names():
    """A model whose attention looks at its neighbours in the flat sequence is found out on first attach, by its
    logits."""

    class Leaky(LlamaForCausalLM):
        """Adds the mean of all tokens of the pass to each of them: right for one row, wrong for rows that share a
        pass."""

        def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
            out = super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
            out.logits = out.logits + 0.5 * out.logits.mean(dim=1, keepdim=True)
            return out

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        target = Leaky(FAMILIES["llama"][1]()).eval()
    drafter = tiny_drafter(target)
    with pytest.raises(UnsupportedTargetError, match=r"self-test of ragged passes failed on Leaky.*report the model"):
        speculate(target, drafter, world().inputs(2))
    assert _traces(target)[1] == "sdpa"


def test_refused_targets_are_left_as_they_were():
    """After a refusal at the self-test the target generates plainly as before."""
    w = make_world(tiny_llama(), mask_token_id=MASK)
    before, text = _traces(w.target), plain(w.target, w.inputs(2))
    with pytest.raises(UnsupportedOptionError, match="offloaded"):
        speculate(w.target, w.drafter, w.inputs(2), past_key_values=DynamicCache(offloading=True, config=w.target.config))
    assert _traces(w.target) == before
    assert torch.equal(plain(w.target, w.inputs(2)), text)
