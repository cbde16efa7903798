"""Lets the target answer prompts, and write prompts of its own: the data that its drafter learns from."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_dspark.errors import DataError
from hf_dspark.training.configuration import DataSettings
from hf_dspark.training.data_folder import ResponseFolder, target_fingerprint
from hf_dspark.training.dialogues import ChatTemplate, Dialogue, SelfPrompts
from hf_dspark.training.prompts import Prompt, digest, prompt_key
from hf_dspark.training.row_sampler import Request, RowSampler
from hf_dspark.utils.tokens import eos_token_ids

logger = logging.getLogger(__name__)

_SAVE_SECONDS = 30.0


def make_folder(path: Path, model: PreTrainedModel, template: ChatTemplate, settings: DataSettings, *, name: str) -> ResponseFolder:
    """The folder that a target's responses go to, not yet open; what its manifest says of target and sampling cannot change later."""
    identity = {
        "target": {
            "name": name,
            "revision": getattr(model.config, "_commit_hash", None),
            "fingerprint": target_fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "vocab_size": model.config.get_text_config(decoder=True).vocab_size,
            "template": digest(template.source),
        },
        "sampling": {
            "temperatures": list(settings.temperatures),
            "top_p": settings.top_p,
            "max_new_tokens": settings.max_new_tokens,
            "max_prompt_tokens": settings.max_prompt_tokens,
        },
        "seed": settings.seed,
        "thinking": settings.thinking,
        "held_out": settings.held_out,
    }
    return ResponseFolder(path, identity)


