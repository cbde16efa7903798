"""Parts of training beside the loop: kept states, scalars, cards, shapes, real decoding. Tiny random models."""

from __future__ import annotations

import copy
import json
import logging
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from hf_dspark.checkpoints.card import write_training_card
from hf_dspark.errors import CheckpointError
from hf_dspark.evaluation.decoded import DecodedTau, spread_prompts
from hf_dspark.training import ResponseRow, TargetStates, Trainer, collate
from hf_dspark.training.files import RunFolder, flat_metrics
from hf_dspark.training.identity import load_weights
from hf_dspark.training.making import DrafterShape, make_drafter, mask_id_of
from tests.benchmarks.test_report import FINETUNED, RECIPE
from tests.training.test_trainer import tiny_config, tiny_drafter, tiny_rows, tiny_target

GIB = 2**30


# -- states kept in memory -----------------------------------------------------------------------------------------


def test_kept_states_are_those_of_a_fresh_pass():
    """What memory gives back equals the target's own pass over the row alone, and costs no second pass."""
    target = tiny_target()
    batch = collate(tiny_rows(4))
    fresh = TargetStates(target, [0, 2])
    kept = TargetStates(target, [0, 2], memory_gib=0.01)
    kept.of_batch(batch.input_ids, batch.lengths)
    passes = []
    target.model.register_forward_hook(lambda *_: passes.append(1))
    taps, last = kept.of_batch(batch.input_ids.flip(0), batch.lengths.flip(0))
    assert passes == []
    for r, row in enumerate(reversed(tiny_rows(4))):
        alone_taps, alone_last = fresh(torch.tensor([row.prompt_ids + row.response_ids]))
        assert torch.equal(taps[r, : len(row)], alone_taps[0])
        assert torch.equal(last[r, : len(row)], alone_last[0])
        assert not taps[r, len(row) :].any()


def test_kept_states_stay_within_their_memory():
    """Rows are kept while they fit: a token of two taps and the last state takes 3 * 32 floats of four bytes."""
    target = tiny_target()
    rows = tiny_rows(6)
    sizes = [len(row) * 3 * 32 * 4 for row in rows]
    kept = TargetStates(target, [0, 2], memory_gib=(sum(sizes[:3]) + 8) / GIB)
    for row in rows[:5]:
        batch = collate([row])
        kept.of_batch(batch.input_ids, batch.lengths)
    assert kept.kept_rows == 3


def test_a_run_with_kept_states_is_the_run_without(tmp_path):
    """Two epochs with and without kept states have the same losses, within float noise, and nothing on disk but the run's files."""
    target = tiny_target()
    runs = {}
    for memory in (0.0, 0.01):
        folder = tmp_path / str(memory)
        trainer = Trainer(tiny_drafter(target), target, tiny_rows(), [], tiny_config(steps=8, states_memory_gib=memory), folder)
        trainer.train()
        with (folder / "log.jsonl").open(encoding="utf-8") as lines:
            runs[memory] = [event["loss"] for event in map(json.loads, lines) if event["event"] == "step"]
        assert {path.name for path in folder.iterdir()} == {"log.jsonl", "checkpoints", "best", "final", "tensorboard"}
    assert len(runs[0.0]) == 8
    assert runs[0.01] == pytest.approx(runs[0.0], rel=1e-3)


# -- what a run leaves ---------------------------------------------------------------------------------------------


