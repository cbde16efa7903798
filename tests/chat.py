"""A tiny chat target: random weights, one token a word, a chat template in words of its vocabulary."""

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
# A new answer opens with w93, which past answers do not have, as in templates that drop past thinking.
FORGETFUL = TEMPLATE.replace("<bos> w91 {% endif %}", "<bos> w91 w93 {% endif %}")


def chat_target(seed: int = 0, template: str | None = TEMPLATE) -> tuple[PreTrainedModel, Any]:
    """A target in float32 and its tokenizer."""
    model = tiny_target("llama", seed)
    tokenizer = word_tokenizer(model.config)
    tokenizer.chat_template = template
    tokenizer.name_or_path = "tiny-chat"
    return model, tokenizer


def save_chat_target(folder: Path, seed: int = 0) -> Path:
    """Write the chat target to a folder for `from_pretrained`."""
    model, tokenizer = chat_target(seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
