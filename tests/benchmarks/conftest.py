"""A tiny target with a tokenizer of one token a word, and a drafter for it, as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.tiny import tiny_drafter, tiny_llama
from tests.words import word_tokenizer


class Files(NamedTuple):
    """Folders of a pair, and a prompt file."""

    target: Path
    drafter: Path
    prompts: Path

    @property
    def pair(self) -> list[str]:
        """The options that name the pair."""
        return ["--target", str(self.target), "--drafter", str(self.drafter), "--dtype", "fp32"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """In fp32, with three prompts."""
    folder = tmp_path_factory.mktemp("pair")
    target = tiny_llama()
    target.save_pretrained(folder / "target")
    word_tokenizer(target.config).save_pretrained(folder / "target")
    tiny_drafter(target).save_pretrained(folder / "drafter")
    prompts = folder / "words.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("w5 w9 w40", "w11", "w30 w31 w32 w33")), encoding="utf-8")
    return Files(folder / "target", folder / "drafter", prompts)
