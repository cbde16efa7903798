"""The commands and their options. Knows what a user may type; imports what does the work only when a command runs."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from typing import Annotated

import typer

from hf_dspark.cli import budget_app, sharing_app
from hf_dspark.cli.options import (
    BatchSize,
    Budget,
    Copying,
    Device,
    Drafter,
    Dtype,
    Json,
    Limit,
    MaxNewTokens,
    MaxVerifyTokens,
    PromptFiles,
    Seed,
    Target,
    Temperature,
    TopP,
    Verification,
    finite,
)

app = typer.Typer(
    name="hf-dspark",
    help="Lossless speculative decoding with DSpark drafters for transformers.",
    add_completion=False,
    rich_markup_mode=None,
)


def _version() -> str:
    """Reads the version out of the package without importing it."""
    spec = importlib.util.find_spec("hf_dspark")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the package hf_dspark is not installed beside its command; run: pip install hf-dspark")
    return runpy.run_path(str(Path(spec.submodule_search_locations[0], "version.py")))["__version__"]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Lossless speculative decoding with DSpark drafters for transformers."""
    if version:
        typer.echo(f"hf-dspark {_version()}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise typer.BadParameter(
            "no command given; choose one of demo, generate, eval, profile, calibrate, bench, data, train, finetune, info, convert, push."
        )


@app.command()
def demo(
    target: Target = "smollm2",
    drafter: Drafter = "smollm2-dspark",
    max_new_tokens: MaxNewTokens = 96,
    budget: Budget = None,
    device: Device = "auto",
    quiet: Annotated[bool, typer.Option("--json", help="Print the JSON line only.")] = False,
) -> None:
    """Show plain and speculated text side by side, and what speculation gained.

    The last line is a JSON object. Exit code 1 if the texts differ in fp32, which they must not.
    """
    from hf_dspark.cli.demo import run_demo

    raise typer.Exit(run_demo(target, drafter, max_new_tokens=max_new_tokens, budget=budget, device=device, quiet=quiet))


