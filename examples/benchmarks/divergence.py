"""Where greedy texts in low precision part from the plain target's, and whether the target's own rounding explains it.
Knows `generate` and plain forward passes; knows nothing of how drafts are made.

In bf16 a pass over one token and a pass over eight round differently, and the arg-max of two near-equal logits may fall
either way: for plain `generate` too, as soon as its batch has another shape. So every parting is judged by what the
target itself does there: the distance of the two logits in the plain run (the gap), against how far that distance moves
when the same prefix is scored in passes of other shapes (the noise). Gap <= noise: explained.

    python -m examples.benchmarks.divergence --prompts gsm8k.jsonl --limit 24 --json divergence.json
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from hf_dspark.cache.kv_cache import RowCache, RowLayout
from hf_dspark.errors import DataError, DSparkError
from hf_dspark.evaluation.metrics import common_prefix, machine_record
from hf_dspark.evaluation.prompts import Conversation, read_prompts
from hf_dspark.evaluation.speed import Bench, new_tokens
from hf_dspark.targets.target import Target

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel

METHODS = ("plain_batched", "prompt_lookup", "dspark", "dspark_batched")
_RAGGED = "ragged"
_BLOCKS = 8
_COPIES = 8
_PADDING = 16


@dataclass(frozen=True)
class Divergence:
    """The first token at which a text differs from the plain one.

    Args:
        method: one of `METHODS`.
        row: number of the prompt, from 0.
        position: index of the token among the new ones, from 0.
        plain_token: the plain target's token there.
        other_token: the method's token there.
        gap: logit of `plain_token` less that of `other_token`, in the plain run's own step; at least 0.
        top_two_gap: the plain run's best logit less its second best; at most `gap`.
        differences: the same difference of logits, by the shape of the pass that scored the prefix
            (`shape_differences`; `generate` is the plain run itself, whose value is `gap`).
    """

    method: str
    row: int
    position: int
    plain_token: int
    other_token: int
    gap: float
    top_two_gap: float
    differences: Mapping[str, float]

    @property
    def noise(self) -> float:
        """How far the difference moves with the shape of the pass: largest less smallest, over all shapes."""
        return max(self.differences.values()) - min(self.differences.values())

    @property
    def plain_noise(self) -> float:
        """The same over the target's plain passes alone, this package's ragged ones left out."""
        plain = [value for shape, value in self.differences.items() if not shape.startswith(_RAGGED)]
        return max(plain) - min(plain)

    @property
    def explained(self) -> bool:
        """True where the gap lies within the noise; an exact tie always does."""
        return self.gap <= self.noise

    def to_json(self) -> dict[str, Any]:
        """Returns the record, with noise and verdict."""
        return {
            **asdict(self),
            "differences": dict(self.differences),
            "noise": self.noise,
            "plain_noise": self.plain_noise,
            "explained": self.explained,
        }


@dataclass
class Comparison:
    """All methods against plain `generate` one row at a time, on the same prompts.

    Args:
        rows: prompts.
        methods: those compared.
        dtype: of the target.
        divergences: at most one a row and method.
    """

    rows: int
    methods: tuple[str, ...]
    dtype: str
    divergences: list[Divergence] = field(default_factory=list)

    def of(self, method: str) -> list[Divergence]:
        """The divergences of one method."""
        return [one for one in self.divergences if one.method == method]

    def identical(self, method: str) -> int:
        """Rows in which a method gave the plain tokens exactly."""
        return self.rows - len(self.of(method))

    @property
    def unexplained(self) -> list[Divergence]:
        """Those whose gap is wider than the noise."""
        return [one for one in self.divergences if not one.explained]

    def to_json(self) -> dict[str, Any]:
        """Returns counts by method, then the divergences."""
        return {
            "dtype": self.dtype,
            "rows": self.rows,
            "methods": {
                method: {
                    "rows": self.rows,
                    "identical": self.identical(method),
                    "diverged": len(self.of(method)),
                    "explained": sum(one.explained for one in self.of(method)),
                    "explained_by_plain_passes": sum(one.gap <= one.plain_noise for one in self.of(method)),
                }
                for method in self.methods
            },
            "divergences": [one.to_json() for one in self.divergences],
        }


def compare(
    bench: Bench,
    conversations: Sequence[Conversation],
    *,
    methods: Sequence[str] = METHODS,
    batch_size: int = 8,
    on_rows: Callable[[int], None] | None = None,
) -> Comparison:
    """Generates every prompt by plain `generate`, row by row, and by each method, and judges each first difference.

    Args:
        bench: target, drafter and length; greedy.
        conversations: the prompts.
        methods: of `METHODS`: plain `generate` and DSpark in left-padded batches, transformers' prompt lookup and
            DSpark row by row.
        batch_size: rows of the batched methods.
        on_rows: called with the number of rows just done.
    Raises:
        ValueError: if the bench samples, a method is unknown, or there are no prompts.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"unknown methods {unknown}; allowed: {', '.join(METHODS)}")
    if not bench.sampling.greedy:
        raise ValueError(f"texts are compared under greedy decoding, got temperature {bench.sampling.temperature}; set it to 0")
    if not conversations or batch_size < 1:
        raise ValueError(f"need at least one prompt and a batch size of at least 1, got {len(conversations)} and {batch_size}")
    result = Comparison(len(conversations), tuple(methods), str(bench.target.dtype).removeprefix("torch."))
    for first in range(0, len(conversations), batch_size):
        group = conversations[first : first + batch_size]
        alone = [bench.inputs([conversation]) for conversation in group]
        references = [_reference(bench, inputs) for inputs in alone]
        measured: dict[tuple[int, ...], dict[str, float]] = {}
        for method in methods:
            for index, tokens in enumerate(_texts(bench, method, group, alone)):
                plain, logits = references[index]
                position = common_prefix(plain, tokens)
                if position == len(plain) == len(tokens):
                    continue
                if position == min(len(plain), len(tokens)):
                    raise RuntimeError(
                        f"{method}, prompt {first + index}: one text ends after {position} tokens without an "
                        "end-of-text token, so the two had different length limits; please report this"
                    )
                a, b = plain[position], tokens[position]
                key = (index, position, a, b)
                if key not in measured:
                    prefix = torch.cat([alone[index]["input_ids"][0].cpu(), torch.tensor(plain[:position], dtype=torch.long)])
                    step = logits[position]
                    measured[key] = {
                        "generate": (step[a] - step[b]).item(),
                        **shape_differences(bench.target, prefix, a, b, prompt_tokens=len(prefix) - position),
                    }
                best, second = logits[position].topk(2).values.tolist()
                result.divergences.append(
                    Divergence(method, first + index, position, a, b, measured[key]["generate"], best - second, measured[key])
                )
        if on_rows is not None:
            on_rows(len(group))
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
        logit of `first` less logit of `second` after the prefix, by shape of the pass: `full`, one forward over all of
        it; `block_k`, its last k tokens after a cache of the others (`block_1` is a single step); `decode_k`, the
        prompt in one pass and all that follows k tokens a pass; `batch_8`, a step in a batch of eight copies;
        `padded_8`, the same with every pass left-padded; `ragged_1[k]` and `ragged_8[k]`, its last k tokens in a ragged
        pass alone, and beside the seven other block lengths.
    """
    if prefix.dim() != 1 or len(prefix) < 2:
        raise ValueError(f"a prefix is 1-D with at least two tokens, got shape {tuple(prefix.shape)}")
    ids, n = prefix.to(target.get_input_embeddings().weight.device), len(prefix)
    prompt = n if prompt_tokens is None else prompt_tokens
    blocks = list(range(1, min(_BLOCKS, n - 1) + 1))
    scored: dict[str, torch.Tensor] = {"full": target(input_ids=ids[None], use_cache=False, logits_to_keep=1).logits[0, -1]}

    whole = _filled(target, ids[None, :-1])
    for k in blocks:
        cache = copy.deepcopy(whole)  # a sliding window lets go of what lies before it, so a cache is cropped once
        cache.crop(1 - k)
        scored[f"block_{k}"] = target(input_ids=ids[None, n - k :], past_key_values=cache, use_cache=True).logits[0, -1]
    for k in range(2, min(_BLOCKS, n - prompt) + 1):
        cache = _filled(target, ids[None, :prompt])
        for end in range(n - (n - prompt - 1) // k * k, n + 1, k):
            begin = max(end - k, prompt)
            logits = target(input_ids=ids[None, begin:end], past_key_values=cache, use_cache=True).logits
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
    cache = _filled(target, whole[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1])
    step = target(
        input_ids=whole[:, -1:],
        attention_mask=mask,
        position_ids=positions[:, -1:],
        past_key_values=cache,
        use_cache=True,
    )
    return step.logits[0, -1]


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
            prompt = RowLayout([0] * rows, [n - 1] * rows, device)
            ragged.forward(ids[:-1].repeat(rows), prompt, store, only_last=True)
            for lengths in groups:  # a block is written over what the prompt's pass, or a shorter block, left there
                layout = RowLayout([n - k for k in lengths], lengths, device)
                logits, _ = ragged.forward(torch.cat([ids[n - k :] for k in lengths]), layout, store)
                for k, row in zip(lengths, logits[layout.last], strict=True):
                    scored[f"{_RAGGED}_{rows}[{k}]"] = row
    return scored


def _filled(target: PreTrainedModel, ids: torch.Tensor, **inputs: torch.Tensor) -> DynamicCache:
    """A cache after one pass over `ids` `(batch, n)`."""
    cache = _cache(target)
    target(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs)
    return cache


def _cache(target: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=target.config)
    if hasattr(cache, "activate_past_recording"):  # not needed, and not there, in older releases of transformers
        cache.activate_past_recording()
    return cache


def _reference(bench: Bench, inputs: Mapping[str, torch.Tensor]) -> tuple[list[int], list[torch.Tensor]]:
    """Plain greedy tokens of one prompt, and the logits `(V,)` that each was chosen from."""
    output = bench.target.generate(
        **inputs,
        **bench.sampling.options(),
        max_new_tokens=bench.max_new_tokens,
        pad_token_id=bench.tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = new_tokens(output.sequences, inputs["input_ids"].shape[1], bench.end_ids)[0]
    return tokens, [logits[0].float().cpu() for logits in output.logits]


def _texts(bench: Bench, method: str, group: Sequence[Conversation], alone: Sequence[BatchEncoding]) -> list[list[int]]:
    name = {"plain_batched": "plain", "dspark_batched": "dspark"}.get(method)
    if name is not None:
        return bench.run(name, bench.inputs(group)).tokens
    return [bench.run(method, inputs).tokens[0] for inputs in alone]


def measure(
    target_name: str,
    drafter_name: str,
    prompts: Sequence[Path],
    *,
    limit: int | None = None,
    max_new_tokens: int = 96,
    batch_size: int = 8,
    budget: str | None = None,
    dtype: str = "bf16",
    device: str = "cpu",
    on_rows: Callable[[str, int], None] | None = None,
) -> dict[str, Any]:
    """Runs `compare` in `dtype` and again in fp32, and returns everything as one record ready for JSON.

    Args:
        target_name, drafter_name: as `hf_dspark.models.loading` takes them.
        prompts: prompt files.
        limit: rows of each file; None reads all.
        max_new_tokens: new tokens a row at most.
        batch_size: rows of the batched methods.
        budget: verified tokens a round; None uses the drafter's.
        dtype: of the judged leg.
        device: where the models go.
        on_rows: called with the leg's dtype and the rows just done.
    """
    from hf_dspark.models.loading import load_drafter, load_target

    if len({path.name for path in prompts}) < len(prompts):
        raise DataError(f"prompt files are told apart by name, got {[path.name for path in prompts]} twice; rename one of them")
    files = {path.name: read_prompts(path, limit) for path in prompts}
    conversations = [conversation for rows in files.values() for conversation in rows]
    legs: list[dict[str, Any]] = []
    machine: dict[str, Any] = {}
    budget_used = ""
    for name in (dtype, "fp32"):
        drafter = load_drafter(drafter_name, dtype=name, device=device)
        target, tokenizer = load_target(target_name, dtype=name, device=device)
        bench = Bench(target, drafter, tokenizer, max_new_tokens=max_new_tokens, budget=budget)
        leg = compare(
            bench,
            conversations,
            batch_size=batch_size,
            on_rows=None if on_rows is None else lambda rows, name=name: on_rows(name, rows),  # type: ignore[misc]
        )
        legs.append(leg.to_json())
        machine = machine_record(target.device)
        budget_used = str(budget if budget is not None else drafter.budget)
    judged, exact = legs
    return {
        "target": target_name,
        "drafter": drafter_name,
        "prompts": {path: len(rows) for path, rows in files.items()},
        "settings": {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "budget": budget_used},
        **judged,
        "all_explained": all(one["explained"] for one in judged["divergences"]),
        "fp32": exact,
        "fp32_identical": not exact["divergences"],
        "machine": machine,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurement; returns 1 where a divergence is unexplained or an fp32 text differs, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--drafter", default="smollm2-dspark")
    parser.add_argument("--prompts", type=Path, nargs="+", action="extend", required=True, help="JSONL files of prompts")
    parser.add_argument("--limit", type=int, help="rows of each file")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--budget", help="full, static:N or threshold:P")
    parser.add_argument("--dtype", default="bf16", help="of the judged leg; fp32 is always run beside it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the record here too")
    args = parser.parse_args(arguments)
    try:
        record = measure(
            args.target,
            args.drafter,
            args.prompts,
            limit=args.limit,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            budget=args.budget,
            dtype=args.dtype,
            device=args.device,
            on_rows=lambda leg, rows: print(f"{leg}: {rows} more rows", file=sys.stderr, flush=True),
        )
    except (ValueError, DSparkError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record), flush=True)
    return 0 if record["all_explained"] and record["fp32_identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
