"""The script that reads the prompts that a target wrote itself out of data folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from examples.smollm2_dspark.self_prompts import main
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_dspark.hub.names import resolve_target


def written(folder: Path, tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> str:
    """A data folder with one row that holds these turns before its answer."""
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    folder.mkdir()
    row = {"id": folder.name, "ids": [*ids, 7], "spans": [[len(ids), len(ids) + 1]]}
    (folder / "responses-00000.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return str(folder)


def test_prompts_come_out_letter_for_letter(tmp_path: Path) -> None:
    """Of all folders, line breaks and other scripts too; a row of more than one turn is refused by name."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_target("smollm2"))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "config.json").write_text('{"model_type": "llama"}')
    texts = ["Write a function:\n```python\ndef f(x):\n    ...\n```", "naïve — 数 ?"]
    folders = [written(tmp_path / str(i), tokenizer, [{"role": "user", "content": text}]) for i, text in enumerate(texts)]
    output = tmp_path / "prompts.jsonl"
    where = ["--target", str(tmp_path / "tokenizer"), "--output", str(output)]
    main([*folders, *where])
    assert [json.loads(line)["turns"] for line in output.read_text(encoding="utf-8").splitlines()] == [[text] for text in texts]
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    with pytest.raises(SystemExit, match="row 'several'"):
        main([written(tmp_path / "several", tokenizer, turns), *where])
