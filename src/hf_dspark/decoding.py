"""The decoding loop, the same for every batch size. Knows target, drafter and budget as they are handed in; knows no checkpoint, no Hub.

A round over the live rows, in the paper's symbols: draft x_1..x_gamma after each anchor x_0, decide l_r, verify [x_0, x_1..x_{l_r}] of all
rows in one flattened pass, accept, commit, roll back. Rows join by `join` and leave as they finish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .constraints import RowProcessors, RowStopping, Sequences
from .drafting import draft_block
from .row_cache import RowCache, RowLayout
from .sampling import draw
from .scheduling import Budget
from .statistics import DecodingStats, RowStats, Stopwatch
from .target import Target
from .verification import DraftBlock, Verdict, accept_greedy, accept_sampled

# Tokens of one prompt pass: enough to fill the machine, few enough to bound its memory.
PREFILL_TOKENS = 2048


@dataclass
class Context:
    """What is remembered of committed tokens: the target's and the drafter's keys and values of the same rows."""

    target: RowCache = field(default_factory=RowCache)
    drafter: RowCache = field(default_factory=RowCache)

    def add_rows(self, count: int) -> None:
        self.target.add_rows(count)
        self.drafter.add_rows(count)

    def commit(self, row: int, tokens: int) -> None:
        self.target.lengths[row] += tokens
        self.drafter.lengths[row] += tokens

    def remove_rows(self, gone: Sequence[int]) -> list[int]:
        self.drafter.remove_rows(gone)
        return self.target.remove_rows(gone)


@dataclass
class Recorder:
    """Scores and raw logits of emitted tokens, kept only where the caller asked."""

    scores: list[list[torch.Tensor]] | None = None
    logits: list[list[torch.Tensor]] | None = None

    def keep(self, row: int, kept: int, scores: torch.Tensor, logits: torch.Tensor) -> None:
        """Keep the first `kept` of a row's distributions, `(n, V)` each."""
        for store, values in ((self.scores, scores), (self.logits, logits)):
            if store is not None:
                # A copy, or every kept row would hold on to the whole round's distributions.
                store[row].extend(values[:kept].to(torch.float32, copy=True).unbind(0))


def prompt_passes(lengths: Sequence[int], known: int, limit: int) -> Iterator[tuple[range, list[int], list[int]]]:
    """Plan prompt passes of at most `limit` tokens: short prompts that follow each other share one, a long one is cut.

    Args:
        lengths (`list[int]`): tokens of each prompt.
        known (`int`): tokens of a single prompt that need not be read.
        limit (`int`): most tokens of one pass.
    Yields:
        the prompts of a pass, where it starts in each, and how many tokens of each it reads.
    """
    begin = 0
    while begin < len(lengths):
        end, total = begin + 1, lengths[begin] - known
        while end < len(lengths) and total + lengths[end] <= limit:
            total, end = total + lengths[end], end + 1
        if end > begin + 1:
            yield range(begin, end), [0] * (end - begin), list(lengths[begin:end])
        else:
            for start in range(known, lengths[begin], limit):
                yield range(begin, end), [start], [min(limit, lengths[begin] - start)]
        begin = end


