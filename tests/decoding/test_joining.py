"""Rows join between rounds and leave as they end; prompts are read in passes of bounded size."""

from __future__ import annotations

import pytest
import torch

from hf_dspark.budgets.budget import FullBudget
from hf_dspark.decoding.loop import DecodingLoop, prompt_passes
from hf_dspark.decoding.row_processors import RowProcessors, RowStopping, Sequences
from hf_dspark.targets.target import Target
from tests.helpers import bigram_drafter
from tests.tiny import PAD, VOCAB, tiny_target

NEW_TOKENS = 14


@pytest.mark.parametrize("after", [[0, 2, 4], [0, 0, 30], [0, 30, 60]])
def test_rows_that_join_between_rounds_get_their_plain_text(after: list[int]) -> None:
    """Each row's greedy text is plain generate's, whether it joins early, late, or when all others have left."""
    target = tiny_target("llama")
    random = torch.Generator().manual_seed(3)
    prompts = [torch.randint(4, VOCAB, (n,), generator=random) for n in (9, 5, 17)]
    plain = [
        target.generate(p[None], attention_mask=torch.ones_like(p)[None], max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=PAD)[0]
        for p in prompts
    ]
    drafter = bigram_drafter(target, [p.tolist() for p in prompts])
    sequences = Sequences(torch.full((3, 17), PAD), 17 + NEW_TOKENS, 8)
    for row, prompt in enumerate(prompts):
        sequences.ids[row, 17 - len(prompt) : 17] = prompt
    stopping = RowStopping([], 3)
    stopping.max_length = 17 + NEW_TOKENS
    stopping.eos_ids = {target.generation_config.eos_token_id}
    loop = DecodingLoop(
        Target(target, drafter.config.target_layer_ids),
        drafter.bind(target),
        FullBudget(),
        sequences,
        RowProcessors([], 3),
        stopping,
        sample=False,
        block_size=drafter.config.block_size,
    )
    with torch.no_grad(), loop.target.open():
        for turn in range(80):
            for row in (r for r, when in enumerate(after) if when == turn):
                loop.join([row], [prompts[row]])
            if loop.live:
                loop.round()
    for row, prompt in enumerate(prompts):
        text = sequences.ids[row, 17 - len(prompt) : sequences.lengths[row]]
        assert text.tolist() == plain[row].tolist()
    assert 0 < sum(r.accepted for r in loop.stats.rows) < sum(r.verified for r in loop.stats.rows)


@pytest.mark.parametrize(
    ("lengths", "known", "limit", "expected"),
    [
        ([3, 4, 2], 0, 9, [(range(3), [0, 0, 0], [3, 4, 2])]),
        ([3, 4, 2], 0, 7, [(range(2), [0, 0], [3, 4]), (range(2, 3), [0], [2])]),
        ([10], 0, 4, [(range(1), [0], [4]), (range(1), [4], [4]), (range(1), [8], [2])]),
        ([10], 7, 4, [(range(1), [7], [3])]),
        ([2, 9, 1], 0, 5, [(range(1), [0], [2]), (range(1, 2), [0], [5]), (range(1, 2), [5], [4]), (range(2, 3), [0], [1])]),
    ],
)  # fmt: skip
def test_prompt_passes_are_planned_by_hand_written_examples(lengths, known, limit, expected) -> None:
    """Short neighbours share a pass, a long prompt is cut, known tokens are skipped."""
    assert list(prompt_passes(lengths, known, limit)) == expected
