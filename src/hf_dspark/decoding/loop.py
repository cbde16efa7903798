"""The decoding loop, the same for every batch size.

A round over the live rows, in the paper's symbols: draft x_1..x_gamma after each anchor x_0, decide l_r, verify [x_0, x_1..x_{l_r}] of
all rows in one flattened pass, accept, commit, roll back. Rows join by `join` and leave as they finish.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

from hf_dspark.budgets.budget import Budget, FinishedRound, LiveRows, Proposal
from hf_dspark.cache.layout import RowLayout
from hf_dspark.decoding.batched_processors import Prefixes
from hf_dspark.decoding.compiled import CompiledRounds
from hf_dspark.decoding.draft import draft_block
from hf_dspark.decoding.ngram_copy import Copies, copy_weights_of
from hf_dspark.decoding.options import Options
from hf_dspark.decoding.plan import Heard, Plan
from hf_dspark.decoding.prefill import prefill
from hf_dspark.decoding.row_processors import DraftProcessors, RowProcessors
from hf_dspark.decoding.row_stopping import RowStopping
from hf_dspark.decoding.sampling import ELEMENTS_AT_ONCE, draw, uniform
from hf_dspark.decoding.state import FinishedRow, State
from hf_dspark.decoding.statistics import DecodingStats, Stopwatch
from hf_dspark.decoding.verify import Conclusion, DraftBlock, Verdict, accept_greedy, accept_sampled, conclude
from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.targets.target import Target
from hf_dspark.utils.graphs import Graphs


@dataclass
class Recorder:
    """Scores and raw logits of emitted tokens, by request, where the caller wants them."""

    scores: dict[int, list[torch.Tensor]] | None = None
    logits: dict[int, list[torch.Tensor]] | None = None

    def keep(self, request: int, kept: int, scores: torch.Tensor, logits: torch.Tensor) -> None:
        """Keep the first `kept` of a row's distributions, `(n, V)` each."""
        for store, values in ((self.scores, scores), (self.logits, logits)):
            if store is not None:
                # A copy, or every kept row would hold on to the whole round's distributions.
                store.setdefault(request, []).extend(values[:kept].to(torch.float32, copy=True).unbind(0))


@dataclass(frozen=True)
class Rules:
    """What one call applies to its rows beside the drafter and its options.

    Args:
        processors (`RowProcessors`), stopping (`RowStopping`): the user's.
        recorder (`Recorder`): what to keep of scores and logits.
        emit (`Callable`, *optional*): called with a request's number and its new tokens, 1-D, as they are committed.
        keep_context (`bool`): leave the caches of the last row in place when it ends, for the caller's next turn.
    """

    processors: RowProcessors
    stopping: RowStopping
    recorder: Recorder = field(default_factory=Recorder)
    emit: Callable[[int, torch.Tensor], None] | None = None
    keep_context: bool = False


def check_finite(finite: bool) -> None:
    """Raise where plain `generate` would: a distribution that holds NaN or infinity, or nothing at all.

    Raises:
        RuntimeError: if it is not `finite`.
    """
    if not finite:
        raise RuntimeError(
            "The target's distribution after the logits processors holds NaN or infinity, or allows no token; there is nothing to draw "
            "from. Look at the target's dtype (float16 overflows) and at what the processors leave."
        )


