"""Measures what a round costs on this machine, and stores it between runs. Whoever wants a profile calls it; `generate` never does.

Whole rounds of the real loop are timed, over rows whose keys and values are zeros: time does not depend on what they hold.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from hf_dspark.budgets.budget import Budget, Drafts
from hf_dspark.budgets.cost_model import Costs, RowCosts, prior_costs
from hf_dspark.decoding.kept_graphs import compiled_graphs
from hf_dspark.decoding.loop import DecodingLoop, Rules
from hf_dspark.decoding.options import Options
from hf_dspark.decoding.row_processors import RowProcessors
from hf_dspark.decoding.row_stopping import RowStopping
from hf_dspark.decoding.state import State
from hf_dspark.decoding.verify import DEFAULT_VERIFICATION
from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.targets.model_inputs import input_device
from hf_dspark.targets.target import Target
from hf_dspark.utils.files import atomic_write_json, cache_dir
from hf_dspark.utils.graphs import Graphs
from hf_dspark.utils.hardware import device_name
from hf_dspark.utils.logging import warn_once
from hf_dspark.version import __version__

logger = logging.getLogger(__name__)

FORMAT = 3
CONTEXTS = (128, 512)
# Rows that are measured: powers of two; what lies between is read off the line, what lies beyond continues it.
LARGEST_ROWS = 64
# Turns that shapes are timed over, by rows: rounds of few rows are short, and their ratios decide most.
_REPEATS = {1: 15, 2: 15, 4: 9, 8: 9}
_MODES = {False: "greedy", True: "sample"}


def row_grid(rows: int) -> list[int]:
    """The numbers of rows to measure for batches of up to `rows`: 1, 2, 4 .. up to the first that is as large, at most 64."""
    grid = [1]
    while grid[-1] < min(rows, LARGEST_ROWS):
        grid.append(2 * grid[-1])
    return grid


@dataclass
class CostProfile:
    """Times of rounds of one target with one drafter on one machine.

    Args:
        key (`dict`): what the times hold for: models, dtype, device, threads, attention, versions.
        block_size (`int`): gamma.
        tables (`dict[str, dict[int, RowCosts]]`): by mode, `greedy` or `sample`, then by rows.
    """

    key: dict[str, Any]
    block_size: int
    tables: dict[str, dict[int, RowCosts]] = field(default_factory=dict)

    @classmethod
    def measure(
        cls,
        target: PreTrainedModel,
        drafter: DSparkDrafter,
        *,
        rows: int = 32,
        sample: bool = False,
        compiled: bool = False,
        contexts: Sequence[int] = CONTEXTS,
        on_rows: Callable[[int], None] | None = None,
    ) -> CostProfile:
        """Measure rounds with 1, 2, 4 .. `rows` rows; takes the longer the more rows.

        Args:
            target (`PreTrainedModel`): the causal LM.
            drafter (`DSparkDrafter`): bound here if it is not yet.
            rows (`int`): largest batch of interest.
            sample (`bool`): rounds that draw tokens; greedy ones otherwise.
            compiled (`bool`): rounds as compiled graphs, which are made first.
            contexts (`Sequence[int]`): tokens that rows hold.
            on_rows (`Callable`, *optional*): called with each number of rows as it is measured.
        Returns:
            `CostProfile`.
        """
        profile = cls(profile_key(target, drafter, compiled=compiled), drafter.config.block_size)
        profile.add(target, drafter, row_grid(rows), sample=sample, contexts=contexts, on_rows=on_rows)
        return profile

    @classmethod
    def stored(
        cls, target: PreTrainedModel, drafter: DSparkDrafter, folder: Path | None = None, *, compiled: bool = False
    ) -> CostProfile | None:
        """The profile that was stored for these models on this machine; None where there is none. Measures nothing.

        Args:
            target, drafter: as in `measure`.
            folder (`Path`, *optional*): where profiles are stored; `profiles` in the user's cache by default.
            compiled (`bool`): as in `measure`.
        """
        key = profile_key(target, drafter, compiled=compiled)
        try:
            path = profile_path(key, folder)
        except RuntimeError:  # no home directory
            return None
        if path not in _LOADED and (found := cls._read(path, key)) is not None:
            _LOADED[path] = found
        return _LOADED.get(path)

    @classmethod
    def cached(
        cls,
        target: PreTrainedModel,
        drafter: DSparkDrafter,
        *,
        rows: int = 32,
        sample: bool = False,
        compiled: bool = False,
        folder: Path | None = None,
        refresh: bool = False,
    ) -> CostProfile:
        """The stored profile, with what is missing in it measured now and stored too. Takes up to a minute.

        Args:
            target, drafter, rows, sample, compiled: as in `measure`.
            folder (`Path`, *optional*): where profiles are stored; `profiles` in the user's cache by default.
            refresh (`bool`): measure everything again.
        Returns:
            `CostProfile`: with times for every number of rows up to `rows`.
        """
        key = profile_key(target, drafter, compiled=compiled)
        path = profile_path(key, folder)
        profile = (None if refresh else cls.stored(target, drafter, folder, compiled=compiled)) or cls(key, drafter.config.block_size)
        missing = [r for r in row_grid(rows) if r not in profile.tables.get(_MODES[sample], {})]
        if missing:
            logger.info("Measuring the cost of rounds with %s rows (%s); stored in %s.", missing, _MODES[sample], path)
            profile.add(target, drafter, missing, sample=sample)
            try:
                atomic_write_json(path, profile.to_json(), indent=1)
            except OSError as error:
                logger.warning("The profile cannot be stored in %s (%s); it will be measured again next time.", path, error)
        _LOADED[path] = profile
        return profile

    def costs(self, sample: bool = False) -> Costs:
        """The lookup for greedy or sampled rounds.

        Raises:
            ValueError: if that mode has not been measured.
        """
        table = self.tables.get(_MODES[sample])
        if not table:
            raise ValueError(f"This profile holds {sorted(self.tables)} rounds; got a question about {_MODES[sample]!r}. Measure them too.")
        return Costs(table, self.block_size)

    def add(
        self,
        target: PreTrainedModel,
        drafter: DSparkDrafter,
        rows: Sequence[int],
        *,
        sample: bool,
        contexts: Sequence[int] = CONTEXTS,
        on_rows: Callable[[int], None] | None = None,
    ) -> None:
        """Measure these numbers of rows and add them."""
        drafter.bind(target)
        seen = Target(target, drafter.config.target_layer_ids)
        longest = getattr(target.config.get_text_config(decoder=True), "max_position_embeddings", None) or max(contexts) + 64
        contexts = sorted({max(min(c, longest - 64), 1) for c in contexts})
        table = self.tables.setdefault(_MODES[sample], {})
        graphs = compiled_graphs(target, drafter, bool(self.key.get("compiled")), seen.device, max(contexts) + 64)
        with torch.inference_mode(), nullcontext() if graphs is None else graphs.use() as graphs, seen.open():
            _Rounds(seen, drafter, 1, contexts[0], sample, graphs).time([(self.block_size,)], 3)  # first-use costs stay out of the figures
            for count in rows:
                table[count] = _measure_rows(seen, drafter, count, contexts, sample, graphs)
                if on_rows is not None:
                    on_rows(count)

    def to_json(self) -> dict[str, Any]:
        """Returns everything, ready for JSON."""
        tables = {mode: {str(r): costs.to_json() for r, costs in sorted(table.items())} for mode, table in sorted(self.tables.items())}
        return {"format": FORMAT, "key": self.key, "block_size": self.block_size, "tables": tables}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> CostProfile:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: if it is something else.
        """
        try:
            if record["format"] != FORMAT:
                raise ValueError(f"profile format {record['format']}, expected {FORMAT}")
            tables = {mode: {int(r): RowCosts.from_json(c) for r, c in table.items()} for mode, table in record["tables"].items()}
            return cls(dict(record["key"]), int(record["block_size"]), tables)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a profile ({type(error).__name__}: {error})") from None

    @classmethod
    def _read(cls, path: Path, key: dict[str, Any]) -> CostProfile | None:
        """A stored profile; None, with a line in the log, where the file is of no use."""
        try:
            profile = cls.from_json(json.loads(path.read_text(encoding="utf-8")))
            if profile.key != key:
                raise ValueError("it was measured for something else")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            warn_once(logger, f"The profile {path} cannot be used ({error}); run hf-dspark profile again.")
            return None
        return profile


