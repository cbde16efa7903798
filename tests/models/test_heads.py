"""Sequential heads and confidence head, against their equations written out."""

from __future__ import annotations

import pytest
import torch

from hf_dspark.configuration_dspark import DSparkConfig
from hf_dspark.models.heads import ConfidenceHead, GatedMarkovHead, RNNHead, SequentialHead, VanillaMarkovHead, build_head

V, V_DRAFT, R, D = 23, 11, 4, 6


def make_head(kind: str) -> SequentialHead:
    torch.manual_seed(0)
    config = DSparkConfig(
        vocab_size=V,
        draft_vocab_size=V_DRAFT,
        hidden_size=D,
        intermediate_size=8,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=6,
        markov_rank=R,
        markov_head_type=kind,
    )
    head = build_head(config)
    assert head is not None
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head


def test_build_head_follows_the_config() -> None:
    """The type name picks the class, and rank 0 means no head."""
    kinds = {"vanilla": VanillaMarkovHead, "gated": GatedMarkovHead, "rnn": RNNHead}
    assert all(type(make_head(kind)) is kinds[kind] for kind in kinds)
    assert build_head(DSparkConfig(markov_rank=0)) is None


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_parameter_shapes_are_those_of_released_checkpoints(kind: str) -> None:
    """W1 is indexed by target ids and W2 by draft ids; gate and joint projection have DeepSpec's sizes."""
    shapes = {name: tuple(p.shape) for name, p in make_head(kind).named_parameters()}
    extra = {
        "vanilla": {},
        "gated": {"gate_proj.weight": (R, D + R), "gate_proj.bias": (R,)},
        "rnn": {"joint_proj.weight": (3 * R, 2 * R + D), "joint_proj.bias": (3 * R,)},
    }[kind]
    assert shapes == {"markov_w1.weight": (V, R), "markov_w2.weight": (V_DRAFT, R), **extra}


def test_vanilla_is_a_bigram_table_of_low_rank() -> None:
    """B_k is row x_{k-1} of W1 W2^T (Eq. 5)."""
    head = make_head("vanilla")
    table = head.markov_w1.weight @ head.markov_w2.weight.T
    ids = torch.tensor([[3, 0, 22], [7, 7, 1]])
    torch.testing.assert_close(head.project(head.block(ids, torch.randn(2, 3, D))), table[ids])


def test_gated_head_gates_the_embedding() -> None:
    """latent = sigmoid(W_g [h; e] + b) * e, hidden state first."""
    head = make_head("gated")
    ids, h = torch.tensor([5, 9]), torch.randn(2, D)
    e = head.markov_w1.weight[ids]
    gate = 1 / (1 + torch.exp(-(h @ head.gate_proj.weight[:, :D].T + e @ head.gate_proj.weight[:, D:].T + head.gate_proj.bias)))
    torch.testing.assert_close(head.step(ids, h, None)[0], gate * e)


def test_rnn_head_follows_equation_six() -> None:
    """s_k = g s + (1 - g) tanh(cand) and latent = tanh(out), inputs ordered state, previous, hidden."""
    head = make_head("rnn")
    ids, h, s = torch.tensor([5, 9]), torch.randn(2, D), torch.randn(2, R)
    w, b = head.joint_proj.weight, head.joint_proj.bias
    z = s @ w[:, :R].T + head.markov_w1.weight[ids] @ w[:, R : 2 * R].T + h @ w[:, 2 * R :].T + b
    g = torch.sigmoid(z[:, :R])
    latent, state = head.step(ids, h, s)
    torch.testing.assert_close(latent, torch.tanh(z[:, 2 * R :]))
    torch.testing.assert_close(state, g * s + (1 - g) * torch.tanh(z[:, R : 2 * R]))


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("leading", [(3,), (2, 4)])
def test_block_is_step_unrolled(kind: str, leading: tuple[int, ...]) -> None:
    """Teacher-forced latents of a block equal those of one step after another, for any leading shape."""
    head, gamma = make_head(kind), 5
    ids, h = torch.randint(V, (*leading, gamma)), torch.randn(*leading, gamma, D)
    state, latents = head.initial_state(h[..., 0, :]), []
    for k in range(gamma):
        latent, state = head.step(ids[..., k], h[..., k, :], state)
        latents.append(latent)
    torch.testing.assert_close(head.block(ids, h), torch.stack(latents, dim=-2))


def test_only_the_rnn_head_looks_further_back_than_one_token() -> None:
    """Changing x_0 changes position 3 of the RNN head and leaves that of the Markov heads."""
    for kind, remembers in (("vanilla", False), ("gated", False), ("rnn", True)):
        head, h = make_head(kind), torch.randn(1, 3, D)
        one, other = (head.block(torch.tensor([[first, 4, 5]]), h)[0, 2] for first in (1, 2))
        assert torch.equal(one, other) is not remembers


def test_confidence_head_is_an_affine_score() -> None:
    """One logit a position: w . feature + b."""
    head, x = ConfidenceHead(D), torch.randn(2, 3, D)
    torch.testing.assert_close(head(x), (x * head.proj.weight[0]).sum(-1) + head.proj.bias)
