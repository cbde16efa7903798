"""What a call leaves behind: nothing, however it ends; threads beside each other; the patch and its undoing; public
names."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerationMixin

import hf_dspark
from hf_dspark import BindingError, errors
from tests.helpers import (
    World,
    left_padded,
    make_world,
    plain,
    plain_tokens,
    speculate,
    talking_target,
    world,
)
from tests.tiny import tiny_drafter


class Halt(Exception):
    """Raised by the tests' own objects in mid-generation."""


class Bomb(LogitsProcessor, StoppingCriteria, BaseStreamer):
    """Goes off the n-th time it is used, as whatever it is used."""

    def __init__(self, error: type[BaseException], uses: int) -> None:
        self.error, self.left = error, uses

    def _tick(self) -> None:
        self.left -= 1
        if self.left <= 0:
            raise self.error

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self._tick()
        return scores if isinstance(scores, torch.Tensor) else torch.zeros(len(input_ids), dtype=torch.bool)

    def put(self, value: torch.Tensor) -> None:
        self._tick()

    def end(self) -> None:
        pass


PLACES = {
    "processor": lambda bomb: {"logits_processor": LogitsProcessorList([bomb])},
    "criterion": lambda bomb: {"stopping_criteria": StoppingCriteriaList([bomb])},
    "streamer": lambda bomb: {"streamer": bomb},
}


