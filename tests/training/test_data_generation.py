"""The target's own responses: whole folders made on a tiny target, against plain generate, the exact distribution, and kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dspark.errors import DataError
from hf_dspark.training.conversations import ChatTemplate, Opening, Prompt, prompt_key
from hf_dspark.training.data import load_data
from hf_dspark.training.dialogues import DataSettings
from hf_dspark.training.responses import ResponseMaker, make_folder
from hf_dspark.training.row_sampler import Request, RowSampler
from hf_dspark.training.rows import read_records
from tests.chat import FORGETFUL, TEMPLATE, chat_target, save_chat_target
from tests.tiny import BOS, EOS, PAD

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
    seed: int = 0,
    run: dict[str, Any] | None = None,
    **how: Any,
) -> tuple[dict[str, dict[str, Any]], ResponseMaker]:
    """Answers prompts; returns the records by id, and what made them."""
    model, tokenizer = chat_target(template=template)
    settings = DataSettings(**{"max_new_tokens": 16, "max_prompt_tokens": 200, "seed": seed, **how})
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


def plain(model: Any, ids: list[int], tokens: int) -> list[int]:
    """What transformers' own generate continues with, greedily."""
    prompt = torch.tensor([ids])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False, pad_token_id=PAD)
    return out[0, len(ids) :].tolist()


# -- texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL], ids=["appending", "rewriting"])
def test_greedy_answers_are_plain_generate_s_whatever_else_is_in_flight(tmp_path, template):
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


class FixedScores:
    """A stand-in for the loop's model passes: draws from one known distribution, many rows at a time."""

    def __init__(self, logits: list[float], temperature: float, top_p: float, rows: int) -> None:
        model, _ = chat_target()
        self.sampler = RowSampler(model, rows, 8)
        for place in range(rows):
            request = Request([1], 10**6, frozenset(), temperature, top_p, random.Random(f"draw/{place}"))
            self.sampler.places[place] = request
        self.logits = torch.tensor([logits]).repeat(rows, 1)

    def counts(self, times: int) -> list[int]:
        rows = range(len(self.logits))
        drawn = torch.cat([self.sampler.choose(self.logits, rows) for _ in range(times)])
        return torch.bincount(drawn, minlength=self.logits.shape[1]).tolist()


def misfit(counts: list[int], expected: list[float]) -> float:
    """Pearson's chi-square over the tokens that can occur; infinite where an impossible one did."""
    total = sum(counts)
    if any(count and not share for count, share in zip(counts, expected, strict=True)):
        return float("inf")
    return sum((count - total * share) ** 2 / (total * share) for count, share in zip(counts, expected, strict=True) if share)


LOGITS = [0.0, 2.0, -1.0, 1.5, 0.5, -30.0]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.8), (1.4, 0.9)])
def test_draws_follow_the_target_s_distribution(temperature, top_p):
    """60,000 draws against probabilities computed by hand; chi-square of at most 5 degrees of freedom passes 40 once in five million."""
    weights = [2.718281828459045 ** (logit / temperature) for logit in LOGITS]
    shares = [weight / sum(weights) for weight in weights]
    kept, mass = set(), 0.0
    for index in sorted(range(len(shares)), key=lambda i: -shares[i]):
        if mass < top_p:
            kept.add(index)
        mass += shares[index]
    total = sum(shares[index] for index in kept)
    expected = [shares[index] / total if index in kept else 0.0 for index in range(len(shares))]
    counts = FixedScores(LOGITS, temperature, top_p, rows=600).counts(100)
    assert misfit(counts, expected) < 40
    # The test sees a temperature that is off by a tenth.
    wrong = FixedScores(LOGITS, temperature * 1.1, top_p, rows=600).counts(100)
    assert misfit(wrong, expected) > 40


def test_a_number_next_to_an_edge_never_draws_what_has_no_probability():
    """At numbers 0 and just below 1 the first and last token with probability come out, though others stand before and behind."""
    fixed = FixedScores([-float("inf"), 0.0, -float("inf"), 0.0, -float("inf")], 1.0, 1.0, rows=2)

    class Edge(random.Random):
        def __init__(self, value: float) -> None:
            super().__init__(0)
            self.value = value

        def random(self) -> float:
            return self.value

    for place, value in enumerate((0.0, 1 - 2**-53)):
        request = fixed.sampler.places[place]
        assert request is not None
        request.random = Edge(value)
    assert fixed.sampler.choose(fixed.logits, range(2)).tolist() == [1, 3]


