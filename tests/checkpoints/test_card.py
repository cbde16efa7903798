"""The card that a training run leaves."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from hf_dspark.checkpoints.card import render_card, write_training_card
from hf_dspark.errors import CheckpointError
from tests.tiny import tiny_drafter, tiny_target

RECIPE: dict[str, Any] = {
    "arguments": {
        "options": {"target": "some/target"},
        "training": {"optimizer": "muon", "learning_rate": 0.001, "batch_size": 4},
    },
    "data": {
        "rows": {"train": 1200},
        "response_tokens": {"train": 34567},
        "by_source": {"chat": 800, "math": 400},
        "folders": [{"thinking": False}],
    },
    "result": {"steps": 1400, "minutes": 61.2},
    "machine": {"cpu": "some CPU", "cpu_count": 2},
}
LORA = {"base": "some/base", "base_fingerprint": "0123456789abcdef" * 4, "lora": {"rank": 8, "targets": ["attention"]}}


@pytest.mark.parametrize(
    ("recipe", "words"), [(RECIPE, ["1,200 responses"]), (RECIPE | LORA, ["LoRA of rank 8", "0123456789abcdef", "load_adapter"])]
)
def test_a_runs_card_tells_what_was_trained(tmp_path, recipe: dict[str, Any], words: list[str]) -> None:
    """Front matter names the target, the body the run's figures, and the recipe lies beside it."""
    folder = tmp_path / "run" / "best"
    folder.mkdir(parents=True)
    write_training_card(folder, recipe, SimpleNamespace(config=SimpleNamespace(target_name=None)))
    _, front, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "some/target"
    for word in ("# run", "1,400 steps", "61 minutes", "[recipe.json](recipe.json)", "thinking mode off", *words):
        assert word in body
    assert json.loads((folder / "recipe.json").read_text(encoding="utf-8")) == recipe


def test_a_card_says_what_is_not_known(tmp_path) -> None:
    """Without recipe, results and calibration nothing is claimed; a result file of another kind is refused by its folder."""
    tiny_drafter(tiny_target()).save_pretrained(tmp_path)
    card = str(render_card(tmp_path, name="user/drafter"))
    assert "not recorded here" in card
    assert "not calibrated" in card
    assert "## Results" not in card
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "decoded.json").write_text('{"decoded": {"T=0": {}}}')
    with pytest.raises(CheckpointError, match="not one that this version writes"):
        render_card(tmp_path, name="user/drafter")
