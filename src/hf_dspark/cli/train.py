"""The commands `train` and `finetune`: load, make, train, write the recipe and the card. torch is loaded when one of them runs."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hf_dspark.cli.common import computing, figure, load_quietly, pick_device, plain_name, print_json
from hf_dspark.cli.dataclass_options import field_options, take
from hf_dspark.cli.options import Device, Drafter, Dtype, Json, Target
from hf_dspark.cli.progress import RunBar
from hf_dspark.training.configuration import DrafterShape, TrainingConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_dspark.models.modeling_dspark import DSparkDrafter
    from hf_dspark.training.data import DataSet


@dataclass(frozen=True)
class RunOptions:
    """What a run needs beside its hyper-parameters."""

    data: Annotated[
        list[Path],
        typer.Option(exists=True, readable=True, help="What `hf-dspark data` wrote, or a file of response rows; repeat it for more."),
    ]
    output: Annotated[Path, typer.Option(file_okay=False, help="Folder of the run. A checkpoint found in it is resumed.")]
    target: Target = "smollm2"
    epochs: Annotated[float | None, typer.Option(min=0.0, help="Length of the run in passes over the data.")] = None
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Leave rows longer than this out (counted and logged).")] = None
    decode_prompts: Annotated[int, typer.Option(min=0, help="Held-out prompts decoded for real at every evaluation; 0 for none.")] = 16
    target_name: Annotated[str | None, typer.Option(help="The target's name for config and card, where it is not --target.")] = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    as_json: Json = False
    decode_tokens: int = 64  # new tokens of each decoded prompt


@field_options(RunOptions, DrafterShape, TrainingConfig)
def train(
    context: typer.Context,
    drafter: Annotated[str | None, typer.Option(help="Train this drafter further instead of a fresh one.")] = None,
    start_from: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="Start from this run's newest weights.")] = None,
    **options: Any,
) -> None:
    """Train a drafter on responses of its own target, without a cache of hidden states.

    Data comes from `hf-dspark data`. The target's states are computed on the fly. The run folder gets recipe.json, log.jsonl, TensorBoard
    scalars, resumable checkpoints, and the drafters `best` and `final` with a card. Run the same command again after an interruption.
    Several processes: `accelerate launch -m hf_dspark train ..`.
    """
    if drafter is not None:
        names = [one.name for one in fields(DrafterShape)]
        _refuse_given(context, "--drafter brings its own along", *names, "start_from", "target_name")
    run, config = _chosen(options)
    shape = DrafterShape(**take(DrafterShape, options))
    import torch

    from hf_dspark.models.loading import parse_dtype
    from hf_dspark.training.new_drafter import make_drafter
    from hf_dspark.training.run_folder import load_weights

    device, model, tokenizer, rows = _prepare(run)
    torch.manual_seed(config["seed"])  # a fresh drafter's weights, where none of the target's take their place
    if drafter is not None:
        made, facts = _existing(drafter, model, run, device, whole=True)
    else:
        dtype = parse_dtype(run.dtype)
        if isinstance(dtype, str):
            dtype = torch.bfloat16 if model.dtype == torch.float16 else model.dtype
        place: dict[str, Any] = {"dtype": dtype, "device": device, "target_name": run.target_name or plain_name(run.target)}
        made, facts = make_drafter(model, tokenizer, rows.train_rows, rows.held_out_rows, shape, **place)
        facts["arguments"] = {"shape": asdict(shape)}
    if start_from is not None:
        facts["started_from_step"] = load_weights(made, start_from)
    _run(run, config, made, model, rows, facts)


_FINETUNE = {one.name for one in fields(RunOptions)} - {"target_name"} | {
    *("steps", "minutes", "batch_size", "accumulation", "num_anchors", "learning_rate", "warmup", "chunk_positions"),
    *("states_memory_gib", "evaluation_minutes", "checkpoint_minutes", "seed"),
}


@field_options(RunOptions, TrainingConfig, only=_FINETUNE, learning_rate=1e-3)
def finetune(
    context: typer.Context,
    drafter: Drafter = "smollm2-dspark",
    lora_rank: Annotated[int, typer.Option(min=0, help="Rank of the LoRA adapter; 0 trains all weights.")] = 16,
    lora_alpha: Annotated[float | None, typer.Option(help="Scale of the adapter times its rank.")] = None,
    lora_target: Annotated[
        list[str] | None,
        typer.Option(help="What it changes: attention, mlp, fc, head, confidence, or a module's name; repeat it for more. Default: all."),
    ] = None,
    lora_dropout: Annotated[float, typer.Option(min=0.0, max=0.99, help="Dropout before the adapter's factors.")] = 0.0,
    adapter_name: Annotated[str, typer.Option(help="Name of the adapter, to choose it by when several are loaded.")] = "default",
    ce: Annotated[float, typer.Option(min=0.0, help="Weight of the cross entropy; the L1 distance has 0.9.")] = 0.1,
    **options: Any,
) -> None:
    """Fine-tune a drafter on a domain's responses: a LoRA adapter of a few megabytes, or all weights.

    Make the data with `hf-dspark data` from prompts of the domain. The target is never changed, and neither is its output's distribution.
    Use the adapter with drafter.load_adapter(FOLDER), or merge it with hf_dspark.adapters.merge_adapter(drafter).
    """
    if lora_rank == 0:
        _refuse_given(context, "there is no adapter with --lora-rank 0", "lora_alpha", "lora_target", "lora_dropout", "adapter_name")
    run, config = _chosen({**options, "ce_start": ce, "ce_end": ce})
    import torch

    from hf_dspark.adapters.lora import DEFAULT_TARGETS, add_lora

    device, model, _, rows = _prepare(run)
    made, facts = _existing(drafter, model, run, device, whole=lora_rank == 0)
    if lora_rank:
        targets = tuple(lora_target or DEFAULT_TARGETS)
        lora: dict[str, Any] = {"rank": lora_rank, "alpha": lora_alpha, "targets": targets, "dropout": lora_dropout}
        torch.manual_seed(config["seed"])
        add_lora(made, adapter_name=adapter_name, **lora)
        facts["lora"] = {**lora, "name": adapter_name}
    _run(run, config, made, model, rows, facts)


def _refuse_given(context: typer.Context, why: str, *names: str) -> None:
    """Refuse options that would have no effect."""
    given = [name for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if given:
        listed = ", ".join("--" + name.replace("_", "-") for name in given)
        raise typer.BadParameter(f"{listed} would have no effect: {why}. Leave one of them out.")


def _chosen(options: dict[str, Any]) -> tuple[RunOptions, dict[str, Any]]:
    """The run's options and its hyper-parameters, checked; with --epochs the length in steps is still missing."""
    if sum(options[name] is not None for name in ("steps", "minutes", "epochs")) != 1:
        raise typer.BadParameter("give exactly one of --steps, --minutes and --epochs.")
    run, config = RunOptions(**take(RunOptions, options)), take(TrainingConfig, options)
    TrainingConfig(**({**config, "steps": 1} if run.epochs is not None else config))
    return run, config


