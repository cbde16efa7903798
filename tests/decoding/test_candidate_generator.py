"""The drafter behind transformers' own assisted loop, and the targets for which that is the only way."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM
from transformers.generation.utils import GenerationMixin

import hf_dspark
from hf_dspark import UnsupportedTargetError
from hf_dspark.budgets.load_aware import LoadAwareBudget
from hf_dspark.decoding.candidate_generator import stock_loop
from hf_dspark.decoding.options import Options
from hf_dspark.utils.logging import warn_once
from tests.costs import flat, full_machine, middling
from tests.helpers import BUDGETS, NEVER, World, left_padded, make_world, plain, speculate, world
from tests.tiny import BOS, EOS, HIDDEN, PAD, VOCAB


@pytest.fixture
def stock():
    """Call generate with transformers' own loop and this package's candidates; the patch is back in place
    afterwards."""

    def call(target, drafter, inputs, budget=None, **options):
        passes = []
        hook = target.register_forward_hook(lambda *_: passes.append(1))
        try:
            with stock_loop(target, drafter, Options(budget=budget)):
                return speculate(target, drafter, inputs, **options), len(passes)
        finally:
            hook.remove()

    hf_dspark.uninstall()
    yield call
    hf_dspark.install()


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma3", "mixtral"])
def test_both_doors_give_the_plain_text(stock, family, budget):
    """transformers' loop over this drafter's candidates gives the text of the plain call, as this package's loop
    does."""
    w = world(family)
    out, passes = stock(w.target, w.drafter, w.inputs(1), budget)
    assert torch.equal(out, plain(w.target, w.inputs(1)))
    if budget == "full":
        assert passes < 24
    hf_dspark.install()
    assert torch.equal(speculate(w.target, w.drafter, w.inputs(1)), out)


def test_both_doors_need_as_many_rounds(stock):
    """The drafter sees the same context through either door: it is as often right."""
    w = world()
    options = {"max_new_tokens": 30, "return_dict_in_generate": True}
    _, passes = stock(w.target, w.drafter, w.inputs(1), "full", **options)
    hf_dspark.install()
    rounds = speculate(w.target, w.drafter, w.inputs(1), **options).stats.rounds
    # Apart from where each begins: the stock loop's first pass drafts nothing, and its last may hold no draft.
    assert abs(passes - 1 - rounds) <= 1


def test_processors_through_the_stock_door(stock):
    """Candidates are drafted under the call's processors, a reduced vocabulary included."""
    w = make_world(world().target, draft_token_ids=torch.arange(0, VOCAB, 2))
    options = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "suppress_tokens": [20, 22, 24]}
    assert torch.equal(stock(w.target, w.drafter, w.inputs(1), **options)[0], plain(w.target, w.inputs(1), **options))


def test_the_target_is_as_it_was(stock):
    """Nothing is left on the target: no attribute, no hook; also after an exception."""
    w = world()
    stock(w.target, w.drafter, w.inputs(1))
    with pytest.raises(ValueError, match="batch"):
        stock(w.target, w.drafter, w.inputs(2))
    assert "_get_candidate_generator" not in vars(w.target)
    assert not any(layer._forward_hooks for layer in w.target.model.layers)


def test_sampling_through_the_stock_door(stock):
    """Candidates carry their distribution, so the stock loop can sample exactly; the same seed gives the same text."""
    w = world()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(stock(w.target, w.drafter, w.inputs(1), do_sample=True)[0])
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


# -------------------------------------------------------------------------------------------- a target for one row only


@pytest.fixture(scope="module")
def bloom() -> World:
    """Bloom does not use the attention interface and takes no position ids: ragged passes are impossible."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BloomConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=3, n_head=4, initializer_range=0.2,
            eos_token_id=EOS, bos_token_id=BOS, pad_token_id=PAD,
        )  # fmt: skip
        target = BloomForCausalLM(config).to(torch.float32).eval()
    return make_world(target, num_taps=1)


def test_bloom_falls_back_at_batch_size_one(bloom, caplog):
    """One row is decoded through transformers' loop, with the plain text, and the reason is logged once."""
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "hf_dspark"):
        for _ in range(2):
            assert torch.equal(speculate(bloom.target, bloom.drafter, bloom.inputs(1)), plain(bloom.target, bloom.inputs(1)))
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("hf_dspark")]
    assert len(lines) == 1
    assert "BloomForCausalLM" in lines[0]


