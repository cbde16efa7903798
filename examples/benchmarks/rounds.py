"""What a round costs, eager and compiled, beside plain decoding, eager and with a static cache; calls take turns.

    python -m examples.benchmarks.rounds --rows 1,8 --json rounds.json
    python -m examples.benchmarks.rounds --shape qwen3-4b --accept 4 --rows 1,8,32 --device cuda --json rounds.json

With `--shape` target and drafter are random weights of a released model's shapes: their text means nothing, and `--accept N` lets N drafted
tokens of every block stand, whatever they are. That gives the time of a round, not an accepted length; the record says so.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from examples.benchmarks.command import options, run_command, write_record
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import CompileConfig, Qwen3Config, Qwen3ForCausalLM

import hf_dspark
from hf_dspark import DSparkDrafter
from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.cli.demo import PROMPTS
from hf_dspark.decoding import compiled as compiled_rounds
from hf_dspark.decoding import loop as decoding
from hf_dspark.decoding.draft import draft_block
from hf_dspark.decoding.verify import Verdict, accept_greedy
from hf_dspark.evaluation.metrics import machine_record
from hf_dspark.evaluation.prompts import encode, user_turn
from hf_dspark.evaluation.speed import synchronize
from hf_dspark.models.loading import load_drafter, load_target
from hf_dspark.utils.graphs import Graphs

# Layers, width, intermediate width and head counts of released models; drafters of them have five layers, blocks of 7, rank 256.
SHAPES = {"qwen3-4b": (36, 2560, 9728, 32, 8), "qwen3-8b": (36, 4096, 12288, 32, 8), "tiny": (4, 64, 96, 4, 2)}
CONTENDERS = ("plain", "plain_compiled", "dspark", "dspark_compiled")


def models(args: Any) -> tuple[Any, Any, Any]:
    """Target, drafter and tokenizer; no tokenizer for random weights."""
    device = torch.device(args.device)
    if args.shape is None:
        target, tokenizer = load_target(args.target, dtype=args.dtype, device=device)
        return target, load_drafter(args.drafter, dtype=args.dtype, device=device), tokenizer
    layers, width, inner, heads, kv_heads = SHAPES[args.shape]
    torch.manual_seed(args.seed)
    vocab = 512 if args.shape == "tiny" else 151_936
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=width // heads if args.shape == "tiny" else 128, max_position_embeddings=4096,
    )  # fmt: skip
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    with device:
        target = Qwen3ForCausalLM(config).to(dtype).eval()
        drafter = DSparkDrafter.from_target(target, mask_token_id=vocab - 1, num_hidden_layers=5, block_size=7, markov_rank=256)
    return target, drafter, None


def inputs_of(args: Any, tokenizer: Any, rows: int) -> dict[str, torch.Tensor]:
    """A batch of the demo's prompts, or of random ids."""
    if tokenizer is None:
        ids = torch.randint(8, 500, (rows, 128), generator=torch.Generator().manual_seed(args.seed)).to(args.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return dict(encode(tokenizer, [user_turn(PROMPTS[row % len(PROMPTS)]) for row in range(rows)]).to(args.device))


@contextmanager
def accepting(count: int | None) -> Iterator[None]:
    """While open, so many drafted tokens of every block stand, where they are verified."""

    def accept(choice: torch.Tensor, block: Any, layout: Any) -> Verdict:
        stands = (layout.added - 1).clamp(max=count)
        following = choice[layout.padded_index].gather(1, stands[:, None])[:, 0]
        return Verdict(stands, following) if block.block_size else accept_greedy(choice, block, layout)

    with mock.patch.object(decoding, "accept_greedy", accept), mock.patch.object(compiled_rounds, "accept_greedy", accept):
        yield


class Calls:
    """The four contenders on one batch."""

    def __init__(self, args: Any, target: Any, drafter: Any, inputs: dict[str, torch.Tensor], pad: int) -> None:
        self.args, self.target, self.drafter, self.inputs = args, target, drafter, inputs
        self.how = {
            "max_new_tokens": args.max_new_tokens,
            "do_sample": False,
            "eos_token_id": [target.config.vocab_size],
            "pad_token_id": pad,
        }

    def run(self, contender: str) -> tuple[float, Any]:
        """Seconds of one call, and the loop's own statistics."""
        static = CompileConfig()
        static._compile_all_devices = True
        start, stats = time.perf_counter(), None
        if contender == "plain":
            self.target.generate(**self.inputs, **self.how)
        elif contender == "plain_compiled":
            self.target.generate(**self.inputs, **self.how, cache_implementation="static", compile_config=static)
        else:
            ours = {"budget": self.args.budget, "compile": contender == "dspark_compiled", "return_dict_in_generate": True}
            with accepting(self.args.accept) if self.args.accept is not None else nullcontext():
                stats = hf_dspark.generate(self.target, self.drafter, **self.inputs, **self.how, **ours).stats
        synchronize(self.target.device)
        return time.perf_counter() - start, stats


@dataclass
class RoundCount:
    """Kernels launched outside graphs in each stage, waits for the device, and graphs made, of one round."""

    draft: int = 0
    verify: int = 0
    rest: int = 0
    waits: int = 0
    made: int = 0

    @property
    def launches(self) -> int:
        return self.draft + self.verify + self.rest


class _Seen(TorchDispatchMode):
    def __init__(self, rounds: list[RoundCount]) -> None:
        super().__init__()
        self.rounds, self.stage = rounds, "rest"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        launched = not (func.is_view or name in ("to", "detach", "lift_fresh", "alias"))
        setattr(self.rounds[-1], self.stage, getattr(self.rounds[-1], self.stage) + launched)
        self.rounds[-1].waits += name in ("_local_scalar_dense", "nonzero", "equal")
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_rounds() -> Iterator[list[RoundCount]]:
    """While open, counts every round; what runs inside graphs is not seen."""
    rounds: list[RoundCount] = []
    seen, one, run, measure = _Seen(rounds), decoding.DecodingLoop.round, Graphs.run, decoding.Stopwatch.measure

    def counted(self: Any) -> None:
        rounds.append(RoundCount())
        with seen:
            one(self)

    @contextmanager
    def in_stage(self: Any, stage: str) -> Iterator[None]:
        before, seen.stage = seen.stage, stage if rounds else seen.stage
        with measure(self, stage):
            yield
        seen.stage = before

    def unseen(self: Graphs, *args: Any) -> Any:
        before = self.made
        with _disable_current_modes():
            out = run(self, *args)
        rounds[-1].made += self.made - before
        return out

    def waiting(method: Any) -> Any:
        def call(tensor: torch.Tensor, *args: Any) -> Any:
            if rounds:
                rounds[-1].waits += 1
            return method(tensor, *args)

        return call

    patches = [(decoding.DecodingLoop, "round", counted), (Graphs, "run", unseen), (decoding.Stopwatch, "measure", in_stage)]
    patches += [(torch.Tensor, name, waiting(getattr(torch.Tensor, name))) for name in ("tolist", "cpu")]
    with ExitStack() as stack:
        for owner, name, other in patches:
            stack.enter_context(mock.patch.object(owner, name, other))
        yield rounds


def counts(calls: Calls, contender: str) -> dict[str, float]:
    """Launches and waits of a round, on average."""
    with counted_rounds() as rounds:
        calls.run(contender)
    return {name: statistics.mean(getattr(one, name) for one in rounds) for name in ("launches", "waits")}


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a reduction reads, the best of ten."""
    block = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        block.sum()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return block.numel() * 4 / best


def head_share(drafter: Any, rows: int, device: torch.device) -> float:
    """Share of an eager draft that is not its backbone: sequential head, draws and confidences, after contexts of 16 tokens."""
    cache = RowCache()
    cache.add_rows(rows)
    anchors = torch.full((rows,), 9, device=device)

    def seconds(call: Any) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            call()
            synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times)

    whole = seconds(lambda: draft_block(drafter, anchors, [0] * rows, cache, length=7, sample=False, with_confidence=True))
    return 1 - seconds(lambda: drafter.draft_hidden(anchors, [0] * rows, cache, 7)) / whole


def measure(args: Any, target: Any, drafter: Any, tokenizer: Any, rows: int) -> dict[str, Any]:
    """All contenders at one batch size."""
    device = target.device
    pad = 0 if tokenizer is None else tokenizer.pad_token_id
    calls = Calls(args, target, drafter, inputs_of(args, tokenizer, rows), pad)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first = {contender: calls.run(contender)[0] for contender in CONTENDERS}
    turns: dict[str, list[tuple[float, Any]]] = {contender: [] for contender in CONTENDERS}
    for turn in range(args.repeats):
        for place in range(len(CONTENDERS)):
            contender = CONTENDERS[(turn + place) % len(CONTENDERS)]
            turns[contender].append(calls.run(contender))
    tokens = rows * args.max_new_tokens
    record: dict[str, Any] = {"rows": rows}
    for contender, found in turns.items():
        seconds = statistics.median(s for s, _ in found)
        one: dict[str, Any] = {"tokens_per_s": tokens / seconds, "first_call_s": first[contender], "call_s": seconds}
        if found[0][1] is not None:
            all_stats = [stats for _, stats in found]
            one["rounds"] = all_stats[0].rounds
            one["round_ms"] = statistics.median(1e3 * (s.t_total_s - s.t_prefill_s) / s.rounds for s in all_stats)
            one |= {
                f"{n}_ms": statistics.median(1e3 * getattr(s, f"t_{n}_s") / s.rounds for s in all_stats)
                for n in ("draft", "verify", "rest")
            }
            one["rest_share"] = statistics.median(s.overhead for s in all_stats)
            one |= counts(calls, contender)
            if args.accept is None:
                one["tau"] = all_stats[0].tau
        record[contender] = one
    pairs = zip(turns["dspark_compiled"], turns["dspark"], strict=True)
    record["compiled_over_eager"] = statistics.median(
        (c.t_total_s - c.t_prefill_s) / c.rounds / ((e.t_total_s - e.t_prefill_s) / e.rounds) for (_, c), (_, e) in pairs
    )
    record["dspark_compiled_over_plain_compiled"] = statistics.median(
        p / d for (p, _), (d, _) in zip(turns["plain_compiled"], turns["dspark_compiled"], strict=True)
    )
    moved = sum(p.numel() * p.element_size() for model in (target, drafter) for p in model.parameters())
    record["round_over_weights_read"] = record["dspark_compiled"]["round_ms"] / (1e3 * moved / bandwidth(device))
    if device.type == "cuda":
        record["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return record


def main() -> int:
    parser = options(__doc__, dtype="fp32", max_new_tokens=64, repeats=5, accept=None)
    parser.add_argument("--rows", default="1,8", help="batch sizes")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of these shapes instead of --target and --drafter")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", default="full")
    args = parser.parse_args()

    def run() -> None:
        target, drafter, tokenizer = models(args)
        found = [measure(args, target, drafter, tokenizer, int(rows)) for rows in args.rows.split(",")]
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        record = {"settings": {**settings, "acceptance_is_forced": args.accept is not None}, "rounds": found}
        if target.device.type == "cuda":
            record["head_share_at_128"] = head_share(drafter, 128, target.device)
        write_record(args.json, {**record, "machine": machine_record(target.device)})
        for one in found:
            print(
                {name: value for name, value in one.items() if not isinstance(value, dict)}, {c: one[c]["tokens_per_s"] for c in CONTENDERS}
            )

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
