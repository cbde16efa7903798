"""The command line's edges: help without torch, one line and exit code 2 for bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from hf_dspark import load_target
from hf_dspark.cli import run
from hf_dspark.utils.hardware import cpu_name
from hf_dspark.version import __version__


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


def test_help_and_bad_usage_do_not_import_torch():
    """Help, version and a mistyped option answer without torch and transformers, which take seconds to load."""
    script = (
        "import sys; from hf_dspark.cli import run; from hf_dspark.cli.app import COMMANDS\n"
        "good = [[], ['--help'], ['--version'], *([name, '--help'] for name in COMMANDS)]\n"
        "codes = [run(words) for words in [*good, ['eval', '--promts', 'x']]]\n"
        "assert codes == [0] * (len(codes) - 1) + [2], codes\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
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
        (["generate", "--prompt", "x", "--max-new-tokens", "-5"], "--max-new-tokens"),
        (["generate", "--prompts", __file__, "--stream", "--batch-size", "2"], "--stream"),
        (["eval", "--prompts", __file__, "--limit", "-3"], "--limit"),
        (["eval", "--prompts", __file__, "--output", "/no/such/folder/x.json"], "/no/such/folder"),
        # What only the package can judge:
        (["generate", "--prompt", "x", "--budget", "half"], "Unknown budget"),
        (["demo", "--budget", "static:-1"], "whole number"),
        (["bench", "--prompts", __file__, "--budgets", "quick"], "Unknown budget"),
        (["bench", "--prompts", __file__, "--concurrency", "0"], "whole numbers of 1 or more"),
        (["generate", "--prompt", "x", "--dtype", "int3"], "bf16"),
        (["generate", "--prompt", "x", "--device", "toaster"], "cpu"),
        (["demo", "--device", "cuda:99"], "cpu"),
        (["generate", "--prompt", "x", "--temperature", "inf"], "temperature must be"),
        (["generate", "--prompt", "x", "--top-p", "0"], "top_p must be"),
        (["generate", "--prompt", "x", "--top-p", "nan"], "top_p must be"),
        (["generate", "--prompt", "x", "--top-p", "0.5"], "top_p"),
        (["generate", "--prompt", "x", "--drafter", "./no/such/folder"], "Hub id"),
        (["generate", "--prompt", "x", "--drafter", "smollm2"], "smollm2-dspark"),
        (["eval", "--prompts", __file__], "test_cli.py, line 1"),
        (["calibrate", "--prompts", __file__], "--output FOLDER is needed"),
    ],
)
def test_bad_options_are_one_line(capsys, arguments, expected):
    """The line names the option or the file, or says what is allowed; no model is loaded before."""
    assert expected in fails(capsys, *arguments)


def test_two_files_of_one_name_are_refused(capsys, tmp_path):
    """Results are reported by file name, so two of the same name are an error."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.jsonl").write_text('{"prompt": "x"}\n', encoding="utf-8")
    files = [str(tmp_path / folder / "same.jsonl") for folder in ("a", "b")]
    assert "same" in fails(capsys, "eval", "--prompts", files[0], "--prompts", files[1])