_LOADED: dict[Path, CostProfile] = {}


def started(budget: Budget, target: PreTrainedModel, drafter: DSparkDrafter, sample: bool, *, compiled: bool = False) -> Budget:
    """The budget of one call. Costs come from the stored profile, else from the models' sizes: nothing is measured.

    In calls that draw tokens costs are not learned, for what is verified would depend on the clock, and draws not repeat by their seed.

    Args:
        budget (`Budget`): of the user.
        target (`PreTrainedModel`), drafter (`DSparkDrafter`): as in `CostProfile.measure`.
        sample (`bool`): whether rounds draw tokens.
        compiled (`bool`): whether they run as compiled graphs.
    """
    costs = costs_at_hand(target, drafter, sample, compiled=compiled) if budget.reads_costs else None
    return budget.start(costs, learn_costs=not sample)


def costs_at_hand(target: PreTrainedModel, drafter: DSparkDrafter, sample: bool, *, compiled: bool = False) -> Costs:
    """What rounds cost, by the stored profile, else guessed from the models' sizes; arguments as in `started`."""
    profile = CostProfile.stored(target, drafter, compiled=compiled)
    if profile is not None and profile.tables.get(_MODES[sample]):
        return profile.costs(sample)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (drafter, target)]
    return prior_costs(drafter.config.block_size, sizes[0] / max(sizes[1], 1), input_device(target).type)


