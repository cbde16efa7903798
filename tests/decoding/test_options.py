"""Options of `generate` with a drafter: ends of text, streams, records, seeds, caches over turns, and the ways targets
come wrapped."""

from __future__ import annotations

import copy
import logging
import threading
import time

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import hf_dspark
from hf_dspark import GenerateDSparkOutput
from hf_dspark.budgets.budget import Budget, Drafts
from hf_dspark.utils.logging import warn_once
from tests.helpers import (
    NEVER,
    counts,
    left_padded,
    make_world,
    plain,
    plain_tokens,
    speculate,
    talking_target,
    world,
)
from tests.tiny import VOCAB
from tests.words import word_tokenizer

RECORDS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


def explicit(target, drafter, inputs, **options):
    """The explicit door, with the helpers' defaults."""
    return hf_dspark.generate(target, drafter, **inputs, **{"max_new_tokens": 24, "do_sample": False, "eos_token_id": NEVER, **options})


# --------------------------------------------------------------------------------------------------------- ends of text


def _letters() -> PreTrainedTokenizerFast:
    """Ids are letters and pairs of letters, so that a string may lie across tokens."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    pairs = [first + second for first in "xyz" for second in letters]
    words = ["<pad>", "<bos>", "<eos>", "<mask>", *letters, *pairs][:VOCAB]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("place", [0, 1, 4, 7, 12, 18])
def test_stop_strings_inside_a_block(place):
    """The text ends with the token that completes the string, be it across tokens, as in a plain call; for one row and
    for three."""
    w = world()
    tokenizer = _letters()
    tokens = plain_tokens("llama", 3)[1, -24:].tolist()
    stop = tokenizer.decode(tokens[max(place - 2, 0) : place + 1])[-3:]
    options = {"stop_strings": [stop, "nothing like it"], "tokenizer": tokenizer}
    alone = left_padded([w.prompts[1]])
    out = speculate(w.target, w.drafter, alone, **options)
    assert torch.equal(out, plain(w.target, alone, **options))
    assert out.shape[1] <= alone["input_ids"].shape[1] + place + 1
    assert torch.equal(speculate(w.target, w.drafter, w.inputs(3), **options), plain(w.target, w.inputs(3), **options))


class RowWantsToken(StoppingCriteria):
    """Row r of the batch ends once it has generated a token whose id is a multiple of r + 3, three tokens in or
    later."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        divisors = torch.arange(len(input_ids)) + 3
        return (input_ids[:, -1] % divisors == 0) & (input_ids.shape[1] >= self.prompt + 3)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_criterion_of_the_callers_own_is_asked_row_by_row_and_token_by_token(rows):
    """Criteria that depend on the row's place in the batch end each row inside its block, where a plain call ends
    it."""
    w = world()
    inputs = w.inputs(rows)
    options = {"stopping_criteria": StoppingCriteriaList([RowWantsToken(inputs["input_ids"].shape[1])])}
    # An end id that no text reaches: with one, a plain call pads the rows that have ended.
    expected = plain(w.target, inputs, **options)
    assert torch.equal(speculate(w.target, w.drafter, inputs, **options), expected)
    assert expected.shape[1] < inputs["input_ids"].shape[1] + 24 or bool((expected[:, -1] == 0).any())


class Unsure(StoppingCriteria):
    """Ends a row whose last score was below a bar."""

    def __init__(self, bar: float) -> None:
        self.bar = bar

    def __call__(self, input_ids: torch.Tensor, scores: tuple[torch.Tensor, ...], **kwargs: object) -> torch.Tensor:
        assert scores[-1].shape == (len(input_ids), VOCAB)
        return scores[-1].softmax(-1).amax(-1) < self.bar


@pytest.mark.parametrize("rows", [1, 3])
def test_a_criterion_that_reads_scores(rows):
    """It finds the scores of every token so far, the present one last, as in a plain call."""
    w = world()
    tops = torch.stack(plain(w.target, w.inputs(rows), **RECORDS).scores).softmax(-1).amax(-1)
    options = {**RECORDS, "stopping_criteria": StoppingCriteriaList([Unsure(float(tops[4:20].min()) * 1.01)])}
    expected = plain(w.target, w.inputs(rows), **options).sequences
    assert torch.equal(speculate(w.target, w.drafter, w.inputs(rows), **options).sequences, expected)
    assert expected.shape[1] < w.inputs(rows)["input_ids"].shape[1] + 24 or rows > 1


