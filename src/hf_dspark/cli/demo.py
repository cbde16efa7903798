"""`hf-dspark demo`: the same prompts with and without the drafter, once for exactness and once for speed. Knows the
bench, not the loop.

Exactness is judged in fp32: there the texts must be equal token for token. Speed is taken in bf16, the checkpoint's own
precision (where the device does not compute in it, in fp32), where a pass over eight tokens and a pass over one differ in the
last bit: where the target's two best logits all but tie, the texts may part there. For every such place the demo states how far
apart the plain target's two best logits were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hf_dspark.budgets.named import make_budget
from hf_dspark.cli.commands import figure, load_pair, pick_device, print_json, progress
from hf_dspark.evaluation.metrics import AcceptanceCounts, RoundTime, Throughput, machine_record, speed_ratio
from hf_dspark.evaluation.prompts import user_turn
from hf_dspark.evaluation.speed import Bench, Parting, Run, acceptance_of, find_parting, time_of
from hf_dspark.utils.hardware import has_bf16

# What the embedded drafter was trained for, and two kinds that it has seen less of; the table shows each.
_STEPS = "\nPlease reason step by step, and put your final answer within \\boxed{}."
PROMPTS = (
    "A box holds 12 pencils. A teacher buys 7 boxes and gives 3 to each of her 20 students. How many are left?" + _STEPS,
    "Ana reads 15 pages a day on weekdays and twice as many on each day of the weekend. How many pages does she read in a week?" + _STEPS,
    "A baker sells 24 loaves in the morning for $3 each and 10 cakes in the afternoon for $8 each. How much does he earn?" + _STEPS,
    "Write a python function to find the n-th Fibonacci number.",
    "Give me five tips for learning a new language.",
)


@dataclass(frozen=True)
class Leg:
    """One precision: both methods on every prompt.

    Args:
        plain: the plain target's runs, one a prompt.
        dspark: the speculated runs, one a prompt.
        partings: where they part, None where they are the same.
    """

    plain: list[Run]
    dspark: list[Run]
    partings: list[Parting | None]

    @property
    def identical(self) -> bool:
        """True where every text is equal, token for token."""
        return not any(self.partings)

    @property
    def acceptance(self) -> AcceptanceCounts:
        """Of all prompts."""
        return AcceptanceCounts.sum(acceptance_of(run.stats) for run in self.dspark if run.stats is not None)

    @property
    def time(self) -> RoundTime:
        """Of all prompts."""
        return sum((time_of(run.stats) for run in self.dspark if run.stats is not None), start=RoundTime())

    def total(self, method: str) -> Throughput:
        """Returns tokens and seconds of all prompts; `method` is `plain` or `dspark`."""
        return sum((run.throughput for run in getattr(self, method)), start=Throughput())


class _Printer(transformers.TextStreamer):
    """Prints text as it is decided, in one style."""

    def __init__(self, tokenizer: Any, console: Console, style: str) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console = console
        self.style = style

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.console.print(Text(text, style=self.style), end="\n" if stream_end else "", soft_wrap=True)


def run_demo(target_name: str, drafter_name: str, *, max_new_tokens: int, budget: str | None, device: str, quiet: bool) -> int:
    """Runs the demo and returns the exit code: 1 if the fp32 texts differ, else 0."""
    if budget is not None:
        make_budget(budget)
    place = pick_device(device)
    machine = machine_record(place)
    console = Console(quiet=quiet)
    console.print(f"[bold]{escape(target_name)}[/bold] with the drafter [bold]{escape(drafter_name)}[/bold]", highlight=False)
    console.print(
        f"{machine.get('gpu', machine['cpu'])}, torch {machine['versions']['torch']}, transformers {machine['versions']['transformers']}\n",
        highlight=False,
        markup=False,
    )

    def bench(dtype: str) -> Bench:
        target, tokenizer, drafter = load_pair(target_name, drafter_name, dtype=dtype, device=place)
        return Bench(target, drafter, tokenizer, max_new_tokens=max_new_tokens, budget=budget)

    speed = "bf16" if has_bf16(place) else "fp32"
    exact = _leg(bench("fp32"), console=console if speed == "fp32" else None, label="fp32: are the texts equal?")
    console.print(f"fp32: {_same(exact)} texts equal, token for token.\n", highlight=False)
    fast = exact if speed == "fp32" else _leg(bench(speed), console=console, label=speed)
    _print_table(console, exact, fast, speed)

    plain, dspark = fast.total("plain"), fast.total("dspark")
    print_json(
        {
            "plain_tokens_per_s": plain.tokens_per_s,
            "dspark_tokens_per_s": dspark.tokens_per_s,
            "speedup": speed_ratio(dspark, plain),
            "tau": fast.acceptance.tau,
            "identical": exact.identical,
            "conditional_acceptance": fast.acceptance.conditional_acceptance,
            "fp32_speedup": speed_ratio(exact.total("dspark"), exact.total("plain")),
            "fp32_tau": exact.acceptance.tau,
            "fp32_partings": _partings(exact),
            "bf16_partings": None if fast is exact else _partings(fast),
            "dtype": speed,
            "time": fast.time.to_json(),
            "target": target_name,
            "drafter": drafter_name,
            "prompts": len(PROMPTS),
            "max_new_tokens": max_new_tokens,
            "machine": machine,
        }
    )
    return 0 if exact.identical else 1


def _leg(bench: Bench, *, console: Console | None, label: str) -> Leg:
    """Runs both methods on every prompt, taking turns at going first; streams the texts where a console is given."""
    plain: list[Run] = []
    dspark: list[Run] = []
    partings: list[Parting | None] = []
    bench.warm_up(bench.inputs([user_turn(PROMPTS[0])]), ("plain", "dspark"))
    with progress(label, len(PROMPTS), show=console is None) as advance:
        for number, prompt in enumerate(PROMPTS):
            if console is not None:
                console.print(Text(f"> {prompt}", style="bold"))
            inputs = bench.inputs([user_turn(prompt)])
            runs = {}
            for method in ("plain", "dspark") if number % 2 == 0 else ("dspark", "plain"):
                runs[method] = _show(bench, method, inputs, console)
            plain.append(runs["plain"])
            dspark.append(runs["dspark"])
            partings.append(find_parting(bench, inputs, runs["plain"].tokens[0], runs["dspark"].tokens[0]))
            advance(1)
    return Leg(plain, dspark, partings)


def _show(bench: Bench, method: str, inputs: Any, console: Console | None) -> Run:
    if console is None or console.quiet:
        return bench.run(method, inputs)
    name, style = {"plain": ("plain", "cyan"), "dspark": ("DSpark", "green")}[method]
    console.print(f"[{style} bold]{name}[/]", highlight=False)
    run = bench.run(method, inputs, streamer=_Printer(bench.tokenizer, console, style))
    console.print(f"[dim]{figure(run.throughput.tokens_per_s, 1)} tokens/s[/dim]\n", highlight=False)
    return run


def _print_table(console: Console, exact: Leg, fast: Leg, speed: str) -> None:
    table = Table(title=f"{speed} speed in tokens/s; tau counts the target's bonus token", show_footer=True)
    plain, dspark = fast.total("plain"), fast.total("dspark")
    table.add_column("prompt", "all", overflow="ellipsis", no_wrap=True, max_width=24)
    for heading, total in (
        ("plain", figure(plain.tokens_per_s, 1)),
        ("DSpark", figure(dspark.tokens_per_s, 1)),
        ("speed-up", figure(speed_ratio(dspark, plain), 2)),
        ("tau", figure(fast.acceptance.tau, 2)),
    ):
        table.add_column(heading, total, justify="right", no_wrap=True)
    table.add_column("text", f"identical: fp32 {_same(exact)}" + ("" if fast is exact else f", {speed} {_same(fast)}"))
    for number, prompt in enumerate(PROMPTS):
        base, speculated = fast.plain[number], fast.dspark[number]
        tau = acceptance_of(speculated.stats).tau if speculated.stats is not None else None
        table.add_row(
            Text(prompt),
            figure(base.throughput.tokens_per_s, 1),
            figure(speculated.throughput.tokens_per_s, 1),
            figure(speed_ratio(speculated.throughput, base.throughput), 2),
            figure(tau, 2),
            _verdict(exact.partings[number], None if fast is exact else fast.partings[number]),
        )
    console.print(table)
    if fast is not exact and not fast.identical:
        console.print(
            "Where a bf16 text parts, the plain target's own two best logits were as far apart as stated: "
            "bf16 rounds a pass over one token and a pass over several differently, "
            "and a near-tie may fall either way. In fp32 it does not.",
            highlight=False,
        )


def _same(leg: Leg) -> str:
    return f"{sum(parting is None for parting in leg.partings)} of {len(leg.partings)}"


def _verdict(exact: Parting | None, fast: Parting | None) -> str:
    parts = [
        f"{dtype} parts at token {parting.position}, best two logits {parting.gap:.3g} apart"
        for dtype, parting in (("fp32", exact), ("bf16", fast))
        if parting is not None
    ]
    return "; ".join(parts) if parts else "identical"


def _partings(leg: Leg) -> list[dict[str, Any]]:
    return [
        {"prompt": number, "position": parting.position, "top_two_gap": parting.gap}
        for number, parting in enumerate(leg.partings)
        if parting is not None
    ]
