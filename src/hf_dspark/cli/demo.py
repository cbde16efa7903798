"""The command `demo`: the same prompts with and without the drafter, once for exactness and once for speed.

Exactness is judged in fp32, where texts are equal token for token. Both methods also run in bf16 where the device is faster in it, and each
counts by its own faster precision. In bf16 passes of other shapes round differently, and where the target's two best logits all but tie,
texts may differ. The demo states their distance.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hf_dspark.cli.common import figure, pick_device, print_json
from hf_dspark.cli.dataclass_options import field_options
from hf_dspark.cli.options import PAIR, Settings, chosen
from hf_dspark.cli.progress import progress

if TYPE_CHECKING:
    from transformers import BatchEncoding

    from hf_dspark.evaluation.speed import Bench, Measured

# Three of what the embedded drafter was trained for, and two of kinds that it has seen less of.
_STEPS = "\nPlease reason step by step, and put your final answer within \\boxed{}."
PROMPTS = (
    "A box holds 12 pencils. A teacher buys 7 boxes and gives 3 to each of her 20 students. How many are left?" + _STEPS,
    "Ana reads 15 pages a day on weekdays and twice as many on each day of the weekend. How many pages does she read in a week?" + _STEPS,
    "A baker sells 24 loaves in the morning for $3 each and 10 cakes in the afternoon for $8 each. How much does he earn?" + _STEPS,
    "Write a python function to find the n-th Fibonacci number.",
    "Give me five tips for learning a new language.",
)
_STYLES = {"plain": "[bold cyan]plain[/]", "dspark": "[bold green]DSpark[/]"}


@dataclass
class _Leg:
    """One precision: both methods on every prompt, and where their texts differ (`prompt`, `position`, `top_two_gap`)."""

    dtype: str
    measured: Measured
    differences: list[dict[str, Any]] = field(default_factory=list)

    @property
    def identical(self) -> str:
        return f"{len(PROMPTS) - len(self.differences)} of {len(PROMPTS)}"

    def to_json(self) -> dict[str, Any]:
        return {"speedup": self.speedup(self), "tau": self.measured.acceptance.tau, "partings": self.differences}

    def speedup(self, baseline: _Leg) -> float | None:
        return self.measured.throughput("dspark").over(baseline.measured.throughput("plain"))


@field_options(Settings, only=PAIR - {"dtype"} | {"max_new_tokens", "budget", "compile"}, max_new_tokens=96)
def demo(quiet: Annotated[bool, typer.Option("--json", help="Print the JSON line only.")] = False, **options: Any) -> None:
    """Show plain and speculated text side by side, and what speculation gained.

    The last line is a JSON object. Exit code 1 if the texts differ in fp32, which they must not.
    """
    from hf_dspark.evaluation.metrics import machine_record
    from hf_dspark.utils.hardware import bf16_gain, has_bf16

    how = chosen({**options, "dtype": "fp32"})
    device = pick_device(how.device)
    machine = machine_record(device)
    console = Console(quiet=quiet)
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "transformers"))
    console.print(f"[bold]{escape(how.target)}[/bold] with the drafter [bold]{escape(how.drafter)}[/bold]", highlight=False)
    console.print(f"{machine.get('gpu', machine['cpu'])}, {versions}\n", highlight=False, markup=False)
    in_bf16 = has_bf16(device) or (device.type == "cpu" and bf16_gain(1) > 1)  # blocks of tokens, or one at a time
    legs = [exact := _run(how.bench(), "fp32", Console(quiet=True) if in_bf16 else console)]
    console.print(f"fp32: {exact.identical} texts equal, token for token.\n", highlight=False)
    if in_bf16:
        legs.append(_run(replace(how, dtype="bf16").bench(), "bf16", console))
    plain, fast = (max(legs, key=lambda leg: leg.measured.throughput(method).tokens_per_s or 0.0) for method in _STYLES)
    _print_table(console, legs, plain, fast)
    print_json(
        {
            "plain_tokens_per_s": plain.measured.throughput("plain").tokens_per_s,
            "plain_dtype": plain.dtype,
            "dspark_tokens_per_s": fast.measured.throughput("dspark").tokens_per_s,
            "dtype": fast.dtype,
            "speedup": fast.speedup(plain),
            "tau": fast.measured.acceptance.tau,
            "identical": not exact.differences,
            "conditional_acceptance": fast.measured.acceptance.conditional_acceptance,
            **{f"{leg.dtype}_{name}": value for leg in legs for name, value in leg.to_json().items()},
            "time": fast.measured.time,
            "target": how.target,
            "drafter": how.drafter,
            "prompts": len(PROMPTS),
            "max_new_tokens": how.max_new_tokens,
            "compiled": how.compile,
            "machine": machine,
        }
    )
    raise typer.Exit(1 if exact.differences else 0)


def _run(bench: Bench, dtype: str, console: Console) -> _Leg:
    """Runs both methods on every prompt, taking turns at going first; streams the texts unless the console is quiet."""
    from transformers import TextStreamer

    from hf_dspark.evaluation.prompts import user_turn
    from hf_dspark.evaluation.speed import PLAIN_COMPILED, Measured

    leg = _Leg(dtype, Measured())
    methods = {"plain": PLAIN_COMPILED if bench.compile else "plain", "dspark": "dspark"}
    bench.warm_up(bench.inputs([user_turn(max(PROMPTS, key=len))]), tuple(methods.values()))
    with progress(dtype, len(PROMPTS), show=console.quiet) as advance:
        for number, prompt in enumerate(PROMPTS):
            console.print(Text(f"> {prompt}", style="bold"))
            inputs, runs = bench.inputs([user_turn(prompt)]), {}
            for method in sorted(_STYLES, reverse=number % 2 == 0):
                console.print(_STYLES[method], highlight=False)
                streamer = None if console.quiet else TextStreamer(bench.tokenizer, skip_prompt=True, skip_special_tokens=True)
                runs[method] = bench.run(methods[method], inputs, streamer=streamer)
                leg.measured.runs[method].append(runs[method])
                console.print(f"[dim]{figure(runs[method].throughput.tokens_per_s, 1)} tokens/s[/dim]\n", highlight=False)
            plain, other = (runs[method].tokens[0] for method in _STYLES)
            if plain != other:
                leg.differences.append({"prompt": number, **_difference(bench, inputs, plain, other)})
            advance(1)
    return leg


def _difference(bench: Bench, inputs: BatchEncoding, plain: list[int], other: list[int]) -> dict[str, Any]:
    """Where two greedy texts differ first, and the plain target's best logit there less its second best.

    The target generates again up to there, through the same steps as before. In bf16 a logit near 20 has steps of 0.125: a gap of a step or
    two is a tie that a pass of another shape may break differently.
    """
    from hf_dspark.evaluation.metrics import common_prefix

    position = common_prefix(plain, other)
    sizes = {"max_new_tokens": position + 1, "pad_token_id": bench.tokenizer.pad_token_id}
    output = bench.target.generate(**inputs, **bench.sampling.options(), **sizes, return_dict_in_generate=True, output_logits=True)
    best, second = output.logits[-1][0].float().topk(2).values.tolist()
    return {"position": position, "top_two_gap": best - second}


def _print_table(console: Console, legs: list[_Leg], plain_leg: _Leg, fast: _Leg) -> None:
    sources = {"plain": plain_leg.measured, "dspark": fast.measured}
    precisions = f"in {fast.dtype}" if plain_leg is fast else f"plain in {plain_leg.dtype}, DSpark in {fast.dtype}, where each is faster"
    table = Table(title=f"tokens/s, {precisions}; tau counts the target's bonus token", show_footer=True)
    table.add_column("prompt", "all", overflow="ellipsis", no_wrap=True, max_width=24)
    speeds = [measured.throughput(method).tokens_per_s for method, measured in sources.items()]
    total = [*speeds, fast.speedup(plain_leg), fast.measured.acceptance.tau]
    for heading, value, digits in zip(("plain", "DSpark", "speed-up", "tau"), total, (1, 1, 2, 2), strict=True):
        table.add_column(heading, figure(value, digits), justify="right", no_wrap=True)
    table.add_column("text", "identical: " + ", ".join(f"{leg.dtype} {leg.identical}" for leg in legs))
    for number, prompt in enumerate(PROMPTS):
        plain, dspark = (measured.runs[method][number] for method, measured in sources.items())
        assert dspark.stats is not None
        verdict = [
            f"{leg.dtype} differs from token {one['position']} on, best two logits {one['top_two_gap']:.3g} apart"
            for leg in legs
            for one in leg.differences
            if one["prompt"] == number
        ]
        rates = [figure(run.throughput.tokens_per_s, 1) for run in (plain, dspark)]
        ratios = [figure(dspark.throughput.over(plain.throughput), 2), figure(dspark.stats.tau, 2)]
        table.add_row(Text(prompt), *rates, *ratios, "; ".join(verdict) or "identical")
    console.print(table)
    if any(leg.differences for leg in legs[1:]):
        console.print(
            "bf16 rounds a pass over one token and a pass over several differently: where the plain target's own two best logits are as "
            "close as stated, either may win. In fp32 texts are equal.",
            highlight=False,
        )
