"""Trains drafters that differ in one thing on the same data, steps and seed, decodes the same prompts with each, and writes one file. Knows
the trainer's and generate's doors; knows no internals of either.

All drafters are trained in one process on the same batches and anchors, and share the target's states that are kept in memory. A drafter
that the file holds already is not trained again, so an interrupted comparison goes on where it stood.

    python -m examples.benchmarks.matched --target smollm2 --data data/ --prompts gsm8k.jsonl --prompts mt-bench.jsonl \\
        --steps 300 --json results/matched.json --plots results/
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from hf_dspark.decoding.verify import DEFAULT_VERIFICATION
from hf_dspark.errors import DataError
from hf_dspark.evaluation.command import run_command, write_record
from hf_dspark.evaluation.decoded import DecodedTau
from hf_dspark.evaluation.metrics import machine_record
from hf_dspark.evaluation.prompts import encode, read_prompts
from hf_dspark.evaluation.tables import number
from hf_dspark.evaluation.training_tables import BASE, PLAIN, plot_matched, render_matched
from hf_dspark.models.loading import load_target
from hf_dspark.training.configuration import TrainingConfig
from hf_dspark.training.data import load_data
from hf_dspark.training.making import DrafterShape, make_drafter
from hf_dspark.training.memory import keep_freed_memory
from hf_dspark.training.optimizer import OPTIMIZERS
from hf_dspark.training.trainer import Trainer

# Each differs from the first in what its name says.
VARIANTS: Mapping[str, dict[str, Any]] = {
    BASE: {},
    PLAIN: {"head": "none"},
    "dspark gated, 2 layers": {"head": "gated"},
    "dspark rnn, 2 layers": {"head": "rnn"},
    "dspark, 1 layer": {"layers": 1},
    "dspark, 3 layers": {"layers": 3},
    "dflash, 1 layer": {"head": "none", "layers": 1},
    "dflash, 3 layers": {"head": "none", "layers": 3},
    "mtp-1, 2 layers": {"block_size": 1, "head": "none"},
    "dspark, head started at random": {"head_start": "random"},
    "dspark, backbone started at random": {"start": "random"},
}


def compare(
    target: Any,
    tokenizer: Any,
    rows: Any,
    prompts: Mapping[str, Sequence[Any]],
    shape: DrafterShape,
    config: TrainingConfig,
    variants: Mapping[str, dict[str, Any]],
    record: dict[str, Any],
    keep: Any,
    *,
    max_new_tokens: int,
    batch_size: int,
    held_out: int | None = None,
) -> None:
    """Train and decode every variant that `record["drafters"]` does not hold yet; `keep` is called after each.

    Args:
        target, tokenizer: the target.
        rows (`DataSet`): from `load_data`.
        prompts: conversations by set.
        shape (`DrafterShape`): of the first variant; the others change fields of it.
        config (`TrainingConfig`): the same for all.
        variants: changed fields of the shape, by name.
        record: what is written; `drafters` is added to in place.
        keep: called without arguments when a variant is done.
        max_new_tokens, batch_size: of decoding.
        held_out (`int`, *optional*): rows of the teacher-forced evaluation; all where None.
    """
    encoded = [
        (name, ids.tolist())
        for name, conversations in prompts.items()
        for c in conversations
        for ids in encode(tokenizer, [c])["input_ids"]
    ]
    states = None
    for name, fields in variants.items():
        if name in record["drafters"]:
            continue
        torch.manual_seed(config.seed)
        drafter, facts = make_drafter(
            target, tokenizer, rows.train_rows, rows.held_out_rows, replace(shape, **fields), dtype=target.dtype, device=target.device
        )
        folder = Path(tempfile.mkdtemp(prefix="matched-"))
        try:
            trainer = Trainer(drafter, target, rows.train_rows, rows.held_out_rows[:held_out], config, folder)
            if states is not None:
                trainer.objective.states = trainer.states = states
            states = trainer.states
            progress = trainer.train()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        drafter.eval()
        begin = time.perf_counter()
        decoded = DecodedTau(target, encoded, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=config.seed)(drafter)
        record["drafters"][name] = {
            "parameters": facts["parameters"],
            "train_s": progress.seconds if progress.seconds else trainer.seconds(),
            "decode_s": time.perf_counter() - begin,
            "held_out": {key: value for key, value in progress.curve[-1].items() if key == "all" or key.startswith("T=")},
            "decoded": _macro(decoded, list(prompts)),
        }
        print(f"{name}: " + ", ".join(f"{t} {number(v['macro'], 3)}" for t, v in record["drafters"][name]["decoded"].items()), flush=True)
        keep()


def _macro(decoded: dict[str, Any], sets: list[str]) -> dict[str, Any]:
    """By temperature: tau of each set, their mean (`macro`), and acceptance by block position over all."""
    found = {}
    for key, part in decoded.items():
        if key.startswith("T="):
            taus = [part["by_source"][name] for name in sets]
            found[key] = {"by_set": part["by_source"], "macro": sum(taus) / len(taus), "acceptance": part["acceptance"]}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison from the command line; returns 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--prompts", type=Path, action="append", required=True)
    parser.add_argument("--limit", type=int, default=8, help="prompts of each file")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--decode-batch", type=int, default=8)
    parser.add_argument("--variants", action="append", choices=list(VARIANTS), help="default: all")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--anchors", type=int, default=128)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--held-out", type=int, default=96, help="held-out rows of the teacher-forced evaluation")
    parser.add_argument("--rank", type=int, default=48)
    parser.add_argument("--draft-vocab", type=int, default=12288)
    parser.add_argument("--mask-token", default=None)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--states-memory", type=float, default=6.0)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plots", type=Path)
    args = parser.parse_args(arguments)
    return run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    keep_freed_memory()
    target, tokenizer = load_target(args.target, dtype=args.dtype)
    target.requires_grad_(False)
    rows = load_data(args.data, target=target)
    prompts = {path.stem: read_prompts(path, args.limit) for path in args.prompts}
    shape = DrafterShape(layers=2, rank=args.rank, draft_vocab=args.draft_vocab, mask_token=args.mask_token)
    config = TrainingConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        num_anchors=args.anchors,
        optimizer=args.optimizer,
        learning_rate=args.lr,
        chunk_positions=args.chunk,
        states_memory_gib=args.states_memory,
        evaluation_minutes=1e6,
        checkpoint_minutes=1e6,
        seed=args.seed,
    )
    settings = {
        "sets": list(prompts),
        "prompts": args.limit,
        "max_new_tokens": args.max_new_tokens,
        "held_out": args.held_out,
        "temperatures": ["T=0", "T=1"],
        "verification": DEFAULT_VERIFICATION,
        "target": args.target,
        "training": asdict(config),
        "shape": asdict(shape),
        "data": rows.summary(),
    }
    record: dict[str, Any] = {"settings": settings, "machine": machine_record(target.device), "seed": args.seed, "drafters": {}}
    if args.json.exists():
        stored = json.loads(args.json.read_text(encoding="utf-8"))
        if stored["settings"] != json.loads(json.dumps(settings)):
            raise DataError(f"{args.json} holds a comparison with other settings; name another file, or remove it")
        record["drafters"] = stored["drafters"]

    chosen = {name: VARIANTS[name] for name in args.variants or VARIANTS}
    compare(
        target,
        tokenizer,
        rows,
        prompts,
        shape,
        config,
        chosen,
        record,
        lambda: write_record(args.json, record),
        max_new_tokens=args.max_new_tokens,
        batch_size=args.decode_batch,
        held_out=args.held_out,
    )
    print(render_matched(record))
    if args.plots is not None:
        plot_matched(record, args.plots, args.json.stem)


if __name__ == "__main__":
    sys.exit(main())
