"""Opens a stored drafter: its config with the caller's overrides, and every tensor accounted for before any is read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode

from hf_dspark.calibration.records import check_calibration, copying_of, read_calibration
from hf_dspark.checkpoints.formats import parse_config
from hf_dspark.checkpoints.formats.foreign import Format
from hf_dspark.checkpoints.formats.own import clean_errors
from hf_dspark.checkpoints.tensor_files import EMBEDDING_KEY, LM_HEAD_KEY, TensorRecord, check_tensors, list_tensors
from hf_dspark.configuration_dspark import DSparkConfig, check_block_size
from hf_dspark.errors import CheckpointError
from hf_dspark.hub.files import cached_path, commit_of, hub_arguments, read_json

_MASK_FILE = "mask_embedding.pt"


@dataclasses.dataclass
class StoredDrafter:
    """A checkpoint that was found complete; `carried` are a foreign file's copies of the target's embedding and head."""

    config: DSparkConfig
    tensors: dict[str, TensorRecord]
    carried: dict[str, TensorRecord]
    calibration: dict[str, Any] | None


def open_drafter(
    source: str, arguments: dict[str, Any], expected_tensors: Callable[[DSparkConfig], dict[str, torch.Tensor]]
) -> StoredDrafter:
    """Read a checkpoint's config and the headers of its files, and check that they agree.

    From `arguments`, those of `from_pretrained`, `config` and fields of `DSparkConfig` are taken, and `revision` becomes the commit that it
    stands for, so that whatever is read comes from one commit. `expected_tensors` gives every tensor that a config needs.

    Raises:
        CheckpointError: for an unknown format, or tensors that do not fit the config.
        ValueError: for a block longer than the checkpoint's.
    """
    hub = hub_arguments(arguments)
    commit = commit_of(source, **hub)
    if commit is not None:
        hub["revision"] = arguments["revision"] = commit
    form, config, own_block = _config(source, arguments, hub)
    found = list_tensors(source, arguments.get("variant"), **hub)
    t2d, copies = None, {}
    if form is not None:
        if not config.sample_from_anchor and cached_path(source, _MASK_FILE, **hub) is not None:
            raise CheckpointError(f"{source!r} holds a mask embedding of its own in {_MASK_FILE}, a pickle, which is never read.")
        found = form.rename(found)
        t2d = found.pop("t2d", None)
        if config.draft_vocab_size is None:
            found.pop("d2t", None)  # an identity, where it is there at all
        rows = {EMBEDDING_KEY: config.vocab_size, LM_HEAD_KEY: config.draft_vocab_size or config.vocab_size}
        copies = {
            key: torch.empty(count, config.hidden_size, device="meta") for key, count in rows.items() if form.must_carry or key in found
        }
    _check_sizes(config, found, source)
    with clean_errors(source):
        expected = expected_tensors(config)
    check_tensors({**expected, **copies}, found, source)
    _check_vocabulary_map(config, found, t2d, source)
    carried = {key: found.pop(key) for key in copies}
    return StoredDrafter(config, found, carried, _calibration(source, config, own_block, hub))


def _config(source: str, arguments: dict[str, Any], hub: dict[str, Any]) -> tuple[Format | None, DSparkConfig, int | None]:
    """The format, the config, and the checkpoint's own block size; None for that where the caller brings temperatures or a config."""
    given = arguments.pop("config", None)
    raw = read_json(source if given is None or isinstance(given, DSparkConfig) else str(given), "config.json", **hub)
    if raw is None:
        offline = is_offline_mode() and not Path(source).is_dir()
        where = " in the Hub's cache (offline: HF_HUB_OFFLINE is set)" if offline else ""
        raise CheckpointError(
            f"{source!r} holds no config.json{where}. Give the folder or repository of a drafter; adapters are loaded "
            "onto one with drafter.load_adapter(adapter)."
        )
    form, stored = parse_config(raw, source)
    fields = {field.name for field in dataclasses.fields(DSparkConfig)} - {"dtype"}
    overrides = {key: arguments.pop(key) for key in list(arguments) if key in fields}
    block_size = check_block_size(overrides.get("block_size"), stored.block_size)
    if isinstance(given, DSparkConfig):
        return form, given, None
    own_block = None if {"confidence_temperatures", "copy_weights", "copy_confidence"} & overrides.keys() else stored.block_size
    if stored.confidence_temperatures:
        overrides.setdefault("confidence_temperatures", stored.confidence_temperatures[:block_size])
    return form, parse_config(raw, source, **overrides)[1], own_block


def _check_sizes(config: DSparkConfig, found: Mapping[str, TensorRecord], source: str) -> None:
    """Refuse a config that needs more than its files hold, before anything of that size is made."""
    stored = sum(math.prod(record.shape) for record in found.values())
    d, layers = config.hidden_size, config.num_hidden_layers
    head = config.markov_rank * (config.vocab_size + (config.draft_vocab_size or config.vocab_size))
    layer = 3 * d * config.intermediate_size + d * config.head_dim * 2 * config.num_attention_heads
    needed = head + layers * layer + len(config.target_layer_ids) * d * d
    if needed > 2 * stored + 4096:
        raise CheckpointError(
            f"config.json of {source!r} needs about {needed:,} numbers, its files hold {stored:,}. Nothing was allocated. Download it "
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
    """The calibration beside the checkpoint; its temperatures and copying go into the config, which must not say something else."""
    record = read_calibration(source, **hub) if own_block is not None else None
    if record is None:
        return None
    check_calibration(record, own_block, source)
    temperatures = [float(t) for t in record["temperatures"][: config.block_size]]
    copying = copying_of(record)
    stated = copying_of({"copying": {"weights": config.copy_weights, "confidence": config.copy_confidence}})
    if list(config.confidence_temperatures or temperatures) != temperatures or stated not in ((None, None), copying):
        raise CheckpointError(
            f"{source!r}: calibration.json (temperatures {temperatures}) and config.json ({config.confidence_temperatures}) say different "
            "things about temperatures or copying. Remove calibration.json, and calibrate again with --replace."
        )
    config.confidence_temperatures, (config.copy_weights, config.copy_confidence) = temperatures, copying
    return {**record, "temperatures": temperatures}
