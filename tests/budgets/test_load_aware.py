"""The load-aware budgets: what they verify, when they draft and for whom, and how much that gives beside fixed choices."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from examples.benchmarks.replay import Misjudged, Walk, play

from hf_dspark.budgets.admission import admit_early_stop, survivals
from hf_dspark.budgets.budget import Budget, Drafts, FinishedRound, LiveRows
from hf_dspark.budgets.cost_model import Costs, PassCosts, prior_costs
from hf_dspark.budgets.draft_planner import forecast
from hf_dspark.budgets.load_aware import LaggedLoadAwareBudget, LoadAwareBudget
from hf_dspark.budgets.named import make_budget
from hf_dspark.budgets.online_costs import OnlineCosts
from tests.budgets.test_admission import theta
from tests.costs import flat, full_machine, jagged, machine, made_costs, middling

KINDS = [LoadAwareBudget, LaggedLoadAwareBudget]


def run(budget: Budget, confidence: dict[int, float], rounds: int, gamma: int = 4) -> np.ndarray:
    """Rounds over rows of constant confidence; tokens drafted for each row, `(rounds, R)`."""
    requests = tuple(confidence)
    live = LiveRows(requests, gamma, (gamma,) * len(requests))
    drafted = []
    for _ in range(rounds):
        proposal = budget.propose(live)
        rows = range(len(requests)) if proposal.rows is None else proposal.rows
        counts = tuple(proposal.length if r in rows else 0 for r in range(len(requests)))
        given = torch.tensor([[confidence[q]] * proposal.length for q in requests]) if proposal.length else None
        plan = tuple(budget.plan(Drafts(counts, given, live))) if proposal.length else (0,) * len(requests)
        assert all(0 <= n <= c for n, c in zip(plan, counts, strict=True))
        budget.learn(FinishedRound(requests, counts, plan, plan, plan, given))
        drafted.append(counts)
    return np.array(drafted)


# ------------------------------------------------------------------------------------------------------------- what is verified


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_the_costs_stop_no_budget(kind: type[LoadAwareBudget]) -> None:
    """On stepped costs, where Algorithm 1 on the measured times sticks at a step's edge, both budgets go where the brute force does."""
    costs, gamma, confidence = jagged(7), 7, torch.full((1, 7), 0.97)
    budget = kind(costs)
    run(budget, {0: 0.97}, 4, gamma)
    survival, round_s = survivals(confidence.numpy()), costs.passes(1).verify_s + costs.draft_s(1, gamma)
    best = max(range(gamma + 1), key=lambda n: theta(survival, (n,), round_s))
    assert budget.plan(Drafts((gamma,), confidence, LiveRows((0,), gamma, (gamma,)))) == [best] == [7]
    assert admit_early_stop(survival, [gamma], round_s) == [3]


def test_an_expensive_first_token_does_not_hide_cheap_ones() -> None:
    """Costs of one row in float32: two tokens cost half as much again as one, eight nearly as much as two. From its second round on the
    budget drafts and verifies the whole block, as the brute force over both does.
    """
    step = [0.0559, 0.0919, *[0.0999] * 6]
    costs = made_costs(lambda b: step[min(b, 8) - 1], lambda r, n: 0.007 + 0.0016 * n, 7, (1,))
    given = torch.tensor([[0.5, 0.6, 0.6, 0.65, 0.7, 0.7, 0.7]])
    survival = survivals(given.numpy())
    plans = {(0, 0): 1 / step[0]}
    plans |= {(n, v): theta(survival, (v,), costs.passes(1).verify_s + costs.draft_s(1, n)) for n in range(1, 8) for v in range(n + 1)}
    assert max(plans, key=lambda plan: plans[plan]) == (7, 7)
    live, budget = LiveRows((0,), 7, (7,)), LoadAwareBudget(costs)
    for number in range(20):
        assert budget.propose(live).length == 7
        plan = tuple(budget.plan(Drafts((7,), given, live)))
        assert plan == (7,) or number == 0
        budget.learn(FinishedRound((0,), (7,), plan, plan, plan, given))


