"""Rounds as compiled graphs: the text is plain's, and nothing is compiled twice or launched beside the graphs.

Most run the traced graphs as they are (`backend="eager"`): what a compiler makes of them is its own matter, and tested once.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from examples.benchmarks.rounds import counted_rounds
from transformers import CompileConfig, DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache

import hf_dspark
from hf_dspark.budgets.admission import admit_top, survivals
from hf_dspark.budgets.budget import Drafts
from hf_dspark.budgets.cost_model import Costs, RowCosts
from hf_dspark.budgets.load_aware import LaggedLoadAwareBudget
from hf_dspark.decoding.kept_graphs import compiled_graphs
from hf_dspark.utils.graphs import Argument, Graphs
from hf_dspark.utils.logging import warn_once
from tests.helpers import BUDGETS, NEVER, World, make_world, plain, plain_tokens, speculate, talking_target, world
from tests.tiny import FAMILIES, VOCAB

TRACED = CompileConfig(backend="eager", fullgraph=True)
BUCKETS = CompileConfig(backend="eager", fullgraph=True, dynamic=False)
EXPERTS = ("mixtral", "qwen3_moe")


def compiled(w: World, rows: int, config: CompileConfig | None = TRACED, **options: Any) -> Any:
    """As transformers' users ask for it."""
    how = {"cache_implementation": "static", "compile_config": config, **options}
    return speculate(w.target, w.drafter, w.inputs(rows), **how)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many graphs have been made so far in this test."""
    graphs: set[Graphs] = set()
    run = Graphs.run

    def noted(self: Graphs, *args: Any) -> Any:
        graphs.add(self)
        return run(self, *args)

    monkeypatch.setattr(Graphs, "run", noted)
    return lambda: sum(one.made for one in graphs)


def late_end(texts: torch.Tensor) -> int:
    """A token that ends some of these rows, at different times, and not all."""
    first = {token: [(row == token).nonzero()[:1].flatten().tolist() for row in texts] for token in range(VOCAB)}
    ends = {token: [end[0] for end in found if end] for token, found in first.items() if sum(map(bool, found)) < len(texts)}
    return max(ends, key=lambda token: len(set(ends[token])))


# --------------------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("budget", [*BUDGETS, "load-aware", "load-aware-lag2"])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in EXPERTS])
def test_every_family_batch_and_budget_gives_the_plain_text(family: str, rows: int, budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged left-padded prompts, rows that end at one length: whole graphs, none of which is left to run eagerly."""
    w = world(family)
    monkeypatch.setattr(w.drafter, "budget", budget)
    out = compiled(w, rows, return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain_tokens(family, rows))
    assert out.past_key_values is None


