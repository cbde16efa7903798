"""The command `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_dspark.cli import options as opt
from hf_dspark.cli.common import figure, load_pair, print_json, progress


def generate(
    target: opt.Target = "smollm2",
    drafter: opt.Drafter = "smollm2-dspark",
    prompt: Annotated[str | None, typer.Option(help="One prompt.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, readable=True, help="A JSONL file of prompts, one a line.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of the file to use, from its top.")] = None,
    batch_size: opt.BatchSize = 1,
    temperature: opt.Temperature = 0.0,
    top_p: opt.TopP = 1.0,
    max_new_tokens: opt.MaxNewTokens = 128,
    budget: opt.Budget = None,
    copying: opt.Copying = True,
    verification: opt.Verification = "block",
    seed: opt.Seed = 0,
    max_verify_tokens: opt.MaxVerifyTokens = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it is decided.")] = False,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    json: opt.Json = False,
) -> None:
    """Generate text with the drafter's help.

    A prompt file has one JSON object a line: {"turns": ["text"]}, {"prompt": "text"} or {"messages": [{"role": .., "content": ..}]}.
    """
    _check(prompt, prompts, limit, stream, batch_size)
    from transformers import TextStreamer

    from hf_dspark.budgets.named import make_budget
    from hf_dspark.evaluation.metrics import machine_record
    from hf_dspark.evaluation.prompts import read_prompts, user_turn
    from hf_dspark.evaluation.speed import Bench, Measured, Sampling

    sampling = Sampling(temperature, top_p)
    if budget is not None:
        make_budget(budget)  # a name that is unknown is refused before anything loads
    conversations = read_prompts(prompts, limit) if prompts is not None else [user_turn(prompt or "")]
    model, tokenizer, loaded = load_pair(target, drafter, dtype, device)
    chosen = make_budget(loaded.budget if budget is None else budget, max_verify_tokens)
    bench = Bench(model, loaded, tokenizer, sampling, max_new_tokens, chosen, copying, verification, seed)
    measured, results = Measured(), []
    with progress("generating", len(conversations), show=not stream) as advance:
        for first in range(0, len(conversations), batch_size):
            batch = conversations[first : first + batch_size]
            if stream:
                print(f"{'' if first == 0 else chr(10)}> {batch[0][-1]['content']}", flush=True)
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
            run = bench.run("dspark", bench.inputs(batch), streamer=streamer)
            measured.runs["dspark"].append(run)
            texts = tokenizer.batch_decode(run.tokens, skip_special_tokens=True)
            for conversation, text, tokens in zip(batch, texts, run.tokens, strict=True):
                results.append({"prompt": conversation[-1]["content"], "text": text, "tokens": len(tokens)})
            advance(len(batch))
    speed, drafting = measured.throughput("dspark"), measured.drafting
    if json:
        record: dict[str, Any] = {"target": target, "drafter": drafter, "results": results, "tau": drafting.acceptance.tau}
        record |= {"conditional_acceptance": drafting.acceptance.conditional_acceptance, **speed.to_json()}
        record |= {"time": drafting.time.to_json(), "settings": {"batch_size": batch_size, **bench.settings()}}
        print_json({**record, "machine": machine_record(model.device)})
        return
    if not stream:
        print("\n\n".join(f"> {result['prompt']}\n{result['text']}" for result in results))
    Console(stderr=True).print(
        f"[dim]{speed.tokens} tokens, {figure(speed.tokens_per_s, 1)} tokens/s (not warmed up), "
        f"tau {figure(drafting.acceptance.tau, 2)} (bonus token included)[/dim]"
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
