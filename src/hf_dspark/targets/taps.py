"""Taps: hidden states of chosen decoder layers of the target, caught by forward hooks.

A tap is the raw output of a layer: the last entry of `hidden_states` is already normed, and the numbering of `output_hidden_states` has
changed between versions of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from hf_dspark.errors import UnsupportedTargetError


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a causal language model.

    Raises:
        UnsupportedTargetError: if they cannot be found.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for owner in (
        decoder,
        getattr(decoder, "decoder", None),
        getattr(model, "transformer", None),
        getattr(model, "model", None),
    ):
        for name in ("layers", "h", "blocks"):
            found = getattr(owner, name, None)
            if isinstance(found, nn.ModuleList):
                return found
    raise UnsupportedTargetError(
        f"{type(model).__name__} has no list of decoder layers where one is expected (`layers`, `h` or `blocks` of its decoder), so its "
        "hidden states cannot be read. Use a decoder-only causal language model."
    )


_TAPS: ContextVar[Taps | None] = ContextVar("hf_dspark_taps", default=None)


class Taps:
    """Hidden states of chosen layers, caught while `open()` is active in this thread.

    Args:
        model (`PreTrainedModel`): the target.
        layer_ids (`list[int]`): i is the output of decoder layer i; -1 is the embeddings, the input of layer 0.
    """

    def __init__(self, model: nn.Module, layer_ids: Sequence[int]) -> None:
        self.layer_ids = list(layer_ids)
        self._layers = decoder_layers(model)
        if self.layer_ids and not -1 <= min(self.layer_ids) <= max(self.layer_ids) < len(self._layers):
            raise UnsupportedTargetError(
                f"Taps {self.layer_ids} lie outside this target's {len(self._layers)} layers; allowed are -1 (embeddings) to "
                f"{len(self._layers) - 1}. The drafter was made for another target."
            )
        self._caught: dict[int, torch.Tensor] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hook the layers; the hooks are removed on leaving, whatever happened inside. Other threads pass unseen."""
        with ExitStack() as stack:
            for layer_id in self.layer_ids:
                handle = self._hook(layer_id)
                stack.callback(handle.remove)
            token = _TAPS.set(self)
            stack.callback(_TAPS.reset, token)
            yield

    def _hook(self, layer_id: int) -> Any:
        def keep(hidden: torch.Tensor) -> None:
            if _TAPS.get() is self:
                self._caught[layer_id] = hidden

        if layer_id == -1:

            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                keep(args[0] if args else kwargs["hidden_states"])

            before.is_dspark_tap = True  # type: ignore[attr-defined]
            return self._layers[0].register_forward_pre_hook(before, with_kwargs=True)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            keep(output[0] if isinstance(output, tuple) else output)

        after.is_dspark_tap = True  # type: ignore[attr-defined]
        return self._layers[layer_id].register_forward_hook(after)

    def take(self, device: torch.device | None = None) -> torch.Tensor:
        """Concatenate and forget what the last pass left: `(batch, T, taps * hidden)`, on one device; nothing where nothing is tapped."""
        if not self.layer_ids:
            return torch.empty(1, 0, 0)
        states = [self._caught.pop(i) for i in self.layer_ids]
        device = device or states[0].device
        return torch.cat([s if s.device == device else s.to(device) for s in states], dim=-1)
