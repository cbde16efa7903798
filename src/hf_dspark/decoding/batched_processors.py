"""transformers' logits processors for many distributions at once, each behind a text of its own length.

A form computes for N distributions what its processor computes for one row at one length. What may differ from call to call (lengths,
penalties, temperatures, token ids) comes in tensors, so that one graph serves every call with processors of the same kinds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers.generation import logits_process as lp

Values = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Prefixes:
    """The texts before N distributions.

    Attributes:
        ids (`torch.LongTensor` of shape `(R, W)`): of rows; what lies beyond a text is scratch.
        rows, lengths (`torch.LongTensor` of shape `(N,)`): each distribution's row of `ids`, and the tokens before it.
        each (`Sequence[tuple[int, int, int]]`): the same on the host, row, length and the row's number in the caller's batch, for
            processors that are called one by one.
    """

    ids: torch.Tensor
    rows: torch.Tensor
    lengths: torch.Tensor
    each: Sequence[tuple[int, int, int]] = ()

    @property
    def texts(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(N, W)`: the row that each distribution belongs to."""
        return self.ids[self.rows]

    def last(self, count: int) -> torch.Tensor:
        """`torch.LongTensor` of shape `(N, count)`: the last tokens of each text; any where it is shorter."""
        back = torch.arange(-count, 0, device=self.ids.device)
        return self.ids[self.rows[:, None], (self.lengths[:, None] + back).clamp(min=0)]

    def behind(self, tokens: torch.Tensor) -> Prefixes:
        """One token more behind each text, `(N,)`, which is written into `ids`."""
        self.ids.index_put_((self.rows, self.lengths), tokens)
        return replace(self, lengths=self.lengths + 1, each=[(row, length + 1, number) for row, length, number in self.each])


@dataclass(frozen=True)
class Form:
    """A processor for many distributions at once.

    Attributes:
        apply (`Callable`): scores `(N, V)`, `Prefixes` and `values` to scores `(N, V)`; leaves what it is given as it is.
        sizes (`tuple`): what decides, beside the shapes of `values`, which operations it consists of.
        values (`dict[str, torch.Tensor]`): what it reads beside scores and texts.
        of_rows (`frozenset[str]`): values that have an entry for each row of the caller's batch.
        traceable (`bool`): may be part of a graph.
    """

    apply: Callable[[torch.Tensor, Prefixes, Values], torch.Tensor]
    sizes: tuple[Hashable, ...]
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    of_rows: frozenset[str] = frozenset()
    traceable: bool = True

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """The same for forms that consist of the same operations."""
        return (*self.sizes, *((name, *value.shape[name in self.of_rows :]) for name, value in self.values.items()))


def form_of(processor: lp.LogitsProcessor, batch_size: int) -> Form | None:
    """The form of a processor; None for those that have none, subclasses among them.

    Raises:
        ValueError: for a repetition penalty that was made for a batch of another size.
    """
    kind = type(processor)
    if kind in BY_SCORES:
        return _by_scores(processor)
    make = _MAKERS.get(kind)
    return None if make is None else make(processor, batch_size)


def _known(name: str) -> tuple[type, ...]:
    return (getattr(lp, name),) if hasattr(lp, name) else ()


# Look at one distribution alone, whatever its vocabulary: also fit for a reduced draft vocabulary.
ANY_VOCABULARY: tuple[type, ...] = (
    lp.TemperatureLogitsWarper,
    lp.TopKLogitsWarper,
    lp.TopPLogitsWarper,
    *_known("TopHLogitsWarper"),
    lp.MinPLogitsWarper,
    lp.TypicalLogitsWarper,
    lp.EpsilonLogitsWarper,
    lp.EtaLogitsWarper,
    lp.LogitNormalization,
    lp.InfNanRemoveLogitsProcessor,
)
# Look at one distribution alone: transformers' own code serves any number of them.
BY_SCORES: tuple[type, ...] = (*ANY_VOCABULARY, lp.SuppressTokensLogitsProcessor)


