"""Trains drafters that differ in one thing on the same data, steps and seed, and decodes the same prompts with each.

All share the target's hidden states that are held in memory. A drafter that the result file holds already is not trained again, so an
interrupted comparison goes on where it stood.

    python -m examples.benchmarks.matched --data data/ --prompts gsm8k.jsonl --prompts mt-bench.jsonl --steps 300 --json matched.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from examples.benchmarks.command import chosen, options, run_command, write_record

from hf_dspark.decoding.verify import DEFAULT_VERIFICATION
from hf_dspark.evaluation.decoded import DecodedTau
from hf_dspark.evaluation.metrics import machine_record
from hf_dspark.evaluation.prompts import prompt_ids, read_prompts
from hf_dspark.models.loading import load_target
from hf_dspark.training.configuration import DrafterShape, TrainingConfig
from hf_dspark.training.data import load_data
from hf_dspark.training.memory import keep_freed_memory
from hf_dspark.training.new_drafter import make_drafter
from hf_dspark.training.trainer import Trainer

# Each differs from the first in what its name says.
VARIANTS: Mapping[str, dict[str, Any]] = {
    "dspark, 2 layers": {},
    "dflash, 2 layers": {"head": "none"},
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


def by_set(decoded: Mapping[str, Any]) -> dict[str, Any]:
    """By temperature: tau of each set, their mean (`macro`), and acceptance by block position over all."""
    found = {}
    for key, part in decoded.items():
        if key.startswith("T="):
            taus = part["by_source"].values()
            found[key] = {"by_set": part["by_source"], "macro": sum(taus) / len(taus), "acceptance": part["acceptance"]}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison from the command line; returns 2 for bad input."""
    numbers = {"steps": 300, "batch_size": 4, "anchors": 128, "held_out": 96, "rank": 48, "draft_vocab": 12288}
    parser = options(__doc__, prompts=True, limit=8, max_new_tokens=64, **numbers)
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--variants", action="append", choices=list(VARIANTS), help="default: all")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--mask-token", default=None)
    parser.add_argument("--states-memory", type=float, default=6.0, help="GiB")
    args = parser.parse_args(arguments)

    def run() -> None:
        keep_freed_memory()
        target, tokenizer = load_target(args.target, dtype=args.dtype)
        target.requires_grad_(False)
        rows = load_data(args.data, target=target)
        sets = {path.stem: prompt_ids(tokenizer, read_prompts(path, args.limit)) for path in args.prompts}
        prompts = [(name, ids) for name, found in sets.items() for ids in found]
        shape = DrafterShape(layers=2, rank=args.rank, draft_vocab=args.draft_vocab, mask_token=args.mask_token)
        config = TrainingConfig(
            steps=args.steps, batch_size=args.batch_size, num_anchors=args.anchors, optimizer=args.optimizer, learning_rate=args.lr,
            chunk_positions=512, states_memory_gib=args.states_memory, evaluation_minutes=1e6, checkpoint_minutes=1e6, seed=args.seed,
        )  # fmt: skip
        settings = {
            **chosen(args, "target", "dtype", "max_new_tokens", "held_out"),
            "sets": list(sets),
            "prompts": args.limit,
            "temperatures": ["T=0", "T=1"],
            "verification": DEFAULT_VERIFICATION,
            "training": asdict(config),
            "shape": asdict(shape),
            "data": rows.summary(),
        }
        record: dict[str, Any] = {"settings": settings, "machine": machine_record(target.device), "seed": args.seed, "drafters": {}}
        if args.json.exists():
            stored = json.loads(args.json.read_text(encoding="utf-8"))
            if stored["settings"] != json.loads(json.dumps(settings)):
                raise ValueError(f"{args.json} holds a comparison with other settings; name another file, or remove it")
            record["drafters"] = stored["drafters"]
        states = None
        for name in args.variants or VARIANTS:
            if name in record["drafters"]:
                continue
            torch.manual_seed(args.seed)
            changed = replace(shape, **VARIANTS[name])
            drafter, facts = make_drafter(
                target, tokenizer, rows.train_rows, rows.held_out_rows, changed, dtype=target.dtype, device=target.device
            )
            with tempfile.TemporaryDirectory() as folder:
                trainer = Trainer(drafter, target, rows.train_rows, rows.held_out_rows[: args.held_out], config, folder)
                if states is not None:
                    trainer.objective.states = states
                states = trainer.objective.states
                trainer.train()
            decoded = by_set(DecodedTau(target, prompts, max_new_tokens=args.max_new_tokens, seed=args.seed)(drafter.eval()))
            record["drafters"][name] = {"parameters": facts["parameters"], "decoded": decoded}
            print(f"{name}: " + ", ".join(f"{key} {part['macro']:.3f}" for key, part in decoded.items()), flush=True)
            write_record(args.json, record)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
