"""Train the drafter that the package embeds: SmolLM2-135M-Instruct's own responses in, a drafter under 25 MB out.

Writes log.jsonl, checkpoints/, best/, final/ and recipe.json (arguments, data counts, versions, machine, curve) into
--output. Run the same command again to resume
after an interruption.

    OMP_NUM_THREADS=2 python scripts/train_smollm2_drafter.py --target DIR --responses a.jsonl.gz b.jsonl --output
    runs/smollm2 --minutes 55
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dspark.hub import resolve_target
from hf_dspark.modeling_dspark import DSparkDrafter
from hf_dspark.training import (
    Trainer,
    TrainingConfig,
    coverage,
    frequent_tokens,
    load_weights,
    prompt_hash,
    read_responses,
    split_rows,
)

SIZE_LIMIT_BYTES = 25_000_000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2", help="`smollm2` (embedded), or the folder of a transformers checkpoint")
    parser.add_argument("--responses", type=Path, nargs="+", required=True, help="response rows, .jsonl or .jsonl.gz")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; a checkpoint found in it is resumed")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="length of the run by the clock (default 55)")
    length.add_argument("--steps", type=int, help="length of the run in steps (resumes exactly)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=7)
    parser.add_argument("--rank", type=int, default=48, help="rank of the sequential head; 0 trains a DFlash drafter")
    parser.add_argument("--head", choices=["vanilla", "gated", "rnn"], default="vanilla")
    parser.add_argument("--taps", type=int, nargs="+", default=[1, 8, 14, 21, 27])
    parser.add_argument("--mask-token", default="<gh_stars>")
    parser.add_argument("--draft-vocab", type=int, default=12288, help="most frequent response tokens; 0 is the full vocabulary")
    parser.add_argument(
        "--no-init-from-target",
        action="store_true",
        help="start the layers at random instead of from the target's last ones",
    )
    parser.add_argument("--held-out", type=float, default=0.03, help="share of prompts kept for evaluation")
    parser.add_argument("--anchors", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--ce-anneal", type=float, default=0.3, help="share of the run over which the CE weight falls")
    parser.add_argument("--start-from", type=Path, help="folder of an earlier run whose newest weights this one starts from")
    parser.add_argument("--sampled-share", type=float, default=1.0, help="share of the rows sampled at T > 0 to train on")
    parser.add_argument("--target-name", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="written into config.json")
    parser.add_argument("--decay", type=float, default=4.0, help="decay of the loss weights along the block, in tokens")
    parser.add_argument("--chunk", type=int, default=256, help="block positions whose logits exist at one time")
    parser.add_argument("--checkpoint-minutes", type=float, default=5)
    parser.add_argument("--evaluation-minutes", type=float, default=8)
    parser.add_argument("--evaluation-rows", type=int, default=64)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.minutes is None and args.steps is None:
        args.minutes = 55.0
    return args


def ending_ids(tokenizer: Any, target: Any) -> list[int]:
    """Special ids that end a text: the draft vocabulary must reach them."""
    listed = [tokenizer.eos_token_id, target.config.eos_token_id, target.generation_config.eos_token_id]
    return sorted({i for item in listed if item is not None for i in (item if isinstance(item, list) else [item])})


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        with info.open(encoding="utf-8") as lines:
            cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def announce(event: dict[str, Any]) -> None:
    fields = {k: event[k] for k in ("event", "step", "seconds", "loss", "norm", "learning_rate", "score") if k in event}
    metrics = event.get("metrics", {})
    if event["event"] == "evaluation":
        metrics = metrics["all"]
        fields["temperatures"] = {
            k: {m: v[m] for m in ("tau_greedy", "tau_sampled")} for k, v in event["metrics"].items() if k.startswith("T=")
        }
    fields.update({k: metrics[k] for k in ("tau_greedy", "tau_sampled", "cross_entropy") if k in metrics})
    fields.update({k: event[k] for k in event if k.endswith("_s")})
    print(json.dumps(fields), flush=True)


def save(path: Path, recipe: dict[str, Any]) -> None:
    waiting = path.with_suffix(".tmp")
    waiting.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    os.replace(waiting, path)


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    target_path = resolve_target(args.target)
    tokenizer = AutoTokenizer.from_pretrained(target_path)
    target = AutoModelForCausalLM.from_pretrained(target_path, dtype=dtype).eval().requires_grad_(False).to(args.device)
    vocab_size = target.config.vocab_size
    rows = read_responses(args.responses, vocab_size=vocab_size)
    train, held_out = split_rows(rows, held_out_fraction=args.held_out)

    draft_ids, covered = None, None
    if args.draft_vocab:
        draft_ids = frequent_tokens(train, args.draft_vocab, always=ending_ids(tokenizer, target), vocab_size=vocab_size)
        inside, total = coverage(held_out, draft_ids)
        covered = {
            "held_out_tokens_inside": inside,
            "held_out_tokens": total,
            "share": inside / total if total else None,
        }
        print(json.dumps({"event": "draft_vocabulary", "size": args.draft_vocab, **covered}), flush=True)
    if args.sampled_share < 1:
        # By hash, so that the choice does not depend on the order of the files.
        limit = int(args.sampled_share * 2**64)
        train = [row for row in train if row.temperature == 0 or (prompt_hash(row) * 0x9E3779B97F4A7C15) % 2**64 < limit]
    mask_id = tokenizer.convert_tokens_to_ids(args.mask_token)
    if mask_id is None or mask_id == tokenizer.unk_token_id:
        raise ValueError(
            f"mask token {args.mask_token!r} is not in the tokenizer; allowed: a token that never occurs in text. "
            f"Name one with --mask-token."
        )

    drafter = DSparkDrafter.from_target(
        target,
        tokenizer=tokenizer,
        num_hidden_layers=args.layers,
        block_size=args.block_size,
        markov_rank=args.rank,
        markov_head_type=args.head,
        target_layer_ids=args.taps,
        mask_token_id=mask_id,
        draft_token_ids=draft_ids,
        init_from_target=not args.no_init_from_target,
        target_name=args.target_name,
    )
    drafter.to(device=args.device, dtype=dtype)
    started_at = load_weights(drafter, args.start_from) if args.start_from else None
    drafter.bind(target)
    parameters = sum(p.numel() for p in drafter.parameters())
    weight_bytes = sum(p.numel() * p.element_size() for p in drafter.parameters()) + sum(
        b.numel() * b.element_size() for b in drafter.buffers()
    )
    if args.dtype == "bfloat16" and weight_bytes >= SIZE_LIMIT_BYTES:
        print(
            json.dumps(
                {
                    "event": "warning",
                    "message": f"{weight_bytes} bytes of weights; the package embeds less than {SIZE_LIMIT_BYTES}",
                }
            ),
            flush=True,
        )

    config = TrainingConfig(
        steps=args.steps,
        minutes=args.minutes,
        batch_size=args.batch_size,
        num_anchors=args.anchors,
        learning_rate=args.lr,
        weight_decay=args.weight_decay,
        ce_anneal=args.ce_anneal,
        decay=args.decay,
        chunk_positions=args.chunk,
        checkpoint_minutes=args.checkpoint_minutes,
        evaluation_minutes=args.evaluation_minutes,
        evaluation_rows=args.evaluation_rows,
        log_every=args.log_every,
        seed=args.seed,
    )
    recipe: dict[str, Any] = {
        "arguments": {k: [p.name for p in v] if k == "responses" else v.name if isinstance(v, Path) else v for k, v in vars(args).items()},
        "started_from_step": started_at,
        "parameters": parameters,
        "weight_bytes": weight_bytes,
        "mask_token_id": mask_id,
        "draft_vocabulary": covered,
        "data": {
            "rows": len(rows),
            "training_rows": len(train),
            "held_out_rows": len(held_out),
            "training_response_tokens": sum(len(row.response_ids) for row in train),
            "by_source_and_temperature": {},
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": machine(),
        "seed": args.seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    counts = recipe["data"]["by_source_and_temperature"]
    for row in rows:
        key = f"{row.source} T={row.temperature:g}"
        counts[key] = counts.get(key, 0) + 1
    args.output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(drafter, target, train, held_out, config, args.output, announce=announce)
    save(args.output / "recipe.json", recipe)
    progress = trainer.train()
    recipe["result"] = {
        "steps": progress.step,
        "minutes": trainer.seconds() / 60,
        "epochs": progress.step / trainer.batches_an_epoch,
        "tokens": progress.tokens,
        "anchors": progress.anchors,
        "best_step": progress.best_step,
        "best_score": progress.best_score,
    }
    recipe["curve"] = progress.curve
    save(args.output / "recipe.json", recipe)
    print(json.dumps({"event": "done", **recipe["result"]}), flush=True)


if __name__ == "__main__":
    main()
