"""Fits a drafter's confidence temperatures on decoded prompts and judges them on others. Knows serving and the fit; knows no command.

Everything is decoded with the full budget and recorded before calibration, so a calibration in force does no harm to the next one.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from hf_dspark.adapters.files import fingerprint
from hf_dspark.budgets.budget import FinishedRound, FullBudget
from hf_dspark.calibration.copy_fit import fit_copy_confidence
from hf_dspark.calibration.records import for_sglang
from hf_dspark.calibration.temperature_scaling import (
    BINS,
    FEWEST_ROUNDS,
    FORMAT,
    PositionQuality,
    Rounds,
    fit_temperatures,
    quality,
    reliability,
)
from hf_dspark.configuration_dspark import LONGEST_COPY
from hf_dspark.decoding.ngram_copy import adjusted
from hf_dspark.decoding.verify import DEFAULT_VERIFICATION
from hf_dspark.errors import DataError
from hf_dspark.evaluation.copy_observations import fit_copying
from hf_dspark.evaluation.metrics import machine_record
from hf_dspark.evaluation.serving import serve

logger = logging.getLogger(__name__)

# Prompts that weights of copies are fitted on: far more positions than the few numbers need.
_COPY_PROMPTS = 128


class RoundRecorder:
    """A listener that keeps every round's confidence logits and fate, by request; and what lies beside them where copies are drafted."""

    temperatures: None = None
    wants_copies = True

    def __init__(self) -> None:
        self._requests: list[int] = []
        self._judged: list[int] = []
        self._accepted: list[int] = []
        self._logits: list[np.ndarray] = []
        self._features: list[np.ndarray] = []

    def learn(self, finished: FinishedRound) -> None:
        if finished.confidence_logits is None:
            return
        kept = [r for r, judged in enumerate(finished.judged) if judged]
        if finished.copied is not None:
            self._features.append(finished.copied.features().float().numpy()[kept])
        self._logits.append(finished.confidence_logits.float().numpy()[kept])
        self._requests += [finished.requests[r] for r in kept]
        self._judged += [finished.judged[r] for r in kept]
        self._accepted += [finished.accepted[r] for r in kept]

    def rounds(self) -> Recorded:
        """All rounds, and the request of each."""
        if not self._judged:
            raise DataError("nothing was drafted: every answer ended with its first token; give more prompts, or more --max-new-tokens")
        features = np.concatenate(self._features).astype(np.float64) if self._features else None
        # The confidence head's own logits, whatever table is in force.
        logits = np.concatenate(self._logits).astype(np.float64) if features is None else features[..., 2]
        return Recorded(Rounds(logits, np.array(self._judged), np.array(self._accepted)), np.array(self._requests), features)


@dataclass(frozen=True)
class Recorded:
    """Rounds of decoding.

    Attributes:
        rounds (`Rounds`): N of them.
        requests (`numpy.ndarray` of shape `(N,)`): whose each was.
        features (`numpy.ndarray` of shape `(N, gamma, 9)`, *optional*): of `Copied.features`, where copies were drafted.
    """

    rounds: Rounds
    requests: np.ndarray
    features: np.ndarray | None

    def part(self, rows: np.ndarray) -> Recorded:
        """Some of the rounds, by index or mask."""
        return Recorded(self.rounds.part(rows), self.requests[rows], None if self.features is None else self.features[rows])

    def copy_confidence(self) -> list[list[float]]:
        """The table that says best which tokens survive, of those whose predecessors did."""
        assert self.features is not None
        places = np.arange(self.rounds.block_size)
        reached = (self.rounds.judged[:, None] > places) & (self.rounds.accepted[:, None] >= places)
        return fit_copy_confidence(self.features[reached], (self.rounds.accepted[:, None] > places)[reached])

    def adjusted(self, table: Sequence[Sequence[float]] | None) -> Rounds:
        """The rounds with the logits that a table makes of theirs."""
        if self.features is None or table is None:
            return self.rounds
        return replace(self.rounds, logits=adjusted(torch.from_numpy(self.features), table).numpy())

    @classmethod
    def join(cls, parts: Sequence[Recorded]) -> Recorded:
        """Several records as one."""
        features = None if parts[0].features is None else np.concatenate([part.features for part in parts])
        return cls(Rounds.join([part.rounds for part in parts]), np.concatenate([part.requests for part in parts]), features)


def record_rounds(
    target: Any,
    drafter: Any,
    prompts: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    concurrency: int,
    seed: int,
) -> Recorded:
    """Decode prompts with the full budget."""
    recorder = RoundRecorder()
    serve(
        target, drafter, prompts, concurrency=concurrency, max_new_tokens=max_new_tokens, budget=FullBudget(), end_ids=end_ids,
        temperature=temperature, top_p=top_p, seed=seed, listener=recorder,
    )  # fmt: skip
    return recorder.rounds()


