"""Push a drafter to the Hub with its card, results and calibration, pull it back, and push a calibration alone.

Needs a token that may write (`hf auth login`, or HF_TOKEN); give your own namespace:

    python examples/05_push_pull.py YOUR_NAME

Expected output:

    pushed: drafter, card, calibration and results in one commit
    pulled: same weights True, budget load-aware
    my temperatures on the same weights: [1.5, 1.4, 1.3, 1.2, 1.1, 1.0, 1.0]
"""

import sys

import torch

import hf_dspark

if len(sys.argv) != 2:
    sys.exit("usage: python examples/05_push_pull.py YOUR_NAME")
mine, temperatures = f"{sys.argv[1]}/smollm2-dspark", f"{sys.argv[1]}/smollm2-dspark-temperatures"

# 1. Weights (without the target's), config, calibration, results, a card rendered from them. `revision=` and `create_pr=` as everywhere.
drafter = hf_dspark.load_drafter("smollm2-dspark")
drafter.push_to_hub(mine, private=True, licence="apache-2.0")
print("pushed: drafter, card, calibration and results in one commit")

# 2. Anyone who may read it loads it by name.
pulled = hf_dspark.DSparkDrafter.from_pretrained(mine)
same = all(torch.equal(a, b) for a, b in zip(drafter.state_dict().values(), pulled.state_dict().values(), strict=True))
print(f"pulled: same weights {same}, budget {pulled.budget}")

# 3. Somebody else's drafter, your temperatures: a calibration has a repository of its own, and goes on top of the weights when loading.
record = {"format": 1, "temperatures": [1.5, 1.4, 1.3, 1.2, 1.1, 1.0, 1.0]}  # made up here; hf-dspark calibrate fits them
hf_dspark.push_calibration(record, temperatures, private=True)
pulled = hf_dspark.DSparkDrafter.from_pretrained(mine, calibration=temperatures)
print("my temperatures on the same weights:", pulled.config.confidence_temperatures)