def profile_key(target: PreTrainedModel, drafter: DSparkDrafter, *, compiled: bool = False) -> dict[str, Any]:
    """All that the times depend on, ready for JSON."""
    config = target.config.get_text_config(decoder=True)
    own = drafter.config
    device = target.get_input_embeddings().weight.device
    return {
        "target": getattr(target.config, "_name_or_path", None),
        "revision": getattr(target.config, "_commit_hash", None),
        "architecture": type(target).__name__,
        "shape": [config.num_hidden_layers, config.hidden_size, config.vocab_size],
        "dtype": str(target.dtype).removeprefix("torch."),
        "quantized": bool(getattr(target, "is_quantized", False)),
        "attention": (getattr(config, "_attn_implementation", None) or "").removeprefix("dspark_ragged_"),
        "drafter": {
            name: getattr(own, name)
            for name in (
                "num_hidden_layers", "hidden_size", "intermediate_size", "block_size", "target_layer_ids", "markov_rank",
                "markov_head_type", "enable_confidence_head", "draft_vocab_size",
            )
        }
        | {"dtype": str(drafter.dtype).removeprefix("torch."), "copying": len(own.copy_weights or ())},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "verification": DEFAULT_VERIFICATION,  # of sampled rounds
        **({"compiled": True} if compiled else {}),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "hf_dspark": __version__},
    }  # fmt: skip


