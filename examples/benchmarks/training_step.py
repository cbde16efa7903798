"""What one training step costs: seconds, memory and bytes on disk, beside another program's step where one is given.

Every measurement has a process of its own, so that its peak memory is its own, and the programs take turns, so that a machine's drift hits
all alike. Knows the trainer; knows no training data, no recipes and no plots.

    python -m examples.benchmarks.training_step --target smollm2 --json training_step.json --compare "python their_step.py"

A compared command prints a JSON object as its last line, with at least `anchors_per_s` and `peak_rss_bytes`.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from hf_dspark.evaluation.metrics import machine_record
from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.training import ResponseRow, Trainer, TrainingConfig
from hf_dspark.training.memory import keep_freed_memory

STAGES = ("target_s", "backbone_s", "loss_s", "backward_s", "optimizer_s")
_RESERVED_IDS = 8  # the first ids of a vocabulary are special tokens more often than not


@dataclass(frozen=True)
class StepShape:
    """Sizes of a training step; every row is of the same length.

    Args:
        batch_size (`int`): rows.
        num_anchors (`int`): blocks a row.
        length_tokens, response_tokens (`int`): of a row, prompt included, and of its response.
        block_size (`int`): gamma.
        num_hidden_layers (`int`): backbone layers.
        markov_rank (`int`): of the sequential head.
        chunk_positions (`int`): block positions whose logits exist at one time.
    Raises:
        ValueError: if a size is below 1, or the response leaves no room for a prompt or an anchor.
    """

    batch_size: int = 4
    num_anchors: int = 128
    length_tokens: int = 330
    response_tokens: int = 210
    block_size: int = 7
    num_hidden_layers: int = 2
    markov_rank: int = 48
    chunk_positions: int = TrainingConfig.chunk_positions

    def __post_init__(self) -> None:
        for size in fields(self):
            if getattr(self, size.name) < 1:
                raise ValueError(f"{size.name} is {getattr(self, size.name)}; allowed: 1 or more. Correct the shape.")
        if not 2 <= self.response_tokens < self.length_tokens:
            raise ValueError(
                f"response_tokens is {self.response_tokens} of {self.length_tokens}; allowed: 2 up to length_tokens - 1. "
                "A row needs a prompt, an anchor and a token behind it."
            )


def synthetic_rows(shape: StepShape, count: int, *, vocab_size: int, seed: int) -> list[ResponseRow]:
    """Rows of uniformly drawn ids below `vocab_size`: what a step costs does not depend on which tokens it sees."""
    random = torch.Generator().manual_seed(seed)
    low = min(_RESERVED_IDS, vocab_size - 1)
    ids = torch.randint(low, vocab_size, (count, shape.length_tokens), generator=random).tolist()
    prompt = shape.length_tokens - shape.response_tokens
    return [ResponseRow("synthetic", tuple(row[:prompt]), tuple(row[prompt:]), 0.0, True) for row in ids]


def time_steps(
    target: Any,
    shape: StepShape,
    *,
    draft_vocab_size: int | None = None,
    tokenizer: Any = None,
    mask_token_id: int | None = None,
    steps: int = 5,
    warmup: int = 2,
    seed: int = 0,
) -> dict[str, Any]:
    """Time whole training steps in this process: rows, target pass, blocks, backbone, loss, backward, clip and AdamW.

    Args:
        target (`PreTrainedModel`): frozen causal LM, in the dtype to compute in.
        shape (`StepShape`): sizes.
        draft_vocab_size (`int`, *optional*): the drafter proposes the first that many ids; default: the whole vocabulary.
        tokenizer, mask_token_id (*optional*): one of them gives the mask token.
        steps, warmup (`int`): timed steps, and steps before them.
        seed (`int`): of rows, weights and anchors.
    Returns:
        `dict`: seconds of each step and of its stages, anchors of the timed steps, memory and bytes written.
    """
    torch.manual_seed(seed)
    vocab_size = target.config.get_text_config(decoder=True).vocab_size
    drafter = DSparkDrafter.from_target(
        target,
        tokenizer=tokenizer,
        mask_token_id=mask_token_id,
        num_hidden_layers=shape.num_hidden_layers,
        block_size=shape.block_size,
        markov_rank=shape.markov_rank,
        draft_token_ids=None if draft_vocab_size is None else torch.arange(draft_vocab_size),
    ).train()
    total = warmup + steps
    rows = synthetic_rows(shape, total * shape.batch_size, vocab_size=draft_vocab_size or vocab_size, seed=seed)
    config = TrainingConfig(
        steps=total,
        batch_size=shape.batch_size,
        num_anchors=shape.num_anchors,
        chunk_positions=shape.chunk_positions,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(drafter, target, rows, [], config, folder)
        before = _files(Path(folder))
        loaded_bytes = _status_bytes("VmRSS")
        records = []
        for step in range(total):
            if step == warmup:
                _forget_peak()
            records.append(_one_step(trainer, step))
        peak_bytes = _status_bytes("VmHWM") or _peak_bytes()
        after = _files(Path(folder))
    new_files = {name: size for name, size in after.items() if size != before.get(name, 0)}
    timed = records[warmup:]
    anchors = sum(record["anchors"] for record in timed)
    return {
        "anchors_per_s": anchors / sum(record["step_s"] for record in timed),
        "anchors": anchors,
        "positions": sum(record["positions"] for record in timed),
        "step_s": [record["step_s"] for record in timed],
        "stages": {name: [record[name] for record in timed] for name in STAGES},
        "peak_rss_bytes": peak_bytes,
        "loaded_rss_bytes": loaded_bytes,
        "hidden_state_disk_bytes": sum(new_files.values()),
        "written_bytes": sum(written) if (written := [r["written_bytes"] for r in records if r["written_bytes"] is not None]) else None,
        "draft_vocab_size": draft_vocab_size or vocab_size,
        "trainable_parameters": sum(p.numel() for p in trainer.optimizer.parameters),
        "dtype": str(target.dtype).removeprefix("torch."),
        "torch_threads": torch.get_num_threads(),
        "loss": [record["loss"] for record in timed],
    }


def _one_step(trainer: Trainer, step: int) -> dict[str, Any]:
    """Seconds of a whole step and of its stages; the loss has the coefficients of a run's end."""
    config, written = trainer.config, _written_bytes()
    marks = [time.perf_counter()]
    result = trainer.batch_loss(
        trainer.batch_at(step),
        num_anchors=config.num_anchors,
        generator=trainer._generator("anchors", step),
        weights=config.loss_weights_at(1.0),
    )
    marks.append(time.perf_counter())
    result.loss.backward()
    marks.append(time.perf_counter())
    trainer.optimizer.step(config.learning_rate_at(0.5), config.clip)
    marks.append(time.perf_counter())
    written_after = _written_bytes()
    return {
        **{name: trainer.seconds_of[name] for name in STAGES[:3]},
        "backward_s": marks[2] - marks[1],
        "optimizer_s": marks[3] - marks[2],
        "step_s": marks[3] - marks[0],
        "anchors": int(result.position_mask[:, :, 0].sum()),
        "positions": int(result.position_mask.sum()),
        "loss": float(result.loss.detach()),
        "written_bytes": None if written is None or written_after is None else written_after - written,
    }


