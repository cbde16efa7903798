"""Prompts, plain generation as the oracle, and drafters that know a target's greedy transitions, so that much is
accepted untrained."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_dspark import DSparkDrafter, GenerateDSparkOutput
from hf_dspark.adapters.lora import check_peft
from tests.tiny import VOCAB, tiny_drafter, tiny_target


def _peft_is_too_old() -> bool:
    try:
        check_peft()
    except RuntimeError:
        return True
    return False


needs_adapters = pytest.mark.skipif(_peft_is_too_old(), reason="the installed transformers asks for a newer peft")

# An end-of-sequence id that no tiny target can emit.
NEVER = VOCAB + 1
BUDGETS = ["full", "static:0", "static:2", "threshold:0.5"]
RAGGED = (9, 4, 13, 1, 7, 5, 11, 2)


def random_prompts(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    """One list of ordinary token ids a length; no special ids among them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def left_padded(rows: list[list[int]], width: int = 0) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of a batch, at least `width` wide."""
    width = max(width, *map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def plain(target: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    """transformers' own greedy generation (unless `options` say otherwise): the oracle."""
    return target.generate(**inputs, **{"max_new_tokens": 24, "do_sample": False, "eos_token_id": NEVER, **options})


def speculate(target: Any, drafter: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    """The same call with a drafter."""
    return plain(target, inputs, assistant_model=drafter, **options)


def counts(output: GenerateDSparkOutput) -> tuple[int, int]:
    """Accepted and verified tokens of all rows."""
    return sum(r.accepted for r in output.stats.rows), sum(r.verified for r in output.stats.rows)


def bigram_drafter(
    target: PreTrainedModel, prompts: list[list[int]], head: str = "vanilla", wrong_every: int = 12, **fields: Any
) -> DSparkDrafter:
    """A real drafter whose sequential head holds the target's greedy transitions as a table.

    W1 is the identity and W2 the table, so that the head says which token follows which; of every `wrong_every` known
    transitions one is made wrong, so that rejections are frequent too. Gates are opened, recurrent states ignored.

    Args:
        target (`PreTrainedModel`): from `tiny_target`.
        prompts (`list[list[int]]`): whose greedy continuations are known.
        head (`str`): `"vanilla"`, `"gated"` or `"rnn"`.
        wrong_every (`int`): 0 for no wrong transition.
        fields: arguments of `DSparkDrafter.from_target`.
    """
    drafter = tiny_drafter(target, head, markov_rank=VOCAB, **fields)
    seen: Counter[tuple[int, int]] = Counter()
    for row in plain(target, left_padded(prompts), max_new_tokens=40)[:, -41:].tolist():
        seen.update(pairwise(row))
    follows = {token: following for (token, following), _ in sorted(seen.items(), key=lambda item: item[1])}
    place = {int(token): index for index, token in enumerate(drafter.draft_token_ids)} if drafter.draft_token_ids is not None else None
    with torch.no_grad():
        drafter.markov_head.markov_w1.weight.copy_(torch.eye(VOCAB))
        table = drafter.markov_head.markov_w2.weight.zero_()
        for number, (token, following) in enumerate(follows.items()):
            if wrong_every and number % wrong_every == wrong_every - 1:
                following = (following + 1) % VOCAB
            following = following if place is None else place.get(following, -1)
            if following >= 0:
                table[following, token] = 60.0
        if head == "gated":
            drafter.markov_head.gate_proj.weight.zero_()
            drafter.markov_head.gate_proj.bias.fill_(20.0)
        elif head == "rnn":
            joint = drafter.markov_head.joint_proj
            joint.weight.zero_()
            joint.bias.zero_()
            joint.weight[2 * VOCAB :, VOCAB : 2 * VOCAB] = 20.0 * torch.eye(VOCAB)
        # Spread the confidences around one half, whatever the random backbone says.
        if drafter.confidence_head is not None:
            drafter.confidence_head.proj.weight.mul_(2.0)
            drafter.confidence_head.proj.bias.zero_()
    return drafter


@dataclass(frozen=True)
class World:
    """A target, prompts of eight lengths, and a drafter that knows most of what follows them."""

    target: PreTrainedModel
    prompts: list[list[int]]
    drafter: DSparkDrafter

    def inputs(self, rows: int) -> dict[str, torch.Tensor]:
        return left_padded(self.prompts[:rows])


def make_world(target: PreTrainedModel, head: str = "vanilla", **fields: Any) -> World:
    prompts = random_prompts(RAGGED)
    return World(target, prompts, bigram_drafter(target, prompts, head, **fields))


def talking_target(family: str = "llama", loudness: float = 5.0) -> PreTrainedModel:
    """A tiny target whose next token depends much on the last one, and on the rest of the text too: its embeddings are
    made larger."""
    target = tiny_target(family)
    with torch.no_grad():
        target.get_input_embeddings().weight.mul_(loudness)
    return target


@functools.cache
def world(family: str = "llama") -> World:
    """The world of a family, made once; whoever changes target or drafter makes a world of their own."""
    return make_world(talking_target(family))


@functools.cache
def _plain_tokens(family: str, rows: int) -> torch.Tensor:
    w = world(family)
    return plain(w.target, w.inputs(rows))


def plain_tokens(family: str, rows: int) -> torch.Tensor:
    """Plain greedy continuation of the first `rows` prompts of `world(family)`, computed once."""
    return _plain_tokens(family, rows).clone()
