"""The target's own responses: whole folders made on a tiny target, against plain generate, the exact distribution, and kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dspark.cli import run as run_command
from hf_dspark.errors import DataError
from hf_dspark.training.configuration import DataSettings, Opening
from hf_dspark.training.data import load_data
from hf_dspark.training.data_generation import ResponseMaker, make_folder
from hf_dspark.training.dialogues import ChatTemplate
from hf_dspark.training.prompts import Prompt, prompt_key
from hf_dspark.training.row_sampler import Request, RowSampler
from hf_dspark.training.rows import read_records
from tests.chat import FORGETFUL, TEMPLATE, chat_target, save_chat_target
from tests.tiny import BOS, EOS, PAD
from tests.training.tiny_runs import write

ROOT = Path(__file__).parents[2]


def some_prompts(count: int, turns: int = 1, seed: int = 0) -> list[Prompt]:
    chance = random.Random(seed)

    def text() -> str:
        return " ".join(f"w{chance.randrange(4, 90)}" for _ in range(chance.randrange(2, 12)))

    return [Prompt("chat" if n % 2 else "code", tuple(("user", text()) for _ in range(turns))) for n in range(count)]


def make(
    path: Path,
    prompts: list[Prompt],
    *,
    template: str = TEMPLATE,
    batch_size: int = 5,
    run: dict[str, Any] | None = None,
    **how: Any,
) -> tuple[dict[str, dict[str, Any]], ResponseMaker]:
    """Answers prompts; returns the records by id, and what made them."""
    model, tokenizer = chat_target(template=template)
    settings = DataSettings(**{"max_new_tokens": 16, "max_prompt_tokens": 200, **how})
    chat = ChatTemplate(tokenizer)
    folder = make_folder(path, model, chat, settings, name="tiny")
    with folder.open():
        maker = ResponseMaker(model, chat, settings, folder, batch_size=batch_size)
        maker.run(prompts, **(run or {}))
    return records(path), maker


def records(path: Path) -> dict[str, dict[str, Any]]:
    rows = [row for shard in sorted(path.glob("responses-*")) for _, row in read_records(shard)]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def skips(path: Path) -> dict[str, str]:
    return {record["id"]: record["reason"] for _, record in read_records(path / "skipped.jsonl")}


def plain(model: Any, ids: list[int], tokens: int) -> list[int]:
    """What transformers' own generate continues with, greedily."""
    prompt = torch.tensor([ids])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False, pad_token_id=PAD)
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL], ids=["appending", "rewriting"])
def test_greedy_answers_are_plain_generates_whatever_else_is_in_flight(tmp_path, template):
    """Every response of every turn is what generate gives for the ids before it, beside rows drawn at temperature 1."""
    prompts = some_prompts(6) + some_prompts(5, turns=3, seed=1) + [Prompt("raw", text="w5 w6 w7")]
    rows, maker = make(tmp_path / "d", prompts, template=template, temperatures=(0.0, 1.0), batch_size=4)
    greedy = [row for row in rows.values() if row["temperature"] == 0]
    assert 3 <= len(greedy) < len(rows)
    for row in greedy:
        for begin, end in row["spans"]:
            assert row["ids"][begin:end] == plain(maker.model, row["ids"][:begin], 16)
    answers = sum(len(row["spans"]) for row in rows.values())
    assert 16 <= answers <= 6 + 15 + 1  # A turn whose answer is empty ends its conversation.
    assert (len(rows) > len(prompts)) == (template == FORGETFUL)


def test_a_row_does_not_depend_on_its_neighbours(tmp_path):
    """Alone, or among others in another order: the same tokens for the same prompt, greedy and drawn, of one turn and of several."""
    prompts = some_prompts(8) + some_prompts(4, turns=2, seed=1)
    how: dict[str, Any] = {"temperatures": (0.0, 0.7, 1.3), "top_p": 0.9}
    alone, _ = make(tmp_path / "a", prompts, batch_size=1, **how)
    among, _ = make(tmp_path / "b", prompts[::-1] + some_prompts(9, seed=2), batch_size=7, **how)
    assert {id: among[id] for id in alone} == alone
    assert {row["temperature"] for row in alone.values()} == {0.0, 0.7, 1.3}
    other, _ = make(tmp_path / "c", prompts, seed=1, **how)
    assert [other.get(id) for id in alone] != list(alone.values())


