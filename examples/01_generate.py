"""One prompt, with and without the drafter: the same text, fewer target passes.

Expected output (fp32, greedy; passes and tau depend on what rounds cost on the machine, since the budget of a calibrated drafter is
load-aware):

    same text: True
    27 target passes instead of 56, tau 2.12 tokens a round
"""

import torch

import hf_dspark  # generate() takes the drafter from here on

target, tokenizer = hf_dspark.load_target("smollm2", dtype="float32")
drafter = hf_dspark.load_drafter("smollm2-dspark", dtype="float32")

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
