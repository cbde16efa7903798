"""The decoding loop, the same for every batch size. Knows target, drafter and budget as they are handed in; knows no checkpoint, no Hub.

A round over the live rows, in the paper's symbols: draft x_1..x_gamma after each anchor x_0, decide l_r, verify [x_0, x_1..x_{l_r}] of all
rows in one flattened pass, accept, commit, roll back. Rows join by `join` and leave as they finish.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch

from hf_dspark.budgets.budget import Budget, Drafts, FinishedRound, LiveRows, Proposal
from hf_dspark.cache.kv_cache import RowCache, RowLayout
from hf_dspark.decoding.draft import draft_block
from hf_dspark.decoding.ngram_copy import Copies, Texts, weights_in_force
from hf_dspark.decoding.row_processors import RowProcessors, RowStopping, Sequences
from hf_dspark.decoding.sampling import draw
from hf_dspark.decoding.statistics import DecodingStats, RowStats, Stopwatch
from hf_dspark.decoding.verify import DEFAULT_VERIFICATION, DraftBlock, Verdict, accept_greedy, accept_sampled, check_verification
from hf_dspark.targets.target import Target

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


class RoundListener(Protocol):
    """Hears of every finished round, and may set the temperatures of the next.

    `temperatures` are T_1..T_gamma of the confidences; the checkpoint's where None. One with an attribute `wants_copies` that is true is
    told of copies too.
    """

    @property
    def temperatures(self) -> Sequence[float] | None: ...

    def learn(self, finished: FinishedRound) -> None: ...


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
        budget (`Budget`): decides what is drafted, and l_r; started.
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
        listener (`RoundListener`, *optional*): hears of rounds, with confidences, as they are over.
        copying (`bool`): draft what rows repeat too, where the checkpoint has weights for that.
        verification (`str`): how drawn tokens are judged, one of `VERIFICATIONS`.
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
        listener: RoundListener | None = None,
        copying: bool = True,
        verification: str = DEFAULT_VERIFICATION,
    ) -> None:
        check_verification(verification)
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
        self.listener = listener
        self.verification = verification
        self.live: list[int] = []
        self.anchors = torch.empty(0, dtype=torch.long, device=sequences.ids.device)
        self.stats = DecodingStats([RowStats.for_block(block_size) for _ in sequences.lengths], block_size)
        self.watch = Stopwatch(target.device)
        self.drafts = drafter is not None and budget.longest != 0
        self.copy_weights = weights_in_force(drafter.config, copying) if self.drafts else None
        self.texts = Texts(sequences.ids.device)
        self.with_confidence = budget.needs_confidence or listener is not None
        # Taps of committed tokens that the drafter has not read yet, by row: it catches up when it next drafts.
        self.unread: dict[int, list[torch.Tensor]] = {}
        self.unread_tokens = 0
        self._ended: float | None = None  # when the last round was over

    # ------------------------------------------------------------------------------------------------------------- one round

    def round(self) -> None:
        """Draft, budget, verify, accept, commit: paper section 2, DSPARK.md steps 2-8."""
        began, drafted_before = time.perf_counter(), self.watch.so_far("draft")
        waited = 0.0 if self._ended is None else began - self._ended
        starts = list(self.context.target.lengths)
        live = self.look()
        proposal = self.propose(live)
        block = self.draft(starts, proposal)
        confidence = block.confidence.cpu() if self.budget.needs_confidence and block.confidence is not None else None
        drafted, lengths = self.plan(proposal, live, confidence)
        raw, copied, block = block.confidence_logits, block.copied, block.truncate(max(lengths))
        layout = RowLayout(starts, [1 + length for length in lengths], self.anchors.device)
        ids = torch.cat([self.anchors[:, None], block.tokens], dim=1).flatten()[layout.flat_index]
        with self.watch.measure("verify"):
            logits, taps = self.target.forward(ids, layout, self.context.target)
        verdict, scores = self.accept(logits, block, layout)
        accepted, judged = self.commit(block, verdict, layout, scores, logits, taps, drafted)
        self.stats.rounds += 1
        # The device has been waited for, so a listener's copy of the confidences costs no wait of its own.
        raw = raw.cpu() if self.listener is not None and raw is not None else None
        copied = copied.cpu() if copied is not None and getattr(self.listener, "wants_copies", False) else None
        draft_s = None if drafted_before is None else (self.watch.so_far("draft") or 0.0) - drafted_before
        over = FinishedRound(
            live.requests, tuple(drafted), tuple(lengths), tuple(accepted), tuple(judged), confidence, raw,
            time.perf_counter() - began, draft_s, copied, waited,
        )  # fmt: skip
        self.budget.learn(over)
        if self.listener is not None:
            self.listener.learn(over)
        self._ended = time.perf_counter()

    def look(self) -> LiveRows:
        """The live rows as the budget sees them; a row's last token comes from the target itself, so it has room for one less."""
        gamma = self.block_size
        limits = [self.stopping.limit(row) for row in self.live]
        ends = zip(limits, self.live, strict=True)
        room = [gamma if limit is None else min(limit - self.sequences.lengths[row] - 1, gamma) for limit, row in ends]
        return LiveRows(tuple(self.live), gamma, tuple(room), max(self.context.target.lengths))

    def propose(self, live: LiveRows) -> Proposal:
        """What the budget wants drafted, checked."""
        if not self.drafts:
            return Proposal(0)
        proposal = self.budget.propose(live)
        rows = proposal.rows
        fits = rows is None or (len(rows) > 0 and rows[0] >= 0 and rows[-1] < len(live.room) and all(a < b for a, b in pairwise(rows)))
        if not 0 <= proposal.length <= self.block_size or not (fits or proposal.length == 0):
            raise ValueError(
                f"Budget {self.budget!r} proposed {proposal}; allowed are 0..{self.block_size} tokens for ascending rows out of "
                f"0..{len(live.room) - 1}, or for all with rows=None."
            )
        return proposal

    def draft(self, starts: list[int], proposal: Proposal) -> DraftBlock:
        """Steps 2-4 for the proposed rows; a record of all live rows."""
        if proposal.length == 0:
            return DraftBlock(self.anchors.new_empty(len(self.live), 0))
        rows = proposal.rows
        self.drafting = self.live if rows is None else [self.live[r] for r in rows]
        self.catch_up()
        with self.watch.measure("draft"):
            block = draft_block(
                self.drafter,
                self.anchors if rows is None else self.anchors[torch.tensor(rows, device=self.anchors.device)],
                starts if rows is None else [starts[r] for r in rows],
                self.context.drafter,
                length=proposal.length,
                sample=self.sample,
                process=self.process_draft if self.processors else None,
                with_confidence=self.with_confidence,
                generator=self.generator,
                row_ids=rows,
                temperatures=None if self.listener is None else self.listener.temperatures,
                copies=self.copies(rows, proposal.length),
                allow=self.allow_copies if self.processors and not self.processors.any_vocabulary else None,
            )
            return block if rows is None else block.among(rows, len(self.live))

    def copies(self, rows: Sequence[int] | None, length: int) -> Copies | None:
        """What the drafting rows would go on with if they repeated themselves."""
        if self.copy_weights is None:
            return None
        return Copies(self.texts, rows, self.copy_weights, length)

    def allow_copies(self, tokens: torch.Tensor, k: int) -> torch.Tensor:
        """Which copies at block position k the user's processors do not rule out; drafted tokens before it are pencilled in."""
        vocab = self.target.model.config.get_text_config(decoder=True).vocab_size
        return self.processors.allowed(tokens, vocab, self.sequences, [(row, k) for row in self.drafting])

    def plan(self, proposal: Proposal, live: LiveRows, confidence: torch.Tensor | None) -> tuple[list[int], list[int]]:
        """Step 5: what was drafted for each row, and l_r of it, never past what the row may still emit."""
        if proposal.length == 0:
            return [0] * len(self.live), [0] * len(self.live)
        chosen = None if proposal.rows is None else set(proposal.rows)
        drafted = [proposal.length if chosen is None or r in chosen else 0 for r in range(len(self.live))]
        limits = tuple(map(min, drafted, live.room))
        lengths = self.budget.plan(Drafts(limits, confidence, live))
        if len(lengths) != len(self.live) or not 0 <= min(lengths) <= max(lengths) <= proposal.length:
            raise ValueError(
                f"Budget {self.budget!r} planned {lengths} for {len(self.live)} rows; allowed are 0..{proposal.length}, one a row."
            )
        return drafted, list(map(min, lengths, limits))

    def accept(self, logits: torch.Tensor, block: DraftBlock, layout: RowLayout) -> tuple[Verdict, torch.Tensor]:
        """Step 7, on the target's distributions after the user's processors. Returns the processed scores `(T, V)` too."""
        if self.processors.needs_ids and block.block_size:
            for index, row in enumerate(self.live):
                self.sequences.pencil_in(row, block.tokens[index])
        scores = self.process(logits, [(row, j) for row, count in zip(self.live, layout.counts, strict=True) for j in range(count)])
        if self.sample:
            blockwise = self.verification == "block"
            return accept_sampled(scores.softmax(-1), block, layout, self.generator, blockwise=blockwise), scores
        return accept_greedy(scores.argmax(-1), block, layout), scores

    def commit(
        self,
        block: DraftBlock,
        verdict: Verdict,
        layout: RowLayout,
        scores: torch.Tensor,
        logits: torch.Tensor,
        taps: torch.Tensor,
        drafted: list[int],
    ) -> tuple[list[int], list[int]]:
        """Step 8: commit accepted tokens and their taps; everything else is forgotten with the round.

        Returns each row's accepted tokens, and how many of its verified ones were judged before its end.
        """
        padded = torch.cat([block.tokens, verdict.next_token[:, None]], dim=1)
        padded = padded.scatter(1, verdict.accepted[:, None], verdict.next_token[:, None])
        # The round's one wait for the device, beside a budget that reads confidences: whether p_t is sound, accepted counts, tokens.
        sound = self.sound(scores).expand(len(self.live), 1)
        host = torch.cat([sound, verdict.accepted[:, None], padded], dim=1).tolist()
        gone, counts, accepted_counts, judged = [], layout.counts, [], []
        kept_counts = []
        first = 0
        for index, row in enumerate(self.live):
            is_sound, accepted, *tokens = host[index]
            self.require_sound(is_sound)
            tokens = tokens[: accepted + 1]
            kept, ended = self.settle(row, tokens, padded[index], scores[first:], logits[first:])
            verified = counts[index] - 1
            self.stats.rows[row].count_round(drafted[index], verified, accepted, kept)
            self.context.target.lengths[index] += kept
            accepted_counts.append(min(accepted, kept))
            kept_counts.append(kept)
            judged.append(verified if kept > accepted else min(verified, kept))
            if self.drafts and (not ended or self.keep_context):
                self.unread.setdefault(row, []).append(taps[first : first + kept])
                self.unread_tokens += kept
            first += counts[index]
            if ended:
                gone.append(index)
        self.anchors = verdict.next_token
        if self.copy_weights is not None:
            self.texts.append(padded, kept_counts)
        self.context.drafter.lengths = list(self.context.target.lengths)
        self.leave(gone)
        if self.unread_tokens > self.prefill_tokens and self.live:
            self.catch_up()  # Taps of a long rest are not let pile up.
        return accepted_counts, judged

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
            for index, row in enumerate(self.drafting):
                self.sequences.pencil_in(row, tokens[-1][index : index + 1], k - 1)
        places = [(row, k) for row in self.drafting]
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

    def catch_up(self) -> None:
        """Hand the drafter the taps of the tokens that were committed since it last drafted."""
        places = [place for place, row in enumerate(self.live) if row in self.unread]
        if not places:
            return
        pieces = [self.unread[self.live[place]] for place in places]
        counts = [sum(map(len, of_row)) for of_row in pieces]
        starts = [self.context.drafter.lengths[place] - count for place, count in zip(places, counts, strict=True)]
        layout = RowLayout(starts, counts, self.anchors.device, row_ids=places)
        with self.watch.measure("draft"):
            self.drafter.extend_context(torch.cat([taps for of_row in pieces for taps in of_row]), layout, self.context.drafter)
        self.unread.clear()
        self.unread_tokens = 0

    def leave(self, gone: list[int]) -> None:
        """Rows that have ended leave, and their work with them."""
        if not gone:
            return
        if self.keep_context and len(gone) == len(self.live):
            self.catch_up()
            self.live = []  # Keys and values stay where they are, for the caller's next turn.
            return
        for place in gone:
            self.unread.pop(self.live[place], None)
        order = self.context.remove_rows(gone)
        if self.copy_weights is not None:
            self.texts.keep(order)
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
        if self.copy_weights is not None:
            texts = [torch.cat([prompt, token]) for prompt, token in zip(prompts, tokens[:, None], strict=True)]
            self.texts.join(texts, list(map(len, prompts)))
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
            if self.drafts:
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