def test_a_target_that_computes_nan_is_not_drawn_from():
    """NaN in a distribution is an error, as in plain generate, and never a token."""
    fixed = FixedScores([0.0, float("nan")], 1.0, 1.0, rows=1)
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        fixed.counts(1)


# -- which prompts -------------------------------------------------------------------------------------------------


def test_every_prompt_is_answered_once_or_counted(tmp_path):
    """Duplicates up to case and space, excluded prompts and prompts too long are left out and counted; the rest has a row each."""
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
    with pytest.raises(DataError, match="already holds 1 prompts that --exclude lists"):
        make(tmp_path / "d", prompts, run={"excluded": frozenset({prompts[0].key})})


def test_a_conversation_is_found_by_any_of_its_turns(tmp_path):
    """A folder that answered a conversation is refused when one of its turns is excluded later."""
    first = some_prompts(1)[0]
    talk = Prompt("chat", (("user", first.turns[0]), ("user", "w40 w41")))
    make(tmp_path / "d", [talk])
    with pytest.raises(DataError, match="already holds 1 prompts that --exclude lists"):
        make(tmp_path / "d", [talk], run={"excluded": frozenset({prompt_key(["w40 w41"])})})


def test_an_answer_of_nothing_but_its_end_is_no_row(tmp_path):
    """A target that ends at once leaves no row: the prompt is skipped, counted, and not asked again."""
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


def test_lengths_that_do_not_fit_the_target_are_refused(tmp_path):
    """512 positions cannot hold a prompt of 500 and 16 new tokens."""
    with pytest.raises(DataError, match="make 516; allowed: up to the target's 512"):
        make(tmp_path / "d", some_prompts(1), max_prompt_tokens=500)


# -- self-prompting ------------------------------------------------------------------------------------------------

SELF: dict[str, Any] = {
    "self_prompts": 60,
    "self_tokens": 60,
    "self_temperature": 1.0,
    "openings": (Opening("begun", "w7 "), Opening("asked", system="w9"), Opening("same", "w8 w8 ")),
}


def test_self_prompts_are_answered_and_the_rest_is_counted(tmp_path):
    """Sixty numbers give a row or a reason each, whatever the batch; rows start as their opening asks, but for its system prompt."""
    rows, _ = make(tmp_path / "a", [], batch_size=3, **SELF)
    again, _ = make(tmp_path / "b", [], batch_size=11, **SELF)
    assert again == rows
    skips = [json.loads(line) for line in (tmp_path / "a" / "skipped.jsonl").read_text().splitlines()]
    assert len(rows) + len(skips) == 60
    assert {skip["id"] for skip in skips}.isdisjoint(rows)
    assert {row["source"] for row in rows.values()} == {"begun", "asked", "same"}
    for row in rows.values():
        begins = {"begun": [7], "same": [8, 8], "asked": []}[row["source"]]
        assert row["ids"][: 2 + len(begins)] == [BOS, 90, *begins]


def test_of_equal_self_prompts_the_first_number_is_kept_whatever_finishes_first(tmp_path):
    """At a temperature near zero an opening gives the same prompt every time: one row, of the lowest number, and counted duplicates."""
    sure = {**SELF, "self_temperature": 1e-5, "self_prompts": 24, "self_tokens": 200}
    for batch_size in (1, 24):
        rows, _ = make(tmp_path / str(batch_size), [], batch_size=batch_size, **sure)
        skips = [json.loads(line) for line in (tmp_path / str(batch_size) / "skipped.jsonl").read_text().splitlines()]
        reasons = {skip["id"]: skip["reason"] for skip in skips}
        by_source: dict[str, list[int]] = {}
        for id in [*rows, *(id for id, reason in reasons.items() if reason == "self-prompt duplicate")]:
            by_source.setdefault(rows[id]["source"] if id in rows else "duplicate", []).append(int(id.rsplit("-", 1)[1]))
        assert by_source.pop("duplicate", [])
        assert all(len(numbers) == 1 for numbers in by_source.values())
    assert records(tmp_path / "1") == records(tmp_path / "24")


# -- going on ------------------------------------------------------------------------------------------------------


