"""The objective against values worked out by hand on three and four tokens, and against plain autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hf_dspark.training.blocks import BlockTargets
from hf_dspark.training.configuration import LossWeights
from hf_dspark.training.losses import dspark_loss, position_weights, weight_totals
from hf_dspark.training.target_states import TargetHead, TargetProbabilities

DRAFT = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])
TARGET = torch.tensor([[0.25, 0.25, 0.5], [0.1, 0.3, 0.6]])
UNSUPERVISED = torch.zeros(1, 1, 2, dtype=torch.bool)


def places(count: int, ids: torch.Tensor) -> torch.Tensor:
    """The draft index of each of so many target ids, -1 where it has none."""
    return torch.tensor([ids.tolist().index(i) if i in ids.tolist() else -1 for i in range(count)])


def given(probabilities: torch.Tensor, ids: torch.Tensor | None = None):
    """A target whose hidden state is the index of its distribution."""

    def target(hidden: torch.Tensor) -> TargetProbabilities:
        p = probabilities[hidden[:, 0].long()]
        if ids is None:
            return TargetProbabilities(p, torch.zeros(len(p)), p.argmax(-1))
        return TargetProbabilities(p[:, ids], 1 - p[:, ids].sum(-1), places(p.shape[1], ids)[p.argmax(-1)])

    return target


def block_targets(labels, index, mask=None) -> BlockTargets:
    """Labels and row positions of blocks; all supervised where no mask says otherwise."""
    return BlockTargets(labels, torch.zeros_like(labels), index, torch.ones_like(labels, dtype=torch.bool) if mask is None else mask)


def loss_of(hidden, targets, target, *, latent=None, confidence=None, weights=None, draft_logits=None, **kwargs):
    """The hidden states are the draft logits, where nothing else says what is; the target's states of a row are numbered."""
    rows, _, gamma, _ = hidden.shape
    states = torch.arange(rows * 2 * gamma).view(rows, 2 * gamma, 1).float()
    logits = draft_logits or (lambda h, latent: h * 1.0)
    how = {"target": target, "weights": weights or LossWeights(decay=2.0), "draft_logits": logits, **kwargs}
    return dspark_loss(hidden, latent, confidence, targets, states, **how)


def call(draft, target, labels, *, mask=None, **kwargs):
    """One row, one block; draft logits are the log-probabilities themselves and position k meets distribution k."""
    gamma = len(labels)
    hidden = draft.log().view(1, 1, gamma, -1).clone().requires_grad_(True)
    targets = block_targets(torch.tensor(labels).view(1, 1, gamma), torch.arange(gamma).view(1, 1, gamma), mask)
    return loss_of(hidden, targets, target, **kwargs), hidden


def test_position_weights_fall_by_e_every_decay_tokens():
    """w_k = exp(-(k-1)/decay) with k from 1: 1, e^-0.5, e^-1 at decay 2; decay 0 would divide."""
    assert position_weights(3, 2.0).tolist() == pytest.approx([1.0, 0.6065307, 0.3678794])
    with pytest.raises(ValueError, match="decay is 0"):
        position_weights(3, 0)


def test_loss_equals_the_value_worked_out_by_hand():
    """L1 is 0.5 and 0.2, CE -ln 0.25 and -ln 0.6, c = 0.8 at acceptances 0.75 and 0.9; weights 1 and e^-0.5."""
    logit = math.log(0.8 / 0.2)
    result, _ = call(DRAFT, given(TARGET), [2, 2], confidence=torch.full((1, 1, 2), logit))
    w1, w2 = 1 / (1 + 0.6065306597), 0.6065306597 / (1 + 0.6065306597)
    ce = w1 * 1.3862943611 + w2 * 0.5108256238
    l1 = w1 * 0.5 + w2 * 0.2
    bce = w1 * -(0.75 * math.log(0.8) + 0.25 * math.log(0.2)) + w2 * -(0.9 * math.log(0.8) + 0.1 * math.log(0.2))
    assert float(result.loss.detach()) == pytest.approx(0.1 * ce + 0.9 * l1 + 1.0 * bce, rel=1e-5)
    assert result.acceptance.flatten().tolist() == pytest.approx([0.75, 0.9])
    assert result.agreement.flatten().tolist() == [False, True]
    assert result.confidence_error.flatten().tolist() == pytest.approx([0.05, 0.1])
    assert float(result.terms["cross_entropy"]) == pytest.approx(ce, rel=1e-5)


