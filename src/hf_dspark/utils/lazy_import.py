"""Work that waits until a module has been imported by somebody else."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Hook(MetaPathFinder):
    """Finds one module as Python would, and calls `action` once, right after it has been loaded."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action
        self._searching = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.action()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call `action` as soon as a module has been imported; at once where it has been already.

    Args:
        name (`str`): the module, whole name.
        action (`Callable`): must not import what imports that module, for it runs before that import is complete.
    """
    if name in sys.modules:
        importlib.import_module(name)  # waits where another thread is importing it
        action()
    else:
        sys.meta_path.insert(0, _Hook(name, action))