@pytest.mark.parametrize("budget", ["full", "threshold:0.5", "load-aware"])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_graphs_of_fixed_sizes_give_the_plain_text(rows: int, budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are padded to their buckets' sizes, as graphs that are captured on a GPU need it."""
    w = world("mistral")
    monkeypatch.setattr(w.drafter, "budget", budget)
    assert torch.equal(compiled(w, rows, BUCKETS), plain_tokens("mistral", rows))


@pytest.mark.parametrize("head", ["gated", "rnn"])
@pytest.mark.parametrize("rows", [1, 4])
def test_other_heads_reduced_vocabularies_and_copies_give_the_plain_text(head: str, rows: int) -> None:
    """Every kind of head, tokens outside the draft vocabulary, masked tokens in the texts that are copied from."""
    fields = {"copy_weights": [0.4, 0.7, 0.9], "draft_token_ids": torch.arange(0, VOCAB, 2)}
    w = make_world(talking_target("qwen3"), head, **fields)
    assert torch.equal(compiled(w, rows), plain(w.target, w.inputs(rows)))


@pytest.mark.parametrize("rows", [1, 5])
def test_rows_that_end_at_different_times_leave_the_rest_as_it_is(rows: int) -> None:
    """End-of-text tokens inside blocks; the last row of a batch goes on in the graphs of the batch."""
    w = world()
    ends = plain_tokens("llama", rows)[:, -12:].flatten()[::7].tolist()
    expected = plain(w.target, w.inputs(rows), eos_token_id=ends, pad_token_id=0)
    assert torch.equal(compiled(w, rows, eos_token_id=ends, pad_token_id=0), expected)


def judged(out: Any) -> list[tuple[int, ...]]:
    return [(row.rounds, row.drafted, row.verified, row.accepted) for row in out.stats.rows]


@pytest.mark.parametrize(
    ("head", "config"),
    [("vanilla", TRACED), ("gated", TRACED), ("rnn", TRACED), ("gated", BUCKETS)],
    ids=["vanilla", "gated", "rnn", "buckets"],
)
@pytest.mark.parametrize("budget", ["static:3", "threshold:0.5"])
def test_drafts_and_confidences_are_those_of_eager_rounds(head: str, budget: str, config: CompileConfig) -> None:
    """The text would be plain's whatever is drafted; as many tokens of every row are verified and accepted, round for round."""
    fields = {"copy_weights": [0.4, 0.7, 0.9], "draft_token_ids": torch.arange(0, VOCAB, 2)}
    w = make_world(talking_target("qwen3"), head, **fields)
    how = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": NEVER, "budget": budget, "return_dict_in_generate": True}
    for rows in (1, 4):
        eager = hf_dspark.generate(w.target, w.drafter, **w.inputs(rows), **how)
        graphs = hf_dspark.generate(w.target, w.drafter, **w.inputs(rows), **how, compile=True, compile_config=config)
        assert judged(graphs) == judged(eager)
    assert 0 < sum(row.accepted for row in eager.stats.rows) < sum(row.verified for row in eager.stats.rows)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_inductor_gives_the_plain_text(rows: int) -> None:
    """What the default compiler makes of all three graphs, greedy, with copies; and draws that repeat by their seed."""
    w = make_world(talking_target(), copy_weights=[0.4, 0.7, 0.9])
    config = CompileConfig(fullgraph=True)
    assert torch.equal(compiled(w, rows, config), plain(w.target, w.inputs(rows)))
    options = {
        "do_sample": True,
        "temperature": 0.8,
        "max_new_tokens": 24,
        "eos_token_id": NEVER,
        "compile": True,
        "compile_config": config,
    }
    drawn = [hf_dspark.generate(w.target, w.drafter, **w.inputs(rows), seed=5, **options) for _ in range(2)]
    assert torch.equal(*drawn)


class Shift(LogitsProcessor):
    """Unknown to this package, and declared to keep no state."""

    stateless = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + torch.linspace(0, 3, scores.shape[-1])[input_ids[:, -1:]] * (torch.arange(scores.shape[-1]) % 3 == 0)


ENDS = {"eos_token_id": list(range(0, VOCAB, 5)), "pad_token_id": 1}
# Of every kind that reads ids, and one that looks at scores alone.
PROCESSORS: dict[str, dict[str, Any]] = {
    "texts": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[4], [5, 6], *([i, (5 * i) % VOCAB] for i in range(VOCAB))],
        "sequence_bias": [[[7], 2.0], [[9, 11], -5.0], *([[i, (7 * i) % VOCAB], 3.0] for i in range(VOCAB))],
    },
    "lengths": {
        "min_new_tokens": 9,
        "min_length": 21,
        "exponential_decay_length_penalty": (14, 1.1),
        "forced_eos_token_id": 5,
        "begin_suppress_tokens": list(range(0, VOCAB, 2)),
        "suppress_tokens": [9, 11],
        **ENDS,
    },
}


@pytest.mark.parametrize(
    ("rows", "config"), [(1, TRACED), (3, TRACED), (1, BUCKETS), (3, BUCKETS)], ids=["one", "three", "one, buckets", "three, buckets"]
)
@pytest.mark.parametrize("kind", PROCESSORS)
def test_processors_of_transformers_are_part_of_the_graphs(kind: str, rows: int, config: CompileConfig, made: Callable[[], int]) -> None:
    """The text is plain's, and another one than without them; draft, pass and verdict are graphs."""
    w = make_world(talking_target("qwen2"), copy_weights=[0.4, 0.7])
    expected = plain(w.target, w.inputs(rows), **PROCESSORS[kind])
    assert not torch.equal(expected, plain(w.target, w.inputs(rows), **(ENDS if kind == "lengths" else {})))
    assert torch.equal(compiled(w, rows, config, **PROCESSORS[kind]), expected)
    assert made() >= 3


@pytest.mark.parametrize("config", [TRACED, BUCKETS], ids=["any size", "buckets"])
@pytest.mark.parametrize(("rows", "budget"), [(1, "static:0"), (3, "static:2"), (1, "static:2")])
def test_processors_read_no_further_than_the_text(rows: int, budget: str, config: CompileConfig) -> None:
    """Passes without a draft, and those that are padded beyond what was drafted."""
    w, options = make_world(talking_target("qwen2")), {"no_repeat_ngram_size": 3, "sequence_bias": [[[i, 7], 2.0] for i in range(VOCAB)]}
    how = {**options, "max_new_tokens": 24, "do_sample": False, "eos_token_id": NEVER, "budget": budget}
    out = hf_dspark.generate(w.target, w.drafter, **w.inputs(rows), **how, compile=True, compile_config=config)
    assert torch.equal(out, plain(w.target, w.inputs(rows), **options))


