"""Tau before and after fine-tuning, on the new domain and on the old one, in one file. Knows drafters, adapters and generate from outside.

    python -m examples.benchmarks.shift --target smollm2 --drafter smollm2-dspark --adapter runs/json-lora/final \\
        --full runs/json-full/final --new json=data-json --old gsm8k.jsonl --json results/shift.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_dspark.adapters.files import fingerprint
from hf_dspark.decoding.verify import DEFAULT_VERIFICATION
from hf_dspark.errors import DataError
from hf_dspark.evaluation.command import run_command, write_record
from hf_dspark.evaluation.decoded import DecodedTau, spread_prompts
from hf_dspark.evaluation.metrics import machine_record
from hf_dspark.evaluation.prompts import encode, read_prompts
from hf_dspark.evaluation.training_tables import render_shift
from hf_dspark.models.loading import load_drafter, load_target
from hf_dspark.training.data import load_data


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _run(args: argparse.Namespace) -> dict[str, Any]:
    target, tokenizer = load_target(args.target, dtype=args.dtype)
    name, _, folder = args.new.partition("=")
    if not folder:
        raise DataError(f"--new is {args.new!r}; write it as NAME=FOLDER, a data folder of the new domain.")
    new = [(name, ids) for _, ids in spread_prompts(load_data(folder, target=target).held_out_rows, args.limit)]
    old = [
        (path.stem, encode(tokenizer, [conversation])["input_ids"][0].tolist())
        for path in args.old
        for conversation in read_prompts(path, args.limit)
    ]
    decode = DecodedTau(target, [*new, *old], max_new_tokens=args.max_new_tokens, seed=args.seed)
    base = load_drafter(args.drafter, dtype=args.dtype).bind(target)
    drafters: dict[str, Any] = {}

    def measure(label: str, drafter: Any, folder: Path | None) -> None:
        recipe = None if folder is None else json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
        stored = folder if folder is not None else Path(drafter.name_or_path)
        drafters[label] = {
            "fingerprint": fingerprint(drafter),
            "trained_parameters": None if recipe is None else recipe["trainable_parameters"],
            "minutes": None if recipe is None else recipe["result"]["minutes"],
            "steps": None if recipe is None else recipe["result"]["steps"],
            "stored_bytes": _bytes(stored) if stored.is_dir() else 0,
            "decoded": decode(drafter.eval()),
        }
        print(label, {key: value["by_source"] for key, value in drafters[label]["decoded"].items() if key.startswith("T=")}, flush=True)

    measure("before", base, None)
    if args.full is not None:
        measure("all weights fine-tuned", load_drafter(args.full, dtype=args.dtype).bind(target), args.full)
    if args.adapter is not None:
        base.load_adapter(str(args.adapter))
        measure("LoRA", base, args.adapter)
    return {
        "settings": {
            "target": args.target,
            "drafter": args.drafter,
            "sets": [name, *(path.stem for path in args.old)],
            "prompts": args.limit,
            "max_new_tokens": args.max_new_tokens,
            "temperatures": ["T=0", "T=1"],
            "verification": DEFAULT_VERIFICATION,
        },
        "drafters": drafters,
        "machine": machine_record(target.device),
        "seed": args.seed,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure from the command line; returns 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--drafter", default="smollm2-dspark")
    parser.add_argument("--adapter", type=Path, help="folder of the fine-tuned adapter")
    parser.add_argument("--full", type=Path, help="folder of the drafter whose weights were all fine-tuned")
    parser.add_argument("--new", required=True, metavar="NAME=FOLDER", help="data folder of the new domain; its held-out prompts are used")
    parser.add_argument("--old", type=Path, action="append", default=[], help="prompt file of an old domain; repeat it for more")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(arguments)

    def run() -> None:
        record = _run(args)
        write_record(args.json, record)
        print(render_shift(record))

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
