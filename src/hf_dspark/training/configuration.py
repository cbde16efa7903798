"""Hyper-parameters of a training run and the schedules that follow from them. Does not know models, data or files."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_dspark.training.losses import LossWeights
from hf_dspark.training.optimizer import OPTIMIZERS


@dataclass(frozen=True)
class TrainingConfig:
    """Hyper-parameters of one run; exactly one of `steps` and `minutes` sets its length and its schedule.

    Source: paper section 3.2 (warm-up 4%, clip 1.0, loss weights), with the start of the cross entropy raised: its
    initial value is 15 to 56 nats here and the L1 gradient nearly vanishes there.

    With `steps` a resumed run repeats the uninterrupted one exactly (same machine, same thread count). With `minutes`
    the schedule follows the elapsed share of that wall-clock time, and no two runs are the same.

    Args:
        steps (`int`, *optional*): optimizer steps of the whole run.
        minutes (`float`, *optional*): minutes of training, evaluation and checkpoints included, over all resumes.
        batch_size (`int`): rows a step, over all processes and accumulated parts.
        accumulation (`int`): parts that each process runs its share of a step's rows in, one after the other; the
            gradient is that of the whole step.
        num_anchors (`int`): at most this many blocks a row.
        learning_rate (`float`): peak, after the warm-up.
        warmup (`float`): share of the run with a linearly rising learning rate; a cosine to 0 follows.
        clip (`float`): largest gradient norm.
        optimizer (`str`): `"adamw"`, or `"muon"`: Muon on the backbone's matrices, AdamW on the rest.
        weight_decay (`float`): of the optimizer.
        ce_start, ce_end, ce_anneal (`float`): CE weight falls linearly from start to end over that first share of the
            run.
        total_variation, confidence, decay, soft_labels (`float`): see `LossWeights`.
        chunk_positions (`int`): block positions whose logits exist at one time.
        states_memory_gib (`float`): memory, in each process, that may hold the target's states of rows for later
            passes over the data; 0 computes them anew at every step. Nothing is ever written to disk.
        checkpoint_minutes, evaluation_minutes (`float`): cadence.
        evaluation_rows (`int`): held-out rows of the evaluations on the way; the last evaluation takes all.
        evaluation_anchors (`int`): blocks a held-out row.
        log_every (`int`): steps a log line.
        seed (`int`): of batches, anchors and evaluation.
    Raises:
        ValueError: naming the field that is out of range.
    """

    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 8
    accumulation: int = 1
    num_anchors: int = 64
    learning_rate: float = 1.5e-3
    warmup: float = 0.04
    clip: float = 1.0
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    ce_start: float = 1.0
    ce_end: float = 0.1
    ce_anneal: float = 0.3
    total_variation: float = 0.9
    confidence: float = 1.0
    decay: float = 4.0
    soft_labels: float = 0.0
    chunk_positions: int = 256
    states_memory_gib: float = 0.0
    checkpoint_minutes: float = 5.0
    evaluation_minutes: float = 10.0
    evaluation_rows: int = 64
    evaluation_anchors: int = 32
    log_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"steps is {self.steps} and minutes is {self.minutes}; allowed: exactly one of them. Set the other to None.")
        for name in (
            "steps",
            "minutes",
            "batch_size",
            "accumulation",
            "num_anchors",
            "learning_rate",
            "clip",
            "decay",
            "chunk_positions",
            "checkpoint_minutes",
            "evaluation_minutes",
            "evaluation_rows",
            "evaluation_anchors",
            "log_every",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; allowed: above 0. Correct the training configuration.")
        for name in ("warmup", "ce_anneal"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 0 up to, not including, 1. It is a share of the run.")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {self.optimizer!r}; allowed: {', '.join(OPTIMIZERS)}. Correct the training configuration.")
        if not 0 <= self.soft_labels <= 1:
            raise ValueError(f"soft_labels is {self.soft_labels}; allowed: 0 to 1. It is a share of the cross entropy.")
        if not 0 <= self.states_memory_gib < float("inf"):
            raise ValueError(f"states_memory_gib is {self.states_memory_gib}; allowed: 0 or more. Leave a few GiB of the machine free.")

    def learning_rate_at(self, fraction: float) -> float:
        """Learning rate at an elapsed share of the run in [0, 1]: linear warm-up, then cosine to 0."""
        if fraction < self.warmup:
            return self.learning_rate * fraction / self.warmup
        done = min(1.0, (fraction - self.warmup) / (1 - self.warmup))
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def loss_weights_at(self, fraction: float) -> LossWeights:
        """Loss coefficients at an elapsed share of the run in [0, 1]."""
        share = min(1.0, fraction / self.ce_anneal) if self.ce_anneal else 1.0
        return LossWeights(
            cross_entropy=self.ce_start + (self.ce_end - self.ce_start) * share,
            total_variation=self.total_variation,
            confidence=self.confidence,
            decay=self.decay,
            soft_labels=self.soft_labels,
        )
