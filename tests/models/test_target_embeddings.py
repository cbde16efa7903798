"""Binding a drafter to a target: what fits, and how the target's embedding and head are used."""

from __future__ import annotations

import copy

import accelerate
import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.errors import BindingError, UnboundDrafterError
from hf_dspark.models.modeling_dspark import DSparkDrafter
from tests.models.drafting import random_taps
from tests.tiny import HIDDEN, VOCAB, tiny_drafter, tiny_llama, tiny_target


def test_an_unbound_drafter_says_how_to_bind_it() -> None:
    """Every use of the target's embedding or head before bind names the fix."""
    drafter, cache = DSparkDrafter(tiny_drafter(tiny_llama()).config), RowCache()
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
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    with pytest.raises(BindingError) as caught:
        tiny_drafter(tiny_llama()).bind(LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0)))
    for part in ("hidden size: the drafter was made for 32, the target has 16", "vocabulary", "decoder layers", "from_target"):
        assert part in str(caught.value)


def test_binding_needs_a_causal_language_model() -> None:
    """A base model without a head is refused with the class to use."""
    target = tiny_llama()
    with pytest.raises(BindingError, match="AutoModelForCausalLM"):
        tiny_drafter(target).bind(target.model)


def test_rebinding_follows_the_new_target() -> None:
    """Binding to another target uses that one's head from then on."""
    first, second = tiny_llama(), tiny_llama(seed=5)
    drafter, h = tiny_drafter(first), torch.randn(HIDDEN)
    assert drafter.bind(first).target is first
    assert drafter.bind(second).target is second
    torch.testing.assert_close(drafter.base_logits(h), second.lm_head(h))


def test_a_peft_wrapped_target_can_be_bound() -> None:
    """A PEFT wrapper gives the embedding and head of the model inside, adapters included."""
    target, drafter = tiny_llama(), tiny_drafter(tiny_llama())
    wrapped = peft.get_peft_model(target, peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    drafter.bind(wrapped)
    h = torch.randn(2, HIDDEN)
    torch.testing.assert_close(drafter.base_logits(h), wrapped.base_model.model.lm_head(h))


def test_peft_adapters_fit_the_drafter(tmp_path) -> None:
    """LoRA on the drafter changes its hidden states, saves, and loads back onto the same drafter."""
    drafter = tiny_drafter(tiny_llama())
    base, inputs = copy.deepcopy(drafter), (random_taps(drafter, 1, 6), torch.tensor([[5]]), torch.tensor([[3]]))
    plain = drafter(*inputs)
    wrapped = peft.get_peft_model(drafter, peft.LoraConfig(target_modules=["q_proj", "fc"], init_lora_weights=False)).eval()
    adapted = wrapped(*inputs)
    assert not torch.allclose(plain, adapted, atol=1e-3)
    wrapped.save_pretrained(tmp_path)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base, tmp_path).eval()(*inputs), adapted)


def test_a_head_that_is_not_a_plain_linear_is_called() -> None:
    """A head with its own forward (quantized, adapted, hooked) is used through that forward, and reduced afterwards."""

    class Doubling(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * super().forward(x)

    target, head = tiny_llama(), Doubling(HIDDEN, VOCAB, bias=False)
    target.set_output_embeddings(head)
    drafter, h = tiny_drafter(target, draft_token_ids=torch.arange(10, 20)), torch.randn(3, HIDDEN)
    torch.testing.assert_close(drafter.base_logits(h), 2.0 * (h @ head.weight.T)[:, 10:20])


def test_reduced_logits_follow_a_head_that_changes() -> None:
    """After an in-place change of the target's head, a reduced drafter uses the new rows."""
    target = tiny_llama()
    drafter, h = tiny_drafter(target, draft_token_ids=torch.arange(0, 20)), torch.randn(HIDDEN)
    before = drafter.base_logits(h)
    with torch.no_grad():
        target.lm_head.weight.mul_(2.0)
    torch.testing.assert_close(drafter.base_logits(h), 2.0 * before)


@pytest.mark.parametrize("raw", [False, True])
def test_a_soft_capped_target_caps_the_base_logits(raw: bool) -> None:
    """A target whose config caps its logits caps U the same way, unless the drafter was trained on raw logits."""
    target = tiny_target("gemma3")
    target.config.final_logit_softcapping = 3.0
    drafter, h = tiny_drafter(target, raw_embeddings=raw), torch.randn(HIDDEN)
    logits = target.lm_head.weight @ h
    torch.testing.assert_close(drafter.base_logits(h), logits if raw else 3.0 * torch.tanh(logits / 3.0))


@pytest.mark.parametrize("raw", [False, True])
def test_offloaded_embeddings_are_what_they_are_in_memory(raw: bool) -> None:
    """Weights that accelerate keeps elsewhere are embedded raw, or scaled as Gemma scales them, exactly as before."""
    target = tiny_target("gemma3")
    drafter = tiny_drafter(target, raw_embeddings=raw)
    taps, anchors = torch.randn(1, 6, 2 * HIDDEN), (torch.tensor([[5, 9]]), torch.tensor([[2, 5]]))
    with torch.no_grad():
        expected = drafter.training_hidden(taps, *anchors)
        accelerate.cpu_offload(target)
        assert target.get_input_embeddings().weight.device.type == "meta"
        torch.testing.assert_close(drafter.training_hidden(taps, *anchors), expected)


def test_the_next_call_sees_weights_that_were_synced_through_data() -> None:
    """Policy updates and weight syncs write through `.data`, which leaves no trace on the tensor; the copied rows follow all the same."""
    target, prompt = tiny_llama(), torch.tensor([[5, 6, 7]])
    drafter, h = tiny_drafter(target, draft_token_ids=torch.arange(0, 20)), torch.randn(HIDDEN)
    target.generate(prompt, assistant_model=drafter, max_new_tokens=2)
    target.lm_head.weight.data.copy_(torch.randn_like(target.lm_head.weight))
    target.generate(prompt, assistant_model=drafter, max_new_tokens=2)
    torch.testing.assert_close(drafter.base_logits(h), target.lm_head.weight[:20] @ h)


def test_a_drafter_that_drafted_under_inference_mode_can_be_trained() -> None:
    """What it keeps between calls is no inference tensor."""
    target = tiny_llama()
    drafter, h = tiny_drafter(target, draft_token_ids=torch.arange(0, 20)), torch.randn(HIDDEN, requires_grad=True)
    with torch.inference_mode():
        target.generate(torch.tensor([[5, 6, 7]]), assistant_model=drafter, max_new_tokens=4)
    logits = drafter.base_logits(h)
    drafter.values_at(logits, torch.tensor(4)).backward()
    torch.testing.assert_close(h.grad, target.lm_head.weight[4].detach())
