"""Acceptance against exact expectations. Where chance enters, every value of it is gone through.

The grid: p_d are multiples of 1/4 and p_t of 1/32, so p_t / p_d is a multiple of 1/48 for p_d up to 3/4, and 48
equally spaced uniforms a position give acceptance probabilities without any error. The random source is replaced, the
code under test is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch

from hf_dspark.cache.layout import RowLayout
from hf_dspark.decoding import verify as verification
from hf_dspark.decoding.ngram_copy import Copied
from hf_dspark.decoding.sampling import uniform
from hf_dspark.decoding.verify import DraftBlock, Verdict, accept_greedy, accept_sampled
from tests.exact import chi_square

GRID = 48


def layout_of(lengths: list[int], past: int = 3) -> RowLayout:
    return RowLayout([past] * len(lengths), [1 + n for n in lengths])


def accept(p_t: torch.Tensor, block: DraftBlock, layout: RowLayout, generator: torch.Generator, blockwise: bool = False) -> Verdict:
    """With random numbers of this generator."""
    u = uniform((layout.num_rows, block.block_size + 1), p_t.device, generator)
    return accept_sampled(p_t, block, layout, u, blockwise=blockwise)


def dyadic(parts: int, size: int, generator: torch.Generator, largest: int | None = None) -> torch.Tensor:
    """A random distribution in multiples of 1 / parts, none above `largest` of them; zeros occur."""
    while True:
        drawn = torch.randint(0, size, (parts,), generator=generator).bincount(minlength=size)
        if largest is None or drawn.max() <= largest:
            return drawn.double() / parts


def grid_of_uniforms(rows: int, length: int) -> torch.Tensor:
    """Midpoints of the 48 cells of [0, 1), every combination over `length` positions; `rows` must be 48^length."""
    points = (torch.arange(GRID) + 0.5) / GRID
    grid = torch.cartesian_prod(*[points] * length).view(-1, length)
    assert len(grid) == rows
    return grid


def verdicts_over_the_grid(
    monkeypatch: pytest.MonkeyPatch,
    p_t: torch.Tensor,
    block: DraftBlock,
    layout: RowLayout,
    uniforms: torch.Tensor,
    blockwise: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accepted lengths `(R,)` and distribution of the next token `(R, V)` where `uniforms` decide."""
    seen: list[torch.Tensor] = []

    def keep(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        seen.append(weights.double())
        return weights.argmax(-1)

    with monkeypatch.context() as patch:
        patch.setattr(verification, "draw", keep)
        u = torch.nn.functional.pad(uniforms.double(), (0, 1))
        accepted = accept_sampled(p_t, block, layout, u, blockwise=blockwise).accepted
    return accepted, seen[0] / seen[0].sum(-1, keepdim=True)


@pytest.mark.parametrize("seed", range(8))
def test_one_drafted_token_gives_the_targets_distribution(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Averaged over every draft and every uniform, the first output token is distributed as p_t, to rounding."""
    generator, size = torch.Generator().manual_seed(seed), 5
    p_t, p_d = dyadic(32, size, generator), dyadic(4, size, generator, largest=3)
    output = torch.zeros(size, dtype=torch.float64)
    for x in p_d.nonzero().flatten().tolist():
        layout = layout_of([1] * GRID)
        block = DraftBlock(torch.full((GRID, 1), x), probs=p_d.float().expand(GRID, 1, -1), drawn=p_d[x].float().expand(GRID, 1))
        # After an accepted x comes whatever; only the anchor's distribution matters here.
        flat = p_t.float().expand(2 * GRID, -1)
        accepted, following = verdicts_over_the_grid(monkeypatch, flat, block, layout, grid_of_uniforms(GRID, 1))
        output[x] += p_d[x] * (accepted == 1).double().mean()
        output += p_d[x] * (following * (accepted == 0)[:, None]).sum(0) / GRID
    torch.testing.assert_close(output, p_t, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("reduced", [False, True])
def test_two_drafted_tokens_follow_leviathans_law(monkeypatch: pytest.MonkeyPatch, seed: int, reduced: bool) -> None:
    """P(output starts y_1) = p_t(y_1), P(y_1 stands) = min(p_t, p_d)(y_1), and the token after it is p_t's given y_1;
    exactly.

    Both distributions at position 2 depend on the token at position 1.
    """
    generator, size = torch.Generator().manual_seed(100 + seed), 4
    ids = torch.tensor([0, 2, 3]) if reduced else torch.arange(size)
    draft_size = len(ids)
    t_1, d_1 = dyadic(32, size, generator), dyadic(4, draft_size, generator, largest=3)
    t_2 = torch.stack([dyadic(32, size, generator) for _ in range(size)])
    d_2 = torch.stack([dyadic(4, draft_size, generator, largest=3) for _ in range(size)])
    t_3 = torch.stack([dyadic(32, size, generator) for _ in range(size)])
    uniforms, rows = grid_of_uniforms(GRID**2, 2), GRID**2
    layout = layout_of([2] * rows)

    first, stands = torch.zeros(size).double(), torch.zeros(size).double()
    second = torch.zeros(size, size).double()
    for i, j in product(range(draft_size), repeat=2):
        x, y = int(ids[i]), int(ids[j])
        weight = float(d_1[i] * d_2[x, j])
        if weight == 0:
            continue
        block = DraftBlock(
            torch.tensor([[x, y]]).expand(rows, 2),
            probs=torch.stack([d_1, d_2[x]]).float().expand(rows, 2, -1),
            draft_ids=ids if reduced else None,
            drawn=torch.stack([d_1[i], d_2[x, j]]).float().expand(rows, 2),
        )
        flat = torch.stack([t_1, t_2[x], t_3[y]]).float().repeat(rows, 1)
        accepted, following = verdicts_over_the_grid(monkeypatch, flat, block, layout, uniforms)
        share = weight / rows
        first += share * following[accepted == 0].sum(0)
        first[x] += share * (accepted >= 1).sum()
        stands[x] += share * (accepted >= 1).sum()
        second[x] += share * following[accepted == 1].sum(0)
        second[x, y] += share * (accepted == 2).sum()
    wide = torch.zeros(size).double()
    wide[ids] = d_1
    torch.testing.assert_close(first, t_1, rtol=0, atol=1e-6)
    torch.testing.assert_close(stands, torch.minimum(t_1, wide), rtol=0, atol=1e-6)
    torch.testing.assert_close(second, stands[:, None] * t_2, rtol=0, atol=1e-6)


@dataclass(frozen=True)
class Process:
    """Random p_t, p_d and copies after every sequence of tokens, and a budget that ends rows where it likes, by what stands before.

    Attributes:
        target, mixture (`dict`): distributions `(size,)` by what stands before; mixture is what drafts are drawn from.
        drafter, copies (`dict`): its parts: p_d over the draft vocabulary, and copied token, lambda and p_d of it.
        rows (`list`): drafted sequences up to where the budget ends them, each with its probability.
    """

    target: dict[tuple[int, ...], torch.Tensor]
    mixture: dict[tuple[int, ...], torch.Tensor]
    drafter: dict[tuple[int, ...], torch.Tensor]
    copies: dict[tuple[int, ...], tuple[int, float, float]]
    rows: list[tuple[tuple[int, ...], float]]


def process(seed: int, size: int, length: int, ids: torch.Tensor | None, copies: bool) -> Process:
    """Zeros occur in p_t and p_d; copies also where lambda is 0, and outside the draft vocabulary."""
    generator = torch.Generator().manual_seed(seed)

    def pick(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    def distribution(n: int) -> torch.Tensor:
        parts = torch.rand(n, generator=generator) ** 3 * (torch.rand(n, generator=generator) > 0.2)
        parts[pick(n)] += 0.1
        return parts / parts.sum()

    known = torch.arange(size) if ids is None else ids
    found = Process({}, {}, {}, {}, [])
    ends = set()
    for before in (b for n in range(length + 1) for b in product(range(size), repeat=n)):
        found.target[before], found.drafter[before] = distribution(size), distribution(len(known))
        wide = torch.zeros(size)
        wide[known] = found.drafter[before]
        copy, weight = pick(size), (0.0, 0.4, 0.9)[pick(3)] if copies else 0.0
        found.copies[before] = copy, weight, float(wide[copy])
        found.mixture[before] = (1 - weight) * wide + weight * torch.nn.functional.one_hot(torch.tensor(copy), size)
        if len(before) == length or (before and pick(4) == 0):
            ends.add(before)

    def draft(before: tuple[int, ...], share: float) -> None:
        if before in ends:
            found.rows.append((before, share))
            return
        for x in found.mixture[before].nonzero().flatten().tolist():
            draft((*before, x), share * float(found.mixture[before][x]))

    draft((), 1.0)
    return found


@pytest.mark.parametrize("copies", [False, True], ids=["heads", "copies"])
@pytest.mark.parametrize("reduced", [False, True], ids=["whole", "reduced"])
@pytest.mark.parametrize("seed", range(4))
def test_over_the_block_every_text_is_as_likely_as_the_targets(seed: int, reduced: bool, copies: bool) -> None:
    """In closed form, to 1e-6: over all drafts that a budget with ends of its own lets through, every sequence of up to three tokens comes
    out as often as p_t has it, counting what follows a round's last token as p_t's own. All rows are judged in one ragged call whose draft
    record holds them in another order, with anything at all behind their ends.
    """
    size, length = 4, 3
    ids = torch.tensor([0, 2, 3]) if reduced else None
    p = process(seed, size, length, ids, copies)
    lengths = [len(tokens) for tokens, _ in p.rows]
    count, longest, generator = len(p.rows), max(lengths), torch.Generator().manual_seed(seed)
    assert longest > 0
    order = torch.randperm(count, generator=generator)
    tokens, drawn = torch.randint(size, (count, longest), generator=generator), torch.rand(count, longest, generator=generator)
    probs = torch.rand(count, longest, size if ids is None else len(ids), generator=generator)
    copied, weights, p_copy = torch.zeros(count, longest).long(), torch.zeros(count, longest), torch.zeros(count, longest)
    flat = []
    for row, (drafted, _) in enumerate(p.rows):
        for k, x in enumerate(drafted):
            tokens[row, k], drawn[row, k], probs[row, k] = x, p.mixture[drafted[:k]][x], p.drafter[drafted[:k]]
            copied[row, k], weights[row, k], p_copy[row, k] = p.copies[drafted[:k]]
        flat += [p.target[drafted[:k]] for k in range(len(drafted) + 1)]
    # As it is recorded where a dtype rounds it: in other amounts, each with its own sum.
    stored, mass = torch.empty_like(probs), torch.rand(count, longest, generator=generator) + 0.5
    stored[order] = probs
    stored *= mass[..., None]
    record = Copied(copied, weights, p_copy) if copies else None
    block = DraftBlock(tokens, probs=stored, draft_ids=ids, drawn=drawn, places=order, copied=record, mass=mass)
    layout, p_t = layout_of(lengths), torch.stack(flat)
    prefix = verification._prefix_weights(p_t[layout.padded_index[:, :longest], tokens], drawn)
    within = torch.arange(1, longest + 1) < layout.added[:, None]
    chances = (verification._prefix_chances(prefix, p_t, block, layout, within) if longest > 1 else prefix).double()
    after = [
        verification._after(p_t, block, layout, torch.full((count,), k).minimum(layout.added - 1), prefix).double()
        for k in range(longest + 1)
    ]
    emitted: dict[tuple[int, ...], torch.Tensor] = {}
    for row, (drafted, share) in enumerate(p.rows):
        for k in range(len(drafted), -1, -1):
            keeps = share * (float(chances[row, k - 1]) if k else 1.0)
            share -= keeps
            follows = after[k][row] / after[k][row].sum()
            emitted[drafted[:k]] = emitted.get(drafted[:k], torch.zeros(size).double()) + keeps * follows
    for text in (t for n in range(1, length + 1) for t in product(range(size), repeat=n)):
        drawn_last = sum(float(emitted[text[:k]][text[k]]) * chain(p.target, text, k + 1) for k in range(len(text)) if text[:k] in emitted)
        kept = sum(float(value.sum()) for before, value in emitted.items() if before[: len(text)] == text)
        assert drawn_last + kept == pytest.approx(chain(p.target, text, 0), abs=1e-6)


def random_process(seed: int, size: int, length: int) -> tuple[dict[tuple[int, ...], torch.Tensor], dict[tuple[int, ...], torch.Tensor]]:
    """p_t and p_d, float32 `(size,)`, after every sequence of up to `length` tokens; zeros occur in both."""
    generator = torch.Generator().manual_seed(seed)
    befores = [before for n in range(length + 1) for before in product(range(size), repeat=n)]
    p_t = {before: dyadic(32, size, generator).float() for before in befores}
    return p_t, {before: dyadic(8, size, generator, largest=7).float() for before in befores}


def kept_and_next(
    p_t: dict[tuple[int, ...], torch.Tensor], p_d: dict[tuple[int, ...], torch.Tensor], drafted: tuple[int, ...], n: int, blockwise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each number of tokens is kept out of a drafted sequence, `(length + 1,)`, and what then follows, `(length + 1, size)`.

    Over 40 000 stratified uniforms a position: a frequency is off by a standard deviation of less than 0.0025.
    """
    befores = [drafted[:k] for k in range(n + 1)]
    generator, draws = torch.Generator().manual_seed(hash(drafted) % 2**31), 40_000
    uniforms = torch.stack([(torch.randperm(draws, generator=generator) + 0.5) / draws for _ in range(n)], dim=1)
    block = DraftBlock(
        torch.tensor([drafted]).expand(draws, n),
        probs=torch.stack([p_d[before] for before in befores[:-1]]).expand(draws, n, -1),
        drawn=torch.stack([p_d[before][x] for before, x in zip(befores[:-1], drafted, strict=True)]).expand(draws, n),
    )
    flat = torch.stack([p_t[before] for before in befores]).repeat(draws, 1)
    with pytest.MonkeyPatch.context() as patch:
        accepted, following = verdicts_over_the_grid(patch, flat, block, layout_of([n] * draws), uniforms, blockwise)
    kept = torch.bincount(accepted, minlength=n + 1) / draws
    after = torch.zeros(n + 1, following.shape[1]).double()
    for k in accepted.unique().tolist():
        after[k] = following[accepted == k].mean(0)
    return kept.double(), after


def chain(p: dict[tuple[int, ...], torch.Tensor], tokens: tuple[int, ...], first: int) -> float:
    """Probability of the tokens from place `first` on, behind those before."""
    value = 1.0
    for k in range(first, len(tokens)):
        value *= float(p[tokens[:k]][tokens[k]])
    return value


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_no_exact_rule_keeps_more_than_over_the_block(seed: int) -> None:
    """Kept tokens are those of the best rule there is, found prefix by prefix: no prefix can stand more often than p_t has it, nor than
    it is drafted, nor than the one before it times p_t. Token by token keeps fewer.
    """
    size, n = 3, 3
    p_t, p_d = random_process(10 + seed, size, n)

    def best(prefix: tuple[int, ...], stands: float) -> float:
        """The most that can be kept behind a prefix which stands so often, drafted or not."""
        total = 0.0
        for x in range(size):
            longer = (*prefix, x)
            more = min(stands * float(p_t[prefix][x]), chain(p_d, longer, 0))
            total += more + (best(longer, more) if len(longer) < n else 0.0)
        return total

    means = {True: 0.0, False: 0.0}
    for drafted in product(range(size), repeat=n):
        for blockwise in means:
            if (share := chain(p_d, drafted, 0)) > 0:
                kept, _ = kept_and_next(p_t, p_d, drafted, n, blockwise)
                means[blockwise] += share * float((kept * torch.arange(n + 1)).sum())
    assert means[True] == pytest.approx(best((), 1.0), abs=0.015)
    assert means[False] < means[True] - 0.02


def test_the_example_of_block_verification() -> None:
    """Sun et al. 2024, section 2: p_t = (1/3, 2/3) and p_d = (2/3, 1/3) at both positions keep 10/9 tokens one by one, 11/9 together."""
    p_t, p_d = torch.tensor([1, 2]) / 3, torch.tensor([2, 1]) / 3
    rows = 400_000  # a mean is off by less than 0.006 with odds above 1 - 1e-6
    tokens = torch.multinomial(p_d, 2 * rows, replacement=True, generator=torch.Generator().manual_seed(0)).view(rows, 2)
    block = DraftBlock(tokens, probs=p_d.expand(rows, 2, -1), drawn=p_d[tokens])
    for blockwise, expected in ((False, 10 / 9), (True, 11 / 9)):
        verdict = accept(p_t.expand(3 * rows, -1), block, layout_of([2] * rows), torch.Generator().manual_seed(1), blockwise=blockwise)
        assert float(verdict.accepted.float().mean()) == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("blockwise", [False, True], ids=["token", "block"])
def test_rows_of_different_length_are_judged_as_if_alone(monkeypatch: pytest.MonkeyPatch, blockwise: bool) -> None:
    """In one ragged call, every row's verdict equals that of a call with this row only, whatever its l_r."""
    generator = torch.Generator().manual_seed(3)
    lengths, size, gamma = [2, 0, 4, 1, 3, 4, 0], 6, 4
    layout = layout_of(lengths)
    p_t = torch.randn(layout.total, size, generator=generator).softmax(-1)
    probs = torch.randn(len(lengths), gamma, size, generator=generator).softmax(-1)
    tokens = torch.multinomial(probs.view(-1, size), 1, generator=generator).view(-1, gamma)
    drawn = probs.gather(-1, tokens[..., None])[..., 0]
    uniforms = 0.7 * torch.rand(len(lengths), gamma, generator=generator)
    block = DraftBlock(tokens, probs=probs, drawn=drawn)
    accepted, following = verdicts_over_the_grid(monkeypatch, p_t, block, layout, uniforms, blockwise)
    outcomes, first = set(), 0
    for row, n in enumerate(lengths):
        own = slice(row, row + 1)
        alone = DraftBlock(tokens[own, :n], probs=probs[own, :n], drawn=drawn[own, :n])
        piece = p_t[first : first + n + 1]
        expected, weights = verdicts_over_the_grid(monkeypatch, piece, alone, layout_of([n]), uniforms[own, :n], blockwise)
        assert accepted[row] == expected[0]
        torch.testing.assert_close(following[row], weights[0])
        outcomes.add((int(expected[0]), n))
        first += n + 1
    assert any(a == n > 0 for a, n in outcomes)  # some rows end with a bonus,
    assert any(a < n for a, n in outcomes)  # some with a correction


@pytest.mark.parametrize("blockwise", [False, True], ids=["token", "block"])
def test_equal_distributions_always_accept_and_never_give_nan(blockwise: bool) -> None:
    """p_t == p_d leaves no residual; everything stands and the bonus comes from p_t."""
    p = torch.tensor([0.1, 0.2, 0.0, 0.7])
    rows = 500
    tokens = torch.multinomial(p.expand(rows, -1), 3, replacement=True, generator=torch.Generator().manual_seed(0))
    block = DraftBlock(tokens, probs=p.expand(rows, 3, -1), drawn=p[tokens])
    verdict = accept(p.expand(4 * rows, -1), block, layout_of([3] * rows), torch.Generator().manual_seed(1), blockwise=blockwise)
    assert (verdict.accepted == 3).all()
    assert set(verdict.next_token.tolist()) <= {0, 1, 3}


def test_a_rejection_without_residual_falls_back_to_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rounding rejects although p_t == p_d, the correction is drawn from p_t, not from NaN."""
    p_t = torch.tensor([0.25, 0.75])
    block = DraftBlock(torch.tensor([[0]]), probs=p_t.view(1, 1, 2), drawn=p_t[:1].view(1, 1))
    above = torch.full((1, 1), 1.0)  # beyond what a uniform can be: forces the rejection
    accepted, following = verdicts_over_the_grid(monkeypatch, p_t.expand(2, 2), block, layout_of([1]), above)
    assert accepted.tolist() == [0]
    torch.testing.assert_close(following[0], p_t.double())


def test_a_token_that_the_target_forbids_never_stands() -> None:
    """p_t(x) = 0 rejects for every uniform, zero included, and the correction is p_t."""
    p_t, p_d = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    rows = 1000
    block = DraftBlock(torch.zeros(rows, 1, dtype=torch.long), probs=p_d.expand(rows, 1, -1), drawn=torch.ones(rows, 1))
    verdict = accept(p_t.expand(2 * rows, -1), block, layout_of([1] * rows), torch.Generator().manual_seed(0))
    assert (verdict.accepted == 0).all()
    assert (verdict.next_token == 1).all()


@pytest.mark.parametrize("rows", [1, 3])
def test_zero_length_drafts_draw_from_the_target(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Without drafted tokens the next token comes from p_t whole, not from a residual."""
    p_t = torch.randn(rows, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    block = DraftBlock(torch.empty(rows, 0, dtype=torch.long))
    accepted, following = verdicts_over_the_grid(monkeypatch, p_t, block, layout_of([0] * rows), torch.empty(rows, 0))
    assert accepted.tolist() == [0] * rows
    torch.testing.assert_close(following, p_t.double())


def test_a_block_cut_to_nothing_keeps_no_token() -> None:
    """Truncating to zero tokens empties every field: no slice of minus zero."""
    block = DraftBlock(torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3), torch.ones(2, 3, 4), None, torch.ones(2, 3)).truncate(0)
    assert block.block_size == 0
    assert (block.tokens.shape, block.confidence.shape, block.probs.shape, block.drawn.shape) == (
        (2, 0),
        (2, 0),
        (2, 0, 4),
        (2, 0),
    )


def test_truncating_cuts_every_field_alike() -> None:
    """The record is cut whole, and ids of a reduced vocabulary stay."""
    probs, ids = torch.rand(2, 3, 4), torch.tensor([1, 5, 6, 9])
    block = DraftBlock(torch.arange(6).view(2, 3), torch.rand(2, 3), probs, ids, torch.rand(2, 3))
    cut = block.truncate(2)
    assert torch.equal(cut.tokens, torch.tensor([[0, 1], [3, 4]]))
    assert torch.equal(cut.probs, probs[:, :2])
    assert torch.equal(cut.confidence, block.confidence[:, :2])
    assert torch.equal(cut.drawn, block.drawn[:, :2])
    assert cut.draft_ids is ids
    assert DraftBlock(block.tokens).truncate(1).probs is None


def test_an_arg_max_draft_is_judged_alike_by_both_rules() -> None:
    """Where drafts are certain, prefixes stand by the product of their p_t either way: over 200 000 rows as many stand (a frequency is off
    by less than 0.006 with odds above 1 - 1e-6)."""
    rows = 200_000
    p_t = torch.tensor([[0.3, 0.7], [0.6, 0.4], [0.5, 0.5]])
    block = DraftBlock(torch.tensor([[1, 0]]).expand(rows, 2))
    for blockwise in (False, True):
        verdict = accept(p_t.repeat(rows, 1), block, layout_of([2] * rows), torch.Generator().manual_seed(2), blockwise=blockwise)
        kept = torch.bincount(verdict.accepted, minlength=3) / rows
        assert kept.tolist() == pytest.approx([0.3, 0.7 * 0.4, 0.7 * 0.6], abs=0.006)
        assert set(verdict.next_token[verdict.accepted == 0].tolist()) == {0}
        assert set(verdict.next_token[verdict.accepted == 1].tolist()) == {1}


def test_an_arg_max_draft_counts_as_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without p_d a token stands with probability p_t(x), and the correction is p_t without x: the law of a one-hot
    q.
    """
    p_t = torch.tensor([6, 18, 24, 0.0]) / 48
    block = DraftBlock(torch.full((GRID, 1), 1))
    accepted, following = verdicts_over_the_grid(
        monkeypatch, p_t.expand(2 * GRID, -1), block, layout_of([1] * GRID), grid_of_uniforms(GRID, 1)
    )
    assert int(accepted.sum()) == 18
    torch.testing.assert_close(following[accepted == 0][0], torch.tensor([0.2, 0.0, 0.8, 0.0]).double())
    hot = torch.nn.functional.one_hot(block.tokens, 4).float()
    same = DraftBlock(block.tokens, probs=hot, drawn=torch.ones(GRID, 1))
    again = verdicts_over_the_grid(monkeypatch, p_t.expand(2 * GRID, -1), same, layout_of([1] * GRID), grid_of_uniforms(GRID, 1))
    assert torch.equal(again[0], accepted)
    torch.testing.assert_close(again[1], following)


@pytest.mark.parametrize("blockwise", [False, True], ids=["token", "block"])
def test_a_reduced_vocabulary_equals_the_widened_one(monkeypatch: pytest.MonkeyPatch, blockwise: bool) -> None:
    """p_d over draft ids gives the verdicts of the same p_d with zeros elsewhere."""
    generator = torch.Generator().manual_seed(4)
    ids, size, rows, gamma = torch.tensor([1, 2, 5, 6]), 8, 40, 3
    lengths = torch.randint(0, gamma + 1, (rows,), generator=generator).tolist()
    layout = layout_of(lengths)
    p_t = torch.randn(layout.total, size, generator=generator).softmax(-1)
    probs = torch.randn(rows, gamma, 4, generator=generator).softmax(-1)
    own = torch.multinomial(probs.view(-1, 4), 1, generator=generator).view(rows, gamma)
    drawn = probs.gather(-1, own[..., None])[..., 0]
    wide = torch.zeros(rows, gamma, size)
    wide[..., ids] = probs
    uniforms, length = torch.rand(rows, gamma, generator=generator), max(lengths)
    reduced = DraftBlock(ids[own], probs=probs, draft_ids=ids, drawn=drawn).truncate(length)
    widened = DraftBlock(ids[own], probs=wide, drawn=drawn).truncate(length)
    one = verdicts_over_the_grid(monkeypatch, p_t, reduced, layout, uniforms, blockwise)
    other = verdicts_over_the_grid(monkeypatch, p_t, widened, layout, uniforms, blockwise)
    assert torch.equal(one[0], other[0])
    torch.testing.assert_close(one[1], other[1])
    assert (one[1][:, [0, 3, 4, 7]] > 0).any()


def test_with_real_randomness_the_output_fits_the_target() -> None:
    """Nothing replaced: 40 000 rows of two drafted tokens, the first output token by chi-square; false-alarm odds
    1e-6, seeds fixed.
    """
    generator = torch.Generator().manual_seed(8)
    rows, size = 40_000, 6
    p_t = torch.randn(3, size, generator=generator).softmax(-1)
    p_d = torch.randn(2, size, generator=generator).softmax(-1)
    tokens = torch.stack([torch.multinomial(p, rows, replacement=True, generator=generator) for p in p_d], dim=1)
    drawn = torch.stack([p_d[k][tokens[:, k]] for k in range(2)], dim=1)
    block = DraftBlock(tokens, probs=p_d.expand(rows, -1, -1), drawn=drawn)
    verdict = accept(p_t.repeat(rows, 1), block, layout_of([2] * rows), generator)
    first = torch.where(verdict.accepted > 0, tokens[:, 0], verdict.next_token)
    exact = {(i,): p for i, p in enumerate((p_t[0].double() / p_t[0].double().sum()).tolist())}
    assert chi_square([(i,) for i in first.tolist()], exact).p_value > 1e-6


@pytest.mark.parametrize("lengths", [[3, 3], [0, 0], [2, 0, 3, 1]], ids=str)
def test_greedy_keeps_tokens_while_the_target_agrees(lengths: list[int]) -> None:
    """Against a straight loop over rows, for agreement cut off at every place and drafts longer than what was
    verified.
    """
    generator = torch.Generator().manual_seed(5)
    layout, gamma = layout_of(lengths), 3
    for _ in range(60):
        tokens = torch.randint(0, 2, (len(lengths), gamma), generator=generator)[:, : max(lengths)]
        choice = torch.randint(0, 2, (layout.total,), generator=generator)
        verdict: Verdict = accept_greedy(choice, DraftBlock(tokens), layout)
        first = 0
        for row, n in enumerate(lengths):
            stands = 0
            while stands < n and tokens[row, stands] == choice[first + stands]:
                stands += 1
            assert verdict.accepted[row] == stands
            assert verdict.next_token[row] == choice[first + stands]
            first += n + 1
