"""Starts a sequential head from the target's own next-token logits, averaged over what came before."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_dspark.models.heads import GatedMarkovHead, RNNHead
from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.training.rows import ResponseRow
from hf_dspark.training.target_states import TargetStates

logger = logging.getLogger(__name__)

# A token seen n times weighs its mean state n : 2 against the state that its embedding predicts.
_PRIOR_COUNT = 2.0
_ROWS = 8192
_OPEN_GATE = 3.0  # sigmoid(3) = 0.95
_TANH_RANGE = 0.25  # where tanh is all but linear


@torch.no_grad()
def start_sequential_head(
    drafter: DSparkDrafter, target: PreTrainedModel, rows: Sequence[ResponseRow], states: TargetStates, *, max_tokens: int = 50_000
) -> int:
    """Start W1 and W2 so that B = W2 W1[x] is the best rank-r fit to the target's logits given the last token alone.

    With h(x) the mean of the target's last hidden states over positions that hold token x, and e_j the rows of its lm_head, the fit is that
    of the weighted, doubly centred matrix (h(x) - h_mean) . (e_j - e_mean): what the last token adds to the logits beyond what holds on
    average. Its factors have the target's width, so the decomposition is exact and cheap.

    Source: none; Eckart-Young on the bigram table that the head's random start has to learn from sparse gradients.

    Returns:
        `int`: tokens read, from the top of the rows; 0 where the target's head is not a plain linear layer or there is no head to start.
    """
    head, lm_head = drafter.markov_head, target.get_output_embeddings()
    if head is None:
        return 0
    if type(lm_head) is not nn.Linear:
        logger.warning(
            "The target's lm_head is a %s, not a plain linear layer: the sequential head starts at random.", type(lm_head).__name__
        )
        return 0
    vocab_size = drafter.config.vocab_size
    sums = torch.zeros(vocab_size, drafter.config.hidden_size)
    counts, following, read = torch.zeros(vocab_size), torch.zeros(vocab_size), 0
    for row in rows:
        if read >= max_tokens:
            break
        ids = torch.tensor(row.ids)
        _, last = states.of_batch(ids[None], torch.tensor([len(ids)]))
        for begin, end in row.spans:
            here = ids[begin - 1 : end]
            sums.index_add_(0, here, last[0, begin - 1 : end].float().cpu())
            counts.index_add_(0, here, torch.ones(len(here)))
            following.index_add_(0, here[1:], torch.ones(len(here) - 1))
        read += len(ids)
    seen = sums / counts.clamp(min=1)[:, None]
    means = (sums + _PRIOR_COUNT * _predicted_states(target, seen, counts)) / (counts + _PRIOR_COUNT)[:, None]

    drafted = slice(None) if drafter.draft_token_ids is None else drafter.draft_token_ids.cpu()
    rows_of_head = lm_head.weight.detach().float().cpu()[drafted]
    _write(head, *low_rank_bigram(means, rows_of_head, counts + 0.01, following[drafted] + 0.1, head.rank))
    return read


def _predicted_states(target: PreTrainedModel, means: Tensor, counts: Tensor) -> Tensor:
    """A state for every token of the vocabulary, `(V, d)` float32: the ridge regression from its embedding, fitted on the tokens seen."""
    embedding = target.get_input_embeddings()
    with torch.inference_mode():
        every = torch.arange(len(counts), device=embedding.weight.device)
        x = torch.cat([embedding(every).float().cpu(), torch.ones(len(counts), 1)], dim=1)
    weighted = x * counts[:, None]
    gram = weighted.T @ x
    gram += torch.eye(len(gram)) * (1e-3 * gram.diagonal().mean())
    return x @ torch.linalg.solve(gram, weighted.T @ means)


def low_rank_bigram(states: Tensor, head: Tensor, weights: Tensor, following: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r factors, W1 `(V, r)` and W2 `(V_draft, r)`, of the weighted, doubly centred product of states h `(V, d)` and head rows e
    `(V_draft, d)`; columns beyond the rank of the product are zero.

    Minimises sum_ij p_i q_j ((h_i - h_mean) . (e_j - e_mean) - w1_i . w2_j)^2 with p, q the normalised weights: counts of the previous and
    of the next token, positive.
    """
    p, q = (weights / weights.sum())[:, None], (following / following.sum())[:, None]
    h, e = states - (p * states).sum(0), head - (q * head).sum(0)
    # With A = sqrt(p) h = Q_h R_h and B = sqrt(q) e = Q_e R_e: A B^T = U S V^T from the d x d product R_h R_e^T.
    root_h, root_e = _root(h, p), _root(e, q)
    u, s, vh = torch.linalg.svd(root_h @ root_e.T)
    size = min(rank, int((s > s[0] * 1e-6).sum()))
    u, s, v = u[:, :size], s[:size], vh[:size].T
    # A B^T V = U S, so w1 = h (B^T V) S^-1/2; likewise w2 = e (A^T U) S^-1/2, with B^T V = R_e^T v and A^T U = R_h^T u.
    w1 = h @ ((root_e.T @ v) / s.sqrt()).float()
    w2 = e @ ((root_h.T @ u) / s.sqrt()).float()
    pad = (0, rank - size)
    return nn.functional.pad(w1, pad), nn.functional.pad(w2, pad)


def _root(x: Tensor, weights: Tensor) -> Tensor:
    """R `(d, d)` float64 with R^T R = x^T diag(weights) x, from blocks of rows."""
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for rows, w in zip(x.split(_ROWS), weights.split(_ROWS), strict=True):
        block = rows.double()
        gram += (w.double() * block).T @ block
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def _write(head: Any, w1: Tensor, w2: Tensor) -> None:
    """Put the factors into a head of any kind so that its output before training is W2 W1[x], or nearly."""
    scale = 1.0
    if isinstance(head, RNNHead):
        # B = W2 tanh(output): the output starts as W1[x] in tanh's linear range, whatever the state and the hidden state.
        scale = _TANH_RANGE / float(w1.square().mean().sqrt() * 3)
        r = head.rank
        head.joint_proj.weight[2 * r :].zero_()
        head.joint_proj.bias[2 * r :].zero_()
        head.joint_proj.weight[2 * r :, r : 2 * r] = torch.eye(r, dtype=head.joint_proj.weight.dtype)
    elif isinstance(head, GatedMarkovHead):
        head.gate_proj.weight.mul_(0.1)
        head.gate_proj.bias.fill_(_OPEN_GATE)
    head.markov_w1.weight.copy_(w1 * scale)
    head.markov_w2.weight.copy_(w2 / scale)
