"""Checkpoints that are broken or hostile: one clear error each, nothing large allocated, nothing read outside the folder."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_dspark.checkpoints.inspect import describe
from hf_dspark.errors import CheckpointError, DSparkError
from hf_dspark.models.modeling_dspark import DSparkDrafter
from tests.checkpoints.foreign import CHECKPOINTS, write
from tests.tiny import tiny_drafter, tiny_target


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], Path]]:
    """Config and folder of one checkpoint of each kind, our own among them."""
    root = tmp_path_factory.mktemp("saved")
    tiny_drafter(tiny_target()).save_pretrained(root / "own")
    found = {"own": (json.loads((root / "own" / "config.json").read_text()), root / "own")}
    for name in ("deepspec-vanilla", "speculators-dspark-reduced", "zlab-sliding", "specforge-vanilla", "model-optimizer-rnn"):
        made = CHECKPOINTS[name]()
        found[name] = (made["config"], write(root / name, made["config"], made["stored"]))
    made = CHECKPOINTS["transformers-dflash-sliding"]()
    found["native"] = (made["config"], write(root / "native", made["config"], made["stored"]))
    return found


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a JSON value."""
    if isinstance(value, dict):
        return [(*at, key) for key in value] + [p for key, inner in value.items() for p in places(inner, (*at, key))]
    if isinstance(value, list):
        return [p for i, inner in enumerate(value) for p in [(*at, i), *places(inner, (*at, i))]]
    return []


STRANGE = [
    *(None, True, False, -1, 0, 1, 3, 10**9, 10**30, -(10**12), 0.5, float("nan"), float("inf")),
    *("", "x", "../../etc/passwd", [], [1], {}, {"a": 1}),
]
STRANGE += [[10**9] * 3, "sliding_attention", [None], [["x"]], {"rope_type": "yarn"}, "\u2028", [0.1] * 5]


def mutated(config: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    config = copy.deepcopy(config)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        where = dice.choice(places(config))
        inner = config
        for key in where[:-1]:
            inner = inner[key]
        if dice.random() < 0.25 and isinstance(inner, dict):
            inner.pop(where[-1], None)
        else:
            inner[where[-1]] = dice.choice(STRANGE)
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["own", "deepspec-vanilla", "speculators-dspark-reduced", "zlab-sliding", "specforge-vanilla", "model-optimizer-rnn", "native"]
)
def test_mutated_configs_load_or_end_in_one_clean_error(tmp_path, saved, name: str) -> None:
    """Forty random changes of a config each: a drafter, or a DSparkError; never another exception, and little memory."""
    config, folder = saved[name]
    dice = random.Random(name)
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    clean = 0
    for _ in range(40):
        changed = mutated(config, dice)
        (tmp_path / "config.json").write_text(json.dumps(changed))
        tracemalloc.start()
        try:
            DSparkDrafter.from_pretrained(tmp_path)
        except DSparkError:
            clean += 1
        except ValueError as error:
            pytest.fail(f"{type(error).__name__} is not one of ours: {error}; config {changed}")
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 64e6, changed
        with contextlib.suppress(DSparkError):
            describe(str(tmp_path))
    assert clean > 8  # the changes do break things


@pytest.mark.parametrize("name", ["own", "speculators-dspark-reduced"])
def test_mutated_files_load_or_end_in_one_clean_error(tmp_path, saved, name: str) -> None:
    """Files cut short, with flipped header bytes, or with a header that lies about its length: a drafter, or a CheckpointError."""
    config, folder = saved[name]
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_text(json.dumps(config))
    header = struct.unpack("<Q", weights[:8])[0]
    dice = random.Random(1)
    refused = 0
    for i in range(90):
        data = bytearray(weights)
        if i % 3 == 0:
            data = data[: dice.randrange(len(data))]
        elif i % 3 == 1:
            for _ in range(dice.choice((1, 3, 10))):
                data[8 + dice.randrange(header)] = dice.randrange(256)
        else:
            data[:8] = struct.pack("<Q", dice.choice((0, 1, header - 1, header + 1, 2**31, 2**63, 2**64 - 1)))
        (tmp_path / "model.safetensors").write_bytes(bytes(data))
        try:
            DSparkDrafter.from_pretrained(tmp_path)
        except CheckpointError:
            refused += 1
    assert refused > 60


def test_a_billion_rows_are_refused_before_they_exist(tmp_path, saved) -> None:
    """A vocabulary of 10^9, and one of 10^7 that the files do not hold, are refused with a few kilobytes allocated."""
    config, folder = saved["own"]
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for size, message in ((10**9, "vocab_size=1000000000"), (10**7, "Nothing was allocated")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
        with pytest.raises(CheckpointError, match=message):
            DSparkDrafter.from_pretrained(tmp_path)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "sub/../../x.safetensors", "model.bin"])
def test_an_index_cannot_point_outside_its_folder(tmp_path, saved, shard: str) -> None:
    """Shard names with a folder in them, or that are no safetensors, are refused, even where such a file exists."""
    config, folder = saved["own"]
    tensors = load_file(folder / "model.safetensors")
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file(tensors, tmp_path / "outside.safetensors", metadata={"format": "pt"})
    (inside / "config.json").write_text(json.dumps(config))
    (inside / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}))
    with pytest.raises(CheckpointError, match="outside its own folder"):
        DSparkDrafter.from_pretrained(inside)


@pytest.mark.parametrize("name", ["own", "deepspec-vanilla"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, saved, name: str, value: float) -> None:
    """One NaN or infinity in one tensor is refused by that tensor's name."""
    config, folder = saved[name]
    tensors = load_file(folder / "model.safetensors")
    tensors["layers.1.mlp.up_proj.weight"].view(-1)[5] = value
    with pytest.raises(CheckpointError, match=r"not finite: layers\.1\.mlp\.up_proj\.weight"):
        DSparkDrafter.from_pretrained(write(tmp_path, config, tensors))


def test_the_deepest_json_is_refused_cleanly(tmp_path) -> None:
    """A config nested deeper than the parser goes is a CheckpointError, not a RecursionError."""
    (tmp_path / "config.json").write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(CheckpointError, match="not JSON"):
        DSparkDrafter.from_pretrained(tmp_path)


def test_pickles_are_never_opened(tmp_path, saved) -> None:
    """A folder with a pickle and no safetensors is refused, and the pickle is not run."""
    config, _ = saved["own"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="never read"):
        DSparkDrafter.from_pretrained(tmp_path)
