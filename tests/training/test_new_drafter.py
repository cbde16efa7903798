"""Fresh drafters: shapes, draft vocabulary, starting weights."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from hf_dspark.training.configuration import DrafterShape
from hf_dspark.training.new_drafter import coverage, frequent_tokens, make_drafter, mask_id_of
from hf_dspark.training.rows import ResponseRow
from tests.training.tiny_runs import tiny_rows, tiny_target


class Words:
    """As much of a tokenizer as making a drafter uses."""

    eos_token_id, unk_token, unk_token_id, mask_token_id = 2, "<unk>", 0, None
    bos_token_id, pad_token_id = 1, 2
    added_tokens_decoder: ClassVar = {57: "<spare>"}
    chat_template = None

    def __len__(self) -> int:
        return 59

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"<spare>": 57}.get(token, 0)


def made(shape: DrafterShape, **more):
    target, rows = tiny_target(), tiny_rows(20)
    return target, *make_drafter(target, Words(), rows, rows[:3], shape, dtype=torch.float32, device="cpu", **more)


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        (DrafterShape(layers=1, rank=4), {"markov_rank": 4, "block_size": 7}),
        (DrafterShape(layers=1, head="none"), {"markov_rank": 0}),
        (DrafterShape(layers=1, block_size=1, rank=4), {"block_size": 1}),
        (DrafterShape(layers=2, rank=4, head="rnn", taps=(0, 1), draft_vocab=30), {"target_layer_ids": [0, 1], "draft_vocab_size": 30}),
        (DrafterShape(layers=1, rank=4, mask_token="<spare>"), {"mask_token_id": 57}),
    ],
    ids=["vanilla", "dflash", "mtp-1", "rnn", "mask"],
)
def test_shapes_become_drafters(shape, config):
    """Baselines and heads are shapes of one command; the recipe's facts agree with the weights."""
    _, drafter, facts = made(shape, target_name="t")
    assert {name: getattr(drafter.config, name) for name in config} == config
    assert facts["parameters"] == sum(p.numel() for p in drafter.parameters())
    assert facts["taps"] == list(drafter.config.target_layer_ids)
    assert drafter.config.target_name == "t"
    assert (facts["head_start_tokens"] > 0) == (shape.head != "none")


def test_a_random_start_takes_nothing_from_the_target():
    """With random starts no backbone weight equals the target's and no token is read."""
    target, drafter, facts = made(DrafterShape(layers=1, rank=4, start="random", head_start="random"))
    _, started, _ = made(DrafterShape(layers=1, rank=4))
    assert facts["head_start_tokens"] == 0
    last = target.model.layers[-1].mlp.up_proj.weight
    assert torch.equal(started.layers[0].mlp.up_proj.weight, last)
    assert not torch.equal(drafter.layers[0].mlp.up_proj.weight, last)


def test_mask_tokens_are_texts_or_ids():
    """A token's text, an id, nothing; a text that is no token is refused by name."""
    assert mask_id_of(Words(), "<spare>") == 57
    assert mask_id_of(Words(), "12") == 12
    assert mask_id_of(Words(), None) is None
    with pytest.raises(ValueError, match="'<nope>' is no token"):
        mask_id_of(Words(), "<nope>")


def test_draft_vocabulary_is_the_most_frequent_response_tokens_and_the_forced_ones():
    """Counts come from responses, not from the turns between them; forced ids are in whatever their count, and the ids are sorted."""
    rows = [ResponseRow("a", (9, 9, 9, 9), (3, 3, 3, 5, 5, 4, 8, 8, 8, 3), 0.0, True, ((4, 10), (13, 14)))]
    ids = frequent_tokens(rows, 3, always=[2], vocab_size=10)
    assert ids.tolist() == [2, 3, 5]
    assert coverage(rows, ids) == (6, 7)
    with pytest.raises(ValueError, match="draft vocabulary of 11; allowed: 1 to 10"):
        frequent_tokens(rows, 11, vocab_size=10)
