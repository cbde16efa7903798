"""What one pass and one round cost: ragged against plain and padded batches, eight rows against one, the loop against its forwards.

Ratios of interleaved medians, so that a machine's drift hits all alike. Knows target and loop; knows no prompt files and no plots.

    python -m examples.benchmarks.passes --target smollm2 --drafter smollm2-dspark --json passes.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from hf_dspark.budgets.budget import FullBudget
from hf_dspark.cache.kv_cache import RowCache, RowLayout
from hf_dspark.decoding.loop import DecodingLoop
from hf_dspark.decoding.row_processors import RowProcessors, RowStopping, Sequences
from hf_dspark.evaluation.metrics import machine_record
from hf_dspark.targets.target import Target


def _interleaved(cases: dict[str, Callable[[], None]], repeats: int, device: torch.device, warm_up: int = 3) -> dict[str, dict[str, float]]:
    """Milliseconds of each case, run in turn `repeats` times: median, 20th and 80th percentile."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warm_up + repeats):
        for name, case in cases.items():
            begin = time.perf_counter()
            case()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {
        name: {
            "median_ms": statistics.median(t),
            "p20_ms": statistics.quantiles(t, n=5)[0],
            "p80_ms": statistics.quantiles(t, n=5)[-1],
        }
        for name, t in times.items()
    }


def verify_pass(model: Any, rows: int, *, block_size: int = 7, seed: int = 0, repeats: int = 15) -> dict[str, Any]:
    """Cost of verifying rows of random lengths 0..block_size after contexts of 100-250 tokens, against two plain batched passes.

    `equal` is a plain pass over as many tokens in rows of equal length without padding, after contexts of the mean length; `padded` is the
    plain pass over `rows * (1 + block_size)` tokens after left-padded contexts.

    Args:
        model (`PreTrainedModel`): the target.
        rows (`int`): R.
        seed (`int`): of contexts and lengths. Lengths are drawn until their tokens divide evenly among the rows.
        repeats (`int`): timed turns of all three.
    """
    random = torch.Generator().manual_seed(seed)
    device, vocab = model.get_input_embeddings().weight.device, model.config.vocab_size

    def some_ids(*shape: int) -> torch.Tensor:
        return torch.randint(0, vocab, shape, generator=random).to(device)

    contexts = torch.randint(100, 251, (rows,), generator=random).tolist()
    while True:
        counts = (1 + torch.randint(0, block_size + 1, (rows,), generator=random)).tolist()
        if sum(counts) % rows == 0:
            break
    total, mean_context = sum(counts), round(sum(contexts) / rows)

    target, store = Target(model, []), RowCache()
    store.add_rows(rows)
    store.reserve(max(contexts) + 2 * block_size)
    ids = some_ids(total)

    def filled(context: int) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        model(input_ids=some_ids(rows, context), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    equal_cache, padded_cache = filled(mean_context), filled(max(contexts))
    equal_ids, padded_ids = some_ids(rows, total // rows), some_ids(rows, 1 + block_size)
    mask = torch.zeros(rows, max(contexts) + 1 + block_size, dtype=torch.long, device=device)
    for row, context in enumerate(contexts):
        mask[row, max(contexts) - context :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -1 - block_size :]

    def ragged() -> None:
        target.forward(ids, RowLayout(contexts, counts, device), store)

    def equal() -> None:
        model(input_ids=equal_ids, past_key_values=equal_cache, use_cache=True)
        equal_cache.crop(-equal_ids.shape[1])

    def padded() -> None:
        model(
            input_ids=padded_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=padded_cache,
            use_cache=True,
        )
        padded_cache.crop(-padded_ids.shape[1])

    with torch.inference_mode(), target.open():
        prompt = RowLayout([0] * rows, contexts, device)
        target.forward(some_ids(sum(contexts)), prompt, store, only_last=True)
        times = _interleaved({"ragged": ragged, "equal": equal, "padded": padded}, repeats, device)
    ragged_ms = times["ragged"]["median_ms"]
    return {
        "rows": rows,
        "tokens": total,
        "padded_tokens": rows * (1 + block_size),
        "seed": seed,
        "times": times,
        "ragged_over_equal": ragged_ms / times["equal"]["median_ms"],
        "ragged_over_padded": ragged_ms / times["padded"]["median_ms"],
    }


def round_cost(model: Any, drafter: Any, rows: int, *, prompt_tokens: int = 120, rounds: int = 24, seed: int = 0) -> dict[str, Any]:
    """Median milliseconds of a full round (draft, verify 7 tokens a row, accept, commit) over `rows` live rows that never end."""
    random = torch.Generator().manual_seed(seed)
    device = model.get_input_embeddings().weight.device
    prompts = torch.randint(0, model.config.vocab_size, (rows, prompt_tokens), generator=random).to(device)
    drafter.bind(model)
    target = Target(model, drafter.config.target_layer_ids)
    gamma = drafter.config.block_size
    loop = DecodingLoop(
        target,
        drafter,
        FullBudget(),
        Sequences(prompts, prompt_tokens + (rounds + 4) * (gamma + 1), gamma + 1),
        RowProcessors([], rows),
        RowStopping([], rows),
        sample=False,
        block_size=gamma,
    )
    times = []
    with torch.inference_mode(), target.open():
        loop.join(range(rows), list(prompts))
        for turn in range(rounds + 4):
            begin = time.perf_counter()
            loop.round()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 4:
                times.append(1e3 * (time.perf_counter() - begin))
    spent = loop.watch.read()
    forwards = spent["draft"] + spent["verify"]
    whole = spent["total"] - spent["prefill"]
    return {
        "rows": rows,
        "rounds": rounds,
        "median_ms": statistics.median(times),
        "draft_share": spent["draft"] / whole,
        "verify_share": spent["verify"] / whole,
        "overhead_share": 1 - forwards / whole,
    }


def measure(model: Any, drafter: Any, *, seed: int = 0, repeats: int = 15) -> dict[str, Any]:
    """All figures of this module, with the machine that they were taken on."""
    verify = [verify_pass(model, rows, seed=seed, repeats=repeats) for rows in (16, 32)]
    one, eight = (round_cost(model, drafter, rows, seed=seed) for rows in (1, 8))
    return {
        "machine": machine_record(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": seed,
        "verify_pass": verify,
        "round": [one, eight],
        "round_b8_over_b1": eight["median_ms"] / one["median_ms"],
        "overhead_share_b1": one["overhead_share"],
    }


def main() -> None:
    """Measure passes from the command line."""
    from hf_dspark.models.loading import load_drafter, load_target

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--drafter", default="smollm2-dspark")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    target, _ = load_target(args.target, dtype=args.dtype)
    figures = measure(target, load_drafter(args.drafter, dtype=args.dtype), seed=args.seed, repeats=args.repeats)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
