"""The training loop: frozen target in, trained drafter out, resumable, over one process or several."""

from __future__ import annotations

import copy
import hashlib
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from hf_dspark.adapters.lora import adapter_names
from hf_dspark.errors import CheckpointError
from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.training.blocks import cut_blocks
from hf_dspark.training.configuration import LossWeights, TrainingConfig
from hf_dspark.training.data import Batch, can_train, collate, epoch_batches
from hf_dspark.training.losses import BlockObjective, LossResult, Tally, weight_totals
from hf_dspark.training.optimizer import MasterOptimizer, gathered
from hf_dspark.training.processes import Processes, shard
from hf_dspark.training.rows import ResponseRow
from hf_dspark.training.run_folder import RunFolder, differences, drafter_identity, flat_metrics

_SKIPS_IN_A_ROW = 10
# Cadence, memory, and how a step's rows are shared out do not change the run, or its rounding only.
_NOT_OF_THE_RUN = {
    "checkpoint_minutes", "evaluation_minutes", "evaluation_rows", "evaluation_anchors", "log_every", "chunk_positions",
    "states_memory_gib", "accumulation",
}  # fmt: skip
# Of the whole drafter, adapters left out: their thin matrices are AdamW's.
_BACKBONE_MATRIX = re.compile(r"(^|\.)(fc|layers\.\d+\.(self_attn|mlp)\.\w+_proj)\.weight$")


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


