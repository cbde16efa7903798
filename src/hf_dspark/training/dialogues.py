"""What the target is asked, turn by turn, and what becomes of its answers: the rows of one prompt, and prompts of its own. Knows chat
templates and requests; knows no model and no files.

Source of self-prompting: Magpie, arXiv 2406.08464: the template up to the start of the user's turn makes an aligned model write that turn.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, dataclass
from typing import Any

from hf_dspark.errors import DataError
from hf_dspark.training.conversations import ChatTemplate, Message, Opening, Prompt, prompt_key
from hf_dspark.training.row_sampler import Request

_SHORTEST_PROMPT = 3  # tokens that a self-prompt must add to its opening


@dataclass(frozen=True)
class DataSettings:
    """How responses are made. All of it but the counts stays the same for a folder's life.

    Args:
        temperatures (`tuple[float, ...]`): each prompt gets one, by a hash of its id; 0 is greedy.
        top_p (`float`): nucleus, in (0, 1].
        max_new_tokens (`int`): tokens of one response at most.
        max_prompt_tokens (`int`): longer prompts are skipped.
        seed (`int`): with a row's id, the source of all its randomness.
        thinking (`bool`): let the template switch thinking on, where it can.
        held_out (`float`): share of prompts that are never trained on.
        self_prompts (`int`): prompts that the target writes itself.
        self_temperature (`float`): at which it writes them.
        self_tokens (`int`): tokens of one of them at most; longer ones are cut off, and rejected.
        openings (`tuple[Opening, ...]`): how they begin.
    Raises:
        DataError: for a value outside its range.
    """

    temperatures: tuple[float, ...] = (0.0,)
    top_p: float = 1.0
    max_new_tokens: int = 256
    max_prompt_tokens: int = 768
    seed: int = 0
    thinking: bool = False
    held_out: float = 0.04
    self_prompts: int = 0
    self_temperature: float = 0.8
    self_tokens: int = 96
    openings: tuple[Opening, ...] = (Opening(),)

    def __post_init__(self) -> None:
        ranges = [
            ("temperatures", self.temperatures, all(0 <= t < float("inf") for t in self.temperatures) and self.temperatures, "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more"),
            ("max_prompt_tokens", self.max_prompt_tokens, self.max_prompt_tokens >= 1, "1 or more"),
            ("held_out", self.held_out, 0 <= self.held_out < 1, "0 up to, not including, 1"),
            ("self_prompts", self.self_prompts, self.self_prompts >= 0, "0 or more"),
            ("self_temperature", self.self_temperature, 0 < self.self_temperature < float("inf"), "above 0"),
            ("self_tokens", self.self_tokens, self.self_tokens > _SHORTEST_PROMPT, f"above {_SHORTEST_PROMPT}"),
            ("openings", self.openings, bool(self.openings), "one or more"),
        ]
        for name, value, fine, allowed in ranges:
            if not fine:
                raise DataError(f"{name} is {value}; allowed: {allowed}. Correct the option.")


# ---------------------------------------------------------------------------------------------------------- one conversation


class Dialogue:
    """One prompt on its way through the target, turn by turn.

    The ids that the target generated stay as they are: the next turn's text is put behind them. Where the template writes past answers
    otherwise than it opened them (without their thinking, say), that cannot be, and the next turn begins a row of its own.
    """

    def __init__(self, prompt: Prompt, template: ChatTemplate, temperature: float) -> None:
        self.prompt = prompt
        self.template = template
        self.temperature = temperature
        self.records: list[dict[str, Any]] = []
        self.ids: list[int] = []
        self.spans: list[list[int]] = []
        self.ended = False
        self._turn = 0
        self._text = ""
        self._marked: list[Message] = []  # with marks in place of the answers
        self._real: list[Message] = []

    def open(self) -> list[int]:
        """The ids in front of the first answer."""
        if self.prompt.text is not None:
            self.ids = self.template.encode_raw(self.prompt.text)
        else:
            self._marked = list(self.prompt.segments[0])
            self._real = list(self._marked)
            self._text = self.template.render(self._marked)
            self.ids = self.template.encode(self._text)
        return self.ids

    def take(self, request: Request) -> list[int] | None:
        """Take one answer; returns the ids in front of the next one, None where there is none."""
        self.spans.append([len(self.ids), len(self.ids) + len(request.tokens)])
        self.ids = self.ids + request.tokens
        self.ended = request.ended
        self._turn += 1
        if self.prompt.text is not None or self._turn >= len(self.prompt.segments):
            return None
        mark = f"the-answer-number-{self._turn}-stands-here"
        tokenizer = self.template.tokenizer
        segment = self.prompt.segments[self._turn]
        self._marked += [{"role": "assistant", "content": mark}, *segment]
        self._real += [{"role": "assistant", "content": tokenizer.decode(request.tokens, skip_special_tokens=True)}, *segment]
        opened, self._text = self._text + mark, self.template.render(self._marked)
        if self._text.startswith(opened):
            between = self.template.encode(self._text[len(opened) :])
            if request.ended and request.tokens[-1] in between[:3]:
                between = between[between.index(request.tokens[-1]) + 1 :]  # The answer brought its own end.
            self.ids = self.ids + between
        else:
            self.close()
            self.ids, self.spans = self.template.encode(self.template.render(self._real)), []
        return self.ids

    def close(self) -> list[dict[str, Any]]:
        """Finish the row; returns all rows of this prompt."""
        if self.spans:
            part = f".{len(self.records)}" if self.records else ""
            # Where later turns are rows of their own, all are told by the prompt that the conversation began with.
            extra: dict[str, Any] = {"opening": self.records[0]["ids"][: self.records[0]["spans"][0][0]]} if self.records else {}
            if len(self.prompt.turns) > 1:
                extra["turn_keys"] = [prompt_key([turn]) for turn in self.prompt.turns]
            self.records.append(
                {
                    "id": self.prompt.id + part,
                    "source": self.prompt.source,
                    "temperature": self.temperature,
                    "ended": self.ended,
                    "ids": self.ids[: self.spans[-1][1]],
                    "spans": self.spans,
                    "key": self.prompt.key,
                    **extra,
                }
            )
        return self.records


# ------------------------------------------------------------------------------------------------------------ self-prompting


class SelfPrompts:
    """Prompts that the target writes, by number. A number and the seed decide everything about one of them.

    Args:
        template (`ChatTemplate`): of the target.
        settings (`DataSettings`): count, openings, temperature.
        stop (`frozenset[int]`): ids that end a text.
    """

    def __init__(self, template: ChatTemplate, settings: DataSettings, stop: frozenset[int]) -> None:
        self.template = template
        self.settings = settings
        recipe = [settings.seed, settings.self_temperature, settings.self_tokens, [asdict(opening) for opening in settings.openings]]
        self.name = "self-" + hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]
        self.special = frozenset(template.tokenizer.all_special_ids) | stop
        self._fronts: dict[str | None, tuple[str, frozenset[int]]] = {}
        self._stop = stop

    def id(self, number: int) -> str:
        return f"{self.name}-{number}"

    def opening(self, number: int) -> Opening:
        """The opening that a number has drawn."""
        choice = random.Random(f"{self.id(number)}/opening")
        return choice.choices(self.settings.openings, [opening.weight for opening in self.settings.openings])[0]

    def request(self, number: int) -> Request:
        """What makes the target write prompt `number`."""
        opening = self.opening(number)
        front, stop = self._front(opening.system)
        return Request(
            self.template.encode(front + opening.begin),
            self.settings.self_tokens,
            stop,
            self.settings.self_temperature,
            1.0,
            random.Random(f"{self.id(number)}/prompt"),
            owner=number,
        )

    def read(self, number: int, request: Request) -> tuple[Prompt | None, str]:
        """The prompt that came out, or None and why it is rejected."""
        opening = self.opening(number)
        if not request.ended:
            return None, "self-prompt cut off"
        ids = request.tokens[:-1]
        if self.special & set(ids):
            return None, "self-prompt with special tokens"
        text = (opening.begin + self.template.tokenizer.decode(ids)).strip()
        if len(ids) < _SHORTEST_PROMPT or len(text) < 8:
            return None, "self-prompt too short"
        return Prompt(opening.source, (("user", text),), name=self.id(number)), ""

    def _front(self, system: str | None) -> tuple[str, frozenset[int]]:
        if system not in self._fronts:
            before, after = self.template.user_turn(system)
            ends = [i for i in self.template.encode(after)[:1] if i in self.template.tokenizer.all_special_ids]
            self._fronts[system] = before, self._stop | frozenset(ends)
        return self._fronts[system]
