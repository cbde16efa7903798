"""Options that several commands share; they take them with `@field_options(Settings)` and `chosen(options)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hf_dspark.cli.common import computing, load_quietly, pick_device
from hf_dspark.cli.dataclass_options import take

if TYPE_CHECKING:
    from hf_dspark.evaluation.speed import Bench

Target = Annotated[str, typer.Option(help="The target: `smollm2` (embedded), a folder or a Hub id.")]
Drafter = Annotated[str, typer.Option(help="Its drafter: `smollm2-dspark` (embedded), a folder or a Hub id.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's own; fp32 where the device is slower in it), fp32, bf16, fp16.")]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda, cuda:1, ..")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
PromptFiles = Annotated[
    list[Path], typer.Option(exists=True, dir_okay=False, readable=True, help="A JSONL file of prompts; give it again for more files.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Prompts of each file to use, from its top.")]


@dataclass
class Settings:
    """Target, drafter, and how they generate; a command takes all of these options or some."""

    target: Target = "smollm2"
    drafter: Drafter = "smollm2-dspark"
    dtype: Dtype = "auto"
    device: Device = "auto"
    max_new_tokens: Annotated[int, typer.Option(min=1, help="New tokens a prompt at most.")] = 128
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0
    top_p: Annotated[float, typer.Option(help="Nucleus: above 0, at most 1 (all tokens).")] = 1.0
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same output.")] = 0
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts generated together.")] = 1
    budget: Annotated[
        str | None,
        typer.Option(
            help="Verified tokens a round: `full`, `static:N`, `threshold:P`, `load-aware` or `load-aware-lag2`. Default: the "
            "drafter's own."
        ),
    ] = None
    copying: Annotated[
        bool,
        typer.Option("--copying/--no-copying", help="N-gram copying: draft what the text repeats, where the drafter has weights for it."),
    ] = True
    verification: Annotated[
        Literal["block", "token"],
        typer.Option(help="How drawn tokens are verified: over the whole block, which accepts more of them, or token by token."),
    ] = "block"

    compile: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="Run rounds as compiled graphs, with plain decoding on a static cache beside; the first run compiles.",
        ),
    ] = False

    def __post_init__(self) -> None:
        from hf_dspark.budgets.named import make_budget
        from hf_dspark.evaluation.speed import Sampling

        self.sampling = Sampling(self.temperature, self.top_p)
        make_budget("full" if self.budget is None else self.budget)  # a name that is unknown is refused before anything loads

    def bench(self, max_verify_tokens: int | None = None) -> Bench:
        """Target, tokenizer and drafter under these settings, loaded without the loaders' own progress bars."""
        from hf_dspark.budgets.named import make_budget
        from hf_dspark.evaluation.speed import Bench
        from hf_dspark.models.loading import load_drafter, load_target, parse_dtype

        parse_dtype(self.dtype)
        how: dict[str, Any] = {"dtype": computing(self.dtype), "device": pick_device(self.device)}
        with load_quietly(f"{self.target} and {self.drafter}"):
            drafter = load_drafter(self.drafter, **how)  # first: it is small, and often the mistaken one
            target, tokenizer = load_target(self.target, **how)
        budget = make_budget(drafter.budget if self.budget is None else self.budget, max_verify_tokens)
        settings = (self.sampling, self.max_new_tokens, budget, self.copying, self.verification, self.seed)
        return Bench(target, drafter, tokenizer, *settings, compile=self.compile)

    def with_plain_target(self, bench: Bench) -> Bench:
        """The same with the target once more where token by token the device is faster in another dtype than in blocks: each method is
        measured in its own. An explicit `--dtype` holds for both, and no checkpoint is rounded for it.
        """
        import torch
        from transformers import AutoConfig

        from hf_dspark.hub.names import resolve_target
        from hf_dspark.models.loading import load_target
        from hf_dspark.utils.hardware import plain_dtype

        device, dtype = bench.target.device, bench.target.dtype
        faster = plain_dtype(device, dtype)
        if self.dtype != "auto" or faster == dtype or getattr(bench.target, "is_quantized", False):
            return bench
        if faster == torch.bfloat16 and AutoConfig.from_pretrained(resolve_target(self.target)).dtype != torch.bfloat16:
            return bench
        with load_quietly(f"{self.target} in {faster}, for plain decoding"):
            return replace(bench, plain_target=load_target(self.target, dtype=faster, device=device)[0])


PAIR = frozenset({"target", "drafter", "dtype", "device"})
SAMPLING = frozenset({"max_new_tokens", "temperature", "top_p", "seed"})


def chosen(options: Mapping[str, Any]) -> Settings:
    """The settings among a command's options, checked."""
    return Settings(**take(Settings, options))