def _prepare(run: RunOptions) -> tuple[torch.device, PreTrainedModel, PreTrainedTokenizerBase, DataSet]:
    """Device, target, tokenizer and rows. What can be wrong with the data by itself is found before the target is loaded."""
    from hf_dspark.errors import UnsupportedTargetError
    from hf_dspark.models.loading import load_target, parse_dtype
    from hf_dspark.targets.self_test import check_target
    from hf_dspark.training.data import load_data, load_responses
    from hf_dspark.training.memory import keep_freed_memory
    from hf_dspark.training.run_folder import writing

    parse_dtype(run.dtype)
    device = pick_device(run.device)
    if device.type == "cpu":
        keep_freed_memory()
    with writing(run.output):
        run.output.mkdir(parents=True, exist_ok=True)
    load_responses(run.data)
    with load_quietly(run.target):
        target, tokenizer = load_target(run.target, dtype=computing(run.dtype), device=device)
    target.requires_grad_(False)
    if run.decode_prompts:
        try:
            check_target(target)
        except UnsupportedTargetError as refused:
            raise ValueError(f"{refused} Training itself goes without decoding: give --decode-prompts 0.") from refused
    return device, target, tokenizer, load_data(run.data, target, max_tokens=run.max_tokens)


def _existing(
    name: str, target: PreTrainedModel, run: RunOptions, device: torch.device, *, whole: bool
) -> tuple[DSparkDrafter, dict[str, Any]]:
    """A drafter that is to be trained further, and facts about it; if as a whole, an adapter on it becomes part of it."""
    from hf_dspark.adapters.files import fingerprint
    from hf_dspark.adapters.lora import adapter_names, merge_adapter
    from hf_dspark.models.loading import load_drafter

    drafter = load_drafter(name, dtype=computing(run.dtype), device=device).bind(target)
    if whole and adapter_names(drafter):
        merge_adapter(drafter)
    facts = {"base": plain_name(name), "base_fingerprint": fingerprint(drafter)}
    if whole:
        drafter.requires_grad_(True)
        drafter.drop_calibration()  # It is that of the weights that are about to change.
    return drafter, facts