def test_max_time_ends_the_call():
    """With no time at all each row still gets the token of its prompt's pass, as in a plain call; with enough, all of
    them."""
    w = world()
    width = w.inputs(3)["input_ids"].shape[1]
    assert speculate(w.target, w.drafter, w.inputs(3), max_time=1e-9).shape[1] == width + 1
    assert speculate(w.target, w.drafter, w.inputs(3), max_time=600.0).shape[1] == width + 24


# -------------------------------------------------------------------------------------------------------------- streams


class Collecting(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value)

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_one_dimensional_tokens_of_each_round():
    """After the prompt, every piece is a 1-D tensor on the host; together they are the text, and the stream is ended
    once."""
    w = world()
    streamer = Collecting()
    out = speculate(w.target, w.drafter, w.inputs(1), streamer=streamer, return_dict_in_generate=True)
    prompt, *pieces = streamer.pieces
    assert prompt.shape == w.inputs(1)["input_ids"].shape
    assert all(piece.dim() == 1 and piece.device.type == "cpu" for piece in pieces)
    assert torch.equal(torch.cat([prompt[0], *pieces]), out.sequences[0])
    assert len(pieces) == 1 + out.stats.rounds
    assert streamer.ended == 1


def test_text_iterator_streamer_gives_the_same_text():
    """A consumer in another thread reads the text of the plain call."""
    w = world()
    tokenizer = word_tokenizer(w.target.config)

    def text(**options) -> str:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(target=plain, args=(w.target, w.inputs(1)), kwargs={"streamer": streamer, **options})
        thread.start()
        pieces = list(streamer)
        thread.join()
        return "".join(pieces)

    assert text(assistant_model=w.drafter) == text() != ""


def test_a_streamer_for_several_rows_is_refused():
    """As in a plain call, whether the streamer says so itself or not."""
    w = world()
    with pytest.raises(ValueError, match="batch size 1"):
        speculate(w.target, w.drafter, w.inputs(2), streamer=TextStreamer(word_tokenizer(w.target.config)))
    with pytest.raises(hf_dspark.UnsupportedOptionError, match="a streamer with a batch of 2"):
        speculate(w.target, w.drafter, w.inputs(2), streamer=Collecting())


# -------------------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}])
def test_scores_and_logits_equal_the_plain_calls(rows, options):
    """One `(B, V)` tensor a generated token, processed and raw, within 1e-4."""
    w = world()
    expected = plain(w.target, w.inputs(rows), **RECORDS, **options)
    out = speculate(w.target, w.drafter, w.inputs(rows), **RECORDS, **options)
    for name in ("scores", "logits"):
        mine, theirs = getattr(out, name), getattr(expected, name)
        assert len(mine) == len(theirs) == 24
        assert all(a.dtype == torch.float32 for a in mine)
        torch.testing.assert_close(torch.stack(mine), torch.stack(theirs), atol=1e-4, rtol=0)


def test_scores_of_rows_that_end_early():
    """Up to each row's own end they are the plain call's."""
    w = world()
    tokens = plain_tokens("llama", 3)
    eos = [int(tokens[0, -24 + 5]), int(tokens[1, -24 + 11]), int(tokens[2, -24 + 2])]
    expected = plain(w.target, w.inputs(3), eos_token_id=eos, **RECORDS)
    out = speculate(w.target, w.drafter, w.inputs(3), eos_token_id=eos, **RECORDS)
    assert len(out.scores) == len(out.logits) == len(expected.scores)
    for row, stats in enumerate(out.stats.rows):
        for name in ("scores", "logits"):
            mine = torch.stack(getattr(out, name))[: stats.generated, row]
            torch.testing.assert_close(mine, torch.stack(getattr(expected, name))[: stats.generated, row], atol=1e-4, rtol=0)


def test_records_are_kept_only_on_request():
    """Scores and logits cost memory; a plain tensor comes back unless a dict is asked for."""
    w = world()
    assert isinstance(speculate(w.target, w.drafter, w.inputs(1)), torch.Tensor)
    out = speculate(w.target, w.drafter, w.inputs(1), return_dict_in_generate=True)
    assert isinstance(out, GenerateDSparkOutput)
    assert out.scores is None
    assert out.logits is None


