"""Let SmolLM2 write its own training responses: prompts in, one JSON object a line out. Resumable, in batches, plain transformers.

Rows have the fields `source`, `prompt`, `temperature`, `prompt_ids`, `response_ids`, `ended`. Half of the prompts are answered greedily,
half at temperature 1. Prompts come from the train files named on the command line, from a few sentence beginnings that the model finishes
itself (self-prompting), and never from an evaluation set. A prompt already in the output, or in a file passed as --seen, is not answered
again.

    python scripts/make_responses.py --output responses.jsonl --minutes 40 --prompts gsm8k_train.jsonl
"""

import argparse
import gzip
import json
import random
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dspark.hub import resolve_target

CODE = [
    "Write a python function to", "Write a function to", "Write a Python function that", "Write a python function which takes",
    "Write a function that takes a list of", "Write a python program to", "Write a Python function to check whether",
    "Write a function to find the", "Write a function to count the", "Write a function to convert",
    "Write a solution to the following problem:\n```python\ndef",
    "Complete the following Python function:\n```python\nfrom typing import List\n\n\ndef",
    "Implement a class in Python that", "Explain what this Python code does:\n```python\n", "How do I use a dictionary in Python to",
]  # fmt: skip
CHAT = [
    "Write a short story about", "Write a blog post about", "Write a persuasive email to", "Write a poem about", "Imagine you are",
    "Pretend yourself to be", "Explain", "What are the", "How can I", "Why do", "Describe", "Compare", "Give me a list of", "Summarize the",
    "What is the difference between", "Help me plan", "Which", "Please explain how", "Discuss the", "Suggest some", "Tell me about",
    "Provide insights into", "Edit the following paragraph:", "Analyze", "Can you", "I want to", "What is",
    "Draft a professional email", "Answer the following questions. 1.", "Extract the following information from the text:",
]  # fmt: skip
MATH = [
    "A store sells", "If a train", "Find the value of", "Solve for x:", "There are", "The sum of two numbers", "How many",
    "A rectangle has", "What is the probability that", "Each student in", "Maria bought", "Tom has",
]  # fmt: skip


def user_turn(tokenizer, beginning: str) -> str:
    text = tokenizer.apply_chat_template([{"role": "user", "content": "@@"}], tokenize=False)
    return text.split("@@")[0] + beginning


def file_prompts(paths: list[Path]) -> list[tuple[str, str]]:
    rows = []
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            rows += [(path.stem, json.loads(line)["turns"][0]) for line in lines]
    return rows


def already_answered(paths: list[Path]) -> set[str]:
    seen: set[str] = set()
    for path in paths:
        if path.exists():
            opener = gzip.open if path.suffix == ".gz" else open
            with opener(path, "rt", encoding="utf-8") as lines:
                seen.update(json.loads(line)["prompt"] for line in lines)
    return seen


@torch.inference_mode()
def complete(model, tokenizer, prompts: list[list[int]], *, temperature: float, max_new_tokens: int, stop: list[int]) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    return out[:, longest:].tolist()


def self_prompts(model, tokenizer, count: int, rng: random.Random) -> list[tuple[str, str]]:
    kinds = rng.choices(["self-code", "self-chat", "self-math"], weights=[5, 4, 2], k=count)
    begins = [rng.choice({"self-code": CODE, "self-chat": CHAT, "self-math": MATH}[kind]) for kind in kinds]
    eos = tokenizer.eos_token_id
    ids = [tokenizer(user_turn(tokenizer, b), add_special_tokens=False).input_ids for b in begins]
    outs = complete(model, tokenizer, ids, temperature=0.8, max_new_tokens=80, stop=[eos])
    rows = []
    for kind, begin, out in zip(kinds, begins, outs, strict=True):
        if eos in out and out.index(eos) >= 3:
            rows.append((kind, begin + tokenizer.decode(out[: out.index(eos)], skip_special_tokens=True)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2", help="`smollm2` (embedded), or the folder of a transformers checkpoint")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, nargs="*", default=[])
    parser.add_argument("--seen", type=Path, nargs="*", default=[])
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--file-share", type=float, default=0.3, help="share of batches whose prompts come from --prompts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    target_path = resolve_target(args.target)
    tokenizer = AutoTokenizer.from_pretrained(target_path)
    model = AutoModelForCausalLM.from_pretrained(target_path, dtype=torch.bfloat16).eval()
    eos = tokenizer.eos_token_id
    seen = already_answered([args.output, *args.seen])
    rng = random.Random(args.seed + len(seen))
    torch.manual_seed(args.seed + len(seen))
    waiting = [row for row in file_prompts(args.prompts) if row[1] not in seen]
    rng.shuffle(waiting)
    start, tokens, batches = time.monotonic(), 0, 0
    with args.output.open("a", encoding="utf-8") as sink:
        while time.monotonic() - start < 60 * args.minutes:
            if waiting and rng.random() < args.file_share:
                rows, waiting = waiting[: args.batch_size], waiting[args.batch_size :]
            else:
                rows = self_prompts(model, tokenizer, args.batch_size + args.batch_size // 4, rng)
            rows = [row for row in dict.fromkeys(rows) if row[1] not in seen]
            if not rows:
                continue
            temperature = float(batches % 2)
            prompts = [
                tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True)["input_ids"] for _, p in rows
            ]
            outs = complete(model, tokenizer, prompts, temperature=temperature, max_new_tokens=args.max_new_tokens, stop=[eos])
            for (source, prompt), prompt_ids, out in zip(rows, prompts, outs, strict=True):
                ended = eos in out
                response = out[: out.index(eos) + 1] if ended else out
                seen.add(prompt)
                tokens += len(response)
                record = {
                    "source": source,
                    "prompt": prompt,
                    "temperature": temperature,
                    "prompt_ids": prompt_ids,
                    "response_ids": response,
                    "ended": ended,
                }
                sink.write(json.dumps(record) + "\n")
            sink.flush()
            batches += 1
            minutes = (time.monotonic() - start) / 60
            print(
                f"{len(seen)} prompts, {tokens} tokens, {tokens / (60 * minutes):.0f} tokens/s, {minutes:.1f} min",
                flush=True,
            )


if __name__ == "__main__":
    main()
