"""hf_dspark: DSpark speculative decoding for transformers, at any batch size, with the target's exact distribution.

Importing it lets `target.generate(**inputs, assistant_model=drafter)` decode with a `DSparkDrafter`. Names are loaded when they are first
used, so that the command line answers `--help` without waiting for torch. Knows every layer below; is known by none.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .budgets import make_budget
    from .candidates import DSparkCandidateGenerator
    from .configuration_dspark import DSparkConfig
    from .costs import Costs
    from .errors import (
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
    from .generation import GenerateDSparkOutput
    from .integration import generate, install, uninstall
    from .load_aware import LaggedLoadAwareBudget, LoadAwareBudget
    from .modeling_dspark import DSparkDrafter
    from .online import OnlineCalibration
    from .profiling import CostProfile
    from .scheduling import Budget, FullBudget, StaticBudget, ThresholdBudget
    from .sharing.push import push_calibration
    from .statistics import DecodingStats, RowStats

_HOME = {
    "BindingError": "errors",
    "Budget": "scheduling",
    "CheckpointError": "errors",
    "CostProfile": "profiling",
    "Costs": "costs",
    "DSparkCandidateGenerator": "candidates",
    "DSparkConfig": "configuration_dspark",
    "DSparkDrafter": "modeling_dspark",
    "DSparkError": "errors",
    "DataError": "errors",
    "DecodingStats": "statistics",
    "FullBudget": "scheduling",
    "GenerateDSparkOutput": "generation",
    "HubError": "errors",
    "LaggedLoadAwareBudget": "load_aware",
    "LoadAwareBudget": "load_aware",
    "OnlineCalibration": "online",
    "OutputError": "errors",
    "RowStats": "statistics",
    "StaticBudget": "scheduling",
    "ThresholdBudget": "scheduling",
    "UnboundDrafterError": "errors",
    "UnsupportedOptionError": "errors",
    "UnsupportedTargetError": "errors",
    "generate": "integration",
    "install": "integration",
    "make_budget": "budgets",
    "push_calibration": "sharing.push",
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
    importlib.import_module(".modeling_dspark", __name__)
    importlib.import_module(".integration", __name__).install()