def test_one_graph_serves_other_values_and_prompts(made: Callable[[], int]) -> None:
    """Another penalty, least length or temperature is no new graph."""
    w, kinds = make_world(talking_target("qwen2")), []
    for rows, penalty, shortest, temperature in ((3, 1.3, 4, 0.7), (2, 1.6, 6, 0.9)):
        options = {"repetition_penalty": penalty, "min_new_tokens": shortest, "eos_token_id": [5]}
        assert torch.equal(compiled(w, rows, **options), plain(w.target, w.inputs(rows), **options))
        compiled(w, rows, **options, do_sample=True, temperature=temperature, top_p=temperature)
        kinds.append(made())
    assert kinds == [5, 5]  # the pass is the same for all


@pytest.mark.parametrize("rows", [1, 3])
def test_processors_of_the_users_own_run_beside_the_graphs(rows: int, made: Callable[[], int]) -> None:
    """Draft and verdict run eagerly with them, the pass does not."""
    w = make_world(talking_target("qwen2"))
    own = {"logits_processor": LogitsProcessorList([Shift()])}
    assert torch.equal(compiled(w, rows, **own), plain(w.target, w.inputs(rows), **own))
    assert made() == 1


def test_scores_are_those_of_plain_generation() -> None:
    """Whoever asks for scores and logits gets them."""
    w = world()
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected, out = plain(w.target, w.inputs(3), **options), compiled(w, 3, **options)
    assert torch.equal(out.sequences, expected.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(getattr(out, name)), torch.stack(getattr(expected, name)), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize(("rows", "sample"), [(1, False), (1, True), (8, False), (8, True)])
def test_two_hundred_rounds_need_no_new_graph_and_little_beside_them(rows: int, sample: bool) -> None:
    """Contexts grow, rows leave, lengths differ: after the first rounds nothing is made, and at most 40 kernels a round run outside, with
    one wait for the device beside that of a budget that reads confidences.
    """
    w = make_world(talking_target(), wrong_every=2, copy_weights=[0.2, 0.3, 0.4])
    length = 380
    eos = [late_end(plain(w.target, w.inputs(rows), max_new_tokens=length)[:, -length:])] if rows > 1 and not sample else [NEVER]
    how = {"eos_token_id": eos, "do_sample": sample, "seed": 1, "budget": "full", "compile": True, "compile_config": TRACED}
    with counted_rounds() as rounds:
        out = hf_dspark.generate(w.target, w.drafter, **w.inputs(rows), max_new_tokens=length, return_dict_in_generate=True, **how)
    lengths = {row.generated for row in out.stats.rows}
    assert len(lengths) > 1 or rows == 1 or sample
    assert len(rounds) > 200
    assert sum(one.made for one in rounds[:3]) == 3
    assert sum(one.made for one in rounds[3:]) == 0
    steady = rounds[3:-1]  # the last leaves the caches ready for another turn
    assert max(one.launches for one in steady) <= 40
    assert {one.waits for one in steady} == {1}


class DecidedByTheHost(LaggedLoadAwareBudget):
    """The same budget, whose lengths the host works out from the confidences."""

    def total(self, drafts: Drafts) -> None:  # type: ignore[override]
        return None

    def plan(self, drafts: Drafts) -> list[int]:
        return admit_top(survivals(drafts.confidence.numpy()), drafts.limits, LaggedLoadAwareBudget.total(self, drafts))


@pytest.mark.parametrize(
    ("rows", "config"), [(3, None), (8, None), (3, TRACED), (8, BUCKETS)], ids=["eager, three", "eager, eight", "any size", "buckets"]
)
def test_lengths_that_the_device_chooses_are_those_that_the_host_would(rows: int, config: CompileConfig | None) -> None:
    """Round for round, with rows that end and a penalty that reads ids; the text is plain's."""
    w = make_world(talking_target("qwen3"), wrong_every=3, copy_weights=[0.4, 0.7, 0.9])
    costs = Costs({1: RowCosts({0: {1: 1.0, 5: 1.1, 9: 2.0, 40: 6.0}}, {1: 0.02, 7: 0.03})}, w.drafter.config.block_size)
    options = {"max_new_tokens": 40, "eos_token_id": list(range(0, VOCAB, 40)), "pad_token_id": 1, "repetition_penalty": 1.1}
    how = {**options, "do_sample": False, "compile": config is not None, "compile_config": config, "return_dict_in_generate": True}
    outs = [
        hf_dspark.generate(w.target, w.drafter, **w.inputs(rows), **how, budget=budget(costs, learn_costs=False))
        for budget in (LaggedLoadAwareBudget, DecidedByTheHost)
    ]
    assert torch.equal(outs[0].sequences, plain(w.target, w.inputs(rows), **options))
    assert judged(outs[0]) == judged(outs[1])
    assert 0 < sum(row.verified for row in outs[0].stats.rows) < sum(row.drafted for row in outs[0].stats.rows)


@pytest.mark.parametrize(
    ("budget", "rows", "compile"),
    [
        ("full", 1, False),
        ("full", 4, False),
        ("static:3", 4, False),
        ("load-aware-lag2", 1, False),
        ("load-aware-lag2", 4, False),
        ("load-aware-lag2", 4, True),
    ],
)
def test_a_round_waits_for_the_device_once(budget: str, rows: int, compile: bool) -> None:
    """At its end, to hear what stands; a budget that decides by the confidences of this very round waits for them too."""
    w = make_world(talking_target(), wrong_every=2)
    how = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": NEVER, "compile": compile, "compile_config": TRACED}
    waits = {}
    for kind in (budget, "threshold:0.5"):
        with counted_rounds() as rounds:
            hf_dspark.generate(w.target, w.drafter, **w.inputs(rows), **(how if compile else how | {"compile_config": None}), budget=kind)
        waits[kind] = {one.waits for one in rounds[:-1]}
    assert waits[budget] == {1}
    assert waits["threshold:0.5"] != {1}


# -------------------------------------------------------------------------------------------------------------------- what changes


def test_weights_may_change_between_calls() -> None:
    """Written in place or put in another's place, in target, head and drafter: the next call decodes with what is there."""
    w = make_world(talking_target(), draft_token_ids=torch.arange(0, VOCAB, 2))
    other = talking_target("llama")
    assert torch.equal(compiled(w, 3), plain(w.target, w.inputs(3)))
    with torch.no_grad():
        w.target.lm_head.weight.copy_(torch.randn(w.target.lm_head.weight.shape, generator=torch.Generator().manual_seed(3)))
        w.target.model.layers[1].mlp.up_proj.weight.mul_(-1.0)
    assert torch.equal(compiled(w, 3), plain(w.target, w.inputs(3)))
    w.target.model.layers[2].mlp = copy.deepcopy(other.model.layers[0].mlp)
    assert torch.equal(compiled(w, 3), plain(w.target, w.inputs(3)))


def test_a_drafter_may_change_between_calls() -> None:
    """Its weights in place, its vocabulary: what is accepted is what eager rounds accept."""
    w = make_world(talking_target(), draft_token_ids=torch.arange(0, VOCAB - 1, 2))
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: w.drafter.markov_head.markov_w2.weight.copy_(w.drafter.markov_head.markov_w2.weight.roll(1, 0)),
        lambda: w.drafter.layers[0].mlp.up_proj.weight.mul_(-1.0),
        lambda: w.drafter.d2t.add_(1),
    ]
    seen = []
    for change in changes:
        with torch.no_grad():
            change()
        eager = speculate(w.target, w.drafter, w.inputs(3), return_dict_in_generate=True)
        seen.append(judged(compiled(w, 3, return_dict_in_generate=True)))
        assert seen[-1] == judged(eager)
    assert len({str(one) for one in seen}) > 1