@pytest.mark.parametrize("budget", ["full", "static:0", "static:3", "threshold:0.5"])
def test_statistics_add_up(budget):
    """Where no row is cut: generated = accepted + rounds + 1; tau counts the bonus token; positions fall off
    monotonically."""
    w = world()
    out = explicit(w.target, w.drafter, w.inputs(3), return_dict_in_generate=True, budget=budget)
    for row in out.stats.rows:
        assert row.generated == 24 == row.accepted + row.rounds + 1
        assert row.tau == pytest.approx(row.accepted / row.rounds + 1)
        assert row.accepted <= row.verified <= row.drafted
        assert sum(row.accepted_at) == row.accepted
        assert sum(row.verified_at) == row.verified
        assert row.accepted_at == sorted(row.accepted_at, reverse=True)
        assert row.verified_at == sorted(row.verified_at, reverse=True)
        assert len(row.accepted_at) == w.drafter.config.block_size
    stats = out.stats
    assert stats.tau == pytest.approx(sum(r.accepted for r in stats.rows) / sum(r.rounds for r in stats.rows) + 1)
    assert stats.rounds == max(r.rounds for r in stats.rows)


def test_times_are_measured():
    """Prompt, draft and verify take time, and all together no more than the call."""
    w = world()
    began = time.perf_counter()
    stats = speculate(w.target, w.drafter, w.inputs(3), return_dict_in_generate=True).stats
    wall = time.perf_counter() - began
    assert min(stats.t_prefill_s, stats.t_draft_s, stats.t_verify_s) > 0
    assert stats.t_prefill_s + stats.t_draft_s + stats.t_verify_s + stats.t_rest_s == pytest.approx(stats.t_total_s)
    assert stats.t_total_s < wall
    assert 0 < stats.overhead < 1


# ---------------------------------------------------------------------------------------------------- the explicit door


def test_both_doors_give_the_same_text():
    """`hf_dspark.generate` is the plain call with more options."""
    w = world()
    assert torch.equal(explicit(w.target, w.drafter, w.inputs(3)), plain_tokens("llama", 3))


