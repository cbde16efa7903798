"""The command `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_dspark.cli.common import figure, print_json
from hf_dspark.cli.dataclass_options import field_options
from hf_dspark.cli.options import Json, Settings, chosen
from hf_dspark.cli.progress import progress


@field_options(Settings)
def generate(
    prompt: Annotated[str | None, typer.Option(help="One prompt.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, readable=True, help="A JSONL file of prompts, one a line.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of the file to use, from its top.")] = None,
    max_verify_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of one verification pass, anchors included; caps any budget.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it is decided.")] = False,
    json: Json = False,
    **options: Any,
) -> None:
    """Generate text with the drafter's help.

    A prompt file has one JSON object a line: {"turns": ["text"]}, {"prompt": "text"} or {"messages": [{"role": .., "content": ..}]}.
    """
    _check(prompt, prompts, limit, stream, options["batch_size"])
    how = chosen(options)
    from transformers import TextStreamer

    from hf_dspark.evaluation.metrics import machine_record
    from hf_dspark.evaluation.prompts import read_prompts, user_turn
    from hf_dspark.evaluation.speed import Measured

    conversations = read_prompts(prompts, limit) if prompts is not None else [user_turn(prompt or "")]
    bench = how.bench(max_verify_tokens)
    tokenizer, measured, results = bench.tokenizer, Measured(), []
    with progress("generating", len(conversations), show=not stream) as advance:
        for first in range(0, len(conversations), how.batch_size):
            batch = conversations[first : first + how.batch_size]
            if stream:
                print(f"{'' if first == 0 else chr(10)}> {batch[0][-1]['content']}", flush=True)
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
            run = bench.run("dspark", bench.inputs(batch), streamer=streamer)
            measured.runs["dspark"].append(run)
            texts = tokenizer.batch_decode(run.tokens, skip_special_tokens=True)
            for conversation, text, tokens in zip(batch, texts, run.tokens, strict=True):
                results.append({"prompt": conversation[-1]["content"], "text": text, "tokens": len(tokens)})
            advance(len(batch))
    speed, counts = measured.throughput("dspark"), measured.acceptance
    if json:
        record: dict[str, Any] = {"target": how.target, "drafter": how.drafter, "results": results, "tau": counts.tau}
        record |= {"conditional_acceptance": counts.conditional_acceptance, **speed.to_json(), "time": measured.time}
        record["settings"] = {"batch_size": how.batch_size, **bench.settings()}
        print_json({**record, "machine": machine_record(bench.target.device)})
        return
    if not stream:
        print("\n\n".join(f"> {result['prompt']}\n{result['text']}" for result in results))
    Console(stderr=True).print(
        f"[dim]{speed.tokens} tokens, {figure(speed.tokens_per_s, 1)} tokens/s (not warmed up), "
        f"tau {figure(counts.tau, 2)} (bonus token included)[/dim]"
    )


def _check(prompt: str | None, prompts: Path | None, limit: int | None, stream: bool, batch_size: int) -> None:
    """Refuses options that contradict each other."""
    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("give either --prompt TEXT or --prompts FILE.jsonl, and not both.")
    if prompt is not None and not prompt.strip():
        raise typer.BadParameter("the prompt is empty.", param_hint="'--prompt'")
    if prompt is not None and limit is not None:
        raise typer.BadParameter("--limit goes with --prompts, not with --prompt.")
    if stream and batch_size != 1:
        raise typer.BadParameter(f"--stream shows one text at a time: leave out --batch-size {batch_size}.")
