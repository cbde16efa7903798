"""What one verification pass costs: ragged rows against plain batches of equal and of padded rows. Medians of interleaved turns, so that a
machine's drift hits all alike.

    python -m examples.benchmarks.passes --json passes.json
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from examples.benchmarks.command import options, run_command, write_record
from examples.benchmarks.divergence import filled_cache
from transformers import DynamicCache, PreTrainedModel

from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.cache.layout import RowLayout
from hf_dspark.evaluation.metrics import machine_record
from hf_dspark.evaluation.speed import synchronize
from hf_dspark.models.loading import load_target
from hf_dspark.targets.target import Target


def verify_pass(model: PreTrainedModel, rows: int, *, block_size: int = 7, seed: int = 0, repeats: int = 15) -> dict[str, Any]:
    """Cost of verifying rows of random lengths 0..block_size after contexts of 100-250 tokens, against two plain batched passes.

    `equal` is a plain pass over as many tokens in rows of equal length without padding, after contexts of the mean length; `padded` is the
    plain pass over `rows * (1 + block_size)` tokens after left-padded contexts.
    """
    random = torch.Generator().manual_seed(seed)
    device, vocab = model.get_input_embeddings().weight.device, model.config.vocab_size

    def some_ids(*shape: int) -> torch.Tensor:
        return torch.randint(0, vocab, shape, generator=random).to(device)

    contexts = torch.randint(100, 251, (rows,), generator=random).tolist()
    counts = [1]
    while sum(counts) % rows or len(counts) < rows:  # as many tokens as rows of equal length can hold
        counts = (1 + torch.randint(0, block_size + 1, (rows,), generator=random)).tolist()
    target, store, width = Target(model, []), RowCache(), max(contexts)
    store.add_rows(rows)
    store.reserve(width + 2 * block_size)
    ids = some_ids(sum(counts))

    equal_ids, padded_ids = some_ids(rows, sum(counts) // rows), some_ids(rows, 1 + block_size)
    mask = torch.zeros(rows, width + 1 + block_size, dtype=torch.long, device=device)
    for row, context in enumerate(contexts):
        mask[row, width - context :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -1 - block_size :]

    def plain(tokens: torch.Tensor, cache: DynamicCache, **inputs: torch.Tensor) -> None:
        model(input_ids=tokens, past_key_values=cache, use_cache=True, **inputs)
        cache.crop(-tokens.shape[1])

    with torch.inference_mode(), target.open():
        equal_cache, padded_cache = (filled_cache(model, some_ids(rows, n)) for n in (round(sum(contexts) / rows), width))
        target.forward(some_ids(sum(contexts)), RowLayout([0] * rows, contexts, device), store, only_last=True)
        times = _interleaved(
            {
                "ragged": lambda: target.forward(ids, RowLayout(contexts, counts, device), store),
                "equal": lambda: plain(equal_ids, equal_cache),
                "padded": lambda: plain(padded_ids, padded_cache, attention_mask=mask, position_ids=positions),
            },
            repeats,
            device,
        )
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    return {
        "rows": rows,
        "tokens": sum(counts),
        "padded_tokens": rows * (1 + block_size),
        "median_ms": medians,
        "ragged_over_equal": medians["ragged"] / medians["equal"],
        "ragged_over_padded": medians["ragged"] / medians["padded"],
    }


def _interleaved(cases: dict[str, Callable[[], object]], repeats: int, device: torch.device, warm_up: int = 3) -> dict[str, list[float]]:
    """Milliseconds of each case, run in turn `repeats` times."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warm_up + repeats):
        for name, case in cases.items():
            begin = time.perf_counter()
            case()
            synchronize(device)
            if turn >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure passes from the command line; returns 2 for bad input."""
    parser = options(__doc__, repeats=15)
    parser.add_argument("--rows", type=int, action="append", help="default: 16 and 32")
    args = parser.parse_args(arguments)

    def run() -> None:
        target, _ = load_target(args.target, dtype=args.dtype)
        found = [verify_pass(target, rows, seed=args.seed, repeats=args.repeats) for rows in args.rows or (16, 32)]
        about = {"target": args.target, "dtype": str(target.dtype).removeprefix("torch."), "seed": args.seed}
        write_record(args.json, {**about, "verify_pass": found, "machine": machine_record(target.device)})
        print(*found, sep="\n")

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
