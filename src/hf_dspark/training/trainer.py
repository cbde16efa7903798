"""The training loop: frozen target in, trained drafter out, resumable, over one process or several. Does not know decoding, the Hub, or
recipes."""

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
from accelerate.utils import broadcast_object_list
from torch import Tensor

from hf_dspark.adapters.lora import adapter_names
from hf_dspark.errors import CheckpointError
from hf_dspark.training.blocks import block_targets, sample_anchors
from hf_dspark.training.configuration import TrainingConfig
from hf_dspark.training.data import Batch, ResponseRow, can_train, collate, epoch_batches, ordered_batches
from hf_dspark.training.files import RunFolder, flat_metrics
from hf_dspark.training.identity import drafter_identity
from hf_dspark.training.losses import LossResult, LossWeights, Tally, weight_totals
from hf_dspark.training.objective import BlockObjective, Blocks
from hf_dspark.training.optimizer import MasterOptimizer
from hf_dspark.training.sharding import gathered, leave, shard

_SKIPS_IN_A_ROW = 10
_CADENCE = {
    "checkpoint_minutes",
    "evaluation_minutes",
    "evaluation_rows",
    "evaluation_anchors",
    "log_every",
    "chunk_positions",
    "states_memory_gib",
}
# How a step's rows are shared out changes rounding, not the run.
_SHARING = {"accumulation"}


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


# Of the whole drafter, adapters left out: their thin matrices are AdamW's.
_BACKBONE_MATRIX = re.compile(r"(^|\.)(fc|layers\.\d+\.(self_attn|mlp)\.\w+_proj)\.weight$")


