"""Prompts and openings out of files or Hub data sets."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from hf_dspark.errors import DataError
from hf_dspark.training.configuration import Opening
from hf_dspark.training.rows import read_records

Message = dict[str, str]

_SHAPES = '{"turns": ["text", ..]}, {"prompt": "text"}, {"messages": [{"role": "user", "content": "text"}, ..]} or {"text": "raw text"}'
_ROLES = ("system", "developer", "user", "assistant")
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


@dataclass(frozen=True)
class Prompt:
    """What the target is to answer: the turns of a user, each in its place, or a raw beginning that is continued without a template."""

    source: str  # domain, for grouping
    messages: tuple[tuple[str, str], ...] = ()  # role and content, without answers
    text: str | None = None  # instead of messages
    name: str = ""  # the id of its row; default a digest of the content

    @cached_property
    def id(self) -> str:
        """The same for the same content in every file and run."""
        return self.name or digest(json.dumps([self.text, self.messages]), 20)

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
        found: list[list[Message]] = [[]]
        for role, content in self.messages:
            found[-1].append({"role": role, "content": content})
            if role == "user":
                found.append([])
        return found[:-1]


class PromptRow(NamedTuple):
    """One row of a prompt file: where it stands, its domain, and its messages with answers, or else raw text."""

    where: str
    source: str
    messages: list[Message]
    text: str | None = None


def digest(text: str, digits: int = 16) -> str:
    """The first digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def prompt_key(turns: Iterable[str]) -> str:
    """A digest of the turns of a user, normalised."""
    texts = [" ".join(unicodedata.normalize("NFKC", turn).casefold().split()) for turn in turns]
    return digest(json.dumps(texts))


def read_prompts(name: str, limit: int | None = None) -> list[Prompt]:
    """Read the prompts of one file or Hub data set; answers in them are left out.

    Args:
        name (`str`): a file `*.jsonl`, `*.jsonl.gz` or `*.parquet`, or the id of a data set on the Hub, `owner/name` or `owner/name:split`.
        limit (`int`, *optional*): rows to read at most, from the top.
    Returns:
        `list[Prompt]`: their source is the row's own `source`, else the file's name without its ending.
    Raises:
        DataError: if there is no such file, it holds nothing, or a row is malformed (the message names file and line).
    """
    prompts = []
    for row in read_prompt_rows(name, limit):
        messages = [(message["role"], message["content"]) for message in row.messages if message["role"] != "assistant"]
        while messages and messages[-1][0] != "user":
            messages.pop()
        if row.text is None and not messages:
            raise DataError(f"{row.where}: messages holds no turn of the user; allowed: one or more. Remove the row.")
        prompts.append(Prompt(row.source, tuple(messages), row.text))
    return prompts


def read_prompt_rows(name: str, limit: int | None = None) -> list[PromptRow]:
    """Read the rows of one prompt file or Hub data set, answers included; arguments and errors as in `read_prompts`."""
    path = Path(name).expanduser()
    if path.is_file():
        stem, records = path.name.split(".")[0], read_records(path)
    elif name.endswith(_SUFFIXES) or name.count("/") != 1 or path.is_absolute():
        raise DataError(f"no prompt file {name!r}; allowed: a file *.jsonl, *.jsonl.gz or *.parquet, or a Hub data set, owner/name.")
    else:
        stem, records = name.split("/")[1].split(":")[0], _hub_records(name)
    found = [_row(record, stem, where) for where, record in islice(records, limit)]
    if not found:
        raise DataError(f"{name} holds no rows; allowed: one or more of {_SHAPES}.")
    return found


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


def _row(record: Any, stem: str, where: str) -> PromptRow:
    shape = next((name for name in ("turns", "prompt", "messages", "text") if isinstance(record, dict) and name in record), None)
    if shape is None:
        raise DataError(f"{where}: {_short(record)}; allowed: an object {_SHAPES}.")
    source = record.get("source", stem)
    if not isinstance(source, str) or not source:
        raise DataError(f"{where}: source is {_short(source)}; allowed: a text. Leave it out to use the file's name.")
    if shape == "text":
        return PromptRow(where, source, [], _text(record["text"], where))
    given = [record["prompt"]] if shape == "prompt" else record[shape]
    if not isinstance(given, list) or not given:
        raise DataError(f"{where}: {shape} is {_short(given)}; allowed: {_SHAPES}.")
    found = []
    for number, one in enumerate(given, start=1):
        message = one if shape == "messages" else {"role": "user", "content": one}
        role = message.get("role") if isinstance(message, dict) else None
        if role not in _ROLES:
            raise DataError(f"{where}, message {number}: role is {_short(role)}; allowed: {', '.join(_ROLES)}. Remove the row.")
        # An answer of nothing but tool calls has no content.
        content = message.get("content") or "" if role == "assistant" else _text(message.get("content"), f"{where}, message {number}")
        found.append({"role": role, "content": content})
    return PromptRow(where, source, found)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where} is {_short(value)}; allowed: a text that is not empty.")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def read_openings(path: Path) -> list[Opening]:
    """Read openings: JSON lines `{"source": .., "begin": .., "system": .., "weight": ..}`, all but one of `begin` and `system` optional.

    Raises:
        DataError: naming file and line of a malformed row.
    """
    found = []
    for where, record in read_records(path):
        texts = {"source": path.name.split(".")[0], **record} if isinstance(record, dict) else {}
        weight = texts.pop("weight", 1.0)
        named = {"source"} < texts.keys() <= {"source", "begin", "system"}
        if not named or not all(isinstance(text, str) for text in texts.values()) or not texts["source"]:
            raise DataError(f'{where}: {_short(record)}; allowed: {{"source": "name", "begin": "first words", "weight": 1}}, or "system".')
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise DataError(f"{where}: weight is {_short(weight)}; allowed: a number above 0.")
        found.append(Opening(**texts, weight=float(weight)))
    if not found:
        raise DataError(f'{path} holds no rows; allowed: one or more of {{"source": "name", "begin": "first words"}}.')
    return found
