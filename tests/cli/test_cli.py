"""The command line's edges: help without torch, one line and exit code 2 for bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_dspark.cli import run
from hf_dspark.version import __version__

SOURCE = Path(__file__).parents[2] / "src"


def fails(capsys, *arguments: str) -> str:
    """Runs the command line, expects exit code 2, nothing on stdout and one `error:` line, and returns that line."""
    code = run(arguments)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    lines = captured.err.strip().split("\n")
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["--version"], *([command, "--help"] for command in ("demo", "generate", "eval", "bench"))]
)
def test_help_does_not_import_torch(arguments):
    """Help and version answer without torch and transformers."""
    script = (
        "import sys; sys.argv[0] = 'hf-dspark'; from hf_dspark.cli import run; code = run(sys.argv[1:]); "
        "heavy = {'torch', 'transformers'} & sys.modules.keys(); "
        "sys.exit(f'imported {sorted(heavy)}' if heavy else code)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_bad_usage_does_not_import_torch():
    """A mistyped option is refused at once, on one line of stderr, with exit code 2."""
    script = (
        "import sys; sys.argv[0] = 'hf-dspark'; from hf_dspark.cli import run; code = run(sys.argv[1:]); "
        "sys.exit(3 if 'torch' in sys.modules else code)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", script, "eval", "--promts", "x"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_version(capsys):
    """--version prints the package's version."""
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"hf-dspark {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["bogus"], "bogus"),
        (["eval"], "--prompts"),
        (["eval", "--prompts", "/no/such/file.jsonl"], "/no/such/file.jsonl"),
        (["generate"], "--prompt"),
        (["generate", "--prompt", "x", "--prompts", __file__], "not both"),
        (["generate", "--prompt", " "], "empty"),
        (["generate", "--prompt", "x", "--limit", "2"], "--limit"),
        (["generate", "--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["generate", "--prompt", "x", "--temperature", "inf"], "--temperature"),
        (["generate", "--prompt", "x", "--top-p", "0"], "--top-p"),
        (["generate", "--prompt", "x", "--top-p", "nan"], "--top-p"),
        (["generate", "--prompt", "x", "--batch-size", "0"], "--batch-size"),
        (["generate", "--prompt", "x", "--max-new-tokens", "-5"], "--max-new-tokens"),
        (["generate", "--prompt", "x", "--seed", "-1"], "--seed"),
        (["generate", "--prompts", __file__, "--stream", "--batch-size", "2"], "--stream"),
        (["eval", "--prompts", __file__, "--limit", "-3"], "--limit"),
        (["eval", "--prompts", __file__, "--output", "/no/such/folder/x.json"], "/no/such/folder"),
        (["demo", "--max-new-tokens", "0"], "--max-new-tokens"),
    ],
)
def test_bad_options_are_one_line(capsys, arguments, expected):
    """The line names the option or the file."""
    assert expected in fails(capsys, *arguments)


@pytest.mark.parametrize("budget", ["half", "static", "static:-1", "static:x", "threshold:2", "threshold:nan", ""])
def test_a_bad_budget_is_one_line(capsys, budget):
    """Unknown names and impossible parameters are refused before any model is loaded."""
    assert "udget" in fails(capsys, "generate", "--prompt", "x", "--budget", budget)
    assert "udget" in fails(capsys, "demo", "--budget", budget)


def test_a_bad_dtype_or_device_is_one_line(capsys):
    """The line says what is allowed."""
    assert "bf16" in fails(capsys, "generate", "--prompt", "x", "--dtype", "int3")
    assert "cpu" in fails(capsys, "generate", "--prompt", "x", "--device", "toaster")
    assert "cpu" in fails(capsys, "demo", "--device", "cuda:99")


