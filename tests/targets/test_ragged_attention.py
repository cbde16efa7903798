"""Ragged passes against plain forwards of each row alone, in random pieces, on families that differ in their
attention.
"""

from __future__ import annotations

import random
import threading
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.cache.layout import RowLayout
from hf_dspark.errors import UnsupportedTargetError
from hf_dspark.targets import ragged_attention as ragged
from hf_dspark.targets.ragged_attention import PREFIX, RaggedPass, active_pass, ragged_attention
from hf_dspark.targets.target import Target
from tests.tiny import HIDDEN, VOCAB, tiny_llama, tiny_target

FAMILIES = ["llama", "mistral", "gemma2", "gemma3", "gpt2", "gpt_oss"]
TIGHT = {"rtol": 2e-4, "atol": 2e-4}


def make(family: str) -> Any:
    """A tiny model: of `tests.tiny`, or with soft-capped scores (gemma2), or with attention sinks (gpt_oss)."""
    if family not in ("gemma2", "gpt_oss"):
        return tiny_target(family)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "gemma2":
            # Eager: the oldest supported transformers leaves the soft-cap out under SDPA.
            config = Gemma2Config(**shape, attn_logit_softcapping=2.0, query_pre_attn_scalar=16, attn_implementation="eager")
            model = Gemma2ForCausalLM(config)
        else:
            config = GptOssConfig(
                **shape,
                num_local_experts=4,
                num_experts_per_tok=2,
                rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            )
            model = GptOssForCausalLM(config)
            for layer in model.model.layers:
                nn.init.normal_(layer.self_attn.sinks, std=2.0)
    return model.to(torch.float32).eval()


def random_rows(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCAB, (n,), generator=generator) for n in lengths]


@torch.no_grad()
def in_random_pieces(model: Any, rows: list[torch.Tensor], most: int, seed: int, wrong: bool = True) -> list[torch.Tensor]:
    """Logits of every row, read in passes over random runs of neighbouring rows, 1 to `most` tokens each.

    Between them, passes of wrong tokens are made and forgotten, as rejected drafts are.
    """
    rng, store, target = random.Random(seed), RowCache(), Target(model, [])
    store.add_rows(len(rows))
    read = [0] * len(rows)
    logits: list[list[torch.Tensor]] = [[] for _ in rows]
    with target.open():
        while any(length < len(row) for length, row in zip(read, rows, strict=True)):
            unfinished = [i for i, row in enumerate(rows) if read[i] < len(row)]
            first = last = rng.choice(unfinished)
            while last + 1 in unfinished and rng.random() < 0.8:
                last += 1
            chosen = range(first, last + 1)
            starts = [read[i] for i in chosen]
            counts = [rng.randint(1, min(most, len(rows[i]) - read[i])) for i in chosen]
            layout = RowLayout(starts, counts, first_row=first)
            if wrong and rng.random() < 0.5:
                target.forward(torch.randint(4, VOCAB, (layout.total,)), layout, store)
            flat = torch.cat([rows[i][s : s + n] for i, s, n in zip(chosen, starts, counts, strict=True)])
            out, _ = target.forward(flat, layout, store)
            for i, piece in zip(chosen, out.split(counts), strict=True):
                logits[i].append(piece)
                read[i] += len(piece)
    return [torch.cat(pieces) for pieces in logits]


@torch.no_grad()
def alone(model: Any, row: torch.Tensor) -> torch.Tensor:
    return model(input_ids=row[None], use_cache=False).logits[0]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("family", FAMILIES)
def test_random_pieces_equal_plain_forwards(family: str, seed: int) -> None:
    """Short pieces, as in verification: padded into one attention call a layer."""
    model, rows = make(family), random_rows([17, 3, 26, 1, 12], seed)
    for got, row in zip(in_random_pieces(model, rows, 6, seed), rows, strict=True):
        torch.testing.assert_close(got, alone(model, row), **TIGHT)


@pytest.mark.parametrize("family", FAMILIES)
def test_long_pieces_equal_plain_forwards(family: str) -> None:
    """Pieces above the limit, as in prompts, attend row by row, from the start of a row and from further on."""
    model, rows = make(family), random_rows([75, 40, 9], 5)
    for got, row in zip(in_random_pieces(model, rows, 45, 3), rows, strict=True):
        torch.testing.assert_close(got, alone(model, row), **TIGHT)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("limit", [0, 1000])
def test_both_branches_compute_the_same(monkeypatch: pytest.MonkeyPatch, family: str, limit: int) -> None:
    """Row by row for everything, or padded for everything: the choice is one of speed."""
    monkeypatch.setattr(ragged, "ROW_BY_ROW_TOKENS", limit)
    model, rows = make(family), random_rows([50, 4, 20], 7)
    for got, row in zip(in_random_pieces(model, rows, 40, 2), rows, strict=True):
        torch.testing.assert_close(got, alone(model, row), **TIGHT)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_models_own_implementation_does_not_matter(implementation: str) -> None:
    """A target loaded with eager attention is followed too."""
    model, rows = tiny_target("mistral"), random_rows([20, 7], 4)
    model.set_attn_implementation(implementation)
    for got, row in zip(in_random_pieces(model, rows, 5, 1), rows, strict=True):
        torch.testing.assert_close(got, alone(model, row), **TIGHT)
    assert model.config._attn_implementation == implementation