def test_tensorboard_holds_losses_acceptance_and_decoding(tmp_path):
    """A reader of the event file finds the scalars under their names, as many as there were steps."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    target = tiny_target()
    decode = lambda drafter: {"tau": 1.25, "T=0": {"tau": 1.25, "acceptance": [0.5, None]}}  # noqa: E731
    Trainer(tiny_drafter(target), target, tiny_rows(), tiny_rows(15)[12:], tiny_config(), tmp_path, decode=decode).train()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "train/loss",
        "train/norm",
        "train/learning_rate",
        "train/anchors_per_s",
        "train/acceptance_1",
        "train/acceptance_3",
        "train/confidence_error",
        "train/tau_greedy",
        "loss/cross_entropy",
        "loss/total_variation",
        "loss/confidence",
        "held_out/all/tau_sampled",
        "decoded/tau",
        "decoded/T=0/acceptance_1",
    } <= tags
    assert len(events.Scalars("train/loss")) == 6
    assert events.Scalars("decoded/tau")[0].value == 1.25


def test_without_tensorboard_a_run_goes_on_and_says_so_once(tmp_path, monkeypatch, caplog):
    """Scalars are a convenience: their package missing is one warning."""
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    files = RunFolder(tmp_path)
    with caplog.at_level(logging.WARNING):
        files.scalars({"a": 1.0}, 1)
        files.scalars({"a": 2.0}, 2)
    assert caplog.text.count("tensorboard is not installed") == 1


def test_a_truncated_checkpoint_is_named(tmp_path):
    """A damaged checkpoint file is an error with its path, not a silent start from scratch."""
    target = tiny_target()
    Trainer(tiny_drafter(target), target, tiny_rows(), [], tiny_config(), tmp_path).train(stop_after=2)
    file = next(tmp_path.glob("checkpoints/step-*/state.pt"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"step-00000002.*cannot be read"):
        Trainer(tiny_drafter(target), target, tiny_rows(), [], tiny_config(), tmp_path).train()


def test_real_decoding_decides_which_weights_are_the_best(tmp_path):
    """With a decoding callback, its tau is the score, whatever the teacher-forced estimate says."""
    target = tiny_target()
    taus = iter([1.5, 1.1, 1.2])
    trainer = Trainer(
        tiny_drafter(target),
        target,
        tiny_rows(),
        tiny_rows(15)[12:],
        tiny_config(evaluation_minutes=1e-9),
        tmp_path,
        decode=lambda drafter: {"tau": next(taus, 1.0)},
    )
    trainer.train()
    assert trainer.progress.best_step == 1
    assert trainer.progress.best_score == 1.5
    assert [point["decoded"]["tau"] for point in trainer.progress.curve] == [1.5, 1.1, 1.2, 1.0, 1.0, 1.0]


def test_flat_metrics_number_lists_from_one_and_leave_out_what_is_no_number():
    """Nested records become slash-separated names."""
    record = {"tau": 2, "acceptance": [0.5, None, 0.25], "note": "x", "T=0": {"tau": 1.5}}
    assert flat_metrics("a", record) == {"a/tau": 2.0, "a/acceptance_1": 0.5, "a/acceptance_3": 0.25, "a/T=0/tau": 1.5}


@pytest.mark.parametrize(
    ("recipe", "words"), [(RECIPE, ["vanilla, rank 48", "base_model: some/target"]), (FINETUNED, ["load_adapter", "LoRA"])]
)
def test_cards_tell_what_was_trained_and_show_the_curve(tmp_path, recipe, words):
    """Front matter, a table with the recipe's figures, the curve as a picture, and the recipe itself beside it."""
    import yaml

    folder = tmp_path / "run" / "best"
    folder.mkdir(parents=True)
    write_training_card(folder, recipe, SimpleNamespace(config=SimpleNamespace(target_name=None)))
    card = (folder / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "some/target"
    assert all(word in card for word in words)
    assert "1,400 steps" in body
    assert "![Held-out tau over training](training_curve.png)" in body
    assert (folder / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "recipe.json").read_text(encoding="utf-8")) == recipe


# -- making a drafter ----------------------------------------------------------------------------------------------


class Words:
    """A tokenizer as far as making a drafter asks: ids, special ids, added tokens."""

    eos_token_id, unk_token, unk_token_id, mask_token_id = 2, "<unk>", 0, None
    bos_token_id, pad_token_id = 1, 2
    added_tokens_decoder: ClassVar = {57: "<spare>"}
    chat_template = None

    def __len__(self) -> int:
        return 59

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"<spare>": 57}.get(token, 0)


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
    target = tiny_target()
    rows = tiny_rows(20)
    drafter, facts = make_drafter(target, Words(), rows, rows[:3], shape, dtype=torch.float32, device="cpu", target_name="t")
    assert {name: getattr(drafter.config, name) for name in config} == config
    assert facts["parameters"] == sum(p.numel() for p in drafter.parameters())
    assert facts["taps"] == list(drafter.config.target_layer_ids)
    assert drafter.config.target_name == "t"
    assert (facts["head_start_tokens"] > 0) == (shape.head != "none")


