"""Tau of real decoding, in batches and without timing, with and without copies where the drafter drafts them: cheap enough to be taken
during training, and over many prompts. Knows `generate` from outside; knows no trainer.

    python -m hf_dspark.evaluation.decoded --target smollm2 --drafter smollm2-dspark --prompts gsm8k.jsonl --limit 32 --json tau.json
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_dspark.decoding.verify import DEFAULT_VERIFICATION
from hf_dspark.evaluation.command import run_command, write_record
from hf_dspark.evaluation.metrics import AcceptanceCounts, machine_record
from hf_dspark.evaluation.prompts import encode, read_prompts
from hf_dspark.evaluation.speed import acceptance_of_row
from hf_dspark.evaluation.tables import machine_line
from hf_dspark.evaluation.training_tables import render_decoded
from hf_dspark.integration import generate
from hf_dspark.models.loading import load_drafter, load_target

_NOTHING = AcceptanceCounts(0, 0, 0, (), ())


def spread_prompts(rows: Sequence[Any], count: int) -> list[tuple[str, list[int]]]:
    """Choose prompts so that every source has its share, in the order of the rows, each prompt once.

    Args:
        rows: response rows (`source`, `prompt_ids`).
        count (`int`): prompts to choose at most.
    Returns:
        `list[tuple[str, list[int]]]`: source and token ids.
    """
    by_source: dict[str, dict[tuple[int, ...], None]] = {}
    for row in rows:
        by_source.setdefault(row.source, {})[tuple(row.prompt_ids)] = None
    waiting = {source: list(prompts) for source, prompts in sorted(by_source.items())}
    chosen: list[tuple[str, list[int]]] = []
    while len(chosen) < count and any(waiting.values()):
        for source, prompts in waiting.items():
            if prompts and len(chosen) < count:
                chosen.append((source, list(prompts.pop(0))))
    return chosen


class DecodedTau:
    """Decodes the same prompts with whatever drafter it is called with; to be passed to a `Trainer` as `decode`.

    Args:
        target (`PreTrainedModel`): the target.
        prompts: source and token ids of each prompt, from `spread_prompts`.
        max_new_tokens (`int`): new tokens a prompt.
        temperatures: 0 is greedy.
        batch_size (`int`): prompts decoded together.
        seed (`int`): of sampling.
        copying (`bool`): draft what the text repeats too, where the drafter has weights for that.
        verification (`str`): how drawn tokens are judged, `"block"` or `"token"`.
    """

    def __init__(
        self,
        target: Any,
        prompts: Sequence[tuple[str, list[int]]],
        *,
        max_new_tokens: int = 64,
        temperatures: Sequence[float] = (0.0, 1.0),
        batch_size: int = 8,
        seed: int = 0,
        copying: bool = True,
        verification: str = DEFAULT_VERIFICATION,
    ) -> None:
        self.target = target
        self.prompts = sorted(prompts, key=lambda prompt: len(prompt[1]))
        self.max_new_tokens = max_new_tokens
        self.temperatures = list(temperatures)
        self.batch_size = batch_size
        self.seed = seed
        self.copying = copying
        self.verification = verification

    def __call__(self, drafter: Any) -> dict[str, Any]:
        """Tau by temperature and source.

        Returns:
            `dict`: `tau` (the mean over temperatures), and for each temperature `T=..` its `tau`, `acceptance` by block
            position and `by_source`. Tau counts the target's bonus token.
        """
        found: dict[str, Any] = {}
        for temperature in self.temperatures:
            by_source = self._run(drafter, temperature)
            total = AcceptanceCounts.sum(by_source.values())
            found[f"T={temperature:g}"] = {
                "tau": total.tau,
                "acceptance": total.conditional_acceptance,
                "by_source": {source: counts.tau for source, counts in sorted(by_source.items())},
            }
        taus = [part["tau"] for part in found.values() if part["tau"] is not None]
        return {"tau": sum(taus) / len(taus) if taus else None, "prompts": len(self.prompts), **found}

    def _run(self, drafter: Any, temperature: float) -> dict[str, AcceptanceCounts]:
        # Temperature alone: what the target's own generation config adds (top-k, a repetition penalty) is left out.
        sampling: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}
        if temperature:
            sampling |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0}
        counts: dict[str, AcceptanceCounts] = {}
        pad = self.target.generation_config.pad_token_id or 0
        for first in range(0, len(self.prompts), self.batch_size):
            batch = self.prompts[first : first + self.batch_size]
            width = max(len(ids) for _, ids in batch)
            ids = torch.tensor([[pad] * (width - len(ids)) + ids for _, ids in batch])
            mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for _, ids in batch])
            output: Any = generate(
                self.target,
                drafter,
                input_ids=ids.to(self.target.device),
                attention_mask=mask.to(self.target.device),
                max_new_tokens=self.max_new_tokens,
                pad_token_id=pad,
                return_dict_in_generate=True,
                seed=self.seed + first,
                copying=self.copying,
                verification=self.verification,
                budget="full",  # tau is what the drafter can do, not what a budget lets it do
                **sampling,
            )
            for (source, _), row in zip(batch, output.stats.rows, strict=True):
                counts[source] = AcceptanceCounts.sum([counts.get(source, _NOTHING), acceptance_of_row(row)])
        return counts


def _changed(decode: DecodedTau, **fields: Any) -> DecodedTau:
    """The same prompts in the same order, decoded otherwise."""
    other = copy.copy(decode)
    vars(other).update(fields)
    return other


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    target, tokenizer = load_target(args.target, dtype=args.dtype)
    drafter = load_drafter(args.drafter, dtype=args.dtype)
    prompts = [
        (path.stem, encode(tokenizer, [conversation])["input_ids"][0].tolist())
        for path in args.prompts
        for conversation in read_prompts(path, args.limit)
    ]
    decode = DecodedTau(target, prompts, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size, seed=args.seed)
    decoded = decode(drafter.bind(target))
    token_by_token = _changed(decode, temperatures=[t for t in decode.temperatures if t > 0], verification="token")(drafter)
    heads_alone = None if drafter.config.copy_weights is None else _changed(decode, copying=False)(drafter)
    return {
        "settings": {
            "target": args.target,
            "drafter": args.drafter,
            "sets": [path.stem for path in args.prompts],
            "limit": args.limit,
            "max_new_tokens": args.max_new_tokens,
            "batch_size": args.batch_size,
            "verification": decode.verification,
            "dtype": str(target.dtype).removeprefix("torch."),
        },
        "decoded": decoded,
        "token_by_token": token_by_token,
        **({} if heads_alone is None else {"without_copying": heads_alone}),
        "machine": machine_record(target.device),
        "seed": args.seed,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure tau over prompt files from the command line; returns 2 for bad input."""
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

    def run() -> None:
        record = _measure(args)
        write_record(args.json, record)
        print(f"{render_decoded(record)} {machine_line(record)}")

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