def test_the_lagged_budget_reads_the_round_before_the_last() -> None:
    """How much is verified depends on the confidences of two rounds ago, and not on today's or the last round's."""
    live = LiveRows((0,), 4, (4,))

    def planned(history: list[float], today: float) -> int:
        budget = LaggedLoadAwareBudget(middling(4))
        for value in history:
            budget.learn(FinishedRound((0,), (4,), (4,), (0,), (4,), torch.full((1, 4), value)))
        return budget.plan(Drafts((4,), torch.full((1, 4), today), live))[0]

    assert planned([0.95, 0.01], 0.01) == planned([0.95, 0.95], 0.95) > planned([0.01, 0.95], 0.95) == 0
    assert planned([], 0.5) == planned([0.01], 0.5) == 4  # without history of two rounds a row counts as survival 1


@pytest.mark.parametrize("name", ["load-aware", "load-aware-lag2"])
@pytest.mark.parametrize("cap", [1, 5, 12])
def test_the_cap_holds(name: str, cap: int) -> None:
    """No pass holds more than max_verify_tokens tokens beyond the anchors, which always go."""
    budget = make_budget(name, cap).start(flat(4), learn_costs=False)
    live = LiveRows((0, 1, 2), 4, (4, 4, 4))
    proposal = budget.propose(live)
    assert bool(proposal.length) == (cap > 3)
    if proposal.length:
        plan = budget.plan(Drafts((proposal.length,) * 3, torch.full((3, proposal.length), 0.9), live))
        assert sum(plan) == min(cap - 3, 12)


# --------------------------------------------------------------------------------------------------------------- what is drafted


@pytest.mark.parametrize("early", [False, True])
def test_the_forecast_counts_what_the_definition_says(early: bool) -> None:
    """Tokens a second of drafting for some rows beside others: the mean over samples, with anchors of all rows, equals a sum by hand."""
    random = np.random.default_rng(6)
    for _ in range(100):
        rows, others, gamma = int(random.integers(1, 4)), int(random.integers(0, 5)), int(random.integers(1, 4))
        samples = np.stack([survivals(random.random((rows, gamma))) for _ in range(2)])
        costs = middling(3)
        passes = PassCosts(costs.passes(rows + others).verify_s, 0.15 * np.arange(4))
        limits, room = random.integers(0, gamma + 1, rows), int(random.integers(0, rows * gamma + 1))
        rates = []
        for length in range(1, gamma + 1):
            tokens = seconds = 0.0
            for sample in samples:
                pairs = sorted(((sample[r, j], j) for r in range(rows) for j in range(min(limits[r], length))), reverse=True)
                gains, counts = np.array([gain for gain, _ in pairs]), range(len(pairs) + 1)
                longest = [max((j + 1 for _, j in pairs[:n]), default=0) for n in counts]
                real_s = [passes.verify_s[n] + 0.15 * longest[n] + costs.draft_s(rows, length) for n in counts]
                # These costs are a straight line already; Algorithm 1 takes the pass to be as wide as it may become.
                believed = [passes.verify_s[n] + 0.15 * length + costs.draft_s(rows, length) for n in counts] if early else real_s
                thetas = [(rows + others + gains[:n].sum()) / believed[n] for n in counts]
                stop = next((n for n in range(len(gains)) if thetas[n + 1] <= thetas[n]), len(gains))
                count = min(stop, room) if early else int(np.argmax(thetas[: room + 1]))
                tokens += rows + others + gains[:count].sum()
                seconds += real_s[count]
            rates.append(tokens / seconds)
        found = forecast(samples, limits, passes, costs.draft_s, others=others, room=room, early_stop=early)
        assert found.rate == pytest.approx(max(rates))
        assert rates[found.length - 1] == pytest.approx(max(rates))


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_machine_backs_off(kind: type[LoadAwareBudget]) -> None:
    """After one look nothing is drafted but probes, at intervals that double up to what their expected loss allows."""
    drafted = run(kind(full_machine(4)), dict.fromkeys(range(4), 0.6), 400)
    gaps = np.diff(np.flatnonzero(drafted.any(axis=1))).tolist()
    assert gaps[:5] == [4, 8, 16, 32, 64]


