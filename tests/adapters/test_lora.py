"""LoRA adapters in a drafter: what they change, how they are trained, named and merged."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from torch import nn

from hf_dspark import DSparkDrafter
from hf_dspark.adapters.lora import (
    active_adapters,
    adapter_for_call,
    adapter_names,
    add_lora,
    check_choice,
    merge_adapter,
    plain_drafter,
    target_pattern,
)
from hf_dspark.errors import UnsupportedOptionError
from hf_dspark.training.configuration import TrainingConfig
from hf_dspark.training.rows import ResponseRow
from hf_dspark.training.trainer import Trainer
from hf_dspark.utils.logging import warn_once
from tests.helpers import needs_adapters
from tests.tiny import HIDDEN, VOCAB, tiny_drafter, tiny_llama

pytestmark = needs_adapters


HEADS = ["vanilla", "gated", "rnn", "none"]


def two_adapters(base: DSparkDrafter) -> DSparkDrafter:
    """A copy with random adapters, `code` and the active `chat`."""
    drafter = add_lora(add_lora(copy.deepcopy(base), rank=2, adapter_name="code"), rank=2, adapter_name="chat")
    stir(drafter, "code")
    stir(drafter, "chat", seed=1)
    return drafter


def stir(drafter: nn.Module, adapter_name: str = "default", seed: int = 0) -> None:
    """Make an adapter matter: both of its matrices random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            if adapter_name in name.split("."):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def by_hand(base: DSparkDrafter, adapted: DSparkDrafter, scale: float, adapter_name: str = "default") -> DSparkDrafter:
    """A copy of the base whose weights are W + scale B A, added up here with plain products."""
    own = dict(adapted.named_parameters())
    summed = copy.deepcopy(base)
    with torch.no_grad():
        for name, weight in summed.named_parameters():
            module = name.removesuffix(".weight")
            if f"{module}.lora_A.{adapter_name}.weight" in own:
                weight += scale * own[f"{module}.lora_B.{adapter_name}.weight"] @ own[f"{module}.lora_A.{adapter_name}.weight"]
            elif f"{module}.lora_embedding_A.{adapter_name}" in own:
                weight += scale * (own[f"{module}.lora_embedding_B.{adapter_name}"] @ own[f"{module}.lora_embedding_A.{adapter_name}"]).T
    return summed


@torch.no_grad()
def outputs(drafter: DSparkDrafter) -> list[torch.Tensor]:
    """Everything that training and drafting read: hidden states, token logits, confidences."""
    generator = torch.Generator().manual_seed(5)
    taps = torch.randn(2, 9, drafter.fc.in_features, generator=generator)
    anchors, positions = torch.tensor([[5, 8], [7, 11]]), torch.tensor([[3, 6], [2, 9]])
    previous = torch.randint(4, VOCAB, (2, 2, 5), generator=generator)
    h = drafter.training_hidden(taps, anchors, positions)
    head = drafter.markov_head
    logits = drafter.base_logits(h)
    if head is not None:
        logits = logits + head.project(head.block(previous, h))
    return [h, logits, drafter.confidence(h, previous)]


