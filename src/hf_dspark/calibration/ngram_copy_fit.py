"""Fits of n-gram copying: the weights of copied tokens in the mixture, and the confidence with them.

Source: maximum likelihood of a two-part mixture by expectation-maximisation (Dempster et al. 1977); logistic regression (Platt 1999).
"""

from __future__ import annotations

import numpy as np

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
    table = []
    for relation in range(len(COPY_RELATIONS)):
        of_it = features[:, 0] == relation
        x, y = features[of_it, 1:].astype(np.float64), survived[of_it].astype(np.float64)
        table.append([float(w) for w in _regressed(x, y, own)])
    return table


def _regressed(x: np.ndarray, y: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Weights of a logistic regression, pulled towards `start`, by Newton's method; the loss is convex and every step lowers it."""

    def loss(weights: np.ndarray) -> float:
        z = x @ weights
        return float((np.logaddexp(0.0, z) - y * z).sum() + 0.5 * _RIDGE * np.square(weights - start).sum())

    weights = start.copy()
    for _ in range(100):
        p = 0.5 * (1.0 + np.tanh(0.5 * (x @ weights)))
        gradient = x.T @ (p - y) + _RIDGE * (weights - start)
        curvature = (x * (p * (1 - p))[:, None]).T @ x + _RIDGE * np.eye(x.shape[1])
        step, now = np.linalg.solve(curvature, gradient), loss(weights)
        share = 1.0
        while share > 1e-6 and loss(weights - share * step) > now - 0.25 * share * float(gradient @ step):
            share /= 2
        if np.abs(share * step).max() < 1e-8 or share <= 1e-6:
            break
        weights = weights - share * step
    return weights
