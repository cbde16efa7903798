"""Prompts out of files, openings for self-prompting, chat templates, and rows turn by turn."""

from __future__ import annotations

import hashlib
import random
import sys
from pathlib import Path

import pytest

from hf_dspark.errors import DataError
from hf_dspark.training.configuration import DataSettings, Opening
from hf_dspark.training.data import prompt_hash
from hf_dspark.training.dialogues import ChatTemplate, Dialogue, SelfPrompts
from hf_dspark.training.prompts import Prompt, prompt_key, read_openings, read_prompts
from hf_dspark.training.row_sampler import Request
from hf_dspark.training.rows import row_from_record
from tests.chat import FORGETFUL, TEMPLATE, chat_target
from tests.tiny import BOS, EOS
from tests.training.tiny_runs import write


def request(tokens: list[int], ended: bool) -> Request:
    return Request([], 9, frozenset({EOS}), 0.0, 1.0, random.Random(0), tokens=tokens, ended=ended)


def test_every_shape_of_a_row_is_read(tmp_path):
    """Turns, a prompt, messages without answers but with the system prompt, and raw text; the source is the file's name or given."""
    path = write(
        tmp_path / "mixed.jsonl",
        {"turns": ["one", "two"]},
        {"prompt": "one", "source": "own"},
        {"messages": [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "u"), ("assistant", "gone"), ("user", "v"))]},
        {"text": "Once"},
    )
    turns, prompt, messages, text = read_prompts(str(path))
    assert turns.messages == (("user", "one"), ("user", "two"))
    assert (turns.source, prompt.source, prompt.turns) == ("mixed", "own", ("one",))
    assert messages.messages == (("system", "s"), ("user", "u"), ("user", "v"))
    assert [[m["content"] for m in segment] for segment in messages.segments] == [["s", "u"], ["v"]]
    assert (text.text, text.turns) == ("Once", ("Once",))
    assert len(read_prompts(str(path), limit=2)) == 2


