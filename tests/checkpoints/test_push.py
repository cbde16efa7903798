"""Pushing to and pulling from a Hub: real huggingface_hub code against a server on the loopback."""

from __future__ import annotations

import json
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModel

import hf_dspark
from hf_dspark.adapters.files import fingerprint
from hf_dspark.adapters.lora import add_lora
from hf_dspark.calibration.temperature_scaling import FORMAT
from hf_dspark.errors import CheckpointError, HubError
from hf_dspark.hub.bundled import bundled_drafter_path
from hf_dspark.models.modeling_dspark import DSparkDrafter
from tests.adapters.test_lora import stir
from tests.helpers import needs_adapters
from tests.loopback_hub import LoopbackHub
from tests.tiny import tiny_drafter, tiny_target

REPO = "user/drafter"
OWN_CARD = b"""---
license: mit
tags: [mine]
model-index:
- name: old
  results:
  - task: {type: text-generation}
    dataset: {name: gsm8k, type: gsm8k}
    metrics: [{type: tau, value: 9.9}]
---
# My words
"""


def calibration(gamma: int = 5, **changes: Any) -> dict[str, Any]:
    return {"format": FORMAT, "temperatures": [0.5 + 0.1 * k for k in range(gamma)], **changes}


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def commits(hub: LoopbackHub, repo: str = REPO) -> int:
    return len(hub.repositories[repo].commits)


