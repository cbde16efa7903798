"""What `hf-dspark train` and `hf-dspark finetune` do: load, make, train, write the recipe and the card. Knows the training package's
public doors, not its loop."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hf_dspark.adapters.files import fingerprint
from hf_dspark.adapters.lora import DEFAULT_TARGETS, adapter_names, add_lora, merge_adapter
from hf_dspark.checkpoints.card import write_training_card
from hf_dspark.cli.commands import computing, figure, load_quietly, pick_device, plain_name, print_json
from hf_dspark.errors import UnsupportedTargetError
from hf_dspark.evaluation.decoded import DecodedTau, spread_prompts
from hf_dspark.evaluation.metrics import machine_record
from hf_dspark.models.loading import load_drafter, load_target, parse_dtype
from hf_dspark.targets.target import check_target
from hf_dspark.training.configuration import TrainingConfig
from hf_dspark.training.data import DataSet, load_data, load_responses
from hf_dspark.training.files import writing
from hf_dspark.training.identity import load_weights
from hf_dspark.training.making import DrafterShape, make_drafter, size_of
from hf_dspark.training.memory import keep_freed_memory
from hf_dspark.training.trainer import Trainer


@dataclass(frozen=True)
class RunOptions:
    """What a run needs beside its hyper-parameters.

    Args:
        target (`str`): name, folder or Hub id.
        data (`tuple[Path, ...]`): data folders or response files.
        output (`Path`): folder of the run.
        epochs (`float`, *optional*): length of the run in passes over the data, instead of steps or minutes.
        target_name (`str`, *optional*): written into the drafter's config instead of `target`.
        dtype, device (`str`): of target and drafter.
        decode_prompts (`int`): held-out prompts that are decoded for real at every evaluation; 0 for none.
        decode_tokens (`int`): new tokens of each.
        max_tokens (`int`, *optional*): rows longer than this are left out, counted and logged.
        as_json (`bool`): print the result as one JSON object on the last line.
    """

    target: str
    data: tuple[Path, ...]
    output: Path
    epochs: float | None = None
    target_name: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    decode_prompts: int = 16
    decode_tokens: int = 64
    max_tokens: int | None = None
    as_json: bool = False


@dataclass(frozen=True)
class LoraOptions:
    """A LoRA adapter, as `hf_dspark.adapters.add_lora` takes it.

    Args:
        rank (`int`): of every pair of factors.
        alpha (`float`, *optional*): scale times rank; default: twice the rank.
        targets (`tuple[str, ...]`): groups or names of modules.
        dropout (`float`): before the factors, in training.
        name (`str`): the adapter's name.
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = DEFAULT_TARGETS
    dropout: float = 0.0
    name: str = "default"


def run_train(
    options: RunOptions, config: dict[str, Any], shape: DrafterShape, *, start_from: Path | None, drafter_name: str | None
) -> None:
    """Trains a fresh drafter, or an existing one further."""
    place, target, tokenizer, rows = _prepare(options)
    dtype = parse_dtype(options.dtype)
    torch.manual_seed(config["seed"])  # a fresh drafter's weights, where nothing of the target's takes their place
    if drafter_name is None:
        if isinstance(dtype, str):
            dtype = torch.bfloat16 if target.dtype == torch.float16 else target.dtype
        drafter, facts = make_drafter(
            target,
            tokenizer,
            rows.train_rows,
            rows.held_out_rows,
            shape,
            dtype=dtype,
            device=place,
            target_name=options.target_name or plain_name(options.target),
        )
        facts["arguments"] = {"shape": asdict(shape)}
    else:
        drafter, facts = _whole_drafter(drafter_name, target, options, place)
    if start_from is not None:
        facts["started_from_step"] = load_weights(drafter, start_from)
    train(options, config, drafter, target, rows, facts)


