"""Adapters on the disk: fingerprint of the base, saving, strict loading, and peft's own files."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_dspark import DSparkDrafter
from hf_dspark.adapters.files import fingerprint, load_adapter, save_adapter
from hf_dspark.adapters.lora import active_adapters, adapter_names, add_lora, check_choice, merge_adapter, target_pattern
from hf_dspark.errors import CheckpointError
from tests.adapters.test_lora import outputs, stir
from tests.helpers import needs_adapters
from tests.tiny import tiny_drafter, tiny_llama

pytestmark = needs_adapters


FILES = {"adapter_config.json", "adapter_model.safetensors", "dspark_adapter.json"}


def same_outputs(one, other):
    return all(torch.equal(a, b) for a, b in zip(outputs(one), outputs(other), strict=True))


@pytest.fixture
def base():
    return tiny_drafter(tiny_llama(), "gated")


@pytest.fixture
def adapted(base):
    drafter = add_lora(copy.deepcopy(base), rank=3)
    stir(drafter)
    return drafter


@pytest.fixture
def folder(adapted, tmp_path):
    return save_adapter(adapted, tmp_path)


def test_the_fingerprint_is_that_of_the_base(base, adapted, tmp_path):
    """Adapters, peft's wrapper, storage, loading dtype, block length and temperatures leave it as it is."""
    known = fingerprint(base)
    assert len(known) == 64
    base.save_pretrained(tmp_path)
    wrapped = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["fc"], modules_to_save=["confidence_head"]))
    for drafter in (
        adapted,
        wrapped,
        DSparkDrafter.from_pretrained(tmp_path),
        DSparkDrafter.from_pretrained(tmp_path, dtype=torch.bfloat16),
        DSparkDrafter.from_pretrained(tmp_path, block_size=2, confidence_temperatures=[1.0, 2.0]),
    ):
        assert fingerprint(drafter) == known


def test_the_fingerprint_tells_drafters_apart(base, adapted):
    """One weight, one id of the draft vocabulary, one tap or a merged adapter make it another."""
    prints = {fingerprint(base)}
    for change in ("weight", "taps", "merged"):
        other = copy.deepcopy(base)
        if change == "weight":
            with torch.no_grad():
                other.norm.weight[0] += 0.1
        elif change == "taps":
            other.config.target_layer_ids = [1, 2]
        else:
            other = merge_adapter(adapted)
        prints.add(fingerprint(other))
    reduced = [tiny_drafter(tiny_llama(), draft_token_ids=torch.tensor([4, 5, last])) for last in (6, 7)]
    prints |= {fingerprint(drafter) for drafter in reduced}
    assert len(prints) == 6


def test_merged_in_place_means_no_fingerprint_and_no_switching(base):
    """While peft's merge_adapter holds an adapter in the base's weights, these cannot be hashed, nor adapters told apart."""
    wrapped = get_peft_model(base, LoraConfig(target_modules=["fc"], init_lora_weights=False))
    wrapped.merge_adapter()
    for call in (fingerprint, lambda drafter: check_choice(drafter, "base")):
        with pytest.raises(RuntimeError, match=r"merged adapter.*unmerge_adapter"):
            call(wrapped)


def test_an_adapter_is_saved_alone_and_drafts_the_same_when_loaded(base, adapted, tmp_path):
    """The folder holds the adapter's numbers and nothing of the base; loaded onto the base, outputs are bit-identical. The drafter's own
    methods write and read the same."""
    assert save_adapter(adapted, tmp_path / "a") == tmp_path / "a"
    assert {file.name for file in (tmp_path / "a").iterdir()} == FILES
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == trained
    assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_size < 4 * trained + 8000
    sidecar = json.loads((tmp_path / "a" / "dspark_adapter.json").read_text())
    assert sidecar["base_fingerprint"] == fingerprint(base)
    assert (sidecar["rank"], sidecar["alpha"], sidecar["parameters"]) == (3, 6, trained)

    assert load_adapter(base, tmp_path / "a", "mine") is base
    assert (adapter_names(base), active_adapters(base)) == (["mine"], ("mine",))
    assert same_outputs(base, adapted)
    assert not any(p.requires_grad for p in base.parameters())
    assert not base.training

    adapted.save_pretrained(tmp_path / "b")
    assert {file.name for file in (tmp_path / "b").iterdir()} == FILES
    base.delete_adapter("mine")
    base.load_adapter(str(tmp_path / "b"))
    assert same_outputs(base, adapted)


def test_one_of_several_is_saved_by_name(adapted, tmp_path):
    """The named adapter is written, not the active one; two active ones need a name, and it must be loaded."""
    add_lora(adapted, rank=2, adapter_name="second")
    save_adapter(adapted, tmp_path, "default")
    assert load_file(tmp_path / "adapter_model.safetensors")["base_model.model.fc.lora_A.weight"].shape[0] == 3
    with pytest.raises(ValueError, match="no adapter 'third'; loaded: default, second"):
        save_adapter(adapted, tmp_path, "third")
    adapted.set_adapter(["default", "second"])
    with pytest.raises(RuntimeError, match=r"active: default, second.*Name one"):
        save_adapter(adapted, tmp_path)


