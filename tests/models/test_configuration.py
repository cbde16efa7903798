"""DSparkConfig: what it accepts, what it refuses, and what it reads from a target's config."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen3Config

from hf_dspark.configuration_dspark import DSparkConfig, check_tapped_layers, spread_taps
from tests.tiny import FAMILIES

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 0}, "block_size must be an integer of at least 1"),
        ({"num_target_layers": 0}, "num_target_layers"),
        ({"target_layer_ids": []}, "non-empty list"),
        ({"target_layer_ids": [1, 1]}, "strictly increasing"),
        ({"target_layer_ids": [9, 1]}, "strictly increasing"),
        ({"target_layer_ids": [-2, 1]}, "must be in -1..34"),
        ({"target_layer_ids": [1, 36]}, "must be in -1..34"),
        ({"target_layer_ids": [1, 35]}, "must not hold the last layer"),
        ({"mask_token_id": 97}, r"0\.\.96; got 97"),
        ({"mask_token_id": -1}, r"0\.\.96; got -1"),
        ({"markov_rank": -1}, "markov_rank"),
        ({"markov_head_type": "lstm"}, "must be one of"),
        ({"markov_rank": 0, "confidence_head_with_markov": True}, "confidence_head_with_markov needs"),
        ({"draft_vocab_size": 98}, r"1\.\.97"),
        ({"target_hidden_size": 64}, "must equal hidden_size"),
        ({"confidence_temperatures": [1.0] * 6}, "7 block positions; got 6"),
        ({"confidence_temperatures": [1.0] * 6 + [0.0]}, "positive and finite"),
        ({"num_attention_heads": 3}, "multiple of num_key_value_heads"),
        ({"head_dim": 7}, "must be even"),
        ({"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "sliding_attention"),
        ({"num_hidden_layers": 1, "layer_types": ["chunked_attention"]}, "full_attention"),
        ({"backbone": "mamba"}, "backbone must be one of"),
        ({"attention_k_eq_v": True}, "attention_k_eq_v is for"),
        ({"copy_weights": [0.5, 1.0]}, "probabilities below 1"),
        ({"copy_weights": [0.1] * 65}, "1 to 64"),
        ({"copy_confidence": [[0.0] * 8] * 4}, "without copy_weights"),
        ({"copy_weights": [0.1], "copy_confidence": [[0.0] * 8] * 3 + [[0.0] * 4]}, "of 8 finite numbers, or of 4"),
        ({"copy_weights": [0.1], "copy_confidence": [[float("nan")] * 8] * 4}, "finite"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
    ],
)
def test_impossible_values_are_refused(fields: dict, message: str) -> None:
    """A value out of range, or two that contradict each other, is a ValueError that says what is allowed."""
    with pytest.raises(ValueError, match=message):
        DSparkConfig(**{**SMALL, **fields})


def test_round_trip_through_json_preserves_every_field(tmp_path) -> None:
    """What save_pretrained writes, from_pretrained reads back unchanged, and AutoConfig finds the type."""
    config = DSparkConfig(
        **SMALL,
        block_size=3,
        target_layer_ids=[-1, 4],
        mask_token_id=5,
        draft_vocab_size=40,
        confidence_temperatures=[1.0, 1.5, 2.0],
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is DSparkConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}


def test_confidence_feature_follows_the_head_by_default() -> None:
    """The Markov feature is on with a sequential head and off without one, or without a confidence head."""
    assert DSparkConfig(**SMALL).confidence_head_with_markov is True
    assert DSparkConfig(**SMALL, markov_rank=0).confidence_head_with_markov is False
    assert DSparkConfig(**SMALL, enable_confidence_head=False).confidence_head_with_markov is False


@pytest.mark.parametrize(
    ("layers", "taps"),
    [(36, [1, 9, 17, 25, 33]), (40, [1, 10, 19, 28, 37]), (30, [1, 8, 14, 21, 27]), (3, [0, 1]), (2, [0]), (1, [-1])],
)
def test_taps_spread_as_in_the_released_checkpoints(layers: int, taps: list[int]) -> None:
    """Qwen3-4B/8B and 14B get their published taps; shallow targets get what they have, never the last layer."""
    assert spread_taps(layers, 5) == taps


def test_spread_taps_are_always_valid() -> None:
    """For every depth the spread is accepted: in range, in order, never the last layer."""
    for layers in range(1, 50):
        for taps in (1, 2, 5, 8):
            check_tapped_layers(spread_taps(layers, taps), layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_a_config_of_its_own_shape(family: str) -> None:
    """Vocabulary, width, depth and special tokens are the target's in every family."""
    target = FAMILIES[family][1]()
    config = DSparkConfig.from_target_config(target, mask_token_id=3)
    assert (config.vocab_size, config.hidden_size, config.num_target_layers) == (97, 32, 4)
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (2, 1, 0)
    assert config.target_model_type == target.get_text_config().model_type


def test_gpt2_names_and_missing_rope_are_understood() -> None:
    """n_embd, n_head, n_inner and activation_function are read, and RoPE is the default one."""
    config = DSparkConfig.from_target_config(GPT2Config(n_embd=48, n_head=4, n_layer=5, n_inner=100))
    assert (config.hidden_size, config.head_dim, config.num_key_value_heads, config.intermediate_size) == (48, 12, 4, 100)
    assert (config.hidden_act, config.rms_norm_eps) == ("gelu_new", 1e-5)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_scaled_rope_is_copied_and_length_dependent_rope_is_not() -> None:
    """YaRN and llama3 scaling come from the target; dynamic scaling becomes default RoPE with the target's theta."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 4096}
    config = DSparkConfig.from_target_config(Qwen3Config(rope_parameters=dict(yarn)))
    assert {key: config.rope_parameters[key] for key in yarn} == yarn
    dynamic = LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 5e5, "factor": 2.0})
    assert DSparkConfig.from_target_config(dynamic).rope_parameters == {"rope_type": "default", "rope_theta": 5e5}


def test_nested_rope_uses_the_full_attention_entry() -> None:
    """Gemma 3 has two RoPE entries; the drafter, which attends to everything, takes the one of full attention."""
    target = Gemma3TextConfig(
        num_hidden_layers=4,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    assert DSparkConfig.from_target_config(target).rope_parameters == target.rope_parameters["full_attention"]
