"""`hf-dspark data`, `train` and `finetune`, whole, on a tiny random target: from prompts to an adapter."""

from __future__ import annotations

import contextlib
import io
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

from hf_dspark.cli import run
from hf_dspark.models.loading import load_drafter, load_target
from tests.chat import save_chat_target
from tests.helpers import needs_adapters
from tests.training.tiny_runs import events, largest_file, write

ROOT = Path(__file__).parents[2]


def command(*arguments: object, fails: bool = False) -> str:
    """Run the command line in this process; returns what it printed, on stderr where it fails."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = run([str(argument) for argument in arguments])
    assert code == (2 if fails else 0), error.getvalue()
    return " ".join(error.getvalue().split()) if fails else out.getvalue()


def steps_of(*arguments: object) -> int:
    """The steps that a command's last line tells as JSON."""
    return json.loads(command(*arguments, "--json").strip().rsplit("\n", 1)[-1])["steps"]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def data(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder that the command made."""
    folder = tmp_path_factory.mktemp("data")
    prompts = write(folder / "prompts.jsonl", *({"turns": [f"w{10 + i} w{20 + i % 7} w{30 + i % 5}"]} for i in range(30)))
    settings = ("--temperature", 0, "--temperature", 1, "--max-new-tokens", 16, "--batch-size", 16, "--held-out", 0.2)
    place = ("--target", target, "--max-prompt-tokens", 64, "--dtype", "fp32", "--output", folder / "data")
    command("data", "--prompts", prompts, *settings, *place)
    return folder / "data"


SHAPE = ("--layers", 1, "--block-size", 3, "--rank", 4, "--mask-token", 3)
STEP = ("--batch-size", 4, "--anchors", 8, "--chunk", 16, "--dtype", "fp32")


def training(target: Path, data: Path, output: Path, *more: object) -> list[object]:
    """Arguments of a short run in float32."""
    return ["train", "--target", target, "--data", data, "--output", output, *SHAPE, *STEP, "--decode-prompts", 2, *more]


@pytest.fixture(scope="module")
def trained(target: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drafter that the command trained."""
    output = tmp_path_factory.mktemp("run")
    assert steps_of(*training(target, data, output, "--steps", 8)) == 8
    return output


def assert_drafts(target: Path, drafter: Any) -> None:
    """Greedy text with the drafter is the target's own."""
    model, _ = load_target(target, dtype="fp32")
    ids, options = torch.tensor([[5, 6, 7, 8]]), {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, assistant_model=drafter, **options), model.generate(ids, **options))