def test_parquet_prompts_are_the_jsonl_ones(tmp_path):
    """Columns that a row lacks do not matter."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"turns": ["one", "two"]}, {"messages": [{"role": "user", "content": "u"}]}, {"text": "Once"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(
        [
            ("turns", pyarrow.list_(pyarrow.string())),
            ("messages", pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))),
            ("text", pyarrow.string()),
        ]
    )), tmp_path / "p.parquet")  # fmt: skip
    assert read_prompts(str(tmp_path / "p.parquet")) == read_prompts(str(write(tmp_path / "p.jsonl", *rows)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"turns": []}, "line 2: turns is"),
        ({"turns": ["a", " "]}, "line 2, message 2 is"),
        ({"messages": "hello"}, "line 2: messages is"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "line 2: messages holds no turn of the user"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 'line 2, message 1: role is "tool"'),
        ({"text": 7}, "line 2 is 7"),
        ({"question": "a"}, "line 2: .*question"),
        ({"prompt": "a", "source": 3}, "line 2: source is 3"),
        ("[1]", r"line 2: \[1\]"),
        ("{", "line 2: not JSON"),
    ],
)
def test_malformed_prompts_are_named_by_file_and_line(tmp_path, bad, message):
    """The error says where, what, and what is allowed."""
    path = write(tmp_path / "bad.jsonl", {"prompt": "fine"}, bad)
    with pytest.raises(DataError, match=message) as error:
        read_prompts(str(path))
    assert "bad.jsonl" in str(error.value)
    assert "allowed" in str(error.value)


def test_what_is_not_there_is_refused(tmp_path, monkeypatch):
    """A missing file, an empty one, and a Hub data set without the package that reads it."""
    with pytest.raises(DataError, match=r"no prompt file 'nowhere\.jsonl'"):
        read_prompts("nowhere.jsonl")
    with pytest.raises(DataError, match="holds no rows"):
        read_prompts(str(write(tmp_path / "a.jsonl")))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install datasets"):
        read_prompts("owner/name:train")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"pip install pyarrow"):
        read_prompts(str(tmp_path / "a.parquet"))


def test_prompts_are_equal_up_to_case_and_white_space():
    """The key ignores them; the id, which seeds a row, does not, and is the same in every run and version."""
    one, other = (Prompt("a", (("user", text),)) for text in ("What is  2+2?", "what IS 2+2?\n"))
    assert one.key == other.key == prompt_key(["What is 2+2?"])
    assert one.id != other.id
    assert Prompt("elsewhere", (("user", "What is  2+2?"),)).id == one.id
    assert one.id == hashlib.sha256(b'[null, [["user", "What is  2+2?"]]]').hexdigest()[:20]
    assert prompt_key(["a", "b"]) != prompt_key(["a b"])


def test_openings_are_read_with_their_weights(tmp_path):
    """A row needs first words or a system prompt; the rest has defaults; what is malformed is named by line."""
    path = write(tmp_path / "code.jsonl", {"begin": "Write"}, {"system": "You teach.", "source": "math", "weight": 3})
    assert read_openings(path) == [Opening("code", "Write"), Opening("math", "", "You teach.", 3.0)]
    for bad in ({"source": "x"}, {"begin": 3}, {"begin": "a", "weight": 0}, {"begin": "a", "wait": 1}, [1]):
        with pytest.raises(DataError, match="line 1"):
            read_openings(write(tmp_path / "bad.jsonl", bad))
    ours = read_openings(Path(__file__).parents[2] / "examples" / "beginnings.jsonl")
    assert {opening.source for opening in ours} == {"self-code", "self-chat", "self-math"}


def test_a_template_that_is_missing_or_refuses_is_a_data_error():
    """Without one only raw text is taken; one that raises is named with the roles that it refuses."""
    _, tokenizer = chat_target(template=None)
    template = ChatTemplate(tokenizer)
    assert template.encode_raw("w5 w6") == [5, 6]
    with pytest.raises(DataError, match=r"'tiny-chat' has no chat template.*raw text"):
        template.render([{"role": "user", "content": "w5"}])
    _, tokenizer = chat_target(template="{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE)
    with pytest.raises(DataError, match=r"'tiny-chat' refuses the roles \['system', 'user'\]: no system"):
        ChatTemplate(tokenizer).render([{"role": "system", "content": "w1"}, {"role": "user", "content": "w5"}])


def test_a_template_that_does_not_open_the_answer_is_refused():
    """One that ignores add_generation_prompt is refused by name, unless the user's turn ends where the answer begins."""
    _, tokenizer = chat_target(template=TEMPLATE.replace("{% if add_generation_prompt %}<bos> w91 {% endif %}", ""))
    with pytest.raises(DataError, match=r"tokenizer 'tiny-chat' has no generation prompt"):
        ChatTemplate(tokenizer).check()
    mistral = (
        "{% for m in messages %}{% if m.role == 'user' %}w90 {{ m.content }} w91{% else %} {{ m.content }} <eos>{% endif %}{% endfor %}"
    )
    for good in (TEMPLATE, FORGETFUL, mistral):
        ChatTemplate(chat_target(template=good)[1]).check()


def test_thinking_is_switched_off_where_the_template_reads_it():
    """The template is given enable_thinking, False by default."""
    _, tokenizer = chat_target(template=TEMPLATE + "{% if enable_thinking %}w95{% else %}w96{% endif %}")
    question = [{"role": "user", "content": "w5"}]
    assert ChatTemplate(tokenizer).render(question).endswith("w96")
    assert ChatTemplate(tokenizer, thinking=True).render(question).endswith("w95")


def test_later_turns_follow_the_target_s_own_tokens():
    """The row is the template's text with the answers' own tokens in it; an answer that ended is not ended twice, a cut one is ended."""
    template = ChatTemplate(chat_target()[1])
    dialogue = Dialogue(Prompt("chat", (("system", "w10"), ("user", "w11"), ("user", "w12"), ("user", "w13"))), template, 0.0)
    assert dialogue.open() == [BOS, 92, 10, EOS, BOS, 90, 11, EOS, BOS, 91]
    assert dialogue.take(request([20, EOS], True)) == [*dialogue.ids[:10], 20, EOS, BOS, 90, 12, EOS, BOS, 91]
    assert dialogue.take(request([21, 22], False))[-9:] == [21, 22, EOS, BOS, 90, 13, EOS, BOS, 91]
    assert dialogue.take(request([23, EOS], True)) is None
    (record,) = dialogue.close()
    assert [record["ids"][b:e] for b, e in record["spans"]] == [[20, EOS], [21, 22], [23, EOS]]
    assert (record["ended"], len(record["ids"])) == (True, record["spans"][-1][1])