def test_taus_are_expected_prefixes_plus_the_bonus_token():
    """tau at T = 1 is 1 + 0.75 + 0.75 * 0.9 = 2.425; the first arg-max differs, so tau at T = 0 is 1. A block that leaves its row counts
    for acceptance but has no tau: it could not have been accepted to its end."""
    values = call(DRAFT, given(TARGET), [2, 2])[0].tally().values()
    assert values["tau_sampled"] == pytest.approx(2.425, rel=1e-5)
    assert values["tau_greedy"] == 1.0
    assert values["acceptance"] == pytest.approx([0.75, 0.9])
    assert "confidence_error" not in values
    values = call(DRAFT, given(TARGET), [2, 2], mask=torch.tensor([[[True, False]]]))[0].tally().values()
    assert values["tau_sampled"] is None
    assert values["acceptance"] == [pytest.approx(0.75), None]


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("soft", "ids"), [(0.0, range(8)), (0.0, (0, 2, 3, 5, 7)), (0.5, (0, 2, 3, 5, 7))], ids=["hard", "hard-reduced", "soft-reduced"]
)
def test_loss_and_gradient_equal_plain_autograd_of_the_formula(soft, ids, chunk):
    """Whatever the chunk, they are those of the loss written out with softmax and abs; label 1 may be outside the draft vocabulary."""
    torch.manual_seed(1)
    ids = torch.tensor(list(ids))
    draft, target = torch.rand(4, len(ids)).softmax(-1), (3 * torch.rand(4, 8)).softmax(-1)
    index, labels = places(8, ids), [2, 1, 7, 5]
    weights = LossWeights(cross_entropy=0.8, total_variation=0.3, decay=2.0, soft_labels=soft)
    result, hidden = call(draft, given(target, ids), labels, weights=weights, label_index=index, chunk_positions=chunk)
    result.loss.backward()

    plain = draft.log().clone().requires_grad_(True)
    w = torch.exp(-torch.arange(4.0) / 2.0)
    known = index[labels] >= 0
    log_p = plain.log_softmax(-1)
    ce = -log_p.gather(1, index[labels].clamp(min=0)[:, None])[:, 0]
    soft_ce = -(target[:, ids] * log_p).sum(-1)
    l1 = (plain.softmax(-1) - target[:, ids]).abs().sum(-1) + 1 - target[:, ids].sum(-1)
    loss = 0.8 * (1 - soft) * (ce * w * known).sum() / (w * known).sum() + (0.8 * soft * soft_ce * w + 0.3 * l1 * w).sum() / w.sum()
    loss.backward()
    torch.testing.assert_close(result.loss, loss)
    torch.testing.assert_close(hidden.grad.view(4, -1), plain.grad)


def test_mass_outside_a_reduced_vocabulary_counts_as_distance():
    """Draft ids (3, 0) of four: p_d = (0.5, 0.5), p_t = (0.4, 0.2) inside and 0.4 outside, so L1 = 0.1 + 0.3 + 0.4. Where the target's
    most likely token has no draft id, no draft agrees with it."""
    ids = torch.tensor([3, 0])
    weights = LossWeights(cross_entropy=1.0, total_variation=1.0)
    target = given(torch.tensor([[0.2, 0.1, 0.3, 0.4]]), ids)
    result, _ = call(torch.tensor([[0.5, 0.5]]), target, [0], label_index=places(4, ids), weights=weights)
    assert float(result.loss.detach()) == pytest.approx(math.log(2) + 0.8, rel=1e-5)
    assert result.acceptance.flatten().tolist() == pytest.approx([0.6])
    target = given(torch.tensor([[0.3, 0.1, 0.4, 0.2]]), ids)
    assert not call(torch.tensor([[0.9, 0.1]]), target, [0], label_index=places(4, ids))[0].agreement.any()


def test_labels_outside_a_reduced_vocabulary_leave_the_cross_entropy_alone():
    """Label 2 has no draft id: it is counted, and only the other position (p_d = 0.5, CE ln 2) is in the mean."""
    ids = torch.tensor([3, 0])
    target = torch.tensor([[0.2, 0.1, 0.3, 0.4], [0.2, 0.1, 0.3, 0.4]])
    weights = LossWeights(cross_entropy=1.0, total_variation=0.0)
    draft = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    result, hidden = call(draft, given(target, ids), [3, 2], label_index=places(4, ids), weights=weights)
    result.loss.backward()
    assert float(result.loss.detach()) == pytest.approx(math.log(2), rel=1e-5)
    assert hidden.grad[0, 0, 1].abs().max() == 0
    assert result.tally().values()["labels_outside"] == 0.5
    assert result.tally().values()["cross_entropy"] == pytest.approx(math.log(2), rel=1e-5)


def test_masked_positions_change_nothing():
    """Loss and gradient are those of the supervised positions alone; without any there is nothing to average over."""
    one, hidden = call(DRAFT, given(TARGET), [2, 2], mask=torch.tensor([[[True, False]]]))
    alone, _ = call(DRAFT[:1], given(TARGET), [2])
    one.loss.backward()
    torch.testing.assert_close(one.loss, alone.loss)
    assert hidden.grad[0, 0, 1].abs().max() == 0
    with pytest.raises(ValueError, match="no supervised position"):
        call(DRAFT, given(TARGET), [2, 2], mask=UNSUPERVISED)