# -- memory and disk -----------------------------------------------------------------------------------------------


def _status_bytes(field: str) -> int | None:
    """A memory figure of this process from /proc; None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def _peak_bytes() -> int:
    """Largest resident size of this process so far. On Linux it may be that of the process that started it: see VmHWM."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forget_peak() -> None:
    """Let VmHWM start again from the present size, where the kernel can: loading is not part of a step."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _written_bytes() -> int | None:
    """Bytes that this process has handed to write calls so far, to files or elsewhere; None where the kernel does not say."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("wchar:")), None)


def _files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


# -- taking turns --------------------------------------------------------------------------------------------------


def last_json_line(command: Sequence[str]) -> dict[str, Any]:
    """Run a program and read the JSON object that it prints last.

    Args:
        command: program and arguments.
    Raises:
        RuntimeError: with the end of its error output, if it fails or its last line is no such object.
    """
    done = subprocess.run(list(command), capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        try:
            record = json.loads(lines[-1])
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict) and {"anchors_per_s", "peak_rss_bytes"} <= record.keys():
            return record
    raise RuntimeError(
        f"{shlex.join(command)} ended with status {done.returncode} and printed {lines[-1:]} last; allowed: status 0 and a JSON object "
        f"with anchors_per_s and peak_rss_bytes. Its errors end with: {done.stderr[-2000:]}"
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    if len(values) == 1:
        return {"median": values[0], "p20": values[0], "p80": values[0]}
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": cuts[0], "p80": cuts[-1]}


def take_turns(commands: Mapping[str, Sequence[str]], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Records of each command, all of them run once in every one of `repeats` turns."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for turn in range(repeats):
        for name, command in commands.items():
            runs[name].append(last_json_line(command))
            print(f"turn {turn + 1} of {repeats}, {name}: {runs[name][-1]['anchors_per_s']:.1f} anchors/s", file=sys.stderr, flush=True)
    return runs


def summarize_ours(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one of our own variants over its turns, with the target's pass and without it.

    Without: the same steps less the seconds of their own target pass, for the comparison with a trainer that reads the target's states
    from somewhere. Memory is always that with the target.
    """
    steps = [s for run in runs for s in run["step_s"]]
    stages = {name: [s for run in runs for s in run["stages"][name]] for name in STAGES}
    without = [whole - target for whole, target in zip(steps, stages["target_s"], strict=True)]
    anchors = sum(run["anchors"] for run in runs) / len(steps)
    peak, loaded = max(run["peak_rss_bytes"] for run in runs), [run["loaded_rss_bytes"] for run in runs]
    return {
        "anchors_a_step": anchors,
        "step_s": spread(steps),
        "step_without_target_s": spread(without),
        "anchors_per_s": anchors / statistics.median(steps),
        "anchors_per_s_without_target": anchors / statistics.median(without),
        "stages": {name: spread(seconds) for name, seconds in stages.items()},
        "peak_rss_bytes": peak,
        "loaded_rss_bytes": None if None in loaded else max(loaded),
        "step_rss_bytes": None if None in loaded else max(run["peak_rss_bytes"] - run["loaded_rss_bytes"] for run in runs),
        "hidden_state_disk_bytes": max(run["hidden_state_disk_bytes"] for run in runs),
        "written_bytes": max((run["written_bytes"] for run in runs if run["written_bytes"] is not None), default=None),
        "runs": list(runs),
    }


def summarize_other(runs: Sequence[dict[str, Any]], command: str) -> dict[str, Any]:
    """Figures of a compared program over its turns, with its own records."""
    loaded = [run.get("loaded_rss_bytes") for run in runs]
    known = [size for size in loaded if size is not None]
    return {
        "command": command,
        "what": runs[0].get("what"),
        "anchors_per_s": spread([run["anchors_per_s"] for run in runs]),
        "step_s": spread(steps) if (steps := [s for run in runs for s in run.get("step_s", [])]) else None,
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
        "loaded_rss_bytes": max(known) if len(known) == len(runs) else None,
        "runs": list(runs),
    }


def ratios(ours: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Our figures over another program's, turn by turn; above 1 is faster, and below 1 is less memory.

    Returns:
        `dict`: the median over turns and the lowest turn of anchors/s, with the target's pass and without it, and the ratio of the peaks.
    """
    whole, without = [], []
    for mine, theirs in zip(ours, other, strict=True):
        seconds = statistics.median(mine["step_s"])
        spared = statistics.median(whole_s - target_s for whole_s, target_s in zip(mine["step_s"], mine["stages"]["target_s"], strict=True))
        anchors = mine["anchors"] / len(mine["step_s"])
        whole.append(anchors / seconds / theirs["anchors_per_s"])
        without.append(anchors / spared / theirs["anchors_per_s"])
    return {
        "anchors_per_s": statistics.median(whole),
        "anchors_per_s_lowest": min(whole),
        "anchors_per_s_without_target": statistics.median(without),
        "anchors_per_s_without_target_lowest": min(without),
        "peak_rss": max(run["peak_rss_bytes"] for run in ours) / max(run["peak_rss_bytes"] for run in other),
    }


def measure(variants: Mapping[str, Sequence[str]], compare: Sequence[str] = (), *, repeats: int = 3) -> dict[str, Any]:
    """Run our variants and the compared commands in turn, each in its own process.

    Args:
        variants: name and command of each of ours, as `worker_command` makes them.
        compare: command lines of other programs.
        repeats (`int`): turns.
    Returns:
        `dict`: `ours` by variant, `others` in the order given, each with its `ratios` by variant, and `against_best`, which takes for each
        variant the worst ratio over the others: the fastest of them for speed, the leanest for memory.
    """
    others = {f"other {number}": shlex.split(line) for number, line in enumerate(compare, start=1)}
    runs = take_turns({**variants, **others}, repeats)
    figures: dict[str, Any] = {
        "repeats": repeats,
        "ours": {name: summarize_ours(runs[name]) for name in variants},
        "others": [
            {**summarize_other(runs[name], line), "ratios": {ours: ratios(runs[ours], runs[name]) for ours in variants}}
            for name, line in zip(others, compare, strict=True)
        ],
    }
    if others:
        found = {name: [other["ratios"][name] for other in figures["others"]] for name in variants}
        figures["against_best"] = {
            name: {key: (max if key == "peak_rss" else min)(r[key] for r in all_ratios) for key in all_ratios[0]}
            for name, all_ratios in found.items()
        }
    return figures


# -- the command line ----------------------------------------------------------------------------------------------


def worker_command(
    target: str,
    shape: StepShape,
    *,
    dtype: str,
    draft_vocab_size: int | None,
    mask_token_id: int | None = None,
    **counts: int,
) -> list[str]:
    """The command that measures one variant in a process of its own; `counts` are `steps`, `warmup` and `seed`."""
    command = [sys.executable, "-m", "examples.benchmarks.training_step", "--worker", "--target", target, "--dtype", dtype]
    options = {"draft_vocab_size": draft_vocab_size, "mask_token_id": mask_token_id, **counts, **asdict(shape)}
    for name, value in options.items():
        if value is not None:
            command += ["--" + name.replace("_", "-"), str(value)]
    return command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--draft-vocab-size", type=int, default=None, help="of the reduced variant, beside the whole one")
    parser.add_argument("--mask-token-id", type=int, default=None, help="where the target's tokenizer has no spare token")
    parser.add_argument("--compare", action="append", default=[], metavar="COMMAND", help="another program's step; may be repeated")
    parser.add_argument("--repeats", type=int, default=3, help="turns, each in new processes")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a process")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    for size in fields(StepShape):
        parser.add_argument("--" + size.name.replace("_", "-"), type=int, default=size.default)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure training steps from the command line."""
    args = _parser().parse_args(arguments)
    shape = StepShape(**{size.name: getattr(args, size.name) for size in fields(StepShape)})
    counts = {"steps": args.steps, "warmup": args.warmup, "seed": args.seed}
    if args.worker:
        from hf_dspark.models.loading import load_target

        keep_freed_memory()  # as `hf-dspark train` does
        target, tokenizer = load_target(args.target, dtype=args.dtype)
        drafter = {"draft_vocab_size": args.draft_vocab_size, "mask_token_id": args.mask_token_id}
        figures = time_steps(target, shape, tokenizer=tokenizer, **drafter, **counts)
    else:
        sizes = {"full": None} if args.draft_vocab_size is None else {"full": None, "reduced": args.draft_vocab_size}
        same = {"dtype": args.dtype, "mask_token_id": args.mask_token_id, **counts}
        variants = {name: worker_command(args.target, shape, draft_vocab_size=size, **same) for name, size in sizes.items()}
        figures = {
            "machine": machine_record("cpu"),
            "target": args.target,
            **counts,
            "shape": asdict(shape),
            **measure(variants, args.compare, repeats=args.repeats),
        }
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
