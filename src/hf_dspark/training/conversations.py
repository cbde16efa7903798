"""Prompts to be answered: conversations and raw beginnings out of files or Hub data sets, and chat templates around them. Knows text and
tokenizers; knows no model and no generation."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from hf_dspark.errors import DataError
from hf_dspark.training.rows import read_records

_SHAPES = '{"turns": ["text", ..]}, {"prompt": "text"}, {"messages": [{"role": "user", "content": "text"}, ..]} or {"text": "raw text"}'
_ROLES = ("system", "developer", "user")
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """What the target is to answer.

    Args:
        source (`str`): domain, for grouping.
        messages (`tuple[tuple[str, str], ...]`): role and content, without answers; every turn of the user is answered in its place.
        text (`str`, *optional*): instead of messages, a raw beginning that is continued without a chat template.
        name (`str`): the id of its row; default a digest of the content.
    """

    source: str
    messages: tuple[tuple[str, str], ...] = ()
    text: str | None = None
    name: str = ""

    @cached_property
    def id(self) -> str:
        """The same for the same content in every file and run."""
        if self.name:
            return self.name
        return hashlib.sha256(json.dumps([self.text, self.messages]).encode()).hexdigest()[:20]

    @cached_property
    def turns(self) -> tuple[str, ...]:
        """The texts that the user wrote."""
        return (self.text,) if self.text is not None else tuple(content for role, content in self.messages if role == "user")

    @cached_property
    def key(self) -> str:
        """Equal for prompts that differ in case and white space only."""
        return prompt_key(self.turns)

    @cached_property
    def segments(self) -> list[list[Message]]:
        """The messages in front of each answer."""
        found: list[list[Message]] = []
        waiting: list[Message] = []
        for role, content in self.messages:
            waiting.append({"role": role, "content": content})
            if role == "user":
                found.append(waiting)
                waiting = []
        return found


def prompt_key(turns: Iterable[str]) -> str:
    """A digest of the turns of a user, normalised."""
    texts = [" ".join(unicodedata.normalize("NFKC", turn).casefold().split()) for turn in turns]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------- reading prompts


def read_prompts(name: str, limit: int | None = None) -> list[Prompt]:
    """Read the prompts of one file or Hub data set.

    Args:
        name (`str`): a file `*.jsonl`, `*.jsonl.gz` or `*.parquet`, or the id of a data set on the Hub, `owner/name` or `owner/name:split`.
        limit (`int`, *optional*): rows to read at most, from the top.
    Returns:
        `list[Prompt]`: their source is the row's own `source`, else the file's name without its ending.
    Raises:
        DataError: if there is no such file, it holds nothing, or a row is malformed (the message names file and line).
    """
    path = Path(name).expanduser()
    if path.is_file() or name.endswith(_SUFFIXES) or name.count("/") != 1 or path.is_absolute():
        if not path.is_file():
            raise DataError(f"no prompt file {name!r}; allowed: a file *.jsonl, *.jsonl.gz or *.parquet, or a Hub data set, owner/name.")
        stem, records = path.name.split(".")[0], read_records(path)
    else:
        stem, records = name.split("/")[1].split(":")[0], _hub_records(name)
    prompts = [_prompt(record, stem, where) for where, record in islice(records, limit)]
    if not prompts:
        raise DataError(f"{name} holds no rows; allowed: one or more of {_SHAPES}.")
    return prompts


def _hub_records(name: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name!r} is no file here, and to read it from the Hub the package datasets is needed, which is not installed. Run: pip "
            "install datasets, or name a local file."
        ) from error
    repository, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, split=split or "train", streaming=True)
        for number, record in enumerate(rows, start=1):
            yield f"{name}, row {number}", {key: value for key, value in record.items() if value is not None}
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the data set {name!r}: {error}. Check the id, its split and the network.") from error


def _prompt(record: Any, stem: str, where: str) -> Prompt:
    if not isinstance(record, dict):
        raise DataError(f"{where}: a {type(record).__name__}; allowed: an object {_SHAPES}.")
    source = record.get("source", stem)
    if not isinstance(source, str) or not source:
        raise DataError(f"{where}: source is {_short(source)}; allowed: a text. Leave it out to use the file's name.")
    if "turns" in record or "prompt" in record:
        turns = record["turns"] if "turns" in record else [record["prompt"]]
        if not isinstance(turns, list) or not turns:
            raise DataError(f"{where}: turns is {_short(turns)}; allowed: a list of one text or more.")
        return Prompt(source, tuple(("user", _text(turn, f"{where}, turn {number}")) for number, turn in enumerate(turns, start=1)))
    if "messages" in record:
        return Prompt(source, _messages(record["messages"], where))
    if "text" in record:
        return Prompt(source, text=_text(record["text"], where))
    raise DataError(f"{where}: keys are {_short(sorted(record))}; allowed: {_SHAPES}.")


def _messages(messages: Any, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list):
        raise DataError(f"{where}: messages is {_short(messages)}; allowed: a list of objects with role and content.")
    found: list[tuple[str, str]] = []
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        if role == "assistant":
            continue  # The target answers for itself.
        if role not in _ROLES:
            raise DataError(f"{where}, message {number}: role is {_short(role)}; allowed: {', '.join(_ROLES)}, assistant. Remove the row.")
        found.append((role, _text(message.get("content"), f"{where}, message {number}")))
    while found and found[-1][0] != "user":
        found.pop()
    if not found:
        raise DataError(f"{where}: messages holds no turn of the user; allowed: one or more. Remove the row.")
    return tuple(found)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where} is {_short(value)}; allowed: a text that is not empty.")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


# ------------------------------------------------------------------------------------------------------------ self-prompting


@dataclass(frozen=True)
class Opening:
    """How the target is made to write a prompt of its own.

    Args:
        source (`str`): domain of the prompts that come of it.
        begin (`str`): the first words of the user's turn, which the target finishes.
        system (`str`, *optional*): system prompt in front of it; the prompt is later answered without.
        weight (`float`): how often it is chosen, relative to the others.
    """

    source: str = "self"
    begin: str = ""
    system: str | None = None
    weight: float = 1.0


def read_openings(path: Path) -> list[Opening]:
    """Read openings from a file: JSON lines `{"source": .., "begin": .., "system": .., "weight": ..}`, all but one of `begin` and
    `system` optional.

    Raises:
        DataError: naming file and line of a malformed row.
    """
    found = []
    for where, record in read_records(path):
        if (
            not isinstance(record, dict)
            or not set(record) <= {"source", "begin", "system", "weight"}
            or not {"begin", "system"} & set(record)
        ):
            raise DataError(f'{where}: {_short(record)}; allowed: {{"source": "name", "begin": "first words", "weight": 1}}, or "system".')
        weight = record.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise DataError(f"{where}: weight is {_short(weight)}; allowed: a number above 0.")
        texts = {name: record[name] for name in ("source", "begin", "system") if name in record}
        for name, text in texts.items():
            if not isinstance(text, str) or (name == "source" and not text):
                raise DataError(f"{where}: {name} is {_short(text)}; allowed: a text.")
        found.append(Opening(**{"source": path.name.split(".")[0], **texts}, weight=float(weight)))
    if not found:
        raise DataError(f'{path} holds no rows; allowed: one or more of {{"source": "name", "begin": "first words"}}.')
    return found


# ----------------------------------------------------------------------------------------------------------- chat templates


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with a template or without; without one, only raw text can be encoded.
        thinking (`bool`): passed on as `enable_thinking` where the template asks for it.
    """

    def __init__(self, tokenizer: Any, *, thinking: bool = False) -> None:
        self.tokenizer = tokenizer
        self.source: str = tokenizer.chat_template or ""
        self.name = str(getattr(tokenizer, "name_or_path", "")) or type(tokenizer).__name__
        self._options = {"enable_thinking": thinking} if "enable_thinking" in self.source else {}

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """The text of a conversation, up to where the target's answer begins.

        Raises:
            DataError: if there is no template, or it refuses the conversation.
        """
        from jinja2.exceptions import TemplateError

        if not self.source:
            raise DataError(
                f'the tokenizer {self.name!r} has no chat template, so turns cannot be put to it; give prompts as {{"text": "raw text"}}, '
                "or a tokenizer with a chat template."
            )
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt, **self._options
            )
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise DataError(
                f"the chat template of {self.name!r} refuses the roles {roles}: {error}. Change or remove such rows."
            ) from error

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text, which has its special tokens written out."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_raw(self, text: str) -> list[int]:
        """Token ids of a raw text, with the special tokens that the tokenizer puts in front."""
        ids = list(self.tokenizer(text)["input_ids"])
        end = self.tokenizer.eos_token_id
        return ids[:-1] if len(ids) > 1 and ids[-1] == end else ids  # A text that is to be continued has not ended.

    def check(self) -> None:
        """Refuse a template that does not open the answer.

        Raises:
            DataError: naming the tokenizer.
        """
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
