"""A tiny target that can be chatted with: random weights, one token a word, a chat template in words of its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tests.tiny import tiny_target
from tests.words import word_tokenizer

ROLES = "{'user': 'w90', 'assistant': 'w91', 'system': 'w92'}[m['role']]"
TEMPLATE = (
    "{% for m in messages %}<bos> {{ " + ROLES + " }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<bos> w91 {% endif %}"
)
# Past answers lose the w93 that a new answer is opened with, as some templates drop past thinking.
FORGETFUL = TEMPLATE.replace("<bos> w91 {% endif %}", "<bos> w91 w93 {% endif %}")


def chat_target(seed: int = 0, template: str | None = TEMPLATE) -> tuple[PreTrainedModel, Any]:
    """A target in float32 and its tokenizer."""
    model = tiny_target("llama", seed)
    tokenizer = word_tokenizer(model.config)
    tokenizer.chat_template = template
    tokenizer.name_or_path = "tiny-chat"
    return model, tokenizer


def save_chat_target(folder: Path, seed: int = 0) -> Path:
    """Writes it where `from_pretrained` finds it."""
    model, tokenizer = chat_target(seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
