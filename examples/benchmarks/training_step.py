"""What one training step costs in seconds and memory, beside another program's step where one is given.

Every measurement has a process of its own, so that its peak memory is its own, and the programs take turns, so that a machine's drift hits
all alike. A compared command prints a JSON object as its last line, with at least `anchors_per_s` and `peak_rss_bytes`.

    python -m examples.benchmarks.training_step --draft-vocab-size 12288 --json training_step.json --compare "python their_step.py"
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from examples.benchmarks.command import chosen, options, run_command, write_record
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_dspark.evaluation.metrics import machine_record
from hf_dspark.models.loading import load_target
from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.training.configuration import TrainingConfig
from hf_dspark.training.memory import keep_freed_memory
from hf_dspark.training.rows import ResponseRow
from hf_dspark.training.trainer import Trainer


@dataclass(frozen=True)
class StepShape:
    """Sizes of a training step; every row is of the same length.

    Args:
        batch_size, num_anchors (`int`): rows, and blocks a row.
        length_tokens, response_tokens (`int`): of a row, prompt included, and of its response.
        block_size, num_hidden_layers, markov_rank (`int`): of the drafter.
        chunk_positions (`int`): block positions whose logits exist at one time.
    """

    batch_size: int = 4
    num_anchors: int = 128
    length_tokens: int = 330
    response_tokens: int = 210
    block_size: int = 7
    num_hidden_layers: int = 2
    markov_rank: int = 48
    chunk_positions: int = 256


def time_steps(
    target: PreTrainedModel,
    shape: StepShape,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    mask_token_id: int | None = None,
    draft_vocab_size: int | None = None,
    steps: int = 5,
    warmup: int = 2,
    seed: int = 0,
) -> dict[str, Any]:
    """Time whole training steps in this process: rows, target pass, blocks, backbone, loss, backward, clip and AdamW.

    Rows are of random ids: what a step costs does not depend on them.
    """
    torch.manual_seed(seed)
    vocab_size = draft_vocab_size or target.config.get_text_config(decoder=True).vocab_size
    drafter = DSparkDrafter.from_target(
        target,
        tokenizer=tokenizer,
        mask_token_id=mask_token_id,
        num_hidden_layers=shape.num_hidden_layers,
        block_size=shape.block_size,
        markov_rank=shape.markov_rank,
        draft_token_ids=None if draft_vocab_size is None else torch.arange(draft_vocab_size),
    ).train()
    total, prompt = warmup + steps, shape.length_tokens - shape.response_tokens
    ids = torch.randint(8, vocab_size, (total * shape.batch_size, shape.length_tokens)).tolist()  # the first are often special
    rows = [ResponseRow("synthetic", tuple(row[:prompt]), tuple(row[prompt:]), 0.0, True) for row in ids]
    sizes = {"batch_size": shape.batch_size, "num_anchors": shape.num_anchors, "chunk_positions": shape.chunk_positions}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(drafter, target, rows, [], TrainingConfig(steps=total, seed=seed, log_every=1, **sizes), folder)
        records = [trainer.step(0.5) for _ in range(total)]
    timed = records[warmup:]
    anchors = sum(record["anchors"] for record in timed)
    return {
        "anchors": anchors,
        "anchors_per_s": anchors / sum(record["step_s"] for record in timed),
        "anchors_per_s_without_target": anchors / sum(record["step_s"] - record["target_s"] for record in timed),
        "step_s": [record["step_s"] for record in timed],
        "target_s": [record["target_s"] for record in timed],
        "loss": [record["loss"] for record in timed],
        "peak_rss_bytes": _peak_bytes(),
        "trainable_parameters": sum(p.numel() for p in trainer.optimizer.parameters),
    }


def _peak_bytes() -> int | None:
    """Largest resident size of this process; None where there is no /proc."""
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+)", status.read_text(encoding="ascii", errors="replace"), re.MULTILINE) if status.exists() else None
    return None if found is None else 1024 * int(found[1])


def last_json_line(command: Sequence[str]) -> dict[str, Any]:
    """Run a program and read the JSON object that it prints last.

    Raises:
        ValueError: with the end of its error output, if it fails or its last line is no such object.
    """
    done = subprocess.run(list(command), capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    try:
        record = json.loads(lines[-1]) if done.returncode == 0 and lines else {}
    except json.JSONDecodeError:
        record = {}
    if not {"anchors_per_s", "peak_rss_bytes"} <= dict(record).keys():
        raise ValueError(
            f"{shlex.join(command)} ended with status {done.returncode} and printed {lines[-1:]} last; expected a JSON object with "
            f"anchors_per_s and peak_rss_bytes. Its errors end with: {done.stderr[-2000:]}"
        )
    return record


def compare(commands: dict[str, Sequence[str]], repeats: int) -> dict[str, Any]:
    """Run commands in turns; for each the median of its figures, all its runs, and the ratio of the first command's to it, by turn."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for turn in range(repeats):
        for name, command in commands.items():
            runs[name].append(last_json_line(command))
            print(f"turn {turn + 1} of {repeats}, {name}: {runs[name][-1]['anchors_per_s']:.1f} anchors/s", file=sys.stderr, flush=True)
    ours = next(iter(runs.values()))
    return {
        name: {
            "anchors_per_s": statistics.median(run["anchors_per_s"] for run in found),
            "peak_rss_bytes": max(run["peak_rss_bytes"] for run in found),
            "speed_of_first_over_it": statistics.median(a["anchors_per_s"] / b["anchors_per_s"] for a, b in zip(ours, found, strict=True)),
            "runs": found,
        }
        for name, found in runs.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure training steps from the command line; returns 2 for bad input."""
    sizes = {one.name: one.default for one in fields(StepShape)}
    # By default the drafter has the whole vocabulary and a spare token of the target's; a turn has timed steps in processes of its own.
    parser = options(__doc__, draft_vocab_size=None, mask_token_id=None, repeats=3, steps=5, **sizes)
    parser.add_argument("--compare", action="append", default=[], metavar="COMMAND", help="another program's step; may be repeated")
    parser.add_argument("--worker", action="store_true", help="measure here, and print the figures")
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    shape = StepShape(**chosen(args, *sizes))

    def run() -> None:
        if args.worker:
            keep_freed_memory()  # as `hf-dspark train` does
            target, tokenizer = load_target(args.target, dtype=args.dtype)
            target.requires_grad_(False)
            same = chosen(args, "mask_token_id", "draft_vocab_size", "steps", "seed")
            print(json.dumps(time_steps(target, shape, tokenizer=tokenizer, **same)))
            return
        ours = [sys.executable, "-m", "examples.benchmarks.training_step", *given, "--worker"]
        found = compare({"hf_dspark": ours, **{line: shlex.split(line) for line in args.compare}}, args.repeats)
        settings = chosen(args, "target", "dtype", "draft_vocab_size", "repeats", "steps", "seed")
        write_record(args.json, {"settings": settings, "shape": asdict(shape), "programs": found, "machine": machine_record("cpu")})

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
