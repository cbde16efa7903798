"""Fit temperatures to a drafter's confidences on prompts of your own, and see what they do.

Thirty prompts are too few to trust; give hundreds. `hf-dspark calibrate` does the same from files.

Expected output (fp32, greedy; figures depend a little on the dtype):

    rounds: 555 to fit, 570 to judge
    calibration error: 4.2% -> 3.0%
    temperatures: 1.31 0.96 3.98 0.28 0.22 10.00 0.76
    budget: load-aware
"""

import json
import tempfile
from pathlib import Path

import hf_dspark
from hf_dspark.evaluation.calibrate import calibrate

target, tokenizer = hf_dspark.load_target("smollm2", dtype="fast")
drafter = hf_dspark.load_drafter("smollm2-dspark", dtype="fast")
drafter.drop_calibration()  # it comes calibrated; a drafter of your own does not

questions = [f"What is {a} times {b}? Think step by step." for a in (7, 12, 25, 31, 44, 58) for b in (3, 8, 14, 21, 36)]
chats = [[{"role": "user", "content": question}] for question in questions]
prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]

record = calibrate(target, drafter, {"times": prompts}, end_ids=[tokenizer.eos_token_id], max_new_tokens=96, concurrency=15)
drafter.set_calibration(record)

data = record["data"][0]
print(f"rounds: {data['rounds_fitted']} to fit, {data['rounds_judged']} to judge")
print(f"calibration error: {100 * record['before']['ece']:.1f}% -> {100 * record['after']['ece']:.1f}%")
print("temperatures:", " ".join(f"{t:.2f}" for t in record["temperatures"]))
print("budget:", drafter.budget)

# Saved with the drafter, and applied when it is loaded again.
with tempfile.TemporaryDirectory() as folder:
    drafter.save_pretrained(folder)
    again = hf_dspark.DSparkDrafter.from_pretrained(folder)
    assert again.config.confidence_temperatures == record["temperatures"]
    assert json.loads(Path(folder, "calibration.json").read_text())["data"] == record["data"]
