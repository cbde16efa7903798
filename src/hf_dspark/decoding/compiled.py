"""A round's three steps as compiled graphs: draft, verify, conclude. Where a step needs Python between its tensors (processors of the
user's own, kept scores) it gives None, and the loop runs it eagerly.

All that differs from round to round comes in tensors: where tokens go, how far rows reach, random numbers, temperatures. Batches of more
than one row are padded with rows that nobody has, passes with tokens behind a row's end: both write where nothing is committed.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from hf_dspark.budgets.budget import Proposal
from hf_dspark.cache.kv_cache import BufferCache, RowCache
from hf_dspark.cache.layout import DeviceLayout, RowLayout, TensorLayout
from hf_dspark.decoding.batched_processors import Prefixes
from hf_dspark.decoding.draft import default_temperatures, draft_from
from hf_dspark.decoding.ngram_copy import Copied, Copies
from hf_dspark.decoding.options import Options
from hf_dspark.decoding.plan import Plan
from hf_dspark.decoding.row_processors import DraftProcessors, RowProcessors
from hf_dspark.decoding.row_stopping import RowStopping
from hf_dspark.decoding.sampling import uniform
from hf_dspark.decoding.state import State
from hf_dspark.decoding.verify import Conclusion, DraftBlock, accept_greedy, accept_sampled, conclude
from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.targets.target import Target
from hf_dspark.utils.graphs import Argument, Graphs, Tensors


class CompiledRounds:
    """The compiled steps of one call.

    Args:
        graphs (`Graphs`): of this target and drafter.
        target (`Target`), drafter (`DSparkDrafter`, *optional*): as in the loop.
        options (`Options`): of the call; `block_size` set.
        processors (`RowProcessors`), stopping (`RowStopping`): the user's.
        copy_weights (`list[float]`, *optional*): of n-gram copies, where they are drafted.
        records (`bool`): somebody keeps scores or logits, so verdicts run eagerly.
        single (`bool`): there is never more than one row.
    """

    def __init__(
        self,
        graphs: Graphs,
        target: Target,
        drafter: DSparkDrafter | None,
        options: Options,
        processors: RowProcessors,
        stopping: RowStopping,
        copy_weights: Sequence[float] | None,
        *,
        records: bool,
        single: bool,
    ) -> None:
        self.graphs, self.target, self.drafter, self.options, self.stopping = graphs, target, drafter, options, stopping
        self.processors, self.copy_weights, self.single = processors, copy_weights, single
        self.block_size = options.block_size or 1
        self._sizes = processors.sizes
        self._drafts = self._sizes is not None
        self._concludes = self._sizes is not None and not records
        self._drafted: dict[str, torch.Tensor] = {}
        self._range = torch.arange(1, device=graphs.device)
        if drafter is not None:
            drafter.sync_target_rows()

    # ------------------------------------------------------------------------------------------------------------------ steps

    def draft(self, proposal: Proposal, state: State) -> DraftBlock | None:
        """`DecodingLoop.draft` with the hidden states that the drafter has not read yet; None where that runs eagerly.

        It drafts for all rows, and as many tokens as one of few graphs does: more kinds of rounds would each have to be compiled.
        """
        drafter, options, device = self.drafter, self.options, self.graphs.device
        if not self._drafts or drafter is None or not state.drafter_cache.keys:  # without a prompt nobody knows what buffers look like
            return None
        sample, weights, callback = options.sample, self.copy_weights, options.round_callback
        length = min(next(n for n in (2, 4, 8, 16, self.block_size) if n >= proposal.length), self.block_size)
        rows = self._rows(state.num_rows)
        layout = drafter.block_layout([*state.context_lengths, *[0] * (rows - state.num_rows)], length)
        self._prepare(state, state.drafter_cache, rows, layout.max_end)
        temperatures = None if callback is None else callback.temperatures
        temperatures = temperatures or default_temperatures(drafter.config, copying=weights is not None)
        arguments = {
            **self._buffers(state.drafter_cache),
            **self._pending(state, drafter.fc.in_features),
            "anchors": Argument(torch.nn.functional.pad(state.anchors, (0, rows - state.num_rows)), self._r),
            "rows": Argument(layout.rows.view(rows, -1), self._r),
            "positions": Argument(layout.positions.view(rows, -1), self._r),
            "ends": Argument(layout.ends, self._r),
            "longest": self._longest(layout.max_end),
        }
        if drafter.confidence_head is not None and temperatures is not None:  # for every budget, so that one graph serves all
            arguments["temperatures"] = Argument(torch.tensor(list(temperatures[:length]), dtype=torch.float32).to(device))
        if sample:
            arguments["u"] = Argument(uniform((rows, 2, length), device, options.generator), self._r)
        if self.processors:
            arguments |= self._values(state, rows)
        if weights is not None or self.processors.needs_ids:
            arguments |= self._texts(state, rows, length)
        key = ("The draft", length, sample, self.single, None if weights is None else tuple(weights), self._sizes, *arguments)
        outputs = self.graphs.run(key, _Draft(self, key, length), arguments)
        state.clear_pending()
        self._drafted = dict(zip(self.graphs.notes[key], outputs, strict=True))
        own = {name: tensor[: state.num_rows] for name, tensor in self._drafted.items()}
        copied = Copied(**of_copies) if (of_copies := _named("copied_", own)) else None
        return DraftBlock(draft_ids=drafter.draft_token_ids, copied=copied, **_named("block_", own)).truncate(proposal.length)

    def verify(self, block: DraftBlock, layout: RowLayout, state: State) -> tuple[torch.Tensor, torch.Tensor, RowLayout] | None:
        """`DecodingLoop.verify`; None where that runs eagerly."""
        if not state.target_cache.keys:
            return None
        padded = self._padded_layout(layout)
        self._prepare(state, state.target_cache, padded.num_rows, padded.max_end)
        tokens = torch.cat([state.anchors[:, None], block.tokens], dim=1) if block.block_size else state.anchors[:, None]
        arguments = {
            **self._buffers(state.target_cache),
            "ids": Argument(tokens.flatten()[self._grid(padded, *tokens.shape)], "T"),
            "rows": Argument(padded.rows, "T"),
            "positions": Argument(padded.positions, "T"),
            "flat_index": Argument(padded.flat_index, "T"),
            "padded_index": Argument(padded.padded_index, ".T" if self.single else "RL"),
            "added": Argument(padded.added, self._r),
            "longest": self._longest(padded.max_end),
        }
        outputs = self.graphs.run(
            ("The verification pass", self.single, *self.target.taps.layer_ids), partial(_verify, self.target), arguments
        )
        # Hidden states are kept beyond the next pass, which may write its own there.
        logits, hidden = outputs[0], outputs[1] if self.graphs.symbolic else outputs[1].clone()
        concludes = self._concludes and (not block.block_size or bool(self._drafted))
        if concludes or padded is layout:
            return logits, hidden, padded
        if isinstance(layout, DeviceLayout):
            index = padded.first[layout.rows] + layout.within
            return logits[index], hidden[index], layout
        kept = np.concatenate([first + np.arange(n) for first, n in zip(padded.firsts, layout.counts, strict=False)])
        index = torch.from_numpy(kept).to(logits.device, non_blocking=True)
        return logits[index], hidden[index], layout

    def conclude(self, logits: torch.Tensor, block: DraftBlock, layout: RowLayout, plan: Plan, state: State) -> Conclusion | None:
        """`DecodingLoop.conclude`; None where that runs eagerly."""
        options, stopping, device = self.options, self.stopping, self.graphs.device
        sample = options.sample
        drafted, self._drafted = self._drafted, {}
        if not self._concludes or (block.block_size and not drafted):
            return None
        length = drafted["block_tokens"].shape[1] if drafted else 0
        rows = self._rows(state.num_rows)
        spare = [0] * (rows - state.num_rows)
        numbers = [[*stopping.room(state, 0, length + 2), *(length + 2 for _ in spare)]]
        if plan.verified is not None:
            numbers += [[*layout.firsts, *spare][:rows], [1 + n for n in [*plan.verified, *spare]]]
        of_rows = dict(zip(("room", "first", "added"), torch.from_numpy(np.array(numbers)).to(device, non_blocking=True), strict=False))
        if isinstance(layout, DeviceLayout):
            of_rows |= {"first": layout.first, "added": 1 + layout.verified}
        eos = stopping.eos_on(device)
        arguments = {
            "logits": Argument(logits, "T"),
            "eos": Argument(eos),
            **{name: Argument(of_rows[name], self._r) for name in ("first", "added", "room")},
            **{name: Argument(tensor, self._r) for name, tensor in drafted.items() if name not in _NOT_JUDGED},
        }
        if sample:
            arguments["u"] = Argument(uniform((rows, length + 1), device, options.generator), self._r)
        if self.processors:
            arguments |= self._values(state, rows)
        if self.processors.needs_ids:
            arguments |= {**self._texts(state, rows, length), "rows": Argument(layout.rows, "T")}
        key = ("The verdict", length, sample, options.verification, self.single, self._sizes, len(eos), *arguments)
        outputs = self.graphs.run(key, _Conclude(self, length), arguments)
        return Conclusion(*(tensor[: state.num_rows] for tensor in outputs))

    def give_up_buffers(self, state: State) -> None:
        """Leave the first row's keys and values in buffers that no later call writes to."""
        if not self.graphs.symbolic:
            for cache in (state.target_cache, state.drafter_cache):
                for store in (cache.keys, cache.values):
                    store.update({layer: buffer[:1].clone() for layer, buffer in store.items()})

    # ---------------------------------------------------------------------------------------------------------------- arguments

    @property
    def _r(self) -> str:
        return "" if self.single else "R"

    def _rows(self, rows: int) -> int:
        return 1 if self.single else self.graphs.size(rows)

    def _longest(self, length: int) -> Argument:
        return Argument(self._counted(length if self.graphs.symbolic else self.graphs.size(length)), "S")

    def _counted(self, length: int) -> torch.Tensor:
        """A tensor of this length."""
        if len(self._range) < length:
            self._range = torch.arange(2 * length, device=self.graphs.device)
        return self._range[:length]

    def _prepare(self, state: State, cache: RowCache, rows: int, length: int) -> None:
        # All of it at once, as a static cache is: captured graphs keep where it lies, and read up to their bucket's end.
        length = max(length, cache.limit or 0)
        cache.grow(rows if self.single else max(rows, 2), length if self.graphs.symbolic else self.graphs.size(length))
        if not self.graphs.symbolic:
            for kind, store in (("keys", cache.keys), ("values", cache.values)):
                for layer, buffer in store.items():
                    store[layer] = self.graphs.keep((kind, cache is state.target_cache, layer), buffer)

    def _buffers(self, cache: RowCache) -> dict[str, Argument]:
        dims = "..Z" if self.single else "Y.Z"
        stores = (("keys", cache.keys), ("values", cache.values))
        return {f"{name}_{layer}": Argument(store[layer], dims, buffer=True) for name, store in stores for layer in sorted(store)}

    def _padded_layout(self, layout: RowLayout) -> RowLayout:
        """The pass with as many rows and tokens as a graph takes: one row as long as its bucket, then short ones as tokens are missing;
        the first short ones where the device alone knows lengths.
        """
        size, rows = self.graphs.size, self._rows(layout.num_rows)
        if isinstance(layout, DeviceLayout):
            widest = max(layout.max_count, min(size(layout.max_count), self.block_size + 1))
            total = min(size(layout.total + rows - layout.num_rows), rows * widest)
            if (rows, widest, total) == (layout.num_rows, layout.max_count, layout.total):
                return layout
            return layout.padded(rows, total, widest, layout.latest + widest)
        starts = layout.starts + [0] * (rows - layout.num_rows)
        counts = layout.counts + [1] * (rows - layout.num_rows)
        longest = max(range(rows), key=counts.__getitem__)
        counts[longest] = widest = max(counts[longest], min(size(counts[longest]), max(self.block_size + 1, 2)))
        missing = min(size(sum(counts)), rows * widest) - sum(counts)
        for row in range(rows):
            more = min(widest - counts[row], missing)
            counts[row], missing = counts[row] + more, missing - more
        return layout if counts == layout.counts else RowLayout(starts, counts, self.graphs.device)

    def _grid(self, padded: RowLayout, rows: int, width: int) -> torch.Tensor:
        """Where each token of the padded pass lies in `(rows, width)`; any place for those that are padding."""
        if isinstance(padded, DeviceLayout):
            return torch.where(padded.rows < rows, padded.rows * width + padded.within.clamp(max=width - 1), 0)
        row = np.repeat(np.arange(padded.num_rows), padded.counts)
        within = np.arange(padded.total) - np.repeat(padded.firsts, padded.counts)
        index = np.where(row < rows, row * width + np.minimum(within, width - 1), 0)
        return torch.from_numpy(index).to(self.graphs.device, non_blocking=True)

    def _pending(self, state: State, width: int) -> dict[str, Argument]:
        """Hidden states `(P, width)` that the drafter reads first; padding lies where the first block is written after them."""
        counts, context = np.array(state.pending_counts), np.array(state.context_lengths)
        rows, total = np.repeat(np.arange(len(counts)), counts), self.graphs.size(int(counts.sum()))
        places = np.full((2, total), [[0], [context[0]]])
        places[0, : len(rows)] = rows
        places[1, : len(rows)] = np.arange(len(rows)) - (counts.cumsum() - counts)[rows] + (context - counts)[rows]
        pieces = [piece for row in state.pending for piece in row]
        if missing := total - len(rows):
            pieces.append(
                torch.zeros(missing, width, dtype=pieces[0].dtype if pieces else self.target.model.dtype, device=self.graphs.device)
            )
        index = torch.from_numpy(places).to(self.graphs.device, non_blocking=True)
        states = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return {"pending": Argument(states, "P"), "pending_rows": Argument(index[0], "P"), "pending_positions": Argument(index[1], "P")}

    def _values(self, state: State, rows: int) -> dict[str, Argument]:
        """What processors read beside scores and texts."""
        requests = [*state.requests, *[0] * (rows - state.num_rows)]
        of_each = zip(self.processors.values(requests, self.graphs.device), self.processors.of_rows, strict=True)
        return {
            f"value_{place}_{name}": Argument(value, self._r if name in of_rows else "")
            for place, (values, of_rows) in enumerate(of_each)
            for name, value in values.items()
        }

    def _texts(self, state: State, rows: int, ahead: int) -> dict[str, Argument]:
        """What n-gram copies and processors read: the ids of the rows with room for `ahead` more, and where their answers begin."""
        spare = [1] * (rows - state.num_rows)
        index = torch.from_numpy(np.array([[*state.lengths, *spare], [*state.prompt_ends, *spare]])).to(
            self.graphs.device, non_blocking=True
        )
        width = max(state.lengths) + ahead
        state.reserve(rows, max(width, state.limit or 0))
        if not self.graphs.symbolic:
            state.ids = self.graphs.keep(("ids",), state.ids)
            state.masked_at = None if state.masked_at is None else self.graphs.keep(("masked_at",), state.masked_at)
        text = self._counted(width if self.graphs.symbolic else min(self.graphs.size(width), state.ids.shape[1]))
        dims = ".W" if self.single else "XW"
        texts = {"text": Argument(text, "V"), "ids": Argument(state.ids, dims, buffer=True)}
        if state.masked_at is not None:
            texts["masked_at"] = Argument(state.masked_at, dims, buffer=True)
        return {"lengths": Argument(index[0], self._r), "prompt_ends": Argument(index[1], self._r), **texts}


