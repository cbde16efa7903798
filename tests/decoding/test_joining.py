"""Rows join between rounds and leave as they end; prompts are read in passes of bounded size."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.stopping_criteria import EosTokenCriteria

from hf_dspark.budgets.budget import FullBudget
from hf_dspark.decoding.loop import DecodingLoop, Rules
from hf_dspark.decoding.options import Options
from hf_dspark.decoding.prefill import prompt_passes
from hf_dspark.decoding.row_processors import RowProcessors
from hf_dspark.decoding.row_stopping import RowStopping
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
    limits = [len(prompt) + NEW_TOKENS for prompt in prompts]
    stopping = RowStopping([EosTokenCriteria(target.generation_config.eos_token_id)], 3, limits)
    options = Options(block_size=drafter.config.block_size)
    seen = Target(target, drafter.config.target_layer_ids)
    loop = DecodingLoop(seen, drafter.bind(target), FullBudget(), options, Rules(RowProcessors([], 3), stopping))
    with torch.no_grad(), loop.target.open():
        for turn in range(80):
            for row in (r for r, when in enumerate(after) if when == turn):
                loop.join([row], [prompts[row]])
            if loop.state.num_rows:
                loop.round()
    for row in range(3):
        assert loop.finished[row].ids.tolist() == plain[row].tolist()
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