class DecodingLoop:
    """Drafts and verifies for a set of live rows until each has ended.

    Args:
        target (`Target`): open while rounds run.
        drafter (`DSparkDrafter`, *optional*): bound to it; None decodes plainly, one token a row and round.
        budget (`Budget`): started.
        options (`Options`): of the call; `block_size` set.
        rules (`Rules`): the user's processors, stopping criteria and what goes with them.
        state (`State`, *optional*): rows to go on with; none at first where None.
        graphs (`Graphs`, *optional*): of target and drafter, to run rounds with; eagerly where None.
        single_row (`bool`): there will never be more than one row; graphs of one row are made then.

    Attributes:
        state (`State`): the live rows.
        finished (`dict[int, FinishedRow]`): rows that have ended, by request.
        stats (`DecodingStats`), watch (`Stopwatch`): counts and times since they were last set.
    """

    def __init__(
        self,
        target: Target,
        drafter: DSparkDrafter | None,
        budget: Budget,
        options: Options,
        rules: Rules,
        state: State | None = None,
        graphs: Graphs | None = None,
        single_row: bool = False,
    ) -> None:
        self.target = target
        self.drafter = drafter if budget.longest != 0 else None
        self.budget = budget
        self.options = options
        self.rules = rules
        self.state = State(target.device) if state is None else state
        self.finished: dict[int, FinishedRow] = {}
        self.block_size = options.block_size or 1
        self.copy_weights = None if self.drafter is None else copy_weights_of(self.drafter.config, options.copying)
        self.callback = options.round_callback
        self.compiled = None
        if graphs is not None:
            records = rules.recorder.scores is not None or rules.recorder.logits is not None
            how = (target, self.drafter, options, rules.processors, rules.stopping, self.copy_weights)
            self.compiled = CompiledRounds(graphs, *how, records=records, single=single_row)
        self.start_clock()

    def start_clock(self) -> None:
        """Count rounds and times from here on."""
        self.stats, self.watch = DecodingStats(self.block_size), Stopwatch(self.target.device)

    # ----------------------------------------------------------------------------------------------------------------- one round

    def round(self) -> None:
        """Draft, budget, verify, accept, commit (paper section 2)."""
        began, drafted_s = time.perf_counter(), self.watch.so_far("draft")
        live = self.live_rows()
        proposal = self.propose(live)
        block = self.draft(proposal)
        plan = Plan.of(self.budget, proposal, live, block, on_device=self.rules.processors.sizes is not None)
        layout = plan.layout(self.state.context_lengths, block, self.state.device)
        judged = block.truncate(layout.max_count - 1)
        logits, hidden, layout = self.verify(judged, layout)
        conclusion, scores = self.conclude(logits, judged, layout, plan)
        heard = Heard.of(conclusion, layout, plan, block.confidence if self.budget.needs_confidence else None)
        heard = self.commit(conclusion, heard, plan, scores, logits, hidden)
        self.report(live, block, plan, heard, began, drafted_s)

    def live_rows(self) -> LiveRows:
        """The live rows as the budget sees them; a row's last token comes from the target itself, so it has room for one less."""
        state, gamma = self.state, self.block_size
        limits = [self.rules.stopping.limit(request) for request in state.requests]
        room = [gamma if limit is None else min(limit - length - 1, gamma) for limit, length in zip(limits, state.lengths, strict=True)]
        return LiveRows(tuple(state.requests), gamma, tuple(room), max(state.context_lengths))

    def propose(self, live: LiveRows) -> Proposal:
        """What the budget wants drafted, checked."""
        rules = self.rules
        if self.drafter is None or (rules.processors.in_order and rules.stopping.reads_text):
            return Proposal(0)  # where processors and criteria may keep a state, every token waits for the one before
        proposal = self.budget.propose(live)
        rows = proposal.rows
        fits = rows is None or (len(rows) > 0 and rows[0] >= 0 and rows[-1] < len(live.room) and all(a < b for a, b in pairwise(rows)))
        if not 0 <= proposal.length <= self.block_size or not (fits or proposal.length == 0):
            raise ValueError(
                f"Budget {self.budget!r} proposed {proposal}; allowed are 0..{self.block_size} tokens for ascending rows out of "
                f"0..{len(live.room) - 1}, or for all with rows=None."
            )
        return proposal

    def draft(self, proposal: Proposal) -> DraftBlock:
        """The proposed rows' blocks, in a record of all live rows."""
        state, rows = self.state, proposal.rows
        if proposal.length == 0 or self.drafter is None:
            return DraftBlock(state.anchors.new_empty(state.num_rows, 0))
        if self.compiled is not None:
            with self.watch.measure("draft"):
                compiled = self.compiled.draft(proposal, state)
            if compiled is not None:
                return compiled
        self.sync_drafter_cache()
        processors, starts = self.rules.processors, state.context_lengths
        with self.watch.measure("draft"):
            block = draft_block(
                self.drafter,
                state.anchors if rows is None else state.anchors[torch.tensor(rows, device=state.device)],
                starts if rows is None else [starts[r] for r in rows],
                state.drafter_cache,
                length=proposal.length,
                sample=self.options.sample,
                processors=DraftProcessors.of_rows(processors, state, rows, self.drafter, self.target.vocab_size, proposal.length),
                with_confidence=self.budget.needs_confidence or self.callback is not None,
                generator=self.options.generator,
                row_ids=rows,
                temperatures=None if self.callback is None else self.callback.temperatures,
                copies=None if self.copy_weights is None else Copies.of_rows(state, rows, self.copy_weights, proposal.length),
            )
            return block if rows is None else block.among(rows, state.num_rows)

    def verify(self, block: DraftBlock, layout: RowLayout) -> tuple[torch.Tensor, torch.Tensor, RowLayout]:
        """The target's pass over [x_0, x_1..x_{l_r}] of all rows: logits `(T, V)`, hidden states of the tapped layers `(T, taps *
        hidden)`, and the layout that they have: a compiled pass may hold more rows and longer ones.
        """
        with self.watch.measure("verify"):
            compiled = None if self.compiled is None else self.compiled.verify(block, layout, self.state)
            if compiled is not None:
                return compiled
            ids = torch.cat([self.state.anchors[:, None], block.tokens], dim=1).flatten()[layout.flat_index]
            return *self.target.forward(ids, layout, self.state.target_cache), layout

    def conclude(self, logits: torch.Tensor, block: DraftBlock, layout: RowLayout, plan: Plan) -> tuple[Conclusion, torch.Tensor]:
        """What stands of each row's block and where rows end, and the processed distributions `(T, V)`."""
        compiled = None if self.compiled is None else self.compiled.conclude(logits, block, layout, plan, self.state)
        if compiled is not None:
            return compiled, logits
        if self.rules.processors.needs_ids and block.block_size:
            self.state.write_draft(block.tokens)
        if self.rules.processors.in_order:
            verdict, scores = self.accept_in_order(logits, block)
            return self.concluded(block.tokens, verdict, scores.amax(-1)), scores
        return self.accept(logits, block, layout)

    def accept(self, logits: torch.Tensor, block: DraftBlock, layout: RowLayout) -> tuple[Conclusion, torch.Tensor]:
        """A conclusion by the target's distributions after the user's processors; over few rows at a time, unless somebody keeps the
        distributions, so that their memory is bounded. Then what is returned instead of them means nothing.
        """
        logits = logits.to(self.state.device)
        rows, scores, verdicts, best = layout.num_rows, logits, list[Verdict](), list[torch.Tensor]()
        whole = self.rules.recorder.scores is not None or not (self.options.sample or self.rules.processors)
        some = rows if whole else max(2 * ELEMENTS_AT_ONCE // (logits.shape[-1] * layout.max_count), 1)
        u = uniform((rows, block.block_size + 1), logits.device, self.options.generator) if self.options.sample else None
        for first in range(0, rows, some):
            end = min(first + some, rows)
            places, part = (slice(None), layout) if end - first == rows else layout.part(first, end)
            scores = self.process(logits[places], self.rules.processors.of_pass(self.state, part))
            own = block.part(first, end).truncate(part.max_count - 1)
            if u is None:
                verdicts.append(accept_greedy(scores.argmax(-1), own, part))
            else:
                best.append(scores.amax(-1))
                blockwise = self.options.verification == "block"
                verdicts.append(accept_sampled(scores.softmax(-1), own, part, u[first:end], blockwise=blockwise))
        return self.concluded(
            block.tokens, Verdict.of(verdicts), None if u is None else best[0] if len(best) == 1 else torch.cat(best)
        ), scores

    def commit(
        self,
        conclusion: Conclusion,
        heard: Heard,
        plan: Plan,
        scores: torch.Tensor,
        logits: torch.Tensor,
        hidden: torch.Tensor,
    ) -> Heard:
        """Commit accepted tokens and their hidden states; everything else is scratch from here on. What remains of the rows is returned."""
        spans = [slice(first, first + 1 + length) for first, length in zip(heard.firsts, heard.verified, strict=True)]
        heard = self.settle(conclusion, heard, [(scores[span], logits[span]) for span in spans])
        self.stats.count_round(self.state.requests, plan.drafted, heard.verified, heard.accepted, heard.kept)
        gone = [place for place, over in enumerate(heard.ended) if over]
        if self.drafter is not None:
            for place, (first, count) in enumerate(zip(heard.firsts, heard.kept, strict=True)):
                if not heard.ended[place] or self.rules.keep_context:
                    self.state.add_pending(place, hidden[first : first + count])
        self.leave(gone)
        if sum(self.state.pending_counts) > self.options.prefill_tokens and self.state.num_rows:
            self.sync_drafter_cache()  # Hidden states of a long stretch without drafts do not pile up.
        return heard

    def report(self, live: LiveRows, block: DraftBlock, plan: Plan, heard: Heard, began: float, drafted_s: float | None) -> None:
        """Tell budget and callback of the round that is over, and how long it took."""
        raw = features = None
        if self.callback is not None and block.confidence_logits is not None:
            raw = block.confidence_logits.cpu().clone()  # the device has been waited for already
            if block.copied is not None and self.callback.wants_copy_features:
                features = block.copied.features().cpu()
        over = FinishedRound(
            requests=live.requests,
            drafted=tuple(plan.drafted),
            verified=tuple(heard.verified),
            accepted=tuple(map(min, heard.accepted, heard.kept)),
            judged=tuple(v if k > a else min(v, k) for v, a, k in zip(heard.verified, heard.accepted, heard.kept, strict=True)),
            confidence=heard.confidence,
            confidence_logits=raw,
            copy_features=features,
            seconds=time.perf_counter() - began,
            draft_seconds=None if drafted_s is None else (self.watch.so_far("draft") or 0.0) - drafted_s,
        )
        self.budget.learn(over)
        if self.callback is not None:
            self.callback.on_round_end(over)

    # ------------------------------------------------------------------------------------------------------------ its smaller steps

    def process(self, logits: torch.Tensor, prefixes: Prefixes) -> torch.Tensor:
        """The user's processors on the target's logits `(N, V)` behind these texts; without any, the logits themselves."""
        if processors := self.rules.processors:
            values = processors.values(self.state.requests, self.state.device)
            return processors(logits.to(self.state.device, torch.float32), prefixes, values)
        return logits.to(self.state.device, torch.float32 if self.options.sample else None)

    def accept_in_order(self, logits: torch.Tensor, block: DraftBlock) -> tuple[Verdict, torch.Tensor]:
        """A verdict over one row whose processors may keep state, and its distributions: each processor is called once for every token that
        stands, as in a plain call.

        The target's token is drawn, and the draft goes on as long as it holds the same one.
        """
        scores, tokens = list[torch.Tensor](), list[torch.Tensor]()
        for j in range(len(logits)):
            scores.append(self.process(logits[j : j + 1], self.rules.processors.prefixes(self.state, [0], [j])))
            tokens.append(self.choose(scores[j]))
            last = self.concluded(tokens[j].new_empty(1, 0), Verdict(torch.zeros_like(tokens[j]), tokens[j]), None, past=j).host[0, 2]
            stands = j < block.block_size and torch.equal(tokens[j], block.tokens[:, j])
            if int(last) <= 0 or not stands:
                break
        # Behind a drafted token that ends the row any other may stand.
        return Verdict(accepted=torch.full_like(tokens[0], j + stands), next_token=tokens[-1]), torch.cat(scores)

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """The target's own tokens `(N,)` from processed distributions `(N, V)`: drawn, or the arg-max."""
        if not self.options.sample:
            return scores.argmax(-1)
        return draw(scores.softmax(-1), uniform((len(scores),), scores.device, self.options.generator))

    def concluded(self, drafted: torch.Tensor, verdict: Verdict, best: torch.Tensor | None, first: int = 0, past: int = 0) -> Conclusion:
        """Of the rows from place `first` on, `past` tokens behind their committed ones; arguments as in `decoding.verify.conclude`."""
        stopping, device = self.rules.stopping, self.state.device
        room = torch.tensor([n - past for n in stopping.room(self.state, first, past + drafted.shape[1] + 2)]).to(device, non_blocking=True)
        return conclude(drafted, verdict, best if self.options.sample else None, room, stopping.eos_on(device))

    def settle(self, conclusion: Conclusion, heard: Heard, pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], first: int = 0) -> Heard:
        """The user's criteria over what the host has heard of the rows from place `first` on; what remains is committed, recorded and
        emitted.

        Args:
            conclusion (`Conclusion`), heard (`Heard`): of these rows.
            pieces (`list`): scores and logits of each row, from its first new token on.
            first (`int`): 0, or the first of the rows that have just joined.
        """
        state, stopping, tokens = self.state, self.rules.stopping, conclusion.tokens
        check_finite(heard.finite)
        kept, ended = list(heard.kept), list(heard.ended)
        if stopping.reads_text:
            state.write_draft(tokens, first)
            known = self.rules.recorder.scores
            for row, (row_scores, _) in enumerate(pieces):
                count, place = kept[row], first + row
                so_far = None if known is None else [*known.get(state.requests[place], []), *row_scores[:count].float()]
                kept[row], over = stopping.kept_of_text(place, count, state, so_far)
                ended[row] = over or (ended[row] and kept[row] == count)
        for row, (request, count) in enumerate(zip(state.requests[first:], kept, strict=True)):
            self.stats.of(request).generated += count
            self.rules.recorder.keep(request, count, *pieces[row])
            if self.rules.emit is not None:
                self.rules.emit(request, tokens[row, :count])
        state.commit(tokens, kept, conclusion.next_token, first)
        return replace(heard, kept=kept, ended=ended)

    def sync_drafter_cache(self) -> None:
        """Let the drafter read the hidden states of the tokens that were committed since it last drafted."""
        pending = self.state.pending_layout()
        if pending is None or self.drafter is None:
            return
        with self.watch.measure("draft"), torch.inference_mode():
            self.drafter.extend_context(*pending, self.state.drafter_cache)
        self.state.clear_pending()

    def leave(self, gone: Sequence[int]) -> None:
        """Rows that have ended leave, and their work with them."""
        if not gone:
            return
        self.finished.update((row.request, row) for row in self.state.finish(gone))
        if self.rules.keep_context and len(gone) == self.state.num_rows:
            self.sync_drafter_cache()
        self.state.remove_rows(gone)

    # ------------------------------------------------------------------------------------------------------- joining and running

    def join(
        self,
        requests: Sequence[int],
        texts: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor] | None = None,
        known: int = 0,
    ) -> None:
        """Read prompts and emit each row's first token; the rows take part in rounds from then on.

        Args:
            requests (`Sequence[int]`): their numbers; no live row has one of them.
            texts (`list[torch.LongTensor]` of shapes `(n_r,)`): prompts as the caller sees them.
            masks (`list[torch.BoolTensor]` of shapes `(n_r,)`, *optional*): false at tokens that do not exist for the target.
            known (`int`): tokens of a single prompt that the state's caches already hold.
        """
        state, first = self.state, self.state.num_rows
        state.add_rows(requests, texts, masks)
        prompts = list(texts) if masks is None else [text[mask] for text, mask in zip(texts, masks, strict=True)]
        with self.watch.measure("prefill"):
            logits = prefill(self.target, self.drafter, state, prompts, first, known, self.options.prefill_tokens)
        joined = range(first, state.num_rows)
        scores = self.process(logits, self.rules.processors.prefixes(state, joined, [0] * len(joined)))
        tokens = self.choose(scores)
        pieces = [(scores[i : i + 1], logits[i : i + 1]) for i in range(len(tokens))]
        conclusion = self.concluded(tokens.new_empty(len(tokens), 0), Verdict(torch.zeros_like(tokens), tokens), scores.amax(-1), first)
        none = [0] * len(tokens)
        heard = Heard.of(conclusion, RowLayout(none, [1] * len(tokens), state.device), Plan(none, none, none, 0), None)
        heard = self.settle(conclusion, heard, pieces, first)
        self.leave([place for place, over in enumerate(heard.ended, first) if over])

    def run(self) -> None:
        """Rounds until no row is left."""
        while self.state.num_rows:
            self.round()
        self.stats.set_times(self.watch.read())
