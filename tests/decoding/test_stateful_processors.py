"""Logits processors of the user's that keep a state see what they see in a plain call, or are refused by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria

from hf_dspark import UnsupportedOptionError
from hf_dspark.utils.compat import CACHE, cache_in
from hf_dspark.utils.logging import warn_once
from tests.helpers import World, left_padded, make_world, plain, speculate, world
from tests.tiny import tiny_target


class ForcesOnSixthCall(LogitsProcessor):
    """Counts its calls, and forces token 9 on the sixth."""

    def __init__(self) -> None:
        self.calls = 0
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.lengths.append(input_ids.shape[1])
        return scores.index_fill(1, torch.tensor([9]), 1e4) if self.calls == 6 else scores


class Remembers(ForcesOnSixthCall):
    """The same state in a place of its own for each text, which is no state."""

    stateless = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return scores.index_fill(1, input_ids[0, -1:], -1e4)


@pytest.fixture(autouse=True)
def warned() -> Iterator[None]:
    """Each test hears its own warnings."""
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


@pytest.fixture
def w() -> World:
    return world()


@pytest.mark.parametrize("wrong_every", [0, 3])
def test_a_counting_processor_gives_the_plain_text_in_a_batch_of_one(wrong_every: int, caplog: pytest.LogCaptureFixture) -> None:
    """It is called as often as in a plain call, for the same texts in the same order, whether drafts are right or wrong; and is named."""
    w = make_world(world().target, wrong_every=wrong_every)
    plainly, here = ForcesOnSixthCall(), ForcesOnSixthCall()
    expected = plain(w.target, w.inputs(1), logits_processor=[plainly])
    with caplog.at_level(logging.WARNING, "hf_dspark"):
        output = speculate(w.target, w.drafter, w.inputs(1), logits_processor=[here], return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert not torch.equal(expected, plain(w.target, w.inputs(1)))
    assert here.lengths == plainly.lengths
    assert sum(row.accepted for row in output.stats.rows) > 0
    assert caplog.text.count("ForcesOnSixthCall is not known to keep no state") == 1


def test_its_calls_end_where_the_text_ends(w: World) -> None:
    """An end-of-text token or a criterion that stops: no call for a token behind it, though it was drafted."""
    text = plain(w.target, w.inputs(1))[0, w.inputs(1)["input_ids"].shape[1] :].tolist()

    class Stops(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return input_ids[:, -1] == text[8]

    for options in ({"eos_token_id": text[8]}, {"stopping_criteria": [Stops()]}):
        plainly, here = ForcesOnSixthCall(), ForcesOnSixthCall()
        expected = plain(w.target, w.inputs(1), logits_processor=[plainly], **options)
        assert torch.equal(speculate(w.target, w.drafter, w.inputs(1), logits_processor=[here], **options), expected)
        assert here.lengths == plainly.lengths


def test_drawn_tokens_are_processed_once_each(w: World) -> None:
    """As many calls as tokens, where tokens are drawn too; the sixth is the forced one."""
    prompt = w.inputs(1)["input_ids"].shape[1]
    for seed in range(3):
        torch.manual_seed(seed)
        here = ForcesOnSixthCall()
        text = speculate(w.target, w.drafter, w.inputs(1), logits_processor=[here], do_sample=True, temperature=0.7)
        assert here.lengths == list(range(prompt, prompt + 24))
        assert text[0, prompt + 5] == 9


def test_a_counting_processor_is_refused_in_a_larger_batch(w: World) -> None:
    """Rows do not advance in step, so there is no sixth call that is the same for all."""
    with pytest.raises(UnsupportedOptionError, match=r"ForcesOnSixthCall changed as it was called.*batch size 1.*stateless = True"):
        speculate(w.target, w.drafter, w.inputs(3), logits_processor=[ForcesOnSixthCall()])


@pytest.mark.parametrize("place", ["a list of numbers", "an object inside"])
def test_a_state_further_inside_is_found_too(w: World, place: str) -> None:
    """A count in a container of fixed length, or in an object that the processor holds."""

    class Inner:
        __slots__ = ("calls",)

    class Counts(LogitsProcessor):
        def __init__(self) -> None:
            self.counts, self.inner = [0, 0, 0], Inner()
            self.inner.calls = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if place == "a list of numbers":
                self.counts[1] += 1
            else:
                self.inner.calls += 1
            return scores

    with pytest.raises(UnsupportedOptionError, match="Counts changed as it was called"):
        speculate(w.target, w.drafter, w.inputs(3), logits_processor=[Counts()])


@pytest.mark.parametrize("batch", [1, 3])
def test_what_is_declared_stateless_passes_without_a_word(w: World, batch: int, caplog: pytest.LogCaptureFixture) -> None:
    """It may change as it is called, and shapes drafts too."""
    expected = plain(w.target, w.inputs(batch), logits_processor=[Remembers()]) if batch == 1 else None
    with caplog.at_level(logging.WARNING, "hf_dspark"):
        got = speculate(w.target, w.drafter, w.inputs(batch), logits_processor=[Remembers()])
    assert expected is None or torch.equal(got, expected)
    assert not caplog.records


def test_transformers_own_loop_takes_declared_processors_only() -> None:
    """It calls them for tokens that it rejects later."""
    target = tiny_target("llama")
    target.forward = _without_positions(target.forward)  # refused for batches, so transformers' loop decodes it
    w = make_world(target)
    prompt = left_padded([[5, 6, 7, 8]])
    with pytest.raises(UnsupportedOptionError, match="not known to keep no state"):
        speculate(target, w.drafter, prompt, logits_processor=[ForcesOnSixthCall()])
    declared = speculate(target, w.drafter, prompt, logits_processor=[Remembers()])
    assert torch.equal(declared, plain(target, prompt, logits_processor=[Remembers()]))


def _without_positions(forward: Any) -> Any:
    def without(input_ids: Any = None, attention_mask: Any = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        cache = {CACHE: cache_in(kwargs)}
        return forward(input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep, use_cache=True, **cache)

    return without
