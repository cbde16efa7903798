"""From cut blocks to a loss: the target's states, the drafter, the objective, as one module whose forward uses every weight, so that it can
be sharded. Does not know optimizers, schedules, files or the loop."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_dspark.errors import UnsupportedTargetError
from hf_dspark.training.blocks import BlockTargets
from hf_dspark.training.data import Batch
from hf_dspark.training.losses import LossResult, LossWeights, TargetHead, TargetProbabilities, dspark_loss
from hf_dspark.training.states import TargetStates


@dataclass(frozen=True)
class Blocks:
    """A batch with its anchors drawn and its blocks cut: everything of a step that no model is needed for.

    Args:
        batch (`Batch`): rows of the step.
        anchor_positions, anchor_valid (`torch.Tensor` of shape `(batch, anchors)`): from `sample_anchors`.
        targets (`BlockTargets`): labels, previous tokens, masks.
    """

    batch: Batch
    anchor_positions: Tensor
    anchor_valid: Tensor
    targets: BlockTargets

    def part(self, rows: slice) -> Blocks:
        """The blocks of some rows; of the first row without any supervised position where the slice is empty, so that every process runs
        the same passes."""
        empty = rows.start >= rows.stop
        rows = slice(0, 1) if empty else rows
        t = self.targets
        mask = torch.zeros_like(t.position_mask[rows]) if empty else t.position_mask[rows]
        batch = self.batch
        width = int(batch.lengths[rows].max())
        return Blocks(
            Batch(batch.input_ids[rows, :width], batch.loss_mask[rows, :width], batch.lengths[rows], batch.rows[rows]),
            self.anchor_positions[rows],
            self.anchor_valid[rows],
            BlockTargets(t.target_ids[rows], t.prev_ids[rows], t.target_index[rows], mask),
        )


class BlockObjective(nn.Module):
    """The loss of blocks under a drafter and its frozen target. The target is no submodule: it is neither saved nor sharded with this.

    Args:
        drafter (`DSparkDrafter`): bound to the target.
        target (`transformers.PreTrainedModel`): frozen.
        chunk_positions (`int`): block positions whose logits exist at one time.
        states_memory_gib (`float`): see `TargetStates`.
    Attributes:
        seconds_of (`dict[str, float]`): where the time of the calls since it was last emptied went.
        label_index (`torch.Tensor` of shape `(vocab,)` or None): draft index of each target id, -1 where it has none.
    """

    def __init__(self, drafter: Any, target: Any, *, chunk_positions: int, states_memory_gib: float = 0.0) -> None:
        super().__init__()
        self.drafter = drafter
        self.chunk_positions = chunk_positions
        self.device = next(drafter.parameters()).device
        self.states = TargetStates(target, drafter.config.target_layer_ids, memory_gib=states_memory_gib)
        ids = drafter.draft_token_ids
        text_config = target.config.get_text_config(decoder=True)
        self.head = TargetHead(target.get_output_embeddings(), ids, softcap=getattr(text_config, "final_logit_softcapping", None))
        self.label_index: Tensor | None = None
        if ids is not None:
            self.label_index = torch.full((text_config.vocab_size,), -1, dtype=torch.long, device=self.device)
            self.label_index[ids] = torch.arange(ids.numel(), device=self.device)
        self.seconds_of: dict[str, float] = {}

    def forward(self, blocks: Blocks, weights: LossWeights, totals: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, LossResult]:
        """Taps, drafter and loss of some rows' blocks.

        Args:
            blocks (`Blocks`): of a whole step, or a part of it.
            weights (`LossWeights`): coefficients.
            totals (*optional*): `weight_totals` of the whole step, where the blocks are a part.
        Returns:
            the loss, which carries the gradient, and the whole result.
        """
        marks = [time.perf_counter()]
        batch, targets, device = blocks.batch, blocks.targets, self.device
        taps, last = self.states.of_batch(batch.input_ids, batch.lengths)
        marks.append(time.perf_counter())
        positions, prev_ids = blocks.anchor_positions.to(device), targets.prev_ids.to(device)
        hidden = self.drafter.training_hidden(taps.to(device), batch.input_ids.to(device).gather(1, positions), positions)
        head = self.drafter.markov_head
        latent = None if head is None else head.block(prev_ids, hidden)
        confidence = self.drafter.confidence(hidden, prev_ids)
        marks.append(time.perf_counter())
        result = dspark_loss(
            hidden=hidden,
            latent=latent,
            confidence_logits=confidence,
            target_ids=targets.target_ids.to(device),
            target_index=targets.target_index.to(device),
            position_mask=targets.position_mask.to(device),
            target_hidden=last,
            draft_logits=self._draft_logits,
            target=self._target_probabilities,
            weights=weights,
            parameters=[] if head is None else [p for p in head.markov_w2.parameters() if p.requires_grad],
            label_index=self.label_index,
            chunk_positions=self.chunk_positions,
            totals=totals,
        )
        marks.append(time.perf_counter())
        for name, (a, b) in zip(("target_s", "backbone_s", "loss_s"), itertools.pairwise(marks), strict=True):
            self.seconds_of[name] = self.seconds_of.get(name, 0.0) + b - a
        return result.loss, result

    def _draft_logits(self, hidden: Tensor, latent: Tensor | None) -> Tensor:
        base = self.drafter.base_logits(hidden)
        return base if latent is None else base + self.drafter.markov_head.project(latent)

    def _target_probabilities(self, hidden: Tensor) -> TargetProbabilities:
        found = self.head(hidden.to(self.states.device))
        if self.states.device == self.device:
            return found
        return TargetProbabilities(found.inside.to(self.device), found.outside.to(self.device), found.best.to(self.device))

    def check_head(self, ids: Tensor) -> None:
        """Refuse a target whose logits are not its lm_head on its last hidden states.

        Args:
            ids (`torch.LongTensor` of shape `(1, n)`): any tokens.
        Raises:
            UnsupportedTargetError: telling by how much they differ.
        """
        _, last = self.states(ids)
        target = self.states.target
        with torch.inference_mode():
            was_training = target.training
            target.eval()
            expected = target(input_ids=ids.to(self.states.device), use_cache=False).logits[0].float().softmax(dim=-1)
            target.train(was_training)
        found = self.head(last[0])
        draft_ids = self.drafter.draft_token_ids
        draft = expected if draft_ids is None else expected[:, draft_ids.to(expected.device)]
        error = float((draft - found.inside).abs().max())
        if not error < 0.02:
            raise UnsupportedTargetError(
                f"the target's lm_head on its last hidden states differs from its own logits by {error:.3g} in probability; allowed: "
                "below 0.02. This target changes its logits after the head in a way the trainer does not know: extend TargetHead."
            )
