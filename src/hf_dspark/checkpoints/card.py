"""Model cards: what a drafter or adapter is, how it is used, how it was made, what it was measured to do.

A card tells what the files beside it say: `config.json` or the adapter's files, `recipe.json`, `calibration.json`, `results/decoded.json`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
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
_TASK: dict[str, Any] = {"task_type": "text-generation", "task_name": "Speculative decoding"}


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
        folder (`Path`): what `save_pretrained` wrote, and the result files that lie in it.
        name (`str`): how a reader loads it: a repository, or the folder's name.
        title (`str`, *optional*): heading; `name` where None.
        target (`str`, *optional*): its target's name; what the files say where None.
        licence (`str`, *optional*): the Hub's name of a licence, for instance `apache-2.0`.
        tags (`list[str]`, *optional*): further ones.
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
        return ModelCard.from_template(
            data,
            template_path=str(_TEMPLATE),
            marker=MARKER,
            title=title or name,
            name=name,
            adapter=adapter,
            base=sidecar.get("base") or recipe.get("base") or config.get("base_model_name_or_path") or "",
            base_fingerprint=sidecar.get("base_fingerprint"),
            target=target,
            target_name=TARGET_NAME if name == DRAFTER_NAME else None,
            shape=_shape(config) if config and not adapter else None,
            results=_results(decoded) if decoded else None,
            training=_training(recipe, sorted(path.name for path in folder.glob("recipe*.json"))) if "arguments" in recipe else None,
            images=[image for image in IMAGES if (folder / image).is_file()],
            calibration=_calibration(calibration, config),
            limits=_limits(decoded, recipe, bool(config.get("enable_confidence_head", True)), adapter),
            licence=licence,
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"A result file in {folder} is not one that this version writes ({type(error).__name__}: {error}). Remove it, or measure again."
        ) from error


def write_training_card(folder: Path, recipe: Mapping[str, Any], drafter: PreTrainedModel) -> None:
    """Write `README.md` and `recipe.json` into a saved drafter's folder.

    Args:
        folder (`Path`): that `save_pretrained` or `save_adapter` wrote; nothing happens where it does not exist.
        recipe: a finished run's.
        drafter (`DSparkDrafter`): for its target's name.
    """
    if not folder.is_dir():
        return
    atomic_write_json(folder / "recipe.json", recipe, indent=1)
    card = render_card(folder, name=folder.name, title=folder.resolve().parent.name, target=drafter.config.target_name)
    atomic_write_text(folder / "README.md", str(card))


def _shape(config: Mapping[str, Any]) -> str:
    rank = config.get("markov_rank")
    head = f"a {config.get('markov_head_type')} Markov head of rank {rank}" if rank else "no sequential head (DFlash)"
    parts = [f"{config.get('block_size')} tokens a block", f"{config.get('num_hidden_layers')} backbone layers", head]
    parts += ["a confidence head"] if config.get("enable_confidence_head") else []
    parts += [f"a draft vocabulary of {config['draft_vocab_size']:,} tokens"] if config.get("draft_vocab_size") else []
    parts += ["n-gram copies from the text mixed into its drafts"] if config.get("copy_weights") else []
    return ", ".join(parts)


def _results(decoded: Mapping[str, Any]) -> str:
    """Decoded tau by prompt set and temperature, as a table."""
    settings, sets = decoded["settings"], decoded["settings"]["sets"]
    lines = [["tau", *sets, "mean"], ["---", *["---:"] * (len(sets) + 1)]]
    for kind, suffix in (("decoded", ""), ("without_copying", ", without n-gram copying")):
        for key, part in decoded.get(kind, {}).items():
            if key.startswith("T="):
                taus = [float(part["by_source"][one]) for one in sets]
                lines.append([key.replace("=", " = ") + suffix, *(f"{tau:.2f}" for tau in (*taus, sum(taus) / len(taus)))])
    rule = ", block verification at T > 0" if settings.get("verification") == "block" else ""
    return (
        "\n".join(f"| {' | '.join(line)} |" for line in lines)
        + f"\n\nTau: tokens a round, the target's own included; higher is better. {settings['limit']} prompts a set, "
        f"at most {settings['max_new_tokens']} new tokens, batches of {settings['batch_size']}, target "
        f"`{settings['target']}` in {settings['dtype']}{rule} "
        f"([{DECODED}]({DECODED}), {_machine(decoded)})."
    )


def _training(recipe: Mapping[str, Any], files: list[str]) -> str:
    """A training run in one paragraph."""
    data, settings, lora = recipe["data"], recipe["arguments"]["training"], recipe.get("lora")
    if "base" in recipe:
        what = f"LoRA of rank {lora['rank']} on {', '.join(lora['targets'])}" if lora else "All weights"
        what += f" of `{recipe['base']}` (fingerprint `{recipe['base_fingerprint'][:16]}`)"
    else:
        what = "Backbone and heads"
    sources = sorted(data["by_source"].items(), key=lambda item: (-item[1], item[0]))
    text = (
        f"{what}, trained on {data['rows']['train']:,} responses that the target wrote ({data['response_tokens']['train']:,} tokens: "
        f"{', '.join(f'{source} {count:,}' for source, count in sources)}) with {settings.get('optimizer', 'adamw')}, peak rate "
        f"{settings['learning_rate']:g}, {settings['batch_size']} sequences a step"
    )
    if "result" in recipe:
        result = recipe["result"]
        text += f": {result['steps']:,} steps, {result['minutes']:.0f} minutes on {_machine(recipe)}"
    return f"{text}. Every option: {', '.join(f'[{file}]({file})' for file in files)}."


def _calibration(record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    temperatures = record.get("temperatures") or config.get("confidence_temperatures")
    if not config.get("enable_confidence_head"):
        return "It has no confidence head: it decodes with the budget `full` or `static:N`."
    if not temperatures:
        return "The confidence head is not calibrated. `hf-dspark calibrate` does that, on prompts like those that will be served."
    text = f"Confidence temperatures {' '.join(f'{t:.2f}' for t in temperatures)}"
    if "after" not in record:
        return f"{text}; what they were fitted on is not recorded here."
    data = record["data"]
    return (
        f"{text}, fitted on {sum(one['rounds_fitted'] for one in data):,} rounds ({', '.join(one['file'] for one in data)}). On held-out "
        f"rounds the calibration error of prefix survival falls from {record['before']['ece']:.1%} to {record['after']['ece']:.1%} "
        f"([{CALIBRATION}]({CALIBRATION}))."
    )


def _limits(decoded: Mapping[str, Any], recipe: Mapping[str, Any], confidence: bool, adapter: bool) -> list[str]:
    limits = ["It drafts for its own target. A fine-tuned target is decoded as exactly; expect fewer accepted tokens."]
    if decoded:
        limits.append("Acceptance was measured on the sets above only; text of other kinds may be drafted less well.")
    thinking = {one["thinking"] for one in recipe.get("data", {}).get("folders", []) if one.get("thinking") is not None}
    if thinking == {False}:
        limits.append("The training data was written with thinking mode off: expect fewer accepted tokens where the target thinks.")
    if not confidence and not adapter:
        limits.append("Without a confidence head, the threshold and load-aware budgets cannot be used.")
    if adapter:
        limits.append("Confidence temperatures of its base were measured without it: calibrate again with the adapter active.")
    return limits


def _machine(record: Mapping[str, Any]) -> str:
    machine = record["machine"]
    return machine.get("gpu") or f"{machine['cpu']}, {machine.get('cpu_count', machine.get('cores'))} cores"


def _metadata(decoded: Mapping[str, Any], calibration: Mapping[str, Any]) -> list[EvalResult]:
    """Measured tau by prompt set and temperature, and the calibration's error, as the Hub's metadata takes them."""
    found = [
        EvalResult(
            **_TASK,
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
                **_TASK,
                dataset_type=source,
                dataset_name=f"{source}, held out",
                metric_type="ece",
                metric_name="calibration error of prefix survival",
                metric_value=round(float(calibration["after"]["ece"]), 5),
            )
        )
    return found
