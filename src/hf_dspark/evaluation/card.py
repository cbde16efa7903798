"""The model card of a trained drafter or adapter: what it is, how it was made, its curve. Knows `recipe.json`; knows no training loop."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from hf_dspark.errors import DataError
from hf_dspark.evaluation.recipes import plot_curve, render_recipe

logger = logging.getLogger(__name__)

_CARD = """\
---
library_name: {{ "peft" if adapter else "hf_dspark" }}
pipeline_tag: text-generation
{%- if target %}
base_model: {{ target }}
{%- endif %}
tags: [speculative-decoding, dspark, {{ "adapter" if adapter else "drafter" }}]
---

# {{ title }}

{% if adapter -%}
An adapter for the DSpark drafter `{{ base }}`, for drafts in the domain of the data below. It changes no weight of the target: the output
keeps the target's distribution with or without it.

```python
import hf_dspark
from hf_dspark.hub import load_drafter, load_target

target, tokenizer = load_target("{{ target or "TARGET" }}")
drafter = load_drafter("{{ base }}")
drafter.load_adapter("{{ folder }}")
inputs = tokenizer("Hello", return_tensors="pt")
output = target.generate(**inputs, assistant_model=drafter, max_new_tokens=64)
```
{%- else -%}
A DSpark drafter for `{{ target or "the target it was trained with" }}`. It holds no weight of its target; it borrows the target's
embedding and head.

```python
import hf_dspark
from hf_dspark.hub import load_drafter, load_target

target, tokenizer = load_target("{{ target or "TARGET" }}")
drafter = load_drafter("{{ folder }}")
inputs = tokenizer("Hello", return_tensors="pt")
output = target.generate(**inputs, assistant_model=drafter, max_new_tokens=64)
```
{%- endif %}

## Training

{{ table }}

No hidden state of the target was written to disk: they were computed on the fly.
{% if curve %}
![Held-out tau over training]({{ curve }})
{% endif %}
Tau is the number of tokens a round, the target's own bonus token included. The confidence head is not calibrated.
"""


def write_training_card(folder: Path, recipe: Mapping[str, Any], drafter: Any) -> None:
    """Write `README.md`, `recipe.json` and, where matplotlib is installed, `training_curve.png` into a saved drafter's folder.

    Args:
        folder (`Path`): that `save_pretrained` or `save_adapter` wrote; nothing happens where it does not exist.
        recipe: a finished run's.
        drafter (`DSparkDrafter`): for its target's name.
    """
    if not folder.is_dir():
        return
    curve = "training_curve.png"
    try:
        plot_curve(recipe, folder / curve)
    except DataError as error:
        logger.warning("The card of %s has no curve: %s", folder, error)
        curve = ""
    target = drafter.config.target_name or recipe["arguments"]["options"]["target"]
    text = (
        Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)  # markdown, not HTML
        .from_string(_CARD)
        .render(
            adapter="lora" in recipe,
            base=recipe.get("base", ""),
            curve=curve,
            folder=folder.name,
            table=render_recipe(recipe),
            target=target,
            title=folder.resolve().parent.name,
        )
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
