"""Tiny training runs: a random Llama target in float32, a drafter for it, rows, a configuration."""

from __future__ import annotations

import gzip
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.training.configuration import TrainingConfig
from hf_dspark.training.rows import ResponseRow
from hf_dspark.training.trainer import Trainer


def tiny_target() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True}
    config = LlamaConfig(**shape, **tokens, max_position_embeddings=64, initializer_range=0.2)
    return LlamaForCausalLM(config).eval()


def tiny_drafter(target: LlamaForCausalLM, **settings: Any) -> DSparkDrafter:
    torch.manual_seed(1)
    shape = {"num_hidden_layers": 1, "block_size": 3, "markov_rank": 4, "target_layer_ids": [0, 2], "mask_token_id": 59}
    return DSparkDrafter.from_target(target, **{**shape, **settings})


def tiny_rows(count: int = 12) -> list[ResponseRow]:
    generator = torch.Generator().manual_seed(7)

    def ids(low: int, high: int) -> tuple[int, ...]:
        size = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(3, 50, (size,), generator=generator).tolist())

    return [ResponseRow("chat" if i % 2 else "code", ids(2, 6), ids(4, 14), float(i % 3 == 0), True) for i in range(count)]


def tiny_config(**settings: Any) -> TrainingConfig:
    small = {"steps": 6, "batch_size": 3, "num_anchors": 4, "learning_rate": 5e-3, "evaluation_anchors": 4, "chunk_positions": 7}
    return TrainingConfig(**{**small, "log_every": 1, **settings})


def tiny_trainer(output: Path, *, drafter: dict[str, Any] | None = None, held_out: int = 0, rows: int = 12, **settings: Any) -> Trainer:
    """A trainer of a fresh tiny drafter; `settings` as in `tiny_config`, or `decode` and `announce`."""
    target = tiny_target()
    ours = {name: settings.pop(name) for name in ("decode", "announce") if name in settings}
    train, other = tiny_rows(rows), tiny_rows(rows + held_out)[rows:]
    return Trainer(tiny_drafter(target, **(drafter or {})), target, train, other, tiny_config(**settings), output, **ours)


def events(output: Path) -> list[dict[str, Any]]:
    """What a run logged."""
    with (output / "log.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def losses(output: Path) -> list[float]:
    """The loss of each logged step of a run."""
    return [event["loss"] for event in events(output) if event["event"] == "step"]


def write(path: Path, *records: object) -> Path:
    """Write JSON lines; texts as they stand."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records)
    return path


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A real refusal by the system: no file may grow beyond `size` bytes (the interpreter ignores the signal that comes with it)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
