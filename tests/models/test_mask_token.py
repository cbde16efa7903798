"""The mask token of a new drafter: given and checked, or chosen from the tokenizer."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hf_dspark.models.mask_token import choose_mask_token_id
from hf_dspark.models.modeling_dspark import DSparkDrafter
from tests.tiny import EOS, PAD, VOCAB, tiny_llama


def make_tokenizer(added: dict[str, bool], template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of 10 words plus added tokens (text -> whether special)."""
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(10)}, unk_token="w0"))
    raw.add_tokens([AddedToken(text, special=is_special) for text, is_special in added.items()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("added", "special", "template", "vocab_size", "expected"),
    [
        ({"<eos>": True, "<mask>": True, "<x>": True}, {"eos_token": "<eos>", "mask_token": "<mask>"}, None, 13, 11),
        ({"<eos>": True, "<x>": True}, {"eos_token": "<eos>"}, None, 16, 15),
        ({"<eos>": True, "<gh_stars>": True, "<x>": True}, {"eos_token": "<eos>"}, None, 13, 11),
        ({"<reserved_0>": True, "<reserved_1>": True, "<eos>": True}, {"eos_token": "<eos>"}, None, 13, 11),
        ({"<eos>": True, "<x>": True, "<turn>": True}, {"eos_token": "<eos>"}, "<turn>{{ messages }}", 13, 11),
        ({"<eos>": True, "<unused0>": False}, {"eos_token": "<eos>"}, None, 12, 11),
    ],
)
def test_the_mask_token_is_one_that_text_does_not_use(added, special, template, vocab_size, expected) -> None:
    """Own mask token, unused embedding row, spare name, then any special token outside the chat template."""
    assert choose_mask_token_id(make_tokenizer(added, template, **special), vocab_size) == expected


def test_a_tokenizer_without_a_spare_token_is_refused() -> None:
    """A tokenizer whose only special token ends the text (GPT-2's kind) gives an error that names the argument."""
    with pytest.raises(ValueError, match="Pass mask_token_id="):
        choose_mask_token_id(make_tokenizer({"<eos>": True}, eos_token="<eos>"), 11)


@pytest.mark.parametrize(("mask", "message"), [*((mask, "mask_token_id") for mask in (EOS, PAD, VOCAB, -1)), (None, "tokenizer=")])
def test_a_mask_token_in_use_or_outside_the_vocabulary_is_refused(mask: int | None, message: str) -> None:
    """The mask is not the target's eos or pad token, has an embedding row, and is not guessed without a tokenizer."""
    with pytest.raises(ValueError, match=message):
        DSparkDrafter.from_target(tiny_llama(), mask_token_id=mask)