def profile_path(key: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Where the profile of a key is stored."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return (folder or cache_dir() / "profiles") / f"{digest}.json"


# --------------------------------------------------------------------------------------------------------------- one measurement


class _Shape(Budget):
    """Drafts for all rows, and verifies so many tokens of each."""

    def __init__(self, lengths: Sequence[int], needs_confidence: bool) -> None:
        self.lengths = lengths
        self.longest = max(lengths)
        self.needs_confidence = needs_confidence

    def plan(self, drafts: Drafts) -> list[int]:
        return list(map(min, self.lengths, drafts.limits))


class _Rounds:
    """The real loop over rows that hold `context` tokens of nothing; one loop for each shape of a round."""

    def __init__(self, target: Target, drafter: DSparkDrafter, rows: int, context: int, sample: bool, graphs: Graphs | None) -> None:
        self.target, self.drafter, self.sample, self.graphs = target, drafter, sample, graphs
        # A round commits at most a block and a token more: its rows begin behind so many, which the drafter then has to read.
        length = context + drafter.config.block_size + 2
        random = torch.Generator().manual_seed(rows)
        texts = torch.randint(target.vocab_size, (rows, length), generator=random).to(target.device)
        self.state = State(target.device, limit=length + drafter.config.block_size + 2)
        self.state.add_rows(range(rows), list(texts))
        self.anchors, self.lengths = texts[:, -1], list(self.state.lengths)
        self.loops: dict[tuple[int, ...], DecodingLoop] = {}
        self.pending: dict[tuple[int, ...], list[torch.Tensor]] = {}  # hidden states that a shape's last round has committed

    def time(self, shapes: Sequence[tuple[int, ...]], repeats: int) -> list[tuple[float, float]]:
        """Seconds of rounds that verify so many drafted tokens of each row: without their draft, and of their draft.

        Shapes take turns, so that a moment in which the machine is slow is not taken for the price of one of them; the first turn warms up.
        Of each the lower quartile counts: what else runs on the machine only adds time.
        """
        times: list[list[tuple[float, float]]] = [[] for _ in shapes]
        for turn in range(repeats + 1):
            for shape, seconds in zip(shapes, times, strict=True):
                once = self._round(shape)
                if turn:
                    seconds.append(once)
        return [tuple(sorted(column)[len(column) // 4] for column in zip(*seconds, strict=True)) for seconds in times]

    def _round(self, shape: tuple[int, ...]) -> tuple[float, float]:
        loop = self.loops.get(shape)
        if loop is None:
            loop = self.loops[shape] = self._loop(shape)
        state = self.state
        state.anchors, state.lengths = self.anchors, list(self.lengths)
        state.clear_pending()
        for place, states in enumerate(self.pending.get(shape, [])):
            state.add_pending(place, states)
        before = loop.watch.read().get("draft", 0.0)
        begin = time.perf_counter()
        loop.round()
        self.pending[shape] = [torch.cat(pieces) for pieces in state.pending if pieces]
        draft = loop.watch.read().get("draft", 0.0) - before
        return time.perf_counter() - begin - draft, draft

    def _loop(self, shape: Sequence[int]) -> DecodingLoop:
        budget = _Shape(shape, self.drafter.confidence_head is not None)
        options = Options(
            block_size=self.drafter.config.block_size,
            sample=self.sample,
            generator=torch.Generator(device=self.target.device).manual_seed(0),
        )
        rows = self.state.num_rows
        rules = Rules(RowProcessors([], rows), RowStopping([], rows))
        return DecodingLoop(self.target, self.drafter, budget, options, rules, self.state, self.graphs, single_row=rows == 1)


def _measure_rows(
    target: Target, drafter: DSparkDrafter, rows: int, contexts: Sequence[int], sample: bool, graphs: Graphs | None
) -> RowCosts:
    gamma = drafter.config.block_size
    verify: dict[int, dict[int, float]] = {}
    draft: dict[int, float] = {}
    long_s: dict[int, dict[int, float]] = {}
    few: dict[int, float] = {}
    for context in contexts:
        first = context == contexts[0]
        # The shape of the curve is taken at the first context; what tokens cost does not depend on it, what width costs does. Half a block
        # with its anchor is a power of two where the whole is one: matrix products of 16 tokens may cost less than of 13.
        lengths = sorted({1, min(2, gamma), max(gamma // 2, 1), gamma}) if first else []
        some = sorted({rows // 4, rows // 2, rows * 3 // 4} - {0, 1, rows}) if first else []
        even = [(n,) * rows for n in (0, *lengths)]
        widths = sorted({(gamma + 1) // 2, gamma} if first else {gamma}) if rows > 1 else []
        long = [(n, *(0,) * (rows - 1)) for n in widths]
        uneven = [(1,) * n + (0,) * (rows - n) for n in some]
        found = _Rounds(target, drafter, rows, context, sample, graphs).time([*even, *long, *uneven], _REPEATS.get(rows, 5))
        times = iter(found)
        verify[context] = {1 + n: rest for n, (rest, _) in zip((0, *lengths), times, strict=False)}
        if long:
            long_s[context] = {n: rest for n, (rest, _) in zip(widths, times, strict=False)}
        if first:
            few = {n: rest for n, (rest, _) in zip(some, times, strict=False)}
            draft = {n: max(seconds, 1e-9) for n, (_, seconds) in zip(lengths, found[1:], strict=False)}
    return RowCosts(verify, draft, long_s, few)
