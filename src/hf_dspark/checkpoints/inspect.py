"""What a checkpoint is, without loading a weight. Knows configs, headers of safetensors files and huggingface_hub; knows no module."""

from __future__ import annotations

import math
from typing import Any

from hf_dspark.adapters.files import CONFIG_FILE, SIDECAR_FILE, read_adapter_json
from hf_dspark.calibration.records import copying_of, read_calibration
from hf_dspark.checkpoints.formats.own import own_config
from hf_dspark.checkpoints.formats.reading import foreign_config, recognise_format
from hf_dspark.checkpoints.tensor_files import tensor_shapes
from hf_dspark.errors import CheckpointError
from hf_dspark.hub.files import HUB_ARGUMENTS, read_config
from hf_dspark.hub.names import resolve_drafter


def describe(name: str, **hub_arguments: Any) -> dict[str, Any]:
    """Facts of a checkpoint: format, target, heads, block, taps, calibration, size, what it can and cannot do here.

    From the Hub only configs and the headers of weight files are fetched.

    Args:
        name (`str`): embedded name, folder or Hub id.
        hub_arguments: `revision`, `subfolder`, `token`, .. as in `from_pretrained`.
    Raises:
        CheckpointError: for a checkpoint that cannot be read, saying why.
    """
    source = resolve_drafter(name)
    hub = {key: value for key, value in hub_arguments.items() if key in HUB_ARGUMENTS and value is not None}
    raw = read_config(source, **hub)
    if raw is None:
        return _adapter(name, source, hub)
    form = recognise_format(raw, source)
    if form is None:
        config = own_config(raw, source)
    else:
        config = foreign_config(form, raw, source)
    shapes = tensor_shapes(source, **hub)
    numbers = sum(math.prod(shape) for shape, _ in shapes.values())
    stored = sum(math.prod(shape) * _BYTES.get(dtype, 1) for shape, dtype in shapes.values())
    calibration = read_calibration(source, **hub)
    copies = config.copy_weights or (copying_of(calibration)[0] if calibration else None)
    temperatures = config.confidence_temperatures or (calibration or {}).get("temperatures")
    head = f"{config.markov_head_type}, rank {config.markov_rank}" if config.markov_rank else "none (DFlash)"
    slides = [kind for kind in config.layer_types or () if kind != "full_attention"]
    cannot = []
    if not config.enable_confidence_head:
        cannot.append("threshold and load-aware budgets (no confidence head)")
    elif not temperatures:
        cannot.append("calibrated confidences, until hf-dspark calibrate has run")
    if slides or not config.sample_from_anchor or config.backbone != "qwen3" or config.draft_vocab_size:
        cannot.append("conversion to deepspec" if config.backbone == "qwen3" else "conversion to speculators")
    return {
        "name": name,
        "format": "hf-dspark" if form is None else form.name,
        "target": config.target_name or config.target_model_type,
        "target_layers": config.num_target_layers,
        "hidden_size": config.hidden_size,
        "vocabulary": config.vocab_size or None,
        "draft_vocabulary": config.draft_vocab_size or config.vocab_size or None,
        "backbone": f"{config.backbone}, {config.num_hidden_layers} layers" + (f", {len(slides)} with a sliding window" if slides else ""),
        "sequential_head": head,
        "confidence_head": config.enable_confidence_head,
        "block_size": config.block_size,
        "first_predicting_slot": config.first_slot,
        "taps": list(config.target_layer_ids),
        "mask_token_id": config.mask_token_id,
        "temperatures": [round(float(t), 4) for t in temperatures] if temperatures else None,
        "copies": len(copies) if copies else None,
        "ece_after": ((calibration or {}).get("after") or {}).get("ece"),
        "parameters": numbers,
        "bytes": stored,
        "budget": "load-aware" if temperatures else "full",
        "cannot": cannot,
    }


_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}


def _adapter(name: str, source: str, hub: dict[str, Any]) -> dict[str, Any]:
    config, sidecar = read_adapter_json(source, CONFIG_FILE, hub), read_adapter_json(source, SIDECAR_FILE, hub)
    if config is None:
        raise CheckpointError(f"{name!r} holds neither config.json nor {CONFIG_FILE}. Name the folder or repository of a drafter.")
    sidecar = sidecar or {}
    return {
        "name": name,
        "format": "adapter (peft)",
        "base": sidecar.get("base") or config.get("base_model_name_or_path"),
        "base_fingerprint": sidecar.get("base_fingerprint"),
        "target": sidecar.get("target"),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "parameters": sidecar.get("parameters"),
    }
