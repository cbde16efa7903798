"""Configuration of a DSpark drafter, checked once, here. Knows PreTrainedConfig; knows no tensors and no decoding."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from transformers import PreTrainedConfig, Qwen3Config

logger = logging.getLogger(__name__)

MARKOV_HEAD_TYPES = ("vanilla", "gated", "rnn")

# Only frequencies that never change with the length of the text: the keys of the context stay in the drafter's cache,
# rotated once.
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")
BACKBONES = ("qwen3", "gemma4")
# Copying: what a copy says about the drafter's own most likely token (no match, the same token, another one that wins against it, one that
# loses), and what survival is read off for each: 1, the confidence head's logit, logit(lambda_m), logit(p_d) of that token, whether the
# copy stands before the answer, log-odds that the text goes on so where its last tokens stood before, whether it always does, and
# logit(p_d) of the copy. Tables of the first four are read too.
COPY_RELATIONS = ("none", "agrees", "wins", "loses")
COPY_FEATURES = ("one", "confidence", "copy", "draft", "prompt", "agreement", "unanimous", "drafted")
_FEWEST_FEATURES = 4
# Matches longer than this are as good as this long.
LONGEST_COPY = 64
_ROPE_KEYS = {
    *("rope_type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast"),
    *("beta_slow", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim", "truncate"),
}


class DSparkConfig(Qwen3Config):
    """Shape of the backbone (a Qwen3 stack), of its heads, and of the target that it belongs to.

    Keys that DeepSpec's checkpoints have too keep DeepSpec's meaning. Every value is checked at construction.

    Source: paper sections 3.1 and 3.2; key names of deepseek-ai/DeepSpec. Differs: taps on the target's last layer are
    refused.

    Args:
        block_size (`int`): gamma, tokens drafted a round.
        sample_from_anchor (`bool`): whether the anchor's slot is the first that predicts (DSpark). Where not (z-lab's DFlash), the
            block has one slot more, and the first mask's slot predicts the token at its own place.
        num_target_layers (`int`, *optional*): decoder layers of the target; `None` where the checkpoint's format does not say.
        vocab_size (`int`): V of the target; 0 where the checkpoint's format does not say, which a drafter without heads can do without.
        target_layer_ids (`list[int]`): taps, strictly increasing; i is the output of the target's decoder layer i, -1
            its embeddings.
        mask_token_id (`int`, *optional*): token id fed at block positions 2..gamma; a drafter cannot be built without
            one.
        markov_rank (`int`): rank r of the sequential head; 0 is no head (DFlash).
        markov_head_type (`str`): `"vanilla"` (Eq. 5), `"gated"` or `"rnn"` (Eq. 6).
        enable_confidence_head (`bool`): whether the drafter predicts c_k (Eq. 7).
        confidence_head_with_markov (`bool`, *optional*): feed W1[x_{k-1}] to the confidence head; default: if there is
            a sequential head.
        num_anchors (`int`): anchors a training sequence, as trained; unused when decoding.
        draft_vocab_size (`int`, *optional*): tokens that the drafter can propose; `None` is the whole vocabulary.
        target_hidden_size (`int`, *optional*): width of the target; must equal `hidden_size`, whose embedding and head
            are borrowed.
        target_model_type (`str`, *optional*): the target's `model_type`, for messages and model cards.
        target_name (`str`, *optional*): the target's name or path, for messages and model cards.
        confidence_temperatures (`list[float]`, *optional*): T_1..T_gamma of Sequential Temperature Scaling (section
            3.2.1).
        copy_weights (`list[float]`, *optional*): lambda_1..lambda_M of copying: how far what followed an earlier occurrence of the last m
            tokens is drafted instead; None drafts from the heads alone. Not in the paper; see `hf_dspark.decoding.ngram_copy`.
        copy_confidence (`list[list[float]]`, *optional*): `(4, 8)` or `(4, 4)`, c_k where copies are drafted too.
        backbone (`str`): `"qwen3"`, or `"gemma4"` (four norms a layer, unscaled scores, normed values, a scalar a layer).
        attention_k_eq_v (`bool`): values are the keys before norm and rotation; `"gemma4"` only.
        raw_embeddings (`bool`): read the target's embedding rows and logits as stored, without the scaling and soft-cap that some
            families put around them. So trained: speculators' drafters.
        layer_types, sliding_window: layers of type `"sliding_attention"` let a query see keys that lie fewer than `sliding_window`
            positions before it; within the block all see all. Needs `use_sliding_window=True`.
        window_from_anchor (`bool`): count the window from the anchor for all slots of a block, not from each slot.
        causal_sliding_block (`bool`): in sliding layers a slot does not see the slots behind it.
    Raises:
        ValueError: if a value is out of range or contradicts another one.
    """

    model_type = "dspark"

    num_hidden_layers: int = 5
    block_size: int = 7
    sample_from_anchor: bool = True
    num_target_layers: int | None = 36
    target_layer_ids: list[int] | tuple[int, ...] = (1, 9, 17, 25, 33)
    mask_token_id: int | None = None
    markov_rank: int = 256
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool | None = None
    num_anchors: int = 512
    draft_vocab_size: int | None = None
    target_hidden_size: int | None = None
    target_model_type: str | None = None
    target_name: str | None = None
    confidence_temperatures: list[float] | tuple[float, ...] | None = None
    copy_weights: list[float] | tuple[float, ...] | None = None
    copy_confidence: list[list[float]] | None = None
    backbone: str = "qwen3"
    attention_k_eq_v: bool = False
    raw_embeddings: bool = False
    window_from_anchor: bool = False
    causal_sliding_block: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.target_layer_ids = list(self.target_layer_ids)
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        if self.confidence_head_with_markov is None:
            self.confidence_head_with_markov = self.markov_rank > 0
        if not self.enable_confidence_head:
            self.confidence_head_with_markov = False
        if self.confidence_temperatures is not None:
            self.confidence_temperatures = [float(t) for t in self.confidence_temperatures]
        if isinstance(self.copy_weights, tuple):
            self.copy_weights = list(self.copy_weights)
        self.tie_word_embeddings = False
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        _check_positive(
            block_size=self.block_size,
            num_hidden_layers=self.num_hidden_layers,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
        )
        if self.num_target_layers is not None:
            _check_positive(num_target_layers=self.num_target_layers)
        if self.vocab_size != 0 or self.markov_rank or self.draft_vocab_size is not None:
            _check_positive(vocab_size=self.vocab_size)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads; got {self.num_attention_heads} and "
                f"{self.num_key_value_heads}. Use the target's own pair."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even, because RoPE rotates pairs; got {self.head_dim}. Pass head_dim=.")
        check_tap_ids(self.target_layer_ids, self.num_target_layers)
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < (self.vocab_size or self.mask_token_id + 1):
            raise ValueError(
                f"mask_token_id must be a row of the target's embedding, 0..{self.vocab_size - 1}; got "
                f"{self.mask_token_id}. "
                "Choose a token that the tokenizer does not use in text."
            )
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {BACKBONES}; got {self.backbone!r}.")
        if self.attention_k_eq_v and self.backbone != "gemma4":
            raise ValueError(f"attention_k_eq_v is for the backbone 'gemma4'; got {self.backbone!r}.")
        if self.markov_rank < 0:
            raise ValueError(f"markov_rank must be 0 (no sequential head) or positive; got {self.markov_rank}.")
        if self.markov_head_type not in MARKOV_HEAD_TYPES:
            raise ValueError(f"markov_head_type must be one of {MARKOV_HEAD_TYPES}; got {self.markov_head_type!r}.")
        if self.confidence_head_with_markov and self.markov_rank == 0:
            raise ValueError(
                "confidence_head_with_markov needs the sequential head's W1, but markov_rank is 0. "
                "Pass confidence_head_with_markov=False or a positive markov_rank."
            )
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size must be 1..{self.vocab_size} (the target's vocabulary) or None; got {self.draft_vocab_size}."
            )
        if self.target_hidden_size != self.hidden_size:
            raise ValueError(
                f"target_hidden_size ({self.target_hidden_size}) must equal hidden_size ({self.hidden_size}): the "
                "drafter borrows "
                "the target's embedding and head."
            )
        check_temperatures(self.confidence_temperatures, self.block_size)
        check_copying(self.copy_weights, self.copy_confidence)
        kinds = set(self.layer_types or ())
        if kinds - {"full_attention", "sliding_attention"} or len(self.layer_types or ()) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types must name 'full_attention' or 'sliding_attention' for each of the {self.num_hidden_layers} drafter "
                f"layers; got {self.layer_types}."
            )
        if "sliding_attention" in kinds and (self.sliding_window is None or self.sliding_window <= self.block_size):
            raise ValueError(
                f"Layers with 'sliding_attention' need use_sliding_window=True and a sliding_window longer than a block "
                f"({self.block_size}); got {self.sliding_window}. Pass both, or layer_types=None."
            )
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in STATIC_ROPE_TYPES:
            raise ValueError(
                f"rope_parameters['rope_type'] must be one of {STATIC_ROPE_TYPES}; got {rope_type!r}. A drafter keeps "
                "rotated keys in "
                "its cache, so frequencies must not depend on the length of the text."
            )

    @property
    def block_slots(self) -> int:
        """Slots of a whole block: gamma, and one more where the anchor's predicts nothing."""
        return self.block_size + self.first_slot

    @property
    def first_slot(self) -> int:
        """The first slot that predicts: 0 (the anchor's) or 1."""
        return 0 if self.sample_from_anchor else 1

    @classmethod
    def from_target_config(
        cls,
        target_config: PreTrainedConfig,
        *,
        num_hidden_layers: int = 2,
        block_size: int = 7,
        mask_token_id: int | None = None,
        target_layer_ids: list[int] | None = None,
        num_taps: int = 5,
        markov_rank: int = 256,
        intermediate_size: int | None = None,
        **kwargs: Any,
    ) -> DSparkConfig:
        """Build the configuration of a drafter that fits a target.

        Width, heads, head size, norm epsilon, activation, RoPE, vocabulary and special tokens are the target's (read
        through its text config, so multimodal targets and GPT-2's key names work). RoPE whose frequencies depend on the
        length of the text, and targets without RoPE, give default RoPE with the target's theta or 10,000.

        Args:
            target_config (`PreTrainedConfig`): the target's configuration.
            num_hidden_layers (`int`): layers of the drafter.
            block_size (`int`): gamma.
            mask_token_id (`int`, *optional*): see the class.
            target_layer_ids (`list[int]`, *optional*): taps; by default `num_taps` of them, spread by `spread_taps`.
            num_taps (`int`): number of taps when they are not given; fewer where the target has fewer layers.
            markov_rank (`int`): rank of the sequential head, 0 for none.
            intermediate_size (`int`, *optional*): width of the drafter's MLP; by default the target's.
            kwargs: any other field of `DSparkConfig`.
        Returns:
            `DSparkConfig`.
        Raises:
            ValueError: if the target's config lacks what a drafter needs, or a value is out of range.
        """
        text = target_config.get_text_config(decoder=True)
        missing = [
            name for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size") if getattr(text, name, None) is None
        ]
        if missing:
            raise ValueError(
                f"The config of target type {text.model_type!r} has no {', '.join(missing)}; a drafter needs a "
                "decoder-only language "
                "model. Pass the causal LM, not another part of it."
            )
        num_target_layers = text.num_hidden_layers
        heads = text.num_attention_heads
        fields: dict[str, Any] = {
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": intermediate_size or _intermediate_size(text),
            "num_attention_heads": heads,
            "num_key_value_heads": _first(text, "num_key_value_heads") or heads,
            "head_dim": _first(text, "head_dim") or text.hidden_size // heads,
            "hidden_act": _first(text, "hidden_act", "hidden_activation", "activation_function") or "silu",
            "rms_norm_eps": _first(text, "rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps") or 1e-6,
            "max_position_embeddings": _first(text, "max_position_embeddings") or 32768,
            "initializer_range": _first(text, "initializer_range") or 0.02,
            "attention_bias": bool(_first(text, "attention_bias")),
            "rope_parameters": _rope_parameters(text),
            "target_hidden_size": text.hidden_size,
            "target_model_type": text.model_type,
            "target_name": getattr(target_config, "_name_or_path", None) or None,
            **{name: _first(text, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")},
        }
        if target_layer_ids is None:
            target_layer_ids = spread_taps(num_target_layers, num_taps)
        return cls(
            **{
                **fields,
                "num_hidden_layers": num_hidden_layers,
                "num_target_layers": num_target_layers,
                "target_layer_ids": target_layer_ids,
                "block_size": block_size,
                "mask_token_id": mask_token_id,
                "markov_rank": markov_rank,
                **kwargs,
            }
        )


def spread_taps(num_target_layers: int, num_taps: int = 5) -> list[int]:
    """Spread taps evenly from the second layer to the third from last; never the last layer.

    Gives the taps of the released checkpoints: 36 layers: 1, 9, 17, 25, 33; 40 layers: 1, 10, 19, 28, 37. A target too
    shallow for that is tapped from its first layer to its last but one, at fewer places where it has fewer; a target of
    one layer at its embeddings.

    Args:
        num_target_layers (`int`): decoder layers of the target.
        num_taps (`int`): how many, at most.
    Returns:
        `list[int]`: strictly increasing layer ids.
    Raises:
        ValueError: if either number is below 1.
    """
    _check_positive(num_target_layers=num_target_layers, num_taps=num_taps)
    if num_target_layers == 1:
        return [-1]
    first, last = 1, num_target_layers - 3
    if last - first + 1 < num_taps:
        first, last = 0, num_target_layers - 2
    count = min(num_taps, last - first + 1)
    if count == 1:
        return [last]
    step = (last - first) / (count - 1)
    return [first + int(i * step + 0.5) for i in range(count)]


def check_tap_ids(tap_ids: Sequence[int], num_target_layers: int | None) -> None:
    """Refuse taps that are out of range, unordered, or on the target's last layer.

    Args:
        tap_ids (`list[int]`): layer ids, -1 for the embeddings.
        num_target_layers (`int`, *optional*): decoder layers of the target; without it only the order is checked.
    Raises:
        ValueError: naming the first rule that is broken.
    """
    if not tap_ids or any(isinstance(i, bool) or not isinstance(i, int) for i in tap_ids):
        raise ValueError(f"target_layer_ids must be a non-empty list of integers; got {tap_ids}.")
    if any(b <= a for a, b in pairwise(tap_ids)):
        raise ValueError(f"target_layer_ids must be strictly increasing; got {tap_ids}.")
    if num_target_layers is None:
        if tap_ids[0] < -1:
            raise ValueError(f"target_layer_ids must be -1 (the embeddings) or more; got {tap_ids}.")
        return
    if tap_ids[0] < -1 or tap_ids[-1] >= num_target_layers:
        raise ValueError(
            f"target_layer_ids must lie in -1..{num_target_layers - 2} for a target of {num_target_layers} layers; got {tap_ids}."
        )
    if tap_ids[-1] == num_target_layers - 1:
        raise ValueError(
            f"target_layer_ids must not hold the last layer ({num_target_layers - 1}); got {tap_ids}. Its hidden state "
            "is reported "
            "after the final norm by some versions of transformers and before it by others: tap an earlier layer."
        )


def check_temperatures(temperatures: Sequence[float] | None, block_size: int) -> None:
    """Refuse calibration temperatures that do not fit the block.

    Args:
        temperatures (`list[float]`, *optional*): T_1..T_gamma; `None` is uncalibrated and passes.
        block_size (`int`): gamma.
    Raises:
        ValueError: if there are not gamma of them, or one is not positive and finite.
    """
    if temperatures is None:
        return
    if len(temperatures) != block_size:
        raise ValueError(
            f"confidence_temperatures must hold one temperature for each of the {block_size} block positions; got "
            f"{len(temperatures)}. "
            "Calibrate again with this block size."
        )
    if not all(0.0 < t < float("inf") for t in temperatures):
        raise ValueError(f"confidence_temperatures must be positive and finite; got {temperatures}.")


def check_copying(weights: Sequence[float] | None, table: Sequence[Sequence[float]] | None) -> None:
    """Refuse lambdas or a table that are none.

    Args:
        weights (`list[float]`, *optional*): lambda_1..lambda_M in [0, 1); None is no copying.
        table (`list[list[float]]`, *optional*): `(4, 8)` or `(4, 4)`, finite; needs weights.
    Raises:
        ValueError: saying what is wrong.
    """
    if table is not None and weights is None:
        raise ValueError("copy_confidence is for a drafter that copies; got it without copy_weights. Give both, or neither.")
    if weights is None:
        return
    if (
        not isinstance(weights, (list, tuple))
        or not 1 <= len(weights) <= LONGEST_COPY
        or not all(_number(w) and 0.0 <= w < 1.0 for w in weights)
    ):
        raise ValueError(
            f"copy_weights must be 1 to {LONGEST_COPY} probabilities below 1, for matches of 1, 2, .. tokens; got {weights}. Fit them "
            "with hf-dspark calibrate --copying."
        )
    rows, widths = len(COPY_RELATIONS), (len(COPY_FEATURES), _FEWEST_FEATURES)
    if table is None or (_listed(table, rows) and any(all(_numbers(row, width) for row in table) for width in widths)):
        return
    raise ValueError(
        f"copy_confidence must hold {rows} rows ({', '.join(COPY_RELATIONS)}) of {widths[0]} finite numbers, or of {widths[1]}; got "
        f"{table}. Calibrate again with hf-dspark calibrate --copying."
    )


def _listed(value: object, length: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == length


def _numbers(value: object, length: int) -> bool:
    return _listed(value, length) and all(map(_number, value))  # type: ignore[call-overload]


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1; got {value!r}.")


def _first(config: PreTrainedConfig, *names: str) -> Any:
    """The first of these attributes that the config has and that is not None."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _intermediate_size(text: PreTrainedConfig) -> int:
    size = _first(text, "intermediate_size", "n_inner", "ffn_dim")
    if isinstance(size, (list, tuple)):
        size = size[-1]
    return size or 4 * text.hidden_size


def _rope_parameters(text: PreTrainedConfig) -> dict[str, Any]:
    rope = dict(_first(text, "rope_parameters") or {})
    if isinstance(rope.get("full_attention"), dict):
        rope = dict(rope["full_attention"])
    rope = {key: value for key, value in rope.items() if key in _ROPE_KEYS and value is not None}
    theta = rope.get("rope_theta") or _first(text, "rope_theta") or 10000.0
    rope_type = rope.get("rope_type", "default")
    if rope_type not in STATIC_ROPE_TYPES or rope_type == "proportional":
        logger.info(
            "Target RoPE type %r changes with the text's length or turns only a part; the drafter uses default RoPE, theta %s.",
            rope_type,
            theta,
        )
        rope_type = "default"
    if rope_type == "default":
        return {"rope_type": "default", "rope_theta": float(theta)}
    return {**rope, "rope_theta": float(theta)}
