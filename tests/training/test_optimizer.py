"""AdamW and Muon on float32 masters."""

from __future__ import annotations

import math

import pytest
import torch

from hf_dspark.training.optimizer import MasterOptimizer


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.nn.Parameter]:
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]


def test_master_weights_gather_updates_too_small_for_bfloat16():
    """Sixty steps of 1e-4 move a bf16 weight of 1.0, though one step alone rounds away."""
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterOptimizer([parameter])
    seen = []
    for _ in range(60):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step(1e-4, clip=10.0)
        seen.append(float(parameter.detach()[0]))
    assert seen[0] == 1.0
    assert seen[-1] < 1.0
    assert float(optimizer.masters[0][0]) == pytest.approx(1 - 60e-4, abs=1e-4)


def test_muon_moves_hidden_matrices_by_its_own_rule_and_the_others_by_adamws():
    """A matrix follows torch.optim.Muon alone on a float32 copy, a vector and a vocabulary matrix follow torch.optim.AdamW."""
    parameters, alone = (drawn((96, 64), (64,), (80, 64)) for _ in range(2))
    muon = torch.optim.Muon(alone[:1], lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(alone[1:], lr=0.01, weight_decay=0.0)
    optimizer = MasterOptimizer(parameters, kind="muon", matrices=parameters[:1])
    for _ in range(3):
        for ours, theirs in zip(parameters, alone, strict=True):
            theirs.grad = torch.randn_like(ours)
            ours.grad = theirs.grad.clone()
        optimizer.step(0.01, clip=1e9)
        muon.step()
        adamw.step()
    for ours, theirs in zip(parameters, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_saved_optimizer_continues_bit_for_bit(kind):
    """Two steps, saved and loaded into a fresh one between, equal two steps in a row."""

    def made() -> MasterOptimizer:
        parameters = drawn((64, 96), (96,))
        return MasterOptimizer(parameters, kind=kind, matrices=parameters[:1])

    def step(optimizer: MasterOptimizer, seed: int) -> None:
        for parameter, gradient in zip(optimizer.parameters, drawn((64, 96), (96,), seed=seed), strict=True):
            parameter.grad = gradient.detach()
        optimizer.step(0.01, clip=1.0)

    through, first, second = made(), made(), made()
    step(through, 2)
    step(through, 3)
    step(first, 2)
    second.load_state_dict(first.state_dict())
    step(second, 3)
    assert all(torch.equal(one, other) for one, other in zip(through.parameters, second.parameters, strict=True))


def test_gradient_that_is_not_finite_changes_no_weight():
    """The step is skipped and its norm reported."""
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([float("nan"), 1.0])
    assert math.isnan(MasterOptimizer([parameter]).step(0.1, clip=1.0))
    assert parameter.tolist() == [1.0, 1.0]
