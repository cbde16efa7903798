"""Reads prompt files and turns their rows into model inputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from hf_dspark.errors import DataError
from hf_dspark.training.prompts import read_prompt_rows

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Conversation = list[dict[str, str]]


def user_turn(text: str) -> Conversation:
    """Returns a conversation that holds one turn of the user."""
    return [{"role": "user", "content": text}]


def read_prompts(path: str | os.PathLike[str], limit: int | None = None) -> list[Conversation]:
    """Reads the conversations to be answered, one a row.

    Args:
        path: JSONL (also gzipped) or Parquet, with rows `{"turns": [...]}` (the first turn is the prompt), `{"prompt": ...}` or
            `{"messages": [...]}` (answers in it stay).
        limit: rows to read at most, from the top; None reads all.
    Raises:
        DataError: if the file is missing, unreadable or holds no row, or a row is malformed (the message names file and line).
    """
    conversations = []
    for row in read_prompt_rows(os.fspath(path), limit):
        if row.text is not None:
            raise DataError(f"{row.where}: raw text; expected a conversation, with the key turns, prompt or messages")
        # A turn that follows another one of the user is only reached after an answer.
        later = [i for i, (one, after) in enumerate(pairwise(row.messages), start=1) if one["role"] == after["role"] == "user"]
        conversations.append(row.messages[: later[0] if later else None])
    return conversations


def encode(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> BatchEncoding:
    """Tokenizes conversations for generation, padded on the left.

    The tokenizer's chat template is used where it has one; else the text of the last message is the prompt as it stands.

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


def prompt_ids(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[list[int]]:
    """Token ids of each conversation, without padding."""
    return [encode(tokenizer, [conversation])["input_ids"][0].tolist() for conversation in conversations]