def run_finetune(options: RunOptions, config: dict[str, Any], *, drafter_name: str, lora: LoraOptions | None) -> None:
    """Trains an existing drafter on a domain: an adapter beside its frozen weights, or all of its weights."""
    place, target, _, rows = _prepare(options)
    if lora is None:
        drafter, facts = _whole_drafter(drafter_name, target, options, place)
    else:
        drafter = load_drafter(drafter_name, dtype=computing(options.dtype), device=place).bind(target)
        facts = {"base": plain_name(drafter_name), "base_fingerprint": fingerprint(drafter)}
        torch.manual_seed(config["seed"])
        add_lora(drafter, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, dropout=lora.dropout, adapter_name=lora.name)
        facts |= {"lora": asdict(lora), **size_of(drafter), "mask_token_id": drafter.config.mask_token_id}
    train(options, config, drafter, target, rows, facts)


def _whole_drafter(name: str, target: Any, options: RunOptions, place: torch.device) -> tuple[Any, dict[str, Any]]:
    """An existing drafter, all of whose weights are to be trained, and facts about it; an adapter on it becomes part of it."""
    drafter = load_drafter(name, dtype=computing(options.dtype), device=place).bind(target)
    if adapter_names(drafter):
        merge_adapter(drafter)
    facts: dict[str, Any] = {"base": plain_name(name), "base_fingerprint": fingerprint(drafter)}
    drafter.requires_grad_(True)
    drafter.drop_calibration()  # It is that of the weights that are about to change.
    return drafter, {**facts, **size_of(drafter), "mask_token_id": drafter.config.mask_token_id}


def train(options: RunOptions, config: dict[str, Any], drafter: Any, target: Any, rows: DataSet, recipe: dict[str, Any]) -> dict[str, Any]:
    """Trains a drafter that is ready for it; writes `recipe.json` at the start and at the end, and the cards.

    Returns:
        `dict`: the finished recipe.
    """
    settings = _configuration(config, options, len(rows.train_rows))
    decode = None
    if options.decode_prompts and rows.held_out_rows:
        prompts = spread_prompts(rows.held_out_rows, options.decode_prompts)
        decode = DecodedTau(target, prompts, max_new_tokens=options.decode_tokens)
    announcer = _Announcer(settings, rows=len(rows.train_rows))
    identity = {name: recipe[name] for name in ("base_fingerprint",) if name in recipe}
    trainer = Trainer(
        drafter,
        target,
        rows.train_rows,
        rows.held_out_rows,
        settings,
        options.output,
        announce=announcer,
        decode=decode,
        identity=identity,
    )
    leads = trainer.accelerator.is_main_process
    recipe = {
        **recipe,
        "arguments": {**recipe.get("arguments", {}), "options": _plain(asdict(options)), "training": asdict(settings)},
        "data": rows.summary(),
        "machine": machine_record(trainer.device),
        "seed": settings.seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processes": trainer.accelerator.num_processes,
    }
    if leads:
        _save(options.output / "recipe.json", recipe)
    with announcer if leads else nullcontext():
        progress = trainer.train()
    recipe["result"] = {
        "steps": progress.step,
        "minutes": trainer.seconds() / 60,
        "epochs": progress.step / trainer.batches_an_epoch,
        "tokens": progress.tokens,
        "anchors": progress.anchors,
        "best_step": progress.best_step,
        "best_score": progress.best_score,
        "hidden_states_bytes_on_disk": 0,
        "target_states_rows_in_memory": trainer.states.kept_rows,
    }
    recipe["curve"] = progress.curve
    if leads:
        _save(options.output / "recipe.json", recipe)
        for name in ("best", "final"):
            with writing(options.output / name / "README.md"):
                write_training_card(options.output / name, recipe, drafter)
        _tell(recipe, options)
    trainer.close()
    return recipe


