"""Functions over tensors as compiled graphs: one for all sizes on a CPU, captured by bucket of sizes on CUDA."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from transformers import CompileConfig

from hf_dspark.utils.logging import warn_once

logger = logging.getLogger(__name__)

# Graphs that are kept, the least recently used leave first.
MOST_GRAPHS = 64
# Sizes that functions are traced with, all different, by their letter; those behind the first few are assigned in turn.
_TRACE_SIZES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43)

Tensors = tuple[torch.Tensor, ...]
_MAKING = threading.RLock()  # tracing patches torch for the whole process


@dataclass(frozen=True)
class Argument:
    """A tensor that a graph reads.

    Args:
        tensor (`torch.Tensor`): contiguous.
        dims (`str`): a letter for each of its first dimensions that may differ from call to call, the same where sizes are the same; `.`,
            and what is left out, for those that do not. Letters mean sizes from 2 on, in ascending order of the alphabet: `A` <= `B`.
        buffer (`bool`): at the same address in every call as long as its size is the same, and perhaps written to.
    """

    tensor: torch.Tensor
    dims: str = ""
    buffer: bool = False


class Graphs:
    """Graphs of functions by key, made on first use.

    A function gets its arguments by name and returns a tuple of tensors. What it computes must follow from these tensors and from its key:
    Python that it runs through is run when its graph is made, never again. Parameters that it reads are read anew by every call.

    Args:
        device (`torch.device`): where everything lies.
        config (`CompileConfig`, *optional*): of the caller, as in `generate`; None for what suits the device: inductor on a CPU, CUDA
            graphs of the eager function on CUDA.
    """

    def __init__(self, device: torch.device, config: CompileConfig | None = None) -> None:
        self.device = device
        self.config = config or CompileConfig()
        self._captures = device.type == "cuda" and "no-cudagraphs" not in (self.config.mode or "")
        self._compiles = config is not None or not self._captures
        self.symbolic = not self._captures and self.config.dynamic is not False
        self._graphs: OrderedDict[Hashable, Callable[..., Tensors]] = OrderedDict()
        self._failed: set[Hashable] = set()
        self._in_use = threading.Lock()
        self._buffers: dict[Hashable, torch.Tensor] = {}
        self.made = 0
        self.notes: dict[Hashable, Any] = {}  # what a function says of its outputs, by key

    @contextmanager
    def use(self) -> Iterator[Graphs | None]:
        """For one call at a time where graphs have buffers of their own: None for another thread's meanwhile."""
        free = self.symbolic or self._in_use.acquire(blocking=False)
        if not free:
            warn_once(logger, "Another call uses the graphs of these models, which are of fixed sizes; this one decodes eagerly.")
        try:
            yield self if free else None
        finally:
            if free and not self.symbolic:
                self._in_use.release()

    def keep(self, name: Hashable, buffer: torch.Tensor) -> torch.Tensor:
        """The buffer of this name that graphs of fixed sizes read from call to call, with what `buffer` holds; it grows to the largest."""
        kept = self._buffers.get(name)
        if kept is buffer:
            return buffer
        shape = buffer.shape if kept is None else torch.Size(map(max, kept.shape, buffer.shape))
        if kept is None or shape != kept.shape:
            with torch.inference_mode(False):
                self._buffers[name] = kept = torch.zeros(shape, dtype=buffer.dtype, device=buffer.device)
        kept[tuple(slice(size) for size in buffer.shape)] = buffer
        return kept

    def size(self, size: int) -> int:
        """The size that arguments are to be padded to: the least that a graph takes, or the power of two that its bucket ends with."""
        return max(size, 2) if self.symbolic else 1 << max(size - 1, 1).bit_length()

    def run(self, key: tuple[Hashable, ...], function: Callable[..., Tensors], arguments: Mapping[str, Argument]) -> Tensors:
        """The function's outputs, which the next call of the same graph may overwrite; of the function itself where it cannot be compiled.

        Args:
            key (`tuple`): the function's name first, then all that it depends on beside its arguments.
            function (`Callable`): takes the arguments' tensors by name. The first call for a key runs it as it is, filling its caches.
            arguments (`Mapping[str, Argument]`): in the same order with the same dims in every call of this key.
        Raises:
            RuntimeError: if it cannot be compiled, with `CompileConfig(fullgraph=True)`.
        """
        tensors = [one.tensor for one in arguments.values()]
        full_key = (key, *(tensor.dtype for tensor in tensors))
        full_key = full_key if self.symbolic else (full_key, tuple(self._fixed(one) for one in arguments.values()))
        graph = self._graphs.get(full_key)
        if graph is not None:
            with suppress(KeyError):  # another thread may have let it go
                self._graphs.move_to_end(full_key)
            return graph(*tensors)
        with _MAKING:
            outputs = function(**dict(zip(arguments, tensors, strict=True)))
            if full_key not in self._graphs and key not in self._failed:
                self._make(key, full_key, function, arguments)
        return outputs

    def _make(
        self, key: tuple[Hashable, ...], full_key: Hashable, function: Callable[..., Tensors], arguments: Mapping[str, Argument]
    ) -> None:
        try:
            # What fails is reported here, once, and not by the tracer with a traceback too.
            with _quiet(logging.getLogger("torch._subclasses.fake_tensor")), torch.inference_mode(False), torch.no_grad():
                graph = self._compiled(function, arguments) if self._compiles else _positional(function, arguments)
                if self._captures:
                    graph = self._captured(graph, list(arguments.values()))
        except Exception as error:
            if self.config.fullgraph:
                raise RuntimeError(
                    f"{key[0]} cannot be compiled ({type(error).__name__}: {error}), which compile_config.fullgraph=True asks for. Leave "
                    "fullgraph out to run this part eagerly."
                ) from error
            self._failed.add(key)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
            warn_once(logger, f"{key[0]} cannot be compiled and runs eagerly ({type(error).__name__}: {reason[:200]}).")
            return
        self.made += 1
        self._graphs[full_key] = graph
        while len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)

    def _compiled(self, function: Callable[..., Tensors], arguments: Mapping[str, Argument]) -> Callable[..., Tensors]:
        sizes = ShapeEnv()
        mode = FakeTensorMode(shape_env=sizes, allow_non_fake_inputs=True)
        stand_ins: list[Any] = _stand_ins(mode, list(arguments.values()), symbolic=self.symbolic)
        with enable_python_dispatcher(), mode:
            traced: Any = make_fx(_positional(function, arguments))(*stand_ins)
        if read := [str(old) for old, new in sizes.replacements.items() if new.is_number]:
            raise RuntimeError(f"{len(read)} sizes that differ from call to call were read as numbers")
        backend = self.config.backend
        if backend == "eager":
            return traced
        if backend != "inductor":
            return torch._dynamo.lookup_backend(backend)(traced, stand_ins) if isinstance(backend, str) else backend(traced, stand_ins)
        options = dict(self.config.options or {})
        mode = self.config.mode
        if mode not in (None, "default", "reduce-overhead"):
            options = {name: value for name, value in torch._inductor.list_mode_options(mode).items() if "cudagraphs" not in name} | options
        return torch._inductor.compile(traced, stand_ins, options=options)

    def _captured(self, function: Callable[..., Tensors], arguments: list[Argument]) -> Callable[..., Tensors]:
        held = [one.tensor if one.buffer else one.tensor.clone() for one in arguments]
        moved = [place for place, one in enumerate(arguments) if not one.buffer]
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):
                function(*held)
        torch.cuda.current_stream(self.device).wait_stream(side)
        # A pool of its own: graphs that share one must run in the order in which they were captured.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function(*held)

        def replay(*tensors: torch.Tensor) -> Tensors:
            torch._foreach_copy_([held[place] for place in moved], [tensors[place] for place in moved], non_blocking=True)
            graph.replay()
            return outputs

        return replay

    def _fixed(self, argument: Argument) -> Hashable:
        tensor = argument.tensor
        return tuple(tensor.shape), tensor.data_ptr() if argument.buffer else None  # captured graphs know addresses


