"""A target whose weights stay int8: every linear layer, the head among them, dequantizes as it runs and is no `nn.Linear`."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from hf_dspark import DSparkDrafter
from tests.helpers import World, counts, make_world, plain, speculate, talking_target
from tests.tiny import HIDDEN, VOCAB, tiny_drafter


class Int8Linear(nn.Module):
    """Weight-only int8: a buffer of whole numbers, one fp32 scale a row, dequantized in every forward.

    Args:
        linear (`nn.Linear`): whose weight is rounded; it has no bias.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127.0
        self.register_buffer("weight", torch.round(linear.weight.detach() / scale).to(torch.int8))
        self.register_buffer("scale", scale)

    def dequantized(self) -> torch.Tensor:
        return self.weight.to(self.scale.dtype) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dequantized().to(x.dtype))


class StrictInt8Linear(Int8Linear):
    """The same, with activations of the scales' dtype only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dequantized())


def quantize(target: PreTrainedModel, kind: type[Int8Linear]) -> PreTrainedModel:
    """Replace every linear layer, in place."""
    for name, module in list(target.named_modules()):
        if type(module) is nn.Linear:
            assert module.bias is None
            target.set_submodule(name, kind(module))
    return target


def cast(drafter: DSparkDrafter, dtype: torch.dtype) -> DSparkDrafter:
    """A copy in another dtype, bound to the same target."""
    return copy.deepcopy(drafter).to(dtype)


@pytest.fixture(scope="module", params=[Int8Linear, StrictInt8Linear])
def quantized(request: pytest.FixtureRequest) -> World:
    """A quantized Llama, and a drafter that knows most of its greedy transitions."""
    return make_world(quantize(talking_target(), request.param))


def test_the_targets_weights_are_int8(quantized: World) -> None:
    """No layer keeps a floating-point weight: seven projections of each of four layers, and the head."""
    modules = list(quantized.target.modules())
    layers = [module for module in modules if isinstance(module, Int8Linear)]
    assert len(layers) == 4 * 7 + 1
    assert {layer.weight.dtype for layer in layers} == {torch.int8}
    assert not [module for module in modules if isinstance(module, nn.Linear)]
    assert quantized.target.get_output_embeddings() in layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_equals_plain_generate(quantized: World, dtype: torch.dtype, rows: int) -> None:
    """Token for token, with drafts accepted and rejected, for a drafter of the activations' dtype and for one in bf16."""
    drafter = cast(quantized.drafter, dtype)
    out = speculate(quantized.target, drafter, quantized.inputs(rows), return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain(quantized.target, quantized.inputs(rows)))
    accepted, verified = counts(out)
    assert 0 < accepted < verified


@pytest.mark.parametrize("reduced", [False, True])
def test_the_drafter_borrows_the_quantized_head(quantized: World, reduced: bool) -> None:
    """Base logits are the head's own, in either dtype of the drafter, and cut to the draft vocabulary where it is reduced."""
    ids = torch.arange(1, VOCAB, 3) if reduced else None
    drafter = tiny_drafter(quantized.target, draft_token_ids=ids)
    h = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
    expected = h @ quantized.target.get_output_embeddings().dequantized().T
    if ids is not None:
        expected = expected[:, ids]
    torch.testing.assert_close(drafter.base_logits(h), expected, rtol=1e-5, atol=1e-5)
    rounded = cast(drafter, torch.bfloat16).base_logits(h.bfloat16()).float()
    torch.testing.assert_close(rounded, expected, rtol=0.0, atol=0.05 * float(expected.std()))