def draws(logits: list[float], temperature: float, top_p: float, rows: int = 600, times: int = 100) -> list[int]:
    """How often each token is drawn from one known distribution, many rows at a time."""
    sampler = RowSampler(chat_target()[0], rows, 8)
    requests = [Request([1], 10**6, frozenset(), temperature, top_p, random.Random(f"draw/{row}")) for row in range(rows)]
    scores = torch.tensor([logits]).repeat(rows, 1)
    drawn = torch.cat([sampler.choose(scores, requests) for _ in range(times)])
    return torch.bincount(drawn, minlength=len(logits)).tolist()


def misfit(counts: list[int], expected: list[float]) -> float:
    """Pearson's chi-square over the tokens that can occur; infinite where an impossible one did."""
    total = sum(counts)
    if any(count and not share for count, share in zip(counts, expected, strict=True)):
        return float("inf")
    return sum((count - total * share) ** 2 / (total * share) for count, share in zip(counts, expected, strict=True) if share)


LOGITS = [0.0, 2.0, -1.0, 1.5, 0.5, -30.0]


@pytest.mark.parametrize(
    ("temperature", "top_p"),
    [(0.6, 1.0), pytest.param(1.0, 0.8, marks=pytest.mark.slow), pytest.param(1.4, 0.9, marks=pytest.mark.slow)],
)
def test_draws_follow_the_targets_distribution(temperature, top_p):
    """60,000 draws against probabilities computed by hand; chi-square of at most 5 degrees of freedom passes 40 once in five million."""
    weights = [2.718281828459045 ** (logit / temperature) for logit in LOGITS]
    shares = [weight / sum(weights) for weight in weights]
    nucleus, mass = set(), 0.0
    for index in sorted(range(len(shares)), key=lambda i: -shares[i]):
        if mass < top_p:
            nucleus.add(index)
        mass += shares[index]
    total = sum(shares[index] for index in nucleus)
    expected = [shares[index] / total if index in nucleus else 0.0 for index in range(len(shares))]
    assert misfit(draws(LOGITS, temperature, top_p), expected) < 40
    # The test sees a temperature that is off by a tenth.
    assert misfit(draws(LOGITS, temperature * 1.1, top_p), expected) > 40


def test_a_number_next_to_an_edge_never_draws_what_has_no_probability():
    """At numbers 0 and just below 1 the first and last token with probability come out, though others stand before and behind; NaN is an
    error, as in plain generate, and never a token."""

    class Edge:
        def __init__(self, value: float) -> None:
            self.random = lambda: value

    requests = [Request([1], 9, frozenset(), 1.0, 1.0, Edge(value)) for value in (0.0, 1 - 2**-53)]
    scores = torch.tensor([[-float("inf"), 0.0, -float("inf"), 0.0, -float("inf")]]).repeat(2, 1)
    assert RowSampler(chat_target()[0], 2, 8).choose(scores, requests).tolist() == [1, 3]
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        draws([0.0, float("nan")], 1.0, 1.0, rows=1, times=1)


def test_every_prompt_is_answered_once_or_counted(tmp_path):
    """Duplicates up to case and space, excluded prompts and prompts too long are left out and counted; the others have a row each."""
    prompts = some_prompts(6)
    long = Prompt("chat", (("user", "w5 " * 300),))
    twin = Prompt("other", (("user", prompts[0].turns[0].upper().replace("W", "w") + "  "),))
    later = Prompt("chat", (("user", "w8 w9"), ("user", prompts[5].turns[0])))
    excluded = frozenset({prompt_key(prompts[5].turns)})
    rows, maker = make(tmp_path / "d", [*prompts, prompts[1], twin, long, later], run={"excluded": excluded})
    assert set(rows) == {prompt.id for prompt in prompts[:5]}
    assert maker.skipped == {"duplicate": 2, "excluded": 2, "prompt over 200 tokens": 1}
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert (manifest["rows"], manifest["skipped"]) == (5, dict(maker.skipped))


