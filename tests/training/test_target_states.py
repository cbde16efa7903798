"""Hidden states of the frozen target, computed anew and from memory."""

from __future__ import annotations

import pytest
import torch

from hf_dspark.errors import UnsupportedTargetError
from hf_dspark.training.data import collate
from hf_dspark.training.target_states import TargetHead, TargetStates
from tests.training.tiny_runs import losses, tiny_drafter, tiny_rows, tiny_target, tiny_trainer


def test_target_states_are_layer_outputs_and_the_normed_last_state():
    """Tap i is the output of layer i, -1 the embeddings; the last state gives the logits, whatever the padding."""
    target = tiny_target()
    ids = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
    taps, last = TargetStates(target, [-1, 0, 2])(ids)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in target.model.layers)
    with torch.no_grad():
        plain = target(ids[1:, :3], output_hidden_states=True)
    for tap, index in zip(taps.chunk(3, dim=-1), (0, 1, 3), strict=True):
        torch.testing.assert_close(tap[1:, :3], plain.hidden_states[index])
    torch.testing.assert_close(target.lm_head(last[1:, :3]), plain.logits)
    assert not taps.is_inference()
    assert not last.is_inference()


def test_every_block_of_a_batch_equals_the_block_run_alone():
    """Hidden states in a padded batch of many anchors are those of one anchor in its unpadded row."""
    target, rows = tiny_target(), tiny_rows(4)
    drafter, batch = tiny_drafter(target), collate(rows)
    states = TargetStates(target, drafter.config.target_layer_ids)
    taps, _ = states(batch.input_ids)
    anchors = torch.tensor([[len(r.prompt_ids), len(r.prompt_ids) + 2] for r in rows])
    together = drafter.training_hidden(taps, batch.input_ids.gather(1, anchors), anchors)
    for b, row in enumerate(rows):
        alone_taps, _ = states(torch.tensor([row.ids]))
        for a in range(2):
            position = anchors[b : b + 1, a : a + 1]
            cut = alone_taps[:, : int(position)]
            alone = drafter.training_hidden(cut, batch.input_ids[b : b + 1].gather(1, position), position)
            torch.testing.assert_close(together[b, a], alone[0, 0], atol=1e-5, rtol=1e-4)


def test_states_in_memory_are_those_of_a_fresh_pass():
    """What memory returns equals the target's own pass over the row alone, and costs no second pass."""
    target = tiny_target()
    batch = collate(tiny_rows(4))
    fresh, remembered = TargetStates(target, [0, 2]), TargetStates(target, [0, 2], memory_gib=0.01)
    remembered.of_batch(batch.input_ids, batch.lengths)
    passes = []
    target.model.register_forward_hook(lambda *_: passes.append(1))
    taps, last = remembered.of_batch(batch.input_ids.flip(0), batch.lengths.flip(0))
    assert passes == []
    for r, row in enumerate(reversed(tiny_rows(4))):
        alone_taps, alone_last = fresh(torch.tensor([row.ids]))
        assert torch.equal(taps[r, : len(row)], alone_taps[0])
        assert torch.equal(last[r, : len(row)], alone_last[0])
        assert not taps[r, len(row) :].any()


def test_states_stay_within_their_memory():
    """Rows stay while they fit: a token of two tapped layers and the last state takes 3 * 32 floats of four bytes."""
    rows = tiny_rows(5)
    states = TargetStates(tiny_target(), [0, 2], memory_gib=(sum(map(len, rows[:3])) * 3 * 32 * 4 + 8) / 2**30)
    for row in rows:
        states.of_batch(torch.tensor([row.ids]), torch.tensor([len(row)]))
    assert states.rows_in_memory == 3


def test_a_run_with_states_in_memory_is_the_run_without(tmp_path):
    """Two epochs have the same losses, within float noise, and nothing is on disk but the run's files."""
    without, held = tmp_path / "without", tmp_path / "held"
    for folder, memory in ((without, 0.0), (held, 0.01)):
        tiny_trainer(folder, steps=8, states_memory_gib=memory).train()
        assert {path.name for path in folder.iterdir()} == {"log.jsonl", "checkpoints", "best", "final", "tensorboard"}
    assert len(losses(without)) == 8
    assert losses(held) == pytest.approx(losses(without), rel=1e-3)


def test_a_target_that_changes_its_logits_after_the_head_is_refused():
    """A head whose probabilities are not the target's own would teach another target."""
    target, ids = tiny_target(), torch.arange(3, 12)[None]
    states = TargetStates(target, [0, 2])
    TargetHead(target.lm_head).check(states, ids)
    with pytest.raises(UnsupportedTargetError, match=r"differs from its own logits by 0\.\d+ in probability"):
        TargetHead(target.lm_head, softcap=0.5).check(states, ids)