def test_a_template_that_rewrites_past_answers_gives_each_turn_a_row():
    """Where the text before an answer changes with the next turn, the next turn's prompt is the template's text of the whole; it is split
    by the prompt that its conversation began with."""
    template = ChatTemplate(chat_target(template=FORGETFUL)[1])
    dialogue = Dialogue(Prompt("chat", (("user", "w11"), ("user", "w12"))), template, 0.0)
    assert dialogue.open() == [BOS, 90, 11, EOS, BOS, 91, 93]
    second = dialogue.take(request([20, EOS], True))
    assert second == [BOS, 90, 11, EOS, BOS, 91, 20, EOS, BOS, 90, 12, EOS, BOS, 91, 93]
    assert dialogue.take(request([21, EOS], True)) is None
    first, last = dialogue.close()
    assert (first["ids"], first["spans"]) == ([BOS, 90, 11, EOS, BOS, 91, 93, 20, EOS], [[7, 9]])
    assert (last["ids"], last["spans"]) == ([*second, 21, EOS], [[15, 17]])
    assert last["id"] == first["id"] + ".1"
    one, other = (row_from_record(record, vocab_size=None, where="here") for record in (first, last))
    assert one.prompt_ids != other.prompt_ids
    assert prompt_hash(one) == prompt_hash(other)


def test_a_self_prompt_begins_at_the_start_of_the_users_turn():
    """The request is the template's text before the user's words, then the opening's; system prompts come first; its end is the turn's."""
    template = ChatTemplate(chat_target()[1])
    for opening, ids in ((Opening(begin="w7 w8"), [BOS, 90, 7, 8]), (Opening(system="w9"), [BOS, 92, 9, EOS, BOS, 90])):
        settings = DataSettings(self_prompts=1, openings=(opening,))
        made = SelfPrompts(template, settings, frozenset({EOS})).request(0)
        assert (made.prompt, made.stop, made.temperature) == (ids, frozenset({EOS}), 0.8)


def test_useless_self_prompts_are_rejected_with_a_reason():
    """Cut off at the cap, too short, or with special tokens in it; a good one has its opening in front."""
    selves = SelfPrompts(ChatTemplate(chat_target()[1]), DataSettings(openings=(Opening("code", "w7 "),)), frozenset({EOS}))
    assert selves.read(0, request([20, 21, 22, 23], False)) == (None, "self-prompt cut off")
    assert selves.read(0, request([20, EOS], True)) == (None, "self-prompt too short")
    assert selves.read(0, request([20, BOS, 21, 22, EOS], True)) == (None, "self-prompt with special tokens")
    prompt, _ = selves.read(0, request([20, 21, 22, EOS], True))
    assert prompt is not None
    assert (prompt.source, prompt.turns) == ("code", ("w7 w20 w21 w22",))


def test_openings_are_drawn_by_weight_and_number():
    """The same number draws the same opening; over 4,000 numbers 3:1 comes out as 3:1 (off by 5 deviations once in two million)."""
    openings = (Opening("a", weight=3.0), Opening("b", weight=1.0))
    selves = SelfPrompts(ChatTemplate(chat_target()[1]), DataSettings(openings=openings), frozenset({EOS}))
    drawn = [selves.opening(number).source for number in range(4000)]
    assert drawn == [selves.opening(number).source for number in range(4000)]
    assert abs(drawn.count("a") - 3000) < 5 * (4000 * 0.75 * 0.25) ** 0.5


def test_ids_of_self_prompts_stay_what_they_were():
    """An id is a digest of seed, temperature, cap and openings with the number: folders made before can be continued."""
    template = ChatTemplate(chat_target()[1])
    recipe = b'[1, 0.8, 96, [{"source": "self", "begin": "", "system": null, "weight": 1.0}]]'
    expected = f"self-{hashlib.sha256(recipe).hexdigest()[:8]}-7"
    assert SelfPrompts(template, DataSettings(seed=1), frozenset({EOS})).id(7) == expected
    assert SelfPrompts(template, DataSettings(seed=2), frozenset({EOS})).id(7) != expected