def test_what_cannot_be_made_as_asked_is_refused(tmp_path):
    """A folder with an answer to an excluded prompt (found by any turn), and 512 positions for a prompt of 500 and 16 new tokens."""
    talk = Prompt("chat", (("user", "w30 w31"), ("user", "w40 w41")))
    make(tmp_path / "d", [talk])
    with pytest.raises(DataError, match="already holds 1 prompts that --exclude lists"):
        make(tmp_path / "d", [talk], run={"excluded": frozenset({prompt_key(["w40 w41"])})})
    with pytest.raises(DataError, match="make 516; allowed: up to the target's 512"):
        make(tmp_path / "e", [talk], max_prompt_tokens=500)


def test_an_answer_of_nothing_but_its_end_is_no_row(tmp_path):
    """A target that ends at once leaves no row: the prompt is skipped, counted, and not tried again."""
    prompts = some_prompts(12, seed=5)
    model, tokenizer = chat_target()
    with torch.no_grad():
        model.lm_head.weight[EOS] = 100 * model.lm_head.weight[EOS]
    settings, chat = DataSettings(max_new_tokens=8, max_prompt_tokens=100), ChatTemplate(tokenizer)
    first = [plain(model, chat.encode(chat.render(prompt.segments[0])), 1) == [EOS] for prompt in prompts]
    assert 0 < sum(first) < 12
    for _ in range(2):
        folder = make_folder(tmp_path / "d", model, chat, settings, name="tiny")
        with folder.open():
            maker = ResponseMaker(model, chat, settings, folder, batch_size=4)
            assert maker.run(prompts)
        assert folder.skipped == {"empty response": sum(first)}
        assert folder.rows == 12 - sum(first)
    assert maker.tokens == 0


SELF: dict[str, Any] = {
    "self_prompts": 40,
    "self_tokens": 60,
    "self_temperature": 1.0,
    "openings": (Opening("begun", "w7 "), Opening("system", system="w9"), Opening("same", "w8 w8 ")),
}


@pytest.mark.slow
def test_self_prompts_are_answered_and_the_others_are_counted(tmp_path):
    """Every number gives a row or a reason, whatever the batch; rows start as their opening says, but for its system prompt."""
    rows, _ = make(tmp_path / "a", [], batch_size=3, **SELF)
    again, _ = make(tmp_path / "b", [], batch_size=11, **SELF)
    assert again == rows
    skipped = skips(tmp_path / "a")
    assert len(rows) + len(skipped) == 40
    assert set(skipped).isdisjoint(rows)
    assert {row["source"] for row in rows.values()} == {"begun", "system", "same"}
    for row in rows.values():
        begins = {"begun": [7], "same": [8, 8], "system": []}[row["source"]]
        assert row["ids"][: 2 + len(begins)] == [BOS, 90, *begins]


@pytest.mark.slow
def test_of_equal_self_prompts_the_first_number_is_answered_whatever_finishes_first(tmp_path):
    """At a temperature near zero an opening gives the same prompt every time: one row, of the lowest number, and counted duplicates."""
    sure = {**SELF, "self_temperature": 1e-5, "self_prompts": 12, "self_tokens": 200}
    for batch_size in (1, 24):
        rows, _ = make(tmp_path / str(batch_size), [], batch_size=batch_size, **sure)
        sources = [row["source"] for row in rows.values()]
        assert len(sources) == len(set(sources))
        assert "self-prompt duplicate" in skips(tmp_path / str(batch_size)).values()
    assert records(tmp_path / "1") == records(tmp_path / "24")


