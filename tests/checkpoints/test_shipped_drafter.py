"""The drafter's folder as it is shipped: it is small, loads strictly, drafts, has its card, and lies in a wheel."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open

from hf_dspark import DSparkDrafter
from hf_dspark.checkpoints.card import render_card
from hf_dspark.hub.bundled import DRAFTER_NAME, bundled_drafter_path
from tests.models.drafting import draft, random_taps

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "model_cards" / "smollm2-dspark"
WEIGHTS = FOLDER / "model.safetensors"


def test_it_is_one_small_file_without_the_targets_matrices() -> None:
    """At most 25 MB, no second copy in another format, and neither the target's embedding nor its head among the tensors."""
    assert WEIGHTS.stat().st_size <= 25_000_000
    assert [p.name for p in FOLDER.rglob("*") if p.suffix in {".safetensors", ".bin", ".pt", ".pth", ".gguf"}] == ["model.safetensors"]
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    with safe_open(WEIGHTS, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    assert not [name for name in shapes if "embed_tokens" in name or "lm_head" in name]
    assert (config["vocab_size"], config["hidden_size"]) not in shapes.values()


def test_it_loads_strictly_and_drafts() -> None:
    """Every stored tensor is one of the drafter's, draft ids are distinct ids of the target that can end a text, and a block is drafted."""
    assert bundled_drafter_path().resolve() == FOLDER.resolve()
    drafter = DSparkDrafter.from_pretrained(FOLDER, dtype=torch.float32)
    with safe_open(WEIGHTS, framework="pt") as file:
        assert set(file.keys()) == set(drafter.state_dict())
    config, ids = drafter.config, drafter.draft_token_ids
    assert len(ids) == config.draft_vocab_size
    assert (ids[1:] > ids[:-1]).all()
    assert 0 <= ids[0] < ids[-1] < config.vocab_size
    assert config.eos_token_id in ids
    with torch.no_grad():
        h = draft(drafter.bind(tiny_smollm2(config)), [random_taps(drafter, 4)], [9])
    assert h.shape == (1, config.block_size, config.hidden_size)
    assert h.isfinite().all()


def tiny_smollm2(config: Any) -> Any:
    """A random target of the shapes that the drafter was made for, with small MLPs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_target_layers}
    return LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=16, num_attention_heads=9, num_key_value_heads=3)).eval()


def test_its_card_is_rendered_from_the_files_beside_it() -> None:
    """`render_card` gives the README, which fits two screens; every file that it links to is there."""
    card = str(render_card(FOLDER, name=DRAFTER_NAME, licence="apache-2.0"))
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == card
    body = card.split("---\n", 2)[2]
    assert len(body.splitlines()) < 100
    links = [part.split(")")[0] for part in body.split("](")[1:]]
    assert not [link for link in links if not link.startswith("http") and not (FOLDER / link).is_file()]


@pytest.fixture
def build_hook(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of `hatch_build.py` on a stand-in for hatchling's base: hatchling is needed for building, not for testing."""

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
    return next(value for name, value in vars(loaded).items() if name.endswith("DrafterHook"))


def test_a_wheel_holds_the_folder_where_the_package_looks(build_hook: Any, tmp_path: Path) -> None:
    """A standard wheel gets it at `hf_dspark/_data/smollm2-dspark`, an editable install gets nothing, and without it no wheel is built."""

    def forced(root: Path, version: str) -> dict[str, str]:
        data: dict[str, Any] = {"force_include": {}}
        build_hook(root).initialize(version, data)
        return data["force_include"]

    assert forced(ROOT, "standard") == {str(FOLDER): f"hf_dspark/_data/{DRAFTER_NAME}"}
    assert 'path = "hatch_build.py"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert forced(tmp_path, "editable") == {}
    with pytest.raises(RuntimeError, match=r"smollm2-dspark holds no config\.json"):
        forced(tmp_path, "standard")
