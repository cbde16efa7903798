"""Opens a stored drafter: config with the caller's overrides, and every tensor accounted for before any is read. Knows files and
DSparkConfig; knows no modules and no target.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode

from hf_dspark.calibration.records import check_calibration, copying_of, read_calibration
from hf_dspark.checkpoints.formats.own import check_own_config, clean_errors
from hf_dspark.checkpoints.formats.reading import Format, foreign_config, recognise_format
from hf_dspark.checkpoints.tensor_files import EMBEDDING_KEY, LM_HEAD_KEY, TensorRecord, check_tensors, list_tensors
from hf_dspark.configuration_dspark import DSparkConfig
from hf_dspark.errors import CheckpointError
from hf_dspark.hub.files import HUB_ARGUMENTS, cached_path, commit_of, read_config

T2D_KEY = "t2d"
_MASK_FILE = "mask_embedding.pt"


@dataclasses.dataclass
class StoredDrafter:
    """A checkpoint that was found complete: its format (None: this package's own), its config, where its tensors lie.

    `carried` are a foreign file's copies of the target's embedding and head, which are no tensors of the drafter.
    """

    form: Format | None
    config: DSparkConfig
    tensors: dict[str, TensorRecord]
    carried: dict[str, TensorRecord]
    calibration: dict[str, Any] | None = None
    own_block: int | None = None


def open_drafter(
    source: str, arguments: dict[str, Any], expected_tensors: Callable[[DSparkConfig], dict[str, torch.Tensor]]
) -> StoredDrafter:
    """Read a checkpoint's config and the headers of its files, and check that they agree.

    Args:
        source (`str`): folder or Hub repository.
        arguments (`dict`): those of `from_pretrained`; `config` and fields of `DSparkConfig` are taken out of it.
        expected_tensors (`Callable`): from a config to every tensor that the drafter itself needs; meta tensors will do.
    Returns:
        `StoredDrafter`.
    Raises:
        CheckpointError: for an unknown format, or tensors that do not fit the config.
        ValueError: for a block longer than the checkpoint's.
    """
    hub = {key: arguments[key] for key in HUB_ARGUMENTS if arguments.get(key) is not None}
    commit = commit_of(source, **hub)
    if commit is not None:  # all files from one commit, whatever is pushed meanwhile
        hub["revision"] = arguments["revision"] = commit
    form, config, own_block = _config(source, arguments, hub)
    found = list_tensors(source, arguments.get("variant"), **hub)
    check_sizes(config, found, source)
    with clean_errors(source):
        expected = expected_tensors(config)
    if form is None:
        check_tensors(expected, found, source)
        return StoredDrafter(None, config, found, {}, _calibration(source, config, own_block, hub), own_block)
    if not config.sample_from_anchor and cached_path(source, _MASK_FILE, **hub) is not None:
        raise CheckpointError(f"{source!r} keeps a mask embedding of its own in {_MASK_FILE}, a pickle, which is never read.")
    found = form.rename(found)
    t2d = found.pop(T2D_KEY, None)
    if config.draft_vocab_size is None:
        found.pop("d2t", None)  # an identity, where it is there at all
    copies = {
        EMBEDDING_KEY: torch.empty(config.vocab_size, config.hidden_size, device="meta"),
        LM_HEAD_KEY: torch.empty(config.draft_vocab_size or config.vocab_size, config.hidden_size, device="meta"),
    }
    carried = {key: copy for key, copy in copies.items() if form.carries == "must" or key in found}
    check_tensors({**expected, **carried}, found, source)
    _check_vocabulary_map(config, found, t2d, source)
    calibration = _calibration(source, config, own_block, hub)
    return StoredDrafter(form, config, found, {key: found.pop(key) for key in carried}, calibration, own_block)


def check_sizes(config: DSparkConfig, found: Mapping[str, TensorRecord], source: str) -> None:
    """Refuse a config that asks for more than its files hold, before anything of that size is made."""
    stored = sum(math.prod(record.shape) for record in found.values())
    d, layers = config.hidden_size, config.num_hidden_layers
    head = config.markov_rank * (config.vocab_size + (config.draft_vocab_size or config.vocab_size))
    mlp = 3 * d * config.intermediate_size
    asked = head + layers * (mlp + d * config.head_dim * 2 * config.num_attention_heads) + len(config.target_layer_ids) * d * d
    if asked > 2 * stored + 4096:
        raise CheckpointError(
            f"config.json of {source!r} asks for about {asked:,} numbers, its files hold {stored:,}. Nothing was allocated. Download it "
            "again, or check that config.json belongs to these weights."
        )


def _check_vocabulary_map(config: DSparkConfig, found: Mapping[str, TensorRecord], t2d: TensorRecord | None, source: str) -> None:
    """Refuse a draft vocabulary whose two maps disagree, or that leaves the target's."""
    if config.draft_vocab_size is None:
        return
    ids = found["d2t"].read() + torch.arange(config.draft_vocab_size)
    if ids.min() < 0 or ids.max() >= config.vocab_size or ids.unique().numel() != len(ids):
        raise CheckpointError(f"d2t of {source!r} does not map draft ids to distinct ids in 0..{config.vocab_size - 1}.")
    if t2d is None:
        return
    mask = t2d.read().to(torch.bool)
    if len(mask) != config.vocab_size or not torch.equal(mask.nonzero()[:, 0], ids.sort().values):
        raise CheckpointError(f"d2t and t2d of {source!r} name different draft vocabularies. Download it again.")


def _calibration(source: str, config: DSparkConfig, own_block: int | None, hub: dict[str, Any]) -> dict[str, Any] | None:
    """The calibration that lies beside the checkpoint; its temperatures go into the config where that has none.

    Args:
        own_block (`int`, *optional*): the block size that the checkpoint itself states; None where the caller gave temperatures or copying,
            which win.
    Raises:
        CheckpointError: if the file cannot be used, or says something else than the config.
    """
    if own_block is None:
        return None
    record = read_calibration(source, **hub)
    if record is None:
        return None
    check_calibration(record, own_block, source)
    temperatures = [float(t) for t in record["temperatures"][: config.block_size]]
    if config.confidence_temperatures is None:
        config.confidence_temperatures = temperatures
    elif list(config.confidence_temperatures) != temperatures:
        raise CheckpointError(
            f"{source!r}: calibration.json says temperatures {temperatures}, config.json {config.confidence_temperatures}; a confidence is "
            "calibrated once. Remove calibration.json, and calibrate again with --replace."
        )
    copying = copying_of(record)
    stated = copying_of({"copying": {"weights": config.copy_weights, "confidence": config.copy_confidence}})
    if stated == (None, None):
        config.copy_weights, config.copy_confidence = copying
    elif stated != copying:
        raise CheckpointError(
            f"{source!r}: calibration.json and config.json say different things about copying. Remove calibration.json, and calibrate "
            "again with --replace."
        )
    return {**record, "temperatures": temperatures}


def _config(source: str, arguments: dict[str, Any], hub: dict[str, Any]) -> tuple[Format | None, DSparkConfig, int | None]:
    """The format, the config, and the checkpoint's own block size; None for that where the caller brings temperatures or a config."""
    raw = read_config(source, **hub)
    if raw is None:
        offline = is_offline_mode() and not Path(source).is_dir()
        where = ", as far as the cache knows (offline: HF_HUB_OFFLINE is set)" if offline else ""
        raise CheckpointError(
            f"{source!r} holds no config.json{where}. Give the folder or repository of a drafter; adapters are loaded "
            "onto one with drafter.load_adapter(adapter)."
        )
    form = recognise_format(raw, source)
    stated = None
    if form is None:
        check_own_config(raw, source)
        longest, temperatures = raw.get("block_size"), raw.get("confidence_temperatures")
    else:
        stated = foreign_config(form, raw, source)
        longest, temperatures = stated.block_size, stated.confidence_temperatures

    fields = {f.name for f in dataclasses.fields(DSparkConfig)} - {"dtype"}
    overrides = {key: arguments.pop(key) for key in list(arguments) if key in fields}
    if isinstance(longest, int) and overrides.get("block_size", longest) > longest:
        raise ValueError(
            f"{source!r} was trained for blocks of {longest} tokens; got block_size={overrides['block_size']}. "
            f"Acceptance collapses beyond what was trained: use 1..{longest}."
        )
    own_block = None if {"confidence_temperatures", "copy_weights", "copy_confidence"} & overrides.keys() else longest
    shorter = overrides.get("block_size")
    if shorter is not None and "confidence_temperatures" not in overrides and temperatures:
        overrides["confidence_temperatures"] = list(temperatures)[:shorter]  # positions do not change by what follows them
    config = arguments.pop("config", None)
    if isinstance(config, DSparkConfig):
        return form, config, None
    if form is not None:
        return form, foreign_config(form, raw, source, **overrides), own_block
    with clean_errors(source):
        return form, DSparkConfig.from_pretrained(config or source, **hub, **overrides), own_block
