"""Model cards: what a drafter or adapter is, how it was made, what it was measured to do. Knows the files of a saved drafter's folder;
knows no training loop, no model and no network.

A card says only what lies in the folder: `config.json` or the adapter's files, `recipe.json`, `calibration.json`, `results/decoded.json`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_dspark.adapters.files import CONFIG_FILE as ADAPTER_CONFIG
from hf_dspark.adapters.files import SIDECAR_FILE
from hf_dspark.calibration.records import FILE_NAME as CALIBRATION
from hf_dspark.errors import CheckpointError, DataError
from hf_dspark.evaluation.load_plots import plot_reliability
from hf_dspark.evaluation.load_tables import render_calibration
from hf_dspark.evaluation.recipes import plot_curve, render_recipe
from hf_dspark.evaluation.training_tables import render_decoded

logger = logging.getLogger(__name__)

# A card with this line was written here, and may be written anew; any other card's text is its author's.
MARKER = "<!-- written by hf_dspark from the files beside it -->"
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
TEMPLATE = Path(__file__).with_name("card.md.j2")
CURVE, DIAGRAM, DECODED = "training_curve.png", "reliability.png", Path("results", "decoded.json")


def render_card(
    folder: Path,
    *,
    name: str,
    title: str | None = None,
    target: str | None = None,
    licence: str | None = None,
    tags: list[str] | None = None,
) -> ModelCard:
    """The card of a saved drafter or adapter, with its measured results as `model-index` metadata.

    Args:
        folder (`Path`): what `save_pretrained` wrote, and the result files that lie in it. The curve of training and the reliability
            diagram are drawn into it where matplotlib is installed.
        name (`str`): how a reader loads it: a repository, or the folder's name.
        title (`str`, *optional*): heading; `name` where None.
        target (`str`, *optional*): its target's name; what the files say where None.
        licence (`str`, *optional*): the Hub's name of a licence, for instance `apache-2.0`.
        tags (`list[str]`, *optional*): further ones.
    Raises:
        CheckpointError: for a file that is not what its name says.
    """
    sidecar, recipe = _read(folder / SIDECAR_FILE), _read(folder / "recipe.json")
    adapter = (folder / ADAPTER_CONFIG).is_file() or "lora" in recipe
    config = _read(folder / (ADAPTER_CONFIG if adapter else "config.json"))
    calibration, decoded = _read(folder / CALIBRATION), _read(folder / DECODED)
    target = target or (sidecar.get("target") if adapter else config.get("target_name"))
    target = target or recipe.get("arguments", {}).get("options", {}).get("target")
    base = sidecar.get("base") or recipe.get("base") or config.get("base_model_name_or_path") or ""
    temperatures = config.get("confidence_temperatures") if not calibration else None
    own_domain = {**calibration, "others": {}}
    words = ["speculative-decoding", "dspark", "adapter" if adapter else "drafter", *(tags or [])]
    if not adapter and not config.get("markov_rank", 1):
        words.insert(2, "dflash")
    try:
        data = ModelCardData(
            license=licence,
            base_model=target if target and _REPO.fullmatch(target) and not Path(target).exists() else None,
            library_name="peft" if adapter else "hf_dspark",
            pipeline_tag="text-generation",
            tags=list(dict.fromkeys(words)),
            model_name=(title or name).split("/")[-1],
            eval_results=_results(decoded, calibration) or None,
        )
        card = ModelCard.from_template(
            data,
            template_path=str(TEMPLATE),
            marker=MARKER,
            title=title or name,
            name=name,
            adapter=adapter,
            base=base,
            base_fingerprint=sidecar.get("base_fingerprint"),
            target=target,
            shape=_shape(config) if not adapter else None,
            block_size=config.get("block_size"),
            recipe=render_recipe(recipe) if "arguments" in recipe else None,
            curve=_drawn(folder, CURVE, lambda: plot_curve(recipe, folder / CURVE)) if "arguments" in recipe else None,
            decoded=render_decoded(decoded) if decoded else None,
            calibration=render_calibration(calibration) if "after" in calibration else None,
            temperatures=temperatures or calibration.get("temperatures"),
            confidence=bool(config.get("enable_confidence_head")),
            diagram=_drawn(folder, DIAGRAM, lambda: plot_reliability(own_domain, folder)) if "after" in calibration else None,
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"A result file in {folder} is not one that this version writes ({type(error).__name__}: {error}). Remove it, or measure again."
        ) from error
    return card


def write_training_card(folder: Path, recipe: Mapping[str, Any], drafter: Any) -> None:
    """Write `README.md`, `recipe.json` and, where matplotlib is installed, `training_curve.png` into a saved drafter's folder.

    Args:
        folder (`Path`): that `save_pretrained` or `save_adapter` wrote; nothing happens where it does not exist.
        recipe: a finished run's.
        drafter (`DSparkDrafter`): for its target's name.
    """
    if not folder.is_dir():
        return
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    (folder / CURVE).unlink(missing_ok=True)  # of an earlier stand of the run
    card = render_card(folder, name=folder.name, title=folder.resolve().parent.name, target=drafter.config.target_name)
    card.save(folder / "README.md")


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Remove it, or write it again.") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} holds a {type(record).__name__}, not an object. Remove it, or write it again.")
    return record


def _drawn(folder: Path, name: str, draw: Any) -> str | None:
    if not (folder / name).is_file():
        try:
            draw()
        except DataError as error:
            logger.warning("The card of %s has no %s: %s", folder, name, error)
            return None
    return name


def _shape(config: Mapping[str, Any]) -> str:
    rank = config.get("markov_rank")
    head = f"a {config.get('markov_head_type')} head of rank {rank}" if rank else "no sequential head (DFlash)"
    parts = [f"{config.get('block_size')} tokens a block", f"{config.get('num_hidden_layers')} backbone layers", head]
    if config.get("draft_vocab_size"):
        parts.append(f"a draft vocabulary of {config['draft_vocab_size']:,} tokens")
    return ", ".join(parts)


def _results(decoded: Mapping[str, Any], calibration: Mapping[str, Any]) -> list[EvalResult]:
    """Measured tau by prompt set and temperature, and the calibration's error, as the Hub's metadata takes them."""
    task: dict[str, Any] = {"task_type": "text-generation", "task_name": "Speculative decoding"}
    found = [
        EvalResult(
            **task,
            dataset_type=source,
            dataset_name=source,
            metric_type="tau",
            metric_name=f"tokens a round ({key.replace('=', ' = ')})",
            metric_value=round(float(tau), 4),
        )
        for key, part in decoded.get("decoded", {}).items()
        if key.startswith("T=")
        for source, tau in part["by_source"].items()
    ]
    if "after" in calibration:
        source = ", ".join(one["file"] for one in calibration["data"])
        found.append(
            EvalResult(
                **task,
                dataset_type=source,
                dataset_name=f"{source}, held out",
                metric_type="ece",
                metric_name="calibration error of prefix survival",
                metric_value=round(float(calibration["after"]["ece"]), 5),
            )
        )
    return found
