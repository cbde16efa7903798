"""Data reading and the training loop, on a tiny random Llama target in float32."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_dspark.errors import CheckpointError
from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.training import (
    MasterOptimizer,
    ResponseRow,
    TargetStates,
    Trainer,
    TrainingConfig,
    collate,
    coverage,
    epoch_batches,
    frequent_tokens,
    read_responses,
    split_rows,
)

VOCAB = 60


def tiny_target() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def tiny_drafter(target: LlamaForCausalLM, **kwargs) -> DSparkDrafter:
    torch.manual_seed(1)
    settings = {
        "num_hidden_layers": 1,
        "block_size": 3,
        "markov_rank": 4,
        "target_layer_ids": [0, 2],
        "mask_token_id": 59,
        **kwargs,
    }
    return DSparkDrafter.from_target(target, **settings)


def tiny_rows(count: int = 12) -> list[ResponseRow]:
    generator = torch.Generator().manual_seed(7)

    def ids(low: int, high: int) -> tuple[int, ...]:
        size = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(3, 50, (size,), generator=generator).tolist())

    return [ResponseRow("chat" if i % 2 else "code", ids(2, 6), ids(4, 14), float(i % 3 == 0), True) for i in range(count)]


def tiny_config(**kwargs) -> TrainingConfig:
    settings = {
        "steps": 6,
        "batch_size": 3,
        "num_anchors": 4,
        "learning_rate": 5e-3,
        "evaluation_anchors": 4,
        "chunk_positions": 7,
        "log_every": 1,
        **kwargs,
    }
    return TrainingConfig(**settings)


def write(path: Path, *records: object) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records)
    return path


def record(**changes: object) -> dict[str, object]:
    return {
        "source": "chat",
        "prompt_ids": [1, 5],
        "response_ids": [7, 8, 2],
        "temperature": 1.0,
        "ended": True,
        **changes,
    }


# -- data ----------------------------------------------------------------------------------------------------------


def test_rows_come_from_plain_and_gzipped_files_once_each(tmp_path):
    """A row that two files hold is read once; other fields of a row do not matter."""
    first = write(tmp_path / "a.jsonl", record(), record(response_ids=[9, 9]))
    second = write(tmp_path / "b.jsonl.gz", record(prompt="ignored"), record(temperature=0))
    rows = read_responses([first, second], vocab_size=10)
    assert [(row.response_ids, row.temperature) for row in rows] == [((7, 8, 2), 1.0), ((9, 9), 1.0), ((7, 8, 2), 0.0)]


def test_line_separators_inside_strings_do_not_end_a_row(tmp_path):
    """U+2028 and U+0085 inside a JSON string are text, where str.splitlines would break the line."""
    path = write(tmp_path / "a.jsonl", record(prompt="one\u2028two\x85three"))
    assert len(read_responses([path])) == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record(prompt_ids=[]), "line 2: prompt_ids holds no tokens"),
        (record(response_ids=[7, 10]), r"line 2: response_ids holds id 10; allowed: 0 to 9"),
        (record(prompt_ids=[-1]), "line 2: prompt_ids holds id -1"),
        (record(response_ids="7 8"), "line 2: response_ids is str"),
        (record(response_ids=[1.5]), "line 2: response_ids is list"),
        (record(temperature=-1), "line 2: temperature is -1"),
        ('{"prompt_ids": [1', "line 2: not JSON"),
        ("[1, 2]", "line 2: a list"),
    ],
)
def test_unusable_rows_are_named_by_file_and_line(tmp_path, bad, message):
    """The error says where the row is, what it holds and what is allowed."""
    path = write(tmp_path / "bad.jsonl", record(), bad)
    with pytest.raises(ValueError, match=message) as error:
        read_responses([path], vocab_size=10)
    assert "bad.jsonl" in str(error.value)


def test_no_rows_at_all_is_an_error(tmp_path):
    """An empty file trains nothing."""
    with pytest.raises(ValueError, match="no response rows"):
        read_responses([write(tmp_path / "a.jsonl")])


def test_a_prompt_is_on_one_side_of_the_split_whatever_else_is_in_the_data():
    """Rows of the same prompt stay together, and adding rows moves none across."""
    rows = [ResponseRow("chat", (i,), (1, 2), float(t), True) for i in range(200) for t in (0, 1)]
    train, held_out = split_rows(rows, held_out_fraction=0.2)
    assert not {row.prompt_ids for row in train} & {row.prompt_ids for row in held_out}
    assert len(train) + len(held_out) == 400
    assert 40 <= len(held_out) <= 120
    assert set(split_rows(rows[:100], held_out_fraction=0.2)[1]) <= set(held_out)


def test_an_epoch_holds_every_row_once_in_batches_of_similar_length():
    """Batches are a partition of the rows; within a pool they differ little in length."""
    lengths = [3 + (i * 37) % 101 for i in range(203)]
    batches = epoch_batches(lengths, batch_size=4, seed=1, epoch=0)
    assert sorted(i for batch in batches for i in batch) == list(range(203))
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert sum(spread) / len(spread) < 8


def test_batches_are_a_function_of_seed_and_epoch():
    """The same seed and epoch give the same order, another of either a different one."""
    lengths = list(range(2, 60))
    draws = [epoch_batches(lengths, batch_size=4, seed=s, epoch=e) for s, e in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert draws[0] != draws[3]


def test_collate_pads_on_the_right_and_masks_the_response():
    """The loss mask covers response tokens only, never the prompt or the padding."""
    batch = collate([ResponseRow("a", (5, 6), (7,), 0.0, True), ResponseRow("a", (5,), (6, 7, 8), 0.0, True)])
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [5, 6, 7, 8]]
    assert batch.loss_mask.tolist() == [[False, False, True, False], [False, True, True, True]]
    assert batch.lengths.tolist() == [3, 4]


def test_draft_vocabulary_is_the_most_frequent_response_tokens_and_the_forced_ones():
    """Counts come from responses, forced ids are in whatever their count, and the ids are sorted."""
    rows = [ResponseRow("a", (9, 9, 9, 9), (3, 3, 3, 5, 5, 4), 0.0, True)]
    ids = frequent_tokens(rows, 3, always=[2], vocab_size=10)
    assert ids.tolist() == [2, 3, 5]
    assert coverage(rows, ids) == (5, 6)


# -- the loop ------------------------------------------------------------------------------------------------------


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


def test_every_block_of_a_batch_equals_the_block_run_alone(tmp_path):
    """Hidden states in a padded batch of many anchors are those of one anchor in its unpadded row."""
    target = tiny_target()
    drafter = tiny_drafter(target)
    rows = tiny_rows(4)
    batch = collate(rows)
    states = TargetStates(target, drafter.config.target_layer_ids)
    taps, _ = states(batch.input_ids)
    anchors = torch.tensor([[len(r.prompt_ids), len(r.prompt_ids) + 2] for r in rows])
    together = drafter.training_hidden(taps, batch.input_ids.gather(1, anchors), anchors)
    for b, row in enumerate(rows):
        alone_taps, _ = states(torch.tensor([row.prompt_ids + row.response_ids]))
        for a in range(2):
            position = anchors[b : b + 1, a : a + 1]
            cut = alone_taps[:, : int(position)]
            alone = drafter.training_hidden(cut, batch.input_ids[b : b + 1].gather(1, position), position)
            torch.testing.assert_close(together[b, a], alone[0, 0], atol=1e-5, rtol=1e-4)


def test_gradients_reach_the_drafter_only(tmp_path):
    """Every drafter parameter gets a gradient, no target parameter does, even when they ask for one."""
    target = tiny_target()
    assert all(p.requires_grad for p in target.parameters())
    drafter = tiny_drafter(target)
    torch.nn.init.normal_(drafter.markov_head.markov_w2.weight)
    torch.nn.init.normal_(drafter.confidence_head.proj.weight)
    config = tiny_config()
    trainer = Trainer(drafter, target, tiny_rows(), [], config, tmp_path)
    result = trainer.batch_loss(
        trainer.batch_at(0),
        num_anchors=4,
        generator=torch.Generator().manual_seed(0),
        weights=config.loss_weights_at(0.5),
    )
    result.loss.backward()
    silent = [name for name, p in drafter.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert all(p.grad is None for p in target.parameters())


@pytest.mark.parametrize(
    "kwargs",
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
def test_every_kind_of_drafter_learns_and_leaves_the_target_bit_identical(tmp_path, kwargs):
    """Thirty steps on twelve rows lower the loss; the target's weights, mode and hooks are as before."""
    target = tiny_target()
    before = copy.deepcopy(target.state_dict())
    events: list[dict] = []
    config = tiny_config(steps=30, ce_anneal=0.0, ce_start=0.1)
    trainer = Trainer(tiny_drafter(target, **kwargs), target, tiny_rows(), [], config, tmp_path, announce=events.append)
    trainer.train()
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert sum(losses[-4:]) < 0.97 * sum(losses[:4])
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    assert not target.training


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    """Stopped after three of six steps and started anew from disk, the weights end bit-identical."""
    target = tiny_target()
    whole = Trainer(tiny_drafter(target), target, tiny_rows(), [], tiny_config(), tmp_path / "whole")
    whole.train()
    Trainer(tiny_drafter(target), target, tiny_rows(), [], tiny_config(), tmp_path / "parts").train(stop_after=3)
    parts = Trainer(tiny_drafter(target), target, tiny_rows(), [], tiny_config(), tmp_path / "parts")
    with torch.no_grad():
        for parameter in parts.drafter.parameters():
            parameter.zero_()
    parts.train()
    assert parts.progress.step == 6
    for (name, mine), other in zip(parts.drafter.named_parameters(), whole.drafter.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_a_half_written_checkpoint_is_ignored_and_removed(tmp_path):
    """A kill while writing leaves a temporary folder; the last whole checkpoint is resumed."""
    target = tiny_target()
    Trainer(tiny_drafter(target), target, tiny_rows(), [], tiny_config(), tmp_path).train(stop_after=2)
    waiting = tmp_path / "checkpoints" / ".tmp-step-00000004"
    waiting.mkdir()
    (waiting / "state.pt").write_bytes(b"half")
    trainer = Trainer(tiny_drafter(target), target, tiny_rows(), [], tiny_config(), tmp_path)
    assert trainer.resume()
    assert trainer.progress.step == 2
    assert not waiting.exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    """Other hyper-parameters or other data in the same folder are an error that names what differs."""
    target = tiny_target()
    Trainer(tiny_drafter(target), target, tiny_rows(), [], tiny_config(), tmp_path).train(stop_after=1)
    with pytest.raises(CheckpointError, match=r"learning_rate 0.005 there, 0.1 here"):
        Trainer(tiny_drafter(target), target, tiny_rows(), [], tiny_config(learning_rate=0.1), tmp_path).resume()
    with pytest.raises(CheckpointError, match="data"):
        Trainer(tiny_drafter(target), target, tiny_rows(9), [], tiny_config(), tmp_path).resume()


def test_best_and_final_drafters_load_and_the_log_holds_the_curve(tmp_path):
    """The run leaves two loadable drafters, one line of JSON an event, and metrics per temperature and domain."""
    target = tiny_target()
    trainer = Trainer(tiny_drafter(target), target, tiny_rows(), tiny_rows()[:6], tiny_config(), tmp_path)
    progress = trainer.train()
    for name in ("best", "final"):
        drafter = DSparkDrafter.from_pretrained(tmp_path / name)
        for key, value in drafter.state_dict().items():
            assert torch.equal(value, trainer.drafter.state_dict()[key])
    with (tmp_path / "log.jsonl").open(encoding="utf-8") as lines:
        events = [json.loads(line) for line in lines]
    assert [e["event"] for e in events] == ["start", *["step"] * 6, "evaluation", "end"]
    metrics = events[-2]["metrics"]
    assert {"all", "T=0", "T=1", "chat T=0", "code T=1"} <= metrics.keys()
    assert len(metrics["all"]["acceptance"]) == 3
    assert 1 <= metrics["all"]["tau_sampled"] <= 4
    assert progress.curve[-1]["step"] == 6
    assert progress.best_step == 6


def test_evaluation_repeats_itself_and_changes_nothing(tmp_path):
    """Two evaluations draw the same anchors, and neither moves a weight."""
    target = tiny_target()
    trainer = Trainer(tiny_drafter(target), target, tiny_rows(), tiny_rows()[:6], tiny_config(), tmp_path)
    before = copy.deepcopy(trainer.drafter.state_dict())
    assert trainer.evaluate(trainer.held_out) == trainer.evaluate(trainer.held_out)
    assert all(torch.equal(value, before[name]) for name, value in trainer.drafter.state_dict().items())


def test_master_weights_gather_updates_too_small_for_bfloat16():
    """Sixty steps of 1e-4 move a bf16 weight of 1.0, though one step alone rounds away."""
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterOptimizer([parameter])
    seen = []
    for _ in range(60):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step(1e-4, clip=10.0)
        seen.append(float(parameter.detach()[0]))
    assert seen[0] == 1.0
    assert seen[-1] < 1.0
    assert float(optimizer.masters[0][0]) == pytest.approx(1 - 60e-4, abs=1e-4)


def test_muon_moves_hidden_matrices_by_its_own_rule_and_the_rest_by_adamws():
    """A matrix follows torch.optim.Muon alone on a float32 copy, a vector and a vocabulary matrix follow torch.optim.AdamW."""
    torch.manual_seed(0)
    shapes = [(96, 64), (64,), (80, 64)]
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    muon = torch.optim.Muon(alone[:1], lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(alone[1:], lr=0.01, weight_decay=0.0)
    optimizer = MasterOptimizer(parameters, kind="muon", matrices=parameters[:1])
    for _ in range(3):
        for ours, theirs in zip(parameters, alone, strict=True):
            theirs.grad = torch.randn_like(ours)
            ours.grad = theirs.grad.clone()
        optimizer.step(0.01, clip=1e9)
        muon.step()
        adamw.step()
    for ours, theirs in zip(parameters, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizer_that_was_saved_goes_on_as_if_it_had_not_been(kind):
    """Two steps, saved and loaded into a fresh one between, equal two steps in a row, bit for bit."""

    def fresh():
        torch.manual_seed(1)
        return [torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 96), (96,))]

    def step(optimizer, seed):
        torch.manual_seed(seed)
        for parameter in optimizer.parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step(0.01, clip=1.0)

    def made():
        parameters = fresh()
        return MasterOptimizer(parameters, kind=kind, matrices=parameters[:1])

    through = made()
    step(through, 2)
    step(through, 3)
    first = made()
    step(first, 2)
    second = made()
    second.load_state_dict(first.state_dict())
    step(second, 3)
    for one, other in zip(through.parameters, second.parameters, strict=True):
        assert torch.equal(one, other)
    if kind == "muon":
        with pytest.raises(CheckpointError, match="another optimizer"):
            MasterOptimizer(fresh()).load_state_dict(first.state_dict())


def test_muon_takes_the_backbones_matrices_whatever_their_size(tmp_path):
    """fc and the projections of every layer are Muon's; norms, the sequential head and the confidence head are AdamW's."""
    target = tiny_target()
    trainer = Trainer(tiny_drafter(target), target, tiny_rows(), tiny_rows()[:6], tiny_config(optimizer="muon"), tmp_path)
    (_, others), (muon, matrices) = trainer.optimizer.parts
    assert isinstance(muon, torch.optim.Muon)
    names = {id(p): name for name, p in trainer.drafter.named_parameters()}
    theirs = {names[id(trainer.optimizer.parameters[i])] for i in matrices}
    projections = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert theirs == {"fc.weight"} | {f"layers.{i}.{name}.weight" for i in range(len(trainer.drafter.layers)) for name in projections}
    assert len(others) + len(matrices) == len(trainer.optimizer.parameters)


def test_gradient_that_is_not_finite_changes_no_weight():
    """The step is skipped and its norm reported."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = MasterOptimizer([parameter])
    parameter.grad = torch.tensor([float("nan"), 1.0])
    assert optimizer.step(0.1, clip=1.0) != optimizer.step(0.1, clip=1.0)
    assert parameter.tolist() == [1.0, 1.0]


def test_schedule_rises_over_the_warm_up_and_falls_to_zero():
    """Linear to the peak at 4%, cosine to 0; CE weight from 1.0 to 0.1 over the first 30%."""
    config = TrainingConfig(steps=100, learning_rate=1.0)
    assert [config.learning_rate_at(f) for f in (0.02, 0.04, 0.52, 1.0)] == pytest.approx([0.5, 1.0, 0.5, 0.0])
    assert [config.loss_weights_at(f).cross_entropy for f in (0.0, 0.15, 0.3, 1.0)] == pytest.approx([1.0, 0.55, 0.1, 0.1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one"),
        ({"steps": 3, "minutes": 1.0}, "exactly one"),
        ({"steps": 3, "batch_size": 0}, "batch_size is 0"),
        ({"steps": 3, "warmup": 1.0}, "warmup is 1.0"),
    ],
)
def test_contradictory_configurations_are_refused(settings, message):
    """The configuration is checked once, where it is made."""
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)


def test_a_run_by_the_clock_ends_when_its_minutes_are_over(tmp_path):
    """Length and schedule follow elapsed time."""
    target = tiny_target()
    trainer = Trainer(tiny_drafter(target), target, tiny_rows(), [], tiny_config(steps=None, minutes=0.02), tmp_path)
    progress = trainer.train()
    assert progress.step >= 1
    assert trainer.seconds() >= 1.2
