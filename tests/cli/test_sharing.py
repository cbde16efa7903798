"""`hf-dspark info`, `convert` and `push`, against a Hub on the loopback."""

from __future__ import annotations

import json

import pytest

from hf_dspark.adapters.lora import add_lora
from hf_dspark.cli import run
from hf_dspark.hub.bundled import bundled_drafter_path
from hf_dspark.models.modeling_dspark import DSparkDrafter
from tests.helpers import needs_adapters
from tests.tiny import tiny_drafter, tiny_target

REPO = "user/drafter"


def said(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_info_of_the_bundled_drafter(capsys) -> None:
    """Format, target, block, head, vocabulary and calibration are those of its config."""
    assert run(["info", "smollm2-dspark", "--json"]) == 0
    facts = said(capsys)
    config = json.loads((bundled_drafter_path() / "config.json").read_text())
    assert facts["format"] == "hf-dspark"
    assert facts["target"] == config["target_name"]
    assert facts["block_size"] == config["block_size"]
    assert facts["taps"] == config["target_layer_ids"]
    assert facts["draft_vocabulary"] == config["draft_vocab_size"]
    assert facts["budget"] == "load-aware"
    assert facts["bytes"] < 25e6
    assert run(["info", "smollm2-dspark"]) == 0
    assert "sequential head" in capsys.readouterr().out


def test_info_from_the_hub_fetches_no_weights(hub, capsys) -> None:
    """Of a repository's weights only the header is asked for, by ranges, and the facts are those of the whole file."""
    drafter = tiny_drafter(tiny_target(), intermediate_size=4096)
    drafter.push_to_hub(REPO)
    hub.sent.clear()
    assert run(["info", REPO, "--json"]) == 0
    facts = said(capsys)
    assert facts["parameters"] == sum(tensor.numel() for tensor in drafter.state_dict().values())
    size = len(hub.repositories[REPO].files()["model.safetensors"])
    assert 0 < hub.sent["model.safetensors"] < 0.2 * size


@needs_adapters
def test_info_of_an_adapter_and_of_nothing(tmp_path, capsys) -> None:
    """An adapter's folder names its base; a folder with neither config nor adapter is one line and exit code 2."""
    add_lora(tiny_drafter(tiny_target()), rank=2).save_pretrained(tmp_path / "adapter")
    assert run(["info", str(tmp_path / "adapter"), "--json"]) == 0
    assert said(capsys)["rank"] == 2
    (tmp_path / "empty").mkdir()
    assert run(["info", str(tmp_path / "empty")]) == 2
    assert capsys.readouterr().err.startswith("error:")


def test_push_and_convert_from_the_command_line(hub, tmp_path, capsys) -> None:
    """A folder is pushed with its message, converted from the Hub, and pushed as a calibration alone."""
    drafter = tiny_drafter(tiny_target()).set_calibration({"format": 1, "temperatures": [1.0, 1.1, 1.2, 1.3, 1.4]})
    drafter.save_pretrained(tmp_path / "saved")
    arguments = ["push", str(tmp_path / "saved"), REPO, "--private", "--message", "first", "--license", "mit", "--tag", "tiny", "--json"]
    assert run(arguments) == 0
    assert said(capsys)["commit"].startswith(hub.url)
    repository = hub.repositories[REPO]
    assert repository.messages[repository.branches["main"]] == "first"
    assert "license: mit" in repository.files()["README.md"].decode()
    assert run(["convert", REPO, str(tmp_path / "made"), "--json"]) == 0
    assert DSparkDrafter.from_pretrained(tmp_path / "made").config.confidence_temperatures == [1.0, 1.1, 1.2, 1.3, 1.4]
    capsys.readouterr()
    assert run(["push", str(tmp_path / "saved"), "user/temperatures", "--calibration-only", "--create-pr", "--json"]) == 0
    assert said(capsys)["pull_request"].endswith("/discussions/1")
    assert run(["convert", REPO, str(tmp_path / "made")]) == 2
    assert "not empty" in capsys.readouterr().err


def test_what_the_hub_refuses_is_one_line(hub, monkeypatch, tmp_path, capsys) -> None:
    """A wrong token ends in exit code 2 and one line that says what to do."""
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    tiny_drafter(tiny_target()).save_pretrained(tmp_path)
    assert run(["push", str(tmp_path), REPO]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: The Hub did not take")
    assert "hf auth login" in error