@pytest.mark.parametrize("head", HEADS)
def test_an_adapter_adds_b_times_a_to_every_weight_it_targets(head):
    """Hidden states, token logits and confidences are those of weights W + (alpha / rank) B A summed up by hand; B starts at zero."""
    base = tiny_drafter(tiny_llama(), head)
    adapted = add_lora(copy.deepcopy(base), rank=3, alpha=6)
    assert all(torch.equal(a, b) for a, b in zip(outputs(adapted), outputs(base), strict=True))
    stir(adapted)
    expected = outputs(by_hand(base, adapted, scale=2.0))
    for found, wanted, before in zip(outputs(adapted), expected, outputs(base), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
        assert not torch.allclose(found, before, atol=1e-2)


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (["gate_proj"], {"layers.0.mlp.gate_proj", "layers.1.mlp.gate_proj"}),
        (["head_gate"], {"markov_head.gate_proj"}),
        (["head"], {"markov_head.gate_proj", "markov_head.markov_w1", "markov_head.markov_w2"}),
        (["fc", "confidence"], {"fc", "confidence_head.proj"}),
        ("q_proj", {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"}),
    ],
)
def test_targets_are_the_named_modules_and_no_namesakes(targets, modules):
    """The MLP's gate_proj and the gated head's are told apart; groups hold what they say."""
    drafter = add_lora(tiny_drafter(tiny_llama(), "gated"), targets=targets)
    assert {name for name, module in drafter.named_modules() if hasattr(module, "base_layer")} == modules


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["q"]}, r"Unknown adapter targets \['q'\]; allowed: attention, mlp"),
        ({"targets": ["joint_proj"]}, r"no module for the adapter targets \['joint_proj'\]; it has .*markov_w1"),
        ({"targets": []}, "no module for the adapter targets"),
        ({"rank": 0}, "rank=0, .*; allowed: rank 1 or more"),
        ({"alpha": 0}, "alpha=0"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\)"),
        ({"adapter_name": "base"}, "'base': it means the drafter without adapters"),
        ({"adapter_name": "a.b"}, "'a.b': it is part of tensors' names. Allowed: letters"),
        ({"adapter_name": "layers"}, "'layers': a module of the drafter is called so"),
    ],
)
def test_what_cannot_be_added_is_refused_and_leaves_the_drafter_plain(arguments, message):
    """The error names what was given and what is allowed; the drafter stays trainable and without adapters."""
    drafter = tiny_drafter(tiny_llama())
    with pytest.raises(ValueError, match=message):
        add_lora(drafter, **arguments)
    assert adapter_names(drafter) == []
    assert all(p.requires_grad for p in drafter.parameters())


def test_a_name_is_given_once():
    """A second adapter of the same name is refused, one of another name is the active one."""
    drafter = add_lora(tiny_drafter(tiny_llama()), adapter_name="code")
    with pytest.raises(ValueError, match=r"'code': it is loaded already \(loaded: code\)"):
        add_lora(drafter, adapter_name="code")
    add_lora(drafter, adapter_name="chat", targets=["attention"])
    assert (adapter_names(drafter), active_adapters(drafter)) == (["code", "chat"], ("chat",))
    assert not any("code" in name for name, p in drafter.named_parameters() if p.requires_grad)


def train(drafter, target, output, steps):
    rows = [ResponseRow("code", (5, 6, 7), tuple(range(10 + i, 22 + i)), 0.0, True) for i in range(6)]
    config = TrainingConfig(steps=steps, batch_size=3, num_anchors=4, learning_rate=5e-3, chunk_positions=7, log_every=1)
    return Trainer(drafter, target, rows, [], config, output)


def test_one_training_step_moves_every_pair_and_nothing_else(tmp_path):
    """The half of each pair that starts at zero moves; the drafter's own weights and the target's are bit-identical."""
    target = tiny_llama()
    drafter = tiny_drafter(target, "gated")
    own, theirs = copy.deepcopy(drafter.state_dict()), copy.deepcopy(target.state_dict())
    add_lora(drafter, rank=3)
    start = {name: p.detach().clone() for name, p in drafter.named_parameters()}
    train(drafter, target, tmp_path, steps=1).train()
    still = [name for name, p in drafter.named_parameters() if torch.equal(p, start[name])]
    assert not [name for name in still if "lora_B" in name or "lora_embedding_A" in name]  # zero at first
    after = {name.replace(".base_layer.", "."): tensor for name, tensor in drafter.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in own.items())
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in target.state_dict().items())


def test_gradients_of_the_chunked_objective_reach_both_halves_of_every_pair(tmp_path):
    """With both halves away from zero, one backward pass gives each adapter weight a gradient, and no other weight."""
    target = tiny_llama()
    drafter = add_lora(tiny_drafter(target, "rnn"), rank=3)
    stir(drafter)
    trainer = train(drafter, target, tmp_path, steps=1)
    generator = torch.Generator().manual_seed(0)
    weights = trainer.config.loss_weights_at(0.5)
    trainer.batch_loss(trainer.batch_at(0), num_anchors=4, generator=generator, weights=weights).loss.backward()
    own = {name for name, _ in drafter.named_parameters() if "lora_" in name}
    assert {name for name, p in drafter.named_parameters() if p.grad is not None and p.grad.any()} == own
    assert {name for name, p in drafter.named_parameters() if p.requires_grad} == own


