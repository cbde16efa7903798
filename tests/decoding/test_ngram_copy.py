"""Copies and their mixture against straight-line searches and sums; what configs and records of copying must say."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dspark import CheckpointError, DSparkDrafter
from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.calibration.records import check_calibration
from hf_dspark.configuration_dspark import COPY_FEATURES, COPY_RELATIONS
from hf_dspark.decoding.draft import draft_block
from hf_dspark.decoding.ngram_copy import Copied, Copies, adjusted
from hf_dspark.decoding.state import State
from tests.searched import agreed, searched
from tests.tiny import VOCAB, tiny_drafter, tiny_target

WEIGHTS = [0.1, 0.3, 0.5, 0.9]


def test_copies_on_an_accelerator_take_two_bytes_a_place_and_length() -> None:
    """No tensor of the search is larger than a byte for each row, place and length of a copy; a meta device stands for the accelerator."""
    rows, width, lengths, largest = 16, 1000, 32, 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view:
                largest = max(largest, out.numel() * out.element_size())
            return out

    ids, ends = torch.zeros(rows, width, dtype=torch.long, device="meta"), torch.full((rows, 1), width, device="meta")
    with Sizes():
        Copies(ids, ends, ends[:, 0], [0.5] * lengths, 4)
    assert rows * width * lengths <= largest <= 1.1 * rows * width * lengths


def test_copies_are_what_a_search_finds() -> None:
    """Over rows of any length, joined, appended to, reordered and drafted for, copies are those of a search: how long, from where, and how
    often the text went on so.
    """
    dice = random.Random(0)
    for _ in range(60):
        alphabet, longest = dice.randint(1, 5), dice.randint(1, 6)
        rows = [[dice.randrange(alphabet) for _ in range(dice.randint(1, 30))] for _ in range(dice.randint(1, 5))]
        state = State(torch.device("cpu"))
        given = [dice.randint(1, len(row)) for row in rows]
        padding = [dice.randint(0, 3) for _ in rows]
        texts = [torch.tensor([0] * pad + row) for pad, row in zip(padding, rows, strict=True)]
        masks = [torch.arange(len(text)) >= pad for pad, text in zip(padding, texts, strict=True)]
        state.add_rows(range(len(rows)), texts, masks)
        state.prompt_ends = [n + masked for n, masked in zip(given, state.masked, strict=True)]
        state.anchors = torch.zeros(len(rows), dtype=torch.long)
        for _ in range(3):
            drawn = torch.tensor([[dice.randrange(alphabet) for _ in range(4)] for _ in rows])
            kept = [dice.randint(1, 4) for _ in rows]
            state.commit(drawn, kept, drawn[:, 0])
            rows = [row + more[:n] for row, more, n in zip(rows, drawn.tolist(), kept, strict=True)]
        if len(rows) > 1:
            state.remove_rows(dice.sample(range(len(rows)), dice.randint(0, len(rows) - 1)))
            rows, given = [rows[old] for old in state.requests], [given[old] for old in state.requests]
        some = None if dice.random() < 0.5 else sorted(dice.sample(range(len(rows)), dice.randint(1, len(rows))))
        weights = [0.5 / (m + 1) for m in range(longest)]
        copies = Copies.of_rows(state, some, weights, 4)
        chosen = list(range(len(rows))) if some is None else some
        looked_at = [list(rows[row]) for row in chosen]
        for _ in range(4):
            for place, row in enumerate(looked_at):
                length, source = searched(row, longest)
                assert copies.lengths[place] == length
                assert copies.weight[place] == pytest.approx(weights[length - 1] if length else 0.0)
                if length:
                    assert copies.tokens[place] == row[source]
                    assert copies.from_prompt[place] == (source < given[chosen[place]])
                    alike = [row[end + 1] for end in range(len(row) - 1) if agreed(row, end) >= min(length, 2)]
                    assert copies.agreement()[0][place] == alike.count(row[source])
                    assert copies.agreement()[1][place] == len(alike) - alike.count(row[source])
            more = [dice.randrange(alphabet) for _ in looked_at]
            copies.extend(torch.tensor(more))
            looked_at = [[*row, token] for row, token in zip(looked_at, more, strict=True)]


def test_masked_tokens_are_never_copied() -> None:
    """Behind a match that stands right before a masked token nothing is proposed; an earlier match with a successor counts instead."""
    ids = torch.tensor([[5, 6, -1, -1, 5, 6], [5, 6, 7, 5, 6, -1]])
    ids = torch.cat([ids, torch.tensor([[0, 0], [5, 6]])], dim=1)
    copies = Copies(ids, torch.tensor([[6], [8]]), torch.tensor([6, 6]), [0.5, 0.6], 3)
    assert copies.weight.tolist() == [0.0, pytest.approx(0.6)]
    assert copies.tokens[1] == 7


def drafted(drafter: DSparkDrafter, text: list[int], sample: bool, rows: int = 1, **options: object) -> tuple[object, Copies]:
    """Blocks of a bound drafter whose context is empty, behind a text."""
    cache, ids = RowCache(), torch.tensor([text] * rows)
    cache.add_rows(rows)
    ends = torch.full((rows,), len(text))
    copies = Copies(ids, ends[:, None], ends, drafter.config.copy_weights, drafter.config.block_size)
    anchors = torch.full((rows,), text[-1])
    generator = torch.Generator().manual_seed(0)
    block = draft_block(
        drafter, anchors, [0] * rows, cache, length=drafter.config.block_size, sample=sample, generator=generator, copies=copies, **options
    )
    return block, copies


@pytest.mark.parametrize("reduced", [False, True], ids=["whole", "reduced"])
@torch.no_grad()
def test_drafted_tokens_are_drawn_from_the_mixture(reduced: bool) -> None:
    """The first token of 20,000 blocks comes as often as (1 - lambda) p_d + lambda [x = copy] says (chi-square; false alarm 1e-4), also
    where the drafter could not say the copied token itself; and the recorded probability of each token is that of the mixture.
    """
    from tests.exact import chi_square

    target = tiny_target()
    ids = torch.arange(0, VOCAB, 2) if reduced else None
    drafter = tiny_drafter(target, draft_token_ids=ids, copy_weights=[0.2, 0.4]).bind(target)
    text, copy = [5, 8, 13, 21, 5, 8], 13
    rows = 20_000
    block, _ = drafted(drafter, text, True, rows)
    wide = drafter.widen(block.probs[0, 0].double())
    exact = 0.6 * wide
    exact[copy] += 0.4
    assert exact.sum() == pytest.approx(1.0, abs=1e-6)
    exact = exact / exact.sum()
    outcomes = [(int(token),) for token in block.tokens[:, 0]]
    assert chi_square(outcomes, {(t,): float(p) for t, p in enumerate(exact) if p > 0}).p_value > 1e-4
    # A draw that knows nothing of the copy is told apart.
    assert chi_square([o for o in outcomes if o != (copy,)], {(t,): float(p) for t, p in enumerate(exact) if p > 0}).p_value < 1e-4
    torch.testing.assert_close(block.drawn[:, 0].double(), exact[block.tokens[:, 0]], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        block.copied.mixture(drafter.widen(block.probs))[:50].gather(-1, block.tokens[:50, :, None])[..., 0], block.drawn[:50]
    )


@torch.no_grad()
def test_greedy_drafts_take_the_most_likely_token_of_the_mixture() -> None:
    """At every position, given the tokens before it, from the logits that drafting without copies has there."""
    target = tiny_target()
    for weight in (0.01, 0.3, 0.9):
        drafter = tiny_drafter(target, copy_weights=[weight] * 3).bind(target)
        text = [5, 8, 13, 21, 5, 8]
        block, _ = drafted(drafter, text, False)
        cache = RowCache()
        cache.add_rows(1)
        h = drafter.draft_hidden(torch.tensor([text[-1]]), [0], cache, drafter.config.block_size)
        base, state, so_far = drafter.base_logits(h), drafter.markov_head.initial_state(h[:, 0]), list(text)
        for k in range(drafter.config.block_size):
            latent, state = drafter.markov_head.step(torch.tensor([so_far[-1]]), h[:, k], state)
            p = (base[:, k] + drafter.markov_head.project(latent))[0].softmax(-1)
            length, source = searched(so_far, 3)
            if length:
                p = (1 - weight) * p
                p[so_far[source]] += weight
            assert block.tokens[0, k] == p.argmax()
            so_far.append(int(p.argmax()))


@pytest.mark.parametrize("width", [4, 8])
@torch.no_grad()
def test_confidences_follow_the_table(width: int) -> None:
    """c_k is read off the row of the table that belongs to the copy's relation to the draft, linear in the named features; a table of the
    first four of them leaves the others out.
    """
    target = tiny_target()
    table = [[0.1, 1.0, 9.0, 0.2], [1.0, 0.5, 0.3, 0.1], [2.0, 0.1, 1.0, 0.0], [-1.0, 0.7, -0.2, 0.4]]
    table = [[*row, 0.5 - r, 0.3 * r, 0.7, -0.2][:width] for r, row in enumerate(table)]
    drafter = tiny_drafter(target, copy_weights=[0.3, 0.6], copy_confidence=table).bind(target)
    prompt = [5, 8, 13, 21, 5, 8]
    block, _ = drafted(drafter, prompt, False, with_confidence=True)
    copied = block.copied
    for k in range(drafter.config.block_size):
        text = [*prompt, *block.tokens[0, :k].tolist()]
        length, source = searched(text, 2)
        follow = [text[end + 1] for end in range(len(text) - 1) if length and agreed(text, end) >= length]
        agree = follow.count(text[source]) if length else 0
        differ = len(follow) - agree
        weight, relation = float(copied.weights[0, k]), int(copied.relation[0, k])
        assert bool(weight) == bool(length)
        odds = torch.logit(torch.tensor(weight)).item() if weight else 0.0
        best = float(torch.logit(copied.best[0, k].exp()))
        of_copy = [float(source < len(prompt)), math.log((agree + 0.5) / (differ + 0.5)), float(agree > 1 and not differ)]
        of_copy.append(float(torch.logit(copied.p_d[0, k], eps=1e-3)))
        one = [1.0, float(copied.confidence[0, k]), odds, best, *(of_copy if weight else [0.0] * 4)][:width]
        assert COPY_RELATIONS[relation] == ("none" if not weight else COPY_RELATIONS[relation])
        assert float(block.confidence_logits[0, k]) == pytest.approx(
            sum(a * b for a, b in zip(table[relation], one, strict=True)), abs=1e-4
        )
    assert copied.relation[0, 0] in (2, 3)


def test_the_identity_table_leaves_confidences_alone() -> None:
    """A row 0, 1, 0, 0 gives the confidence head's own logit."""
    raw = torch.randn(3, 4)
    some = torch.rand(3, 4)
    whole = torch.zeros(3, 4).long()
    copied = Copied(whole, some, some, torch.randint(4, (3, 4)), -some, some > 0.5, whole + 2, whole, raw)
    for more in (0, 4):
        torch.testing.assert_close(adjusted(copied.features(), [[0.0, 1.0, 0.0, 0.0, *[0.0] * more]] * 4), raw)
    with pytest.raises(RuntimeError, match="with_confidence"):
        replace(copied, confidence=None).features()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"copy_weights": []}, "1 to 64"),
        ({"copy_weights": [0.5] * 65}, "1 to 64"),
        ({"copy_weights": [0.5, 1.0]}, "below 1"),
        ({"copy_weights": [-0.1]}, "below 1"),
        ({"copy_weights": [float("nan")]}, "below 1"),
        ({"copy_weights": 0.5}, "1 to 64"),
        ({"copy_confidence": [[0.0] * 4] * 4}, "without copy_weights"),
        ({"copy_weights": [0.5], "copy_confidence": [[0.0] * 4] * 3}, "4 rows"),
        ({"copy_weights": [0.5], "copy_confidence": [[0.0] * 3] * 4}, "4 rows"),
        ({"copy_weights": [0.5], "copy_confidence": [*[[0.0] * 8] * 3, [0.0] * 4]}, "of 8 finite numbers, or of 4"),
        ({"copy_weights": [0.5], "copy_confidence": [[0.0] * 5] * 4}, "4 rows"),
        ({"copy_weights": [0.5], "copy_confidence": 4}, "4 rows"),
        ({"copy_weights": [0.5], "copy_confidence": [[float("inf")] * 4] * 4}, "finite"),
    ],
)
def test_what_is_no_copying_is_refused(fields: dict[str, object], message: str) -> None:
    """A config and a calibration record refuse the same, each naming what is allowed."""
    with pytest.raises(ValueError, match=message):
        tiny_drafter(tiny_target(), **fields)
    copying = {"weights": fields.get("copy_weights"), "confidence": fields.get("copy_confidence")}
    with pytest.raises(CheckpointError, match=message):
        check_calibration({"format": 1, "temperatures": [1.0] * 7, "copying": copying}, 7, "x")
    assert (len(COPY_RELATIONS), len(COPY_FEATURES)) == (4, 8)