def test_a_stop_by_the_clock_is_gone_on_with(tmp_path):
    """Stopped at once, again and again, the run ends with the rows of an uninterrupted one."""
    prompts = some_prompts(10) + some_prompts(3, turns=2, seed=1)
    how: dict[str, Any] = {"temperatures": (0.0, 1.0), **SELF}
    whole, _ = make(tmp_path / "whole", prompts, **how)
    done, runs = False, 0
    while not done:
        before = len(records(tmp_path / "parts")) if runs else 0
        minutes = 0.004 if runs < 4 else None
        make(tmp_path / "parts", prompts, run={"minutes": minutes}, **how)
        done = minutes is None
        assert len(records(tmp_path / "parts")) >= before
        runs += 1
    assert records(tmp_path / "parts") == whole


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "hf_dspark", "data", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Options of the command for a run of some seconds on a tiny target, but for --output."""
    folder = tmp_path_factory.mktemp("tiny")
    target = save_chat_target(folder / "target")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"turns": list(p.turns)}) + "\n" for p in some_prompts(60) + some_prompts(20, turns=2, seed=1)))
    openings = folder / "openings.jsonl"
    openings.write_text('{"source": "begun", "begin": "w7 "}\n')
    return [
        *("--target", target, "--prompts", prompts, "--self-prompt", 60, "--self-tokens", 60, "--begin", openings, "--system", "w9"),
        *("--temperature", 0, "--temperature", 1, "--max-new-tokens", 60, "--max-prompt-tokens", 300, "--batch-size", 6, "--seed", 3),
    ]


@pytest.fixture(scope="module")
def whole(options: list[object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The rows of the uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "data"
    subprocess.run(command(*options, "--output", output), check=True, capture_output=True, timeout=300, env=environment())
    return records(output)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_rows_of_the_uninterrupted_one(options, whole, tmp_path):
    """SIGKILL as soon as there are new rows, three times; then the same command finishes: nothing lost, nothing doubled, in any field."""
    output = tmp_path / "data"
    shard = output / "responses-00000.jsonl"
    for _ in range(3):
        size = shard.stat().st_size if shard.exists() else 0
        with subprocess.Popen(command(*options, "--output", output), stderr=subprocess.DEVNULL, env=environment()) as process:
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline and (not shard.exists() or shard.stat().st_size < size + 2000):
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        with shard.open("ab") as file:  # What a kill inside a write would leave.
            file.write(b'{"id": "half')
    survived = len(shard.read_bytes().split(b"\n")) - 1
    done = subprocess.run(
        command(*options, "--output", output, "--json"), capture_output=True, text=True, timeout=300, env=environment(), check=True
    )
    result = json.loads(done.stdout.strip().rsplit("\n", 1)[-1])
    assert result["complete"]
    assert 0 < survived < len(whole)
    assert records(output) == whole
    assert result["rows"] == len(whole)
    assert Counter(row["temperature"] for row in whole.values()).keys() == {0.0, 1.0}


@pytest.mark.slow
def test_a_full_disk_ends_the_command_with_one_line_and_it_goes_on_later(options, whole, tmp_path):
    """Where files may not grow, the exit code is 2, stderr has one error line; with room the rows are those of a whole run."""
    output = tmp_path / "data"
    words = ["hf-dspark", *map(str, command(*options, "--output", output)[3:])]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    limited = f"{limit}; import runpy, sys; sys.argv = {words!r}; runpy.run_module('hf_dspark', run_name='__main__')"
    full = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, timeout=300, env=environment(), check=False)
    assert full.returncode == 2
    errors = [line for line in full.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "the disk is full" in errors[0]
    assert "Traceback" not in full.stderr
    assert 0 < len(records(output)) < len(whole)
    subprocess.run(command(*options, "--output", output), check=True, capture_output=True, timeout=300, env=environment())
    assert records(output) == whole


@pytest.mark.slow
def test_the_trainer_s_door_takes_the_folder(options, whole, tmp_path):
    """A folder of the command, as Parquet, loads for its target with every row on one side; for another target it is refused."""
    pytest.importorskip("pyarrow")
    output = tmp_path / "data"
    subprocess.run(
        command(*options, "--output", output, "--format", "parquet", "--held-out", "0.3"),
        check=True, capture_output=True, timeout=300, env=environment(),
    )  # fmt: skip
    assert [path.suffix for path in output.glob("responses-*")] == [".parquet"]
    model, _ = chat_target()
    data = load_data(output, model)
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
        (["--self-prompt", "1", "--format", "csv"], "unknown format 'csv'"),
        (["--prompts", "x.jsonl"], "no prompt file 'x.jsonl'"),
        (["--self-prompt", "1", "--self-temperature", "0"], "self_temperature is 0"),
    ],
)
def test_wrong_options_are_one_line_before_anything_is_loaded(tmp_path, capsys, arguments, message):
    """Exit code 2 and one line; no folder is made."""
    from hf_dspark.cli import run

    assert run(["data", "--output", str(tmp_path / "d"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "d").exists()
