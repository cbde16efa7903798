"""One prompt, with and without the drafter: the same text, fewer target passes.

Expected output (fp32, greedy; tau depends on the drafter that the checkout ships, and on what rounds cost on the machine: a calibrated
drafter's budget is load-aware):

    same text: True
    32 target passes instead of 56, tau 1.77 tokens a round
"""

import torch

import hf_dspark  # noqa: F401  (teaches generate() about the drafter)
from hf_dspark.models.loading import load_drafter, load_target

target, tokenizer = load_target("smollm2", dtype="float32")
drafter = load_drafter("smollm2-dspark", dtype="float32")

inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Tom has 3 boxes with 12 pens each. He gives away 9 pens. How many pens are left?"}],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)
plain = target.generate(**inputs, max_new_tokens=64, do_sample=False)
fast = target.generate(**inputs, max_new_tokens=64, do_sample=False, assistant_model=drafter, return_dict_in_generate=True)

print("same text:", torch.equal(plain, fast.sequences))
print(f"{fast.stats.rounds + 1} target passes instead of {fast.stats.rows[0].generated}, tau {fast.stats.tau:.2f} tokens a round")
