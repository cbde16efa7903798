"""The drafter inside a transformers pipeline, and text that appears while it is written.

Expected output (fp32, greedy; a piece is what one round adds, so their number depends on what rounds cost on the machine):

    pipeline, same text: True
    streamed, same text: True
    pieces: 21
"""

from threading import Thread

from transformers import TextIteratorStreamer, pipeline

import hf_dspark  # generate() takes the drafter from here on

target, tokenizer = hf_dspark.load_target("smollm2", dtype="float32")
drafter = hf_dspark.load_drafter("smollm2-dspark", dtype="float32")
chat = [{"role": "user", "content": "Name three primary colours."}]
options = {"max_new_tokens": 32, "do_sample": False}

# 1. A pipeline takes the drafter as it takes any assistant model.
writer = pipeline("text-generation", model=target, tokenizer=tokenizer)
plain = writer(chat, **options)[0]["generated_text"][-1]["content"]
fast = writer(chat, **options, assistant_model=drafter)[0]["generated_text"][-1]["content"]
print("pipeline, same text:", plain == fast)

# 2. A streamer gets the tokens of each round as soon as they are accepted.
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
thread = Thread(target=target.generate, kwargs={**inputs, **options, "assistant_model": drafter, "streamer": streamer})
thread.start()
pieces = list(streamer)
thread.join()
print("streamed, same text:", "".join(pieces) == plain)
print("pieces:", len([piece for piece in pieces if piece]))