class DecodingLoop:
    """Drafts and verifies for a set of live rows until each has ended.

    Args:
        target (`Target`): open.
        drafter (`DSparkDrafter`): bound to it; None decodes plainly, one token a row and round.
        budget (`Budget`): decides l_r.
        sequences (`Sequences`): the caller's batch, prompts committed.
        processors (`RowProcessors`), stopping (`RowStopping`): the user's rules.
        sample (`bool`): draw tokens; arg-max otherwise.
        block_size (`int`): gamma.
        prefill_tokens (`int`): most tokens of one prompt pass.
        generator (`torch.Generator`, *optional*): source of all randomness of this call.
        recorder (`Recorder`, *optional*): what to keep of scores and logits.
        emit (`Callable`, *optional*): called with the new tokens of a row as they are committed.
        context (`Context`, *optional*): what is remembered of the row's beginning, to go on from.
        keep_context (`bool`): leave the last row's keys and values in place when it ends, for the caller's next turn.
    """

    def __init__(
        self,
        target: Target,
        drafter: Any,
        budget: Budget,
        sequences: Sequences,
        processors: RowProcessors,
        stopping: RowStopping,
        *,
        sample: bool,
        block_size: int,
        prefill_tokens: int = PREFILL_TOKENS,
        generator: torch.Generator | None = None,
        recorder: Recorder | None = None,
        emit: Callable[[int, torch.Tensor], None] | None = None,
        context: Context | None = None,
        keep_context: bool = False,
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.budget = budget
        self.sequences = sequences
        self.processors = processors
        self.stopping = stopping
        self.sample = sample
        self.block_size = block_size
        self.prefill_tokens = prefill_tokens
        self.generator = generator
        self.recorder = recorder or Recorder()
        self.emit = emit
        self.context = context or Context()
        self.keep_context = keep_context
        self.live: list[int] = []
        self.anchors = torch.empty(0, dtype=torch.long, device=sequences.ids.device)
        self.stats = DecodingStats([RowStats.for_block(block_size) for _ in sequences.lengths], block_size)
        self.watch = Stopwatch(target.device)
        longest = getattr(budget, "longest", None)
        self.draft_length = 0 if drafter is None else min(block_size, block_size if longest is None else longest)

    # ------------------------------------------------------------------------------------------------------------- one round

    def round(self) -> None:
        """Draft, budget, verify, accept, commit: paper section 2, DSPARK.md steps 2-8."""
        starts = list(self.context.target.lengths)
        block = self.draft(starts)
        lengths = self.plan(block)
        block = block.truncate(max(lengths))
        layout = RowLayout(starts, [1 + length for length in lengths], self.anchors.device)
        ids = torch.cat([self.anchors[:, None], block.tokens], dim=1).flatten()[layout.flat_index]
        with self.watch.measure("verify"):
            logits, taps = self.target.forward(ids, layout, self.context.target)
        verdict, scores = self.accept(logits, block, layout)
        self.commit(block, verdict, layout, scores, logits, taps)
        self.stats.rounds += 1

    def draft(self, starts: list[int]) -> DraftBlock:
        """Steps 2-4 for all live rows."""
        if self.draft_length == 0:
            return DraftBlock(self.anchors.new_empty(len(self.live), 0))
        with self.watch.measure("draft"):
            return draft_block(
                self.drafter,
                self.anchors,
                starts,
                self.context.drafter,
                block_size=self.block_size,
                length=self.draft_length,
                sample=self.sample,
                process=self.process_draft if self.processors else None,
                with_confidence=self.budget.needs_confidence,
                generator=self.generator,
            )

    def plan(self, block: DraftBlock) -> list[int]:
        """Step 5: l_r, never past what the row may still emit (the last token comes from the target itself)."""
        drafted = block.block_size
        if drafted == 0:
            return [0] * len(self.live)
        confidence = None if block.confidence is None else block.confidence.cpu()
        lengths = self.budget.plan(confidence, len(self.live), drafted)
        if len(lengths) != len(self.live) or not 0 <= min(lengths) <= max(lengths) <= drafted:
            raise ValueError(f"Budget {self.budget!r} planned {lengths} for {len(self.live)} rows; allowed are 0..{drafted}, one a row.")
        limit = self.stopping.max_length
        if limit is not None:
            lengths = [min(n, limit - self.sequences.lengths[row] - 1) for n, row in zip(lengths, self.live, strict=True)]
        return lengths

    def accept(self, logits: torch.Tensor, block: DraftBlock, layout: RowLayout) -> tuple[Verdict, torch.Tensor]:
        """Step 7, on the target's distributions after the user's processors. Returns the processed scores `(T, V)` too."""
        if self.processors.needs_ids and block.block_size:
            for index, row in enumerate(self.live):
                self.sequences.pencil_in(row, block.tokens[index])
        scores = self.process(logits, [(row, j) for row, count in zip(self.live, layout.counts, strict=True) for j in range(count)])
        if self.sample:
            return accept_sampled(scores.softmax(-1), block, layout, self.generator), scores
        return accept_greedy(scores.argmax(-1), block, layout), scores

    def commit(
        self,
        block: DraftBlock,
        verdict: Verdict,
        layout: RowLayout,
        scores: torch.Tensor,
        logits: torch.Tensor,
        taps: torch.Tensor,
    ) -> None:
        """Step 8: commit accepted tokens and their taps; everything else is forgotten with the round."""
        padded = torch.cat([block.tokens, verdict.next_token[:, None]], dim=1)
        padded = padded.scatter(1, verdict.accepted[:, None], verdict.next_token[:, None])
        # The round's one wait for the device, beside a budget that reads confidences: whether p_t is sound, accepted counts, tokens.
        sound = self.sound(scores).expand(len(self.live), 1)
        host = torch.cat([sound, verdict.accepted[:, None], padded], dim=1).tolist()
        gone, kept_counts, next_index = [], [], []
        first = 0
        for index, row in enumerate(self.live):
            is_sound, accepted, *tokens = host[index]
            self.require_sound(is_sound)
            tokens = tokens[: accepted + 1]
            kept, ended = self.settle(row, tokens, padded[index], scores[first:], logits[first:])
            self.stats.rows[row].count_round(self.draft_length, layout.counts[index] - 1, accepted, kept)
            self.context.target.lengths[index] += kept
            kept_counts.append(kept)
            next_index.append(first)
            first += layout.counts[index]
            if ended:
                gone.append(index)
        self.anchors = verdict.next_token
        if len(gone) < len(self.live) or self.keep_context:
            self.remember(taps, layout, kept_counts, next_index)
        self.context.drafter.lengths = list(self.context.target.lengths)
        self.leave(gone)

    # ------------------------------------------------------------------------------------------------------- its smaller steps

    def process(self, logits: torch.Tensor, places: list[tuple[int, int]]) -> torch.Tensor:
        """The user's processors on the target's logits `(N, V)`; without any, the logits themselves."""
        if self.processors:
            return self.processors(logits.to(self.anchors.device, torch.float32, copy=True), self.sequences, places)
        return logits.to(self.anchors.device, torch.float32 if self.sample else None)

    def sound(self, scores: torch.Tensor) -> torch.Tensor:
        """One where every processed distribution of `scores` `(N, V)` can be drawn from, else zero; greedy choices need no check."""
        if not self.sample:
            return self.anchors.new_ones(1)
        return torch.isfinite(scores.amax(-1)).all().long()[None]

    def require_sound(self, sound: int) -> None:
        """Raise where plain `generate` would: a distribution that holds NaN or infinity, or nothing at all."""
        if not sound:
            raise RuntimeError(
                "The target's distribution after the logits processors holds NaN or infinity, or allows no token; there is nothing to draw "
                "from. Look at the target's dtype (float16 overflows) and at what the processors leave."
            )

    def process_draft(self, logits: torch.Tensor, k: int, tokens: list[torch.Tensor]) -> torch.Tensor:
        """The same processors on the drafter's logits `(R, V_draft)`, so that p_d resembles p_t.

        Losslessness does not depend on this: any p_d serves, as long as tokens are drawn from it.
        """
        if self.processors.needs_ids and k:
            for index, row in enumerate(self.live):
                self.sequences.pencil_in(row, tokens[-1][index : index + 1], k - 1)
        places = [(row, k) for row in self.live]
        if self.processors.any_vocabulary:
            processed = self.processors(logits.clone(), self.sequences, places)
        else:
            wide = self.drafter.widen(logits, fill=float("-inf")) if self.drafter.draft_token_ids is not None else logits.clone()
            processed = self.processors(wide, self.sequences, places)
            if self.drafter.draft_token_ids is not None:
                processed = processed[:, self.drafter.draft_token_ids]
        # Processors may leave the drafter nothing to say (a forced token outside its vocabulary): then it says what it would have.
        return torch.where(torch.isfinite(processed).any(-1, keepdim=True), processed, logits)

    def settle(self, row: int, tokens: list[int], ids: torch.Tensor, scores: torch.Tensor, logits: torch.Tensor) -> tuple[int, bool]:
        """Stop conditions over a row's new tokens; commit what remains. Returns how many remain and whether the row has ended."""
        new = ids[: len(tokens)]
        so_far = None
        if self.stopping.asks_others:
            self.sequences.pencil_in(row, new)
            if self.recorder.scores is not None:
                so_far = [*self.recorder.scores[row], *scores[: len(tokens)].float()]
        kept, ended = self.stopping.kept(tokens, self.sequences, row, so_far)
        self.sequences.append(row, new[:kept])
        self.recorder.keep(row, kept, scores, logits)
        self.stats.rows[row].generated += kept
        if self.emit is not None:
            self.emit(row, new[:kept])
        return kept, ended

    def remember(self, taps: torch.Tensor, layout: RowLayout, counts: list[int], first: list[int]) -> None:
        """Hand the committed tokens' taps to the drafter."""
        if self.drafter is None or self.draft_length == 0:
            return
        with self.watch.measure("draft"):
            committed = RowLayout(layout.starts, counts, layout.device, layout.first_row)
            if counts != layout.counts:
                index = torch.cat([torch.arange(f, f + n) for f, n in zip(first, counts, strict=True)])
                taps = taps[index.to(taps.device, non_blocking=True)]
            self.drafter.extend_context(taps, committed, self.context.drafter)

    def leave(self, gone: list[int]) -> None:
        """Rows that have ended leave, and their work with them."""
        if not gone:
            return
        if self.keep_context and len(gone) == len(self.live):
            self.live = []  # Keys and values stay where they are, for the caller's next turn.
            return
        order = self.context.remove_rows(gone)
        self.live = [self.live[old] for old in order]
        self.anchors = self.anchors[torch.tensor(order, dtype=torch.long, device=self.anchors.device)]

    # ------------------------------------------------------------------------------------------------------- joining and running

    def join(self, rows: Sequence[int], prompts: Sequence[torch.Tensor], known: int = 0) -> None:
        """Read prompts and emit each row's first token; the rows take part in rounds from then on.

        Args:
            rows (`list[int]`): numbers in the caller's batch.
            prompts (`list[torch.LongTensor]` of shape `(n_r,)`): without padding.
            known (`int`): tokens of a single prompt that the context already holds.
        """
        first_row = len(self.live)
        if not known:
            self.context.add_rows(len(rows))
        with self.watch.measure("prefill"):
            logits = self._read(prompts, first_row, known)
        self.live.extend(rows)
        scores = self.process(logits, [(row, 0) for row in rows])
        tokens = draw(scores.softmax(-1), self.generator) if self.sample else scores.argmax(-1)
        self.anchors = torch.cat([self.anchors, tokens])
        gone = []
        is_sound, *host = torch.cat([self.sound(scores), tokens]).tolist()
        self.require_sound(is_sound)
        for index, (row, token) in enumerate(zip(rows, host, strict=True)):
            _, ended = self.settle(row, [token], tokens[index : index + 1], scores[index : index + 1], logits[index : index + 1])
            if ended:
                gone.append(first_row + index)
        self.leave(gone)

    def _read(self, prompts: Sequence[torch.Tensor], first_row: int, known: int) -> torch.Tensor:
        """Read prompts into the context. Returns the logits after each row's last token, `(rows, V)`."""
        final: dict[int, torch.Tensor] = {}
        for group, starts, counts in prompt_passes([len(p) for p in prompts], known, self.prefill_tokens):
            ids = torch.cat([prompts[i][start : start + count] for i, start, count in zip(group, starts, counts, strict=True)])
            layout = RowLayout(starts, counts, ids.device, first_row + group.start)
            logits, taps = self.target.forward(ids, layout, self.context.target, only_last=True)
            if self.drafter is not None and self.draft_length:
                self.drafter.extend_context(taps, layout, self.context.drafter)
            for i, count in zip(group, counts, strict=True):
                self.context.commit(first_row + i, count)
            final[group.start] = logits  # A later piece of the same prompt replaces an earlier one's.
        return torch.cat(list(final.values()))

    def run(self) -> None:
        """Rounds until no row is left."""
        while self.live:
            self.round()
        for name, seconds in self.watch.read().items():
            setattr(self.stats, f"t_{name}_s", seconds)
