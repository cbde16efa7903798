"""Where greedy texts in low precision differ from the plain target's, and whether the target's own rounding explains it.

In bf16 a pass over one token and a pass over eight round differently, and the arg-max of two near-equal logits may fall either way: for
plain `generate` too, as soon as its batch has another shape. So every difference is judged by what the target itself does there: the
distance of the two logits in the plain run (the gap), against how far that distance moves when the same prefix is scored in passes of other
shapes (the noise). Gap <= noise: explained.

    python -m examples.benchmarks.divergence --prompts gsm8k.jsonl --limit 24 --json divergence.json
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from examples.benchmarks.command import chosen, options, run_command, write_record
from transformers import BatchEncoding, DynamicCache, PreTrainedModel

from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.cache.layout import RowLayout
from hf_dspark.evaluation.metrics import common_prefix, machine_record
from hf_dspark.evaluation.prompts import Conversation, read_prompts
from hf_dspark.evaluation.speed import Bench, new_tokens
from hf_dspark.models.loading import load_drafter, load_target
from hf_dspark.targets.target import Target
from hf_dspark.utils.tokens import eos_token_ids

METHODS = ("plain_batched", "prompt_lookup", "dspark", "dspark_batched")
_BLOCKS, _COPIES, _PADDING = 8, 8, 16


@dataclass(frozen=True)
class Divergence:
    """The first token at which a text differs from the plain one.

    Args:
        method: one of `METHODS`.
        row, position: number of the prompt, and of the token among the new ones, from 0.
        plain_token, other_token: the plain target's token there, and the method's.
        gap: logit of `plain_token` less that of `other_token`, in the plain run's own step; at least 0.
        differences: the same difference of logits, by the shape of the pass (`shape_differences`; `generate` is the plain run itself).
    """

    method: str
    row: int
    position: int
    plain_token: int
    other_token: int
    gap: float
    differences: Mapping[str, float]

    @property
    def noise(self) -> float:
        """How far the difference moves with the shape of the pass."""
        return max(self.differences.values()) - min(self.differences.values())

    @property
    def explained(self) -> bool:
        """True where the gap lies within the noise; an exact tie always does."""
        return self.gap <= self.noise


@dataclass
class Comparison:
    """All methods against plain `generate` one row at a time, on the same prompts."""

    rows: int
    methods: tuple[str, ...]
    dtype: str
    divergences: list[Divergence] = field(default_factory=list)

    @property
    def unexplained(self) -> list[Divergence]:
        """Those whose gap is wider than the noise."""
        return [one for one in self.divergences if not one.explained]

    def to_json(self) -> dict[str, Any]:
        """Counts by method, then the divergences."""
        by_method = {method: [one for one in self.divergences if one.method == method] for method in self.methods}
        return {
            "dtype": self.dtype,
            "rows": self.rows,
            "methods": {
                method: {
                    "rows": self.rows,
                    "identical": self.rows - len(found),
                    "diverged": len(found),
                    "explained": sum(one.explained for one in found),
                }
                for method, found in by_method.items()
            },
            "divergences": [{**asdict(one), "noise": one.noise, "explained": one.explained} for one in self.divergences],
        }


def compare(bench: Bench, conversations: Sequence[Conversation], *, batch_size: int = 8) -> Comparison:
    """Generates every prompt by plain `generate`, row by row, and by each method, and judges each first difference.

    Args:
        bench: target, drafter and length; greedy.
        conversations: the prompts.
        batch_size: rows of the batched methods.
    """
    result = Comparison(len(conversations), METHODS, str(bench.target.dtype).removeprefix("torch."))
    for first in range(0, len(conversations), batch_size):
        group = conversations[first : first + batch_size]
        alone = [bench.inputs([conversation]) for conversation in group]
        references = [_reference(bench, inputs) for inputs in alone]
        for method in METHODS:
            for index, tokens in enumerate(_texts(bench, method, group, alone)):
                plain, logits = references[index]
                if plain == tokens:
                    continue
                position = common_prefix(plain, tokens)
                a, b = plain[position], tokens[position]
                prefix = torch.cat([alone[index]["input_ids"][0].cpu(), torch.tensor(plain[:position], dtype=torch.long)])
                gap = (logits[position][a] - logits[position][b]).item()
                differences = shape_differences(bench.target, prefix, a, b, prompt_tokens=len(prefix) - position)
                found = Divergence(method, first + index, position, a, b, gap, {"generate": gap, **differences})
                result.divergences.append(found)
    return result


@torch.inference_mode()
def shape_differences(
    target: PreTrainedModel, prefix: torch.Tensor, first: int, second: int, *, prompt_tokens: int | None = None
) -> dict[str, float]:
    """Scores one prefix in passes of different shapes; in exact arithmetic all would agree.

    Args:
        target: the causal LM.
        prefix (`torch.LongTensor` of shape `(n,)`): at least two tokens.
        first, second: token ids.
        prompt_tokens: how many of the prefix are the prompt; default: all.
    Returns:
        logit of `first` less logit of `second` after the prefix, by shape of the pass: `full`, one forward over all of it; `block_k`, its
        last k tokens after a cache of the others; `decode_k`, the prompt in one pass and all that follows k tokens a pass; `batch_8`, a
        step in a batch of eight copies; `padded_8`, the same left-padded; `ragged_1[k]` and `ragged_8[k]`, its last k tokens in a ragged
        pass alone, and beside the seven other block lengths.
    """
    ids, n = prefix.to(target.get_input_embeddings().weight.device), len(prefix)
    prompt = n if prompt_tokens is None else prompt_tokens
    blocks = list(range(1, min(_BLOCKS, n - 1) + 1))
    scored: dict[str, torch.Tensor] = {"full": target(input_ids=ids[None], use_cache=False, logits_to_keep=1).logits[0, -1]}
    whole = filled_cache(target, ids[None, :-1])
    for k in blocks:
        cache = copy.deepcopy(whole)  # a sliding window lets go of what lies before it, so a cache is cropped once
        cache.crop(1 - k)
        scored[f"block_{k}"] = target(input_ids=ids[None, n - k :], past_key_values=cache, use_cache=True).logits[0, -1]
    for k in range(2, min(_BLOCKS, n - prompt) + 1):
        cache = filled_cache(target, ids[None, :prompt])
        for end in range(n - (n - prompt - 1) // k * k, n + 1, k):
            logits = target(input_ids=ids[None, max(end - k, prompt) : end], past_key_values=cache, use_cache=True).logits
        scored[f"decode_{k}"] = logits[0, -1]
    for shape, padding in ((f"batch_{_COPIES}", 0), (f"padded_{_COPIES}", _PADDING)):
        scored[shape] = _step_in_batch(target, ids, padding)
    scored |= _ragged_scores(target, ids, blocks)
    return {shape: (logits[first].float() - logits[second].float()).item() for shape, logits in scored.items()}


def _step_in_batch(target: PreTrainedModel, ids: torch.Tensor, padding: int) -> torch.Tensor:
    """Logits `(V,)` after the last token of `ids`, a step in a batch of copies left-padded by `padding`."""
    whole = torch.cat([ids.new_zeros(padding), ids]).expand(_COPIES, -1)
    mask = torch.ones_like(whole)
    mask[:, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = filled_cache(target, whole[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1])
    last = {"input_ids": whole[:, -1:], "attention_mask": mask, "position_ids": positions[:, -1:]}
    return target(**last, past_key_values=cache, use_cache=True).logits[0, -1]


def _ragged_scores(target: PreTrainedModel, ids: torch.Tensor, blocks: Sequence[int]) -> dict[str, torch.Tensor]:
    """Logits `(V,)` after `ids` from ragged passes over its last k tokens: one k at a time, then every k at once."""
    ragged, n, device = Target(target, []), len(ids), ids.device
    scored: dict[str, torch.Tensor] = {}
    with ragged.open():
        for groups in ([[k] for k in blocks], [list(blocks)]):
            rows = len(groups[0])
            store = RowCache()
            store.add_rows(rows)
            store.reserve(n)
            ragged.forward(ids[:-1].repeat(rows), RowLayout([0] * rows, [n - 1] * rows, device), store, only_last=True)
            for lengths in groups:  # a block is written over what the prompt's pass, or a shorter block, left there
                layout = RowLayout([n - k for k in lengths], lengths, device)
                logits, _ = ragged.forward(torch.cat([ids[n - k :] for k in lengths]), layout, store)
                scored |= {f"ragged_{rows}[{k}]": row for k, row in zip(lengths, logits[layout.last], strict=True)}
    return scored


def filled_cache(target: PreTrainedModel, ids: torch.Tensor, **inputs: torch.Tensor) -> DynamicCache:
    """A cache after one pass over `ids` `(batch, n)`."""
    cache = DynamicCache(config=target.config)
    if hasattr(cache, "activate_past_recording"):  # newer releases of transformers crop only what was recorded
        cache.activate_past_recording()
    target(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs)
    return cache


def _reference(bench: Bench, inputs: BatchEncoding) -> tuple[list[int], list[torch.Tensor]]:
    """Plain greedy tokens of one prompt, and the logits `(V,)` that each was chosen from."""
    sizes = {"max_new_tokens": bench.max_new_tokens, "pad_token_id": bench.tokenizer.pad_token_id}
    output = bench.target.generate(**inputs, **bench.sampling.options(), **sizes, return_dict_in_generate=True, output_logits=True)
    tokens = new_tokens(output.sequences, inputs["input_ids"].shape[1], eos_token_ids(bench.target))[0]
    return tokens, [logits[0].float().cpu() for logits in output.logits]


def _texts(bench: Bench, method: str, group: Sequence[Conversation], alone: Sequence[BatchEncoding]) -> list[list[int]]:
    if method.endswith("_batched"):
        return bench.run(method.removesuffix("_batched"), bench.inputs(group)).tokens
    return [bench.run(method, inputs).tokens[0] for inputs in alone]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `compare` in `--dtype` and in fp32; returns 1 where a difference is unexplained or an fp32 text differs, 2 for bad input."""
    parser = options(__doc__, prompts=True, limit=None, max_new_tokens=96, batch_size=8)
    parser.add_argument("--budget", default="full")
    args = parser.parse_args(arguments)
    failed = []

    def run() -> None:
        conversations = [conversation for path in args.prompts for conversation in read_prompts(path, args.limit)]
        legs = []
        for dtype in (args.dtype, "fp32"):
            (target, tokenizer), drafter = load_target(args.target, dtype=dtype), load_drafter(args.drafter, dtype=dtype)
            bench = Bench(target, drafter, tokenizer, max_new_tokens=args.max_new_tokens, budget=args.budget)
            legs.append(compare(bench, conversations, batch_size=args.batch_size))
        judged, exact = legs
        failed.extend([*judged.unexplained, *exact.divergences])
        record = {
            **chosen(args, "target", "drafter"),
            "prompts": [path.name for path in args.prompts],
            "settings": chosen(args, "max_new_tokens", "batch_size", "budget", "limit"),
            **judged.to_json(),
            "fp32": exact.to_json(),
            "machine": machine_record(target.device),
        }
        write_record(args.json, record)
        print({method: f"{one['identical']} identical, {one['explained']} explained" for method, one in record["methods"].items()})

    return run_command(run) or int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