def test_graphs_are_kept_from_call_to_call_and_not_copied_with_the_target(made: Callable[[], int]) -> None:
    """The second call makes none; a copy of the target makes its own."""
    w = make_world(talking_target())
    compiled(w, 3)
    assert made() == 3
    compiled(w, 2)
    assert made() == 3
    twin = copy.deepcopy(w.target)
    assert torch.equal(
        speculate(twin, w.drafter, w.inputs(3), cache_implementation="static", compile_config=TRACED), plain_tokens("llama", 3)
    )
    assert made() == 6


def test_graphs_of_fixed_sizes_serve_the_next_call_too(made: Callable[[], int]) -> None:
    """Their buffers stay where captured graphs know them; what an earlier call left there is not seen."""
    w = make_world(talking_target("qwen3"), copy_weights=[0.4, 0.7, 0.9])
    compiled(w, 3, BUCKETS)
    before = made()
    assert before >= 3
    assert torch.equal(compiled(w, 3, BUCKETS), plain(w.target, w.inputs(3)))
    assert made() == before


@pytest.mark.parametrize("config", [TRACED, BUCKETS], ids=["any size", "buckets"])
def test_a_conversation_goes_on_in_its_own_cache(config: CompileConfig) -> None:
    """With `compile=True` a dynamic cache is filled and reused as in eager calls, whatever was decoded in between."""
    w = make_world(talking_target())
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": NEVER, "compile": True, "compile_config": config}
    cache = DynamicCache(config=w.target.config)
    first = hf_dspark.generate(w.target, w.drafter, **w.inputs(1), past_key_values=cache, **how)
    compiled(w, 1, config)
    ids = torch.cat([first, torch.tensor([[11, 12, 13]])], dim=1)
    out = hf_dspark.generate(w.target, w.drafter, input_ids=ids, past_key_values=cache, return_dict_in_generate=True, **how)
    assert torch.equal(out.sequences, plain(w.target, {"input_ids": ids}, max_new_tokens=12))
    assert out.past_key_values is cache
    assert cache.get_seq_length() == out.sequences.shape[1] - 1