def test_a_nucleus_without_a_temperature_is_refused(capsys):
    """--top-p would silently do nothing under greedy decoding."""
    assert "top_p" in fails(capsys, "generate", "--prompt", "x", "--top-p", "0.5")


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_a_bad_row_is_named_by_file_and_line(capsys, tmp_path, command):
    """The one line holds the file's name and the row's number."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n{"turns": []}\n', encoding="utf-8")
    assert f"{path}, line 2" in fails(capsys, command, "--prompts", str(path))


def test_two_files_of_one_name_are_refused(capsys, tmp_path):
    """Results are reported by file name, so two of the same name are an error."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.jsonl").write_text('{"prompt": "x"}\n', encoding="utf-8")
    files = [str(tmp_path / folder / "same.jsonl") for folder in ("a", "b")]
    assert "same" in fails(capsys, "eval", "--prompts", files[0], "--prompts", files[1])


def test_a_folder_without_a_model_is_one_line(capsys, tmp_path):
    """A drafter's name that is no embedded name, no model folder and no Hub id is refused."""
    assert "config.json" in fails(capsys, "generate", "--prompt", "x", "--drafter", str(tmp_path))
    assert "Hub id" in fails(capsys, "generate", "--prompt", "x", "--drafter", "./no/such/folder")
    assert "smollm2-dspark" in fails(capsys, "generate", "--prompt", "x", "--drafter", "smollm2")