def test_a_seed_fixes_the_output_and_leaves_the_global_state():
    """Same seed, same text; another seed, another text; torch's own generator is not touched."""
    w = world()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    texts = [explicit(w.target, w.drafter, w.inputs(3), do_sample=True, seed=seed) for seed in (7, 7, 8)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_a_generator_is_used_as_it_is():
    """A generator with the same seed gives the seed's text, and goes on from there."""
    w = world()
    generator = torch.Generator().manual_seed(7)
    first, second = (explicit(w.target, w.drafter, w.inputs(3), do_sample=True, generator=generator) for _ in range(2))
    assert torch.equal(first, explicit(w.target, w.drafter, w.inputs(3), do_sample=True, seed=7))
    assert not torch.equal(first, second)


def test_torch_manual_seed_fixes_the_plain_call():
    """Without a seed of its own a call draws from torch's generator."""
    w = world()
    texts = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        texts.append(speculate(w.target, w.drafter, w.inputs(3), do_sample=True, temperature=0.8, top_p=0.9))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_num_return_sequences():
    """Each prompt is continued several times, copies next to each other and different; the same without a mask."""
    w = world()
    inputs = w.inputs(2)
    out = explicit(w.target, w.drafter, inputs, do_sample=True, num_return_sequences=3, seed=1)
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"].repeat_interleave(3, dim=0))
    assert len({tuple(row.tolist()) for row in out}) == 6
    alone = hf_dspark.generate(
        w.target,
        w.drafter,
        inputs=left_padded(w.prompts[:1])["input_ids"],
        do_sample=True,
        num_return_sequences=2,
        max_new_tokens=3,
    )
    assert alone.shape == (2, len(w.prompts[0]) + 3)


def test_num_return_sequences_where_the_target_samples_by_default():
    """Whether a call samples follows the arguments, the given config, then the target's own; greedy copies are
    refused."""
    target = talking_target()
    drafter = world().drafter
    inputs = left_padded(world().prompts[:1])
    with pytest.raises(hf_dspark.UnsupportedOptionError, match="do_sample=True"):
        hf_dspark.generate(target, drafter, **inputs, num_return_sequences=2, max_new_tokens=3)
    with pytest.raises(hf_dspark.UnsupportedOptionError, match="do_sample=True"):
        explicit(target, drafter, inputs, num_return_sequences=2)
    config = GenerationConfig(do_sample=True, max_new_tokens=3, pad_token_id=0, eos_token_id=NEVER)
    assert len(hf_dspark.generate(target, drafter, **inputs, num_return_sequences=2, generation_config=config)) == 2
    target.generation_config.do_sample = True
    assert len(hf_dspark.generate(target, drafter, **inputs, num_return_sequences=2, max_new_tokens=3)) == 2


@pytest.mark.parametrize("verification", ["block", "token"])
def test_both_verifications_give_the_greedy_text(verification):
    """Where nothing is drawn there is one rule only; and sampling repeats by its seed under either."""
    w = world()
    assert torch.equal(explicit(w.target, w.drafter, w.inputs(3), verification=verification), plain_tokens("llama", 3))
    options = {"do_sample": True, "temperature": 1.5, "seed": 3, "verification": verification}
    one, again = (explicit(w.target, w.drafter, w.inputs(3), **options) for _ in range(2))
    assert torch.equal(one, again)


@pytest.mark.parametrize("block_size", [1, 2, 4, 5])
def test_a_shorter_block(block_size):
    """No more tokens than asked for are drafted a round, and the text is the same."""
    w = world()
    out = explicit(w.target, w.drafter, w.inputs(3), block_size=block_size, return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain_tokens("llama", 3))
    assert all(row.drafted == block_size * row.rounds for row in out.stats.rows)
    assert counts(out)[0] > 0


class EveryOther(Budget):
    """A budget of one's own: even rounds verify one token a row, odd rounds three."""

    def __init__(self) -> None:
        self.round = 0

    def plan(self, drafts: Drafts) -> list[int]:
        self.round += 1
        return [min(1 if self.round % 2 else 3, limit) for limit in drafts.limits]


def test_a_budget_object(monkeypatch):
    """`drafter.budget` takes any budget; an argument overrides it for one call."""
    w = world()
    monkeypatch.setattr(w.drafter, "budget", EveryOther())
    out = speculate(w.target, w.drafter, w.inputs(3), return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain_tokens("llama", 3))
    assert all(row.verified_at[3:] == [0, 0] and 0 < row.verified_at[1] < row.verified_at[0] for row in out.stats.rows)
    overridden = explicit(w.target, w.drafter, w.inputs(3), return_dict_in_generate=True, budget="static:1")
    assert all(row.verified_at[1:] == [0] * 4 for row in overridden.stats.rows)
    assert isinstance(w.drafter.budget, EveryOther)


# ---------------------------------------------------------------------------------------------------- caches over turns

TURNS = [[11, 12, 13, 14], [40, 41], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]]


def _conversation(target, drafter, cache_of, **options):
    """Three turns; yields each turn's input and output. `cache_of(previous output)` is handed to the next call."""
    text, out = [20, 21, 22, 23, 24], None
    for turn in TURNS:
        text = [*text, *turn]
        inputs = left_padded([text])
        extra = {} if (cache := cache_of(out)) is None else {"past_key_values": cache}
        if drafter is not None:
            extra["assistant_model"] = drafter
        out = plain(target, inputs, max_new_tokens=12, return_dict_in_generate=True, **extra, **options)
        text = out.sequences[0].tolist()
        yield inputs, out


def test_a_cache_that_was_filled_under_inference_mode_goes_on_outside():
    """Turn one under `torch.inference_mode()`, turn two not, and the other way round."""
    w = world()
    for modes in ((True, False), (False, True)):
        inputs, cache = w.inputs(1), None
        for mode in modes:
            with torch.inference_mode(mode):
                out = speculate(w.target, w.drafter, inputs, past_key_values=cache, return_dict_in_generate=True)
            assert torch.equal(out.sequences, plain(w.target, inputs))
            cache, inputs = out.past_key_values, left_padded([[*out.sequences[0].tolist(), 30, 31]])


