"""Tau before and after fine-tuning, on the new domain and on old ones.

python -m examples.benchmarks.shift --tuned runs/json-lora/final --new json=data-json --old gsm8k.jsonl --json shift.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.benchmarks.command import chosen, options, run_command, write_record

from hf_dspark.evaluation.decoded import DecodedTau, spread_prompts
from hf_dspark.evaluation.metrics import machine_record
from hf_dspark.evaluation.prompts import prompt_ids, read_prompts
from hf_dspark.models.loading import load_drafter, load_target
from hf_dspark.training.data import load_data


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure from the command line; returns 2 for bad input."""
    parser = options(__doc__, limit=16, max_new_tokens=96)
    parser.add_argument("--tuned", type=Path, action="append", default=[], help="a fine-tuned adapter or drafter; repeat it for more")
    parser.add_argument("--new", required=True, metavar="NAME=FOLDER", help="data folder of the new domain; its held-out prompts are used")
    parser.add_argument("--old", type=Path, action="append", default=[], help="prompt file of an old domain; repeat it for more")
    args = parser.parse_args(arguments)

    def run() -> None:
        target, tokenizer = load_target(args.target, dtype=args.dtype)
        name, _, folder = args.new.partition("=")
        if not folder:
            raise ValueError(f"--new is {args.new!r}; write it as NAME=FOLDER, a data folder of the new domain")
        prompts = [(name, ids) for _, ids in spread_prompts(load_data(folder, target=target).held_out_rows, args.limit)]
        prompts += [(path.stem, ids) for path in args.old for ids in prompt_ids(tokenizer, read_prompts(path, args.limit))]
        decode = DecodedTau(target, prompts, max_new_tokens=args.max_new_tokens, seed=args.seed)
        drafters: dict[str, Any] = {"before": {"decoded": decode(load_drafter(args.drafter, dtype=args.dtype).bind(target))}}
        for path in args.tuned:
            adapter = (path / "adapter_config.json").exists()
            drafter = load_drafter(args.drafter if adapter else path, dtype=args.dtype).bind(target)
            if adapter:
                drafter.load_adapter(str(path))
            recipe = json.loads((path / "recipe.json").read_text(encoding="utf-8"))
            drafters[str(path)] = {
                "trained_parameters": recipe["trainable_parameters"],
                "minutes": recipe["result"]["minutes"],
                "stored_bytes": sum(file.stat().st_size for file in path.glob("*.safetensors")),
                "decoded": decode(drafter.eval()),
            }
        settings = chosen(args, "target", "drafter", "dtype", "limit", "max_new_tokens", "seed")
        write_record(args.json, {"settings": settings, "drafters": drafters, "machine": machine_record(target.device)})
        for label, found in drafters.items():
            print(label, {key: value["by_source"] for key, value in found["decoded"].items() if key.startswith("T=")})

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
