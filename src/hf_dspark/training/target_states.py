"""What the frozen target says of training rows: hidden states, and next-token probabilities from them. Computed on the fly, never written
to disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from hf_dspark.errors import UnsupportedTargetError
from hf_dspark.targets.taps import Taps

_GIB = 2**30
_CACHED_NUMBERS = 2**20  # of float32: 4 MiB
_HEAD_TOLERANCE = 0.02  # in probability


class TargetStates:
    """Hidden states of the tapped layers and last hidden states of a frozen target, by one pass of its decoder and never of its lm_head.

    The rows are padded on the right and the decoder is causal, so no padding mask is passed: padding cannot reach a real token, and
    attention takes its fast causal path.

    With `memory_gib` the states of rows stay in the host's memory for the next pass over the data. Then every row goes through the target
    alone, so that its states do not depend on its batch, and a resumed run sees the states of the uninterrupted one. Nothing is evicted: a
    pass over the data would evict just what it needs next.

    Args:
        target (`transformers.PreTrainedModel`): a causal LM; its weights are read only.
        layer_ids: i is the output of decoder layer i, -1 the embeddings.
        memory_gib (`float`): memory for states; a token of m tapped layers and width d takes (m + 1) d numbers.
    """

    def __init__(self, target: PreTrainedModel, layer_ids: Sequence[int], *, memory_gib: float = 0.0) -> None:
        self.target = target
        self.decoder = target.get_decoder()
        self.device = next(self.decoder.parameters()).device
        self._taps = Taps(target, layer_ids)
        self._remembers = memory_gib > 0
        self._free_bytes = int(memory_gib * _GIB)
        self._rows: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    @property
    def rows_in_memory(self) -> int:
        """Rows whose states are in memory."""
        return len(self._rows)

    def __call__(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """One pass over ids `(batch, sequence)`, padded on the right: tapped states `(batch, sequence, taps * hidden)`, and the last hidden
        states after the final norm `(batch, sequence, hidden)`, as ordinary tensors without gradient history."""
        with _frozen(self.target), self._taps.open():
            last = self.decoder(input_ids=input_ids.to(self.device), use_cache=False).last_hidden_state
        # Outside inference mode: the concatenation and the copy are ordinary tensors that backward may save.
        return self._taps.take(), last.clone()

    def of_batch(self, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """States of a batch as `__call__` returns them, from memory where they are there (then zeros at padding); `lengths` `(batch,)` are
        tokens without padding, of the longest row as many as the batch is wide."""
        if not self._remembers:
            return self(input_ids)
        rows = [self._row(ids[:length]) for ids, length in zip(input_ids, lengths.tolist(), strict=True)]
        taps, last = (pad_sequence([row[i] for row in rows], batch_first=True) for i in range(2))
        return taps, last

    def _row(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        key = tuple(ids.tolist())
        if key in self._rows:
            taps, last = self._rows[key]
            return taps.to(self.device, non_blocking=True), last.to(self.device, non_blocking=True)
        taps, last = (t[0] for t in self(ids[None]))
        size = taps.nbytes + last.nbytes
        if size <= self._free_bytes:
            self._free_bytes -= size
            self._rows[key] = (taps.cpu(), last.cpu())
        return taps, last


class TargetProbabilities(NamedTuple):
    """The target's distribution p_t at m row positions, on the draft vocabulary."""

    inside: Tensor  # (m, draft_vocab), p_t on the draft ids, float32; sums to 1 - outside
    outside: Tensor  # (m,), p_t's mass that no draft token can reach; 0 with the full vocabulary
    best: Tensor  # (m,), draft index of the target's most likely token, -1 where it is outside

    def rows(self, which: Tensor) -> TargetProbabilities:
        return TargetProbabilities(*(tensor[which] for tensor in self))

    def to(self, device: torch.device) -> TargetProbabilities:
        return TargetProbabilities(*(tensor.to(device) for tensor in self))


