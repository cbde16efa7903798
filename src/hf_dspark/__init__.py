"""hf_dspark: DSpark speculative decoding for transformers, at any batch size, with the target's exact distribution.

Importing it lets `target.generate(**inputs, assistant_model=drafter)` decode with a `DSparkDrafter`. Names are loaded when they are first
used, so that the command line answers `--help` without waiting for torch. Knows every layer below; is known by none.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_dspark.version import __version__

if TYPE_CHECKING:
    from hf_dspark.budgets.budget import Budget, FullBudget, StaticBudget, ThresholdBudget
    from hf_dspark.budgets.cost_model import Costs
    from hf_dspark.budgets.load_aware import LaggedLoadAwareBudget, LoadAwareBudget
    from hf_dspark.budgets.named import make_budget
    from hf_dspark.calibration.online import OnlineCalibration
    from hf_dspark.checkpoints.push import push_calibration
    from hf_dspark.configuration_dspark import DSparkConfig
    from hf_dspark.decoding.candidate_generator import DSparkCandidateGenerator
    from hf_dspark.decoding.generate import GenerateDSparkOutput
    from hf_dspark.decoding.profiler import CostProfile
    from hf_dspark.decoding.statistics import DecodingStats, RowStats
    from hf_dspark.errors import (
        BindingError,
        CheckpointError,
        DataError,
        DSparkError,
        HubError,
        OutputError,
        UnboundDrafterError,
        UnsupportedOptionError,
        UnsupportedTargetError,
    )
    from hf_dspark.integration import generate, install, uninstall
    from hf_dspark.models.modeling_dspark import DSparkDrafter

_HOME = {
    "BindingError": "errors",
    "Budget": "budgets.budget",
    "CheckpointError": "errors",
    "CostProfile": "decoding.profiler",
    "Costs": "budgets.cost_model",
    "DSparkCandidateGenerator": "decoding.candidate_generator",
    "DSparkConfig": "configuration_dspark",
    "DSparkDrafter": "models.modeling_dspark",
    "DSparkError": "errors",
    "DataError": "errors",
    "DecodingStats": "decoding.statistics",
    "FullBudget": "budgets.budget",
    "GenerateDSparkOutput": "decoding.generate",
    "HubError": "errors",
    "LaggedLoadAwareBudget": "budgets.load_aware",
    "LoadAwareBudget": "budgets.load_aware",
    "OnlineCalibration": "calibration.online",
    "OutputError": "errors",
    "RowStats": "decoding.statistics",
    "StaticBudget": "budgets.budget",
    "ThresholdBudget": "budgets.budget",
    "UnboundDrafterError": "errors",
    "UnsupportedOptionError": "errors",
    "UnsupportedTargetError": "errors",
    "generate": "integration",
    "install": "integration",
    "make_budget": "budgets.named",
    "push_calibration": "checkpoints.push",
    "uninstall": "integration",
}

__all__ = [
    "BindingError",
    "Budget",
    "CheckpointError",
    "CostProfile",
    "Costs",
    "DSparkCandidateGenerator",
    "DSparkConfig",
    "DSparkDrafter",
    "DSparkError",
    "DataError",
    "DecodingStats",
    "FullBudget",
    "GenerateDSparkOutput",
    "HubError",
    "LaggedLoadAwareBudget",
    "LoadAwareBudget",
    "OnlineCalibration",
    "OutputError",
    "RowStats",
    "StaticBudget",
    "ThresholdBudget",
    "UnboundDrafterError",
    "UnsupportedOptionError",
    "UnsupportedTargetError",
    "__version__",
    "generate",
    "install",
    "make_budget",
    "push_calibration",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


# A program that imports this package wants the plain call to work and AutoModel to know the drafter. The command `hf-dspark` loads what
# each of its commands needs, so that `hf-dspark --help` answers at once.
if Path(sys.argv[0] if sys.argv else "").stem != "hf-dspark":
    importlib.import_module(".models.modeling_dspark", __name__)
    importlib.import_module(".integration", __name__).install()