@pytest.mark.slow
def test_a_stop_by_the_clock_can_be_continued(tmp_path):
    """Stopped at once, again and again, the run ends with the rows of an uninterrupted one."""
    prompts = some_prompts(10) + some_prompts(3, turns=2, seed=1)
    how: dict[str, Any] = {"temperatures": (0.0, 1.0), **SELF}
    parts = [make(tmp_path / "parts", prompts, run={"minutes": minutes}, **how)[0] for minutes in (0.003, 0.003, 0.003, None)]
    assert parts == sorted(parts, key=len)
    assert parts[-1] == make(tmp_path / "whole", prompts, **how)[0]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of the command for a run of some seconds on a tiny target, but for --output."""
    folder = tmp_path_factory.mktemp("tiny")
    target = save_chat_target(folder / "target")
    texts = [{"turns": list(prompt.turns)} for prompt in some_prompts(40) + some_prompts(12, turns=2, seed=1)]
    prompts = write(folder / "prompts.jsonl", *texts)
    openings = write(folder / "openings.jsonl", {"source": "begun", "begin": "w7 "})
    words = [
        *("--target", target, "--prompts", prompts, "--self-prompt", 40, "--self-tokens", 60, "--begin", openings, "--system", "w9"),
        *("--temperature", 0, "--temperature", 1, "--max-new-tokens", 60, "--max-prompt-tokens", 300, "--batch-size", 6, "--seed", 3),
        *("--held-out", 0.3),
    ]
    return ["data", *map(str, words)]


@pytest.fixture(scope="module")
def whole(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The rows of the uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "data"
    assert run_command([*options, "--output", str(output)]) == 0
    return records(output)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_rows_of_the_uninterrupted_one(options, whole, tmp_path, capsys):
    """SIGKILL as soon as there are new rows, twice; then the same command finishes: nothing lost, nothing doubled, in any field."""
    output = tmp_path / "data"
    shard = output / "responses-00000.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        size = shard.stat().st_size if shard.exists() else 0
        command = [sys.executable, "-m", "hf_dspark", *options, "--output", str(output)]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment) as process:
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline and (not shard.exists() or shard.stat().st_size < size + 2000):
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        with shard.open("ab") as file:  # What a kill inside a write would leave.
            file.write(b'{"id": "half')
    survived = len(shard.read_bytes().split(b"\n")) - 1
    assert run_command([*options, "--output", str(output), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.strip().rsplit("\n", 1)[-1])
    assert result["complete"]
    assert 0 < survived < len(whole)
    assert records(output) == whole
    assert result["rows"] == len(whole)


@pytest.mark.slow
def test_the_trainer_reads_the_commands_folder(options, whole, tmp_path):
    """A folder of the command, as Parquet, loads for its target with every row on one side; for another target it is refused."""
    pytest.importorskip("pyarrow")
    output = tmp_path / "data"
    assert run_command([*options, "--output", str(output), "--format", "parquet"]) == 0
    assert [path.suffix for path in output.glob("responses-*")] == [".parquet"]
    data = load_data(output, chat_target()[0])
    assert len(data.train_rows) + len(data.held_out_rows) + sum(data.left_out.values()) == len(whole)
    assert data.held_out_share == 0.3
    assert not {row.prompt_ids for row in data.train_rows} & {row.prompt_ids for row in data.held_out_rows}
    assert data.summary()["folders"][0]["sampling"]["temperatures"] == [0.0, 1.0]
    with pytest.raises(DataError, match="the responses are those of the target 'target'"):
        load_data(output, chat_target(seed=1)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to answer"),
        (["--system", "w9", "--prompts", "x.jsonl"], "go with --self-prompt"),
        (["--self-prompt", "1", "--format", "csv"], "'csv' is not one of"),
        (["--prompts", "x.jsonl"], "no prompt file 'x.jsonl'"),
        (["--self-prompt", "1", "--self-temperature", "0"], "self_temperature is 0"),
    ],
)
def test_wrong_options_are_one_line_before_anything_is_loaded(tmp_path, capsys, arguments, message):
    """Exit code 2 and one line; no folder is made."""
    assert run_command(["data", "--output", str(tmp_path / "d"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "d").exists()
