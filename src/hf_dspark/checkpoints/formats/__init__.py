"""Checkpoint formats, one module a project: `own`, `deepspec`, `speculators`, `dflash`; here the format of a file is recognised.

Imports: configuration, and headers of tensor files. Reads no weights and no network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_dspark.checkpoints.formats.deepspec import DEEPSPEC, DEEPSPEC_GEMMA4, to_deepspec
from hf_dspark.checkpoints.formats.dflash import MODEL_OPTIMIZER, SPECFORGE, TRANSFORMERS_DFLASH, ZLAB_DFLASH
from hf_dspark.checkpoints.formats.foreign import Format
from hf_dspark.checkpoints.formats.own import MODEL_TYPE, own_config
from hf_dspark.checkpoints.formats.speculators import SPECULATORS, to_speculators
from hf_dspark.configuration_dspark import DSparkConfig
from hf_dspark.errors import CheckpointError

READ = (DEEPSPEC, DEEPSPEC_GEMMA4, SPECULATORS, ZLAB_DFLASH, SPECFORGE, MODEL_OPTIMIZER, TRANSFORMERS_DFLASH)
WRITTEN = {"deepspec": to_deepspec, "speculators": to_speculators}


def recognise_format(config: Mapping[str, Any], source: str) -> Format | None:
    """Say which format a parsed `config.json` belongs to (None: this package's own); others are refused by name, with the reason."""
    listed = config.get("architectures")
    architectures = [str(name) for name in listed] if isinstance(listed, (list, tuple)) else []
    model_type, dflash = config.get("model_type"), config.get("dflash_config")
    dflash = dflash if isinstance(dflash, Mapping) else {}
    projector = dflash.get("projector_type")
    if "speculators_model_type" in config or "speculators_config" in config:
        kind = config.get("speculators_model_type")
        if kind in ("dspark", "dflash"):
            return SPECULATORS
        found = f"a speculators checkpoint of type {kind!r}, which is no DSpark or DFlash drafter"
    elif "Gemma4DSparkModel" in architectures:
        return DEEPSPEC_GEMMA4
    elif model_type == "muse_glimmer_assistant":
        return TRANSFORMERS_DFLASH
    elif any("DFlash2" in name for name in architectures) or {"selector_rank", "conv_kernel_size"} & set(dflash):
        found = "z-lab's DFlash 2, whose convolutions and candidate selector this package does not have"
    elif projector == "domino":
        found = "SpecForge's Domino drafter, whose recurrent head this package does not have"
    elif "DSparkDraftModel" in architectures:
        return SPECFORGE
    elif "DFlashDraftModel" in architectures:
        return MODEL_OPTIMIZER if projector == "dspark" else ZLAB_DFLASH
    elif any(str(key).startswith("dspark_") for key in config):
        found = "a DeepSeek-V4 checkpoint with its own dspark_* keys, which needs that target's kernels"
    elif model_type == MODEL_TYPE:
        return None
    elif "Qwen3DSparkModel" in architectures:
        return SPECFORGE if dflash else DEEPSPEC
    elif any(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in architectures):
        found = f"a target model ({', '.join(architectures)}), not a drafter; DSparkDrafter.from_target makes a drafter for it"
    else:
        found = f"an unknown format (model_type {model_type!r}, architectures {architectures})"
    raise CheckpointError(
        f"{source!r} is {found}. Readable are this package's own format (model_type 'dspark') and "
        f"{', '.join(one.title for one in READ)}. Convert it, or choose another checkpoint."
    )


def parse_config(raw: Mapping[str, Any], source: str, **overrides: Any) -> tuple[Format | None, DSparkConfig]:
    """The format (None: this package's own) and the config of a parsed `config.json`; `overrides` stand in for stored fields."""
    form = recognise_format(raw, source)
    return form, own_config(raw, source, **overrides) if form is None else form.read_config(raw, source, **overrides)