def card(hub: LoopbackHub, repo: str = REPO) -> tuple[dict[str, Any], str]:
    """Metadata and text of a repository's card."""
    _, front, body = hub.repositories[repo].files()["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(front), body


def of_results(hub: LoopbackHub) -> set[str]:
    return {name for name in hub.repositories[REPO].files() if name.startswith(("results/", "recipe"))}


def test_pushed_drafter_comes_back_bit_for_bit(hub, tmp_path) -> None:
    """Weights, config and calibration of a pulled drafter are those that were pushed, in one commit that holds no target's weight; it
    decodes to plain text, and AutoModel pulls it too."""
    target = tiny_target()
    drafter = tiny_drafter(target, draft_token_ids=torch.arange(0, 90, 2)).set_calibration(calibration())
    drafter.push_to_hub(REPO, private=True, licence="apache-2.0")
    assert commits(hub) == 2  # the repository's first, and ours
    assert hub.repositories[REPO].private
    again = DSparkDrafter.from_pretrained(REPO)
    assert same_weights(drafter, again)
    assert again.config.confidence_temperatures == drafter.config.confidence_temperatures
    assert again.calibration == drafter.calibration
    stored = tmp_path / "pushed.safetensors"
    stored.write_bytes(hub.repositories[REPO].files()["model.safetensors"])
    with safe_open(stored, "pt") as file:
        assert not [name for name in file.keys() if "embed_tokens" in name or "lm_head" in name]  # noqa: SIM118
    prompt, options = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(target.generate(prompt, **options), target.generate(prompt, **options, assistant_model=again))
    automatic = AutoModel.from_pretrained(REPO)
    assert type(automatic) is DSparkDrafter
    assert same_weights(drafter, automatic)


def test_sharded_push_is_pulled_whole_and_replaced_whole(hub) -> None:
    """A small max_shard_size gives several files and an index; pulling puts them together. Another drafter's push leaves none of them, nor
    the temperatures of the first."""
    drafter = tiny_drafter(tiny_target()).set_calibration(calibration())
    drafter.push_to_hub(REPO, max_shard_size="20KB")
    files = hub.repositories[REPO].files()
    assert "model.safetensors.index.json" in files
    assert sum(name.endswith(".safetensors") for name in files) > 1
    assert same_weights(drafter, DSparkDrafter.from_pretrained(REPO))
    tiny_drafter(tiny_target(), seed=4).push_to_hub(REPO)
    assert set(hub.repositories[REPO].files()) == {"model.safetensors", "config.json", "README.md", ".gitattributes"}
    assert DSparkDrafter.from_pretrained(REPO).config.confidence_temperatures is None


def test_branches_and_pull_requests_leave_main_alone(hub) -> None:
    """A push to a missing revision makes the branch, create_pr opens a pull request, and each is pulled by its name."""
    first, second, third = (tiny_drafter(tiny_target(), seed=seed) for seed in (1, 2, 3))
    first.push_to_hub(REPO)
    second.push_to_hub(REPO, revision="next")
    opened = third.push_to_hub(REPO, create_pr=True)
    assert opened.pr_url.endswith("/discussions/1")
    assert same_weights(first, DSparkDrafter.from_pretrained(REPO))
    assert same_weights(second, DSparkDrafter.from_pretrained(REPO, revision="next"))
    assert same_weights(third, DSparkDrafter.from_pretrained(REPO, revision="refs/pr/1"))
    commit = hub.repositories[REPO].branches["next"]
    assert same_weights(second, DSparkDrafter.from_pretrained(REPO, revision=commit))


def test_pull_from_a_subfolder(hub, tmp_path) -> None:
    """`subfolder=` finds config, weights and calibration below it."""
    drafter = tiny_drafter(tiny_target()).set_calibration(calibration())
    drafter.save_pretrained(tmp_path / "saved")
    hub.add(REPO, {f"deep/er/{path.name}": path.read_bytes() for path in (tmp_path / "saved").iterdir()})
    again = DSparkDrafter.from_pretrained(REPO, subfolder="deep/er")
    assert same_weights(drafter, again)
    assert again.calibration == drafter.calibration


def test_card_tells_what_lies_beside_it(hub) -> None:
    """The bundled drafter's results become a table and model-index metadata, and its card fits two screens."""
    source = bundled_drafter_path()
    DSparkDrafter.from_pretrained(source).push_to_hub(REPO, licence="apache-2.0", tags=["smollm2"])
    front, body = card(hub)
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert {"dspark", "drafter", "smollm2"} <= set(front["tags"])
    decoded = json.loads((source / "results" / "decoded.json").read_text())["decoded"]
    results = {
        (one["dataset"]["name"], metric["type"], metric["name"]): metric["value"]
        for one in front["model-index"][0]["results"]
        for metric in one["metrics"]
    }
    for key in ("T=0", "T=1"):
        for name, tau in decoded[key]["by_source"].items():
            assert results[name, "tau", f"tokens a round ({key.replace('=', ' = ')})"] == pytest.approx(tau, abs=1e-4)
    assert any(kind == "ece" for _, kind, _ in results)
    for words in (
        f"{decoded['T=0']['by_source']['gsm8k']:.2f}",
        f'load_drafter("{REPO}")',
        "[recipe.json](recipe.json)",
        "results/reliability.png",
        "thinking mode off",
    ):
        assert words in body
    assert len(body.splitlines()) < 100
    assert "results/decoded.json" in of_results(hub)


def test_results_are_not_pushed_with_other_weights(hub, tmp_path, caplog) -> None:
    """A drafter that was changed after loading leaves its folder's results and recipe behind, and says so."""
    drafter = DSparkDrafter.from_pretrained(bundled_drafter_path())
    with torch.no_grad():
        drafter.fc.weight[0, 0] += 1
    drafter.push_to_hub(REPO)
    assert not of_results(hub)
    assert "weights have changed" in caplog.text


def test_pull_calibrate_push_keeps_what_is_still_true(hub) -> None:
    """Pushed back with the same weights and new temperatures, a repository keeps its recipe and results, and its card still tells them."""
    DSparkDrafter.from_pretrained(bundled_drafter_path()).push_to_hub(REPO)
    before = of_results(hub)
    pulled = DSparkDrafter.from_pretrained(REPO)
    pulled.set_calibration(calibration(7)).push_to_hub(REPO)
    assert before
    assert of_results(hub) == before
    front, body = card(hub)
    assert "## Results" in body
    assert "tau" in {metric["type"] for one in front["model-index"][0]["results"] for metric in one["metrics"]}
    with torch.no_grad():
        pulled.fc.weight[0, 0] += 1
    pulled.push_to_hub(REPO)
    assert not of_results(hub)
    assert "model-index" not in card(hub)[0]


def test_push_leaves_other_files_alone(hub) -> None:
    """Files in folders, and those of no name of ours, stay where they are."""
    names = ("other/model.safetensors", "adapters/a/adapter_model.safetensors", "notes.txt", "results/raw/big.json")
    others = {name: name.encode() for name in names}
    hub.add(REPO, others)
    tiny_drafter(tiny_target()).push_to_hub(REPO)
    tiny_drafter(tiny_target(), seed=2).push_to_hub(REPO)
    assert others.items() <= hub.repositories[REPO].files().items()


def test_card_that_somebody_wrote_keeps_its_text(hub) -> None:
    """A hand-written README keeps its words; its metadata gains tags and results; a rendered one is rendered anew."""
    hub.add(REPO, {"README.md": OWN_CARD})
    tiny_drafter(tiny_target()).push_to_hub(REPO, licence="apache-2.0")
    front, body = card(hub)
    assert "# My words" in body
    assert front["license"] == "mit"
    assert {"mine", "dspark"} <= set(front["tags"])
    assert "model-index" not in front
    other = "user/other"
    tiny_drafter(tiny_target()).push_to_hub(other)
    assert "not calibrated" in card(hub, other)[1]
    tiny_drafter(tiny_target()).set_calibration(calibration()).push_to_hub(other)
    assert "not calibrated" not in card(hub, other)[1]


def test_calibration_is_pushed_alone_and_pulled_on_top(hub) -> None:
    """In a drafter's repository it changes config and calibration.json only; from one of its own, `calibration=` puts it on top."""
    tiny_drafter(tiny_target()).push_to_hub(REPO)
    before = hub.repositories[REPO].files()["model.safetensors"]
    hf_dspark.push_calibration(calibration(), REPO)
    assert hub.repositories[REPO].files()["model.safetensors"] == before
    assert DSparkDrafter.from_pretrained(REPO).config.confidence_temperatures == calibration()["temperatures"]
    mine = calibration(temperatures=[2.0, 1.9, 1.8, 1.7, 1.6])
    hf_dspark.push_calibration(mine, "user/temps")
    for source in ("user/temps", mine):
        assert DSparkDrafter.from_pretrained(REPO, calibration=source).config.confidence_temperatures == mine["temperatures"]
    assert commits(hub) == 3


def test_calibration_fitted_to_other_weights_is_refused(hub, tmp_path) -> None:
    """A record that names the weights it was fitted to is refused beside others, in a folder and on top of a repository."""
    first, second = tiny_drafter(tiny_target()), tiny_drafter(tiny_target(), seed=2)
    record = calibration(drafter_fingerprint=fingerprint(first))
    first.set_calibration(record).push_to_hub(REPO)
    assert DSparkDrafter.from_pretrained(REPO).calibration == record
    assert DSparkDrafter.from_pretrained(REPO, block_size=3).config.block_size == 3
    second.set_calibration(record).save_pretrained(tmp_path / "second")
    with pytest.raises(CheckpointError, match="fitted to a drafter with fingerprint"):
        DSparkDrafter.from_pretrained(tmp_path / "second")
    second.drop_calibration()
    second.push_to_hub("user/second")
    with pytest.raises(CheckpointError, match="fitted to a drafter with fingerprint"):
        DSparkDrafter.from_pretrained("user/second", calibration=record)


def test_calibration_for_another_block_size_is_refused(hub) -> None:
    """Neither pushed into such a drafter's repository, nor pulled on top of it."""
    tiny_drafter(tiny_target()).push_to_hub(REPO)
    before = commits(hub)
    with pytest.raises(CheckpointError, match="5 block positions"):
        hf_dspark.push_calibration(calibration(3), REPO)
    assert commits(hub) == before
    hf_dspark.push_calibration(calibration(3), "user/temps")
    with pytest.raises(CheckpointError, match="5 block positions"):
        DSparkDrafter.from_pretrained(REPO, calibration="user/temps")
    with pytest.raises(CheckpointError, match=r"no calibration\.json"):
        DSparkDrafter.from_pretrained(REPO, calibration="user/drafter")


@needs_adapters
def test_adapter_is_pushed_and_pulled_alone(hub) -> None:
    """The repository holds the adapter's few files; loading it brings the base from its own repository."""
    tiny_drafter(tiny_target()).push_to_hub("user/base")
    drafter = add_lora(DSparkDrafter.from_pretrained("user/base"), rank=2)
    stir(drafter)
    drafter.push_to_hub("user/adapter")
    files = {"adapter_config.json", "adapter_model.safetensors", "dspark_adapter.json", "README.md", ".gitattributes"}
    assert set(hub.repositories["user/adapter"].files()) == files
    assert card(hub, "user/adapter")[0]["library_name"] == "peft"
    assert same_weights(drafter, DSparkDrafter.from_pretrained("user/adapter"))


@needs_adapters
def test_adapters_and_drafters_do_not_share_a_repository(hub, tmp_path) -> None:
    """An adapter is not pushed over a drafter, nor a drafter over an adapter; and none whose drafter is a folder of this machine."""
    tiny_drafter(tiny_target()).save_pretrained(tmp_path / "base")
    adapted = add_lora(DSparkDrafter.from_pretrained(tmp_path / "base"), rank=2)
    with pytest.raises(CheckpointError, match="Push the drafter first"):
        adapted.push_to_hub("user/adapter")
    assert not hub.repositories
    tiny_drafter(tiny_target()).push_to_hub(REPO)
    adapted = add_lora(DSparkDrafter.from_pretrained(REPO), rank=2)
    with pytest.raises(HubError, match="holds a drafter"):
        adapted.push_to_hub(REPO)
    adapted.push_to_hub("user/adapter")
    with pytest.raises(HubError, match="holds an adapter"):
        tiny_drafter(tiny_target()).push_to_hub("user/adapter")


def test_file_that_cannot_be_fetched_is_not_taken_for_absent(hub, monkeypatch) -> None:
    """A connection that breaks on calibration.json fails the load, instead of giving an uncalibrated drafter."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    tiny_drafter(tiny_target()).set_calibration(calibration()).push_to_hub(REPO)
    hub.unreachable.add("calibration.json")
    with pytest.raises(OSError, match=r"calibration\.json"):
        DSparkDrafter.from_pretrained(REPO)


def test_edit_during_a_push_is_not_overwritten(hub, monkeypatch) -> None:
    """A commit by somebody else between the look at the repository and the push makes the push fail, with the other's file still there."""
    tiny_drafter(tiny_target()).push_to_hub(REPO)
    seen = []

    def edit(path: str) -> None:
        if path == "README.md" and not seen:
            seen.append(hub.add(REPO, {"README.md": b"---\nlicense: mit\n---\nTheirs\n"}))

    hub.when_sent = edit
    with pytest.raises(HubError, match="changed since"):
        tiny_drafter(tiny_target(), seed=2).push_to_hub(REPO)
    assert b"Theirs" in hub.repositories[REPO].files()["README.md"]


def test_wrong_token_is_refused_before_anything_is_sent(hub, monkeypatch) -> None:
    """401 becomes one HubError that says what to do; no repository is made and no object uploaded."""
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="hf auth login"):
        tiny_drafter(tiny_target()).push_to_hub(REPO)
    assert not hub.repositories
    assert not hub.objects