def _by_scores(processor: lp.LogitsProcessor) -> Form:
    """Its own call, with its numbers in tensors."""
    kind: object = type(processor)
    values, sizes = {}, list[Hashable]([kind])
    for name, value in sorted(vars(processor).items()):
        if isinstance(value, torch.Tensor):
            values[name] = value
        elif isinstance(value, float) and name != "filter_value":
            values[name] = torch.tensor(value, dtype=torch.float64)
        else:
            sizes.append((name, value if isinstance(value, Hashable) else repr(value)))

    def apply(scores: torch.Tensor, prefixes: Prefixes, values: Values) -> torch.Tensor:
        twin = copy.copy(processor)
        vars(twin).update(values)
        return twin(None, scores)

    # torch's distributions check what they are given, which asks the host.
    return Form(apply, tuple(sizes), values, traceable=type(processor) not in (lp.EtaLogitsWarper, *_known("TopHLogitsWarper")))


def _ids(tokens: torch.Tensor | Sequence[int] | int) -> torch.Tensor:
    return torch.as_tensor(tokens, dtype=torch.long).reshape(-1)


def _among(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """`torch.BoolTensor` of shape `(V,)`: true at these ids."""
    return (torch.arange(scores.shape[-1], device=scores.device)[:, None] == tokens).any(-1)


# ------------------------------------------------------------------------------------------------------------------- by length


def _at_lengths(tokens: torch.Tensor | Sequence[int] | int, first: int, end: int, *, forces: bool = False) -> Form:
    """Rules these tokens out, or all others, behind texts of `first <= length < end` tokens."""

    def apply(scores: torch.Tensor, prefixes: Prefixes, values: Values) -> torch.Tensor:
        here = ((prefixes.lengths >= values["first"]) & (prefixes.lengths < values["end"]))[:, None]
        these = _among(values["tokens"], scores)
        if forces:
            return torch.where(here, torch.where(these, 0.0, float("-inf")), scores)
        return scores.masked_fill(here & these, float("-inf"))

    values = {"tokens": _ids(tokens), "first": torch.tensor(first), "end": torch.tensor(end)}
    return Form(apply, ("at lengths", forces), values)


def _decay(processor: lp.ExponentialDecayLengthPenalty, batch_size: int) -> Form:
    def apply(scores: torch.Tensor, prefixes: Prefixes, values: Values) -> torch.Tensor:
        over = (prefixes.lengths - values["start"]).clamp(min=0)
        factor = (values["factor"] ** over - 1).to(scores.dtype)[:, None]
        moved = _among(values["tokens"], scores) & torch.isfinite(scores) & (over > 0)[:, None]
        return torch.where(moved, scores + scores.abs() * factor, scores)

    start, factor = torch.tensor(processor.regulation_start), torch.tensor(processor.regulation_factor, dtype=torch.float64)
    return Form(apply, ("decay",), {"tokens": _ids(processor.eos_token_id), "start": start, "factor": factor})


# ---------------------------------------------------------------------------------------------------------------------- by text


def _repetition(processor: lp.RepetitionPenaltyLogitsProcessor, batch_size: int) -> Form:
    ignored = processor.prompt_ignore_length
    each = isinstance(ignored, torch.Tensor)
    if isinstance(ignored, torch.Tensor) and len(ignored) != batch_size:
        raise ValueError(
            f"RepetitionPenaltyLogitsProcessor has a `prompt_ignore_length` of {len(ignored)} rows, and the batch has {batch_size}. Give "
            "one a row, or an int."
        )

    def apply(scores: torch.Tensor, prefixes: Prefixes, values: Values) -> torch.Tensor:
        place, first = torch.arange(prefixes.ids.shape[1], device=scores.device), values["ignored"]
        counts = (place < prefixes.lengths[:, None]) & (place >= (first[prefixes.rows][:, None] if each else first))
        size = scores.shape[-1]
        tokens = torch.where(counts, prefixes.texts.clamp(max=size), size)  # what does not count goes to a spare column
        wide = torch.nn.functional.pad(scores, (0, 1))
        found = wide.gather(1, tokens)
        changed = torch.where(found < 0, found * values["penalty"], found / values["penalty"])
        return wide.scatter_(1, tokens, changed)[:, :size]

    values = {
        "penalty": torch.tensor(processor.penalty, dtype=torch.float64),
        "ignored": ignored.long() if isinstance(ignored, torch.Tensor) else torch.tensor(ignored or 0),
    }
    return Form(apply, ("repetition", each), values, frozenset({"ignored"} if each else ()))


def _no_repeat(processor: lp.NoRepeatNGramLogitsProcessor, batch_size: int) -> Form:
    size = processor.ngram_size

    def apply(scores: torch.Tensor, prefixes: Prefixes, values: Values) -> torch.Tensor:
        texts = torch.nn.functional.pad(prefixes.texts, (0, size - 1))
        grams = texts.unfold(1, size, 1)
        whole = torch.arange(size, prefixes.ids.shape[1] + size, device=scores.device) <= prefixes.lengths[:, None]
        again = whole & (grams[..., :-1] == prefixes.last(size - 1)[:, None]).all(-1)
        vocab = scores.shape[-1]
        banned = torch.where(again, grams[..., -1].clamp(max=vocab), vocab)
        return torch.nn.functional.pad(scores, (0, 1)).scatter_(1, banned, float("-inf"))[:, :vocab]

    return Form(apply, ("no repeat", size))


def _biased(processor: lp.SequenceBiasLogitsProcessor, batch_size: int) -> Form:
    """Sequences of one length together: those whose first tokens a text ends with get their bias at the last one."""
    by_length: dict[int, list[tuple[tuple[int, ...], float]]] = {}
    for sequence, bias in processor.sequence_bias.items():
        if sequence:  # an empty bad word bans nothing, nor do those of which end-of-text ids were all
            by_length.setdefault(len(sequence) - 1, []).append((sequence, bias))
    values, most = {}, max((token for sequence in processor.sequence_bias for token in sequence), default=-1)
    for before, group in by_length.items():
        values[f"before_{before}"] = torch.tensor([sequence[:-1] for sequence, _ in group], dtype=torch.long)
        values[f"token_{before}"] = torch.tensor([sequence[-1] for sequence, _ in group])
        values[f"bias_{before}"] = torch.tensor([bias for _, bias in group], dtype=torch.float32)

    def apply(scores: torch.Tensor, prefixes: Prefixes, values: Values) -> torch.Tensor:
        if most >= scores.shape[-1]:  # seen behind the prompt, where nothing is compiled
            raise ValueError(
                f"{type(processor).__name__} names token {most}, and the target's vocabulary has {scores.shape[-1]} tokens. Leave out "
                "sequences with ids that it has not."
            )
        biases = torch.zeros_like(scores)
        for before in by_length:
            ends = (prefixes.last(before)[:, None] == values[f"before_{before}"]).all(-1) & (prefixes.lengths >= before)[:, None]
            biases.index_add_(1, values[f"token_{before}"], torch.where(ends, values[f"bias_{before}"], 0.0).to(biases.dtype))
        return scores + biases

    return Form(apply, ("biases", *by_length), values)


_MAKERS: dict[type, Callable[..., Form]] = {
    lp.MinLengthLogitsProcessor: lambda p, _: _at_lengths(p.eos_token_id, 0, p.min_length),
    lp.MinNewTokensLengthLogitsProcessor: lambda p, _: _at_lengths(p.eos_token_id, 0, p.prompt_length_to_skip + p.min_new_tokens),
    lp.SuppressTokensAtBeginLogitsProcessor: lambda p, _: _at_lengths(p.begin_suppress_tokens, p.begin_index, p.begin_index + 1),
    lp.ForcedBOSTokenLogitsProcessor: lambda p, _: _at_lengths(p.bos_token_id, 1, 2, forces=True),
    lp.ForcedEOSTokenLogitsProcessor: lambda p, _: _at_lengths(p.eos_token_id, p.max_length - 1, p.max_length, forces=True),
    lp.ExponentialDecayLengthPenalty: _decay,
    lp.RepetitionPenaltyLogitsProcessor: _repetition,
    lp.NoRepeatNGramLogitsProcessor: _no_repeat,
    lp.SequenceBiasLogitsProcessor: _biased,
    lp.NoBadWordsLogitsProcessor: _biased,
}