@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Other neighbours, other lengths beside it: a row's logits stay within rounding."""
    model, row = tiny_llama(), random_rows([10])[0]
    results = []
    for others in ([], [3], [30, 1, 12]):
        results.append(in_random_pieces(model, [row, *random_rows(others, len(others))], 4, 6)[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[2], results[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_join_behind_those_that_run() -> None:
    """A pass over the last rows only, named by `first_row`, leaves the first rows' tokens alone."""
    model, rows = tiny_llama(), random_rows([8, 5, 6], 9)
    store, target = RowCache(), Target(model, [])
    store.add_rows(1)
    with target.open():
        target.forward(rows[0][:7], RowLayout([0], [7]), store)
        store.add_rows(2)
        target.forward(torch.cat(rows[1:]), RowLayout([0, 0], [5, 6], first_row=1), store)
        logits, _ = target.forward(torch.stack([rows[0][7], rows[1][0], rows[2][0]]), RowLayout([7, 5, 6], [1, 1, 1]), store)
    torch.testing.assert_close(logits[0], alone(model, rows[0])[-1], **TIGHT)
    for row, got in zip(rows[1:], logits[1:], strict=True):
        torch.testing.assert_close(got, alone(model, torch.cat([row, row[:1]]))[-1], **TIGHT)


# ----------------------------------------------------------------------------------------------- manners of the patch


@torch.no_grad()
def test_another_thread_computes_plainly_while_a_pass_is_active() -> None:
    """A padded batch with a mask, called from another thread in the middle of a ragged pass, gives what it always
    gave; so does the pass.
    """
    model, rows = tiny_target("mistral"), random_rows([9, 4], 3)
    ids = torch.stack([rows[0], torch.cat([torch.zeros(5, dtype=torch.long), rows[1]])])
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    expected, got = model(input_ids=ids, attention_mask=mask).logits, []

    def interfere(module: nn.Module, args: Any, out: Any) -> None:
        if threading.current_thread() is threading.main_thread():

            def plain() -> None:
                with torch.no_grad():
                    got.append(model(input_ids=ids, attention_mask=mask).logits)

            other = threading.Thread(target=plain)
            other.start()
            other.join()

    store, target = RowCache(), Target(model, [])
    store.add_rows(2)
    handle = model.model.layers[1].register_forward_hook(interfere)
    with target.open():
        logits, _ = target.forward(torch.cat(rows), RowLayout([0, 0], [9, 4]), store)
    handle.remove()
    assert len(got) == 1
    assert torch.equal(got[0], expected)
    for row, piece in zip(rows, logits.split([9, 4]), strict=True):
        torch.testing.assert_close(piece, alone(model, row), **TIGHT)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
@torch.no_grad()
def test_a_plain_call_between_passes_is_untouched(family: str) -> None:
    """While the implementation is flipped but no pass is active, results are bit for bit the model's own."""
    model, ids = make(family), torch.stack(random_rows([20, 20]))
    expected = model(input_ids=ids).logits
    with ragged_attention(model):
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_the_implementation_comes_back_with_the_last_user() -> None:
    """Nested or overlapping users share one flip; the last to leave undoes it, an exception included."""
    model = tiny_llama()
    first, second = ExitStack(), ExitStack()
    first.enter_context(ragged_attention(model))
    second.enter_context(ragged_attention(model))
    assert model.config._attn_implementation == PREFIX + "sdpa"
    first.close()
    assert model.config._attn_implementation == PREFIX + "sdpa"
    with pytest.raises(ZeroDivisionError), second:
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"


def test_two_models_do_not_share_the_flip() -> None:
    """Each model counts its own users."""
    one, other = tiny_llama(), tiny_llama(1)
    with ragged_attention(one):
        assert one.config._attn_implementation == PREFIX + "sdpa"
        assert other.config._attn_implementation == "sdpa"


def test_unknown_attention_arguments_are_refused_by_name() -> None:
    """An argument that would change the result is named, not ignored."""
    q, kv = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    layout = RowLayout([0], [3])
    with active_pass(RaggedPass(layout)) as current, pytest.raises(UnsupportedTargetError, match="position_bias"):
        ragged._ragged_attention(current, nn.Identity(), q, kv, kv, position_bias=torch.zeros(1), is_causal=True, dropout=0.0)


def test_queries_of_another_shape_are_refused() -> None:
    """A model that reshapes its batch is told so, before wrong numbers come out."""
    q, kv = torch.randn(3, 4, 1, 8), torch.randn(3, 2, 1, 8)
    with (
        active_pass(RaggedPass(RowLayout([0, 0, 0], [1, 1, 1]))) as current,
        pytest.raises(UnsupportedTargetError, match="one key row each"),
    ):
        ragged._ragged_attention(current, nn.Identity(), q, kv, kv)
