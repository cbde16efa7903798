"""Fits a drafter's confidence temperatures on decoded prompts and judges them on others.

Everything is decoded with the full budget and recorded before calibration, so an earlier calibration does not affect the next.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_dspark.adapters.files import fingerprint
from hf_dspark.budgets.budget import FinishedRound, FullBudget
from hf_dspark.calibration.ngram_copy_fit import fit_copy_confidence
from hf_dspark.calibration.records import for_sglang
from hf_dspark.calibration.temperature_scaling import BINS, FEWEST_ROUNDS, FORMAT, Rounds, fit_temperatures, quality, reliability
from hf_dspark.configuration_dspark import MAX_COPY_MATCH
from hf_dspark.decoding.ngram_copy import adjusted
from hf_dspark.decoding.verify import DEFAULT_VERIFICATION
from hf_dspark.errors import DataError
from hf_dspark.evaluation.metrics import machine_record
from hf_dspark.evaluation.ngram_copies import fit_copying
from hf_dspark.evaluation.serving import serve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_dspark.models.modeling_dspark import DSparkDrafter

logger = logging.getLogger(__name__)

Prompts = Sequence[Sequence[int]]
Table = Sequence[Sequence[float]]

# Prompts that weights of copies are fitted on: far more positions than the few numbers need.
_COPY_PROMPTS = 128
# Index of the confidence head's own logit in `FinishedRound.copy_features`.
_CONFIDENCE = 2


class RoundRecorder:
    """A round callback that records every round's confidence logits and fate, by request, and the features of n-gram copies."""

    temperatures: None = None
    wants_copy_features = True

    def __init__(self) -> None:
        self.parts: list[Rounds] = []

    def on_round_end(self, finished: FinishedRound) -> None:
        rows = np.flatnonzero(finished.judged)
        if finished.confidence_logits is None or not len(rows):
            return
        features = None if finished.copy_features is None else finished.copy_features.double().numpy()
        logits = finished.confidence_logits.double().numpy() if features is None else features[..., _CONFIDENCE]
        judged, accepted, requests = map(np.array, (finished.judged, finished.accepted, finished.requests))
        self.parts.append(Rounds(logits, judged, accepted, requests, features).part(rows))


def record_rounds(target: PreTrainedModel, drafter: DSparkDrafter, prompts: Prompts, **options: Any) -> Rounds:
    """Decode prompts with the full budget; `options` as `serve` takes them.

    Raises:
        DataError: if nothing was drafted.
    """
    recorder = RoundRecorder()
    serve(target, drafter, prompts, budget=FullBudget(), round_callback=recorder, **options)
    if not recorder.parts:
        raise DataError("nothing was drafted: every answer ended with its first token; give more prompts, or more --max-new-tokens")
    return Rounds.join(recorder.parts)


def held_out(prompt: Sequence[int]) -> bool:
    """Whether a prompt is for judging, not for fitting: half of them are, by their hash, so the same everywhere."""
    return hashlib.sha256(np.asarray(prompt, dtype=np.int64).tobytes()).digest()[0] < 128