def test_the_traceback_is_shown_on_request(capsys, monkeypatch, tmp_path):
    """A folder without a model is one line; HF_DSPARK_TRACEBACK=1 lets the exception through."""
    assert "config.json" in fails(capsys, "generate", "--prompt", "x", "--drafter", str(tmp_path))
    monkeypatch.setenv("HF_DSPARK_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"config\.json"):
        run(["generate", "--prompt", "x", "--drafter", str(tmp_path)])


def last_json(text: str) -> dict:
    """Returns the JSON object on the last line."""
    return json.loads(text.rstrip("\n").split("\n")[-1])


def test_eval_reports_every_key(capsys, tmp_path, files):
    """One JSON object as the last line and in the output file, with overall figures, files, settings and machine."""
    out = tmp_path / "result.json"
    arguments = ["--prompts", str(files.prompts), "--output", str(out), "--max-new-tokens", "12", "--batch-size", "2", "--device", "cpu"]
    assert run(["eval", *files.pair, *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    record = last_json(captured.out)
    assert "3 of 3" in captured.err
    assert record == json.loads(out.read_text(encoding="utf-8"))
    assert record["tau"] >= 1
    assert len(record["conditional_acceptance"]) >= 1
    assert record["speedup"] == pytest.approx(record["dspark_tokens_per_s"] / record["plain_tokens_per_s"])
    assert record["prompt_lookup_tokens_per_s"] > 0
    assert record["rows"] == record["identical_rows"] == 3  # fp32, greedy: the same text
    assert record["files"]["words"]["tau"] == record["tau"]
    assert record["settings"]["seed"] == 0
    assert record["machine"]["versions"]["torch"]


def test_generate_equals_the_plain_target(capsys, files):
    """In fp32 the text of `generate` is the plain target's own, in a batch too; --stream prints it on its own lines."""
    from hf_dspark.evaluation.prompts import read_prompts
    from hf_dspark.evaluation.speed import Bench
    from hf_dspark.models.loading import load_drafter, load_target

    settings = ["--prompts", str(files.prompts), "--max-new-tokens", "10", "--device", "cpu", "--batch-size", "3", "--json"]
    assert run(["generate", *files.pair, *settings]) == 0
    texts = [result["text"] for result in last_json(capsys.readouterr().out)["results"]]
    model, tokenizer = load_target(str(files.target), dtype="fp32", device="cpu")
    bench = Bench(model, load_drafter(str(files.drafter), dtype="fp32"), tokenizer, max_new_tokens=10)
    plain = [bench.run("plain", bench.inputs([row])).tokens[0] for row in read_prompts(files.prompts)]
    assert texts == [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in plain]
    assert run(["generate", *files.pair, *settings[:4], "--stream", "--json"]) == 0
    out = capsys.readouterr().out
    assert [result["text"] for result in last_json(out)["results"]] == texts
    assert all(text in out.rsplit("\n", 2)[0] for text in texts)


def test_a_seed_repeats_the_text(capsys, files):
    """Under sampling the same seed gives the same text, and some other seed another one."""
    texts = []
    for seed in ("1", "1", "2", "3"):
        sampled = ["--prompt", "w5 w6", "--temperature", "1", "--seed", seed, "--max-new-tokens", "12", "--json"]
        assert run(["generate", *files.pair, *sampled]) == 0
        texts.append(last_json(capsys.readouterr().out)["results"][0]["text"])
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


@pytest.mark.parametrize(("one", "blocks", "plain", "other"), [(0.5, 2.0, "float32", "bfloat16"), (2.0, 0.5, "bfloat16", "float32")])
def test_eval_takes_each_method_in_its_own_best_dtype(capsys, tmp_path, monkeypatch, files, one, blocks, plain, other):
    """On a processor that is faster in bf16 for one token and slower for blocks, or the other way round, plain decoding has its own."""
    key = f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    (tmp_path / "bf16.json").write_text(json.dumps({key: {"1": one, "8": blocks, "32": blocks}}))
    monkeypatch.setenv("HF_DSPARK_CACHE", str(tmp_path))
    target, tokenizer = load_target(files.target)
    tokenizer.save_pretrained(tmp_path / "target")
    target.to(torch.bfloat16).save_pretrained(tmp_path / "target")
    pair = ["--target", str(tmp_path / "target"), "--drafter", str(files.drafter), "--device", "cpu"]
    assert run(["eval", *pair, "--prompts", str(files.prompts), "--limit", "1", "--max-new-tokens", "4", "--json"]) == 0
    record = last_json(capsys.readouterr().out)
    assert (record["settings"]["plain_dtype"], record["settings"]["target_dtype"]) == (plain, other)
    assert record["identical_rows"] is None


def test_demo_ends_with_the_figures(capsys, files):
    """The demo's last line is a JSON object with speed, tau and the verdict of the fp32 leg; with --json it is the only one."""
    pair = ["--target", str(files.target), "--drafter", str(files.drafter), "--device", "cpu"]
    assert run(["demo", *pair, "--max-new-tokens", "8"]) == 0
    out = capsys.readouterr().out
    record = last_json(out)
    assert record["identical"] is True
    assert record["tau"] >= 1
    assert record["speedup"] == pytest.approx(record["dspark_tokens_per_s"] / record["plain_tokens_per_s"])
    assert record["fp32_partings"] == []
    assert "speed-up" in out
    assert run(["demo", *pair, "--max-new-tokens", "4", "--json"]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_profile_prints_what_it_remembers(capsys, tmp_path, monkeypatch, files):
    """The JSON line is the profile that the cache holds; a second time nothing is measured."""
    monkeypatch.setenv("HF_DSPARK_CACHE", str(tmp_path))
    arguments = ["profile", *files.pair, "--rows", "2", "--device", "cpu"]
    assert run([*arguments, "--json"]) == 0
    record = last_json(capsys.readouterr().out)
    (path,) = (tmp_path / "profiles").iterdir()
    assert record == json.loads(path.read_text(encoding="utf-8"))
    assert run(arguments) == 0
    assert json.loads(path.read_text(encoding="utf-8")) == record
    assert "draft" in capsys.readouterr().out


def test_bench_writes_cells_and_plots(capsys, tmp_path, monkeypatch, files):
    """The file has a cell for each concurrency and budget, the folder two plots, stdout a table, stderr a line a cell."""
    monkeypatch.setenv("HF_DSPARK_CACHE", str(tmp_path))
    out = tmp_path / "out.json"
    load = ["--concurrency", "1,2", "--budgets", "plain,full,load-aware", "--seconds", "0.1", "--repeats", "1", "--max-new-tokens", "8"]
    how = ["--prompts", str(files.prompts), "--temperature", "1", "--verification", "token", "--device", "cpu"]
    assert run(["bench", *files.pair, *load, *how, "--json", str(out), "--plots", str(tmp_path / "plots")]) == 0
    record = json.loads(out.read_text(encoding="utf-8"))
    cells = [(n, name) for n in (1, 2) for name in ("plain", "full", "load-aware")]
    assert [(c["concurrency"], c["budget"]) for c in record["cells"]] == cells
    names = {"tokens_per_s", "user_tokens_per_s_median", "user_tokens_per_s_p5", "tau", "verified_tokens_per_request"}
    assert names <= set(record["cells"][0])
    assert (record["settings"]["temperature"], record["settings"]["verification"]) == (1.0, "token")
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["budget.png", "frontier.png"]
    captured = capsys.readouterr()
    assert "load-aware" in captured.out
    said = [line.split(":")[0] for line in captured.err.splitlines() if " in flight, " in line]
    assert said == [f"{n} in flight, {name}" for n, name in cells]


@pytest.mark.slow
def test_calibrate_saves_beside_the_weights_once(capsys, tmp_path, files):
    """The drafter's folder gets calibration.json and temperatures in its config; a second time needs --replace, and may fit copies too."""
    folder, many = tmp_path / "drafter", tmp_path / "many.jsonl"
    shutil.copytree(files.drafter, folder)
    lines = [json.dumps({"prompt": f"w{4 + i % 80} w{5 + i % 61} w{6 + i % 7}"}) + "\n" for i in range(120)]
    many.write_text("".join(lines), encoding="utf-8")
    pair = ["--target", str(files.target), "--drafter", str(folder), "--prompts", str(many), "--dtype", "fp32", "--device", "cpu"]
    calibrate = ["calibrate", *pair, "--max-new-tokens", "24", "--concurrency", "32", "--plots", str(tmp_path / "plots"), "--json"]

    def stored(name: str) -> dict:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    assert run(calibrate) == 0
    record = last_json(capsys.readouterr().out)
    assert stored("calibration.json") == record
    assert stored("config.json")["confidence_temperatures"] == record["temperatures"]
    assert (tmp_path / "plots" / "reliability.png").stat().st_size > 1000
    assert "is calibrated already" in fails(capsys, *calibrate)
    assert run([*calibrate, "--replace", "--copying", "3"]) == 0
    record, config = last_json(capsys.readouterr().out), stored("config.json")
    assert {"weights": config["copy_weights"], "confidence": config["copy_confidence"]} == record["copying"]
    assert len(config["copy_weights"]) == 3
    evaluate = ["eval", *pair, "--limit", "1", "--max-new-tokens", "4", "--json"]
    without = ["--no-copying", "--verification", "token", "--temperature", "1"]
    for options, copying, verification in (([], 3, "block"), (without, 0, "token")):
        assert run([*evaluate, *options]) == 0
        settings = last_json(capsys.readouterr().out)["settings"]
        assert (settings["copying"], settings["verification"]) == (copying, verification)
