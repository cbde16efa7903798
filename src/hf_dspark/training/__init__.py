"""Training of drafters: response rows in, trained drafter out. Does not know the decoding loop or the Hub."""

from __future__ import annotations

from hf_dspark.training.blocks import BlockTargets, block_targets, sample_anchors
from hf_dspark.training.configuration import TrainingConfig
from hf_dspark.training.data import (
    Batch,
    DataSet,
    ResponseRow,
    collate,
    coverage,
    epoch_batches,
    frequent_tokens,
    load_data,
    prompt_hash,
    read_responses,
    split_rows,
)
from hf_dspark.training.identity import load_weights
from hf_dspark.training.losses import (
    LossResult,
    LossWeights,
    Tally,
    TargetHead,
    TargetProbabilities,
    dspark_loss,
    position_weights,
    weight_totals,
)
from hf_dspark.training.objective import BlockObjective, Blocks
from hf_dspark.training.optimizer import MasterOptimizer
from hf_dspark.training.states import TargetStates
from hf_dspark.training.trainer import Progress, Trainer

__all__ = [
    "Batch",
    "BlockObjective",
    "BlockTargets",
    "Blocks",
    "DataSet",
    "LossResult",
    "LossWeights",
    "MasterOptimizer",
    "Progress",
    "ResponseRow",
    "Tally",
    "TargetHead",
    "TargetProbabilities",
    "TargetStates",
    "Trainer",
    "TrainingConfig",
    "block_targets",
    "collate",
    "coverage",
    "dspark_loss",
    "epoch_batches",
    "frequent_tokens",
    "load_data",
    "load_weights",
    "position_weights",
    "prompt_hash",
    "read_responses",
    "sample_anchors",
    "split_rows",
    "weight_totals",
]
