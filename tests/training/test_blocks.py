"""Anchors and blocks against a brute-force over single rows."""

from __future__ import annotations

import torch

from hf_dspark.training.blocks import block_targets, sample_anchors


def rows(prompts: list[int], responses: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids 100 * row + position, the response mask, and the lengths of padded rows."""
    lengths = torch.tensor([p + r for p, r in zip(prompts, responses, strict=True)])
    width = int(lengths.max())
    ids = torch.arange(width) + 100 * torch.arange(1, len(prompts) + 1).unsqueeze(1)
    columns = torch.arange(width)
    mask = (columns >= torch.tensor(prompts).unsqueeze(1)) & (columns < lengths.unsqueeze(1))
    return ids.masked_fill(columns >= lengths.unsqueeze(1), 0), mask, lengths


def test_anchors_are_exactly_the_response_tokens_followed_by_one():
    """With room for all of them, the anchors are every response position whose next token is a response token; no column is unused."""
    _, mask, _ = rows([3, 1, 2], [4, 1, 2])
    positions, valid = sample_anchors(mask, 50)
    assert [row[chosen].tolist() for row, chosen in zip(positions, valid, strict=True)] == [[3, 4, 5], [], [2]]
    assert positions.shape == (3, 3)


def test_anchors_are_distinct_sorted_and_a_function_of_the_generator():
    """A draw of fewer anchors than candidates repeats none and returns them in order; the same state gives the same ones."""
    _, mask, _ = rows([2, 5], [40, 30])
    draws = [sample_anchors(mask, 12, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    positions, valid = draws[0]
    assert valid.all()
    assert positions.shape == (2, 12)
    assert (positions[:, 1:] > positions[:, :-1]).all()
    assert torch.equal(positions, draws[1][0])
    assert not torch.equal(positions, draws[2][0])


def test_every_candidate_is_drawn_equally_often():
    """Each of 8 is in 1/4 of 4,000 draws of two; the bound is 6 standard deviations: false failure below 1e-7."""
    _, mask, _ = rows([2], [9])
    positions, _ = sample_anchors(mask.repeat(4000, 1), 2, torch.Generator().manual_seed(0))
    counts = torch.bincount(positions.flatten(), minlength=11)
    assert counts[:2].sum() == counts[10] == 0
    assert (counts[2:10] - 1000).abs().max() < 165


def test_block_targets_equal_a_brute_force_over_single_blocks():
    """Labels, previous tokens, target positions and masks are those found by walking each row token by token."""
    ids, mask, lengths = rows([3, 1, 2, 4], [9, 2, 5, 1])
    positions, valid = sample_anchors(mask, 6, torch.Generator().manual_seed(5))
    gamma = 4
    found = block_targets(ids, mask, positions, valid, gamma)
    for b in range(ids.shape[0]):
        for a in range(positions.shape[1]):
            alive = bool(valid[b, a])
            for k in range(1, gamma + 1):
                p = int(positions[b, a])
                alive = alive and p + k < int(lengths[b]) and bool(mask[b, p + k])
                assert bool(found.position_mask[b, a, k - 1]) == alive
                if alive:
                    assert int(found.target_ids[b, a, k - 1]) == int(ids[b, p + k])
                    assert int(found.prev_ids[b, a, k - 1]) == int(ids[b, p + k - 1])
                    assert int(found.target_index[b, a, k - 1]) == p + k - 1
    assert not found.position_mask[3].any()


def test_supervision_stops_at_a_gap_in_the_response():
    """A position behind an unsupervised token is not supervised, even if it is a response token itself."""
    ids, mask, _ = rows([1], [7])
    mask[0, 4] = False
    positions, valid = torch.tensor([[2]]), torch.tensor([[True]])
    assert block_targets(ids, mask, positions, valid, 5).position_mask.tolist() == [[[True, False, False, False, False]]]
