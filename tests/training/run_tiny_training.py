"""Trains a tiny drafter in this process or in each of several launched ones; prints the loss curve. Started by tests, not collected.

python -m torch.distributed.run --nproc-per-node 2 tests/training/run_tiny_training.py OUTPUT [--accumulation N] [--fsdp]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from hf_dspark.training.trainer import Trainer
from tests.training.tiny_runs import losses, tiny_config, tiny_drafter, tiny_rows, tiny_target


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--stop-after", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    target = tiny_target()
    config = tiny_config(steps=args.steps, batch_size=4, accumulation=args.accumulation)
    trainer = Trainer(tiny_drafter(target), target, tiny_rows(14), tiny_rows(20)[14:], config, args.output, fsdp=args.fsdp)
    trainer.train(stop_after=args.stop_after)
    if trainer.processes.leads:
        print(json.dumps({"losses": losses(args.output), "processes": trainer.processes.count}))
    trainer.close()
    threads = [file.read_text(encoding="utf-8").strip() for file in Path("/proc/self/task").glob("*/comm")]
    if any("gloo" in thread for thread in threads):
        raise SystemExit(f"the process group's threads live on: {threads}")


if __name__ == "__main__":
    main()