@contextmanager
def _quiet(noisy: logging.Logger) -> Iterator[None]:
    before, noisy.disabled = noisy.disabled, True
    try:
        yield
    finally:
        noisy.disabled = before


def _positional(function: Callable[..., Tensors], arguments: Mapping[str, Argument]) -> Callable[..., Tensors]:
    names = list(arguments)
    return lambda *tensors: function(**dict(zip(names, tensors, strict=True)))


def _stand_ins(mode: FakeTensorMode, arguments: list[Argument], *, symbolic: bool) -> list[torch.Tensor]:
    """Fake tensors whose sizes are symbols, one for each letter."""
    letters = sorted({letter for one in arguments for letter in one.dims} - {"."})
    sizes = dict(zip(letters, _TRACE_SIZES, strict=False))

    def stand_in(one: Argument) -> torch.Tensor:
        dims = one.dims.ljust(one.tensor.dim(), ".") if symbolic else "." * one.tensor.dim()
        shape = [size if letter == "." else sizes[letter] for letter, size in zip(dims, one.tensor.shape, strict=True)]
        like = torch.empty(shape, dtype=one.tensor.dtype, device=one.tensor.device)
        kinds = [DimDynamic.STATIC if letter == "." else DimDynamic.DUCK for letter in dims]
        return mode.from_tensor(like, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))

    return [stand_in(one) for one in arguments]
