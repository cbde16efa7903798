"""Writes the prompts that the rows of data folders answer, to calibrate on prompts that the target wrote itself.

python examples/smollm2_dspark/self_prompts.py RUNS/data-self-stub --target smollm2 --output self-stub.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

from hf_dspark.hub.names import resolve_target


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(resolve_target(args.target))
    # A template puts the same text around every first turn.
    before, after = tokenizer.apply_chat_template([{"role": "user", "content": "\0"}], tokenize=False, add_generation_prompt=True).split(
        "\0"
    )
    prompts = []
    for path in [path for folder in args.folders for path in sorted(folder.glob("responses-*.jsonl"))]:
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            row = json.loads(line)
            text = tokenizer.decode(row["ids"][: row["spans"][0][0]])
            prompt = text.removeprefix(before).removesuffix(after)
            inner = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            if before + prompt + after != text or set(inner) & set(tokenizer.all_special_ids):
                raise SystemExit(f"{path}: row {row['id']!r} does not begin with one turn of a user; give single-turn rows.")
            prompts.append(prompt)
    args.output.write_text("".join(json.dumps({"turns": [prompt]}, ensure_ascii=False) + "\n" for prompt in prompts), encoding="utf-8")
    print(f"{len(prompts)} prompts")


if __name__ == "__main__":
    main()
