"""The script that takes a target's own prompts out of the rows of a data folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

from hf_dspark.hub.names import resolve_target

SCRIPT = Path(__file__).parents[2] / "examples" / "smollm2_dspark" / "asked.py"


def written(folder: Path, conversations: list[list[dict[str, str]]]) -> Path:
    """A data folder whose rows hold these turns before their answer."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_target("smollm2"))
    rows = []
    for turns in conversations:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.append({"id": str(len(rows)), "ids": [*ids, 7], "spans": [[len(ids), len(ids) + 1]]})
    folder.mkdir()
    (folder / "responses-00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_prompts_come_out_as_they_were_asked(tmp_path: Path) -> None:
    """Of all folders, letter for letter, line breaks and other scripts too; a row of more than one turn is refused by name."""
    asked = ["Write a function:\n```python\ndef f(x):\n    ...\n```", "naïve — 数 ?"]
    folders = [written(tmp_path / str(i), [[{"role": "user", "content": text}]]) for i, text in enumerate(asked)]
    output = tmp_path / "asked.jsonl"
    subprocess.run([sys.executable, str(SCRIPT), *map(str, folders), "--output", str(output)], check=True, capture_output=True)
    assert [json.loads(line)["turns"] for line in output.read_text(encoding="utf-8").splitlines()] == [[text] for text in asked]
    several = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    other = written(tmp_path / "several", [[{"role": "system", "content": "Be brief."}, *several]])
    run = subprocess.run([sys.executable, str(SCRIPT), str(other), "--output", str(output)], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "row '0'" in run.stderr
