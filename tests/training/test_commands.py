"""`hf-dspark data`, `train` and `finetune`, whole, in processes of their own, on a tiny random target: from prompts to an adapter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_dspark.models.loading import load_drafter, load_target
from tests.tiny import tiny_target
from tests.words import word_tokenizer

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} end {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "hf_dspark", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(*arguments: object, fails: bool = False) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300, env=environment(), check=False)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done


def last_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads(done.stdout.strip().rsplit("\n", 1)[-1])


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target with a tokenizer of one token a word and a chat template."""
    folder = tmp_path_factory.mktemp("target")
    model = tiny_target("llama")
    model.save_pretrained(folder)
    tokenizer = word_tokenizer(model.config)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder that the command made."""
    folder = tmp_path_factory.mktemp("data")
    prompts = folder / "prompts.jsonl"
    with prompts.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"turns": [f"w{10 + i} w{20 + i % 7} w{30 + i % 5}"]}) + "\n" for i in range(40))
    output = folder / "data"
    settings = ("--temperature", 0, "--temperature", 1, "--max-new-tokens", 24, "--batch-size", 16, "--held-out", 0.2)
    run("data", "--target", target, "--prompts", prompts, *settings, "--max-prompt-tokens", 64, "--dtype", "fp32", "--output", output)
    return output


def training(target: Path, data: Path, output: Path, *more: object) -> list[object]:
    """Arguments of a short run in float32."""
    shape = ("--layers", 1, "--block-size", 3, "--rank", 4, "--mask-token", 3)
    step = ("--batch-size", 4, "--anchors", 8, "--chunk", 16, "--decode-prompts", 2, "--dtype", "fp32")
    return ["train", "--target", target, "--data", data, "--output", output, *shape, *step, *more]


@pytest.fixture(scope="module")
def trained(target: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drafter that the command trained."""
    output = tmp_path_factory.mktemp("run")
    done = run(*training(target, data, output, "--steps", 12, "--json"))
    assert last_json(done)["steps"] == 12
    return output


def test_a_drafter_is_made_from_prompts_alone(target: Path, trained: Path) -> None:
    """The trained drafter drafts: greedy text is the target's own, its folder holds card, curve and recipe, and no hidden state."""
    model, _ = load_target(target, dtype="fp32")
    drafter = load_drafter(trained / "best", dtype="fp32")
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, assistant_model=drafter, **options), model.generate(ids, **options))
    assert {path.name for path in (trained / "best").iterdir()} >= {"README.md", "recipe.json", "training_curve.png", "config.json"}
    recipe = json.loads((trained / "recipe.json").read_text(encoding="utf-8"))
    assert recipe["result"]["hidden_states_bytes_on_disk"] == 0
    assert recipe["curve"][-1]["decoded"]["tau"] >= 1
    biggest = max((path for path in trained.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    assert biggest.name == "state.pt"  # the optimizer's, not states of the target


def test_an_adapter_is_made_from_the_drafter(target: Path, data: Path, trained: Path, tmp_path: Path) -> None:
    """finetune leaves an adapter that loads onto its base alone, drafts, and knows the base's fingerprint."""
    arguments = ("--lora-rank", 2, "--steps", 6, "--batch-size", 4, "--anchors", 8, "--decode-prompts", 2, "--dtype", "fp32", "--json")
    done = run("finetune", "--target", target, "--drafter", trained / "best", "--data", data, "--output", tmp_path, *arguments)
    assert last_json(done)["steps"] == 6
    adapter = tmp_path / "best"
    assert (adapter / "adapter_model.safetensors").is_file()
    assert not (adapter / "model.safetensors").exists()
    model, _ = load_target(target, dtype="fp32")
    drafter = load_drafter(trained / "best", dtype="fp32")
    drafter.load_adapter(str(adapter))
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, assistant_model=drafter, **options), model.generate(ids, **options))
    assert "LoRA of rank 2" in (adapter / "README.md").read_text(encoding="utf-8")