def held_out(prompt: Sequence[int], share: float) -> bool:
    """Whether a prompt is for judging, not for fitting: by its hash, so the same everywhere."""
    digest = hashlib.sha256(np.asarray(prompt, dtype=np.int64).tobytes()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def calibrate(
    target: Any,
    drafter: Any,
    files: Mapping[str, Sequence[Sequence[int]]],
    *,
    others: Mapping[str, Sequence[Sequence[int]]] | None = None,
    end_ids: Sequence[int],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    concurrency: int = 16,
    test_share: float = 0.5,
    seed: int = 0,
    copying: int | None = None,
    on_file: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Fit temperatures on part of the prompts, judge them on the rest, and on files of other domains.

    Args:
        target (`PreTrainedModel`), drafter (`DSparkDrafter`): with a confidence head.
        files (`dict[str, list[list[int]]]`): token ids of prompts, by name.
        others (`dict`, *optional*): prompts to judge on only.
        end_ids (`list[int]`): that end a text.
        max_new_tokens, temperature, top_p, concurrency, seed: of decoding.
        test_share (`float`): share of the prompts to judge on.
        copying (`int`, *optional*): fit the weights of copies first, for matches of up to so many tokens, on up to 128 of the prompts; 0
            is no copying; as the drafter has it where None. The drafter is left with these weights; `set_calibration` gives it the rest.
        on_file (`Callable`, *optional*): called with each file's name when it is decoded.
    Returns:
        `dict`: the record that `calibration.json` holds.
    Raises:
        DataError: if the drafter has no confidence head, or the prompts give too few rounds.
    """
    if drafter.confidence_head is None:
        raise DataError("this drafter has no confidence head, so there is nothing to calibrate; train one with a confidence head")
    options: dict[str, Any] = {
        "end_ids": end_ids, "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "concurrency": concurrency,
        "seed": seed,
    }  # fmt: skip
    if copying is not None:
        # By turns from each file, so that all of them are heard.
        turns = [p for row in zip_longest(*files.values()) for p in row if p is not None and not held_out(p, test_share)]
        _choose_copying(target, drafter, turns, copying, options)
    fit_parts: list[Recorded] = []
    test_parts: dict[str, Recorded] = {}
    data = []
    for name, prompts in files.items():
        found = record_rounds(target, drafter, prompts, **options)
        for_test = np.array([held_out(prompt, test_share) for prompt in prompts])[found.requests]
        fit_parts.append(found.part(~for_test))
        test_parts[name] = found.part(for_test)
        fitted, judged = len(fit_parts[-1].rounds), len(test_parts[name].rounds)
        data.append({"file": name, "prompts": len(prompts), "rounds_fitted": fitted, "rounds_judged": judged})
        if on_file is not None:
            on_file(name)
    fitted_on = Recorded.join(fit_parts)
    if min(len(fitted_on.rounds), *(len(part.rounds) for part in test_parts.values())) < FEWEST_ROUNDS:
        raise DataError(f"calibration needs at least {FEWEST_ROUNDS} rounds to fit and in each file; got {data}. Give more prompts.")
    weights = drafter.config.copy_weights
    table = None if weights is None else fitted_on.copy_confidence()
    try:
        temperatures = fit_temperatures(fitted_on.adjusted(table))
    except ValueError as error:
        raise DataError(str(error)) from error
    domain = Recorded.join(list(test_parts.values()))
    record: dict[str, Any] = {
        "format": FORMAT,
        "temperatures": temperatures,
        **({} if weights is None else {"copying": {"weights": list(weights), "confidence": table}}),
        "sampling": {"temperature": temperature, "top_p": top_p, "verification": DEFAULT_VERIFICATION},
        "max_new_tokens": max_new_tokens,
        "data": data,
        "bins": BINS,
        **_before_and_after(domain, temperatures, table),
        "files": {name: _before_and_after(part, temperatures, table) for name, part in test_parts.items()},
        "others": {},
        "drafter_fingerprint": fingerprint(drafter),
        "seed": seed,
        "machine": machine_record(target.device),
    }
    record |= for_sglang(record)
    for name, prompts in (others or {}).items():
        record["others"][name] = _before_and_after(record_rounds(target, drafter, prompts, **options), temperatures, table)
        if on_file is not None:
            on_file(name)
    return record


def _choose_copying(target: Any, drafter: Any, prompts: Sequence[Sequence[int]], longest: int, options: dict[str, Any]) -> None:
    """Fit how far copies are trusted, on answers decoded without them."""
    if not 0 <= longest <= LONGEST_COPY:
        raise ValueError(f"copying must be 0 (none) to {LONGEST_COPY} tokens of match that are told apart; got {longest}.")
    if longest and not prompts:
        raise DataError("no prompt is left to fit copying on: all are held out for judging; give more prompts")
    config = drafter.config
    config.copy_weights = config.copy_confidence = None
    if not longest:
        return
    some = prompts[:_COPY_PROMPTS]
    served = serve(target, drafter, some, budget=FullBudget(), **options)
    weights = fit_copying(target, drafter.bind(target), list(zip(some, served.tokens, strict=True)), longest)
    if any(weights):
        config.copy_weights = weights
    else:
        logger.warning(
            "Too few copies were found in the answers to weigh them; the drafter goes without. Give more prompts, or longer answers."
        )


def _before_and_after(found: Recorded, temperatures: Sequence[float], table: Sequence[Sequence[float]] | None) -> dict[str, Any]:
    """Of the confidence head's own logits, and of what the table and the temperatures make of them."""
    cases = (("before", found.rounds, None), ("after", found.adjusted(table), temperatures))
    return {when: {**_summary(quality(rounds, t)), "reliability": _diagrams(rounds, t)} for when, rounds, t in cases}


def _summary(positions: Sequence[PositionQuality]) -> dict[str, Any]:
    """Means over positions, and the positions; what cannot be had is None."""
    rows = [{k: None if isinstance(v, float) and np.isnan(v) else v for k, v in asdict(p).items()} for p in positions]
    means: dict[str, float | None] = {}
    for name in ("ece", "auc", "brier"):
        values = [value for row in rows if (value := row[name]) is not None]
        means[name] = sum(values) / len(values) if values else None
    return {"rounds": positions[0].rounds, **means, "positions": rows}


def _diagrams(rounds: Rounds, temperatures: Sequence[float] | None) -> list[list[dict[str, float]]]:
    survival = rounds.survival(temperatures)
    out = []
    for k in range(rounds.block_size):
        known = rounds.judged > k
        out.append(reliability(survival[known, k], (rounds.accepted[known] > k).astype(np.float64), BINS))
    return out
