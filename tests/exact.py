"""Exact distributions of short continuations, and the chi-square test that samples are held against. Knows no drafter.

The enumeration runs the target plainly: one prefix, one row, no cache, no padding, a straight loop over the tree of
continuations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_dspark.models.modeling_dspark import DSparkDrafter

VOCAB, EOS = 6, 0
# Fewest expected samples in a cell of a chi-square test; rarer outcomes are pooled.
POOL_BELOW = 5.0
# Without a sequential head c_k depends on h_k alone; this puts about half of the scores above 0.
NEUTRAL_BIAS = 12.0

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Warping:
    """Sampling options, as `generate` takes them and as transformers' own classes apply them."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `generate`."""
        return {"do_sample": True, **self.__dict__}

    def processors(self) -> LogitsProcessorList:
        """The same rules in the order of `generate`: processors, then temperature, top-k, top-p."""
        rules = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            rules.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature != 1.0:
            rules.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            rules.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            rules.append(TopPLogitsWarper(self.top_p))
        return rules

    def __str__(self) -> str:
        short = {"temperature": "T", "top_k": "k", "top_p": "p", "repetition_penalty": "r"}
        given = [f"{short[n]}{v:g}" for n, v in self.__dict__.items() if v != type(self).__dataclass_fields__[n].default]
        return "-".join(given) or "T1"


def small_llama(seed: int = 0) -> LlamaForCausalLM:
    """A random Llama of 6 tokens, 3 layers, width 16, whose next-token distributions are neither flat nor certain."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.35,
        eos_token_id=EOS,
        pad_token_id=EOS,
        bos_token_id=EOS,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(torch.float32).eval()


def small_drafter(target: LlamaForCausalLM, head: str = "vanilla", seed: int = 1, **fields: Any) -> DSparkDrafter:
    """A random drafter of block 3 that is often wrong and often right, with an adversarial confidence head.

    Where there is a sequential head, c_k is close to 0 or to 1 depending on x_{k-1} alone: three tokens give 0, three
    give 1.
    """
    arguments: dict[str, Any] = {
        "num_hidden_layers": 1,
        "block_size": 3,
        "target_layer_ids": [0, 1],
        "mask_token_id": 5,
        "markov_rank": 0 if head == "none" else 4,
        "markov_head_type": "vanilla" if head == "none" else head,
        **fields,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drafter = DSparkDrafter.from_target(target, **arguments)
        with torch.no_grad():
            for name, parameter in drafter.named_parameters():
                if "norm" not in name:
                    parameter.copy_(0.4 * torch.randn_like(parameter))
            score = drafter.confidence_head.proj
            if head != "none":
                # An affine score of W1's rows that is +4 for tokens 1, 3, 5 and -4 for the others.
                embedded = drafter.markov_head.markov_w1.weight
                embedded.normal_()
                wanted = torch.tensor([-4.0, 4.0] * (VOCAB // 2))
                embedded[:, 0] = wanted
                score.weight.zero_()
                score.weight[0, score.in_features - embedded.shape[1]] = 1.0
                score.bias.zero_()
            else:
                score.weight.mul_(5.0)
                score.bias.fill_(NEUTRAL_BIAS)
    return drafter


@torch.no_grad()
def exact_distribution(target: LlamaForCausalLM, prompt: Sequence[int], tokens: int, warping: Warping) -> dict[Tokens, float]:
    """Probability of every continuation of `tokens` tokens, shorter where it ends with EOS; float64, sums to 1.

    Args:
        target: run plainly, one prefix at a time.
        prompt (`list[int]`): without padding.
        tokens (`int`): depth of the tree.
        warping (`Warping`): applied by transformers' own classes to each conditional.
    """
    rules = warping.processors()
    open_prefixes: dict[Tokens, float] = {(): 1.0}
    finished: dict[Tokens, float] = {}
    for _ in range(tokens):
        longer: dict[Tokens, float] = {}
        for prefix, probability in open_prefixes.items():
            ids = torch.tensor([[*prompt, *prefix]])
            logits = target(input_ids=ids).logits[:, -1].float()
            conditional = rules(ids, logits)[0].double().softmax(-1)
            for token, p in enumerate(conditional.tolist()):
                if p > 0.0:
                    (finished if token == EOS else longer)[(*prefix, token)] = probability * p
        open_prefixes = longer
    return {**finished, **open_prefixes}


def outcomes(sequences: torch.Tensor, prompt_length: int, tokens: int) -> list[Tokens]:
    """The first `tokens` generated tokens of each row of `generate`'s result, cut behind the first EOS."""
    cut = []
    for row in sequences[:, prompt_length : prompt_length + tokens].tolist():
        cut.append(tuple(row[: row.index(EOS) + 1] if EOS in row else row))
    return cut


@dataclass(frozen=True)
class Fit:
    """Pearson's statistic; two of independent samples add up."""

    statistic: float
    freedom: int
    impossible: int = 0

    def __add__(self, other: Fit) -> Fit:
        return Fit(self.statistic + other.statistic, self.freedom + other.freedom, self.impossible + other.impossible)

    @property
    def p_value(self) -> float:
        """Probability of a statistic as large from right samples: the chi-square survival function Q(k / 2, x / 2)."""
        if self.impossible:
            return 0.0
        half = torch.tensor([self.freedom / 2, self.statistic / 2], dtype=torch.float64)
        return float(torch.special.gammaincc(half[0], half[1]))


def chi_square(samples: Sequence[Tokens], exact: dict[Tokens, float]) -> Fit:
    """Pearson's chi-square of samples against an exact distribution; rare outcomes share cells, impossible ones are
    counted apart.
    """
    counts = Counter(samples)
    assert math.isclose(sum(exact.values()), 1.0, abs_tol=1e-9)
    impossible = sum(n for outcome, n in counts.items() if outcome not in exact)
    cells: list[list[float]] = []
    pool = [0.0, 0.0]
    for outcome, probability in sorted(exact.items(), key=lambda item: item[1]):
        pool = [pool[0] + len(samples) * probability, pool[1] + counts[outcome]]
        if pool[0] >= POOL_BELOW:
            cells.append(pool)
            pool = [0.0, 0.0]
    if cells:
        cells[-1] = [cells[-1][0] + pool[0], cells[-1][1] + pool[1]]
    statistic = sum((observed - expected) ** 2 / expected for expected, observed in cells)
    return Fit(statistic, max(len(cells) - 1, 0), impossible)