def test_the_same_single_token_with_the_same_cache_again():
    """A prompt that the cache holds altogether is read again, however short."""
    w = world()
    cache, prompt = DynamicCache(config=w.target.config), left_padded([[7]])
    for _ in range(3):
        out = speculate(w.target, w.drafter, prompt, max_new_tokens=1, past_key_values=cache)
        assert torch.equal(out, plain(w.target, prompt, max_new_tokens=1))


def _tokens_read(target):
    """A list that gathers how many tokens each pass of the target reads, and its hook."""
    sizes: list[int] = []
    return sizes, target.register_forward_pre_hook(lambda m, a, k: sizes.append(k["input_ids"].shape[1]), with_kwargs=True)


@pytest.mark.parametrize("kind", ["returned", "own object"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_caches_are_reused_over_three_turns(family, kind, caplog):
    """Each turn gives the text of a plain call without a cache, reads its new tokens only, and needs no warning."""
    w = world(family)
    own = DynamicCache(config=w.target.config)
    speculate(w.target, w.drafter, w.inputs(1), max_new_tokens=2)  # the first call examines the model
    sizes, hook = _tokens_read(w.target)
    previous = 0
    with caplog.at_level(logging.WARNING, "hf_dspark"):
        for inputs, out in _conversation(w.target, w.drafter, lambda out: own if kind == "own object" else out and out.past_key_values):
            assert sizes[0] == inputs["input_ids"].shape[1] - previous
            hook.remove()
            assert torch.equal(out.sequences, plain(w.target, inputs, max_new_tokens=12))
            previous = out.sequences.shape[1] - 1
            assert out.past_key_values.get_seq_length() == previous
            assert kind == "returned" or out.past_key_values is own
            sizes, hook = _tokens_read(w.target)
    hook.remove()
    assert not [r for r in caplog.records if r.name.startswith("hf_dspark")]


def test_as_much_is_accepted_with_a_cache_as_without():
    """The drafter's context comes along with the cache."""
    w = world()
    with_cache = [out.stats.rows[0].accepted for _, out in _conversation(w.target, w.drafter, lambda out: out and out.past_key_values)]
    without = [out.stats.rows[0].accepted for _, out in _conversation(w.target, w.drafter, lambda out: None)]
    assert with_cache == without
    assert sum(without) > 0


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_the_returned_cache_serves_a_plain_call(family):
    """It holds the keys and values that a plain call would have left: all tokens but the last."""
    w = world(family)
    out = speculate(w.target, w.drafter, w.inputs(1), return_dict_in_generate=True)
    expected = plain(w.target, w.inputs(1), return_dict_in_generate=True)
    for mine, theirs in zip(out.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, atol=1e-4, rtol=1e-4)
    longer = left_padded([[*out.sequences[0].tolist(), 30, 31]])
    assert torch.equal(plain(w.target, longer, past_key_values=out.past_key_values), plain(w.target, longer))


def test_a_cropped_cache():
    """After cropping, another continuation of the shorter text is right, and the cropped tokens are not read."""
    w = world()
    out = speculate(w.target, w.drafter, w.inputs(1), return_dict_in_generate=True)
    kept = out.past_key_values.get_seq_length() - 9
    out.past_key_values.crop(-9)
    other = left_padded([[*out.sequences[0, :kept].tolist(), 50, 51, 52]])
    sizes, hook = _tokens_read(w.target)
    again = speculate(w.target, w.drafter, other, past_key_values=out.past_key_values)
    hook.remove()
    assert sizes[0] == 3
    assert torch.equal(again, plain(w.target, other))


def test_a_cropped_cache_does_not_bring_the_old_text_back():
    """A call after cropping overwrites what was cropped; growing the cache by a plain call to its old length must not
    revive it."""
    w = world()
    out = speculate(w.target, w.drafter, w.inputs(1), return_dict_in_generate=True)
    text = out.sequences[0].tolist()
    cache = out.past_key_values
    cache.crop(-12)
    other = left_padded([[*text[: cache.get_seq_length()], 50, 51, 52]])

    class Stop(Exception):
        pass

    def stop(ids, scores):
        if ids.shape[1] > other["input_ids"].shape[1] + 9:
            raise Stop
        return scores

    with pytest.raises(Stop):
        speculate(w.target, w.drafter, other, past_key_values=cache, logits_processor=[stop])
    grown = plain(w.target, left_padded([text[: cache.get_seq_length() + 1]]), past_key_values=cache, max_new_tokens=12)
    assert grown[0].tolist() == text
    longer = left_padded([[*text, 60, 61]])
    assert torch.equal(speculate(w.target, w.drafter, longer, past_key_values=cache), plain(w.target, longer))


def test_a_copied_cache_branches():
    """Two continuations from deep copies of one cache do not disturb each other."""
    w = world()
    out = speculate(w.target, w.drafter, w.inputs(1), return_dict_in_generate=True)
    copies = [copy.deepcopy(out.past_key_values) for _ in range(2)]
    for tail, cache in zip(([50, 51], [60, 61, 62]), copies, strict=True):
        longer = left_padded([[*out.sequences[0].tolist(), *tail]])
        assert torch.equal(speculate(w.target, w.drafter, longer, past_key_values=cache), plain(w.target, longer))


def test_a_cache_of_a_plain_call(caplog):
    """It lacks the drafter's context: that is said, once, the prompt is read again, and the text and the next turn are
    right."""
    w = world()
    first = plain(w.target, w.inputs(1), return_dict_in_generate=True)
    longer = left_padded([[*first.sequences[0].tolist(), 30, 31]])
    with caplog.at_level(logging.WARNING, "hf_dspark"):
        second = speculate(w.target, w.drafter, longer, past_key_values=first.past_key_values, return_dict_in_generate=True)
    assert torch.equal(second.sequences, plain(w.target, longer))
    assert ["read again" in r.getMessage() for r in caplog.records] == [True]
    third = left_padded([[*second.sequences[0].tolist(), 33]])
    sizes, hook = _tokens_read(w.target)
    assert torch.equal(speculate(w.target, w.drafter, third, past_key_values=second.past_key_values), plain(w.target, third))
    hook.remove()
    assert sizes[0] == 2


def test_a_cache_of_another_text_is_not_trusted(caplog):
    """A cache whose tokens differ from the prompt's is filled anew."""
    w = world()
    out = speculate(w.target, w.drafter, w.inputs(1), return_dict_in_generate=True)
    other = [(token + 1) % 90 + 4 for token in out.sequences[0].tolist()]
    with caplog.at_level(logging.WARNING, "hf_dspark"):
        again = speculate(w.target, w.drafter, left_padded([other]), past_key_values=out.past_key_values)
    assert torch.equal(again, plain(w.target, left_padded([other])))
    assert len(caplog.records) == 1


def test_another_drafter_or_budget_in_the_next_turn():
    """The text is right whoever drafts the next turn, or if nobody does."""
    w = world()
    other = make_world(w.target, "gated").drafter
    text, cache = w.prompts[0], DynamicCache(config=w.target.config)
    for drafter, budget in (
        (w.drafter, "full"),
        (other, "full"),
        (other, "static:0"),
        (other, "static:2"),
        (w.drafter, "full"),
    ):
        inputs = left_padded([[*text, 33, 34]])
        out = explicit(w.target, drafter, inputs, budget=budget, past_key_values=cache, max_new_tokens=8)
        assert torch.equal(out, plain(w.target, inputs, max_new_tokens=8))
        text = out[0].tolist()


@pytest.mark.parametrize("place", [0, 3, 9])
def test_a_turn_that_ended_with_eos(place):
    """The last token is not in the cache, and the next turn goes on behind it."""
    w = world()
    eos = int(plain_tokens("llama", 1)[0, -24 + place])
    out = speculate(w.target, w.drafter, w.inputs(1), eos_token_id=eos, return_dict_in_generate=True)
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
    longer = left_padded([[*out.sequences[0].tolist(), 30, 31]])
    assert torch.equal(speculate(w.target, w.drafter, longer, past_key_values=out.past_key_values), plain(w.target, longer))


# ------------------------------------------------------------------------------------------- targets and their wrappers


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_text_generation_pipeline(batch_size):
    """`pipeline(..., assistant_model=drafter)` gives the texts of the pipeline without it."""
    w = world()
    tokenizer = word_tokenizer(w.target.config)
    tokenizer.padding_side = "left"
    prompts = [tokenizer.decode(prompt) for prompt in w.prompts[:3]]
    options = {"max_new_tokens": 16, "do_sample": False, "batch_size": batch_size, "return_full_text": False}
    plain_pipe = pipeline("text-generation", model=w.target, tokenizer=tokenizer)
    pipe = pipeline("text-generation", model=w.target, tokenizer=tokenizer, assistant_model=w.drafter)
    rounds = []
    hook = w.target.register_forward_hook(lambda *_: rounds.append(1))
    found = pipe(prompts, **options)
    hook.remove()
    assert found == plain_pipe(prompts, **options)
    assert 0 < len(rounds) < 3 * 16 / batch_size + 3


def test_a_peft_wrapped_target():
    """An adapter on the target is part of the target: text with and without drafter is the adapted text."""
    w = world()
    peft_model = get_peft_model(talking_target(), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, r=4)).eval()
    expected = plain(peft_model, w.inputs(3))
    assert not torch.equal(expected, plain_tokens("llama", 3))
    assert torch.equal(speculate(peft_model, w.drafter, w.inputs(3)), expected)
    assert torch.equal(explicit(peft_model, w.drafter, w.inputs(3)), expected)
    with peft_model.disable_adapter():
        assert torch.equal(speculate(peft_model, w.drafter, w.inputs(3)), plain_tokens("llama", 3))


def test_a_bf16_drafter_for_an_fp32_target():
    """The text is the fp32 target's, exactly."""
    w = make_world(talking_target())
    out = speculate(w.target, w.drafter.to(torch.bfloat16), w.inputs(3), return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain_tokens("llama", 3))
    assert counts(out)[0] > 0
    assert w.target.dtype == torch.float32


def test_an_fp32_drafter_for_a_bf16_target():
    """Every token is the target's best, up to bf16 rounding: in a plain pass over the text no logit is higher by more
    than 1/32 of their spread."""
    w = make_world(talking_target())
    target = w.target.to(torch.bfloat16)
    out = speculate(target, w.drafter, w.inputs(3), return_dict_in_generate=True)
    assert counts(out)[0] > 0
    for row, prompt in enumerate(w.prompts[:3]):
        text = torch.tensor([prompt + out.sequences[row, -24:].tolist()])
        with torch.no_grad():
            logits = target(text).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, text[0, len(prompt) :, None])[:, 0]
        assert ((logits.amax(-1) - chosen) / logits.std(-1)).max() < 1 / 32