@app.command()
def generate(
    target: Target = "smollm2",
    drafter: Drafter = "smollm2-dspark",
    prompt: Annotated[str | None, typer.Option(help="One prompt.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, readable=True, help="A JSONL file of prompts, one a line."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of the file to use, from its top.")] = None,
    batch_size: BatchSize = 1,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = 128,
    budget: Budget = None,
    copying: Copying = True,
    verification: Verification = "block",
    seed: Seed = 0,
    max_verify_tokens: MaxVerifyTokens = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it is decided.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Generate text with the drafter's help.

    A prompt file has one JSON object a line: {"turns": ["text"]}, {"prompt": "text"} or {"messages": [{"role": ..,
    "content": ..}]}.
    """
    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("give either --prompt TEXT or --prompts FILE.jsonl, and not both.")
    if prompt is not None and not prompt.strip():
        raise typer.BadParameter("the prompt is empty.", param_hint="'--prompt'")
    if prompt is not None and limit is not None:
        raise typer.BadParameter("--limit goes with --prompts, not with --prompt.")
    if stream and batch_size != 1:
        raise typer.BadParameter(f"--stream shows one text at a time: leave out --batch-size {batch_size}.")
    from hf_dspark.cli.commands import run_generate

    run_generate(
        target,
        drafter,
        prompt=prompt,
        prompts=prompts,
        limit=limit,
        batch_size=batch_size,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        budget=budget,
        copying=copying,
        verification=verification,
        seed=seed,
        max_verify_tokens=max_verify_tokens,
        stream=stream,
        dtype=dtype,
        device=device,
        as_json=json,
    )


@app.command(name="eval")
def evaluate(
    prompts: PromptFiles,
    target: Target = "smollm2",
    drafter: Drafter = "smollm2-dspark",
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    batch_size: BatchSize = 1,
    budget: Budget = None,
    copying: Copying = True,
    verification: Verification = "block",
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    json: Json = False,
    output: Annotated[Path | None, typer.Option(dir_okay=False, writable=True, help="Also write the JSON object to this file.")] = None,
) -> None:
    """Measure accepted length, acceptance by position, and speed against the plain target and prompt lookup.

    tau is the accepted length a round INCLUDING the target's own bonus token.
    """
    if output is not None and not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"the folder {output.absolute().parent} does not exist.", param_hint="'--output'")
    from hf_dspark.cli.commands import run_eval

    run_eval(
        target,
        drafter,
        prompts=prompts,
        limit=limit,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        batch_size=batch_size,
        budget=budget,
        copying=copying,
        verification=verification,
        dtype=dtype,
        device=device,
        seed=seed,
        as_json=json,
        output=output,
    )


app.command()(budget_app.profile)
app.command()(budget_app.calibrate)
app.command()(budget_app.bench)


@app.command()
def data(
    output: Annotated[Path, typer.Option(file_okay=False, help="The data folder. What it holds already is not made again.")],
    target: Target = "smollm2",
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="A file *.jsonl, *.jsonl.gz or *.parquet, or a Hub data set `owner/name[:split]`; repeat it for more."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each file to use, from its top.")] = None,
    exclude: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, readable=True, help="A prompt file (an evaluation set) whose prompts are left out."),
    ] = None,
    self_prompt: Annotated[int, typer.Option(min=0, help="Prompts that the target writes itself (Magpie).")] = 0,
    system: Annotated[list[str] | None, typer.Option(help="System prompt under which it writes them; one a domain.")] = None,
    begin: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, readable=True, help='JSON lines of first words: {"source": "code", "begin": "Write a"}.'),
    ] = None,
    self_temperature: Annotated[float, typer.Option(callback=finite, help="Temperature at which it writes prompts.")] = 0.8,
    self_tokens: Annotated[int, typer.Option(min=4, help="Tokens of a prompt it writes; longer ones are rejected.")] = 96,
    temperature: Annotated[list[float] | None, typer.Option(min=0.0, help="Of responses; give several to mix. Default: 0.")] = None,
    top_p: TopP = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="New tokens a response at most.")] = 256,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longer prompts are skipped (counted).")] = 768,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in flight; a row that ends makes room for the next.")] = 64,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Stop by the clock; the same command goes on later.")] = None,
    held_out: Annotated[float, typer.Option(min=0.0, max=0.99, help="Share of prompts to be held out, recorded for training.")] = 0.04,
    thinking: Annotated[bool, typer.Option("--thinking", help="Let the chat template switch thinking on.")] = False,
    format: Annotated[str, typer.Option(help="jsonl, or parquet once all is answered.")] = "jsonl",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the target on the Hub.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Let the target write the responses that its drafter learns from.

    A prompt row is {"turns": ["text", ..]} (every turn is answered), {"messages": [..]} (answers in it are made anew) or {"text": ".."}
    (raw text, continued). Run the same command again after an interruption, even a kill: nothing is lost, nothing is made twice.
    """
    from hf_dspark.cli.data import DataOptions, openings_of, run_data
    from hf_dspark.training.responses import DataSettings

    options = DataOptions(
        target=target,
        output=output,
        prompts=tuple(prompts or ()),
        exclude=tuple(exclude or ()),
        systems=tuple(system or ()),
        begins=tuple(begin or ()),
        limit=limit,
        minutes=minutes,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        revision=revision,
        format=format,
        as_json=json,
    )
    settings = DataSettings(
        temperatures=tuple(temperature or (0.0,)),
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens,
        seed=seed,
        thinking=thinking,
        held_out=held_out,
        self_prompts=self_prompt,
        self_temperature=self_temperature,
        self_tokens=self_tokens,
        openings=openings_of(options.systems, options.begins),
    )
    run_data(options, settings)


DataPaths = Annotated[
    list[Path],
    typer.Option(exists=True, readable=True, help="What `hf-dspark data` wrote, or a file of response rows; repeat it for more."),
]
RunFolder = Annotated[Path, typer.Option(file_okay=False, help="Folder of the run. A checkpoint found in it is resumed.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Length of the run in steps; a resumed run repeats the uninterrupted one.")]
Minutes = Annotated[float | None, typer.Option(min=0.01, help="Length of the run by the clock.")]
Epochs = Annotated[float | None, typer.Option(min=0.0, help="Length of the run in passes over the data.")]
StepRows = Annotated[int, typer.Option(min=1, help="Rows a step, over all processes.")]
Accumulation = Annotated[int, typer.Option(min=1, help="Parts that a process runs its rows of a step in, to bound memory.")]
Anchors = Annotated[int, typer.Option(min=1, help="Blocks a row at most.")]
Rate = Annotated[float, typer.Option("--lr", min=0.0, callback=finite, help="Peak learning rate; warm-up, then cosine to 0.")]
StatesMemory = Annotated[
    float,
    typer.Option(min=0.0, help="GiB of memory that may keep the target's states for later passes over the data. Nothing goes to disk."),
]
DecodePrompts = Annotated[int, typer.Option(min=0, help="Held-out prompts decoded for real at every evaluation; 0 for none.")]
EvaluationMinutes = Annotated[float, typer.Option(min=0.01, help="Minutes between evaluations.")]
CheckpointMinutes = Annotated[float, typer.Option(min=0.01, help="Minutes between checkpoints.")]
MaxTokens = Annotated[int | None, typer.Option(min=2, help="Leave rows longer than this out (counted and logged).")]
Chunk = Annotated[int, typer.Option(min=1, help="Block positions whose logits exist at one time: bounds memory.")]
TargetName = Annotated[str | None, typer.Option(help="The target's name for config and card, where it is not --target.")]


@app.command()
def train(
    context: typer.Context,
    data: DataPaths,
    output: RunFolder,
    target: Target = "smollm2",
    steps: Steps = None,
    minutes: Minutes = None,
    epochs: Epochs = None,
    layers: Annotated[int, typer.Option(min=1, help="Backbone layers.")] = 2,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens drafted a round; 1 is a one-token drafter in the manner of MTP-1.")] = 7,
    head: Annotated[str, typer.Option(help="Sequential head: vanilla, gated, rnn, or none (DFlash).")] = "vanilla",
    rank: Annotated[int, typer.Option(min=1, help="Rank of the sequential head.")] = 256,
    taps: Annotated[list[int] | None, typer.Option(help="A target layer to read; give it again for more. Default: five, spread.")] = None,
    mask_token: Annotated[str | None, typer.Option(help="Token or id that text does not use. Default: chosen from the tokenizer.")] = None,
    draft_vocab: Annotated[int | None, typer.Option(min=1, help="Draft only the so many most frequent tokens. Default: all.")] = None,
    start: Annotated[str, typer.Option(help="Backbone from the `target`'s last layers, or `random`.")] = "target",
    head_start: Annotated[str, typer.Option(help="Sequential head from the `target`'s own next-token logits, or `random`.")] = "target",
    drafter: Annotated[str | None, typer.Option(help="Train this drafter further instead of a fresh one.")] = None,
    start_from: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="Start from this run's newest weights.")] = None,
    batch_size: StepRows = 8,
    accumulation: Accumulation = 1,
    anchors: Anchors = 64,
    lr: Rate = 1.5e-3,
    warmup: Annotated[float, typer.Option(min=0.0, max=0.99, help="Share of the run with a rising rate.")] = 0.04,
    clip: Annotated[float, typer.Option(min=0.0, help="Largest gradient norm.")] = 1.0,
    optimizer: Annotated[str, typer.Option(help="adamw, or muon: Muon on the backbone's matrices, AdamW on the rest.")] = "adamw",
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Decoupled.")] = 0.0,
    ce_start: Annotated[float, typer.Option(min=0.0, help="Weight of the cross entropy at the start ..")] = 1.0,
    ce_end: Annotated[float, typer.Option(min=0.0, help=".. and at the end of its annealing.")] = 0.1,
    ce_anneal: Annotated[float, typer.Option(min=0.0, max=0.99, help="Share of the run over which it falls.")] = 0.3,
    soft_labels: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the CE taken against the target's distribution.")] = 0.0,
    total_variation: Annotated[float, typer.Option(min=0.0, help="Weight of the L1 distance.")] = 0.9,
    confidence: Annotated[float, typer.Option(min=0.0, help="Weight of the confidence head's loss.")] = 1.0,
    decay: Annotated[float, typer.Option(min=0.01, help="Decay of the loss along the block, in tokens.")] = 4.0,
    chunk: Chunk = 256,
    states_memory: StatesMemory = 0.0,
    max_tokens: MaxTokens = None,
    decode_prompts: DecodePrompts = 16,
    evaluation_minutes: EvaluationMinutes = 10.0,
    evaluation_rows: Annotated[int, typer.Option(min=1, help="Held-out rows of evaluations on the way; the last takes all.")] = 64,
    checkpoint_minutes: CheckpointMinutes = 5.0,
    target_name: TargetName = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Train a drafter on responses of its own target, without a cache of hidden states.

    Data comes from `hf-dspark data`. The target's states are computed on the fly. The run folder gets recipe.json, log.jsonl, TensorBoard
    scalars, resumable checkpoints, and the drafters `best` and `final` with a card. Run the same command again after an interruption.
    Several processes: `accelerate launch -m hf_dspark train ..`.
    """
    if drafter is not None:
        _refuse_given(context, "--drafter brings them along", "layers", "block_size", "head", "rank", "taps", "mask_token", "draft_vocab")
        _refuse_given(context, "--drafter brings its weights along", "start", "head_start", "start_from", "target_name")
    from hf_dspark.cli.train import RunOptions, run_train
    from hf_dspark.training.making import DrafterShape

    options = RunOptions(
        target=target,
        data=tuple(data),
        output=output,
        epochs=_length(steps, minutes, epochs),
        target_name=target_name,
        dtype=dtype,
        device=device,
        decode_prompts=decode_prompts,
        max_tokens=max_tokens,
        as_json=json,
    )
    shape = DrafterShape(
        layers=layers,
        block_size=block_size,
        head=head,
        rank=rank,
        taps=tuple(taps) if taps else None,
        mask_token=mask_token,
        draft_vocab=draft_vocab,
        start=start,
        head_start=head_start,
    )
    config = {
        "steps": steps,
        "minutes": minutes,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "num_anchors": anchors,
        "learning_rate": lr,
        "warmup": warmup,
        "clip": clip,
        "optimizer": optimizer,
        "weight_decay": weight_decay,
        "ce_start": ce_start,
        "ce_end": ce_end,
        "ce_anneal": ce_anneal,
        "soft_labels": soft_labels,
        "total_variation": total_variation,
        "confidence": confidence,
        "decay": decay,
        "chunk_positions": chunk,
        "states_memory_gib": states_memory,
        "evaluation_minutes": evaluation_minutes,
        "evaluation_rows": evaluation_rows,
        "checkpoint_minutes": checkpoint_minutes,
        "seed": seed,
    }
    run_train(options, config, shape, start_from=start_from, drafter_name=drafter)


def _refuse_given(context: typer.Context, why: str, *names: str) -> None:
    """Refuse options that would have no effect."""
    given = [name for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if given:
        listed = ", ".join("--" + name.replace("_", "-") for name in given)
        raise typer.BadParameter(f"{listed} would have no effect: {why}. Leave one of them out.")


def _length(steps: int | None, minutes: float | None, epochs: float | None) -> float | None:
    """The epochs, once exactly one of the three lengths is given."""
    if sum(length is not None for length in (steps, minutes, epochs)) != 1:
        raise typer.BadParameter("give exactly one of --steps, --minutes and --epochs.")
    return epochs


@app.command()
def finetune(
    context: typer.Context,
    data: DataPaths,
    output: RunFolder,
    target: Target = "smollm2",
    drafter: Drafter = "smollm2-dspark",
    steps: Steps = None,
    minutes: Minutes = None,
    epochs: Epochs = None,
    lora_rank: Annotated[int, typer.Option(min=0, help="Rank of the LoRA adapter; 0 trains all weights.")] = 16,
    lora_alpha: Annotated[float | None, typer.Option(help="Scale of the adapter times its rank.")] = None,
    lora_target: Annotated[
        list[str] | None,
        typer.Option(help="What it changes: attention, mlp, fc, head, confidence, or a module's name; repeat it for more. Default: all."),
    ] = None,
    lora_dropout: Annotated[float, typer.Option(min=0.0, max=0.99, help="Dropout before the adapter's factors.")] = 0.0,
    adapter_name: Annotated[str, typer.Option(help="Name of the adapter, to choose it by when several are loaded.")] = "default",
    batch_size: StepRows = 8,
    accumulation: Accumulation = 1,
    anchors: Anchors = 64,
    lr: Rate = 1e-3,
    warmup: Annotated[float, typer.Option(min=0.0, max=0.99, help="Share of the run with a rising rate.")] = 0.04,
    ce: Annotated[float, typer.Option(min=0.0, help="Weight of the cross entropy; the L1 distance has 0.9.")] = 0.1,
    chunk: Chunk = 256,
    states_memory: StatesMemory = 0.0,
    max_tokens: MaxTokens = None,
    decode_prompts: DecodePrompts = 16,
    evaluation_minutes: EvaluationMinutes = 10.0,
    checkpoint_minutes: CheckpointMinutes = 5.0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Fine-tune a drafter on a domain's responses: a LoRA adapter of a few megabytes, or all weights.

    Make the data with `hf-dspark data` from prompts of the domain. The target is never changed, and neither is its output's distribution.
    Use the adapter with drafter.load_adapter(FOLDER), or merge it with hf_dspark.adapters.merge_adapter(drafter).
    """
    if lora_rank == 0:
        _refuse_given(context, "there is no adapter with --lora-rank 0", "lora_alpha", "lora_target", "lora_dropout", "adapter_name")
    from hf_dspark.cli.train import LoraOptions, RunOptions, run_finetune

    options = RunOptions(
        target=target,
        data=tuple(data),
        output=output,
        epochs=_length(steps, minutes, epochs),
        dtype=dtype,
        device=device,
        decode_prompts=decode_prompts,
        max_tokens=max_tokens,
        as_json=json,
    )
    lora = None
    if lora_rank:
        chosen = {"targets": tuple(lora_target)} if lora_target else {}
        lora = LoraOptions(rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout, name=adapter_name, **chosen)
    config = {
        "steps": steps,
        "minutes": minutes,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "num_anchors": anchors,
        "learning_rate": lr,
        "warmup": warmup,
        "ce_start": ce,
        "ce_end": ce,
        "chunk_positions": chunk,
        "states_memory_gib": states_memory,
        "evaluation_minutes": evaluation_minutes,
        "checkpoint_minutes": checkpoint_minutes,
        "seed": seed,
    }
    run_finetune(options, config, drafter_name=drafter, lora=lora)


app.command()(sharing_app.info)
app.command()(sharing_app.convert)
app.command()(sharing_app.push)
