"""Taps against transformers' own hidden states, and the self-test on targets right and wrong."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.cache.layout import RowLayout
from hf_dspark.errors import UnsupportedTargetError
from hf_dspark.targets.ragged_attention import PREFIX
from hf_dspark.targets.self_test import check_length, check_target, self_test
from hf_dspark.targets.taps import Taps, decoder_layers
from hf_dspark.targets.target import Target
from hf_dspark.utils.compat import CACHE, cache_in
from tests.tiny import FAMILIES, VOCAB, tiny_llama, tiny_target

IDS = torch.tensor([[5, 9, 4, 60, 33, 7, 8]])
TIGHT = {"rtol": 1e-4, "atol": 1e-4}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def final_norm(model: Any) -> nn.Module:
    decoder = model.get_decoder()
    return decoder.ln_f if hasattr(decoder, "ln_f") else decoder.norm


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_taps_are_the_outputs_of_their_layers(family: str) -> None:
    """Tap i is hidden_states[i + 1], tap -1 the embeddings as layer 0 gets them, side by side in the order asked
    for.
    """
    model = tiny_target(family)
    taps = Taps(model, [-1, 0, 2])
    with taps.open():
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states
        caught = taps.take()
    torch.testing.assert_close(caught, torch.cat([states[0], states[1], states[3]], dim=-1), rtol=0, atol=0)
    assert not torch.allclose(states[1], states[2])


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_the_last_layers_tap_is_before_the_final_norm(family: str) -> None:
    """transformers' last hidden state is normed already; a tap is not."""
    model = tiny_target(family)
    last = len(decoder_layers(model)) - 1
    taps = Taps(model, [last])
    with taps.open():
        normed = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
        caught = taps.take()
    assert not torch.allclose(caught, normed, atol=1e-2)
    torch.testing.assert_close(final_norm(model)(caught), normed)


@torch.no_grad()
def test_ragged_passes_give_the_taps_of_plain_ones() -> None:
    """Row by row, in two passes, taps and logits are those of each row alone."""
    model = tiny_llama()
    rows = [torch.randint(4, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 4)]
    target, store = Target(model, [0, 2]), RowCache()
    store.add_rows(2)
    got: list[list[torch.Tensor]] = [[], []]
    with target.open():
        for starts, ends in (([0, 0], [6, 1]), ([6, 1], [9, 4])):
            layout = RowLayout(starts, [e - s for s, e in zip(starts, ends, strict=True)])
            flat = torch.cat([r[s:e] for r, s, e in zip(rows, starts, ends, strict=True)])
            _, taps = target.forward(flat, layout, store)
            for row, piece in enumerate(taps.split(layout.counts)):
                got[row].append(piece)
    for row, pieces in zip(rows, got, strict=True):
        states = model(input_ids=row[None], output_hidden_states=True).hidden_states
        torch.testing.assert_close(torch.cat(pieces), torch.cat([states[1][0], states[3][0]], dim=-1), **TIGHT)


@torch.no_grad()
def test_only_the_last_logits_where_asked() -> None:
    """`only_last` gives each row's last position, for models that trim logits and for those that do not."""
    for family in ("llama", "gpt2"):
        model = tiny_target(family)
        target, ids = Target(model, []), torch.arange(4, 11)
        for trims in (True, False):
            target._trims_logits = trims and target._trims_logits
            stores = [RowCache(), RowCache()]
            for store in stores:
                store.add_rows(2)
            layout = RowLayout([0, 0], [5, 2])
            with target.open():
                whole, _ = target.forward(ids, layout, stores[0])
                last, _ = target.forward(ids, layout, stores[1], only_last=True)
            torch.testing.assert_close(last, whole[[4, 6]])


def test_hooks_go_with_the_context_whatever_happens() -> None:
    """Neither a normal end nor an exception leaves a hook or another attention implementation behind."""
    model = tiny_llama()
    before, implementation = hooks(model), model.config._attn_implementation
    target = Target(model, [-1, 1])
    with target.open():
        assert hooks(model) == before + 2
        assert model.config._attn_implementation == PREFIX + implementation
    assert (hooks(model), model.config._attn_implementation) == (before, implementation)
    with pytest.raises(KeyboardInterrupt), target.open():
        raise KeyboardInterrupt
    assert (hooks(model), model.config._attn_implementation) == (before, implementation)


@torch.no_grad()
def test_another_threads_pass_is_not_tapped() -> None:
    """A plain call that runs elsewhere while taps are open leaves what was caught alone."""
    model = tiny_llama()
    taps = Taps(model, [0])
    with taps.open():
        expected = model(input_ids=IDS, output_hidden_states=True).hidden_states[1]
        other = threading.Thread(target=lambda: model(input_ids=IDS[:, :3]))
        other.start()
        other.join()
        torch.testing.assert_close(taps.take(), expected)


@pytest.mark.parametrize("ids", [[-2], [4], [0, 9]])
def test_taps_outside_the_target_are_refused(ids: list[int]) -> None:
    """The message gives the range."""
    with pytest.raises(UnsupportedTargetError, match="4 layers"):
        Taps(tiny_llama(), ids)


