"""Reads prompt files and turns their rows into model inputs. Knows JSONL and chat templates, nothing about models."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_dspark.errors import DataError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Conversation = list[dict[str, str]]
_SHAPES = '{"turns": ["text", ..]}, {"prompt": "text"} or {"messages": [{"role": "user", "content": "text"}, ..]}'


def user_turn(text: str) -> Conversation:
    """Returns a conversation that holds one turn of the user."""
    return [{"role": "user", "content": text}]


def read_prompts(path: str | os.PathLike[str], limit: int | None = None) -> list[Conversation]:
    """Reads conversations from a JSONL file, one a row; empty lines are skipped.

    A row is `{"turns": [...]}` (its first turn is the prompt), `{"prompt": ...}` or `{"messages": [...]}`; other keys
    are ignored.

    Args:
        path: the file, UTF-8.
        limit: read at most so many rows, from the top; None reads all.
    Raises:
        DataError: if the file is missing, unreadable or holds no row, or a row is malformed (the message names file and
            line).
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, got {limit}; leave it out to read the whole file")
    prompts: list[Conversation] = []
    try:
        # Line by line, and never str.splitlines(): that also breaks at U+2028 and its like, which JSON allows inside
        # strings.
        with Path(path).open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    prompts.append(_conversation(line, f"{os.fspath(path)}, line {number}"))
                    if len(prompts) == limit:
                        break
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text ({error.reason})"
        raise DataError(f"cannot read the prompt file {os.fspath(path)}: {reason}") from error
    if not prompts:
        raise DataError(f"the prompt file {os.fspath(path)} holds no rows; expected one a line: {_SHAPES}")
    return prompts


def encode(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> BatchEncoding:
    """Tokenizes conversations for generation, padded on the left.

    The tokenizer's chat template is used where it has one; else the text of the last message is the prompt as it
    stands.

    Returns:
        `input_ids` and `attention_mask`, `torch.LongTensor` of shape `(batch, longest)`.
    """
    if tokenizer.chat_template is not None:
        texts = [tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True) for conversation in conversations]
    else:
        texts = [conversation[-1]["content"] for conversation in conversations]
    return tokenizer(
        texts,
        add_special_tokens=tokenizer.chat_template is None,  # a template writes its own special tokens
        padding=len(texts) > 1,
        padding_side="left",
        return_attention_mask=True,
        return_tensors="pt",
    )


def _conversation(line: str, where: str) -> Conversation:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno}); expected {_SHAPES}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}; write {_SHAPES}")
    if "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns:
            raise DataError(f"{where}: 'turns' must be a list with at least one text, got {_short(turns)}")
        return user_turn(_text(turns[0], f"{where}: the first of 'turns'"))
    if "prompt" in row:
        return user_turn(_text(row["prompt"], f"{where}: 'prompt'"))
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{where}: 'messages' must be a list with at least one message, got {_short(messages)}")
        return [_message(message, f"{where}: message {index}") for index, message in enumerate(messages, start=1)]
    raise DataError(f"{where}: none of the keys 'turns', 'prompt', 'messages' (got {_short(sorted(row))}); write {_SHAPES}")


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{where} must be an object with the texts 'role' and 'content', got {_short(message)}")
    return {"role": message["role"], "content": _text(message.get("content"), f"{where}, 'content'")}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where} must be a text that is not empty, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."