def test_a_second_adapter_leaves_base_and_first_alone(base, folder, adapted):
    """Whatever the names, parts of each other's or of modules', loading changes no tensor that was there."""
    known = fingerprint(base)
    load_adapter(base, folder, "lay")
    stir(base, "lay", seed=4)
    first = {name: p.detach().clone() for name, p in base.named_parameters()}
    load_adapter(base, folder, "y")
    after = dict(base.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in first.items())
    assert fingerprint(base) == known
    assert active_adapters(base) == ("y",)
    assert same_outputs(base, adapted)


def test_a_loaded_adapter_can_be_trained_on(base, folder):
    """With trainable=True its weights, and no others, ask for gradients."""
    load_adapter(base, folder, trainable=True)
    assert {name for name, p in base.named_parameters() if p.requires_grad} == {n for n, _ in base.named_parameters() if "lora_" in n}


def test_an_adapters_folder_opens_as_the_drafter_with_it(base, adapted, tmp_path):
    """`from_pretrained` finds the base by the name it had, in the dtype asked for, and puts the adapter on it."""
    base.save_pretrained(tmp_path / "base")
    drafter = add_lora(DSparkDrafter.from_pretrained(tmp_path / "base").bind(tiny_llama()), rank=3)
    stir(drafter)
    drafter.save_pretrained(tmp_path / "adapter")
    again = DSparkDrafter.from_pretrained(tmp_path / "adapter").bind(tiny_llama())
    assert same_outputs(again, drafter)
    half = DSparkDrafter.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_an_adapter_of_a_nameless_drafter_says_what_to_do(folder):
    """Where the base was never saved, from_pretrained tells how to load both."""
    with pytest.raises(CheckpointError, match=r"does not say where its drafter lies\. Load the drafter .* call drafter.load_adapter"):
        DSparkDrafter.from_pretrained(folder)


def test_an_adapter_of_another_drafter_is_refused_unless_on_purpose(base, folder, caplog):
    """Both fingerprints are named, and what to do, and nothing is loaded; with check_base=False it is loaded, and the log says so."""
    known = fingerprint(base)
    with torch.no_grad():
        base.fc.weight.mul_(1.5)
    with pytest.raises(CheckpointError, match=f"fingerprint {known}; this drafter .* has {fingerprint(base)}.*Load the drafter it was"):
        load_adapter(base, folder)
    assert adapter_names(base) == []
    with caplog.at_level(logging.WARNING):
        base.load_adapter(str(folder), check_base=False)
    assert "because of check_base=False" in caplog.text
    assert active_adapters(base) == ("default",)


def test_tensors_that_do_not_fit_are_listed_all_at_once(base, folder):
    """Missing, unexpected and mis-shaped tensors are named with their shapes, and the drafter stays plain."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.fc.lora_B.weight"]
    tensors["base_model.model.fc.lora_C.weight"] = torch.zeros(2, 2)
    tensors["base_model.model.markov_head.markov_w1.lora_embedding_B"] = torch.zeros(6, 5)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as error:
        load_adapter(base, folder)
    for line in (
        "missing: fc.lora_B.weight (32, 3)",
        "unexpected: fc.lora_C.weight (2, 2)",
        "mis-shaped: markov_head.markov_w1.lora_embedding_B is (6, 5), expected (6, 3)",
        "Nothing was loaded",
    ):
        assert line in str(error.value)
    assert adapter_names(base) == []
    assert not [name for name, _ in base.named_modules() if "lora" in name]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", None, "holds no adapter_config.json; an adapter is a folder"),
        ("adapter_model.safetensors", None, "holds no adapter_model.safetensors"),
        ("adapter_model.safetensors", b"half", "cannot be read"),
        ("adapter_config.json", b"{", "cannot be read"),
        ("dspark_adapter.json", b"{", "dspark_adapter.json of .* is not JSON"),
    ],
)
def test_files_that_are_missing_or_broken_are_named(base, folder, file, content, message):
    """The error names the file and the folder."""
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(base, folder)
    assert adapter_names(base) == []


def test_a_float16_drafter_is_told_why_its_fingerprint_differs(base, folder):
    """Weights rounded to float16 cannot be compared; loading first and casting afterwards can."""
    with torch.no_grad():
        base.fc.weight[0, 0] = 1e-7
    with pytest.raises(CheckpointError, match=r"call drafter.half\(\) afterwards"):
        load_adapter(base.half(), folder)


def test_a_hotswap_is_refused(base):
    """Swapping in place would skip the checks."""
    with pytest.raises(ValueError, match=r"call delete_adapter\('default'\), then load_adapter"):
        base.load_adapter("anywhere", hotswap=True)


def test_peft_and_this_package_read_each_others_files(base, adapted, tmp_path, caplog):
    """PeftModel loads what save_adapter wrote; what PeftModel saved loads here, with a warning that its base is unknown."""
    save_adapter(adapted, tmp_path / "ours")
    wrapped = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    assert same_outputs(wrapped.get_base_model(), adapted)
    wrapped.save_pretrained(tmp_path / "theirs")
    with caplog.at_level(logging.WARNING):
        load_adapter(base, tmp_path / "theirs")
    assert "does not tell which drafter it was trained on" in caplog.text
    assert same_outputs(base, adapted)


def test_a_wrapped_drafters_adapter_is_saved_with_its_fingerprint(base, tmp_path):
    """save_adapter takes the wrapper; a folder written so is checked like any other."""
    wrapped = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=target_pattern(base), init_lora_weights=False)).eval()
    save_adapter(wrapped, tmp_path)
    load_adapter(base, tmp_path)
    assert same_outputs(base, wrapped.get_base_model())
