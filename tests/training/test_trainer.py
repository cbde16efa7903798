"""The training loop on a tiny random Llama target in float32: learning, evaluation, exact resume, what it leaves on disk."""

from __future__ import annotations

import copy
import logging
import sys

import pytest
import torch

from hf_dspark.errors import CheckpointError
from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.training.rows import ResponseRow
from hf_dspark.training.run_folder import RunFolder, flat_metrics, load_weights
from hf_dspark.training.trainer import Trainer
from tests.training.tiny_runs import events, losses, tiny_config, tiny_drafter, tiny_rows, tiny_target, tiny_trainer


def test_gradients_reach_the_drafter_only(tmp_path):
    """Every drafter parameter gets a gradient, no target parameter does, even when they would take one."""
    trainer = tiny_trainer(tmp_path)
    drafter, target = trainer.drafter, trainer.objective.states.target
    assert all(p.requires_grad for p in target.parameters())
    torch.nn.init.normal_(drafter.markov_head.markov_w2.weight)
    torch.nn.init.normal_(drafter.confidence_head.proj.weight)
    weights = trainer.config.loss_weights_at(0.5)
    trainer.batch_loss(trainer.batch_at(0), num_anchors=4, generator=torch.Generator(), weights=weights).loss.backward()
    assert [name for name, p in drafter.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for p in target.parameters())


@pytest.mark.parametrize(
    "drafter",
    [
        {},
        {"block_size": 1},
        {"markov_rank": 0, "enable_confidence_head": False},
        {"markov_head_type": "gated"},
        {"markov_head_type": "rnn"},
        {"draft_token_ids": torch.arange(0, 50, 2)},
    ],
    ids=["vanilla", "mtp-1", "dflash", "gated", "rnn", "reduced"],
)
def test_every_kind_of_drafter_learns_and_leaves_the_target_bit_identical(tmp_path, drafter):
    """Thirty steps on twelve rows lower the loss; the target's weights, mode and hooks are as before."""
    trainer = tiny_trainer(tmp_path, drafter=drafter, steps=30, ce_anneal=0.0, ce_start=0.1)
    target = trainer.objective.states.target
    before = copy.deepcopy(target.state_dict())
    trainer.train()
    assert sum(losses(tmp_path)[-4:]) < 0.97 * sum(losses(tmp_path)[:4])
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    assert not target.training


def test_muon_takes_the_backbones_matrices_whatever_their_size(tmp_path):
    """fc and the projections of every layer are Muon's; norms, the sequential head and the confidence head are AdamW's."""
    trainer = tiny_trainer(tmp_path, optimizer="muon")
    (_, others), (muon, matrices) = trainer.optimizer.parts
    assert isinstance(muon, torch.optim.Muon)
    names = {id(p): name for name, p in trainer.drafter.named_parameters()}
    theirs = {names[id(trainer.optimizer.parameters[i])] for i in matrices}
    projections = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert theirs == {"fc.weight"} | {f"layers.0.{name}.weight" for name in projections}
    assert len(others) + len(matrices) == len(trainer.optimizer.parameters)


def test_a_float16_drafter_is_not_trained(tmp_path):
    """Gradients would underflow silently."""
    target = tiny_target().half()
    with pytest.raises(ValueError, match="float16"):
        Trainer(tiny_drafter(target), target, tiny_rows(), [], tiny_config(), tmp_path)


def test_a_run_by_the_clock_ends_when_its_minutes_are_over(tmp_path):
    """Length and schedule follow elapsed time."""
    trainer = tiny_trainer(tmp_path, steps=None, minutes=0.005)
    assert trainer.train().step >= 1
    assert trainer.fraction() == 1


def test_accumulated_parts_take_the_step_of_the_whole(tmp_path):
    """Steps that run in three parts have the losses of steps that run whole, up to rounding."""
    for accumulation in (1, 3):
        tiny_trainer(tmp_path / str(accumulation), batch_size=4, accumulation=accumulation).train()
    assert losses(tmp_path / "3") == pytest.approx(losses(tmp_path / "1"), rel=2e-5)


def test_evaluation_repeats_itself_and_changes_nothing(tmp_path):
    """Two evaluations draw the same anchors, and neither moves a weight."""
    trainer = tiny_trainer(tmp_path, held_out=6)
    before = copy.deepcopy(trainer.drafter.state_dict())
    assert trainer.evaluate(trainer.held_out) == trainer.evaluate(trainer.held_out)
    assert all(torch.equal(value, before[name]) for name, value in trainer.drafter.state_dict().items())


