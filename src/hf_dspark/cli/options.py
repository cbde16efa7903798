"""Options that several commands share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer


def finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def nucleus(value: float) -> float:
    if not 0 < value <= 1:
        raise typer.BadParameter(f"{value} is not above 0 and at most 1.")
    return value


Target = Annotated[str, typer.Option(help="The target: `smollm2` (embedded), a folder or a Hub id.")]
Drafter = Annotated[str, typer.Option(help="Its drafter: `smollm2-dspark` (embedded), a folder or a Hub id.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="New tokens a prompt at most.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts generated together.")]
Temperature = Annotated[float, typer.Option(min=0.0, callback=finite, help="0 is greedy.")]
TopP = Annotated[float, typer.Option(callback=nucleus, help="Nucleus: above 0, at most 1 (all tokens).")]
Budget = Annotated[
    str | None,
    typer.Option(
        help="Verified tokens a round: `full`, `static:N`, `threshold:P`, `load-aware` or `load-aware-lag2`. Default: the drafter's own."
    ),
]
Copying = Annotated[
    bool, typer.Option("--copying/--no-copying", help="N-gram copying: draft what the text repeats, where the drafter has weights for it.")
]
Verification = Annotated[
    Literal["block", "token"],
    typer.Option(help="How drawn tokens are verified: over the whole block, which accepts more of them, or token by token."),
]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same output.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's own; fp32 where the device does not compute in it), fp32, bf16, fp16.")]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda, cuda:1, ..")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
MaxVerifyTokens = Annotated[
    int | None, typer.Option(min=1, help="Most tokens of one verification pass, anchors included; caps any budget.")
]
PromptFiles = Annotated[
    list[Path], typer.Option(exists=True, dir_okay=False, readable=True, help="A JSONL file of prompts; give it again for more files.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Prompts of each file to use, from its top.")]
