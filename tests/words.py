"""A tokenizer of one token a word for tiny targets: id i is the word `wi`, except for special ids."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast


def word_tokenizer(config: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with the vocabulary and special ids of a target's config, without a chat template."""
    special = {config.pad_token_id: "<pad>", config.bos_token_id: "<bos>", config.eos_token_id: "<eos>"}
    vocabulary = {special.get(index, f"w{index}"): index for index in range(config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