def test_all_weights_can_be_finetuned(target: Path, data: Path, trained: Path, tmp_path: Path) -> None:
    """Rank 0 trains the drafter itself and leaves an ordinary checkpoint."""
    arguments = ("--lora-rank", 0, "--steps", 4, "--batch-size", 4, "--anchors", 8, "--decode-prompts", 0, "--dtype", "fp32")
    run("finetune", "--target", target, "--drafter", trained / "best", "--data", data, "--output", tmp_path, *arguments)
    before, after = (load_file(folder / "best" / "model.safetensors") for folder in (trained, tmp_path))
    assert before.keys() == after.keys()
    assert not torch.equal(before["fc.weight"], after["fc.weight"])


@pytest.mark.slow
def test_a_killed_and_resumed_training_equals_the_uninterrupted_one(target: Path, data: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of a run; the same command again ends with bit-identical weights."""
    arguments = ("--steps", 400, "--checkpoint-minutes", 0.01, "--evaluation-minutes", 100)
    run(*training(target, data, tmp_path / "whole", *arguments))
    killed = subprocess.Popen(
        command(*training(target, data, tmp_path / "killed", *arguments)),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("checkpoints/step-*/state.pt")):
        assert time.monotonic() < deadline
        assert killed.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "final").exists()
    run(*training(target, data, tmp_path / "killed", *arguments))
    events = [json.loads(line)["event"] for line in (tmp_path / "killed" / "log.jsonl").open(encoding="utf-8")]
    assert "resume" in events
    whole, resumed = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "killed"))
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name


@pytest.mark.parametrize("name", ["data", "train", "finetune"])
def test_every_option_has_words_of_its_own(name: str) -> None:
    """No option is declared without help."""
    from typer.main import get_command

    from hf_dspark.cli.app import app

    parameters = get_command(app).commands[name].params  # type: ignore[attr-defined]
    assert len(parameters) > 10
    assert [p.name for p in parameters if not p.help and p.name != "help"] == []


@pytest.mark.parametrize("name", ["data", "train", "finetune"])
def test_help_explains_every_option(name: str) -> None:
    """--help names each option with words behind it, and answers without importing torch."""
    code = (
        f"import sys\nsys.argv = ['hf-dspark', '{name}', '--help']\n"
        "from hf_dspark.cli import run\n"
        "assert run(sys.argv[1:]) == 0\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    options = [line.strip() for line in done.stdout.splitlines() if line.strip().startswith("--")]
    assert len(options) > 10
    text = " ".join(done.stdout.split())
    for option in options:
        rest = text.split(option.split()[0], 1)[1]
        assert rest[:40].strip(), option


def test_data_of_another_target_is_refused(data: Path, tmp_path: Path) -> None:
    """A manifest that names another target stops the run, and says which is which."""
    other = tmp_path / "other"
    torch.manual_seed(5)
    model = type(tiny_target("llama"))(tiny_target("llama").config)
    model.save_pretrained(other)
    word_tokenizer(model.config).save_pretrained(other)
    done = run(*training(other, data, tmp_path / "run", "--steps", 2), fails=True)
    assert done.returncode == 2
    assert str(data) in done.stderr
    assert "fingerprint" in done.stderr


def test_a_drafter_of_another_target_is_refused(target: Path, data: Path, tmp_path: Path) -> None:
    """The embedded drafter does not fit the tiny target; the mismatch is listed."""
    done = run(
        "finetune", "--target", target, "--drafter", "smollm2-dspark", "--data", data, "--output", tmp_path, "--steps", 2, fails=True
    )
    assert done.returncode == 2
    assert "hidden size" in done.stderr


def test_a_corrupt_shard_is_named(target: Path, data: Path, tmp_path: Path) -> None:
    """A broken line in the middle of a shard is an error with file and line."""
    import shutil

    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    shard = next(folder.glob("responses-*.jsonl"))
    lines = shard.read_text(encoding="utf-8").split("\n")
    lines[1] = lines[1][:25]
    shard.write_text("\n".join(lines), encoding="utf-8")
    done = run(*training(target, folder, tmp_path / "run", "--steps", 2), fails=True)
    assert f"{shard}, line 2" in done.stderr


def test_a_trained_drafter_is_trained_further_and_its_card_says_so(target: Path, data: Path, trained: Path, tmp_path: Path) -> None:
    """train --drafter starts from that drafter's weights; the card names it and claims no shape of its own."""
    step = ("--batch-size", 4, "--anchors", 8, "--decode-prompts", 0, "--dtype", "fp32", "--steps", 3)
    run("train", "--target", target, "--data", data, "--drafter", trained / "best", "--output", tmp_path, *step)
    card = (tmp_path / "best" / "README.md").read_text(encoding="utf-8")
    assert "| base | best, fingerprint" in card
    assert "rank 256" not in card
    assert str(tmp_path) not in card
    assert json.loads((tmp_path / "best" / "config.json").read_text(encoding="utf-8"))["markov_rank"] == 4


def test_a_finished_run_is_left_alone(target: Path, data: Path, trained: Path) -> None:
    """The same command once more changes no weight and adds nothing to the curve."""

    def standing() -> tuple[int, int]:
        curve = json.loads((trained / "recipe.json").read_text(encoding="utf-8"))["curve"]
        return (trained / "final" / "model.safetensors").stat().st_mtime_ns, len(curve)

    before = standing()
    run(*training(target, data, trained, "--steps", 12, "--json"))
    assert standing() == before


@pytest.mark.parametrize("changed", [("--block-size", 2), ("--mask-token", 4), ("--dtype", "bf16")])
def test_a_run_is_not_resumed_as_another_kind_of_drafter(target: Path, data: Path, trained: Path, changed: tuple[object, ...]) -> None:
    """Shapes may agree where block, mask token or dtype do not; the difference is named."""
    done = run(*training(target, data, trained, "--steps", 12, *changed), fails=True)
    assert done.returncode == 2
    assert "belongs to another run" in done.stderr


@pytest.mark.parametrize("given", [("--layers", 3), ("--start", "random")])
def test_options_without_effect_are_refused(target: Path, data: Path, tmp_path: Path, given: tuple[object, ...]) -> None:
    """An option that a given drafter decides is an error, not a silence."""
    done = run("train", "--target", target, "--data", data, "--output", tmp_path, "--steps", 2, "--drafter", "x", *given, fails=True)
    assert f"{given[0]} would have no effect" in " ".join(done.stderr.split())


def test_an_output_that_cannot_be_written_is_found_first(target: Path, data: Path, tmp_path: Path) -> None:
    """A file stands where the folder should be: one line, before anything is loaded."""
    (tmp_path / "file").write_text("x", encoding="utf-8")
    done = run(*training(target, data, tmp_path / "file" / "run", "--steps", 2), fails=True)
    assert done.returncode == 2
    assert "cannot write" in done.stderr


def test_lengths_exclude_each_other(target: Path, data: Path, tmp_path: Path) -> None:
    """Steps, minutes and epochs: exactly one."""
    for lengths in ((), ("--steps", 2, "--epochs", 1)):
        done = run(*training(target, data, tmp_path / "run", *lengths), fails=True)
        assert "exactly one of --steps, --minutes and --epochs" in " ".join(done.stderr.split())


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(target: Path, data: Path, tmp_path: Path) -> None:
    """Where files may not grow past a limit, the run ends with an error that names the problem; with room again it resumes."""
    arguments = training(target, data, tmp_path / "run", "--steps", 6, "--checkpoint-minutes", 0.01)
    limited = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "from hf_dspark.cli import main\n"
        f"main({[str(a) for a in arguments]!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, timeout=200, env=environment(), check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr
    run(*arguments)
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
