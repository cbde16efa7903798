"""Model cards: what a drafter or adapter is, how it is used, how it was made, what it was measured to do.

A card tells what the files beside it say: `config.json` or the adapter's files, `recipe.json`, `calibration.json`, `results/decoded.json`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import StrictUndefined, Template, TemplateError
from transformers import PreTrainedModel

from hf_dspark.adapters.files import CONFIG_FILE as ADAPTER_CONFIG
from hf_dspark.adapters.files import SIDECAR_FILE
from hf_dspark.calibration.records import FILE_NAME as CALIBRATION
from hf_dspark.errors import CheckpointError
from hf_dspark.hub.bundled import DRAFTER_NAME, TARGET_NAME
from hf_dspark.hub.files import read_json
from hf_dspark.utils.files import atomic_write_json, atomic_write_text

# A card with this line was written here, and may be written anew; any other card's text is its author's.
MARKER = "<!-- written by hf_dspark from the files beside it -->"
DECODED = "results/decoded.json"
IMAGES = tuple(Path(folder, name) for name in ("training_curve.png", "reliability.png") for folder in ("", "results"))
_TEMPLATE = Path(__file__).with_name("card.md.j2")
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def render_card(
    folder: Path,
    *,
    name: str,
    title: str | None = None,
    target: str | None = None,
    licence: str | None = None,
    tags: list[str] | None = None,
) -> ModelCard:
    """The card of a saved drafter or adapter, from the files in its folder, with its measured results as `model-index` metadata.

    Args:
        name (`str`): how a reader loads it: a repository, or the folder's name.
        title (`str`, *optional*): heading; `name` where None.
        target (`str`, *optional*): its target's name; what the files say where None.
    Raises:
        CheckpointError: for a file that is not what its name says.
    """
    files = (SIDECAR_FILE, "recipe.json", CALIBRATION, DECODED)
    sidecar, recipe, calibration, decoded = (read_json(str(folder), file) or {} for file in files)
    adapter = (folder / ADAPTER_CONFIG).is_file() or "lora" in recipe
    config = read_json(str(folder), ADAPTER_CONFIG if adapter else "config.json") or {}
    target = target or (sidecar.get("target") if adapter else config.get("target_name"))
    target = target or recipe.get("arguments", {}).get("options", {}).get("target")
    dflash = not adapter and not config.get("markov_rank", 1)
    words = ["speculative-decoding", "dspark", *(["dflash"] if dflash else []), "adapter" if adapter else "drafter", *(tags or [])]
    try:
        data = ModelCardData(
            license=licence,
            base_model=target if target and _REPO.fullmatch(target) and not Path(target).exists() else None,
            library_name="peft" if adapter else "hf_dspark",
            pipeline_tag="text-generation",
            tags=list(dict.fromkeys(words)),
            model_name=(title or name).split("/")[-1],
            eval_results=_metadata(decoded, calibration) or None,
        )
        text = Template(_TEMPLATE.read_text(encoding="utf-8"), undefined=StrictUndefined).render(
            card_data=data.to_yaml(),
            marker=MARKER,
            title=title or name,
            name=name,
            adapter=adapter,
            base=sidecar.get("base") or recipe.get("base") or config.get("base_model_name_or_path") or "",
            base_fingerprint=sidecar.get("base_fingerprint"),
            target=target,
            target_name=TARGET_NAME if name == DRAFTER_NAME else None,
            config=config,
            decoded=decoded,
            results=_results(decoded) if decoded else "",
            recipe=recipe,
            recipes=sorted(path.name for path in folder.glob("recipe*.json")),
            images=[image for image in IMAGES if (folder / image).is_file()],
            calibration=calibration,
            licence=licence,
        )
    except (KeyError, TypeError, AttributeError, IndexError, TemplateError) as error:
        raise CheckpointError(
            f"A result file in {folder} is not one that this version writes ({type(error).__name__}: {error}). Remove it, or measure again."
        ) from error
    return ModelCard(text)


def write_training_card(folder: Path, recipe: Mapping[str, Any], drafter: PreTrainedModel) -> None:
    """Write `README.md` and `recipe.json`, a finished run's, into a saved drafter's folder, if there is one."""
    if not folder.is_dir():
        return
    atomic_write_json(folder / "recipe.json", recipe, indent=1)
    card = render_card(folder, name=folder.name, title=folder.resolve().parent.name, target=drafter.config.target_name)
    atomic_write_text(folder / "README.md", str(card))


def _results(decoded: Mapping[str, Any]) -> str:
    """Decoded tau by prompt set and temperature, as a table."""
    sets = decoded["settings"]["sets"]
    lines = [["tau", *sets, "mean"], ["---", *["---:"] * (len(sets) + 1)]]
    for kind, suffix in (("decoded", ""), ("without_copying", ", without n-gram copying")):
        for key, part in decoded.get(kind, {}).items():
            if key.startswith("T="):
                taus = [float(part["by_source"][one]) for one in sets]
                lines.append([key.replace("=", " = ") + suffix, *(f"{tau:.2f}" for tau in (*taus, sum(taus) / len(taus)))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _metadata(decoded: Mapping[str, Any], calibration: Mapping[str, Any]) -> list[EvalResult]:
    """Measured tau by prompt set and temperature, and the calibration's error, as the Hub's metadata takes them."""
    found = [
        (source, source, "tau", round(float(tau), 4), f"tokens a round ({key.replace('=', ' = ')})")
        for key, part in decoded.get("decoded", {}).items()
        if key.startswith("T=")
        for source, tau in part["by_source"].items()
    ]
    if "after" in calibration:
        files, error = ", ".join(one["file"] for one in calibration["data"]), round(float(calibration["after"]["ece"]), 5)
        found.append((files, f"{files}, held out", "ece", error, "calibration error of prefix survival"))
    return [
        EvalResult("text-generation", kind, name, metric, value, "Speculative decoding", metric_name=label)
        for kind, name, metric, value, label in found
    ]