def test_a_run_leaves_adapters_and_resumes_bit_identical(tmp_path):
    """`best` and `final` are adapters alone; a run stopped half-way ends where the uninterrupted one ends."""
    target = tiny_llama()

    def fresh():
        torch.manual_seed(3)
        return add_lora(tiny_drafter(target), rank=3)

    whole = train(fresh(), target, tmp_path / "whole", steps=4)
    whole.train()
    train(fresh(), target, tmp_path / "parts", steps=4).train(stop_after=2)
    parts = train(fresh(), target, tmp_path / "parts", steps=4)
    parts.train()
    assert all(torch.equal(a, b) for a, b in zip(parts.drafter.parameters(), whole.drafter.parameters(), strict=True))
    files = {"adapter_config.json", "adapter_model.safetensors", "dspark_adapter.json"}
    assert all({file.name for file in (tmp_path / "parts" / name).iterdir()} == files for name in ("best", "final"))


@pytest.mark.parametrize("head", ["gated", "none"])
def test_merging_leaves_a_plain_checkpoint_of_the_summed_weights(tmp_path, head):
    """The merged drafter holds W + (alpha / rank) B A under the base's names, and loads as any drafter does."""
    base = tiny_drafter(tiny_llama(), head)
    adapted = add_lora(copy.deepcopy(base), rank=3, alpha=6)
    stir(adapted)
    expected = by_hand(base, adapted, scale=2.0).state_dict()
    assert merge_adapter(adapted) is adapted
    adapted.save_pretrained(tmp_path)
    loaded = DSparkDrafter.from_pretrained(tmp_path)
    assert adapter_names(loaded) == []
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    assert all(p.requires_grad for p in adapted.parameters())


def test_merging_one_of_several_drops_the_others_and_says_so(caplog):
    """The named adapter is in the weights; the log names what was lost."""
    base = tiny_drafter(tiny_llama())
    drafter = two_adapters(base)
    expected = outputs(by_hand(base, drafter, 2.0, "code"))
    with caplog.at_level(logging.WARNING):
        merge_adapter(drafter, "code")
    assert "loses its other adapters: chat" in caplog.text
    for found, wanted in zip(outputs(drafter), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


def test_a_broken_adapter_is_not_merged_nor_none():
    """Numbers that are not finite are refused before any weight has changed; a plain drafter has nothing to merge."""
    drafter = add_lora(tiny_drafter(tiny_llama()))
    stir(drafter)
    with torch.no_grad():
        drafter.markov_head.markov_w2.lora_B["default"].weight[0, 0] = float("nan")
    before = drafter.fc.base_layer.weight.clone()
    with pytest.raises(ValueError, match=r"not finite, in markov_head\.markov_w2\.lora_B"):
        merge_adapter(drafter)
    assert torch.equal(drafter.fc.base_layer.weight, before)
    assert adapter_names(drafter) == ["default"]
    with pytest.raises(RuntimeError, match="no active adapter to merge; loaded: none"):
        merge_adapter(tiny_drafter(tiny_llama()))


def test_deleting_the_last_adapter_leaves_the_plain_drafter(tmp_path):
    """Without adapters, no layer of peft's is left, and the checkpoint is an ordinary one again."""
    base = tiny_drafter(tiny_llama())
    drafter = two_adapters(base)
    drafter.delete_adapter(["code", "chat"])
    drafter.save_pretrained(tmp_path)
    loaded = DSparkDrafter.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in base.state_dict().items())