def test_a_drafter_is_made_from_prompts_alone(target: Path, trained: Path) -> None:
    """The trained drafter drafts; its folder holds card, curve and recipe, and nothing as big as the optimizer's state."""
    assert_drafts(target, load_drafter(trained / "best", dtype="fp32"))
    assert {path.name for path in (trained / "best").iterdir()} >= {"README.md", "recipe.json", "config.json"}
    recipe = read_json(trained / "recipe.json")
    assert recipe["result"]["hidden_states_bytes_on_disk"] == 0
    assert recipe["curve"][-1]["decoded"]["tau"] >= 1
    assert recipe["arguments"]["shape"]["rank"] == 4
    assert recipe["arguments"]["training"]["num_anchors"] == 8
    assert recipe["arguments"]["options"]["data"] == ["data"]
    biggest = max((path for path in trained.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    assert biggest.name == "state.pt"


@needs_adapters
def test_an_adapter_is_made_from_the_drafter(target: Path, data: Path, trained: Path, tmp_path: Path) -> None:
    """finetune leaves an adapter that loads onto its base alone, and drafts."""
    place = ("--target", target, "--drafter", trained / "best", "--data", data, "--output", tmp_path)
    assert steps_of("finetune", *place, "--lora-rank", 2, "--steps", 3, *STEP, "--decode-prompts", 2) == 3
    assert (tmp_path / "best" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "best" / "model.safetensors").exists()
    drafter = load_drafter(trained / "best", dtype="fp32")
    drafter.load_adapter(str(tmp_path / "best"))
    assert_drafts(target, drafter)
    recipe = read_json(tmp_path / "recipe.json")
    assert (recipe["lora"]["rank"], recipe["lora"]["targets"][0]) == (2, "attention")
    assert recipe["arguments"]["training"]["ce_start"] == recipe["arguments"]["training"]["ce_end"] == 0.1


def test_all_weights_can_be_finetuned(target: Path, data: Path, trained: Path, tmp_path: Path) -> None:
    """Rank 0 trains the drafter itself and leaves an ordinary checkpoint."""
    arguments = ("--lora-rank", 0, "--steps", 3, *STEP, "--decode-prompts", 0)
    command("finetune", "--target", target, "--drafter", trained / "best", "--data", data, "--output", tmp_path, *arguments)
    before, after = (load_file(folder / "best" / "model.safetensors") for folder in (trained, tmp_path))
    assert before.keys() == after.keys()
    assert not torch.equal(before["fc.weight"], after["fc.weight"])


def test_a_trained_drafter_is_trained_further_and_its_card_says_so(target: Path, data: Path, trained: Path, tmp_path: Path) -> None:
    """train --drafter starts from that drafter's weights; the card names it and claims no shape of its own."""
    step = (*STEP, "--decode-prompts", 0, "--epochs", 0.5)
    command("train", "--target", target, "--data", data, "--drafter", trained / "best", "--output", tmp_path, *step)
    card = (tmp_path / "best" / "README.md").read_text(encoding="utf-8")
    assert "best" in card
    assert "rank 256" not in card
    assert str(tmp_path) not in card
    assert read_json(tmp_path / "best" / "config.json")["markov_rank"] == 4


def test_a_finished_run_is_left_alone(target: Path, data: Path, trained: Path) -> None:
    """The same command once more changes no weight and adds nothing to the curve."""
    weights, recipe = trained / "final" / "model.safetensors", trained / "recipe.json"
    before = weights.stat().st_mtime_ns, read_json(recipe)["curve"]
    command(*training(target, data, trained, "--steps", 8))
    assert (weights.stat().st_mtime_ns, read_json(recipe)["curve"]) == before


@pytest.mark.slow
def test_a_killed_and_resumed_training_equals_the_uninterrupted_one(target: Path, data: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of a run; the same command again ends with bit-identical weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the process that is killed
    try:
        arguments = ("--steps", 120, "--checkpoint-minutes", 0.005, "--evaluation-minutes", 100, "--decode-prompts", 0)
        command(*training(target, data, tmp_path / "whole", *arguments))
        words = map(str, training(target, data, tmp_path / "killed", *arguments))
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        killed = subprocess.Popen([sys.executable, "-m", "hf_dspark", *words], env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not list((tmp_path / "killed").glob("checkpoints/step-*/state.pt")):
            assert time.monotonic() < deadline
            assert killed.poll() is None, "the run ended before it could be killed"
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert not (tmp_path / "killed" / "final").exists()
        command(*training(target, data, tmp_path / "killed", *arguments))
    finally:
        torch.set_num_threads(threads)
    assert "resume" in [event["event"] for event in events(tmp_path / "killed")]
    whole, resumed = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "killed"))
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name


def test_an_output_that_cannot_be_written_is_one_line_and_the_run_goes_on_later(target: Path, data: Path, tmp_path: Path) -> None:
    """A file where the folder should be, or files that may not grow past a limit, end the run with an error that names the problem; with
    room again it resumes."""
    run, more = tmp_path / "run", ("--steps", 4, "--decode-prompts", 0)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert "cannot write" in command(*training(target, data, tmp_path / "file" / "run", *more), fails=True)
    with largest_file(20_000):
        assert "cannot write" in command(*training(target, data, run, *more), fails=True)
    command(*training(target, data, run, *more))
    assert (run / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["data", "train", "finetune"])
def test_help_explains_every_option(name: str) -> None:
    """--help names each option with words behind it, and answers without importing torch."""
    code = (
        "import sys\nfrom typer.main import get_command\nfrom hf_dspark.cli import run\nfrom hf_dspark.cli.app import app\n"
        f"assert run(['{name}', '--help']) == 0\nassert 'torch' not in sys.modules\n"
        f"parameters = get_command(app).commands['{name}'].params\n"
        "assert [p.name for p in parameters if not p.help and p.name != 'help'] == []"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n  --") > 20


def test_options_have_the_defaults_of_their_dataclass() -> None:
    """Names, defaults and ranges are written once, in the dataclass; finetune has a lower learning rate."""
    from typer.main import get_command

    from hf_dspark.cli.app import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    train, finetune = ({p.name: p for p in commands[name].params} for name in ("train", "finetune"))
    assert (train["learning_rate"].opts, train["learning_rate"].default, finetune["learning_rate"].default) == (["--lr"], 1.5e-3, 1e-3)
    assert (train["num_anchors"].opts, train["num_anchors"].default) == (["--anchors"], 64)
    assert (train["taps"].multiple, train["taps"].default) == (True, None)
    assert "optimizer" not in finetune


def test_data_or_a_drafter_of_another_target_is_refused(target: Path, data: Path, tmp_path: Path) -> None:
    """A manifest that names another target stops the run; so does the embedded drafter, which does not fit the tiny one."""
    other = save_chat_target(tmp_path / "other", seed=5)
    assert f"{data}: the responses are those of" in command(*training(other, data, tmp_path / "run", "--steps", 2), fails=True)
    place = ("--target", target, "--data", data, "--output", tmp_path)
    assert "hidden size" in command("finetune", "--drafter", "smollm2-dspark", *place, "--steps", 2, fails=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--steps", 8, "--block-size", 2), "belongs to another run (block_size 3 there, 2 here)"),
        (("--steps", 8, "--mask-token", 4), "belongs to another run (mask_token_id 3 there, 4 here)"),
        (("--steps", 8, "--dtype", "bf16"), "belongs to another run (dtype 'float32' there, 'bfloat16' here)"),
        ((), "exactly one of --steps, --minutes and --epochs"),
        (("--steps", 2, "--epochs", 1), "exactly one of --steps, --minutes and --epochs"),
        (("--steps", 2, "--lr", "nan"), "learning_rate is nan"),
        (("--steps", 2, "--drafter", "x"), "--layers, --block-size, --rank, --mask-token would have no effect"),
    ],
)
def test_options_that_do_not_fit_are_refused(target: Path, data: Path, trained: Path, changed: tuple[object, ...], message: str) -> None:
    """Another kind of drafter than the run's, no length or two, a value out of range, an option that a given drafter decides."""
    assert message in command(*training(target, data, trained, *changed), fails=True)