def _prepare(options: RunOptions) -> tuple[torch.device, Any, Any, DataSet]:
    """Device, target, tokenizer and rows. What can be wrong with the data by itself is found before the target is loaded."""
    parse_dtype(options.dtype)
    place = pick_device(options.device)
    if place.type == "cpu":
        keep_freed_memory()
    with writing(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
    load_responses(options.data)
    with load_quietly(options.target):
        target, tokenizer = load_target(options.target, dtype=computing(options.dtype), device=place)
    target.requires_grad_(False)
    if options.decode_prompts:
        try:
            check_target(target)
        except UnsupportedTargetError as refused:
            raise ValueError(f"{refused} Training itself goes without decoding: give --decode-prompts 0.") from refused
    return place, target, tokenizer, load_data(options.data, target=target, max_tokens=options.max_tokens)


def _configuration(config: dict[str, Any], options: RunOptions, rows: int) -> TrainingConfig:
    if options.epochs is not None:
        if not options.epochs > 0:
            raise ValueError(f"epochs is {options.epochs}; allowed: above 0")
        steps = round(options.epochs * -(-rows // config["batch_size"]))
        config = {**config, "steps": max(1, steps)}
    return TrainingConfig(**config)


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """Options as JSON takes them; of paths only the name, since folders differ from machine to machine."""

    def one(value: Any) -> Any:
        if isinstance(value, Path):
            return value.name
        if isinstance(value, str):
            return plain_name(value)
        return [one(v) for v in value] if isinstance(value, list | tuple) else value

    return {name: one(value) for name, value in fields.items()}


def _save(path: Path, recipe: dict[str, Any]) -> None:
    waiting = path.with_suffix(".tmp")
    with writing(path):
        waiting.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
        os.replace(waiting, path)


def _tell(recipe: dict[str, Any], options: RunOptions) -> None:
    result = recipe["result"]
    if options.as_json:
        print_json({"output": str(options.output), **result})
        return
    Console().print(
        f"{result['steps']} steps, {result['anchors']:,} anchors, {result['minutes']:.1f} minutes; best at step {result['best_step']} "
        f"(score {figure(result['best_score'], 3)}). Drafter: {options.output / 'best'}",
        highlight=False,
        soft_wrap=True,
    )


class _Announcer:
    """Shows a run's events as a progress bar, and evaluations as lines above it.

    Args:
        config (`TrainingConfig`): of the run.
        rows (`int`): training rows.
    """

    def __init__(self, config: TrainingConfig, *, rows: int) -> None:
        self.config = config
        columns: Sequence[Any] = (
            TextColumn("training {task.fields[note]}"),
            BarColumn(),
            TextColumn("{task.percentage:>4.1f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self.bar = Progress(*columns, console=Console(stderr=True))
        self.task = self.bar.add_task("training", total=1.0, note=f"{rows} rows")

    def __enter__(self) -> _Announcer:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Take one event of the trainer."""
        if event["event"] == "step":
            done = event["step"] / self.config.steps if self.config.steps else event["seconds"] / (60 * (self.config.minutes or 1))
            tau, speed = figure(event["metrics"]["tau_greedy"], 2), f"{event['anchors_per_s']:.0f} anchors/s"
            note = f"step {event['step']} loss {event['loss']:.3f} tau~{tau} {speed}"
            self.bar.update(self.task, completed=done, note=note)
        elif event["event"] == "evaluation":
            decoded = event.get("decoded") or {}
            parts = [f"tau {figure(v['tau'], 3)} at {k}" for k, v in decoded.items() if k.startswith("T=")]
            kept = [
                f"{key} tau~{figure(v['tau_greedy' if key == 'T=0' else 'tau_sampled'], 3)}"
                for key, v in event["metrics"].items()
                if key.startswith("T=")
            ]
            told = ", ".join([*(f"decoded {part}" for part in parts), *(f"teacher-forced {part}" for part in kept)])
            self.bar.console.print(f"step {event['step']}, {event['minutes']:.1f} min: {told}", highlight=False, soft_wrap=True)
        elif event["event"] in ("resume", "skipped"):
            self.bar.console.print(f"{event['event']} at step {event['step']}", highlight=False)