def test_switching_is_undone_with_modes_gradients_and_disabled_layers():
    """Active adapter, disabled state and requires_grad are afterwards what they were, also after an error inside."""
    drafter = two_adapters(tiny_drafter(tiny_llama()))
    for prepare in (lambda: drafter.set_adapter("code"), lambda: drafter.requires_grad_(False), lambda: drafter.disable_adapters()):
        prepare()
        state = (active_adapters(drafter), [p.requires_grad for p in drafter.parameters()], outputs(drafter))
        for name in ("code", "chat", "base"):
            seen = []

            def fail(name=name, seen=seen):
                with adapter_for_call(drafter, name):
                    seen.append(active_adapters(drafter))
                    raise ArithmeticError

            with pytest.raises(ArithmeticError):
                fail()
            assert seen == [() if name == "base" else (name,)]
        assert (active_adapters(drafter), [p.requires_grad for p in drafter.parameters()]) == state[:2]
        assert all(torch.equal(a, b) for a, b in zip(outputs(drafter), state[2], strict=True))


def test_copies_of_whole_modules_are_switched_too():
    """peft's modules_to_save, here of the confidence head in one of two adapters, follow the call's choice."""
    base = tiny_drafter(tiny_llama())
    drafter = copy.deepcopy(base)
    drafter.add_adapter(LoraConfig(target_modules=["fc"], modules_to_save=["confidence_head"], r=2), "whole")
    with torch.no_grad():
        drafter.confidence_head.modules_to_save["whole"].proj.bias.add_(1.0)
    with adapter_for_call(drafter, "base"):
        assert torch.equal(outputs(drafter)[2], outputs(base)[2])
    with adapter_for_call(drafter, "whole"):
        torch.testing.assert_close(outputs(drafter)[2], outputs(base)[2] + 1.0)


def test_an_adapter_that_is_not_loaded_is_refused_by_name():
    """The error lists what is loaded, and how to draft without an adapter."""
    drafter = two_adapters(tiny_drafter(tiny_llama()))
    with pytest.raises(ValueError, match=r"holds no adapter 'math'; loaded: code, chat\..*adapter='base'"):
        check_choice(drafter, "math")
    with pytest.raises(ValueError, match="loaded: none"):
        check_choice(tiny_drafter(tiny_llama()), "math")


def test_a_wrapper_gives_its_drafter_and_its_budget():
    """The drafter inside is found, and a budget set on the wrapper is its own."""
    drafter = tiny_drafter(tiny_llama())
    wrapped = get_peft_model(drafter, LoraConfig(target_modules=target_pattern(drafter)))
    wrapped.budget = "static:2"
    assert plain_drafter(wrapped) is drafter
    assert drafter.budget == wrapped.budget == "static:2"
    with pytest.raises(ValueError, match=r"got PeftModel\. Call the wrapper's own add_adapter"):
        add_lora(wrapped, adapter_name="more")


def test_an_adapter_in_the_wrappers_forward_is_refused():
    """Virtual tokens of prompt learning would silently be left out, so the wrapper is refused by its kind."""
    config = PrefixTuningConfig(num_virtual_tokens=2, token_dim=HIDDEN, num_layers=2, num_attention_heads=4)
    wrapped = PeftModel(tiny_drafter(tiny_llama()), config)
    with pytest.raises(UnsupportedOptionError, match=r"type PREFIX_TUNING.*Use an adapter inside the layers"):
        plain_drafter(wrapped)


def test_a_calibration_without_the_adapter_is_pointed_out_once(caplog):
    """An adapter leaves temperatures as they are, and the log says once that they were measured without it; merging drops them."""
    warn_once.cache_clear()
    drafter = tiny_drafter(tiny_llama())
    drafter.config.confidence_temperatures = [1.5] * 5
    with caplog.at_level(logging.WARNING):
        add_lora(drafter)
        assert drafter.config.confidence_temperatures == [1.5] * 5
        merge_adapter(drafter)
    assert caplog.text.count("calibrate again, with the adapter active") == 1
    assert caplog.text.count("Calibrate the merged one") == 1
    assert drafter.config.confidence_temperatures is None
    assert drafter.budget == "full"
