"""Sequential heads and the confidence head of the drafter.

Symbols as in the paper: d is the backbone's width, r the head's rank, V the target's vocabulary, V_draft the drafter's (equal to V unless
reduced), h_k the backbone's hidden state at block position k, x_{k-1} the token before it, B_k the logits added to the base logits.
"""

from __future__ import annotations

import torch
from torch import nn

from hf_dspark.configuration_dspark import DSparkConfig


class SequentialHead(nn.Module):
    """Base of the heads that give a block its left-to-right dependence: B_k = W2 latent(x_{k-1}, h_k, state).

    `block` is `step` unrolled over given tokens; both return the latent of size r, and `project` makes logits of it.

    Source: paper section 3.1.2.

    Args:
        vocab_size (`int`): V, rows of W1, indexed by target ids.
        draft_vocab_size (`int`): V_draft, rows of W2, indexed by draft ids.
        rank (`int`): r.
    """

    def __init__(self, vocab_size: int, draft_vocab_size: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab_size, bias=False)

    def embed_previous(self, prev_ids: torch.Tensor) -> torch.Tensor:
        """Look up W1[x_{k-1}].

        Args:
            prev_ids (`torch.LongTensor` of shape `(...,)`): target ids.
        Returns:
            `torch.Tensor` of shape `(..., r)`.
        """
        return self.markov_w1(prev_ids)

    def initial_state(self, h: torch.Tensor) -> torch.Tensor | None:
        """State before the first block position; `None` for heads without one.

        Args:
            h (`torch.Tensor` of shape `(..., d)`): gives leading shape, dtype and device.
        Returns:
            `torch.Tensor` of shape `(..., r)` or `None`.
        """
        return None

    def step(self, prev_ids: torch.Tensor, h_k: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute one block position.

        Args:
            prev_ids (`torch.LongTensor` of shape `(...,)`): x_{k-1}, target ids.
            h_k (`torch.Tensor` of shape `(..., d)`): backbone hidden state at k.
            state (`torch.Tensor` of shape `(..., r)`, *optional*): from the last step.
        Returns:
            `(torch.Tensor of shape (..., r), state)`: the latent whose projection is B_k, and the next state.
        """
        raise NotImplementedError

    def block(self, prev_ids: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """Compute all block positions with their previous tokens known (teacher forcing).

        Args:
            prev_ids (`torch.LongTensor` of shape `(..., gamma)`): x_0..x_{gamma-1}, target ids.
            h (`torch.Tensor` of shape `(..., gamma, d)`): backbone hidden states.
        Returns:
            `torch.Tensor` of shape `(..., gamma, r)`: latents.
        """
        return self.step(prev_ids, h, None)[0]

    def project(self, latent: torch.Tensor) -> torch.Tensor:
        """B = W2 latent.

        Args:
            latent (`torch.Tensor` of shape `(..., r)`).
        Returns:
            `torch.Tensor` of shape `(..., V_draft)`: logits to add to the base logits.
        """
        return self.markov_w2(latent)


class VanillaMarkovHead(SequentialHead):
    """B_k = W2 W1[x_{k-1}].

    Source: paper Eq. 5.
    """

    def step(self, prev_ids: torch.Tensor, h_k: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.embed_previous(prev_ids), None


class GatedMarkovHead(SequentialHead):
    """B_k = W2 (sigmoid(W_g [h_k; W1[x_{k-1}]]) * W1[x_{k-1}]).

    Source: paper section 3.1.2; order of the gate's inputs from DeepSpec's checkpoints.
    """

    def __init__(self, vocab_size: int, draft_vocab_size: int, rank: int, hidden_size: int) -> None:
        super().__init__(vocab_size, draft_vocab_size, rank)
        self.gate_proj = nn.Linear(hidden_size + rank, rank)

    def step(self, prev_ids: torch.Tensor, h_k: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        previous = self.embed_previous(prev_ids)
        gate = torch.sigmoid(self.gate_proj(torch.cat((h_k, previous), dim=-1)))
        return gate * previous, None


class RNNHead(SequentialHead):
    """A recurrent head: position k depends on all of x_0..x_{k-1} through s_{k-1}.

    One linear layer of [s_{k-1}; W1[x_{k-1}]; h_k] gives gate g, candidate and output; s_k = g s_{k-1} + (1 - g) tanh(candidate);
    B_k = W2 tanh(output); s_0 = 0.

    Source: paper Eq. 6; order of inputs and outputs from DeepSpec's checkpoints.
    """

    def __init__(self, vocab_size: int, draft_vocab_size: int, rank: int, hidden_size: int) -> None:
        super().__init__(vocab_size, draft_vocab_size, rank)
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def initial_state(self, h: torch.Tensor) -> torch.Tensor:
        return h.new_zeros(*h.shape[:-1], self.rank)

    def step(self, prev_ids: torch.Tensor, h_k: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        if state is None:
            state = self.initial_state(h_k)
        z = torch.cat((state, self.embed_previous(prev_ids), h_k), dim=-1)
        gate, candidate, output = self.joint_proj(z).chunk(3, dim=-1)
        # lerp(candidate, state, g) = g s + (1 - g) candidate
        return torch.tanh(output), torch.lerp(torch.tanh(candidate), state, torch.sigmoid(gate))

    def block(self, prev_ids: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        state, latents = None, []
        for k in range(h.shape[-2]):
            latent, state = self.step(prev_ids[..., k], h[..., k, :], state)
            latents.append(latent)
        return torch.stack(latents, dim=-2)


class ConfidenceHead(nn.Module):
    """Logit of c_k, the probability that token k survives given that tokens 1..k-1 did.

    Source: paper Eq. 7, before the sigmoid and before calibration.

    Args:
        input_size (`int`): d, or d + r with W1[x_{k-1}] among the features.
    """

    def __init__(self, input_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(input_size, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Score features.

        Args:
            features (`torch.Tensor` of shape `(..., d)` or `(..., d + r)`): h_k, then W1[x_{k-1}].
        Returns:
            `torch.Tensor` of shape `(...,)`: logits.
        """
        return self.proj(features).squeeze(-1)


def build_head(config: DSparkConfig) -> SequentialHead | None:
    """Build the sequential head that a config names.

    Args:
        config (`DSparkConfig`): `markov_rank` and `markov_head_type` choose.
    Returns:
        `SequentialHead`, or `None` when `markov_rank` is 0.
    """
    rank, d = config.markov_rank, config.hidden_size
    sizes = (config.vocab_size, config.draft_vocab_size or config.vocab_size, rank)
    if rank == 0:
        return None
    if config.markov_head_type == "vanilla":
        return VanillaMarkovHead(*sizes)
    if config.markov_head_type == "gated":
        return GatedMarkovHead(*sizes, d)
    return RNNHead(*sizes, d)