def test_the_traceback_is_there_for_who_asks(monkeypatch, tmp_path):
    """HF_DSPARK_TRACEBACK=1 lets the exception through."""
    monkeypatch.setenv("HF_DSPARK_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"config\.json"):
        run(["generate", "--prompt", "x", "--drafter", str(tmp_path)])


@pytest.fixture(scope="module")
def tiny_pair(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny target with a tokenizer of one token a word, and a drafter for it, as folders."""
    from tests.tiny import tiny_drafter, tiny_llama
    from tests.words import word_tokenizer

    folder = tmp_path_factory.mktemp("pair")
    target = tiny_llama()
    target.save_pretrained(folder / "target")
    word_tokenizer(target.config).save_pretrained(folder / "target")
    tiny_drafter(target).save_pretrained(folder / "drafter")
    return folder / "target", folder / "drafter"


@pytest.fixture
def prompts(tmp_path) -> Path:
    """Three prompts of different length."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"turns": [text]}) + "\n" for text in ("w5 w6 w7", "w8", "w9 w10 w11 w12 w13")),
        encoding="utf-8",
    )
    return path


def last_json(text: str) -> dict:
    """Returns the JSON object on the last line."""
    return json.loads(text.rstrip("\n").split("\n")[-1])


@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_eval_reports_every_key(capsys, tmp_path, tiny_pair, prompts, batch_size):
    """One JSON object as the last line and in the output file, with overall figures, files, settings and machine."""
    target, drafter = map(str, tiny_pair)
    out = tmp_path / "result.json"
    arguments = ["--max-new-tokens", "12", "--batch-size", batch_size, "--dtype", "fp32", "--device", "cpu", "--json"]
    pair = ["--target", target, "--drafter", drafter, "--prompts", str(prompts), "--output", str(out)]
    assert run(["eval", *pair, *arguments]) == 0
    record = last_json(capsys.readouterr().out)
    assert record == json.loads(out.read_text(encoding="utf-8"))
    assert record["tau"] >= 1
    assert len(record["conditional_acceptance"]) >= 1
    assert record["speedup"] == pytest.approx(record["dspark_tokens_per_s"] / record["plain_tokens_per_s"])
    assert record["prompt_lookup_tokens_per_s"] > 0
    assert record["rows"] == record["identical_rows"] == 3  # fp32, greedy: the same text
    assert record["files"]["prompts"]["tau"] == record["tau"]
    assert record["settings"]["seed"] == 0
    assert record["machine"]["versions"]["torch"]


def test_generate_equals_the_plain_target(capsys, tiny_pair, prompts):
    """In fp32 the text of `generate` is the plain target's own, in a batch too."""
    from hf_dspark.evaluation.prompts import read_prompts
    from hf_dspark.evaluation.speed import Bench
    from hf_dspark.models.loading import load_drafter, load_target

    target, drafter = map(str, tiny_pair)
    pair = ["--target", target, "--drafter", drafter, "--prompts", str(prompts)]
    settings = ["--max-new-tokens", "10", "--dtype", "fp32", "--device", "cpu"]
    assert run(["generate", *pair, *settings, "--batch-size", "3", "--json"]) == 0
    texts = [result["text"] for result in last_json(capsys.readouterr().out)["results"]]

    model, tokenizer = load_target(target, dtype="fp32", device="cpu")
    bench = Bench(model, load_drafter(drafter, dtype="fp32"), tokenizer, max_new_tokens=10)
    plain = [bench.run("plain", bench.inputs([row])).tokens[0] for row in read_prompts(prompts)]
    assert texts == [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in plain]


def test_a_stream_shows_the_same_text(capsys, tiny_pair):
    """--stream prints the text that --json reports."""
    target, drafter = map(str, tiny_pair)
    pair = ["--target", target, "--drafter", drafter, "--prompt", "w5 w6"]
    assert run(["generate", *pair, "--max-new-tokens", "8", "--dtype", "fp32", "--stream", "--json"]) == 0
    out = capsys.readouterr().out
    assert last_json(out)["results"][0]["text"].strip() in out.rstrip("\n").rsplit("\n", 1)[0]


def test_a_seed_repeats_the_text(capsys, tiny_pair):
    """Under sampling the same seed gives the same text, and some other seed another one."""
    target, drafter = map(str, tiny_pair)
    texts = []
    for seed in ("1", "1", "2", "3"):
        pair = ["--target", target, "--drafter", drafter, "--prompt", "w5 w6", "--temperature", "1", "--seed", seed]
        assert run(["generate", *pair, "--max-new-tokens", "12", "--dtype", "fp32", "--json"]) == 0
        texts.append(last_json(capsys.readouterr().out)["results"][0]["text"])
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_demo_ends_with_the_figures(capsys, tiny_pair):
    """The demo's last line is a JSON object with speed, tau and the verdict of the fp32 leg, which is `identical`."""
    target, drafter = map(str, tiny_pair)
    assert run(["demo", "--target", target, "--drafter", drafter, "--max-new-tokens", "8", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    record = last_json(out)
    assert record["identical"] is True
    assert record["tau"] >= 1
    assert record["speedup"] == pytest.approx(record["dspark_tokens_per_s"] / record["plain_tokens_per_s"])
    assert record["fp32_partings"] == []
    assert "speed-up" in out


def test_demo_with_json_prints_one_line(capsys, tiny_pair):
    """--json leaves nothing on stdout but the object."""
    target, drafter = map(str, tiny_pair)
    assert run(["demo", "--target", target, "--drafter", drafter, "--max-new-tokens", "4", "--device", "cpu", "--json"]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_profile_prints_what_it_remembers(capsys, tmp_path, monkeypatch, tiny_pair):
    """The JSON line is the profile that the cache holds; asked again, nothing is measured anew."""
    monkeypatch.setenv("HF_DSPARK_CACHE", str(tmp_path))
    target, drafter = map(str, tiny_pair)
    arguments = ["profile", "--target", target, "--drafter", drafter, "--rows", "2", "--dtype", "fp32", "--device", "cpu"]
    assert run([*arguments, "--json"]) == 0
    record = last_json(capsys.readouterr().out)
    (path,) = (tmp_path / "profiles").iterdir()
    assert record == json.loads(path.read_text(encoding="utf-8"))
    assert run([*arguments, "--plot", str(tmp_path / "costs.png")]) == 0
    assert (tmp_path / "costs.png").stat().st_size > 1000
    assert json.loads(path.read_text(encoding="utf-8")) == record
    assert "draft" in capsys.readouterr().out


def test_bench_writes_cells_and_plots(capsys, tmp_path, monkeypatch, tiny_pair, prompts):
    """The file has a cell for each concurrency and budget, the folder two plots, stdout a table."""
    monkeypatch.setenv("HF_DSPARK_CACHE", str(tmp_path))
    target, drafter = map(str, tiny_pair)
    out = tmp_path / "out.json"
    arguments = [
        "--concurrency",
        "1,2",
        "--budgets",
        "plain,full,load-aware",
        "--seconds",
        "0.1",
        "--repeats",
        "1",
        "--max-new-tokens",
        "8",
        "--temperature",
        "1",
        "--verification",
        "token",
    ]
    where = ["--json", str(out), "--plots", str(tmp_path / "plots"), "--dtype", "fp32", "--device", "cpu"]
    assert run(["bench", "--target", target, "--drafter", drafter, "--prompts", str(prompts), *arguments, *where]) == 0
    record = json.loads(out.read_text(encoding="utf-8"))
    assert [(c["concurrency"], c["budget"]) for c in record["cells"]] == [
        (n, name) for n in (1, 2) for name in ("plain", "full", "load-aware")
    ]
    assert {"tokens_per_s", "user_tokens_per_s_median", "user_tokens_per_s_p5", "tau", "verified_tokens_per_request"} <= set(
        record["cells"][0]
    )
    assert (record["settings"]["temperature"], record["settings"]["verification"]) == (1.0, "token")
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["budget.png", "frontier.png"]
    assert "load-aware" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--concurrency", "0"], "whole numbers of 1 or more"),
        (["--concurrency", "a"], "whole numbers"),
        (["--budgets", "quick"], "Unknown budget"),
    ],
)
def test_bench_refuses_bad_lists(capsys, prompts, arguments, expected):
    """One line that says what is allowed, before anything is loaded."""
    assert expected in fails(capsys, "bench", "--prompts", str(prompts), *arguments)


def test_calibrate_saves_beside_the_weights_once(capsys, tmp_path, tiny_pair):
    """The drafter's folder gets calibration.json and temperatures in its config; a second time needs --replace."""
    import shutil

    target, drafter = tiny_pair
    folder = tmp_path / "drafter"
    shutil.copytree(drafter, folder)
    many = tmp_path / "many.jsonl"
    many.write_text(
        "".join(json.dumps({"prompt": f"w{4 + i % 80} w{5 + i % 61} w{6 + i % 7}"}) + "\n" for i in range(120)), encoding="utf-8"
    )
    arguments = ["calibrate", "--target", str(target), "--drafter", str(folder), "--prompts", str(many), "--max-new-tokens", "24"]
    more = ["--dtype", "fp32", "--device", "cpu", "--concurrency", "32", "--plots", str(tmp_path / "plots")]
    assert run([*arguments, *more, "--json"]) == 0
    record = last_json(capsys.readouterr().out)
    assert json.loads((folder / "calibration.json").read_text(encoding="utf-8")) == record
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["confidence_temperatures"] == record["temperatures"]
    assert (tmp_path / "plots" / "reliability.png").stat().st_size > 1000
    assert "is calibrated already" in fails(capsys, *arguments, *more)
    assert run([*arguments, *more, "--replace", "--copying", "3", "--json"]) == 0
    record = last_json(capsys.readouterr().out)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert {"weights": config["copy_weights"], "confidence": config["copy_confidence"]} == record["copying"]
    assert len(config["copy_weights"]) == 3
    evaluate = ["eval", *arguments[1:5], "--prompts", str(many), "--limit", "1", "--max-new-tokens", "4", *more[:4], "--json"]
    for option, longest in ((), 3), (("--no-copying",), 0):
        assert run([*evaluate, *option]) == 0
        assert last_json(capsys.readouterr().out)["settings"]["copying"] == longest
    for option, verification in ((), "block"), (("--verification", "token", "--temperature", "1"), "token"):
        assert run([*evaluate, *option]) == 0
        assert last_json(capsys.readouterr().out)["settings"]["verification"] == verification
    assert run([*arguments, *more, "--replace"]) == 0
    assert json.loads((folder / "calibration.json").read_text(encoding="utf-8"))["copying"]["weights"] == config["copy_weights"]


def test_calibrate_needs_somewhere_to_save(capsys, prompts):
    """An embedded or Hub name is no folder; said before loading."""
    assert "--output FOLDER is needed" in fails(capsys, "calibrate", "--prompts", str(prompts))