def _traces(w: World) -> tuple:
    """What a call could leave behind on target and drafter."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in (*w.target.modules(), *w.drafter.modules())]
    names = sorted(vars(w.target)), sorted(vars(w.drafter))
    return (
        hooks,
        w.target.config._attn_implementation,
        names,
        w.drafter.budget,
        w.target.training,
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("uses", [1, 4, 9])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", [Halt, KeyboardInterrupt])
def test_an_exception_in_mid_generation_leaves_no_trace(error, place, uses):
    """It reaches the caller as it is; hooks, attention implementation and options are as before, and the next call is
    right."""
    w = world()
    speculate(w.target, w.drafter, w.inputs(1), max_new_tokens=4)
    before = _traces(w)
    with pytest.raises(error):
        speculate(w.target, w.drafter, w.inputs(1), **PLACES[place](Bomb(error, uses)))
    assert _traces(w) == before
    assert torch.equal(speculate(w.target, w.drafter, w.inputs(3)), plain_tokens("llama", 3))


@pytest.mark.parametrize("uses", [1, 2, 7])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_an_exception_leaves_the_users_cache(family, uses):
    """Keys, values and length of a cache from an earlier turn are unchanged, and the next call goes on from it."""
    w = world(family)
    first = speculate(w.target, w.drafter, w.inputs(1), return_dict_in_generate=True)
    cache = first.past_key_values
    before = [(layer.keys.clone(), layer.values.clone(), layer.get_seq_length()) for layer in cache.layers]
    longer = left_padded([[*first.sequences[0].tolist(), 30, 31]])
    with pytest.raises(Halt):
        speculate(w.target, w.drafter, longer, past_key_values=cache, logits_processor=[Bomb(Halt, uses)])
    for layer, (keys, values, length) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
        assert layer.get_seq_length() == length
    read: list[int] = []
    hook = w.target.register_forward_pre_hook(lambda m, a, k: read.append(k["input_ids"].shape[1]), with_kwargs=True)
    again = speculate(w.target, w.drafter, longer, past_key_values=cache)
    hook.remove()
    assert read[0] == 3
    assert torch.equal(again, plain(w.target, longer))


def test_explicit_options_do_not_outlive_their_call():
    """Budget, seed and block size of an explicit call that failed do not reach the next plain one."""
    w = world()
    with pytest.raises(Halt):
        hf_dspark.generate(
            w.target,
            w.drafter,
            **w.inputs(1),
            budget="static:0",
            block_size=1,
            logits_processor=[Bomb(Halt, 3)],
            max_new_tokens=8,
        )
    out = speculate(w.target, w.drafter, w.inputs(1), return_dict_in_generate=True)
    assert out.stats.rows[0].drafted == 5 * out.stats.rows[0].rounds


# -------------------------------------------------------------------------------------------------------------- threads


def _together(*jobs: Any) -> None:
    """Run jobs at once, each in a thread; raise what one raised."""
    failed: list[BaseException] = []
    barrier = threading.Barrier(len(jobs))

    def run(job: Any) -> None:
        try:
            barrier.wait()
            job()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("other", ["another drafter", "no drafter", "a plain forward"])
def test_two_threads_on_one_target(other, implementation):
    """Beside a thread that speculates, another one speculates or generates plainly with left padding: both get right
    results, every time."""
    w = world("mistral")
    target = talking_target("mistral")
    target.set_attn_implementation(implementation)
    second = tiny_drafter(target, "rnn")
    mine, theirs = w.inputs(3), left_padded(w.prompts[3:7])
    expected_mine, expected_theirs = plain(target, mine), plain(target, theirs)
    with torch.no_grad():
        logits = target(**theirs).logits

    def speculating() -> None:
        for _ in range(4):
            assert torch.equal(speculate(target, w.drafter, mine), expected_mine)

    def otherwise() -> None:
        for _ in range(4):
            if other == "another drafter":
                assert torch.equal(speculate(target, second, theirs), expected_theirs)
            elif other == "no drafter":
                assert torch.equal(plain(target, theirs), expected_theirs)
            else:
                for _ in range(10):
                    with torch.no_grad():
                        torch.testing.assert_close(target(**theirs).logits, logits)

    _together(speculating, otherwise)
    assert target.config._attn_implementation == implementation
    assert not any(layer._forward_hooks for layer in target.model.layers)


def test_a_drafter_that_is_decoding_is_not_bound_to_another_target():
    """It would go on with the other one's embeddings and head; afterwards it may be."""
    w, second = make_world(talking_target()), talking_target(loudness=3.0)

    class Asks(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            with pytest.raises(BindingError, match=r"decoding for another target right now.*second drafter"):
                speculate(second, w.drafter, w.inputs(1))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    text = speculate(w.target, w.drafter, w.inputs(3), stopping_criteria=[Asks()])
    assert torch.equal(text, plain(w.target, w.inputs(3)))
    assert torch.equal(speculate(second, w.drafter, w.inputs(1)), plain(second, w.inputs(1)))


def test_one_drafter_in_two_threads():
    """One pair of target and drafter may serve two calls at once, with options of their own."""
    w = make_world(talking_target(), draft_token_ids=torch.arange(4, 90))
    alone = left_padded(w.prompts[4:5])
    options = {"repetition_penalty": 1.4}
    expected, penalised = plain_tokens("llama", 3), plain(w.target, alone, **options)

    def greedy() -> None:
        for _ in range(4):
            assert torch.equal(speculate(w.target, w.drafter, w.inputs(3)), expected)

    def with_options() -> None:
        for _ in range(4):
            out = hf_dspark.generate(
                w.target,
                w.drafter,
                **alone,
                budget="static:2",
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=98,
                return_dict_in_generate=True,
                **options,
            )
            assert torch.equal(out.sequences, penalised)
            assert out.stats.rows[0].drafted == 2 * out.stats.rows[0].rounds

    _together(greedy, with_options)


def test_an_exception_in_one_thread_does_not_disturb_the_other():
    """The thread that goes on keeps its attention and its hooks."""
    w = world()

    def failing() -> None:
        for uses in (2, 5, 8):
            with pytest.raises(Halt):
                speculate(w.target, w.drafter, w.inputs(1), logits_processor=[Bomb(Halt, uses)])

    def going_on() -> None:
        for _ in range(4):
            assert torch.equal(speculate(w.target, w.drafter, w.inputs(3)), plain_tokens("llama", 3))

    _together(failing, going_on)
    assert w.target.config._attn_implementation == "sdpa"


# ------------------------------------------------------------------------------------------------------------ the patch


@pytest.fixture
def original():
    """transformers' own method; the patch is in place again afterwards."""
    hf_dspark.uninstall()
    yield GenerationMixin._assisted_decoding
    hf_dspark.uninstall()
    hf_dspark.install()


def test_install_and_uninstall_are_reversible_and_idempotent(original):
    """However often either is called, there is one wrapper or none."""
    hf_dspark.uninstall()
    assert GenerationMixin._assisted_decoding is original
    hf_dspark.install()
    wrapper = GenerationMixin._assisted_decoding
    assert wrapper is not original
    hf_dspark.install()
    assert GenerationMixin._assisted_decoding is wrapper
    hf_dspark.uninstall()
    assert GenerationMixin._assisted_decoding is original


def test_the_wrapper_keeps_the_signature(original):
    """`generate` inspects it."""
    before = inspect.signature(original)
    hf_dspark.install()
    assert inspect.signature(GenerationMixin._assisted_decoding) == before
    assert GenerationMixin._assisted_decoding.__name__ == "_assisted_decoding"


def test_only_one_name_of_transformers_is_patched(original):
    """Installing changes nothing else of GenerationMixin."""
    before = dict(vars(GenerationMixin))
    hf_dspark.install()
    after = dict(vars(GenerationMixin))
    assert [name for name in after if after[name] is not before.get(name)] == ["_assisted_decoding"]
    assert before.keys() == after.keys()


def test_other_assistants_go_to_the_original():
    """An ordinary assistant model and prompt lookup work as they did."""
    w = world()
    assert torch.equal(speculate(w.target, talking_target(), w.inputs(1)), plain_tokens("llama", 1))
    assert torch.equal(plain(w.target, w.inputs(1), prompt_lookup_num_tokens=3), plain_tokens("llama", 1))


def test_the_api_installs_by_itself(original):
    """`hf_dspark.generate` works after `uninstall` too."""
    w = world()
    out = hf_dspark.generate(w.target, w.drafter, **w.inputs(3), max_new_tokens=24, do_sample=False, eos_token_id=98)
    assert torch.equal(out, plain_tokens("llama", 3))


def test_calls_that_overlap_after_uninstall_do_not_unpatch_each_other(original):
    """The first of two threads to leave `hf_dspark.generate` leaves the second one's patch in place; the last takes it away."""
    w, inside, leave = world(), threading.Event(), threading.Event()
    outs: list[torch.Tensor] = []

    def call(at_start):
        class Waits(hf_dspark.Budget):
            def start(self, *args, **kwargs):
                at_start()
                return hf_dspark.make_budget("full")

        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": 98}
        outs.append(hf_dspark.generate(w.target, w.drafter, **w.inputs(3), budget=Waits(), **options))

    def later():
        inside.set()
        assert leave.wait(30)

    def begin_the_second():
        second.start()
        assert inside.wait(30)

    second = threading.Thread(target=call, args=(later,))
    call(begin_the_second)
    assert hasattr(GenerationMixin._assisted_decoding, "_hf_dspark_original")
    leave.set()
    second.join()
    assert len(outs) == 2
    assert all(torch.equal(out, plain_tokens("llama", 3)) for out in outs)
    assert GenerationMixin._assisted_decoding is original


# ---------------------------------------------------------------------------------------------------------------- names


def test_every_public_name_can_be_imported():
    """`__all__` is sorted, `dir` shows it, and each name is what the module that defines it calls so."""
    assert hf_dspark.__all__ == sorted(hf_dspark.__all__) == dir(hf_dspark)
    for name in hf_dspark.__all__:
        value = getattr(hf_dspark, name)
        assert name == "__version__" or value is getattr(importlib.import_module(value.__module__), name)


def test_an_unknown_name_is_an_attribute_error():
    """As for any module."""
    with pytest.raises(AttributeError, match="no attribute 'Drafter'"):
        _ = hf_dspark.Drafter


@pytest.mark.slow
def test_import_alone_makes_the_plain_call_work():
    """`import hf_dspark` installs the patch and teaches AutoModel about drafters."""
    code = (
        "import hf_dspark; from transformers import AutoConfig;"
        "from transformers.generation.utils import GenerationMixin as G;"
        "assert hasattr(G._assisted_decoding, '_hf_dspark_original'); AutoConfig.for_model('dspark')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_exception_tree():
    """One root; wrong input is a ValueError too, a wrong state a RuntimeError."""
    kinds = {n: c for n, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, BaseException)}
    tree = {name: tuple(base.__name__ for base in kind.__bases__) for name, kind in kinds.items()}
    value, state = ("DSparkError", "ValueError"), ("DSparkError", "RuntimeError")
    assert tree == {
        "DSparkError": ("Exception",),
        "UnsupportedTargetError": value,
        "UnsupportedOptionError": value,
        "BindingError": value,
        "CheckpointError": value,
        "DataError": value,
        "HubError": ("DSparkError", "OSError"),
        "OutputError": ("DSparkError", "OSError"),
        "UnboundDrafterError": state,
    }
    assert all(name in errors.__doc__ for name in tree)
    assert set(tree) <= set(hf_dspark.__all__)