def test_a_random_start_takes_nothing_from_the_target():
    """With random starts no backbone weight equals the target's and no token is read."""
    target = tiny_target()
    rows = tiny_rows(20)
    shape = DrafterShape(layers=1, rank=4, start="random", head_start="random")
    drafter, facts = make_drafter(target, Words(), rows, [], shape, dtype=torch.float32, device="cpu")
    assert facts["head_start_tokens"] == 0
    started, _ = make_drafter(target, Words(), rows, [], DrafterShape(layers=1, rank=4), dtype=torch.float32, device="cpu")
    last = target.model.layers[-1].mlp.up_proj.weight
    assert torch.equal(started.layers[0].mlp.up_proj.weight, last)
    assert not torch.equal(drafter.layers[0].mlp.up_proj.weight, last)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": "lstm"}, "head is 'lstm'; allowed: vanilla, gated, rnn, none"),
        ({"start": "here"}, "start is 'here'; allowed: target, random"),
        ({"layers": 0}, "layers is 0; allowed: 1 or more"),
        ({"rank": 0}, "say head 'none'"),
    ],
)
def test_shapes_that_cannot_be_are_refused(fields, message):
    """What, got, allowed."""
    with pytest.raises(ValueError, match=message):
        DrafterShape(**fields)


def test_mask_tokens_are_texts_or_ids():
    """A token's text, an id, nothing; a text that is no token is refused by name."""
    assert mask_id_of(Words(), "<spare>") == 57
    assert mask_id_of(Words(), "12") == 12
    assert mask_id_of(Words(), None) is None
    with pytest.raises(ValueError, match="'<nope>' is no token"):
        mask_id_of(Words(), "<nope>")


# -- real decoding during training -----------------------------------------------------------------------------------


def test_prompts_are_spread_over_sources_and_taken_once():
    """Three sources take turns; a prompt that was answered twice is one prompt."""
    rows = [ResponseRow(s, p, (5, 6), 0.0, True) for s, p in [("a", (1,)), ("a", (1,)), ("a", (2,)), ("a", (3,)), ("b", (4,)), ("c", (9,))]]
    assert spread_prompts(rows, 4) == [("a", [1]), ("b", [4]), ("c", [9]), ("a", [2])]
    assert len(spread_prompts(rows, 99)) == 5


def test_decoded_tau_is_that_of_generate(tmp_path):
    """Tau by source and temperature comes from the statistics of generate over the same prompts, and the drafter is left as it was."""
    import hf_dspark

    target = tiny_target()
    target.generation_config.pad_token_id = 2
    drafter = tiny_drafter(target)
    before = copy.deepcopy(drafter.state_dict())
    rows = tiny_rows(8)
    prompts = spread_prompts(rows, 4)
    found = DecodedTau(target, prompts, max_new_tokens=10, batch_size=2)(drafter)
    accepted = rounds = 0
    for _, ids in prompts:
        one = hf_dspark.generate(
            target, drafter, input_ids=torch.tensor([ids]), max_new_tokens=10, do_sample=False, return_dict_in_generate=True
        )
        accepted += one.stats.rows[0].accepted
        rounds += one.stats.rows[0].rounds
    assert found["T=0"]["tau"] == pytest.approx((accepted + rounds) / rounds)
    assert set(found["T=0"]["by_source"]) == {"chat", "code"}
    assert found["tau"] == pytest.approx((found["T=0"]["tau"] + found["T=1"]["tau"]) / 2)
    assert all(torch.equal(value, before[name]) for name, value in drafter.state_dict().items())


# -- what a run is ---------------------------------------------------------------------------------------------------


def test_weights_of_another_run_come_with_their_draft_vocabulary(tmp_path):
    """Row j of W2 belongs to draft id j of the run it comes from, whatever ids the new drafter was made with."""
    target = tiny_target()
    first = tiny_drafter(target, draft_token_ids=torch.arange(0, 50, 2))
    Trainer(first, target, tiny_rows(), [], tiny_config(), tmp_path).train()
    second = tiny_drafter(target, draft_token_ids=torch.arange(1, 51, 2))
    assert load_weights(second, tmp_path) == 6
    assert torch.equal(second.draft_token_ids, first.draft_token_ids)
    hidden = torch.randn(4, 32)
    assert torch.equal(second.base_logits(hidden), first.base_logits(hidden))


def test_weights_of_another_kind_of_drafter_are_refused(tmp_path):
    """Shapes agree, taps do not."""
    target = tiny_target()
    Trainer(tiny_drafter(target), target, tiny_rows(), [], tiny_config(), tmp_path).train(stop_after=1)
    with pytest.raises(CheckpointError, match=r"another kind of drafter \(target_layer_ids \[0, 2\] there, \[1, 2\] here\)"):
        load_weights(tiny_drafter(target, target_layer_ids=[1, 2]), tmp_path)


def test_a_float16_drafter_is_not_trained(tmp_path):
    """Gradients would underflow without a word."""
    target = tiny_target().half()
    with pytest.raises(ValueError, match="float16"):
        Trainer(tiny_drafter(target), target, tiny_rows(), [], tiny_config(), tmp_path)