def test_probes_that_lose_little_come_often() -> None:
    """Where drafts lose 4% they are probed every 8 rounds or so, not at intervals that grow for ever."""
    costs = made_costs(lambda b: 1.0 + 0.2 * (b - 1), lambda r, n: 0.1, 4)
    drafted = run(LoadAwareBudget(costs), {0: 0.25}, 300)
    gaps = np.diff(np.flatnonzero(drafted[:, 0])[4:])
    assert 5 <= gaps.mean() <= 12


def test_an_idle_machine_drafts_for_all() -> None:
    """Where tokens cost nothing every row gets its whole block in every round."""
    assert (run(LoadAwareBudget(flat(4)), {0: 0.1, 1: 0.9}, 40) == 4).all()


def test_a_hopeless_row_backs_off_beside_good_ones() -> None:
    """Where drafts are expensive a row whose tokens never survive is left out but for probes; the others are drafted for all the time."""
    costs = made_costs(lambda b: 2.0 + 0.5 * b, lambda r, n: 0.25 * r * n, 4)
    drafted = run(LoadAwareBudget(costs), {0: 0.95, 1: 0.95, 2: 0.02, 3: 0.95}, 200)
    assert (drafted[:, [0, 1, 3]] > 0).all()
    assert (drafted[:, 2] > 0).sum() < 40


def test_short_blocks_where_long_ones_do_not_pay() -> None:
    """Where only the first token is worth its price no more is drafted."""
    costs = made_costs(lambda b: 1.0 + 0.1 * b, lambda r, n: 0.25 * n, 4)
    drafted = run(LoadAwareBudget(costs), {0: 0.55}, 100)[20:]
    assert (drafted == 1).mean() > 0.8


def test_back_off_ends_when_the_load_falls() -> None:
    """Many rows back off; the last of them is drafted for again at once."""
    costs = made_costs(lambda b: max(1.0, b / 4), lambda r, n: 0.05 * r, 4)
    budget = LoadAwareBudget(costs)
    assert run(budget, dict.fromkeys(range(8), 0.5), 50).any(axis=1).sum() < 12
    assert run(budget, {7: 0.5}, 20).all()


@pytest.mark.parametrize("learns", [False, True])
def test_plain_rounds_are_probed_only_where_costs_are_learnt(learns: bool) -> None:
    """Now and then, less often the more drafting gives; otherwise never."""
    budget = LoadAwareBudget().start(flat(4), learn_costs=learns)
    plain = int((run(budget, {0: 0.9}, 300) == 0).sum())
    assert (3 <= plain <= 10) if learns else plain == 0


# -------------------------------------------------------------------------------------------------------------- calls and costs


def test_a_call_starts_without_memory() -> None:
    """`start` gives a budget of its own, with the costs as they were: what one call has seen does not reach the next."""
    user = LoadAwareBudget()
    first = user.start(full_machine(4), learn_costs=True)
    run(first, {0: 0.1}, 10)
    first.learn(FinishedRound((0,), (4,), (2,), (1,), (2,), None, None, seconds=30.0, draft_seconds=20.0))
    first.learn(FinishedRound((0,), (0,), (0,), (0,), (0,), None, None, seconds=1.0, draft_seconds=0.0))
    assert first.costs.factors != (1.0, 1.0)
    live = LiveRows((0,), 4, (4,))
    for again in (user.start(full_machine(4), learn_costs=True), first.start(full_machine(4), learn_costs=True)):
        assert again.costs.factors == (1.0, 1.0)
        assert (first.propose(live).length, again.propose(live).length) == (0, 4)


@pytest.mark.parametrize(
    ("option", "call", "learns"), [(None, True, True), (None, False, False), (True, False, True), (False, True, False)]
)
def test_options_of_the_budget_win_over_the_call(option: bool | None, call: bool, learns: bool) -> None:
    """`learn_costs` of the constructor wins; costs of the constructor do too."""
    own = middling(4)
    started = LoadAwareBudget(own, learn_costs=option).start(flat(4), learn_costs=call)
    assert isinstance(started.costs, OnlineCosts) is learns
    assert (started.costs.table if learns else started.costs) is own


