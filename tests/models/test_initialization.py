"""Drafters that start from the target's last layers."""

from __future__ import annotations

import torch

from hf_dspark.models.modeling_dspark import DSparkDrafter
from tests.tiny import MASK, tiny_llama, tiny_target


def with_random_norms(target):
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter))
    return target


def test_initialising_from_the_target_copies_its_last_layers() -> None:
    """Projections, MLP and norms of the last two layers and the final norm start the backbone."""
    target = with_random_norms(tiny_llama())
    theirs, own = target.state_dict(), DSparkDrafter.from_target(target, mask_token_id=MASK, init_from_target=True).state_dict()
    projections = (*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")))
    for i in range(2):
        for part in (*projections, "input_layernorm", "post_attention_layernorm"):
            assert torch.equal(own[f"layers.{i}.{part}.weight"], theirs[f"model.layers.{i + 2}.{part}.weight"])
    assert torch.equal(own["norm.weight"], theirs["model.norm.weight"])


def test_initialising_from_gemma_translates_its_norms() -> None:
    """Gemma multiplies by one plus the weight, and its norm before the MLP has another name."""
    target = with_random_norms(tiny_target("gemma3"))
    own = DSparkDrafter.from_target(target, mask_token_id=MASK, init_from_target=True).state_dict()
    layer = target.model.layers[3]
    for name, norm in (
        ("input_layernorm", layer.input_layernorm),
        ("post_attention_layernorm", layer.pre_feedforward_layernorm),
        ("self_attn.q_norm", layer.self_attn.q_norm),
    ):
        torch.testing.assert_close(own[f"layers.1.{name}.weight"], 1 + norm.weight.detach())
