"""The commands and their options. Knows what a user may type; imports what does the work only when a command runs."""

from __future__ import annotations

import importlib.util
import math
import runpy
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="hf-dspark",
    help="Lossless speculative decoding with DSpark drafters for transformers.",
    add_completion=False,
    rich_markup_mode=None,
)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def _version() -> str:
    """Reads the version out of the package without importing it."""
    spec = importlib.util.find_spec("hf_dspark")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the package hf_dspark is not installed beside its command; run: pip install hf-dspark")
    return runpy.run_path(str(Path(spec.submodule_search_locations[0], "version.py")))["__version__"]


def _nucleus(value: float) -> float:
    if not 0 < value <= 1:
        raise typer.BadParameter(f"{value} is not above 0 and at most 1.")
    return value


Target = Annotated[str, typer.Option(help="The target: `smollm2` (embedded), a folder or a Hub id.")]
Drafter = Annotated[str, typer.Option(help="Its drafter: `smollm2-dspark` (embedded), a folder or a Hub id.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="New tokens a prompt at most.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts generated together.")]
Temperature = Annotated[float, typer.Option(min=0.0, callback=_finite, help="0 is greedy.")]
TopP = Annotated[float, typer.Option(callback=_nucleus, help="Nucleus: above 0, at most 1 (all tokens).")]
Budget = Annotated[
    str | None,
    typer.Option(help="Verified tokens a round: `full`, `static:N` or `threshold:P`. Default: the drafter's own."),
]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same output.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's own), fp32, bf16 or fp16.")]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda, cuda:1, ..")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


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
        raise typer.BadParameter("no command given; choose one of demo, generate, eval.")


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
    seed: Seed = 0,
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
        seed=seed,
        stream=stream,
        dtype=dtype,
        device=device,
        as_json=json,
    )


@app.command(name="eval")
def evaluate(
    prompts: Annotated[
        list[Path],
        typer.Option(exists=True, dir_okay=False, readable=True, help="A JSONL file of prompts; give it again for more files."),
    ],
    target: Target = "smollm2",
    drafter: Drafter = "smollm2-dspark",
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of each file to use, from its top.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    batch_size: BatchSize = 1,
    budget: Budget = None,
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
        dtype=dtype,
        device=device,
        seed=seed,
        as_json=json,
        output=output,
    )
