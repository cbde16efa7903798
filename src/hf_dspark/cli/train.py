"""What `hf-dspark train` and `hf-dspark finetune` do: load, make, train, write the recipe and the card. Knows the training package's
public doors, not its loop."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hf_dspark.adapter_files import fingerprint
from hf_dspark.adapters import DEFAULT_TARGETS, add_lora
from hf_dspark.cli.commands import figure, load_quietly, pick_device, print_json
from hf_dspark.evaluation.card import write_training_card
from hf_dspark.evaluation.decoded import DecodedTau, spread_prompts
from hf_dspark.evaluation.metrics import machine_record
from hf_dspark.hub import load_drafter, load_target, parse_dtype
from hf_dspark.training.configuration import TrainingConfig
from hf_dspark.training.data import DataSet, load_data
from hf_dspark.training.making import DrafterShape, make_drafter, size_of
from hf_dspark.training.memory import keep_freed_memory
from hf_dspark.training.trainer import Trainer, load_weights


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
    place = pick_device(options.device)
    if place.type == "cpu":
        keep_freed_memory()
    target, tokenizer, rows = _load(options, place)
    dtype = parse_dtype(options.dtype)
    torch.manual_seed(config["seed"])  # a fresh drafter's weights, where nothing of the target's takes their place
    if drafter_name is None:
        drafter, facts = make_drafter(
            target,
            tokenizer,
            rows.train_rows,
            rows.held_out_rows,
            shape,
            dtype=target.dtype if isinstance(dtype, str) else dtype,
            device=place,
            target_name=options.target_name,
        )
    else:
        drafter = load_drafter(drafter_name, dtype=dtype, device=place).bind(target)
        drafter.requires_grad_(True)
        drafter.config.confidence_temperatures = None  # They were those of the weights that are about to change.
        facts = {**size_of(drafter), "mask_token_id": drafter.config.mask_token_id, "started_from": drafter_name}
    if start_from is not None:
        facts["started_from_step"] = load_weights(drafter, start_from)
    train(options, config, drafter, target, rows, {"arguments": {"shape": asdict(shape)}, **facts})


def run_finetune(options: RunOptions, config: dict[str, Any], *, drafter_name: str, lora: LoraOptions | None) -> None:
    """Trains an existing drafter on a domain: an adapter beside its frozen weights, or all of its weights."""
    place = pick_device(options.device)
    if place.type == "cpu":
        keep_freed_memory()
    target, _, rows = _load(options, place)
    drafter = load_drafter(drafter_name, dtype=parse_dtype(options.dtype), device=place).bind(target)
    facts: dict[str, Any] = {"base": drafter_name, "base_fingerprint": fingerprint(drafter)}
    if lora is None:
        drafter.requires_grad_(True)
        drafter.config.confidence_temperatures = None  # They were those of the weights that are about to change.
    else:
        torch.manual_seed(config["seed"])
        add_lora(drafter, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, dropout=lora.dropout, adapter_name=lora.name)
        facts["lora"] = asdict(lora)
    train(options, config, drafter, target, rows, {**facts, **size_of(drafter), "mask_token_id": drafter.config.mask_token_id})


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
    options.output.mkdir(parents=True, exist_ok=True)
    announcer = _Announcer(settings, rows=len(rows.train_rows))
    trainer = Trainer(drafter, target, rows.train_rows, rows.held_out_rows, settings, options.output, announce=announcer, decode=decode)
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
    with announcer:
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
            write_training_card(options.output / name, recipe, drafter)
        _tell(recipe, options)
    return recipe


def _load(options: RunOptions, place: torch.device) -> tuple[Any, Any, DataSet]:
    """Target, tokenizer and rows; the rows first where that can be, since a mistake there is cheap to find."""
    parse_dtype(options.dtype)
    with load_quietly(options.target):
        target, tokenizer = load_target(options.target, dtype=options.dtype, device=place)
    target.requires_grad_(False)
    rows = load_data(options.data, target=target, max_tokens=options.max_tokens)
    return target, tokenizer, rows


def _configuration(config: dict[str, Any], options: RunOptions, rows: int) -> TrainingConfig:
    if options.epochs is not None:
        if config.get("steps") is not None or config.get("minutes") is not None:
            raise ValueError("give one of --steps, --minutes and --epochs, not several")
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
        return [one(v) for v in value] if isinstance(value, list | tuple) else value

    return {name: one(value) for name, value in fields.items()}


def _save(path: Path, recipe: dict[str, Any]) -> None:
    waiting = path.with_suffix(".tmp")
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