# Outputs of a draft that no verdict reads.
_NOT_JUDGED = ("block_confidence", "block_confidence_logits")


def _named(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _cache(given: Mapping[str, torch.Tensor]) -> BufferCache:
    return BufferCache(*({int(layer): tensor for layer, tensor in _named(prefix, given).items()} for prefix in ("keys_", "values_")))


def _values(given: Mapping[str, torch.Tensor], processors: RowProcessors) -> list[dict[str, torch.Tensor]]:
    return [_named(f"value_{place}_", given) for place in range(len(processors.of_rows))]


def _prefixes(given: Mapping[str, torch.Tensor], rows: int, drafted: torch.Tensor | None = None) -> Prefixes:
    """The texts before each row's anchor has been answered, or before each token of the pass, over ids that may be written to."""
    none = given["text"][:0] if "text" in given else next(iter(given.values()))
    if "lengths" not in given:
        return Prefixes(none, none, none)  # which nobody reads
    lengths, ids = given["lengths"], given["ids"][:rows, : given["text"].shape[0]].clone()
    if drafted is None:
        return Prefixes(ids, torch.arange(rows, device=ids.device), lengths)
    ids.scatter_(1, lengths[:, None] + torch.arange(drafted.shape[1], device=ids.device), drafted)
    within = torch.arange(given["rows"].shape[0], device=ids.device) - given["first"][given["rows"]]
    # Padding of the pass has no text, and stays where there is one.
    return Prefixes(ids, given["rows"], lengths[given["rows"]] + within.clamp(max=drafted.shape[1]))


class _Draft:
    """The drafter's part of a round: the context that it has not read, backbone, sequential head with copies, confidences."""

    def __init__(self, rounds: CompiledRounds, key: Hashable, length: int) -> None:
        self.drafter: Any = rounds.drafter
        self.length, self.weights = length, rounds.copy_weights
        self.exact, self.notes, self.key = rounds.graphs.symbolic, rounds.graphs.notes, key
        self.processors, self.vocab_size = rounds.processors, rounds.target.vocab_size

    def __call__(self, **given: torch.Tensor) -> Tensors:
        cache, longest = _cache(given), given["longest"]
        context = TensorLayout({"rows": given["pending_rows"], "positions": given["pending_positions"]}, longest)
        self.drafter.extend_context(given["pending"], context, cache)
        rows = given["ends"].shape[0]
        index = {"ends": given["ends"], **{name: given[name].flatten() for name in ("rows", "positions")}}
        layout = TensorLayout(index, longest, exact=self.exact)
        layout.max_count = given["positions"].shape[1]
        copies = processors = None
        if self.processors:
            prefixes, values = _prefixes(given, rows), _values(given, self.processors)
            processors = DraftProcessors(self.processors, prefixes, values, self.drafter, self.vocab_size)
        if self.weights is not None:
            width = given["text"].shape[0]
            ids = given["ids"][:rows, :width]
            if "masked_at" in given:
                ids = ids.masked_fill(given["masked_at"][:rows, :width], -1)
            copies = Copies(ids, given["lengths"][:, None], given["prompt_ends"], self.weights, self.length)
        temperatures, confident = given.get("temperatures"), self.drafter.confidence_head is not None
        block = draft_from(self.drafter, given["anchors"], layout, cache, given.get("u"), processors, confident, temperatures, copies)
        found = {f"block_{n}": getattr(block, n) for n in ("tokens", "confidence", "confidence_logits", "probs", "mass", "drawn")}
        if block.copied is not None:
            found |= {f"copied_{name}": tensor for name, tensor in vars(block.copied).items()}
        outputs = {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}
        self.notes[self.key] = list(outputs)
        return tuple(outputs.values())


def _verify(target: Target, /, **given: torch.Tensor) -> Tensors:
    """The target's pass over flattened rows."""
    logits, hidden = target.forward(given["ids"], TensorLayout(given, given["longest"]), _cache(given))
    return logits.contiguous(), hidden.contiguous()


class _Conclude:
    """Which tokens stand, and where rows end."""

    def __init__(self, rounds: CompiledRounds, length: int) -> None:
        self.length, self.sample, self.blockwise = length, rounds.options.sample, rounds.options.verification == "block"
        self.processors = rounds.processors
        self.draft_ids = None if rounds.drafter is None else rounds.drafter.draft_token_ids

    def __call__(self, **given: torch.Tensor) -> Tensors:
        scores, first = given["logits"], given["first"]
        padded = first[:, None] + torch.minimum(torch.arange(self.length + 1, device=first.device), given["added"][:, None] - 1)
        layout = TensorLayout({"added": given["added"], "padded_index": padded}, first)
        drafted = _named("block_", given)
        copied = Copied(**of_copies) if (of_copies := _named("copied_", given)) else None
        tokens = drafted.pop("tokens", first.new_empty(first.shape[0], 0))
        block = DraftBlock(tokens, draft_ids=self.draft_ids, copied=copied, **drafted)
        if self.processors:
            scores = self.processors(scores.float(), _prefixes(given, first.shape[0], tokens), _values(given, self.processors))
        if self.sample:
            scores = scores.float()
            verdict = accept_sampled(scores.softmax(-1), block, layout, given["u"], blockwise=self.blockwise)
        else:
            verdict = accept_greedy(scores.argmax(-1), block, layout)
        concluded = conclude(block.tokens, verdict, scores.amax(-1) if self.sample else None, given["room"], given["eos"])
        return concluded.tokens, concluded.next_token, concluded.host