@pytest.mark.parametrize("native", [True, False])
def test_a_bf16_target_where_bf16_is_slow_is_told_once(monkeypatch, caplog, native):
    """Where the device does not compute in bf16, with what to do; nothing is said elsewhere."""
    monkeypatch.setattr("hf_dspark.decoding.checks.has_bf16", lambda device: native)
    warn_once.cache_clear()
    w = make_world(talking_target())
    for _ in range(2):
        speculate(w.target.to(torch.bfloat16), w.drafter, w.inputs(1))
    told = [record.message for record in caplog.records if "dtype='fast'" in record.message]
    assert len(told) == (0 if native else 1)


@pytest.mark.parametrize("how", ["dispatch_model", "cpu_offload"])
def test_targets_placed_by_accelerate(how):
    """What `device_map` does: modules with hooks that move weights and inputs; offloaded ones have no weights between
    passes."""
    w = world()
    target = talking_target()
    if how == "dispatch_model":
        dispatch_model(target, {"": "cpu"}, main_device="cpu", force_hooks=True)
    else:
        cpu_offload(target, execution_device=torch.device("cpu"))
    assert torch.equal(speculate(target, w.drafter, w.inputs(3)), plain(target, w.inputs(3)))
    assert torch.equal(
        speculate(target, w.drafter, w.inputs(1), repetition_penalty=1.3),
        plain(target, w.inputs(1), repetition_penalty=1.3),
    )


def test_a_saved_target_loaded_with_a_device_map(tmp_path):
    """`from_pretrained(.., device_map=..)` gives the same text as the target that was saved, for one row and for three."""
    w = world()
    w.target.save_pretrained(tmp_path)
    target = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map={"": "cpu"})
    for rows in (1, 3):
        out = speculate(target, w.drafter, w.inputs(rows), return_dict_in_generate=True)
        assert torch.equal(out.sequences, plain_tokens("llama", rows))
        assert torch.equal(out.sequences, plain(target, w.inputs(rows)))
        assert counts(out)[0] > 0
