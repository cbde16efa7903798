"""The one place where transformers is patched. It loads neither torch nor transformers: it waits until somebody else does.

`generate()` of transformers looks its decoding method up by name; for any `assistant_model` that is
`GenerationMixin._assisted_decoding`. `install` wraps that method: a DSpark drafter goes to `decoding.api`, everything else to the original.
`uninstall` puts the original back.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hf_dspark.utils.lazy_import import when_imported

_GENERATION = "transformers.generation.utils"
_AUTO = "transformers.models.auto.configuration_auto"

_LOCK = threading.Lock()
_installed = False
_calls = 0


def install() -> None:
    """Let `target.generate(..., assistant_model=drafter)` decode with a DSpark drafter, and `AutoModel` load one. Done on import."""
    global _installed
    with _LOCK:
        _installed = True
    when_imported(_GENERATION, _update)
    when_imported(_AUTO, _register)


def uninstall() -> None:
    """Put transformers' own `_assisted_decoding` back, once no call of `hf_dspark.generate` is running any more."""
    global _installed
    with _LOCK:
        _installed = False
    _update()


@contextmanager
def patched() -> Iterator[None]:
    """While open in any thread, transformers is patched, even after `uninstall`."""
    global _calls
    with _LOCK:
        _calls += 1
    _update()
    try:
        yield
    finally:
        with _LOCK:
            _calls -= 1
        _update()


def _update() -> None:
    """Patch where the user or a running call wants it, else put the original back."""
    if _GENERATION not in sys.modules:
        return
    mixin = getattr(sys.modules[_GENERATION], "GenerationMixin", None)
    if mixin is None:  # being imported by this very thread
        return
    with _LOCK:
        original = getattr(mixin._assisted_decoding, "_hf_dspark_original", None)
        if original is None and (_installed or _calls):
            mixin._assisted_decoding = _wrapped(mixin._assisted_decoding)
        elif original is not None and not (_installed or _calls):
            mixin._assisted_decoding = original


def _wrapped(original: Any) -> Any:
    # `wraps` keeps the signature, which generate() inspects to see whether `inputs_tensor` is wanted.
    @functools.wraps(original)
    def _assisted_decoding(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(kwargs.get("assistant_model"), "is_dspark_drafter", False):
            return original(self, *args, **kwargs)
        return importlib.import_module("hf_dspark.decoding.api").assisted_decoding(original, self, *args, **kwargs)

    _assisted_decoding._hf_dspark_original = original  # type: ignore[attr-defined]
    return _assisted_decoding


class _LazyConfig:
    """Stands for `DSparkConfig` in transformers' mapping until a DSpark checkpoint is loaded."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._class()(*args, **kwargs)

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._class().from_dict(*args, **kwargs)

    @staticmethod
    def _class() -> Any:
        importlib.import_module("hf_dspark.models.modeling_dspark")  # registers config and model themselves
        return importlib.import_module("hf_dspark.configuration_dspark").DSparkConfig


def _register() -> None:
    if "hf_dspark.models.modeling_dspark" not in sys.modules:
        sys.modules[_AUTO].CONFIG_MAPPING.register("dspark", _LazyConfig, exist_ok=True)
