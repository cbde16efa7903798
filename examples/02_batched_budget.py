"""A batch of ragged prompts under four budgets: the same text every time, at different costs.

Expected output (fp32, greedy):

    budget         rounds  verified tokens  accepted  same text
    full               25              341        83  True
    static:2           32              124        70  True
    threshold:0.4      27              188        79  True
    static:0           63                0         0  True
"""

import torch

import hf_dspark

target, tokenizer = hf_dspark.load_target("smollm2", dtype="float32")
drafter = hf_dspark.load_drafter("smollm2-dspark", dtype="float32")

questions = [
    "What is the capital of France?",
    "A farmer has 17 sheep and buys 5 more, then sells 8. How many are left? Think step by step.",
    "Write a python function that returns the largest of three numbers.",
]
inputs = tokenizer.apply_chat_template(
    [[{"role": "user", "content": question}] for question in questions],
    add_generation_prompt=True,
    padding=True,
    return_tensors="pt",
    return_dict=True,
)
plain = target.generate(**inputs, max_new_tokens=64, do_sample=False)

print(f"{'budget':14} {'rounds':>6}  {'verified tokens':>15}  {'accepted':>8}  same text")
for budget in ("full", "static:2", "threshold:0.4", "static:0"):
    output = hf_dspark.generate(target, drafter, **inputs, max_new_tokens=64, do_sample=False, budget=budget, return_dict_in_generate=True)
    verified = sum(row.verified for row in output.stats.rows)
    accepted = sum(row.accepted for row in output.stats.rows)
    print(f"{budget:14} {output.stats.rounds:6}  {verified:15}  {accepted:8}  {torch.equal(plain, output.sequences)}")
