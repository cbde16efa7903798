"""Drafting with adapters: one text whatever drafts it, and the choice of an adapter for one call."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BloomConfig, BloomForCausalLM, LogitsProcessor, LogitsProcessorList

import hf_dspark
from hf_dspark.adapters.files import load_adapter, save_adapter
from hf_dspark.adapters.lora import active_adapters, add_lora, merge_adapter, target_pattern
from tests.adapters.test_lora import stir
from tests.helpers import NEVER, World, counts, make_world, needs_adapters, plain, speculate, talking_target
from tests.tiny import BOS, EOS, HIDDEN, PAD, VOCAB

pytestmark = needs_adapters


def generate(w: World, drafter, rows: int = 4, **options):
    """The explicit door, greedy, with statistics."""
    arguments = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": NEVER, "return_dict_in_generate": True, **options}
    return hf_dspark.generate(w.target, drafter, **w.inputs(rows), **arguments)


def per_row(output) -> list[tuple[int, int, int]]:
    return [(row.rounds, row.verified, row.accepted) for row in output.stats.rows]


@pytest.fixture(scope="module")
def w() -> World:
    return make_world(talking_target())


@pytest.fixture(scope="module")
def folders(w, tmp_path_factory):
    """Two adapters of one base: `code` disturbs its drafts a little, `chat` a lot."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, size) in enumerate((("code", 2.0), ("chat", 4.0))):
        drafter = add_lora(copy.deepcopy(w.drafter), rank=4, targets=["attention", "fc", "head", "confidence"], adapter_name=name)
        stir(drafter, name, seed)
        with torch.no_grad():
            for parameter_name, parameter in drafter.named_parameters():
                if "lora_B" in parameter_name or "embedding_B" in parameter_name:
                    parameter.mul_(size)
        save_adapter(drafter, root / name)
    return {name: root / name for name in ("code", "chat")}


@pytest.fixture
def both(w, folders):
    drafter = copy.deepcopy(w.drafter)
    for name, folder in folders.items():
        load_adapter(drafter, folder, name)
    return drafter


@pytest.fixture(scope="module")
def alone(w, folders):
    """What each adapter drafts when it is the only one, and what the base drafts."""
    found = {"base": per_row(generate(w, w.drafter))}
    for name, folder in folders.items():
        found[name] = per_row(generate(w, load_adapter(copy.deepcopy(w.drafter), folder)))
    assert len({str(rows) for rows in found.values()}) == 3
    return found


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_merged_unmerged_and_plain_text_are_one(head):
    """Through the plain call, an adapter gives the target's own text, unmerged and merged, and the two draft alike."""
    world = make_world(talking_target(), head)
    drafter = add_lora(world.drafter, rank=4)
    stir(drafter)
    expected = plain(world.target, world.inputs(8))
    unmerged = speculate(world.target, drafter, world.inputs(8), return_dict_in_generate=True)
    merged = speculate(world.target, merge_adapter(drafter), world.inputs(8), return_dict_in_generate=True)
    assert torch.equal(unmerged.sequences, expected)
    assert torch.equal(merged.sequences, expected)
    assert counts(unmerged) == counts(merged)
    assert counts(unmerged)[0] > 0


def test_each_call_drafts_with_the_adapter_it_names(w, both, alone):
    """Rounds, verified and accepted tokens of every row are those of that adapter loaded alone, in any order of calls."""
    expected = plain(w.target, w.inputs(4))
    for name in ("chat", "base", "code", "chat", "code", "base"):
        output = generate(w, both, adapter=name)
        assert per_row(output) == alone[name], name
        assert torch.equal(output.sequences, expected)
        assert active_adapters(both) == ("chat",)
    assert per_row(generate(w, both)) == alone["chat"]