def test_real_decoding_decides_which_weights_are_the_best(tmp_path):
    """With a decoding callback, its tau is the score, whatever the teacher-forced estimate says."""
    taus = iter([1.5, 1.1, 1.2])
    decode = lambda drafter: {"tau": next(taus, 1.0)}  # noqa: E731
    progress = tiny_trainer(tmp_path, held_out=3, evaluation_minutes=1e-9, decode=decode).train()
    assert (progress.best_step, progress.best_score) == (1, 1.5)
    assert [point["decoded"]["tau"] for point in progress.curve] == [1.5, 1.1, 1.2, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("settings", [{}, {"optimizer": "muon", "states_memory_gib": 0.01}], ids=["adamw", "muon"])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, settings):
    """Stopped after three of six steps and started anew from disk, the weights end bit-identical."""
    whole = tiny_trainer(tmp_path / "whole", **settings)
    whole.train()
    tiny_trainer(tmp_path / "parts", **settings).train(stop_after=3)
    parts = tiny_trainer(tmp_path / "parts", **settings)
    with torch.no_grad():
        for parameter in parts.drafter.parameters():
            parameter.zero_()
    assert parts.train().step == 6
    for (name, mine), other in zip(parts.drafter.named_parameters(), whole.drafter.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_a_half_written_checkpoint_is_removed_and_a_damaged_one_is_named(tmp_path):
    """A kill while writing leaves a temporary folder, and the last whole checkpoint is resumed. A truncated file is an error with its path,
    not a silent start from scratch."""
    tiny_trainer(tmp_path).train(stop_after=2)
    half_written = tmp_path / "checkpoints" / ".step-00000004.0123.tmp"
    half_written.mkdir()
    (half_written / "state.pt").write_bytes(b"half")
    trainer = tiny_trainer(tmp_path)
    assert trainer.resume()
    assert trainer.progress.step == 2
    assert not half_written.exists()
    file = next(tmp_path.glob("checkpoints/step-*/state.pt"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"step-00000002.*cannot be read"):
        tiny_trainer(tmp_path).train()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    """Other hyper-parameters or other data in the same folder are an error that names what differs."""
    tiny_trainer(tmp_path).train(stop_after=1)
    with pytest.raises(CheckpointError, match=r"learning_rate 0.005 there, 0.1 here"):
        tiny_trainer(tmp_path, learning_rate=0.1).resume()
    target = tiny_target()
    others = Trainer(tiny_drafter(target), target, tiny_rows(13)[1:], [], tiny_config(), tmp_path)
    with pytest.raises(CheckpointError, match=r"\(data '[0-9a-f]+' there"):
        others.resume()


def test_weights_of_another_run_come_with_their_draft_vocabulary(tmp_path):
    """Row j of W2 belongs to draft id j of the run it comes from, whatever ids the new drafter was made with."""
    first = tiny_trainer(tmp_path, drafter={"draft_token_ids": torch.arange(0, 50, 2)})
    first.train()
    second = tiny_drafter(tiny_target(), draft_token_ids=torch.arange(1, 51, 2))
    assert load_weights(second, tmp_path) == 6
    assert torch.equal(second.draft_token_ids, first.drafter.draft_token_ids)
    hidden = torch.randn(4, 32)
    assert torch.equal(second.base_logits(hidden), first.drafter.base_logits(hidden))
    with pytest.raises(CheckpointError, match=r"another kind of drafter \(target_layer_ids \[0, 2\] there, \[1, 2\] here\)"):
        load_weights(tiny_drafter(tiny_target(), draft_token_ids=torch.arange(0, 50, 2), target_layer_ids=[1, 2]), tmp_path)


def test_best_and_final_drafters_load_and_the_log_holds_the_curve(tmp_path):
    """The run leaves two loadable drafters, one line of JSON an event, and metrics per temperature and domain."""
    trainer = tiny_trainer(tmp_path, held_out=6)
    progress = trainer.train()
    own = trainer.drafter.state_dict()
    for name in ("best", "final"):
        saved = DSparkDrafter.from_pretrained(tmp_path / name).state_dict()
        assert all(torch.equal(value, own[key]) for key, value in saved.items())
    logged = events(tmp_path)
    assert [event["event"] for event in logged] == ["start", *["step"] * 6, "evaluation", "end"]
    metrics = logged[-2]["metrics"]
    assert {"all", "T=0", "T=1", "chat T=0", "code T=1"} <= metrics.keys()
    assert len(metrics["all"]["acceptance"]) == 3
    assert 1 <= metrics["all"]["tau_sampled"] <= 4
    assert progress.curve[-1]["step"] == progress.best_step == 6


def test_tensorboard_holds_losses_acceptance_and_decoding(tmp_path):
    """A reader of the event file finds the scalars under their names, as many as there were steps."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    decode = lambda drafter: {"tau": 1.25, "T=0": {"tau": 1.25, "acceptance": [0.5, None]}}  # noqa: E731
    tiny_trainer(tmp_path, held_out=3, decode=decode).train()
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    expected = {
        *("train/loss", "train/norm", "train/learning_rate", "train/anchors_per_s", "train/acceptance_1", "train/acceptance_3"),
        *("train/confidence_error", "train/tau_greedy", "loss/cross_entropy", "loss/total_variation", "loss/confidence"),
        *("held_out/all/tau_sampled", "decoded/tau", "decoded/T=0/acceptance_1"),
    }
    assert expected <= set(accumulator.Tags()["scalars"])
    assert len(accumulator.Scalars("train/loss")) == 6
    assert accumulator.Scalars("decoded/tau")[0].value == 1.25


def test_without_tensorboard_a_run_goes_on_and_says_so_once(tmp_path, monkeypatch, caplog):
    """Scalars are a convenience: their package missing is one warning."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            RunFolder(tmp_path).scalars({"a": 1.0}, step)
    assert caplog.text.count("tensorboard is not installed") == 1


def test_flat_metrics_number_lists_from_one_and_leave_out_what_is_no_number():
    """Nested records become slash-separated names."""
    record = {"tau": 2, "acceptance": [0.5, None, 0.25], "note": "x", "T=0": {"tau": 1.5}}
    assert flat_metrics("a", record) == {"a/tau": 2.0, "a/acceptance_1": 0.5, "a/acceptance_3": 0.25, "a/T=0/tau": 1.5}


def test_a_checkpoint_does_not_read_the_rows(tmp_path):
    """Its cost does not grow with the data: rows are read where they are trained on, and once when the run begins."""

    reads = []

    class Watched(ResponseRow):
        def __getattribute__(self, name):
            if name in ("prompt_ids", "response_ids"):
                reads.append(name)
            return super().__getattribute__(name)

    target, rows = tiny_target(), [Watched(**vars(row)) for row in tiny_rows(40)]
    trainer = Trainer(tiny_drafter(target), target, rows, [], tiny_config(), tmp_path)
    trainer.train(stop_after=1)
    assert reads
    reads.clear()
    trainer.checkpoint()
    assert not reads


def test_cross_entropy_alone_leaves_the_confidence_head_untouched(tmp_path):
    """A drafter with a confidence head trains on a loss that has no term for it; the head stays bit-identical."""
    target = tiny_target()
    drafter = tiny_drafter(target)
    torch.nn.init.normal_(drafter.confidence_head.proj.weight)
    before = copy.deepcopy(drafter.confidence_head.state_dict())
    config = tiny_config(steps=30, ce_end=1.0, total_variation=0.0, confidence=0.0, weight_decay=0.1)
    Trainer(drafter, target, tiny_rows(), [], config, tmp_path).train()
    assert all(torch.equal(value, before[name]) for name, value in drafter.confidence_head.state_dict().items())
    assert sum(losses(tmp_path)[-4:]) < 0.97 * sum(losses(tmp_path)[:4])


def test_a_hundred_bfloat16_steps_of_one_row_have_no_spikes(tmp_path):
    """No loss lies above what the untrained drafter has at worst, and the last ones lie below the first: a spike is a step gone astray."""
    target = tiny_target().to(torch.bfloat16)
    drafter = tiny_drafter(target).to(torch.bfloat16)
    config = tiny_config(steps=100, batch_size=1, learning_rate=2e-3, ce_anneal=0.0)
    untrained = tiny_config(steps=12, batch_size=1, learning_rate=1e-12, ce_anneal=0.0)
    Trainer(copy.deepcopy(drafter).bind(target), target, tiny_rows(), [], untrained, tmp_path / "untrained").train()
    Trainer(drafter, target, tiny_rows(), [], config, tmp_path / "trained").train()
    trained = losses(tmp_path / "trained")
    assert len(trained) == 100
    assert max(trained) < 1.1 * max(losses(tmp_path / "untrained"))
    assert sum(trained[-12:]) < 0.97 * sum(trained[:12])
