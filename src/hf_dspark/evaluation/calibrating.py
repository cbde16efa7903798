"""Fits a drafter's confidence temperatures on decoded prompts and judges them on others. Knows serving and the fit; knows no command.

Everything is decoded with the full budget and recorded before calibration, so a calibration in force does no harm to the next one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from hf_dspark.adapter_files import fingerprint
from hf_dspark.calibration import BINS, FEWEST_ROUNDS, FORMAT, PositionQuality, Rounds, fit_temperatures, quality, reliability
from hf_dspark.calibration_files import for_sglang
from hf_dspark.errors import DataError
from hf_dspark.evaluation.metrics import machine_record
from hf_dspark.evaluation.serving import serve
from hf_dspark.scheduling import FinishedRound, FullBudget


class RoundRecorder:
    """A listener that keeps every round's confidence logits and fate, by request."""

    temperatures: None = None

    def __init__(self) -> None:
        self._requests: list[int] = []
        self._judged: list[int] = []
        self._accepted: list[int] = []
        self._logits: list[np.ndarray] = []

    def learn(self, finished: FinishedRound) -> None:
        if finished.confidence_logits is None:
            return
        kept = [r for r, judged in enumerate(finished.judged) if judged]
        self._logits.append(finished.confidence_logits.float().numpy()[kept])
        self._requests += [finished.requests[r] for r in kept]
        self._judged += [finished.judged[r] for r in kept]
        self._accepted += [finished.accepted[r] for r in kept]

    def rounds(self) -> tuple[Rounds, np.ndarray]:
        """All rounds, and the request of each."""
        if not self._judged:
            raise DataError("nothing was drafted: every answer ended with its first token; give more prompts, or more --max-new-tokens")
        logits = np.concatenate(self._logits).astype(np.float64)
        return Rounds(logits, np.array(self._judged), np.array(self._accepted)), np.array(self._requests)


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
) -> tuple[Rounds, np.ndarray]:
    """Decode prompts with the full budget; the rounds, and which prompt each belongs to."""
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
    fit_parts: list[Rounds] = []
    test_parts: dict[str, Rounds] = {}
    data = []
    for name, prompts in files.items():
        rounds, requests = record_rounds(target, drafter, prompts, **options)
        for_test = np.array([held_out(prompt, test_share) for prompt in prompts])[requests]
        fit_parts.append(rounds.part(~for_test))
        test_parts[name] = rounds.part(for_test)
        data.append({"file": name, "prompts": len(prompts), "rounds_fitted": len(fit_parts[-1]), "rounds_judged": len(test_parts[name])})
        if on_file is not None:
            on_file(name)
    fitted_on = Rounds.join(fit_parts)
    if min(len(fitted_on), *map(len, test_parts.values())) < FEWEST_ROUNDS:
        raise DataError(f"calibration needs at least {FEWEST_ROUNDS} rounds to fit and in each file; got {data}. Give more prompts.")
    try:
        temperatures = fit_temperatures(fitted_on)
    except ValueError as error:
        raise DataError(str(error)) from error
    domain = Rounds.join(list(test_parts.values()))
    record: dict[str, Any] = {
        "format": FORMAT,
        "temperatures": temperatures,
        "sampling": {"temperature": temperature, "top_p": top_p},
        "max_new_tokens": max_new_tokens,
        "data": data,
        "bins": BINS,
        **_before_and_after(domain, temperatures),
        "files": {name: _before_and_after(part, temperatures) for name, part in test_parts.items()},
        "others": {},
        "drafter_fingerprint": fingerprint(drafter),
        "seed": seed,
        "machine": machine_record(target.device),
    }
    record |= for_sglang(record)
    for name, prompts in (others or {}).items():
        rounds, _ = record_rounds(target, drafter, prompts, **options)
        record["others"][name] = _before_and_after(rounds, temperatures)
        if on_file is not None:
            on_file(name)
    return record


def _before_and_after(rounds: Rounds, temperatures: Sequence[float]) -> dict[str, Any]:
    return {
        when: {**_summary(quality(rounds, t)), "reliability": _diagrams(rounds, t)}
        for when, t in (("before", None), ("after", temperatures))
    }


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