def test_bloom_is_refused_at_batch_size_two(bloom):
    """More rows than one are refused by name, before anything is computed."""
    with pytest.raises(UnsupportedTargetError, match=r"BloomForCausalLM.*batch size 1"):
        speculate(bloom.target, bloom.drafter, bloom.inputs(2))


def test_the_fall_back_drafts(bloom):
    """The fall-back is speculative decoding too: fewer passes of the target than tokens."""
    passes = []
    hook = bloom.target.register_forward_hook(lambda *_: passes.append(1))
    speculate(bloom.target, bloom.drafter, bloom.inputs(1))
    hook.remove()
    assert len(passes) < 24


def test_the_fall_back_honours_the_explicit_options(bloom):
    """Budget and block size of `hf_dspark.generate` reach the stock loop."""
    expected = plain(bloom.target, bloom.inputs(1))
    tokens: list[int] = []
    hook = bloom.target.register_forward_pre_hook(lambda m, a, k: tokens.append(k["input_ids"].shape[1]), with_kwargs=True)
    try:
        for options, longest in (
            ({"budget": "static:0"}, 1),
            ({"budget": "static:2"}, 3),
            ({"block_size": 3}, 4),
            ({}, 6),
        ):
            tokens.clear()
            out = hf_dspark.generate(
                bloom.target,
                bloom.drafter,
                **bloom.inputs(1),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=NEVER,
                **options,
            )
            assert torch.equal(out, expected)
            assert max(tokens[1:]) == longest
    finally:
        hook.remove()


def test_the_fall_back_continues_a_conversation(bloom):
    """A cache of an earlier turn is left alone, because transformers' assisted loop cannot go on from one; the text is
    the plain call's."""
    first = speculate(bloom.target, bloom.drafter, bloom.inputs(1), return_dict_in_generate=True)
    longer = left_padded([[*first.sequences[0].tolist(), 30, 31, 32]])
    second = speculate(bloom.target, bloom.drafter, longer, past_key_values=first.past_key_values)
    assert torch.equal(second, plain(bloom.target, longer))


def test_two_threads_through_the_fall_back(bloom):
    """Each thread is given its own candidates, and the target is clean afterwards."""
    expected = [plain(bloom.target, left_padded([prompt])) for prompt in bloom.prompts[:4]]
    wrong: list[object] = []

    def work(which: int) -> None:
        try:
            for k in range(3):
                row = (which + 2 * k) % 4
                out = speculate(bloom.target, bloom.drafter, left_padded([bloom.prompts[row]]))
                if not torch.equal(out, expected[row]):
                    wrong.append((which, row, out))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert "_get_candidate_generator" not in vars(bloom.target)
    assert GenerationMixin._get_candidate_generator is BloomForCausalLM._get_candidate_generator


@pytest.mark.parametrize("costs", [flat, middling, full_machine])
def test_load_aware_budgets_through_the_stock_door(stock, costs):
    """The stock loop gives the plain text under them too, and they hear how its rounds end: on a full machine they stop drafting."""
    w = world("llama")
    heard = []

    class Hears(LoadAwareBudget):
        def learn(self, finished):
            heard.append(finished)
            super().learn(finished)

    out, passes = stock(w.target, w.drafter, w.inputs(1), Hears(costs(w.drafter.config.block_size)))
    assert torch.equal(out, plain(w.target, w.inputs(1)))
    assert heard
    assert all(0 <= one.accepted[0] <= one.verified[0] <= one.drafted[0] for one in heard)
    drafted = [one for one in heard if one.drafted[0]]
    assert (len(drafted) < passes / 3) == (costs is full_machine)
    assert all(one.seconds is not None for one in heard)


def test_load_aware_budgets_where_ragged_passes_are_refused(bloom):
    """Costs are guessed from sizes there, and the text is the plain call's."""
    out = hf_dspark.generate(
        bloom.target, bloom.drafter, **bloom.inputs(1), max_new_tokens=24, do_sample=False, eos_token_id=NEVER, budget="load-aware"
    )
    assert torch.equal(out, plain(bloom.target, bloom.inputs(1)))


def test_online_calibration_is_refused_where_rounds_are_not_seen(bloom):
    """transformers' loop reports no rounds."""
    with pytest.raises(hf_dspark.UnsupportedOptionError, match="leave online_calibration out"):
        hf_dspark.generate(
            bloom.target, bloom.drafter, **bloom.inputs(1), max_new_tokens=4, online_calibration=hf_dspark.OnlineCalibration()
        )