def test_costs_are_needed_and_for_such_blocks() -> None:
    """A budget that was never started says so, and so does one whose costs are of shorter blocks."""
    with pytest.raises(RuntimeError, match=r"no costs yet; call start"):
        LoadAwareBudget().propose(LiveRows((0,), 4, (4,)))
    with pytest.raises(ValueError, match=r"blocks of up to 3 tokens; the drafter's have 4"):
        LoadAwareBudget(flat(3)).propose(LiveRows((0,), 4, (4,)))


# ------------------------------------------------------------------------------------------------------------- against fixed choices

MACHINES = {
    "line": machine(lambda b: 25.0 + 1.2 * b),
    "steps": machine(lambda b: 25.0 + 12.0 * -(-b // 12)),
    "wide rows": machine(lambda b: 25.0 + 1.2 * b, width=0.15),
    "expensive drafts": machine(lambda b: 25.0 + 1.2 * b, draft=2.5),
}
LOADS = (1, 4, 16)


@functools.cache
def walks() -> list[Walk]:
    """Made-up answers of 60 tokens, some easier than others and all changing slowly; their confidences are true."""
    random, gamma, out = np.random.default_rng(5), 7, []
    for ease in random.normal(0.4, 0.8, 48):
        mood = 0.3 * np.cumsum(random.normal(0, 0.5, 60) * 0.9 ** np.arange(60))
        confidence = 1 / (1 + np.exp(-(ease + mood[:, None] + random.normal(0, 1.2, (60, gamma)))))
        accepted = (random.random((60, gamma)) < confidence).cumprod(axis=1).sum(axis=1)
        out.append(Walk(50, 62, accepted, confidence))
    return out


def throughput(budget: Budget, kind: str, load: int, noise: float = 0.0) -> float:
    played = play(budget, walks(), MACHINES[kind], load, requests=96, noise=noise)
    return played.tokens / played.seconds


@functools.cache
def best_fixed(kind: str, load: int) -> float:
    """Tokens a second of the best of plain, full and static:1, 2, 4."""
    return max(throughput(make_budget(name), kind, load) for name in ("static:0", "static:1", "static:2", "static:4", "full"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("load-aware", 0.98), ("load-aware-lag2", 0.96)])
@pytest.mark.parametrize("kind", MACHINES)
def test_no_fixed_choice_beats_load_aware(name: str, least: float, kind: str) -> None:
    """At every load it gives at least 0.98 of the best fixed choice, the lagged one, which sees less, 0.96. Nothing is drawn but from the
    seed.
    """
    budget = make_budget(name)
    ratios = {load: throughput(budget.start(MACHINES[kind], learn_costs=False), kind, load) / best_fixed(kind, load) for load in LOADS}
    assert min(ratios.values()) >= least, ratios


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "drafts"), [(0.3, 1.0), (2.5, 1.0), (1.0, 0.4)])
def test_wrong_profiles_are_corrected(tokens: float, drafts: float) -> None:
    """With a profile that takes tokens or drafts for so many times their cost, and times 10% off with some of five times their length, it
    still gives 0.97 of the best fixed choice.
    """
    budget, wrong = LoadAwareBudget(), Misjudged(MACHINES["line"], tokens, drafts)
    ratios = {load: throughput(budget.start(wrong, learn_costs=True), "line", load, noise=0.1) / best_fixed("line", load) for load in LOADS}
    assert min(ratios.values()) >= 0.97, ratios


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1 / 3, 2.5])
@pytest.mark.parametrize("load", LOADS)
def test_a_wrong_prior_is_unlearnt(load: int, factor: float) -> None:
    """On a machine whose tokens and drafts cost so many times what the prior says, a budget that starts from it gives at least 0.95 of
    what one with the right costs does.
    """
    prior = prior_costs(7, 0.2, "cpu")
    real = Misjudged(prior, factor, factor)

    def rate(costs: Costs) -> float:
        played = play(LoadAwareBudget().start(costs, learn_costs=True), walks(), real, load, requests=96, noise=0.1)
        return played.tokens / played.seconds

    assert rate(prior) >= 0.95 * rate(real)