# ---------------------------------------------------------------------------------------------------------- self-test


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_families_pass_the_self_test(family: str) -> None:
    """The difference is rounding, far below what is allowed."""
    error, allowed, longest = self_test(tiny_target(family))
    assert longest is None
    assert error < 0.01 * allowed
    check_target(tiny_target(family))


def own_attention(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: Any,
    attention_mask: Any = None,
    **kwargs: Any,
) -> Any:
    """Llama's attention as a model would write it that knows nothing of the attention interface."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    if (cache := cache_in(kwargs)) is not None:
        k, v = cache.update(k, v, self.layer_idx)
    out, weights = eager_attention_forward(self, q, k, v, attention_mask, self.scaling)
    return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


def test_a_target_that_ignores_the_attention_interface_is_refused() -> None:
    """Its rows would look at each other; the refusal says that one row still works."""
    model = tiny_llama()
    model.set_attn_implementation("eager")
    for layer in model.model.layers:
        layer.self_attn.forward = own_attention.__get__(layer.self_attn)
    with pytest.raises(UnsupportedTargetError, match="batch size 1") as refused:
        check_target(model)
    assert refused.value.one_row_works
    assert model.config._attn_implementation == "eager"


def test_a_target_that_ignores_it_in_one_layer_only_is_refused() -> None:
    """It is not enough that some layers follow."""
    model = tiny_llama()
    attention = model.model.layers[2].self_attn
    attention.forward = own_attention.__get__(attention)
    with pytest.raises(UnsupportedTargetError):
        check_target(model)


def test_a_target_that_mixes_neighbouring_tokens_is_refused() -> None:
    """Token shift outside attention crosses from row to row in a flattened pass; only the self-test can see that."""
    model = tiny_llama()

    def shift(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out + 0.5 * nn.functional.pad(out, (0, 0, 1, 0))[:, :-1]

    model.model.layers[1].mlp.register_forward_hook(shift)
    with pytest.raises(UnsupportedTargetError, match="self-test of ragged passes failed"):
        check_target(model)


def test_a_target_that_numbers_positions_itself_is_refused() -> None:
    """A model that ignores position_ids gives a second row the first row's positions."""
    model = tiny_llama()

    def renumber(module: nn.Module, args: Any, kwargs: Any) -> Any:
        kwargs["position_ids"] = torch.arange(args[0].shape[1])[None]
        return args, kwargs

    model.model.rotary_emb.register_forward_pre_hook(renumber, with_kwargs=True)
    with pytest.raises(UnsupportedTargetError, match="self-test of ragged passes failed"):
        check_target(model)


def test_layers_that_cannot_roll_back_are_refused_by_name() -> None:
    """No run is needed to refuse a linear-attention or recurrent layer."""
    model = tiny_llama()
    model.config.layer_types = ["linear_attention", "full_attention"] * 2
    with pytest.raises(UnsupportedTargetError, match=r"linear_attention.*rolls back") as refused:
        check_target(model)
    assert not refused.value.one_row_works


def test_the_answer_is_remembered_for_each_model() -> None:
    """A second look does not run the model again."""
    model, calls = tiny_llama(), []
    model.register_forward_hook(lambda *args: calls.append(1))
    check_target(model)
    first = len(calls)
    check_target(model)
    assert len(calls) == first > 0


def test_length_dependent_rope_is_refused_beyond_its_original_length() -> None:
    """Dynamic scaling depends on the longest row; up to the original length it is ordinary RoPE."""
    model = tiny_llama()
    model.config.rope_parameters = {
        "rope_type": "dynamic",
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": 64,
    }
    check_length(model, 64)
    with pytest.raises(UnsupportedTargetError, match="65"):
        check_length(model, 65)
    model.config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": 64,
    }
    check_length(model, 65)


@pytest.mark.parametrize("error", [AttributeError("no layers"), KeyError("layer 3")])
def test_whatever_a_models_own_attention_raises_is_a_refusal(error: Exception) -> None:
    """Attention that looks for what a cache of rows does not have may raise anything."""
    model = tiny_llama()
    model.set_attn_implementation("eager")
    attention = model.model.layers[0].self_attn

    def raises(*args: Any, **kwargs: Any) -> Any:
        if type(cache_in(kwargs)).__name__ != "DynamicCache":
            raise error
        return own_attention(attention, *args, **kwargs)

    attention.forward = raises
    with pytest.raises(UnsupportedTargetError, match=rf"{type(error).__name__}.*attention interface.*batch size 1"):
        check_target(model)


@pytest.mark.skipif(CACHE == "cache", reason="from 5.24 on transformers keeps the cache under gradient checkpointing")
def test_gradient_checkpointing_is_refused_with_the_way_out() -> None:
    """In training mode it drops the cache; the reason is the mode, not the shapes that attention then sees."""
    model = tiny_llama()
    model.gradient_checkpointing_enable()
    with pytest.raises(UnsupportedTargetError, match=r"training mode.*target\.eval\(\)"):
        check_target(model.train())
    check_target(model.eval())


def test_the_self_test_runs_past_windows() -> None:
    """A layer whose attention forgets its window is found out, though a short text would not show it."""
    model = tiny_target("gemma3")
    model.model.layers[0].self_attn.sliding_window = None
    with pytest.raises(UnsupportedTargetError, match="self-test of ragged passes failed"):
        check_target(model)