# ---------------------------------------------------------------------------------------------------------- what is not compiled


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, logger="hf_dspark")
    warn_once.cache_clear()
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_that_cannot_be_traced_run_eagerly_that_part_alone(
    family: str, warnings: Callable[[], list[str]], made: Callable[[], int]
) -> None:
    """The text is plain's, it is said once, and draft and verdict are compiled."""
    w = make_world(talking_target(family))
    expected = plain(w.target, w.inputs(3))
    for _ in range(2):
        assert torch.equal(compiled(w, 3, CompileConfig(backend="eager")), expected)
    assert sum("The verification pass cannot be compiled" in line for line in warnings()) == 1
    assert made() == 2


def test_a_target_with_hooks_decodes_eagerly_and_says_so(warnings: Callable[[], list[str]], made: Callable[[], int]) -> None:
    """A graph would not call them."""
    w = make_world(talking_target())
    seen: list[int] = []
    handle = w.target.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(compiled(w, 3, CompileConfig(backend="eager")), plain_tokens("llama", 3))
    with pytest.raises(RuntimeError, match="forward hooks"):
        compiled(w, 3)
    handle.remove()
    assert len(seen) > 3
    assert made() == 0
    assert sum("forward hooks" in line for line in warnings()) == 1


def test_another_thread_decodes_eagerly_while_graphs_of_fixed_sizes_are_in_use(
    warnings: Callable[[], list[str]], made: Callable[[], int]
) -> None:
    """Their buffers are those of one call."""
    w = make_world(talking_target())
    compiled(w, 3, BUCKETS)
    before = made()
    with compiled_graphs(w.target, w.drafter, BUCKETS, w.target.device, 64).use() as graphs:
        assert graphs is not None
        assert torch.equal(compiled(w, 2, BUCKETS), plain_tokens("llama", 2))
    assert made() == before
    assert sum("this one decodes eagerly" in line for line in warnings()) == 1


def test_a_compile_config_alone_is_not_followed_and_says_so(warnings: Callable[[], list[str]], made: Callable[[], int]) -> None:
    """It says how, not whether."""
    w = world()
    assert torch.equal(speculate(w.target, w.drafter, w.inputs(3), compile_config=TRACED), plain_tokens("llama", 3))
    assert made() == 0
    assert sum("compile_config is not followed" in line for line in warnings()) == 1


def test_a_size_that_was_read_as_a_number_is_no_graph_for_other_sizes() -> None:
    """Python that reads a size would be right for the sizes that were traced alone."""
    graphs = Graphs(torch.device("cpu"), TRACED)
    with pytest.raises(RuntimeError, match="read as numbers"):
        graphs.run(("A sum",), lambda x: (x.sum() * len(x),), {"x": Argument(torch.ones(3), "N")})


def test_disable_compile_is_followed(made: Callable[[], int]) -> None:
    """As in plain calls."""
    assert torch.equal(compiled(world(), 3, disable_compile=True), plain_tokens("llama", 3))
    assert made() == 0


def test_an_offloaded_static_cache_is_refused() -> None:
    """It asks for something else than compiled rounds."""
    with pytest.raises(ValueError, match=r"asks for\s+compiled rounds"):
        speculate(world().target, world().drafter, world().inputs(1), cache_implementation="offloaded_static")


def test_a_static_cache_object_is_refused() -> None:
    """Rounds keep their own buffers, and would leave it empty."""
    w = world()
    with pytest.raises(ValueError, match="no static cache object"):
        speculate(w.target, w.drafter, w.inputs(1), past_key_values=StaticCache(config=w.target.config, max_cache_len=64))
