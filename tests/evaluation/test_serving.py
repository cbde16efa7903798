"""Requests that come and go: every one gets its own text, the number in flight holds, and the clock counts what it should."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import CompileConfig

from hf_dspark.budgets.named import make_budget
from hf_dspark.decoding.kept_graphs import compiled_graphs
from hf_dspark.evaluation.serving import Server, serve
from tests.costs import middling
from tests.helpers import NEVER, bigram_drafter, plain, random_prompts
from tests.tiny import tiny_target

LENGTHS = (9, 4, 13, 1, 7, 5, 11, 2, 6, 3)
LIMITS = [20, 5, 12, 1, 30, 8, 17, 24, 2, 11]


@functools.cache
def pair():
    target = tiny_target("llama")
    target.generation_config.eos_token_id = NEVER
    return target, bigram_drafter(target, random_prompts(LENGTHS))


@functools.cache
def alone(request: int) -> list[int]:
    """Plain generation of one request by itself."""
    prompt = random_prompts(LENGTHS)[request]
    out = plain(pair()[0], {"input_ids": torch.tensor([prompt])}, max_new_tokens=LIMITS[request])
    return out[0, len(prompt) :].tolist()


def server(budget: str = "full", *, concurrency: int = 3, learn_costs: bool = False, times: int = 1, **options) -> Server:
    """A server of all requests, so many times over."""
    target, drafter = pair()
    made = make_budget("static:0" if budget == "plain" else budget).start(middling(drafter.config.block_size), learn_costs=learn_costs)
    return Server(
        target, None if budget == "plain" else drafter, random_prompts(LENGTHS) * times, concurrency=concurrency,
        max_new_tokens=LIMITS * times, budget=made, end_ids=[NEVER], **options,
    )  # fmt: skip


@pytest.mark.parametrize("budget", ["full", "static:2", "threshold:0.5", "load-aware", "load-aware-lag2", "plain"])
@pytest.mark.parametrize("concurrency", [1, 3, 16])
def test_every_request_gets_its_own_text(budget, concurrency):
    """However many are in flight, each request's greedy tokens are those of plain generation of it alone."""
    running = server(budget, concurrency=concurrency)
    served = running.run()
    assert served.tokens == [alone(r) for r in range(len(LENGTHS))]
    assert served.emitted == sum(LIMITS)
    assert len(running.speeds(fewest=1)) == len(LENGTHS)


@pytest.mark.parametrize("budget", ["load-aware", "load-aware-lag2"])
def test_learning_costs_leaves_the_texts_as_they_are(budget):
    """With made-up costs that this machine's rounds correct as they go, every request's greedy tokens are those of plain generation."""
    assert server(budget, learn_costs=True).run().tokens == [alone(r) for r in range(len(LENGTHS))]


def test_the_number_in_flight_holds():
    """In a steady run as many rows are live in every round as were asked for, and the clock covers these rounds only."""
    seen = []

    class Watch:
        temperatures, wants_copy_features = None, False

        def on_round_end(self, finished):
            seen.append(len(finished.requests))

    served = server(concurrency=4, times=3, round_callback=Watch()).run(steady=True)
    assert set(seen) == {4}
    assert 4 * len(seen) == sum(row.rounds for row in served.stats.rows)
    assert served.seconds > 0
    assert served.emitted < sum(LIMITS * 3)


def test_a_request_that_ends_by_itself_frees_its_place():
    """An end-of-text token ends a request and is kept."""
    target, drafter = pair()
    ends = alone(4)[6]
    served = serve(target, drafter, random_prompts(LENGTHS), concurrency=2, max_new_tokens=30, budget=make_budget("full"), end_ids=[ends])
    assert served.tokens[4] == alone(4)[: alone(4).index(ends) + 1]


def test_a_server_that_pauses_gives_the_texts_of_one_that_does_not():
    """Run in slices of no time, a round each, every request's greedy tokens are those of plain generation of it alone."""
    running = server("load-aware")
    slices = [running.run(seconds=0.0)]
    while running.loop.state.num_rows:
        slices.append(running.run(seconds=0.0))
    assert len(slices) > max(LIMITS) / (pair()[1].config.block_size + 1)
    assert slices[-1].tokens == [alone(r) for r in range(len(LENGTHS))]
    assert sum(one.emitted for one in slices) == sum(LIMITS)
    assert len(running.speeds(fewest=1)) == len(LENGTHS)


def test_a_server_that_stops_by_tokens_stops_within_a_round_of_them():
    """Counted from its beginning, over all its runs; the texts are those of one run."""
    most = 3 * (pair()[1].config.block_size + 1)  # a round of three rows
    running = server()
    for goal in (20, 45, 90):
        served = running.run(tokens=goal)
        assert goal <= running.emitted < goal + most + 3
        assert running.emitted == sum(map(len, served.tokens))
    assert running.run().tokens == [alone(r) for r in range(len(LENGTHS))]
    assert running.emitted == sum(LIMITS)


@pytest.mark.parametrize("budget", ["full", "load-aware", "plain"])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_compiled_rounds_give_every_request_its_own_text(budget, concurrency):
    """Requests join and leave between rounds that are graphs."""
    target, drafter = pair()
    config = CompileConfig(backend="eager", fullgraph=True)
    graphs = compiled_graphs(target, drafter.bind(target), config, target.device, max(LIMITS) + max(LENGTHS) + 8)
    assert server(budget, concurrency=concurrency, graphs=graphs).run().tokens == [alone(r) for r in range(len(LENGTHS))]
    assert graphs.made > 0