def places(count: int, ids: Tensor | slice, device: torch.device) -> Tensor:
    """The place of each of so many numbers among some of them, -1 where it is not one of those."""
    found = torch.full((count,), -1, dtype=torch.long, device=device)
    found[ids] = torch.arange(len(found[ids]), device=device)
    return found


def row_blocks(count: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of `count` rows of `width` float32 numbers for elementwise work: on a CPU as many as its cache holds a few copies of, all at
    once on an accelerator."""
    size = max(1, _CACHED_NUMBERS // width) if device.type == "cpu" else max(1, count)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class TargetHead:
    """p_t from the target's last hidden states.

    Holds a copy of a plain linear head with the draft tokens' rows first (vocab * hidden * bytes of its dtype; 57 MB for SmolLM2-135M in
    bf16), so that the draft columns of the logits are a slice. Any other head is called as a module.

    Args:
        output_embeddings (`torch.nn.Module`): the target's lm_head.
        draft_token_ids (`torch.Tensor` of shape `(draft_vocab,)`, *optional*): target ids; None is the full vocabulary.
        softcap (`float`, *optional*): final logit soft-cap c, logits <- c tanh(logits / c).
    """

    def __init__(self, output_embeddings: nn.Module, draft_token_ids: Tensor | None = None, *, softcap: float | None = None) -> None:
        self._head, self._ids, self._softcap = output_embeddings, draft_token_ids, softcap
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        if type(output_embeddings) is nn.Linear:
            self._weight, self._bias = output_embeddings.weight.detach(), output_embeddings.bias
            if draft_token_ids is not None:
                ids = draft_token_ids.to(self._weight.device)
                others = torch.ones(len(self._weight), dtype=torch.bool, device=ids.device)
                others[ids] = False
                order = torch.cat([ids, others.nonzero().squeeze(1)])
                self._weight, self._bias = self._weight[order], None if self._bias is None else self._bias.detach()[order]

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> TargetProbabilities:
        """p_t, float32, at m positions; `hidden` `(m, hidden)` are the target's last hidden states, after its final norm."""
        logits = self._head(hidden) if self._weight is None else F.linear(hidden.to(self._weight.dtype), self._weight, self._bias)
        count, vocab = logits.shape
        size = vocab if self._ids is None else len(self._ids)
        columns = slice(size) if self._ids is None or self._weight is not None else self._ids.to(logits.device)
        inside = torch.empty(count, size, device=logits.device)
        best = torch.empty(count, dtype=torch.long, device=logits.device)
        for block in row_blocks(count, vocab, logits.device):
            z = logits[block].float()
            if self._softcap is not None:
                z = torch.tanh(z / self._softcap) * self._softcap
            best[block] = z.argmax(dim=-1)
            inside[block] = z.softmax(dim=-1)[:, columns]
        outside = torch.zeros_like(inside[:, 0]) if self._ids is None else (1 - inside.sum(dim=-1)).clamp_(min=0)
        return TargetProbabilities(inside, outside, places(vocab, columns, logits.device)[best])

    def check(self, states: TargetStates, ids: Tensor) -> None:
        """Refuse a target whose logits at some tokens `(1, n)` are not its lm_head on its last hidden states: `UnsupportedTargetError`."""
        _, last = states(ids)
        with _frozen(states.target):
            expected = states.target(input_ids=ids.to(states.device), use_cache=False).logits[0].float().softmax(dim=-1)
        draft = expected if self._ids is None else expected[:, self._ids.to(expected.device)]
        error = float((draft - self(last[0]).inside).abs().max())
        if not error < _HEAD_TOLERANCE:
            raise UnsupportedTargetError(
                f"the target's lm_head on its last hidden states differs from its own logits by {error:.3g} in probability; allowed: "
                f"below {_HEAD_TOLERANCE}. This target changes its logits after the head in a way that TargetHead lacks: extend it."
            )


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation and inference mode for a while."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)