class Trainer:
    """Trains a bound drafter on responses of its frozen target.

    MTP-1 (block_size 1) and DFlash (markov_rank 0) are configurations of the drafter, not other code. Batches, anchors
    and schedule are functions of (seed, step), so a checkpoint needs no data state beyond the step.

    Several processes (`accelerate launch`) share the rows of each step. Every process cuts the blocks of the whole step and divides its
    share by the whole step's weights, so that the gradients add up to those of one process, whatever the number of processes and
    accumulated parts.

    Files under `output`: `log.jsonl` (one event a line), `tensorboard/`, `checkpoints/step-*` (the last two, resumable after a kill at
    any moment), `best` and `final` (drafters for `from_pretrained`).

    Args:
        drafter (`DSparkDrafter`): bound to the target, in the dtype to compute in (bfloat16 on CPUs with bf16 units).
        target (`transformers.PreTrainedModel`): frozen; never written to.
        train_rows, held_out_rows: from `split_rows`; rows too short to hold an anchor are left out.
        config (`TrainingConfig`): hyper-parameters.
        output (`Path`): folder; created when missing. A checkpoint found in it is resumed.
        announce (`Callable`): receives each event as a dictionary, besides the log file.
        decode (`Callable`, *optional*): called at every evaluation with the drafter; returns figures of real decoding as
            a dictionary, of which `tau` decides which weights are the best. Without it the teacher-forced estimate does.
        accelerator (`accelerate.Accelerator`, *optional*): default: one of the launched processes.
        fsdp (`bool`): shard the drafter's weights, gradients and optimizer state over the processes; also on where
            `accelerate launch --use_fsdp` says so.
        identity (`dict`, *optional*): what else must be the same when a checkpoint is resumed, as JSON takes it.
    Raises:
        ValueError: if no training row holds an anchor, the drafter is float16, an adapter is to be sharded, or drafter
            and process have different devices.
        UnsupportedTargetError: if the target's head does not reproduce the target's own logits.
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
        decode: Callable[[Any], dict[str, Any]] | None = None,
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
        self.accelerator = accelerator or Accelerator(cpu=self.device.type == "cpu")
        self.files = RunFolder(self.output, writes=self.accelerator.is_main_process)
        self.objective = BlockObjective(drafter, target, chunk_positions=config.chunk_positions, states_memory_gib=config.states_memory_gib)
        self.states = self.objective.states
        self.objective.check_head(torch.tensor([self.rows[0].prompt_ids[:8] + self.rows[0].response_ids[:8]]))
        self.processes = self.accelerator.num_processes
        self._identity = {**drafter_identity(drafter), "decodes": decode is not None, **(identity or {})}
        if self.processes > 1:
            self._join_processes()
        self.sharded = fsdp or getattr(self.accelerator.state, "fsdp_plugin", None) is not None
        if self.sharded:
            if adapter_names(drafter):
                raise ValueError("an adapter is too small to be sharded; leave FSDP out, and let every process hold it whole.")
            shard(self.objective)
        self.optimizer = MasterOptimizer(
            [p for p in self.objective.parameters() if p.requires_grad],
            kind=config.optimizer,
            matrices=[p for name, p in self.objective.named_parameters() if p.dim() == 2 and _BACKBONE_MATRIX.search(name)],
            weight_decay=config.weight_decay,
            reduce=torch.distributed.all_reduce if self.processes > 1 and not self.sharded else None,
        )
        self.progress = Progress()
        self._started = time.monotonic()
        self._skipped = 0

    def _join_processes(self) -> None:
        """Start every process from the first one's weights; refuse one that is not on its own device."""
        if self.device.type != self.accelerator.device.type or (self.device.index or 0) != (self.accelerator.device.index or 0):
            raise ValueError(
                f"the drafter is on {self.device}, its process's own device is {self.accelerator.device}; allowed: the same. Leave "
                "--device at auto under accelerate launch."
            )
        for tensor in self.drafter.state_dict().values():
            torch.distributed.broadcast(tensor, 0)

    # -- one step -------------------------------------------------------------------------------------------------

    def blocks(self, batch: Batch, *, num_anchors: int, generator: torch.Generator) -> Blocks:
        """Draw a batch's anchors and cut its blocks."""
        positions, valid = sample_anchors(batch.loss_mask, batch.lengths, num_anchors, generator)
        size = self.drafter.config.block_size
        targets = block_targets(batch.input_ids, batch.loss_mask, batch.lengths, positions, valid, size)
        return Blocks(batch, positions, valid, targets)

    def batch_loss(self, batch: Batch, *, num_anchors: int, generator: torch.Generator, weights: LossWeights) -> LossResult:
        """Anchors, taps, drafter and loss of one whole batch; `.loss` carries the gradient."""
        self.objective.seconds_of = {}
        return self.objective(self.blocks(batch, num_anchors=num_anchors, generator=generator), weights)[1]

    @property
    def seconds_of(self) -> dict[str, float]:
        """Seconds of the last batch or step, by stage."""
        return self.objective.seconds_of

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

    def parts(self, rows: int) -> list[slice]:
        """This process's share of a step's rows, one slice for each accumulated part; a short step leaves some of them empty."""
        count = self.processes * self.config.accumulation
        each = math.ceil(rows / count)
        first = self.accelerator.process_index * self.config.accumulation
        starts = [min(rows, (first + i) * each) for i in range(self.config.accumulation)]
        return [slice(start, min(rows, start + each)) for start in starts]

    def step(self, fraction: float) -> dict[str, Any]:
        """One optimizer step; returns what the log wants to know of it.

        Args:
            fraction (`float`): elapsed share of the run, from which the schedules follow.
        """
        config, step = self.config, self.progress.step
        clock = time.perf_counter()
        self.objective.seconds_of = {}
        # Dropout, where there is any, is a function of the step too.
        torch.manual_seed(self._generator("dropout", step, self.accelerator.process_index).initial_seed())
        batch = self.batch_at(step)
        blocks = self.blocks(batch, num_anchors=config.num_anchors, generator=self._generator("anchors", step))
        weights = config.loss_weights_at(fraction)
        targets = blocks.targets
        totals = weight_totals(targets.target_ids, targets.position_mask, weights, self.objective.label_index)
        loss, backward_s, tally = 0.0, 0.0, Tally()
        terms: dict[str, float] = {}
        wants_log = step % config.log_every == 0
        for rows in self.parts(len(batch.rows)):
            part_loss, result = self.objective(blocks.part(rows), weights, totals)
            mark = time.perf_counter()
            # Shards take means over processes of what has to be added up.
            (part_loss * self.processes if self.sharded else part_loss).backward()
            self.optimizer.accumulate()
            backward_s += time.perf_counter() - mark
            if wants_log:
                loss += float(result.loss.detach())
                tally.merge(result.tally())
                terms = {name: terms.get(name, 0.0) + float(value) for name, value in result.terms.items()}
        # A step's learning rate is that of its middle: neither the first nor the last is 0.
        learning_rate = config.learning_rate_at(fraction if config.steps is None else (step + 0.5) / config.steps)
        norm = self.optimizer.step(learning_rate, config.clip)
        self.progress.step += 1
        self.progress.tokens += int(batch.lengths.sum())
        anchors = int(targets.position_mask[:, :, 0].sum())
        self.progress.anchors += anchors
        self._count_skips(norm)
        if not wants_log:
            return {}
        seconds = time.perf_counter() - clock
        sums = self._sum([loss, *terms.values()])
        return {
            "epoch": step // self.batches_an_epoch,
            "learning_rate": learning_rate,
            "loss": sums[0],
            "norm": norm,
            "anchors": anchors,
            "anchors_per_s": round(anchors / seconds, 1),
            "positions": int(targets.position_mask.sum()),
            "width": batch.input_ids.shape[1],
            "terms": {name: round(value, 5) for name, value in zip(terms, sums[1:], strict=True)},
            "metrics": self._merge(tally).values(),
            **{name: round(value, 4) for name, value in {**self.seconds_of, "backward_s": backward_s, "step_s": seconds}.items()},
        }

    def _sum(self, values: list[float]) -> list[float]:
        """Sums of these numbers over all processes."""
        if self.processes == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        return self.accelerator.reduce(total.to(self.accelerator.device), reduction="sum").tolist()

    def _merge(self, tally: Tally) -> Tally:
        """The tally of all processes."""
        if self.processes == 1:
            return tally
        total = Tally()
        for name, pair in tally.sums.items():
            top, bottom = (self.accelerator.reduce(t.to(self.accelerator.device), reduction="sum").cpu() for t in pair)
            total.add(name, top, bottom)
        return total

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

    # -- the loop -------------------------------------------------------------------------------------------------

    def seconds(self) -> float:
        """Wall-clock seconds of this run, earlier parts of a resumed run included."""
        return self.progress.seconds + time.monotonic() - self._started

    def fraction(self) -> float:
        """Elapsed share of the run, in [0, 1], the same in every process."""
        if self.config.steps is not None:
            return self.progress.step / self.config.steps
        return self._agree(min(1.0, self.seconds() / (60 * self.config.minutes)))  # type: ignore[operator]

    def _agree(self, value: Any) -> Any:
        """The first process's value in all processes: their clocks differ."""
        if self.processes == 1:
            return value
        return broadcast_object_list([value])[0]

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
            processes=self.processes,
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
            due = self._agree(
                (
                    self.seconds() - self.progress.last_evaluation >= 60 * config.evaluation_minutes,
                    self.seconds() - last_checkpoint >= 60 * config.checkpoint_minutes,
                )
            )
            if due[0] and self.fraction() < 1:
                self._evaluate_and_keep(config.evaluation_rows)
            if due[1]:
                self.checkpoint()
                last_checkpoint = self.seconds()
        self._evaluate_and_keep(len(self.held_out), closing=True)
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
        return bool(self._agree(ended and (self.output / "final").is_dir() and (self.output / "best").is_dir()))

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
        """Figures of real decoding, made by the first process and known to all."""
        if self.decode is None:
            return None
        figures = None
        weights = self._whole_weights()
        if self.accelerator.is_main_process:
            drafter = self.drafter if weights is None else self._copy_with(weights)
            drafter.eval()
            figures = self.decode(drafter)
            drafter.train()
        return self._agree(figures)

    def _evaluate_and_keep(self, count: int, *, closing: bool = False) -> None:
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
        kept = {key: values for key, values in metrics.items() if key == "all" or key.startswith("T=")}
        self.progress.curve.append({**point, **kept})
        self._log("evaluation", **point, closing=closing, metrics=metrics)
        self._log_evaluation(metrics, decoded)
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

    def close(self) -> None:
        """Leave the process group, if there is one. Call it last in a process that was launched with others; training is over for it."""
        leave(self.accelerator)

    # -- files ----------------------------------------------------------------------------------------------------

    def _log(self, event: str, **fields: Any) -> None:
        record = {"event": event, "step": self.progress.step, "seconds": round(self.seconds(), 2), **fields}
        self.files.log(record)
        if self.announce is not None and self.accelerator.is_main_process:
            self.announce(record)

    def _log_step(self, record: dict[str, Any]) -> None:
        self._log("step", **record)
        names = ("loss", "norm", "learning_rate", "anchors_per_s")
        scalars = {f"train/{name}": record[name] for name in names} | {f"loss/{name}": value for name, value in record["terms"].items()}
        self.files.scalars(scalars | flat_metrics("train", record["metrics"]), self.progress.step)

    def _log_evaluation(self, metrics: dict[str, Any], decoded: dict[str, Any] | None) -> None:
        scalars: dict[str, float] = {}
        for key, values in metrics.items():
            if key == "all" or key.startswith("T="):
                scalars |= flat_metrics(f"held_out/{key}", values)
        if decoded is not None:
            scalars |= flat_metrics("decoded", decoded)
        self.files.scalars(scalars, self.progress.step)

    def _whole_weights(self) -> dict[str, Tensor] | None:
        """The drafter's state put together from its shards, in the first process; None where it is whole anyway."""
        if not self.sharded:
            return None
        keep = self.accelerator.is_main_process
        found = {name: gathered(tensor.detach(), keep) for name, tensor in self.drafter.state_dict().items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _copy_with(self, weights: dict[str, Tensor]) -> Any:
        """An unsharded drafter with these weights, bound to the same target."""
        copied = type(self.drafter)(copy.deepcopy(self.drafter.config)).to(self.device, self.drafter.config.dtype)
        copied.load_state_dict(weights)
        return copied.bind(self.states.target)

    def _save(self, name: str) -> None:
        """Write the drafter as the subfolder `name`."""
        self.files.save_drafter(self.drafter, name, self._whole_weights())
        self.accelerator.wait_for_everyone()

    def _fingerprint(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(repr((row.prompt_ids, row.response_ids, row.spans)).encode())
        config = {name: value for name, value in asdict(self.config).items() if name not in _CADENCE | _SHARING}
        return {**config, **self._identity, "rows": len(self.rows), "data": digest.hexdigest()}

    def checkpoint(self) -> Path:
        """Write `checkpoints/step-*` whole or not at all."""
        state = {
            "progress": {**asdict(self.progress), "seconds": self.seconds()},
            "fingerprint": self._fingerprint(),
            "optimizer": self.optimizer.state_dict(keep=self.accelerator.is_main_process),
            "buffers": {name: buffer.cpu() for name, buffer in self.drafter.named_buffers() if name == "d2t"},
        }
        path = self.files.save_checkpoint(self.progress.step, state)
        self.accelerator.wait_for_everyone()
        return path

    def resume(self) -> bool:
        """Load the newest whole checkpoint of the output folder; False where there is none."""
        found = self.files.newest_checkpoint()
        step = -1 if found is None else found[1]["progress"]["step"]
        if self._agree(step) != step:
            raise CheckpointError(
                f"process {self.accelerator.process_index} finds step {step} in {self.output}, the first one another; allowed: the same. "
                "Put the output on a file system that all of them share."
            )
        if found is None:
            return False
        path, state = found
        mine, theirs = self._fingerprint(), state["fingerprint"]
        differing = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        if differing:
            listed = ", ".join(f"{name} {theirs.get(name)!r} there, {mine.get(name)!r} here" for name in differing)
            raise CheckpointError(f"{path} belongs to another run ({listed}); allowed: the same. Use another output folder.")
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        self._started = time.monotonic()
        return True