def test_a_call_that_fails_leaves_the_active_adapter(w, both, alone):
    """An error in the middle of decoding does not leave the call's adapter behind."""

    class Failing(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > 20:
                raise ArithmeticError("on purpose")
            return scores

    with pytest.raises(ArithmeticError):
        generate(w, both, adapter="code", logits_processor=LogitsProcessorList([Failing()]))
    assert active_adapters(both) == ("chat",)
    assert per_row(generate(w, both)) == alone["chat"]


def test_an_unknown_adapter_is_refused_before_anything_runs(w, both):
    """The error lists the loaded ones; a drafter without adapters has none."""
    with pytest.raises(ValueError, match="no adapter 'math'; loaded: code, chat"):
        generate(w, both, adapter="math")
    with pytest.raises(ValueError, match="no adapter 'code'; loaded: none"):
        generate(w, w.drafter, adapter="code")


def test_base_is_every_drafters(w, alone):
    """A drafter without adapters takes adapter="base" too."""
    assert per_row(generate(w, w.drafter, adapter="base")) == alone["base"]


@pytest.mark.slow
def test_threads_with_different_adapters_do_not_mix(w, both, alone):
    """Calls in several threads at once each draft with their own adapter from start to end."""
    found: dict[str, list] = {name: [] for name in alone}

    def run(name):
        for _ in range(3):
            found[name].append(per_row(generate(w, both, adapter=name)))

    threads = [threading.Thread(target=run, args=(name,)) for name in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: [alone[name]] * 3 for name in alone}


def test_another_adapter_does_not_continue_ones_context(w, both, caplog):
    """A conversation's cache holds the drafter's context under one adapter: with another the prompt is read again."""
    first = generate(w, both, 1, adapter="code")
    ids = first.sequences
    for name, told in (("chat", 1), ("chat", 1)):
        again = hf_dspark.generate(
            w.target,
            both,
            input_ids=ids,
            past_key_values=first.past_key_values,
            adapter=name,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=NEVER,
            return_dict_in_generate=True,
        )
        assert caplog.text.count("another adapter") == told
        assert torch.equal(again.sequences, plain(w.target, {"input_ids": ids}, max_new_tokens=12))
        first, ids = again, again.sequences


@pytest.mark.parametrize("mixed", [False, True], ids=["PeftModel", "PeftMixedModel"])
def test_a_wrapped_drafter_drafts_like_the_same_adapter_inside(w, folders, alone, mixed):
    """A drafter that the user wrapped with peft works through both doors, and with adapter= too."""
    wrapped = get_peft_model(
        copy.deepcopy(w.drafter),
        LoraConfig(r=4, lora_alpha=8, target_modules=target_pattern(w.drafter, ["attention", "fc", "head", "confidence"])),
        mixed=mixed,
    ).eval()
    inner = load_adapter(copy.deepcopy(w.drafter), folders["code"])
    own = dict(inner.named_parameters())
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            parameter.copy_(own[name.removeprefix("base_model.model.")])
    expected = plain(w.target, w.inputs(4))
    output = speculate(w.target, wrapped, w.inputs(4), return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert per_row(output) == alone["code"]
    assert per_row(generate(w, wrapped)) == alone["code"]
    assert per_row(generate(w, wrapped, adapter="base")) == alone["base"]
    with wrapped.disable_adapter():
        assert per_row(generate(w, wrapped)) == alone["base"]


def test_a_bfloat16_drafter_with_an_adapter_gives_the_float32_targets_text(w, both):
    """The drafter's dtype, and its adapters', are its own business."""
    both.to(torch.bfloat16)
    assert torch.equal(generate(w, both, adapter="code").sequences, plain(w.target, w.inputs(4)))


def test_sampling_with_an_adapter_is_seeded(w, both):
    """The same seed and adapter give the same samples."""
    one, two = (generate(w, both, adapter="code", do_sample=True, seed=5, return_dict_in_generate=False) for _ in range(2))
    assert torch.equal(one, two)


def test_the_stock_loop_drafts_with_the_calls_adapter(caplog):
    """Targets that only transformers' own loop can decode take adapter= as well, and leave the drafter as it was."""
    config = BloomConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        n_layer=4,
        n_head=4,
        eos_token_id=EOS,
        bos_token_id=BOS,
        pad_token_id=PAD,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    target = BloomForCausalLM(config).eval()
    world = make_world(target)
    drafter = add_lora(world.drafter, rank=4)
    stir(drafter)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": NEVER}
    for adapter in ("default", "base", None):
        found = hf_dspark.generate(target, drafter, **world.inputs(1), adapter=adapter, **options)
        assert torch.equal(found, plain(target, world.inputs(1)))
        assert active_adapters(drafter) == ("default",)
