"""The draft vocabulary: mapping draft ids to target ids, and widening."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import HIDDEN, VOCAB, tiny_drafter, tiny_llama


def test_reduced_vocabulary_maps_and_widens() -> None:
    """Draft ids map to the given target ids; widened values lie there, and are the fill elsewhere."""
    target, ids = tiny_llama(), torch.tensor([90, 2, 17, 40])
    drafter = tiny_drafter(target, draft_token_ids=ids)
    in_order = ids.sort().values
    assert torch.equal(drafter.draft_token_ids, in_order)
    assert torch.equal(drafter.to_target_ids(torch.arange(4)), in_order)
    p = torch.rand(2, 3, 4).softmax(-1)
    wide = drafter.widen(p)
    assert wide.shape == (2, 3, VOCAB)
    torch.testing.assert_close(wide[..., in_order], p)
    torch.testing.assert_close(wide.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(drafter.base_logits(torch.ones(HIDDEN)), target.lm_head.weight[in_order].sum(-1))


@pytest.mark.parametrize("ids", [None, torch.tensor([90, 2, 17, 40])])
def test_values_at_reads_the_widened_values(ids: torch.Tensor | None) -> None:
    """A value at a target id is that of the widened distribution, and 0 for tokens that cannot be proposed."""
    drafter = tiny_drafter(tiny_llama(), draft_token_ids=ids)
    values = torch.rand(VOCAB, VOCAB if ids is None else 4)
    everything = torch.arange(VOCAB)
    found = drafter.values_at(values, everything)
    assert torch.equal(found, drafter.widen(values)[everything, everything])


def test_whole_vocabulary_passes_through() -> None:
    """Without a reduced vocabulary, mapping and widening return what they got."""
    drafter, p = tiny_drafter(tiny_llama()), torch.rand(3, VOCAB)
    assert drafter.widen(p) is p
    assert drafter.draft_token_ids is None


def test_the_maps_follow_d2t() -> None:
    """Loading another draft vocabulary into a drafter changes the ids that it proposes."""
    target = tiny_llama()
    first, second = (tiny_drafter(target, draft_token_ids=torch.arange(start, 40, 2)) for start in (0, 1))
    assert torch.equal(first.draft_token_ids, torch.arange(0, 40, 2))
    first.load_state_dict(second.state_dict())
    assert torch.equal(first.draft_token_ids, torch.arange(1, 40, 2))


@pytest.mark.parametrize(
    ("ids", "message"),
    [([1, 97], r"0\.\.96"), ([1, 1], "must not repeat"), ([[1, 2]], "1-D"), ([], "non-empty"), ([0.5], "token ids")],
)
def test_impossible_draft_vocabularies_are_refused(ids: list, message: str) -> None:
    """Draft ids outside the vocabulary, repeated, or not a list of ids are a ValueError."""
    with pytest.raises(ValueError, match=message):
        tiny_drafter(tiny_llama(), draft_token_ids=torch.tensor(ids))
