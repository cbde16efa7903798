"""Targets that the user has compiled: their ragged passes run eagerly.

Rows, windows and lengths of a ragged pass are Python state that changes with every round; torch.compile would guard on it and compile
pass after pass until its limit.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from hf_dspark.utils.logging import warn_once

logger = logging.getLogger(__name__)

_LOCK = threading.Lock()
_STANCE = ExitStack()
_users = 0


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """While open, what is compiled of `model` runs as it was written; nothing happens for a model without compiled parts.

    torch knows one stance for all threads: the first to enter sets it, the last sets it back.
    """
    global _users
    if not any(_is_compiled(module) for module in model.modules()):
        yield
        return
    warn_once(logger, f"Compiled parts of {type(model).__name__} run eagerly while a drafter drafts for it; the text is the same.")
    with _LOCK:
        if _users == 0:
            _STANCE.enter_context(torch.compiler.set_stance("force_eager"))
        _users += 1
    try:
        yield
    finally:
        with _LOCK:
            _users -= 1
            if _users == 0:
                _STANCE.close()


def _is_compiled(module: nn.Module) -> bool:
    """By `module.compile()`, by `torch.compile(module)`, or by `module.forward = torch.compile(module.forward)`."""
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
