"""Writes the prompts of a file that no response file answers, to calibrate on prompts that the drafter was not trained on.

python examples/smollm2_dspark/fresh_prompts.py gsm8k_train.jsonl --answered responses/starter.jsonl.gz --limit 320 --output fresh.jsonl
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path


def lines(path: Path) -> Iterator[str]:
    """Lines of a JSONL file, compressed or not."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        yield from file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--answered", type=Path, action="append", required=True, help="rows with the key `prompt`")
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    answered = {json.loads(line).get("prompt") for path in args.answered for line in lines(path)}
    fresh = [line for line in lines(args.prompts) if json.loads(line)["turns"][0] not in answered][: args.limit]
    args.output.write_text("".join(fresh), encoding="utf-8")
    print(f"{len(fresh)} prompts")


if __name__ == "__main__":
    main()