def calibrate(
    target: PreTrainedModel,
    drafter: DSparkDrafter,
    files: Mapping[str, Prompts],
    *,
    others: Mapping[str, Prompts] | None = None,
    end_ids: Sequence[int],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    concurrency: int = 16,
    seed: int = 0,
    copying: int | None = None,
    on_file: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Fit temperatures on half of the prompts, judge them on the others, and on files of other domains.

    Args:
        target, drafter (`DSparkDrafter`): a pair, with a confidence head.
        files (`dict[str, list[list[int]]]`): token ids of prompts, by name.
        others (`dict`, *optional*): prompts to judge on only.
        end_ids (`list[int]`): that end a text.
        max_new_tokens, temperature, top_p, concurrency, seed: of decoding.
        copying (`int`, *optional*): fit the weights of n-gram copies first, for matches of up to so many tokens, on up to 128 of the
            prompts; 0 is no copying; as the drafter has it where None. The drafter is left with these weights; `set_calibration` adds the
            temperatures.
        on_file (`Callable`, *optional*): called when a file is decoded.
    Returns:
        `dict`: the record that `calibration.json` holds.
    Raises:
        DataError: if the drafter has no confidence head, or the prompts give too few rounds.
    """
    if drafter.confidence_head is None:
        raise DataError("this drafter has no confidence head, so there is nothing to calibrate; train one with a confidence head")
    sampling = {"temperature": temperature, "top_p": top_p}
    options: dict[str, Any] = {"end_ids": end_ids, "max_new_tokens": max_new_tokens, "concurrency": concurrency, "seed": seed, **sampling}
    if copying is not None:
        # By turns from each file, so that all of them count.
        turns = [p for row in zip_longest(*files.values()) for p in row if p is not None and not held_out(p)]
        _choose_copying(target, drafter, turns, copying, options)

    def decoded(prompts: Prompts) -> Rounds:
        rounds = record_rounds(target, drafter, prompts, **options)
        on_file()
        return rounds

    fit_parts, test_parts, data = [], {}, []
    for name, prompts in files.items():
        found = decoded(prompts)
        for_test = np.array([held_out(prompt) for prompt in prompts])[found.requests]
        fit_parts.append(found.part(~for_test))
        test_parts[name] = found.part(for_test)
        counts = {"rounds_fitted": len(fit_parts[-1]), "rounds_judged": len(test_parts[name])}
        data.append({"file": name, "prompts": len(prompts), **counts})
    fitted_on = Rounds.join(fit_parts)
    if min(len(fitted_on), *map(len, test_parts.values())) < FEWEST_ROUNDS:
        raise DataError(f"calibration needs at least {FEWEST_ROUNDS} rounds to fit and in each file; got {data}. Give more prompts.")
    weights = drafter.config.copy_weights
    table = None if weights is None else _copy_confidence(fitted_on)
    try:
        temperatures = fit_temperatures(_adjusted(fitted_on, table))
    except ValueError as error:
        raise DataError(str(error)) from error
    record: dict[str, Any] = {
        "format": FORMAT,
        "temperatures": temperatures,
        **({} if weights is None else {"copying": {"weights": list(weights), "confidence": table}}),
        "sampling": {**sampling, "verification": DEFAULT_VERIFICATION},
        "max_new_tokens": max_new_tokens,
        "data": data,
        "bins": BINS,
        **_before_and_after(Rounds.join(list(test_parts.values())), temperatures, table),
        "files": {name: _before_and_after(part, temperatures, table) for name, part in test_parts.items()},
        "others": {name: _before_and_after(decoded(prompts), temperatures, table) for name, prompts in (others or {}).items()},
        "drafter_fingerprint": fingerprint(drafter),
        "seed": seed,
        "machine": machine_record(target.device),
    }
    return record | for_sglang(record)


def _choose_copying(target: PreTrainedModel, drafter: DSparkDrafter, prompts: Prompts, longest: int, options: dict[str, Any]) -> None:
    """Fit how far copies are trusted, on answers decoded without them."""
    if not 0 <= longest <= MAX_COPY_MATCH:
        raise ValueError(f"copying must be 0 (none) to {MAX_COPY_MATCH} tokens of match that are told apart; got {longest}.")
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


def _copy_confidence(rounds: Rounds) -> list[list[float]]:
    """The table that predicts best which tokens survive, of those whose predecessors did."""
    assert rounds.features is not None
    places = np.arange(rounds.block_size)
    reached = (rounds.judged[:, None] > places) & (rounds.accepted[:, None] >= places)
    return fit_copy_confidence(rounds.features[reached], (rounds.accepted[:, None] > places)[reached])


def _adjusted(rounds: Rounds, table: Table | None) -> Rounds:
    """The rounds with the logits that a table makes of theirs."""
    if rounds.features is None or table is None:
        return rounds
    return replace(rounds, logits=adjusted(torch.from_numpy(rounds.features), table).numpy())


def _before_and_after(rounds: Rounds, temperatures: Sequence[float], table: Table | None) -> dict[str, Any]:
    """Of the confidence head's own logits, and of what the table and the temperatures make of them."""
    return {"before": _judged(rounds, None), "after": _judged(_adjusted(rounds, table), temperatures)}


def _judged(rounds: Rounds, temperatures: Sequence[float] | None) -> dict[str, Any]:
    """Means over positions, the positions, and the points of their reliability diagrams; what is undefined is None."""
    positions = quality(rounds, temperatures)
    means: dict[str, float | None] = {}
    for name in ("ece", "auc", "brier"):
        values = [row[name] for row in positions if row[name] is not None]
        means[name] = sum(values) / len(values) if values else None
    diagrams = [reliability(predicted, observed) for predicted, observed in rounds.positions(temperatures)]
    return {"rounds": positions[0]["rounds"], **means, "positions": positions, "reliability": diagrams}