def test_gradients_reach_hidden_latent_and_head_weight_and_equal_autograd():
    """U + B with a frozen base and a trained second matrix: all three gradients are those of plain autograd."""
    torch.manual_seed(1)
    base, w2 = torch.randn(7, 4), nn.Parameter(torch.randn(7, 2))
    hidden, latent = torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(1, 2, 3, 2, requires_grad=True)
    labels, index = torch.randint(0, 7, (1, 2, 3)), torch.tensor([[[0, 1, 2], [1, 2, 3]]])
    target = torch.randn(6, 7).softmax(-1)
    how = {"draft_logits": lambda h, b: h @ base.T + b @ w2.T, "parameters": [w2], "weights": LossWeights(decay=3.0), "chunk_positions": 4}
    loss_of(hidden, block_targets(labels, index), given(target), latent=latent, **how).loss.backward()
    found = [hidden.grad.clone(), latent.grad.clone(), w2.grad.clone()]
    hidden.grad = latent.grad = w2.grad = None
    logits = hidden @ base.T + latent @ w2.T
    w = torch.exp(-torch.arange(3.0) / 3.0).expand(1, 2, 3)
    ce = nn.functional.cross_entropy(logits.view(6, 7), labels.view(6), reduction="none").view(1, 2, 3)
    loss = ((0.1 * ce + 0.9 * (logits.softmax(-1) - target[index]).abs().sum(-1)) * w).sum() / w.sum()
    loss.backward()
    for mine, plain in zip(found, [hidden.grad, latent.grad, w2.grad], strict=True):
        torch.testing.assert_close(mine, plain)


def test_confidence_term_does_not_move_the_distribution_it_predicts():
    """With only the confidence term on, the draft logits get no gradient and the confidence does."""
    confidence = torch.zeros(1, 1, 2, requires_grad=True)
    weights = LossWeights(cross_entropy=0.0, total_variation=0.0, confidence=1.0)
    result, hidden = call(DRAFT, given(TARGET), [2, 2], confidence=confidence, weights=weights)
    result.loss.backward()
    assert hidden.grad.abs().max() == 0
    assert confidence.grad.abs().min() > 0


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("module", [nn.Linear(4, 6, bias=True), nn.Sequential(nn.Linear(4, 6, bias=False))])
def test_target_head_equals_a_softmax_over_the_whole_vocabulary(module, softcap):
    """Inside, outside and arg-max are those of the full distribution, for plain heads and for heads it cannot slice."""
    torch.manual_seed(0)
    ids, hidden = torch.tensor([4, 1, 2]), torch.randn(20, 4)
    found = TargetHead(module, ids, softcap=softcap)(hidden)
    logits = module(hidden)
    p = (logits if softcap is None else softcap * torch.tanh(logits / softcap)).softmax(-1)
    torch.testing.assert_close(found.inside, p[:, ids])
    torch.testing.assert_close(found.outside, 1 - p[:, ids].sum(-1))
    assert torch.equal(found.best, places(6, ids)[p.argmax(-1)])
    assert not found.inside.requires_grad


def test_tallies_of_parts_add_up_to_the_tally_of_the_whole():
    """Numerators and denominators add, so groups can be merged in any order."""
    torch.manual_seed(0)
    targets = block_targets(torch.randint(0, 5, (4, 2, 3)), torch.randint(0, 6, (4, 2, 3)))
    result = loss_of(torch.randn(4, 2, 3, 5), targets, given(torch.randn(24, 5).softmax(-1)), confidence=torch.randn(4, 2, 3))
    parts = result.tally(torch.tensor([True, False, True, False])).merge(result.tally(torch.tensor([False, True, False, True])))
    whole = result.tally().values()
    assert parts.values().keys() == whole.keys()
    for name, value in parts.values().items():
        assert value == pytest.approx(whole[name], abs=2e-6)


def test_losses_of_parts_add_up_to_the_loss_of_the_whole():
    """Divided by the whole step's weights, the losses and gradients of two rows run apart sum to those of both run together."""
    torch.manual_seed(2)
    hidden, labels = torch.rand(2, 1, 3, 6), torch.randint(0, 6, (2, 1, 3))
    targets = block_targets(labels, torch.arange(3).expand(2, 1, 3), torch.tensor([[[True, True, True]], [[True, False, False]]]))
    distribution = (3 * torch.rand(3, 6)).softmax(-1).repeat(4, 1)  # the same for every row

    def run(rows: slice, totals):
        h = hidden[rows].clone().requires_grad_(True)
        part = BlockTargets(*(tensor[rows] for tensor in targets))
        result = loss_of(h, part, given(distribution), confidence=h.sum(-1), totals=totals)
        result.loss.backward()
        return result.loss.detach(), h.grad

    totals = weight_totals(targets, LossWeights(decay=2.0))
    whole, whole_grad = run(slice(0, 2), None)
    parts = [run(slice(0, 1), totals), run(slice(1, 2), totals)]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), whole_grad)


def test_a_part_without_supervised_positions_weighs_nothing():
    """An empty share of a step has loss zero and a gradient of zeros, so that its process can take part in the reduction."""
    totals = torch.tensor(1.0), torch.tensor(1.0)
    result, hidden = call(DRAFT, given(TARGET), [2, 2], mask=UNSUPERVISED, confidence=torch.zeros(1, 1, 2), totals=totals)
    result.loss.backward()
    assert float(result.loss.detach()) == 0
    assert not hidden.grad.any()