class ResponseMaker:
    """Answers prompts in batches whose places are refilled as rows finish, and writes each row to an open folder as it is done.

    `done` of `total` prompts are through (answered or skipped), by `tokens` tokens of this run, self-prompts included. A `DataError` says
    where the lengths do not fit the target.
    """

    def __init__(
        self, model: PreTrainedModel, template: ChatTemplate, settings: DataSettings, folder: ResponseFolder, *, batch_size: int
    ) -> None:
        self.model, self.template, self.settings, self.folder = model, template, settings, folder
        self.stop = frozenset(eos_token_ids(model, template.tokenizer))
        self.selves = SelfPrompts(template, settings, self.stop)
        longest = settings.max_prompt_tokens + settings.max_new_tokens
        positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise DataError(
                f"prompts of {settings.max_prompt_tokens} tokens and {settings.max_new_tokens} new ones make {longest}; allowed: up to the "
                f"target's {positions} positions. Lower --max-prompt-tokens or --max-new-tokens."
            )
        self.sampler = RowSampler(model, batch_size, longest)
        self.skipped: Counter[str] = Counter()  # of this run's files, found anew in every run
        self.done = self.total = self.tokens = 0
        self._todo: deque[Prompt | int] = deque()  # prompts of files, and numbers of self-prompts
        self._ready: deque[Request] = deque()
        self._keys: set[str] = set()
        self._excluded: frozenset[str] = frozenset()
        self._numbers: deque[int] = deque()  # of self-prompts that are not accepted or rejected yet
        self._written: dict[int, Request] = {}  # self-prompts that wait for those before them

    def run(
        self,
        prompts: Sequence[Prompt],
        *,
        excluded: frozenset[str] = frozenset(),
        minutes: float | None = None,
        on_round: Callable[[], None] | None = None,
    ) -> bool:
        """Answer what the folder does not hold yet.

        Args:
            prompts: out of files.
            excluded: keys (`prompt_key` of one turn) that must not be trained on.
            minutes (`float`, *optional*): stop by the clock; rows in flight are made again by the next run.
            on_round: called after every round.
        Returns:
            `bool`: True when everything is answered.
        Raises:
            DataError: where the disk is full, or a template does not fit.
        """
        self._plan(prompts, excluded)
        if any(isinstance(one, int) or one.text is None for one in self._todo):
            self.template.check()
        started = saved = time.monotonic()
        refill = max(1, self.sampler.places // 16)
        with torch.inference_mode(), self.sampler.target.open():
            while True:
                finished = self._fill() if self.sampler.free >= refill or not self.sampler.in_flight else []
                if self.sampler.in_flight:
                    self.tokens += self.sampler.in_flight
                    finished += self.sampler.round()
                for request in finished:
                    self._finish(request)
                if on_round is not None:
                    on_round()
                now = time.monotonic()
                done = not (self.sampler.in_flight or self._ready or self._todo)
                if done or (minutes is not None and now - started >= 60 * minutes):
                    break
                if now - saved >= _SAVE_SECONDS:
                    self.folder.save({"skipped": dict(self.skipped)})
                    saved = now
        self.folder.save({"skipped": dict(self.skipped)})
        return done

    def _plan(self, prompts: Sequence[Prompt], excluded: frozenset[str]) -> None:
        """Choose what is still to be answered, in an order that mixes the files and the self-prompts."""
        self._excluded = excluded
        done = {id.split(".")[0] for id in self.folder.keys} | set(self.folder.skips)
        self._keys = set(self.folder.keys.values())
        listed = (self._keys | self.folder.turn_keys) & excluded
        if listed:
            raise DataError(
                f"{self.folder.path} already holds {len(listed)} prompts that --exclude lists; they must not be trained on. "
                "Name another --output."
            )
        seen: set[str] = set()
        waiting: list[Prompt] = []
        for prompt in prompts:
            if prompt.id in seen:
                self._leave_out("duplicate", prompt)
            elif prompt.id in done:
                self.done += 1
            elif any(prompt_key([turn]) in excluded for turn in prompt.turns):
                self._leave_out("excluded", prompt)
            elif prompt.key in self._keys:
                self._leave_out("duplicate", prompt)
            else:
                waiting.append(prompt)
                self._keys.add(prompt.key)
            seen.add(prompt.id)
        waiting.sort(key=lambda prompt: digest(f"{self.settings.seed}/{prompt.id}"))
        count = self.settings.self_prompts
        self._numbers = deque(number for number in range(count) if self.selves.id(number) not in done)
        self.total = self.done + len(waiting) + count
        self.done += count - len(self._numbers)
        mixed: list[tuple[float, Prompt | int]] = [(i / len(waiting), prompt) for i, prompt in enumerate(waiting)]
        mixed += [(number / count, number) for number in self._numbers]
        self._todo = deque(one for _, one in sorted(mixed, key=lambda item: item[0]))

    def _fill(self) -> list[Request]:
        """Put requests into the free places: answers that are under way first, then what is to be begun."""
        requests: list[Request] = []
        while len(requests) < self.sampler.free and (self._ready or self._todo):
            if self._ready:
                requests.append(self._ready.popleft())
                continue
            one = self._todo.popleft()
            if isinstance(one, Prompt):
                self._answer(one)
            else:
                requests.append(self.selves.request(one))
        self.tokens += len(requests)
        return self.sampler.begin(requests) if requests else []

    def _answer(self, prompt: Prompt) -> None:
        """Queue the first answer to a prompt, if it is short enough."""
        s = self.settings
        temperature = s.temperatures[int(digest(f"{s.seed}/{prompt.id}/temperature"), 16) % len(s.temperatures)]
        dialogue = Dialogue(prompt, self.template, temperature)
        ids = dialogue.open()
        if ids and len(ids) <= s.max_prompt_tokens:
            self._queue(dialogue, ids, random.Random(f"{s.seed}/{prompt.id}"))
            return
        # A self-prompt would be written again only to be found too long.
        self._leave_out(f"prompt over {s.max_prompt_tokens} tokens" if ids else "empty prompt", prompt, forever=bool(prompt.name))
        self.done += 1

    def _queue(self, dialogue: Dialogue, ids: list[int], chance: random.Random) -> None:
        s = self.settings
        self._ready.append(Request(ids, s.max_new_tokens, self.stop, dialogue.temperature, s.top_p, chance, owner=dialogue))

    def _finish(self, request: Request) -> None:
        if not isinstance(request.owner, Dialogue):
            self._written[request.owner] = request
            self._resolve()
            return
        dialogue = request.owner
        if request.ended and len(request.tokens) == 1:
            # Nothing but the end: the turn has no answer, and what follows it no sense.
            if not dialogue.close():
                self._leave_out("empty response", dialogue.prompt, forever=True)
        else:
            ids = dialogue.take(request)
            if ids is not None and len(ids) <= self.settings.max_prompt_tokens:
                self._queue(dialogue, ids, request.random)
                return
            if ids is not None:
                logger.info("%s: later turns over %d tokens are left out", dialogue.prompt.id, self.settings.max_prompt_tokens)
            dialogue.close()
        if dialogue.records:
            self.folder.append(dialogue.records)
        self.done += 1

    def _resolve(self) -> None:
        """Accept or reject self-prompts in the order of their numbers, so that of two equal ones always the first becomes a row."""
        while self._numbers and self._numbers[0] in self._written:
            number = self._numbers.popleft()
            prompt, reason = self.selves.read(number, self._written.pop(number))
            if prompt is not None and prompt.key in self._excluded:
                reason = "self-prompt excluded"
            elif prompt is not None and prompt.key in self._keys:
                reason = "self-prompt duplicate"
            elif prompt is not None:
                self._keys.add(prompt.key)
                self._answer(prompt)
                continue
            self.folder.skip(self.selves.id(number), reason)
            self.done += 1

    def _leave_out(self, reason: str, prompt: Prompt, *, forever: bool = False) -> None:
        """Count a prompt without a row; `forever` where the folder has to remember that it was tried."""
        logger.info("%s %s: %r", prompt.source, reason, prompt.turns[0][:60])
        if forever:
            self.folder.skip(prompt.id, reason)
        else:
            self.skipped[reason] += 1
