"""Budgets against a straight loop, their names, and the property that keeps decoding exact: no budget looks past its cut."""

from __future__ import annotations

import pytest
import torch

from hf_dspark.budgets.budget import Budget, Drafts, FullBudget, LiveRows, Proposal, StaticBudget, ThresholdBudget
from hf_dspark.budgets.named import make_budget
from tests.costs import flat

NAMES = ["full", "static:0", "static:2", "static:9", "threshold:0", "threshold:0.3", "threshold:0.8", "threshold:1"]


def confidences(rows: int, gamma: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, gamma, generator=torch.Generator().manual_seed(seed))


def drafts(confidence: torch.Tensor) -> Drafts:
    """Whole blocks, all of use."""
    return Drafts((confidence.shape[1],) * confidence.shape[0], confidence)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_threshold_equals_a_loop(threshold: float) -> None:
    """A row is verified up to its first confidence below the threshold."""
    given = confidences(200, 7)
    expected = []
    for row in given.tolist():
        length = 0
        while length < 7 and row[length] >= threshold:
            length += 1
        expected.append(length)
    assert ThresholdBudget(threshold).plan(drafts(given)) == expected


def test_threshold_at_its_edges() -> None:
    """Below means strictly below, and a confidence that is not a number admits nothing."""
    given = torch.tensor([[0.5, 0.5, 0.4999], [0.9, float("nan"), 0.9]])
    assert ThresholdBudget(0.5).plan(drafts(given)) == [2, 1]


def test_full_and_static_lengths() -> None:
    """Full verifies the block, static:N its first N tokens or the whole of a shorter block, whatever the confidence."""
    assert FullBudget().plan(Drafts((5, 5, 5))) == [5, 5, 5]
    assert StaticBudget(2).plan(Drafts((5, 5))) == [2, 2]
    assert StaticBudget(9).plan(Drafts((5, 5))) == [5, 5]
    assert StaticBudget(0).plan(Drafts((5,))) == [0]


def test_static_bounds_the_draft() -> None:
    """Only a static budget bounds the draft; the others ask for all of it."""
    live = LiveRows((4, 7), 5, (5, 2))
    assert StaticBudget(3).longest == 3
    assert StaticBudget(3).propose(live) == Proposal(3)
    assert FullBudget().propose(live) == ThresholdBudget(0.5).propose(live) == Proposal(5)


@pytest.mark.parametrize("name", NAMES)
def test_no_budget_goes_beyond_what_is_of_use(name: str) -> None:
    """A row near its end, or one that was not drafted for, is verified no further than its limit."""
    given = confidences(40, 5, seed=9)
    limits = tuple(torch.randint(6, (40,), generator=torch.Generator().manual_seed(3)).tolist())
    whole = make_budget(name).plan(drafts(given))
    assert make_budget(name).plan(Drafts(limits, given)) == [min(a, b) for a, b in zip(whole, limits, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_no_budget_looks_past_its_cut(name: str) -> None:
    """Whether token k is verified does not change when c_{k+1}, c_{k+2} .. do: they depend on x_k."""
    budget, gamma, rows = make_budget(name), 5, 300
    given = confidences(rows, gamma, seed=1)
    planned = torch.tensor(budget.plan(drafts(given)))
    for k in range(1, gamma + 1):
        changed = given.clone()
        changed[:, k:] = confidences(rows, gamma, seed=k + 1)[:, k:]
        again = torch.tensor(budget.plan(drafts(changed)))
        assert torch.equal(planned >= k, again >= k)


@pytest.mark.parametrize("name", NAMES)
def test_a_rows_budget_does_not_depend_on_its_neighbours(name: str) -> None:
    """These budgets decide row by row."""
    budget, given = make_budget(name), confidences(20, 4)
    together = budget.plan(drafts(given))
    assert together == [budget.plan(drafts(given[i : i + 1]))[0] for i in range(20)]


@pytest.mark.parametrize("name", NAMES)
def test_names_come_back_from_repr(name: str) -> None:
    """A budget prints as the name that makes it."""
    assert repr(make_budget(name)) == name


@pytest.mark.parametrize(("name", "needs"), [("full", False), ("static:3", False), ("threshold:0.5", True)])
def test_only_thresholds_need_a_confidence(name: str, needs: bool) -> None:
    """The loop waits for the device only where a budget reads confidences."""
    budget = make_budget(name)
    assert isinstance(budget, Budget)
    assert budget.needs_confidence is needs


def test_an_object_passes_as_it_is() -> None:
    """A policy of one's own is a subclass with `plan`; each call works on a copy, capped or not, so that no state leaks."""

    class Half(Budget):
        def __init__(self) -> None:
            self.rounds: list[int] = []

        def plan(self, drafts: Drafts) -> list[int]:
            self.rounds.append(drafts.rows)
            return [limit // 2 for limit in drafts.limits]

    mine = Half()
    assert make_budget(mine) is mine
    for budget in (mine, make_budget(mine, 5)):
        started = budget.start(flat(4), learn_costs=False)
        assert started.plan(Drafts((4, 4))) == ([2, 2] if budget is mine else [2, 1])
        assert mine.rounds == []


@pytest.mark.parametrize("wrong", ["", "all", "full:1", "static", "threshold", "Static:2", "threshold 0.5"])
def test_unknown_names_are_refused_with_the_list(wrong: str) -> None:
    """The message says what is allowed."""
    with pytest.raises(ValueError, match=r"'full', 'static:N'.*'threshold:P'.*'load-aware' and 'load-aware-lag2'"):
        make_budget(wrong)


@pytest.mark.parametrize("wrong", ["static:", "static:-1", "static:1.5", "threshold:", "threshold:1.5", "threshold:nan"])
def test_impossible_parameters_are_refused_by_name(wrong: str) -> None:
    """The message repeats the name that was given."""
    with pytest.raises(ValueError, match=repr(wrong)):
        make_budget(wrong)


@pytest.mark.parametrize("wrong", [None, 3, object(), FullBudget, ThresholdBudget])
def test_other_objects_are_refused(wrong: object) -> None:
    """Numbers and classes are not budgets."""
    with pytest.raises(ValueError, match=r"a name .* or an instance"):
        make_budget(wrong)


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [*((StaticBudget, wrong, "whole number") for wrong in (True, 2.0, "2", -1)), (ThresholdBudget, "0.5", "between 0 and 1")],
)
def test_parameters_are_checked_when_made_directly_too(kind: type[Budget], wrong: object, message: str) -> None:
    """A ValueError, not an accident."""
    with pytest.raises(ValueError, match=message):
        kind(wrong)


def test_a_threshold_without_confidences_says_what_to_do() -> None:
    """A drafter without a confidence head cannot follow a threshold."""
    with pytest.raises(ValueError, match=r"confidence head.*'full' or 'static:N'"):
        ThresholdBudget(0.5).plan(Drafts((5,)))
