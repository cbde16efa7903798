"""What the target is prompted with, turn by turn, and what becomes of its answers: the rows of one prompt, and prompts of its own."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_dspark.errors import DataError
from hf_dspark.training.configuration import SHORTEST_SELF_PROMPT, DataSettings, Opening
from hf_dspark.training.prompts import Message, Prompt, digest, prompt_key
from hf_dspark.training.row_sampler import Request


class ChatTemplate:
    """A tokenizer's chat template; without one, only raw text can be encoded. `thinking` is passed on where the template reads it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, thinking: bool = False) -> None:
        self.tokenizer = tokenizer
        self.source: str = tokenizer.chat_template or ""
        self.name = str(getattr(tokenizer, "name_or_path", "")) or type(tokenizer).__name__
        self._options = {"enable_thinking": thinking} if "enable_thinking" in self.source else {}

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """The text of a conversation, up to where the target's answer begins; a `DataError` if there is no template, or it refuses it."""
        from jinja2.exceptions import TemplateError

        if not self.source:
            raise DataError(
                f'the tokenizer {self.name!r} has no chat template, so turns cannot be put to it; give prompts as {{"text": "raw text"}}, '
                "or a tokenizer with a chat template."
            )
        how = {"tokenize": False, "add_generation_prompt": generation_prompt, **self._options}
        try:
            return self.tokenizer.apply_chat_template(list(messages), **how)
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise DataError(f"the template of {self.name!r} refuses the roles {roles}: {error}. Change or remove such rows.") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text, which has its special tokens written out."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_raw(self, text: str) -> list[int]:
        """Token ids of a raw text, with the special tokens that the tokenizer puts in front."""
        ids = list(self.tokenizer(text)["input_ids"])
        end = self.tokenizer.eos_token_id
        return ids[:-1] if len(ids) > 1 and ids[-1] == end else ids  # A text that is to be continued has not ended.

    def check(self) -> None:
        """Refuse a template that does not open the answer with a `DataError`."""
        question, answer = [{"role": "user", "content": "question"}], "an-answer"
        opened = self.render(question)
        whole = self.render([*question, {"role": "assistant", "content": answer}], generation_prompt=False)
        opens = whole.partition(answer)[0].rstrip() == opened.rstrip()
        if not opens and opened == self.render(question, generation_prompt=False):
            raise DataError(
                f"the chat template of the tokenizer {self.name!r} has no generation prompt: with add_generation_prompt=True it does not "
                'open the answer. Mend its template, or give prompts as {"text": "raw text"}.'
            )

    def user_turn(self, system: str | None) -> tuple[str, str]:
        """What stands in front of the user's first turn, and what ends it."""
        mark = "the-turn-of-the-user"
        messages = [{"role": "system", "content": system}] if system else []
        before, _, after = self.render([*messages, {"role": "user", "content": mark}], generation_prompt=False).partition(mark)
        return before, after


class Dialogue:
    """One prompt on its way through the target, turn by turn.

    The ids that the target generated stay as they are: the next turn's text is appended to them. Where the template writes past answers
    otherwise than it opened them (without their thinking, say), that is impossible, and the next turn begins a row of its own.
    """

    def __init__(self, prompt: Prompt, template: ChatTemplate, temperature: float) -> None:
        self.prompt, self.template, self.temperature = prompt, template, temperature
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
            self._marked, self._real = list(self.prompt.segments[0]), list(self.prompt.segments[0])
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
        mark, segment = f"the-answer-number-{self._turn}-stands-here", self.prompt.segments[self._turn]
        answer = self.template.tokenizer.decode(request.tokens, skip_special_tokens=True)
        self._marked += [{"role": "assistant", "content": mark}, *segment]
        self._real += [{"role": "assistant", "content": answer}, *segment]
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
            # Where later turns are rows of their own, the prompt that the conversation began with decides the side of all in the split.
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


class SelfPrompts:
    """Prompts that the target writes, by number. A number and the seed decide everything about one of them.

    The template up to the start of the user's turn makes an aligned model write that turn. Source: Magpie, arXiv 2406.08464.
    `stop` holds the ids that end a text.
    """

    def __init__(self, template: ChatTemplate, settings: DataSettings, stop: frozenset[int]) -> None:
        self.template, self.settings, self._stop = template, settings, stop
        recipe = [settings.seed, settings.self_temperature, settings.self_tokens, [asdict(opening) for opening in settings.openings]]
        self.name = "self-" + digest(json.dumps(recipe), 8)
        self._special = frozenset(template.tokenizer.all_special_ids)

    def id(self, number: int) -> str:
        return f"{self.name}-{number}"

    def opening(self, number: int) -> Opening:
        """The opening that a number has drawn."""
        choice = random.Random(f"{self.id(number)}/opening")
        return choice.choices(self.settings.openings, [opening.weight for opening in self.settings.openings])[0]

    def request(self, number: int) -> Request:
        """What makes the target write prompt `number`."""
        opening = self.opening(number)
        before, after = self.template.user_turn(opening.system)
        return Request(
            self.template.encode(before + opening.begin),
            self.settings.self_tokens,
            self._stop | self._special.intersection(self.template.encode(after)[:1]),
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
        if (self._special | self._stop) & set(ids):
            return None, "self-prompt with special tokens"
        text = (opening.begin + self.template.tokenizer.decode(ids)).strip()
        if len(ids) < SHORTEST_SELF_PROMPT or len(text) < 8:
            return None, "self-prompt too short"
        return Prompt(opening.source, (("user", text),), name=self.id(number)), ""
