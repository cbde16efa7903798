"""Fits of n-gram copying: the weights of copied tokens in the mixture, and the confidence with them.

Source: maximum likelihood of a two-part mixture by expectation-maximisation (Dempster et al. 1977); logistic regression (Platt 1999).
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from hf_dspark.configuration_dspark import COPY_FEATURES, COPY_RELATIONS

# Match lengths are pooled with the next longer ones until so many copies were seen; with fewer a weight would be noise.
FEWEST_COPIES = 200
# The largest weight of a copy: tokens of p_d can still be drawn.
_MOST = 0.98
_RIDGE = 1.0


def fit_copy_weights(lengths: np.ndarray, hits: np.ndarray, p_d: np.ndarray, longest: int) -> list[float]:
    """lambda_1..lambda_M under which the target's tokens are most likely in (1 - lambda_m) p_d + lambda_m [x = copy].

    Args:
        lengths (`numpy.ndarray` of shape `(N,)`): m, tokens that matched before the copied one; 0 without a match, M for longer ones.
        hits, p_d (`numpy.ndarray` of shape `(N,)`): whether the copied token was the target's; the drafter's probability of the latter.
        longest (`int`): M.
    """
    lengths = np.minimum(lengths, longest)
    counts = np.bincount(lengths.astype(np.int64), minlength=longest + 1)
    if counts[1:].sum() < FEWEST_COPIES:
        return [0.0] * longest
    pools: list[list[int]] = [[]]
    for m in range(1, longest + 1):
        if counts[pools[-1]].sum() >= FEWEST_COPIES and counts[m:].sum() >= FEWEST_COPIES:
            pools.append([])
        pools[-1].append(m)
    return [weight for pool in pools for weight in [_mixed(hits[np.isin(lengths, pool)], p_d[np.isin(lengths, pool)])] * len(pool)]


def _mixed(hits: np.ndarray, p_d: np.ndarray) -> float:
    """The weight of copies in a mixture with p_d that makes the tokens most likely, by expectation-maximisation."""
    weight = 0.5
    for _ in range(200):
        weight = float((weight * hits / np.maximum(weight * hits + (1 - weight) * p_d, 1e-30)).mean())
    return min(weight, _MOST)


def fit_copy_confidence(features: np.ndarray, survived: np.ndarray) -> list[list[float]]:
    """For each relation, the linear function of `COPY_FEATURES` whose sigmoid best predicts whether a token survives.

    A small ridge pulls all towards the confidence head's own logit, which a relation without data keeps. A fit on one domain holds there
    only: give about as many tokens of each domain that the drafter is for.

    Args:
        features (`numpy.ndarray` of shape `(N, 9)`): relation, then `COPY_FEATURES`, of tokens whose predecessors were accepted.
        survived (`numpy.ndarray` of shape `(N,)`): 0 or 1.
    Returns:
        `list[list[float]]` of shape `(4, 8)`.
    """
    own = np.zeros(features.shape[1] - 1)
    own[COPY_FEATURES.index("confidence")] = 1.0
    relations = [features[:, 0] == relation for relation in range(len(COPY_RELATIONS))]
    return [_regressed(features[of_it, 1:], survived[of_it], own) for of_it in relations]


@torch.enable_grad()
def _regressed(features: np.ndarray, survived: np.ndarray, own: np.ndarray) -> list[float]:
    """Weights of a logistic regression, pulled towards `own`; the loss is convex."""
    x, y, start = (torch.from_numpy(values.astype(np.float64)) for values in (features, survived, own))
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=1000, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        fit = binary_cross_entropy_with_logits(x @ weights, y, reduction="sum")
        total = fit + 0.5 * _RIDGE * (weights - start).square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return weights.tolist()
