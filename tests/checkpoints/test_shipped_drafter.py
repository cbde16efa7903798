"""The drafter's folder as it is shipped: size, tensors, what the card says of it, strict loading, and its place in a wheel."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_dspark import DSparkDrafter
from hf_dspark.errors import CheckpointError
from hf_dspark.hub import bundled as embedded

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "model_cards" / "smollm2-dspark"
WEIGHTS = FOLDER / "model.safetensors"
SIZE_LIMIT_BYTES = 25_000_000
NUMBERS = {2: "two", 7: "seven"}


def card() -> str:
    """The card's text, line breaks taken as spaces."""
    return " ".join((FOLDER / "README.md").read_text(encoding="utf-8").split())


def config() -> dict[str, Any]:
    return json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------- files


def test_the_folder_is_laid_out_like_a_hub_repository() -> None:
    """Card, config, weights and recipe are there."""
    for name in ("README.md", "config.json", "model.safetensors", "recipe.json"):
        assert (FOLDER / name).is_file(), name


def test_every_file_that_the_card_names_is_there() -> None:
    """The result files of the card's table and of its tables' markers."""
    named = set(re.findall(r"results/[\w-]+\.json", card()))
    assert {"results/passes.json", "results/demo.json", "results/divergence.json", "results/eval_gsm8k.json"} <= named
    assert [name for name in sorted(named) if not (FOLDER / name).is_file()] == []


def test_the_weights_are_one_file_of_at_most_25_megabytes() -> None:
    """Small enough for the repository and the wheel, and no second copy in another format."""
    assert WEIGHTS.stat().st_size <= SIZE_LIMIT_BYTES
    weights = [p.name for p in FOLDER.rglob("*") if p.suffix in {".safetensors", ".bin", ".pt", ".pth", ".gguf"}]
    assert weights == ["model.safetensors"]


def test_no_tensor_is_the_targets() -> None:
    """Neither the target's embedding nor its head is stored, under their names or in their shape."""
    width = config()["hidden_size"]
    with safe_open(WEIGHTS, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    assert [name for name in shapes if "embed_tokens" in name or "lm_head" in name] == []
    assert [name for name, shape in shapes.items() if shape == (config()["vocab_size"], width)] == []


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def test_no_shipped_file_names_a_folder_of_the_machine_it_was_made_on() -> None:
    """No string in any JSON file is an absolute path or leaves the folder."""
    files = sorted(FOLDER.rglob("*.json"))
    assert len(files) >= 6
    found = {
        path.name: text
        for path in files
        for text in strings(json.loads(path.read_text(encoding="utf-8")))
        if text.startswith("/") or "../" in text
    }
    assert found == {}


# ----------------------------------------------------------------------------------------------------- config and card


def test_the_config_has_the_cards_facts() -> None:
    """Block, depth, head and draft vocabulary, and the same numbers in the card's words."""
    facts = config()
    assert facts["block_size"] == 7
    assert facts["num_hidden_layers"] == 2
    assert (facts["markov_head_type"], facts["markov_rank"]) == ("vanilla", 48)
    assert facts["draft_vocab_size"] == 12_288
    assert facts["enable_confidence_head"] is True
    for words in (
        f"{NUMBERS[facts['block_size']]} tokens a block",
        f"{NUMBERS[facts['num_hidden_layers']]} backbone layers",
        f"{facts['markov_head_type']} Markov head of rank {facts['markov_rank']}",
        "a confidence head",
        f"draft vocabulary of {facts['draft_vocab_size']:,} tokens",
    ):
        assert words in card(), words


def test_an_uncalibrated_confidence_head_is_called_so() -> None:
    """The card says whether there are calibration temperatures."""
    assert ("The confidence head is not calibrated" in card()) == (config().get("confidence_temperatures") is None)


# -------------------------------------------------------------------------------------------------------------- loading


def test_the_folder_loads_strictly() -> None:
    """Every stored tensor is one of the drafter's and the other way round; draft ids are distinct ids of the target."""
    drafter = DSparkDrafter.from_pretrained(FOLDER)
    with safe_open(WEIGHTS, framework="pt") as file:
        assert set(file.keys()) == set(drafter.state_dict())
    assert not drafter.bound
    ids = drafter.draft_token_ids
    assert ids is not None
    assert len(ids) == config()["draft_vocab_size"]
    assert (ids[1:] > ids[:-1]).all()
    assert 0 <= ids[0] < ids[-1] < config()["vocab_size"]
    assert config()["eos_token_id"] in ids  # else no text could end inside a block


@pytest.mark.parametrize("missing", ["fc.weight", "markov_head.markov_w2.weight", "confidence_head.proj.bias", "d2t"])
def test_a_copy_with_one_tensor_removed_is_refused(tmp_path: Path, missing: str) -> None:
    """One missing tensor is named in a CheckpointError, never drawn at random."""
    tensors = load_file(WEIGHTS)
    del tensors[missing]
    shutil.copy(FOLDER / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"1 missing(.|\n)*missing: {re.escape(missing)}"):
        DSparkDrafter.from_pretrained(tmp_path)


def test_the_embedded_name_finds_the_folder() -> None:
    """In a checkout `smollm2-dspark` is this folder."""
    assert Path(embedded.embedded_drafter_path()).resolve() == FOLDER.resolve()


# ---------------------------------------------------------------------------------------------------------------- wheel


@pytest.fixture
def build_hook(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of `hatch_build.py` on a base that knows its root only: hatchling is needed for building, not for testing."""

    class Interface:
        def __init__(self, root: Path) -> None:
            self.root = str(root)

    module = ModuleType("hatchling.builders.hooks.plugin.interface")
    module.BuildHookInterface = Interface  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded.EmbeddedDrafterHook


def forced(hook: Any, version: str) -> dict[str, str]:
    """What the hook adds to a wheel: source path -> path inside."""
    data: dict[str, Any] = {"force_include": {}}
    hook.initialize(version, data)
    return data["force_include"]


def test_a_wheel_carries_the_folder_where_the_package_looks(build_hook: Any) -> None:
    """The whole folder goes to `hf_dspark/_data/smollm2-dspark`, and the build is told of the hook."""
    assert forced(build_hook(ROOT), "standard") == {str(FOLDER): f"hf_dspark/_data/{embedded.DRAFTER_NAME}"}
    assert 'path = "hatch_build.py"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_an_editable_install_gets_nothing_added(build_hook: Any, tmp_path: Path) -> None:
    """There the package reads the checkout, complete or not."""
    assert forced(build_hook(tmp_path), "editable") == {}


def test_a_wheel_without_the_drafter_is_refused(build_hook: Any, tmp_path: Path) -> None:
    """A folder without config.json stops the build, and the message says which folder."""
    (tmp_path / "model_cards" / "smollm2-dspark").mkdir(parents=True)
    with pytest.raises(RuntimeError, match=r"smollm2-dspark holds no config\.json"):
        forced(build_hook(tmp_path), "standard")
