"""The training loop: frozen target in, trained drafter out, resumable. Does not know decoding, the Hub, or recipes."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_dspark.errors import CheckpointError
from hf_dspark.target import Taps
from hf_dspark.training.blocks import block_targets, sample_anchors
from hf_dspark.training.data import Batch, ResponseRow, can_train, collate, epoch_batches, ordered_batches
from hf_dspark.training.losses import LossResult, LossWeights, Tally, TargetHead, dspark_loss

_KEPT_CHECKPOINTS = 2
_SKIPS_IN_A_ROW = 10
_CADENCE = {
    "checkpoint_minutes",
    "evaluation_minutes",
    "evaluation_rows",
    "evaluation_anchors",
    "log_every",
    "chunk_positions",
}


@dataclass(frozen=True)
class TrainingConfig:
    """Hyper-parameters of one run; exactly one of `steps` and `minutes` sets its length and its schedule.

    Source: paper section 3.2 (warm-up 4%, clip 1.0, loss weights), with the start of the cross entropy raised: its
    initial value is 15 to 56 nats here and the L1 gradient nearly vanishes there.

    With `steps` a resumed run repeats the uninterrupted one exactly (same machine, same thread count). With `minutes`
    the schedule follows the elapsed share of that wall-clock time, and no two runs are the same.

    Args:
        steps (`int`, *optional*): optimizer steps of the whole run.
        minutes (`float`, *optional*): minutes of training, evaluation and checkpoints included, over all resumes.
        batch_size (`int`): rows a step.
        num_anchors (`int`): at most this many blocks a row.
        learning_rate (`float`): peak, after the warm-up.
        warmup (`float`): share of the run with a linearly rising learning rate; a cosine to 0 follows.
        clip (`float`): largest gradient norm.
        weight_decay (`float`): of AdamW.
        ce_start, ce_end, ce_anneal (`float`): CE weight falls linearly from start to end over that first share of the
            run.
        total_variation, confidence, decay (`float`): see `LossWeights`.
        chunk_positions (`int`): block positions whose logits exist at one time.
        checkpoint_minutes, evaluation_minutes (`float`): cadence.
        evaluation_rows (`int`): held-out rows of the evaluations on the way; the last evaluation takes all.
        evaluation_anchors (`int`): blocks a held-out row.
        log_every (`int`): steps a log line.
        seed (`int`): of batches, anchors and evaluation.
    """

    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 8
    num_anchors: int = 64
    learning_rate: float = 1.5e-3
    warmup: float = 0.04
    clip: float = 1.0
    weight_decay: float = 0.0
    ce_start: float = 1.0
    ce_end: float = 0.1
    ce_anneal: float = 0.3
    total_variation: float = 0.9
    confidence: float = 1.0
    decay: float = 4.0
    chunk_positions: int = 256
    checkpoint_minutes: float = 5.0
    evaluation_minutes: float = 10.0
    evaluation_rows: int = 64
    evaluation_anchors: int = 32
    log_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"steps is {self.steps} and minutes is {self.minutes}; allowed: exactly one of them. Set the other to None.")
        for name in (
            "steps",
            "minutes",
            "batch_size",
            "num_anchors",
            "learning_rate",
            "clip",
            "decay",
            "chunk_positions",
            "checkpoint_minutes",
            "evaluation_minutes",
            "evaluation_rows",
            "evaluation_anchors",
            "log_every",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; allowed: above 0. Correct the training configuration.")
        for name in ("warmup", "ce_anneal"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 0 up to, not including, 1. It is a share of the run.")

    def learning_rate_at(self, fraction: float) -> float:
        """Learning rate at an elapsed share of the run in [0, 1]: linear warm-up, then cosine to 0."""
        if fraction < self.warmup:
            return self.learning_rate * fraction / self.warmup
        done = min(1.0, (fraction - self.warmup) / (1 - self.warmup))
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def loss_weights_at(self, fraction: float) -> LossWeights:
        """Loss coefficients at an elapsed share of the run in [0, 1]."""
        share = min(1.0, fraction / self.ce_anneal) if self.ce_anneal else 1.0
        ce = self.ce_start + (self.ce_end - self.ce_start) * share
        return LossWeights(cross_entropy=ce, total_variation=self.total_variation, confidence=self.confidence, decay=self.decay)


class MasterAdamW:
    """AdamW on float32 copies of the parameters, which themselves stay in the dtype they compute in.

    Args:
        parameters: trainable tensors of the drafter, any float dtype.
        weight_decay (`float`): decoupled.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, weight_decay: float = 0.0) -> None:
        self.parameters = list(parameters)
        self.masters = [p.detach().to(torch.float32, copy=True) for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=0.0, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, learning_rate: float, clip: float) -> float:
        """Clip, step, copy back and drop the gradients.

        Returns:
            `float`: gradient norm before clipping. When it is not finite no parameter changes.
        """
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.to(torch.float32)
            parameter.grad = None
        norm = float(nn.utils.clip_grad_norm_(self.masters, clip))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            self.copy_back()
        self.optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def copy_back(self) -> None:
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            parameter.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        return {"masters": self.masters, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = state["masters"]
        if [tuple(t.shape) for t in saved] != [tuple(t.shape) for t in self.masters]:
            raise CheckpointError(
                f"the checkpoint holds {len(saved)} tensors that do not fit this drafter's {len(self.masters)}; "
                f"allowed: the same "
                "architecture. Start in another output folder."
            )
        with torch.no_grad():
            for master, value in zip(self.masters, saved, strict=True):
                master.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.copy_back()


class TargetStates:
    """Taps and last hidden states of a frozen target, by one pass of its decoder and never of its lm_head.

    The rows are padded on the right and the decoder is causal, so no padding mask is passed: padding cannot reach a
    real token, and attention takes its fast causal path.

    Args:
        target (`transformers.PreTrainedModel`): a causal LM; its weights are read only.
        layer_ids: tap ids, i = output of decoder layer i, -1 = the embeddings.
    """

    def __init__(self, target: Any, layer_ids: Sequence[int]) -> None:
        self.target = target
        self.decoder = target.get_decoder()
        self._taps = Taps(target, layer_ids)
        self.device = next(self.decoder.parameters()).device

    def __call__(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """One pass.

        Args:
            input_ids (`torch.Tensor` of shape `(batch, sequence)`): padded on the right.
        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: taps `(batch, sequence, taps * hidden)`, and last hidden states after
                the
            final norm `(batch, sequence, hidden)`. Ordinary tensors without gradient history.
        """
        was_training = self.target.training
        self.target.eval()
        try:
            with torch.inference_mode(), self._taps.open():
                last = self.decoder(input_ids=input_ids.to(self.device), use_cache=False).last_hidden_state
        finally:
            self.target.train(was_training)
        # Outside inference mode: the concatenation and the copy are ordinary tensors that backward may keep.
        return self._taps.take(), last.clone()


@dataclass
class Progress:
    """Where a run stands; everything here goes into a checkpoint."""

    step: int = 0
    seconds: float = 0.0
    best_score: float | None = None
    best_step: int | None = None
    tokens: int = 0
    anchors: int = 0
    last_evaluation: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)


def load_weights(drafter: nn.Module, run: Path) -> int:
    """Start `drafter` from the newest checkpoint of another run: its weights, nothing of its optimizer or schedule.

    Args:
        drafter (`DSparkDrafter`): of the same shapes.
        run (`Path`): that run's output folder.
    Returns:
        `int`: the step of the checkpoint.
    Raises:
        CheckpointError: if there is none, or its tensors have other shapes.
    """
    found = sorted((run / "checkpoints").glob("step-*/state.pt"))
    if not found:
        raise CheckpointError(f"{run} holds no checkpoint; expected {run}/checkpoints/step-*/state.pt, as a run writes them.")
    state = torch.load(found[-1], map_location="cpu", weights_only=True)
    masters, parameters = state["optimizer"]["masters"], [p for p in drafter.parameters() if p.requires_grad]
    if [m.shape for m in masters] != [p.shape for p in parameters]:
        raise CheckpointError(f"{found[-1]} holds tensors of other shapes than this drafter's; use the same layers, rank and vocabulary.")
    with torch.no_grad():
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.copy_(master)
    return state["progress"]["step"]


class Trainer:
    """Trains a bound drafter on responses of its frozen target.

    MTP-1 (block_size 1) and DFlash (markov_rank 0) are configurations of the drafter, not other code. Batches, anchors
    and schedule are functions of (seed, step), so a checkpoint needs no data state beyond the step.

    Files under `output`: `log.jsonl` (one event a line), `checkpoints/step-*` (the last two, resumable after a kill at
    any moment), `best` and `final` (drafters for `from_pretrained`).

    Args:
        drafter (`DSparkDrafter`): bound to the target, in the dtype to compute in (bfloat16 on CPUs with bf16 units).
        target (`transformers.PreTrainedModel`): frozen; never written to.
        train_rows, held_out_rows: from `split_rows`; rows too short to hold an anchor are left out.
        config (`TrainingConfig`): hyper-parameters.
        output (`Path`): folder; created when missing. A checkpoint found in it is resumed.
        announce (`Callable`): receives each event as a dictionary, besides the log file.
    Raises:
        ValueError: if no training row holds an anchor.
        RuntimeError: if the target's head does not reproduce the target's own logits.
        CheckpointError: if the folder holds a checkpoint of another configuration or other data.
    """

    def __init__(
        self,
        drafter: Any,
        target: Any,
        train_rows: Sequence[ResponseRow],
        held_out_rows: Sequence[ResponseRow],
        config: TrainingConfig,
        output: Path | str,
        *,
        announce: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.drafter, self.config, self.output, self.announce = drafter, config, Path(output), announce
        self.rows = [row for row in train_rows if can_train(row)]
        self.held_out = [row for row in held_out_rows if can_train(row)]
        if not self.rows:
            raise ValueError(
                f"none of {len(train_rows)} training rows has two response tokens; allowed: one or more. Generate longer responses."
            )
        self.lengths = [len(row) for row in self.rows]
        self.batches_an_epoch = math.ceil(len(self.rows) / config.batch_size)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

        self.device = next(drafter.parameters()).device
        self.states = TargetStates(target, drafter.config.target_layer_ids)
        d2t = getattr(drafter, "d2t", None)
        ids = None if d2t is None else torch.arange(d2t.numel(), device=d2t.device) + d2t
        text_config = target.config.get_text_config(decoder=True)
        softcap = getattr(text_config, "final_logit_softcapping", None)
        self.head = TargetHead(target.get_output_embeddings(), ids, softcap=softcap)
        self._label_index: Tensor | None = None
        if ids is not None:
            self._label_index = torch.full((text_config.vocab_size,), -1, dtype=torch.long, device=self.device)
            self._label_index[ids] = torch.arange(ids.numel(), device=self.device)
        self._check_head(target)

        self.optimizer = MasterAdamW([p for p in drafter.parameters() if p.requires_grad], weight_decay=config.weight_decay)
        markov = drafter.markov_head
        self._head_weights = [] if markov is None else [p for p in markov.markov_w2.parameters() if p.requires_grad]
        self.progress = Progress()
        self.output.mkdir(parents=True, exist_ok=True)
        self._started = time.monotonic()

    # -- one batch ------------------------------------------------------------------------------------------------

    def _check_head(self, target: Any) -> None:
        ids = torch.tensor([self.rows[0].prompt_ids[:8] + self.rows[0].response_ids[:8]])
        _, last = self.states(ids)
        with torch.inference_mode():
            was_training = target.training
            target.eval()
            expected = target(input_ids=ids.to(self.states.device), use_cache=False).logits[0].float().softmax(dim=-1)
            target.train(was_training)
        found = self.head(last[0])
        draft = expected if self.head._ids is None else expected[:, self.head._ids.to(expected.device)]
        error = float((draft - found.inside).abs().max())
        if not error < 0.02:
            raise RuntimeError(
                f"the target's lm_head on its last hidden states differs from its own logits by {error:.3g} in "
                f"probability; allowed: "
                "below 0.02. This target changes its logits after the head in a way the trainer does not know: "
                "extend TargetHead."
            )

    def _draft_logits(self, hidden: Tensor, latent: Tensor | None) -> Tensor:
        base = self.drafter.base_logits(hidden)
        return base if latent is None else base + self.drafter.markov_head.project(latent)

    def batch_loss(self, batch: Batch, *, num_anchors: int, generator: torch.Generator, weights: LossWeights) -> LossResult:
        """Taps, anchors, drafter and loss of one batch; `.loss` carries the gradient."""
        marks = [time.perf_counter()]
        batch = batch.to(self.device)
        taps, last = self.states(batch.input_ids)
        marks.append(time.perf_counter())
        positions, valid = sample_anchors(batch.loss_mask, batch.lengths, num_anchors, generator)
        targets = block_targets(batch.input_ids, batch.loss_mask, batch.lengths, positions, valid, self.drafter.config.block_size)
        hidden = self.drafter.training_hidden(taps.to(self.device), batch.input_ids.gather(1, positions), positions)
        head = self.drafter.markov_head
        latent = None if head is None else head.block(targets.prev_ids, hidden)
        confidence = self.drafter.confidence(hidden, targets.prev_ids)
        marks.append(time.perf_counter())
        result = dspark_loss(
            hidden=hidden,
            latent=latent,
            confidence_logits=confidence,
            target_ids=targets.target_ids,
            target_index=targets.target_index,
            position_mask=targets.position_mask,
            target_hidden=last,
            draft_logits=self._draft_logits,
            target=self._target_probabilities,
            weights=weights,
            parameters=self._head_weights,
            label_index=self._label_index,
            chunk_positions=self.config.chunk_positions,
        )
        marks.append(time.perf_counter())
        self.seconds_of = dict(zip(("target_s", "backbone_s", "loss_s"), (b - a for a, b in itertools.pairwise(marks)), strict=True))
        return result

    def _target_probabilities(self, hidden: Tensor) -> Any:
        found = self.head(hidden.to(self.states.device))
        if self.states.device == self.device:
            return found
        return type(found)(found.inside.to(self.device), found.outside.to(self.device), found.best.to(self.device))

    def _generator(self, *parts: object) -> torch.Generator:
        digest = hashlib.sha256("/".join(map(str, (self.config.seed, *parts))).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def batch_at(self, step: int) -> Batch:
        """The training batch of a step, counted from 0."""
        epoch, index = divmod(step, self.batches_an_epoch)
        if self._epoch[0] != epoch:
            order = epoch_batches(self.lengths, batch_size=self.config.batch_size, seed=self.config.seed, epoch=epoch)
            self._epoch = (epoch, order)
        return collate([self.rows[i] for i in self._epoch[1][index]])

    # -- the loop -------------------------------------------------------------------------------------------------

    def seconds(self) -> float:
        """Wall-clock seconds of this run, earlier parts of a resumed run included."""
        return self.progress.seconds + time.monotonic() - self._started

    def fraction(self) -> float:
        """Elapsed share of the run, in [0, 1]."""
        if self.config.steps is not None:
            return self.progress.step / self.config.steps
        return min(1.0, self.seconds() / (60 * self.config.minutes))  # type: ignore[operator]

    def train(self, *, stop_after: int | None = None) -> Progress:
        """Resume where the output folder stands, train to the end, evaluate, and save `best` and `final`.

        Args:
            stop_after (`int`, *optional*): leave after this many steps of this call, with a checkpoint and without the
                closing evaluation, as an interrupted run would.
        Returns:
            `Progress`: the run's counters and its held-out curve.
        """
        config = self.config
        self._started = time.monotonic()
        resumed = self.resume()
        begin = self.progress.step
        self._log(
            "resume" if resumed else "start",
            rows=len(self.rows),
            held_out_rows=len(self.held_out),
            batches_an_epoch=self.batches_an_epoch,
            parameters=sum(p.numel() for p in self.optimizer.parameters),
            config=asdict(config),
        )
        last_checkpoint = self.seconds()
        skipped = 0
        self.drafter.train()
        while (fraction := self.fraction()) < 1:
            if stop_after is not None and self.progress.step - begin >= stop_after:
                self.checkpoint()
                return self.progress
            clock = time.perf_counter()
            step = self.progress.step
            batch = self.batch_at(step)
            result = self.batch_loss(
                batch,
                num_anchors=config.num_anchors,
                generator=self._generator("anchors", step),
                weights=config.loss_weights_at(fraction),
            )
            mark = time.perf_counter()
            result.loss.backward()
            backward_s = time.perf_counter() - mark
            # A step's learning rate is that of its end: the first of a run is not 0, the last is.
            learning_rate = config.learning_rate_at(fraction if config.steps is None else (step + 0.5) / config.steps)
            norm = self.optimizer.step(learning_rate, config.clip)
            self.progress.step += 1
            self.progress.tokens += int(batch.lengths.sum())
            self.progress.anchors += int(result.position_mask[:, :, 0].sum())
            if math.isfinite(norm):
                skipped = 0
            else:
                skipped += 1
                self._log("skipped", norm=str(norm))
                if skipped == _SKIPS_IN_A_ROW:
                    raise RuntimeError(
                        f"the gradient was not finite in {skipped} steps in a row at step {step}; allowed: finite. "
                        f"Lower the learning rate, "
                        f"or start from an earlier checkpoint in {self.output / 'checkpoints'}."
                    )
            if step % config.log_every == 0:
                wall = time.perf_counter() - clock
                times = {**self.seconds_of, "backward_s": backward_s, "step_s": wall}
                self._log(
                    "step",
                    epoch=step // self.batches_an_epoch,
                    learning_rate=learning_rate,
                    loss=float(result.loss.detach()),
                    norm=norm,
                    positions=int(result.position_mask.sum()),
                    width=batch.input_ids.shape[1],
                    labels_outside=int(result.labels_outside),
                    terms={k: round(float(v), 5) for k, v in result.terms.items()},
                    metrics=result.tally().values(),
                    **{k: round(v, 4) for k, v in times.items()},
                )
            if self.seconds() - self.progress.last_evaluation >= 60 * config.evaluation_minutes and self.fraction() < 1:
                self._evaluate_and_keep(config.evaluation_rows)
            if self.seconds() - last_checkpoint >= 60 * config.checkpoint_minutes:
                self.checkpoint()
                last_checkpoint = self.seconds()
        self._evaluate_and_keep(len(self.held_out), closing=True)
        self._save_drafter("final")
        self.checkpoint()
        self._log("end", best_step=self.progress.best_step, best_score=self.progress.best_score)
        return self.progress

    # -- evaluation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, rows: Sequence[ResponseRow]) -> dict[str, Any]:
        """Teacher-forced metrics on held-out rows, over all, per temperature and per domain and temperature.

        The anchors depend on the seed and the rows only, so two evaluations of the same rows compare the same blocks.
        """
        tallies: dict[str, Tally] = {}
        self.drafter.eval()
        weights = self.config.loss_weights_at(1.0)
        for number, chunk in enumerate(ordered_batches(rows, batch_size=self.config.batch_size)):
            batch = collate(chunk)
            generator = self._generator("evaluation", number)
            result = self.batch_loss(batch, num_anchors=self.config.evaluation_anchors, generator=generator, weights=weights)
            keys = [("all", f"T={row.temperature:g}", f"{row.source} T={row.temperature:g}") for row in chunk]
            for key in sorted({name for names in keys for name in names}):
                mine = torch.tensor([key in names for names in keys])
                tallies.setdefault(key, Tally()).merge(result.tally(mine))
        self.drafter.train()
        return {key: tally.values() for key, tally in sorted(tallies.items())}

    @staticmethod
    def score(metrics: dict[str, Any]) -> float | None:
        """What `best` maximises: the mean over temperatures of tau_greedy (T = 0) or tau_sampled (T > 0)."""
        taus = [values["tau_greedy" if key == "T=0" else "tau_sampled"] for key, values in metrics.items() if key.startswith("T=")]
        known = [tau for tau in taus if tau is not None]
        return sum(known) / len(known) if known else None

    def _evaluate_and_keep(self, count: int, *, closing: bool = False) -> None:
        if not self.held_out:
            if closing:
                self._save_drafter("best")
            return
        metrics = self.evaluate(self.held_out[:count])
        score = self.score(metrics)
        point = {
            "step": self.progress.step,
            "minutes": round(self.seconds() / 60, 3),
            "anchors": self.progress.anchors,
            "rows": min(count, len(self.held_out)),
            "score": score,
        }
        self.progress.curve.append({**point, "all": metrics["all"], **{k: v for k, v in metrics.items() if k.startswith("T=")}})
        self._log("evaluation", **point, closing=closing, metrics=metrics)
        # The closing evaluation sees more rows, so its score is compared on the rows that the others saw.
        if closing and count > self.config.evaluation_rows:
            score = self.score(self.evaluate(self.held_out[: self.config.evaluation_rows]))
        best = self.progress.best_score
        if best is None or (score is not None and score >= best):
            self.progress.best_score, self.progress.best_step = score, self.progress.step
            self._save_drafter("best")
        self.progress.last_evaluation = self.seconds()

    # -- files ----------------------------------------------------------------------------------------------------

    def _log(self, event: str, **fields: Any) -> None:
        record = {"event": event, "step": self.progress.step, "seconds": round(self.seconds(), 2), **fields}
        with (self.output / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
        if self.announce is not None:
            self.announce(record)

    def _save_drafter(self, name: str) -> None:
        waiting = self.output / f".tmp-{name}"
        shutil.rmtree(waiting, ignore_errors=True)
        self.drafter.save_pretrained(waiting)
        shutil.rmtree(self.output / name, ignore_errors=True)
        os.replace(waiting, self.output / name)

    def _fingerprint(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(repr((row.prompt_ids, row.response_ids)).encode())
        config = {name: value for name, value in asdict(self.config).items() if name not in _CADENCE}
        return {**config, "rows": len(self.rows), "data": digest.hexdigest()}

    def checkpoint(self) -> Path:
        """Write `checkpoints/step-*` whole or not at all: a temporary folder, flushed to disk, then renamed."""
        folder = self.output / "checkpoints"
        folder.mkdir(exist_ok=True)
        name = f"step-{self.progress.step:08d}"
        waiting = folder / f".tmp-{name}"
        shutil.rmtree(waiting, ignore_errors=True)
        waiting.mkdir()
        progress = {**asdict(self.progress), "seconds": self.seconds()}
        state = {
            "progress": progress,
            "fingerprint": self._fingerprint(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        with (waiting / "state.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(folder / name, ignore_errors=True)
        os.replace(waiting, folder / name)
        for old in sorted(folder.glob("step-*"))[:-_KEPT_CHECKPOINTS]:
            shutil.rmtree(old)
        return folder / name

    def resume(self) -> bool:
        """Load the newest whole checkpoint of the output folder; False where there is none."""
        folder = self.output / "checkpoints"
        for half_written in folder.glob(".tmp-*"):
            shutil.rmtree(half_written)
        found = sorted(folder.glob("step-*/state.pt"))
        if not found:
            return False
        state = torch.load(found[-1], map_location="cpu", weights_only=True)
        mine, theirs = self._fingerprint(), state["fingerprint"]
        differing = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        if differing:
            listed = ", ".join(f"{name} {theirs.get(name)!r} there, {mine.get(name)!r} here" for name in differing)
            raise CheckpointError(f"{found[-1]} belongs to another run ({listed}); allowed: the same. Use another output folder.")
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.progress = Progress(**state["progress"])
        self._started = time.monotonic()
        return True
