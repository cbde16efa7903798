"""What a checkpoint is, without loading a weight."""

from __future__ import annotations

import math
from typing import Any

from hf_dspark.adapters.files import CONFIG_FILE, SIDECAR_FILE
from hf_dspark.calibration.records import copying_of, read_calibration
from hf_dspark.checkpoints.formats import parse_config
from hf_dspark.checkpoints.tensor_files import list_tensors
from hf_dspark.errors import CheckpointError
from hf_dspark.hub.files import hub_arguments, read_json
from hf_dspark.hub.names import resolve_drafter

_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}


def describe(name: str, **hub: Any) -> dict[str, Any]:
    """Facts of a checkpoint: format, target, heads, block, taps, calibration, size, and what it cannot do here.

    From the Hub only configs and the headers of weight files are fetched. `hub`: `revision`, `subfolder`, .. as in `from_pretrained`.

    Raises:
        CheckpointError: for a checkpoint that cannot be read, saying why.
    """
    source, hub = resolve_drafter(name), hub_arguments(hub)
    raw = read_json(source, "config.json", **hub)
    if raw is None:
        return _adapter(name, source, hub)
    form, config = parse_config(raw, source)
    tensors = list_tensors(source, headers_only=True, **hub).values()
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
        "parameters": sum(math.prod(one.shape) for one in tensors),
        "bytes": sum(math.prod(one.shape) * _BYTES.get(one.dtype, 1) for one in tensors),
        "budget": "load-aware" if temperatures else "full",
        "cannot": cannot,
    }


def _adapter(name: str, source: str, hub: dict[str, Any]) -> dict[str, Any]:
    config, sidecar = read_json(source, CONFIG_FILE, **hub), read_json(source, SIDECAR_FILE, **hub) or {}
    if config is None:
        raise CheckpointError(f"{name!r} holds neither config.json nor {CONFIG_FILE}. Name the folder or repository of a drafter.")
    return {
        "name": name,
        "format": "adapter (PEFT)",
        "base": sidecar.get("base") or config.get("base_model_name_or_path"),
        "base_fingerprint": sidecar.get("base_fingerprint"),
        "target": sidecar.get("target"),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "parameters": sidecar.get("parameters"),
    }
