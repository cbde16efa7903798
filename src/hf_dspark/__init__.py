"""hf_dspark: DSpark speculative decoding for transformers, at any batch size, with the target's exact distribution.

Importing it lets `target.generate(**inputs, assistant_model=drafter)` decode with a `DSparkDrafter`. It loads neither torch nor
transformers: public names (`__init__.pyi` lists them) are loaded when they are first used, and transformers is patched as soon as its
`generate` is loaded.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

from hf_dspark.integration import install
from hf_dspark.version import __version__ as __version__

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOME = {alias.name: node.module for node in _STUB.body if isinstance(node, ast.ImportFrom) and node.module for alias in node.names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        if name == "DSparkConfig":  # whose model AutoModel has to find
            importlib.import_module("hf_dspark.models.modeling_dspark")
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


install()