def test_missing_and_hidden_repositories_are_refused_on_pull(hub, monkeypatch) -> None:
    """404 of a repository, 404 of a revision, and a private repository without the token: an OSError each, as in transformers."""
    with pytest.raises(OSError, match="user/none"):
        DSparkDrafter.from_pretrained("user/none")
    tiny_drafter(tiny_target()).push_to_hub(REPO, private=True)
    with pytest.raises(OSError, match="nowhere"):
        DSparkDrafter.from_pretrained(REPO, revision="nowhere")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match=REPO):
        DSparkDrafter.from_pretrained(REPO)


def test_interrupted_upload_ends_whole_or_not_at_all(hub, monkeypatch) -> None:
    """A commit that fails leaves the first drafter whole, and pushing again sends no weights twice."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    first, second = tiny_drafter(tiny_target()), tiny_drafter(tiny_target(), seed=2)
    first.push_to_hub(REPO)
    hub.faults.update(commit=1)
    with pytest.raises(HubError, match="nothing half-written"):
        second.push_to_hub(REPO)
    assert same_weights(first, DSparkDrafter.from_pretrained(REPO))
    hub.requests.clear()
    second.push_to_hub(REPO)
    assert not [request for request in hub.requests if request.startswith("PUT /lfs/")]
    assert same_weights(second, DSparkDrafter.from_pretrained(REPO))


def test_damaged_download_is_never_used(hub) -> None:
    """Weights that arrive with one byte changed are refused and thrown away; the next pull is whole."""
    drafter = tiny_drafter(tiny_target())
    drafter.push_to_hub(REPO)
    hub.faults["flip"] = 1
    with pytest.raises(CheckpointError, match="SHA-256"):
        DSparkDrafter.from_pretrained(REPO)
    assert same_weights(drafter, DSparkDrafter.from_pretrained(REPO))


def test_push_in_the_middle_of_a_pull_is_not_mixed_in(hub, tmp_path) -> None:
    """Weights and calibration come from the commit that the config came from, though main has moved on since."""
    first = tiny_drafter(tiny_target()).set_calibration(calibration())
    first.push_to_hub(REPO)
    tiny_drafter(tiny_target(), seed=2).set_calibration(calibration(temperatures=[2.0] * 5)).save_pretrained(tmp_path / "second")
    second = {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    moved = []

    def move(path: str) -> None:
        if path == "config.json" and not moved:
            moved.append(hub.add(REPO, second))

    hub.when_sent = move
    pulled = DSparkDrafter.from_pretrained(REPO)
    assert moved
    assert same_weights(first, pulled)
    assert pulled.calibration == first.calibration
    assert not same_weights(first, DSparkDrafter.from_pretrained(REPO))


def test_warm_cache_serves_offline(hub, monkeypatch) -> None:
    """Offline, a drafter that was pulled before loads without one request; one that was not is refused."""
    drafter = tiny_drafter(tiny_target()).set_calibration(calibration())
    drafter.push_to_hub(REPO)
    DSparkDrafter.from_pretrained(REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    again = DSparkDrafter.from_pretrained(REPO)
    assert same_weights(drafter, again)
    assert again.calibration == drafter.calibration
    assert not hub.requests
    with pytest.raises(CheckpointError, match=r"user/none.*offline"):
        DSparkDrafter.from_pretrained("user/none")