class Trainer:
    """Trains a bound drafter on responses of its frozen target.

    Batches, anchors and schedule are functions of (seed, step), so a checkpoint needs no data state beyond the step. Several processes
    (`accelerate launch`) share the rows of each step: every one cuts the blocks of the whole step and divides its share by the whole step's
    weights, so that the gradients add up to those of one process, whatever the number of processes and accumulated parts.

    Files under `output`: `log.jsonl` (one event a line), `tensorboard/`, `checkpoints/step-*` (the last two, resumable after a kill at any
    moment), `best` and `final` (drafters for `from_pretrained`).

    Args:
        drafter (`DSparkDrafter`): bound to the target, in the dtype to compute in (bfloat16 on CPUs with bf16 units).
        target (`transformers.PreTrainedModel`): frozen; never written to.
        train_rows, held_out_rows: from `split_rows`; rows too short to hold an anchor are left out.
        config (`TrainingConfig`): hyper-parameters.
        output (`Path`): folder; created when missing. A checkpoint found in it is resumed.
        announce (`Callable`, *optional*): receives each event as a dictionary, besides the log file.
        decode (`Callable`, *optional*): called at every evaluation with the drafter; returns figures of real decoding as a dictionary, of
            which `tau` decides which weights are the best. Without it the teacher-forced estimate does.
        accelerator (`accelerate.Accelerator`, *optional*): default: one of the launched processes.
        fsdp (`bool`): shard weights, gradients and optimizer state over the processes, as `accelerate launch --use_fsdp` does.
        identity (`dict`, *optional*): what else must be the same when a checkpoint is resumed, as JSON takes it.
    Raises:
        ValueError: if no training row holds an anchor, the drafter is float16, an adapter is to be sharded, or drafter and process have
            different devices.
        UnsupportedTargetError: if the target's head does not reproduce the target's own logits.
        CheckpointError: if the folder holds a checkpoint of another configuration or other data.
    """

    def __init__(
        self,
        drafter: DSparkDrafter,
        target: PreTrainedModel,
        train_rows: Sequence[ResponseRow],
        held_out_rows: Sequence[ResponseRow],
        config: TrainingConfig,
        output: Path | str,
        *,
        announce: Callable[[dict[str, Any]], None] | None = None,
        decode: Callable[[DSparkDrafter], dict[str, Any]] | None = None,
        accelerator: Accelerator | None = None,
        fsdp: bool = False,
        identity: dict[str, Any] | None = None,
    ) -> None:
        if drafter.dtype == torch.float16:
            raise ValueError("the drafter is float16, where gradients underflow; allowed: bfloat16 or float32. Give dtype bf16 or fp32.")
        self.drafter, self.config, self.output, self.announce, self.decode = drafter, config, Path(output), announce, decode
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
        self.processes = Processes(accelerator or Accelerator(cpu=self.device.type == "cpu"), self.device)
        self.files = RunFolder(self.output, writes=self.processes.leads)
        self.objective = BlockObjective(drafter, target, chunk_positions=config.chunk_positions, states_memory_gib=config.states_memory_gib)
        self.objective.head.check(self.objective.states, torch.tensor([self.rows[0].prompt_ids[:8] + self.rows[0].response_ids[:8]]))
        self._fingerprint = self._identify({**drafter_identity(drafter), "decodes": decode is not None, **(identity or {})})
        if self.processes.count > 1:  # All start from the first one's weights.
            for tensor in drafter.state_dict().values():
                torch.distributed.broadcast(tensor, 0)
        self.sharded = fsdp or getattr(self.processes.accelerator.state, "fsdp_plugin", None) is not None
        if self.sharded:
            if adapter_names(drafter):
                raise ValueError("an adapter is too small to be sharded; leave FSDP out, and let every process hold it whole.")
            shard(self.objective)
        self.optimizer = MasterOptimizer(
            [p for p in self.objective.parameters() if p.requires_grad],
            kind=config.optimizer,
            matrices=[p for name, p in self.objective.named_parameters() if p.dim() == 2 and _BACKBONE_MATRIX.search(name)],
            weight_decay=config.weight_decay,
            resting=[p for name, p in self.objective.named_parameters() if "confidence_head" in name and not config.confidence],
            reduce=torch.distributed.all_reduce if self.processes.count > 1 and not self.sharded else None,
        )
        self.progress = Progress()
        self._started = time.monotonic()
        self._skipped = 0

    def batch_loss(self, batch: Batch, *, num_anchors: int, generator: torch.Generator, weights: LossWeights) -> LossResult:
        """Anchors, target states, drafter and loss of one whole batch; `.loss` carries the gradient."""
        self.objective.seconds_of = {}
        blocks = cut_blocks(batch, num_anchors=num_anchors, block_size=self.drafter.config.block_size, generator=generator)
        return self.objective(blocks, weights)[1]

    def generator(self, *parts: object) -> torch.Generator:
        """A generator that the seed and these parts decide, for instance `"anchors", step`."""
        digest = hashlib.sha256("/".join(map(str, (self.config.seed, *parts))).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def batch_at(self, step: int) -> Batch:
        """The training batch of a step, counted from 0."""
        epoch, index = divmod(step, self.batches_an_epoch)
        if self._epoch[0] != epoch:
            order = epoch_batches(self.lengths, batch_size=self.config.batch_size, seed=self.config.seed, epoch=epoch)
            self._epoch = (epoch, order)
        return collate([self.rows[i] for i in self._epoch[1][index]])

    def parts(self, rows: int) -> list[slice]:
        """This process's share of a step's rows, one slice for each accumulated part; a short step leaves some of them empty."""
        each = math.ceil(rows / (self.processes.count * self.config.accumulation))
        first = self.processes.index * self.config.accumulation
        starts = [min(rows, (first + i) * each) for i in range(self.config.accumulation)]
        return [slice(start, min(rows, start + each)) for start in starts]

    def step(self, fraction: float) -> dict[str, Any]:
        """One optimizer step at an elapsed share of the run; returns what the log records of it, nothing at steps that are not logged."""
        config, step, objective = self.config, self.progress.step, self.objective
        clock = time.perf_counter()
        objective.seconds_of = {"backward_s": 0.0}
        # Dropout, where there is any, is a function of the step too.
        torch.manual_seed(self.generator("dropout", step, self.processes.index).initial_seed())
        batch, gamma = self.batch_at(step), self.drafter.config.block_size
        blocks = cut_blocks(batch, num_anchors=config.num_anchors, block_size=gamma, generator=self.generator("anchors", step))
        weights = config.loss_weights_at(fraction)
        totals = weight_totals(blocks.targets, weights, objective.label_index)
        tally, losses = Tally(), {"loss": 0.0}
        logged = step % config.log_every == 0
        for rows in self.parts(len(batch.lengths)):
            part_loss, result = objective(blocks.part(rows), weights, totals)
            mark = time.perf_counter()
            # Shards take means over processes of what has to be added up.
            (part_loss * self.processes.count if self.sharded else part_loss).backward()
            self.optimizer.accumulate()
            objective.seconds_of["backward_s"] += time.perf_counter() - mark
            if logged:
                tally.merge(result.tally())
                for name, value in {"loss": result.loss.detach(), **result.terms}.items():
                    losses[name] = losses.get(name, 0.0) + float(value)
        # A step's learning rate is that of its middle: neither the first nor the last is 0.
        learning_rate = config.learning_rate_at(fraction if config.steps is None else (step + 0.5) / config.steps)
        norm = self.optimizer.step(learning_rate, config.clip)
        anchors = int(blocks.targets.position_mask[:, :, 0].sum())
        self.progress.step += 1
        self.progress.tokens += int(batch.lengths.sum())
        self.progress.anchors += anchors
        self._count_skips(norm)
        if not logged:
            return {}
        seconds = time.perf_counter() - clock
        sum_up = self.processes.sum
        loss, *terms = sum_up(torch.tensor(list(losses.values()), dtype=torch.float64)).tolist()
        return {
            "epoch": step // self.batches_an_epoch,
            "learning_rate": learning_rate,
            "loss": loss,
            "norm": norm,
            "anchors": anchors,
            "anchors_per_s": round(anchors / seconds, 1),
            "positions": int(blocks.targets.position_mask.sum()),
            "width": batch.input_ids.shape[1],
            "terms": {name: round(value, 5) for name, value in zip(list(losses)[1:], terms, strict=True)},
            "metrics": Tally({name: (sum_up(top), sum_up(bottom)) for name, (top, bottom) in tally.sums.items()}).values(),
            **{name: round(value, 4) for name, value in {**objective.seconds_of, "step_s": seconds}.items()},
        }

    def _count_skips(self, norm: float) -> None:
        if math.isfinite(norm):
            self._skipped = 0
            return
        self._skipped += 1
        self._log("skipped", norm=str(norm))
        if self._skipped == _SKIPS_IN_A_ROW:
            raise RuntimeError(
                f"the gradient was not finite in {self._skipped} steps in a row at step {self.progress.step}; allowed: finite. Lower the "
                f"learning rate, or start from an earlier checkpoint in {self.files.checkpoints}."
            )

    def seconds(self) -> float:
        """Wall-clock seconds of this run, earlier parts of a resumed run included."""
        return self.progress.seconds + time.monotonic() - self._started

    def fraction(self) -> float:
        """Elapsed share of the run, in [0, 1], the same in every process."""
        if self.config.steps is not None:
            return self.progress.step / self.config.steps
        assert self.config.minutes is not None
        return self.processes.agree(min(1.0, self.seconds() / (60 * self.config.minutes)))

    def train(self, *, stop_after: int | None = None) -> Progress:
        """Resume where the output folder stands, train to the end, evaluate, and save `best` and `final`. With `stop_after` it leaves after
        so many steps of this call, with a checkpoint, as an interrupted run would."""
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
            processes=self.processes.count,
            config=asdict(config),
        )
        if self._finished():
            return self.progress
        last_checkpoint = self.seconds()
        self.drafter.train()
        while (fraction := self.fraction()) < 1:
            if stop_after is not None and self.progress.step - begin >= stop_after:
                self.checkpoint()
                return self.progress
            record = self.step(fraction)
            if record:
                self._log_step(record)
            now = self.seconds()
            evaluation_due = now - self.progress.last_evaluation >= 60 * config.evaluation_minutes
            checkpoint_due = now - last_checkpoint >= 60 * config.checkpoint_minutes
            evaluation_due, checkpoint_due = self.processes.agree((evaluation_due, checkpoint_due))
            if evaluation_due and self.fraction() < 1:
                self._evaluate_and_save(config.evaluation_rows)
            if checkpoint_due:
                self.checkpoint()
                last_checkpoint = self.seconds()
        self._evaluate_and_save(len(self.held_out), closing=True)
        self._save("final")
        self.checkpoint()
        self._log("end", best_step=self.progress.best_step, best_score=self.progress.best_score)
        self.files.close()
        return self.progress

    def _finished(self) -> bool:
        """Whether the folder holds this run to its very end, so that running it again changes nothing."""
        curve = self.progress.curve
        evaluated = curve[-1]["step"] == self.progress.step if curve else not self.held_out
        ended = self.fraction() >= 1 and evaluated
        return self.processes.agree(ended and (self.output / "final").is_dir() and (self.output / "best").is_dir())

    def close(self) -> None:
        """Leave the process group, if there is one. Call it last in a process that was launched with others; training is over for it."""
        self.processes.leave()

    @torch.no_grad()
    def evaluate(self, rows: Sequence[ResponseRow]) -> dict[str, Any]:
        """Teacher-forced metrics on held-out rows, over all, per temperature and per domain and temperature. The anchors depend on the seed
        and the rows only, so two evaluations of the same rows compare the same blocks."""
        tallies: dict[str, Tally] = {}
        self.drafter.eval()
        weights = self.config.loss_weights_at(1.0)
        ordered, size = sorted(rows, key=len), self.config.batch_size
        for number, start in enumerate(range(0, len(ordered), size)):
            chunk = ordered[start : start + size]
            generator = self.generator("evaluation", number)
            result = self.batch_loss(collate(chunk), num_anchors=self.config.evaluation_anchors, generator=generator, weights=weights)
            keys = [("all", f"T={row.temperature:g}", f"{row.source} T={row.temperature:g}") for row in chunk]
            for key in {name for names in keys for name in names}:
                mine = torch.tensor([key in names for names in keys])
                tallies.setdefault(key, Tally()).merge(result.tally(mine))
        if self.sharded:
            cast(Any, self.objective).reshard()
        self.drafter.train()
        return {key: tally.values() for key, tally in sorted(tallies.items())}

    @staticmethod
    def score(metrics: dict[str, Any]) -> float | None:
        """What `best` maximises without real decoding: the mean over temperatures of tau_greedy (T = 0) or tau_sampled (T > 0)."""
        taus = [values["tau_greedy" if key == "T=0" else "tau_sampled"] for key, values in metrics.items() if key.startswith("T=")]
        known = [tau for tau in taus if tau is not None]
        return sum(known) / len(known) if known else None

    def _decoded(self) -> dict[str, Any] | None:
        """Figures of real decoding, made by the first process and sent to all."""
        if self.decode is None:
            return None
        figures = None
        weights = self._whole_weights()
        if self.processes.leads:
            drafter = self.drafter
            if weights is not None:
                drafter = type(drafter)(copy.deepcopy(drafter.config)).to(self.device, drafter.config.dtype)
                drafter.load_state_dict(weights)
                drafter.bind(self.objective.states.target)
            drafter.eval()
            figures = self.decode(drafter)
            drafter.train()
        return self.processes.agree(figures)

    def _evaluate_and_save(self, count: int, *, closing: bool = False) -> None:
        """Evaluate on so many held-out rows, and save the weights as `best` where they are."""
        decoded = self._decoded()
        if not self.held_out and decoded is None:
            if closing:
                self._save("best")
            return
        metrics = self.evaluate(self.held_out[:count]) if self.held_out else {}
        score = self.score(metrics)
        point = {
            "step": self.progress.step,
            "minutes": round(self.seconds() / 60, 3),
            "anchors": self.progress.anchors,
            "rows": min(count, len(self.held_out)),
            "score": score,
            **({} if decoded is None else {"decoded": decoded}),
        }
        summary = {key: values for key, values in metrics.items() if key == "all" or key.startswith("T=")}
        self.progress.curve.append({**point, **summary})
        self._log("evaluation", **point, closing=closing, metrics=metrics)
        self.files.scalars(flat_metrics("held_out", summary) | flat_metrics("decoded", decoded or {}), self.progress.step)
        if decoded is not None:
            score = decoded["tau"]
        elif closing and count > self.config.evaluation_rows:
            # The closing evaluation sees more rows, so its score is compared on the rows that the others saw.
            score = self.score(self.evaluate(self.held_out[: self.config.evaluation_rows]))
        best = self.progress.best_score
        if best is None or (score is not None and score >= best):
            self.progress.best_score, self.progress.best_step = score, self.progress.step
            self._save("best")
        self.progress.last_evaluation = self.seconds()

    def _log(self, event: str, **fields: Any) -> None:
        record = {"event": event, "step": self.progress.step, "seconds": round(self.seconds(), 2), **fields}
        self.files.log(record)
        if self.announce is not None and self.processes.leads:
            self.announce(record)

    def _log_step(self, record: dict[str, Any]) -> None:
        self._log("step", **record)
        names = ("loss", "norm", "learning_rate", "anchors_per_s")
        scalars = {f"train/{name}": record[name] for name in names} | {f"loss/{name}": value for name, value in record["terms"].items()}
        self.files.scalars(scalars | flat_metrics("train", record["metrics"]), self.progress.step)

    def _whole_weights(self) -> dict[str, Tensor] | None:
        """The drafter's state put together from its shards, in the first process; None where it is whole anyway."""
        if not self.sharded:
            return None
        found = {name: gathered(tensor.detach(), self.processes.leads) for name, tensor in self.drafter.state_dict().items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _save(self, name: str) -> None:
        """Write the drafter as the subfolder `name`."""
        self.files.save_drafter(self.drafter, name, self._whole_weights())
        self.processes.accelerator.wait_for_everyone()

    def _identify(self, identity: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint of this run belongs to. The rows are hashed here, once."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(repr((row.prompt_ids, row.response_ids, row.spans)).encode())
        config = {name: value for name, value in asdict(self.config).items() if name not in _NOT_OF_THE_RUN}
        return {**config, **identity, "rows": len(self.rows), "data": digest.hexdigest()}

    def checkpoint(self) -> Path:
        """Write `checkpoints/step-*` whole or not at all."""
        state = {
            "progress": {**asdict(self.progress), "seconds": self.seconds()},
            "fingerprint": self._fingerprint,
            "optimizer": self.optimizer.state_dict(keep=self.processes.leads),
            "buffers": {name: buffer.cpu() for name, buffer in self.drafter.named_buffers() if name == "d2t"},
        }
        path = self.files.save_checkpoint(self.progress.step, state)
        self.processes.accelerator.wait_for_everyone()
        return path

    def resume(self) -> bool:
        """Load the newest whole checkpoint of the output folder; False where there is none."""
        found = self.files.newest_checkpoint()
        step = -1 if found is None else found[1]["progress"]["step"]
        if self.processes.agree(step) != step:
            raise CheckpointError(
                f"process {self.processes.index} finds step {step} in {self.output}, the first one another; allowed: the same. "
                "Put the output on a file system that all of them share."
            )
        if found is None:
            return False
        path, state = found
        theirs = state["fingerprint"]
        if listed := differences(theirs, self._fingerprint, sorted(self._fingerprint.keys() | theirs.keys())):
            raise CheckpointError(f"{path} belongs to another run ({listed}); allowed: the same. Use another output folder.")
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        self._started = time.monotonic()
        return True
