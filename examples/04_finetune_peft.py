"""Fine-tune the drafter on a domain with a LoRA adapter, save the adapter alone, switch it on and off.

A handful of rows and steps, to show the calls; `hf-dspark data` and `hf-dspark finetune` do it at full size. The target and its output do
not change, only how much of a draft it accepts.

Expected output (the size is exact, the loss depends on the machine):

    rows: 8 of the target's own answers
    loss went down: True
    adapter: 5.5 MB, the drafter itself stays as it was
    same text with base, adapter, and adapter merged: True
"""

import tempfile
from pathlib import Path

import torch

import hf_dspark
from hf_dspark.adapters import add_lora, merge_adapter
from hf_dspark.training.configuration import TrainingConfig
from hf_dspark.training.rows import ResponseRow
from hf_dspark.training.trainer import Trainer

target, tokenizer = hf_dspark.load_target("smollm2", dtype="float32")
drafter = hf_dspark.load_drafter("smollm2-dspark", dtype="float32").bind(target)

# 1. The domain's data: prompts, and the target's own answers to them.
things = ["a book", "a city", "a recipe", "a flight", "a song", "an invoice", "a planet", "a course"]
chats = [[{"role": "user", "content": f"Describe {thing} as one JSON object. JSON only."}] for thing in things]
inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True)
answers = target.generate(**inputs, max_new_tokens=48, do_sample=False)
width = inputs["input_ids"].shape[1]
rows = []
for ids, mask, answer in zip(inputs["input_ids"], inputs["attention_mask"], answers[:, width:], strict=True):
    response = [token for token in answer.tolist() if token != tokenizer.pad_token_id]
    prompt = tuple(ids[mask.bool()].tolist())
    rows.append(ResponseRow("json", prompt, tuple(response), temperature=0.0, ended=len(response) < answers.shape[1] - width))
print(f"rows: {len(rows)} of the target's own answers")

# 2. A LoRA adapter on the backbone and the sequential head, trained by the same trainer as a whole drafter.
add_lora(drafter, rank=16)
losses = []
with tempfile.TemporaryDirectory() as run:
    config = TrainingConfig(steps=12, batch_size=4, num_anchors=16, learning_rate=1e-3, ce_start=0.1, ce_end=0.1, log_every=1)
    trainer = Trainer(drafter, target, rows, rows[:2], config, run, announce=lambda event: losses.append(event.get("loss")))
    trainer.train()
losses = [loss for loss in losses if loss is not None]
print("loss went down:", sum(losses[-3:]) < sum(losses[:3]))

# 3. Saved alone: a few megabytes that name the drafter they belong to.
prompt = tokenizer.apply_chat_template(chats[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
options = {"max_new_tokens": 32, "do_sample": False}
with tempfile.TemporaryDirectory() as folder:
    drafter.save_pretrained(folder)
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 1e6
    print(f"adapter: {size:.1f} MB, the drafter itself stays as it was")

    fresh = hf_dspark.load_drafter("smollm2-dspark", dtype="float32")
    fresh.load_adapter(folder)
    texts = [hf_dspark.generate(target, fresh, **prompt, **options, adapter=name) for name in ("base", "default")]
    texts.append(hf_dspark.generate(target, merge_adapter(fresh), **prompt, **options))
print("same text with base, adapter, and adapter merged:", all(torch.equal(texts[0], text) for text in texts))