def _run(
    run: RunOptions, config: dict[str, Any], drafter: DSparkDrafter, target: PreTrainedModel, rows: DataSet, recipe: dict[str, Any]
) -> None:
    """Train a drafter that is ready for it; write `recipe.json` at the start and at the end, and the cards."""
    from hf_dspark.checkpoints.card import write_training_card
    from hf_dspark.evaluation.decoded import DecodedTau, spread_prompts
    from hf_dspark.evaluation.metrics import machine_record
    from hf_dspark.training.new_drafter import size_of
    from hf_dspark.training.run_folder import writing
    from hf_dspark.training.trainer import Trainer
    from hf_dspark.utils.files import atomic_write_json

    recipe |= {**size_of(drafter), "mask_token_id": drafter.config.mask_token_id}
    if run.epochs is not None:
        if not run.epochs > 0:
            raise ValueError(f"epochs is {run.epochs}; allowed: above 0. Give --steps for a shorter run.")
        config = {**config, "steps": max(1, round(run.epochs * -(-len(rows.train_rows) // config["batch_size"])))}
    settings = TrainingConfig(**config)
    decode = None
    if run.decode_prompts and rows.held_out_rows:
        decode = DecodedTau(target, spread_prompts(rows.held_out_rows, run.decode_prompts), max_new_tokens=run.decode_tokens)
    bar = RunBar("training", silent=int(os.environ.get("RANK", "0")) > 0)  # of several launched processes one speaks
    hooks: dict[str, Any] = {"announce": lambda event: _show(bar, settings, event), "decode": decode}
    identity = {name: recipe[name] for name in ("base_fingerprint",) if name in recipe}
    trainer = Trainer(drafter, target, rows.train_rows, rows.held_out_rows, settings, run.output, **hooks, identity=identity)

    def save() -> None:
        with writing(run.output / "recipe.json"):
            atomic_write_json(run.output / "recipe.json", recipe, indent=1)

    leads = trainer.processes.leads
    recipe |= {
        "arguments": {**recipe.get("arguments", {}), "options": _plain(asdict(run)), "training": asdict(settings)},
        "data": rows.summary(),
        "machine": machine_record(trainer.device),
        "seed": settings.seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processes": trainer.processes.count,
    }
    if leads:
        save()
    with bar:
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
        "target_states_rows_in_memory": trainer.objective.states.rows_in_memory,
    }
    recipe["curve"] = progress.curve
    if leads:
        save()
        for name in ("best", "final"):
            with writing(run.output / name / "README.md"):
                write_training_card(run.output / name, recipe, drafter)
        if run.as_json:
            print_json({"output": str(run.output), **recipe["result"]})
        else:
            best = f"best at step {progress.best_step} (score {figure(progress.best_score, 3)})"
            told = f"{progress.step} steps, {progress.anchors:,} anchors, {recipe['result']['minutes']:.1f} minutes; {best}. "
            Console().print(f"{told}Drafter: {run.output / 'best'}", highlight=False, soft_wrap=True)
    trainer.close()


def _plain(value: Any) -> Any:
    """Options as JSON takes them; of paths only the name, since folders differ from machine to machine."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.name if isinstance(value, Path) else plain_name(value) if isinstance(value, str) else value


def _show(bar: RunBar, config: TrainingConfig, event: dict[str, Any]) -> None:
    """Show one event of the trainer: steps as progress, evaluations as lines."""
    if event["event"] == "step":
        done = event["step"] / config.steps if config.steps else event["seconds"] / (60 * (config.minutes or 1))
        tau, speed = figure(event["metrics"]["tau_greedy"], 2), f"{event['anchors_per_s']:.0f} anchors/s"
        bar.update(min(done, 1.0), 1.0, f"step {event['step']} loss {event['loss']:.3f} tau~{tau} {speed}")
    elif event["event"] == "evaluation":
        told = [f"decoded tau {figure(v['tau'], 3)} at {k}" for k, v in (event.get("decoded") or {}).items() if k.startswith("T=")]
        for key, values in event["metrics"].items():
            if key.startswith("T="):
                told.append(f"teacher-forced {key} tau~{figure(values['tau_greedy' if key == 'T=0' else 'tau_sampled'], 3)}")
        bar.print(f"step {event['step']}, {event['minutes']:.1f} min: {', '.join(told)}")
    elif event["event"] in ("resume", "skipped"):
        bar.print(f"{event['event']} at step {event['step']}")
