"""Tau of real decoding, in batches and without timing: cheap enough to be taken during training, and over many prompts.

python -m hf_dspark.evaluation.decoded --prompts gsm8k.jsonl --prompts mt-bench.jsonl --limit 32 --json decoded.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_dspark.budgets.budget import FullBudget
from hf_dspark.decoding.verify import DEFAULT_VERIFICATION
from hf_dspark.evaluation.metrics import AcceptanceCounts, machine_record
from hf_dspark.evaluation.prompts import prompt_ids, read_prompts
from hf_dspark.evaluation.serving import serve
from hf_dspark.models.loading import load_drafter, load_target
from hf_dspark.utils.files import atomic_write_json
from hf_dspark.utils.tokens import eos_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_dspark.decoding.statistics import RowStats
    from hf_dspark.models.modeling_dspark import DSparkDrafter
    from hf_dspark.training.rows import ResponseRow


def spread_prompts(rows: Iterable[ResponseRow], count: int) -> list[tuple[str, list[int]]]:
    """Source and token ids of `count` prompts at most: every source has its share, in the order of the rows, each prompt once."""
    by_source: dict[str, dict[tuple[int, ...], None]] = {}
    for row in rows:
        by_source.setdefault(row.source, {})[tuple(row.prompt_ids)] = None
    # Each source's first prompt, then each one's second, ..
    ranked = [(rank, source, prompt) for source, prompts in by_source.items() for rank, prompt in enumerate(prompts)]
    ranked.sort(key=lambda item: item[:2])
    return [(source, list(prompt)) for _, source, prompt in ranked[:count]]


@dataclass(frozen=True)
class DecodedTau:
    """Decodes the same prompts with whatever drafter it is called with; to be passed to a `Trainer` as `decode`.

    Prompts are sources and token ids, from `spread_prompts`. Of the target's own generation config only the ids that end a text count, not
    its top-k or repetition penalty.
    """

    target: PreTrainedModel
    prompts: Sequence[tuple[str, Sequence[int]]]
    max_new_tokens: int = 64
    temperatures: Sequence[float] = (0.0, 1.0)
    batch_size: int = 8
    seed: int = 0
    copying: bool = True
    verification: str = DEFAULT_VERIFICATION

    def __call__(self, drafter: DSparkDrafter) -> dict[str, Any]:
        """`tau`, bonus token included, as a mean over temperatures, and for each temperature `T=..` its `tau`, `acceptance` by block
        position and `by_source`.
        """
        found: dict[str, Any] = {}
        for temperature in self.temperatures:
            by_source = self._run(drafter, temperature)
            total = AcceptanceCounts.of(chain(*by_source.values()))
            found[f"T={temperature:g}"] = {
                "tau": total.tau,
                "acceptance": total.conditional_acceptance,
                "by_source": {source: AcceptanceCounts.of(rows).tau for source, rows in sorted(by_source.items())},
            }
        taus = [part["tau"] for part in found.values() if part["tau"] is not None]
        return {"tau": sum(taus) / len(taus) if taus else None, "prompts": len(self.prompts), **found}

    def _run(self, drafter: DSparkDrafter, temperature: float) -> dict[str, list[RowStats]]:
        served = serve(
            self.target, drafter, [ids for _, ids in self.prompts], concurrency=self.batch_size, max_new_tokens=self.max_new_tokens,
            budget=FullBudget(),  # tau is what the drafter can do, not what a budget lets it do
            end_ids=eos_token_ids(self.target), temperature=temperature, seed=self.seed, copying=self.copying,
            verification=self.verification,
        )  # fmt: skip
        rows: dict[str, list[RowStats]] = {}
        for request, row in served.stats.by_request.items():
            rows.setdefault(self.prompts[request][0], []).append(row)
        return rows


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Tau over prompt files, also with token-by-token verification, and without n-gram copying where the drafter copies."""
    target, tokenizer = load_target(args.target, dtype=args.dtype)
    drafter = load_drafter(args.drafter, dtype=args.dtype).bind(target)
    prompts = [(path.stem, ids) for path in args.prompts for ids in prompt_ids(tokenizer, read_prompts(path, args.limit))]
    decode = DecodedTau(target, prompts, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size, seed=args.seed)
    sampled = [t for t in decode.temperatures if t > 0]
    record = {
        "settings": {
            **{name: getattr(args, name) for name in ("target", "drafter", "limit", "max_new_tokens", "batch_size")},
            "sets": [path.stem for path in args.prompts],
            "verification": decode.verification,
            "dtype": str(target.dtype).removeprefix("torch."),
        },
        "decoded": decode(drafter),
        "token_by_token": replace(decode, temperatures=sampled, verification="token")(drafter),
    }
    if drafter.config.copy_weights is not None:
        record["without_copying"] = replace(decode, copying=False)(drafter)
    return {**record, "machine": machine_record(target.device), "seed": args.seed}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures tau over prompt files from the command line; returns 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--drafter", default="smollm2-dspark")
    parser.add_argument("--prompts", type=Path, action="append", required=True)
    parser.add_argument("--limit", type=int, default=32, help="prompts of each file")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(arguments)
    try:
        record = measure(args)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    atomic_write_json(args.json, record, indent=1)
    for kind in ("decoded", "token_by_token", "without_copying"):
        for key, part in record.get(kind, {}).items():
            if key.startswith("T="):
                print(f"{kind}, {key}: tau {part['tau']:.3f}", {source: round(tau, 2) for source, tau in part["by_source"].items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
