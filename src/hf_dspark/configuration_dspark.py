"""Configuration of a DSpark drafter; every value is checked at construction."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from transformers import PreTrainedConfig, Qwen3Config

logger = logging.getLogger(__name__)

MARKOV_HEAD_TYPES = ("vanilla", "gated", "rnn")
BACKBONES = ("qwen3", "gemma4")
# RoPE types whose frequencies do not change with the length of the text: rotated context keys stay in the drafter's cache.
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")
_ROPE_KEYS = {
    *("rope_type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast"),
    *("beta_slow", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim", "truncate"),
}

# N-gram copying. Rows of `copy_confidence`, how the copied token relates to the drafter's most likely one: there is no copy; it is the same
# token; it is another one and more likely in the mixture; it is another one and less likely.
COPY_RELATIONS = ("none", "agrees", "wins", "loses")
# Columns of `copy_confidence`, inputs of the confidence with copying: 1; logit of the confidence head; logit(lambda_m); logit of the
# drafter's largest probability; whether the match lies in the prompt; log-odds that earlier matches go on with the same token; whether all
# of them do; logit of the drafter's probability of the copied token. Older tables have the first four.
COPY_FEATURES = ("one", "confidence", "copy", "draft", "prompt", "agreement", "unanimous", "drafted")
_OLDER_COPY_FEATURES = 4
# The longest match that has a weight of its own; longer ones use the weight of this length.
MAX_COPY_MATCH = 64


class DSparkConfig(Qwen3Config):
    """Shape of the backbone (a Qwen3 or Gemma 4 stack), of its heads, and of the target that it belongs to.

    Tapped layers are the target's decoder layers whose outputs the drafter reads; taps are those hidden states, concatenated.
    Keys that DeepSpec's checkpoints have too keep DeepSpec's meaning.

    Source: paper sections 3.1 and 3.2; key names of deepseek-ai/DeepSpec. Differs: the target's last layer cannot be tapped.

    Args:
        block_size (`int`): gamma, tokens drafted a round.
        sample_from_anchor (`bool`): whether the anchor's slot is the first that predicts (DSpark). If not (z-lab's DFlash), the
            block has one slot more, and the first mask's slot predicts the token at its own position.
        num_target_layers (`int`, *optional*): decoder layers of the target; `None` if the checkpoint's format does not say.
        vocab_size (`int`): V of the target; 0 if the checkpoint's format does not say, allowed for drafters without a sequential head.
        target_layer_ids (`list[int]`): tapped layers, strictly increasing; i is the output of the target's decoder layer i, -1
            its embeddings.
        mask_token_id (`int`, *optional*): token id fed at block positions 2..gamma; a drafter cannot be built without it.
        markov_rank (`int`): rank r of the sequential head; 0 is no head (DFlash).
        markov_head_type (`str`): `"vanilla"` (Eq. 5), `"gated"` or `"rnn"` (Eq. 6).
        enable_confidence_head (`bool`): whether the drafter predicts c_k (Eq. 7).
        confidence_head_with_markov (`bool`, *optional*): feed W1[x_{k-1}] to the confidence head; default: if there is a sequential head.
        num_anchors (`int`): anchors a training sequence, as trained; unused when decoding.
        draft_vocab_size (`int`, *optional*): tokens that the drafter can propose; `None` is the whole vocabulary.
        target_hidden_size (`int`, *optional*): width of the target; must equal `hidden_size`.
        target_model_type (`str`, *optional*): the target's `model_type`, for messages and model cards.
        target_name (`str`, *optional*): the target's name or path, for messages and model cards.
        confidence_temperatures (`list[float]`, *optional*): T_1..T_gamma of Sequential Temperature Scaling (section 3.2.1).
        copy_weights (`list[float]`, *optional*): lambda_1..lambda_M of n-gram copying: probability of drafting the token that followed
            an earlier occurrence of the last m tokens; `None` is no copying. Not in the paper; see `hf_dspark.decoding.ngram_copy`.
        copy_confidence (`list[list[float]]`, *optional*): `(4, 8)` or `(4, 4)`, `COPY_RELATIONS` by `COPY_FEATURES`: c_k with copying.
        backbone (`str`): `"qwen3"`, or `"gemma4"` (four norms a layer, unscaled scores, normed values, a scalar a layer).
        attention_k_eq_v (`bool`): values are the keys before norm and rotation; `"gemma4"` only.
        raw_embeddings (`bool`): read the target's embedding rows and logits as stored, without the scaling and soft-cap that some
            families apply (speculators' drafters are trained so).
        layer_types, sliding_window: in layers of type `"sliding_attention"` a query sees the keys that lie fewer than `sliding_window`
            positions before it, and its whole block. Needs `use_sliding_window=True`.
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
        self._check_backbone()
        self._check_heads()
        check_tapped_layers(self.target_layer_ids, self.num_target_layers)
        check_temperatures(self.confidence_temperatures, self.block_size)
        check_ngram_copying(self.copy_weights, self.copy_confidence)

    def _check_backbone(self) -> None:
        for name in ("block_size", "num_hidden_layers", "hidden_size", "intermediate_size"):
            _check_positive(name, getattr(self, name))
        if self.num_target_layers is not None:
            _check_positive("num_target_layers", self.num_target_layers)
        _check_one_of("backbone", self.backbone, BACKBONES)
        if self.attention_k_eq_v and self.backbone != "gemma4":
            raise ValueError(f"attention_k_eq_v is for backbone='gemma4'; got {self.backbone!r}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads; got {self.num_attention_heads} and "
                f"{self.num_key_value_heads}. Use the target's own pair."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even, because RoPE rotates pairs; got {self.head_dim}. Pass head_dim=.")
        if self.target_hidden_size != self.hidden_size:
            raise ValueError(
                f"target_hidden_size ({self.target_hidden_size}) must equal hidden_size ({self.hidden_size}): the drafter uses the "
                "target's embedding and head."
            )
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
                f"rope_parameters['rope_type'] must be one of {STATIC_ROPE_TYPES}; got {rope_type!r}. The drafter caches rotated keys, "
                "so frequencies must not depend on the length of the text."
            )

    def _check_heads(self) -> None:
        if self.vocab_size != 0 or self.markov_rank or self.draft_vocab_size is not None:
            _check_positive("vocab_size", self.vocab_size)
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < (self.vocab_size or self.mask_token_id + 1):
            raise ValueError(
                f"mask_token_id must be a row of the target's embedding, 0..{self.vocab_size - 1}; got {self.mask_token_id}. "
                "Choose a token that the tokenizer does not use in text."
            )
        if self.markov_rank < 0:
            raise ValueError(f"markov_rank must be 0 (no sequential head) or positive; got {self.markov_rank}.")
        _check_one_of("markov_head_type", self.markov_head_type, MARKOV_HEAD_TYPES)
        if self.confidence_head_with_markov and self.markov_rank == 0:
            raise ValueError(
                "confidence_head_with_markov needs the sequential head's W1, but markov_rank is 0. "
                "Pass confidence_head_with_markov=False or a positive markov_rank."
            )
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size must be 1..{self.vocab_size} (the target's vocabulary) or None; got {self.draft_vocab_size}."
            )

    @property
    def first_slot(self) -> int:
        """The first slot that predicts: 0 (the anchor's) or 1."""
        return 0 if self.sample_from_anchor else 1

    @property
    def block_slots(self) -> int:
        """Slots of a whole block: gamma, and one more if the anchor's predicts nothing."""
        return self.block_size + self.first_slot

    @classmethod
    def from_target_config(
        cls,
        target_config: PreTrainedConfig,
        *,
        num_hidden_layers: int = 2,
        target_layer_ids: list[int] | None = None,
        num_taps: int = 5,
        **fields: Any,
    ) -> DSparkConfig:
        """Build the configuration of a drafter that fits a target.

        Width, heads, head size, MLP width, norm epsilon, activation, RoPE, vocabulary and special tokens are the target's (read through
        its text config, so multimodal targets and GPT-2's key names work). A target without RoPE, or with RoPE that depends on the length
        of the text, gives default RoPE with the target's theta or 10,000.

        Args:
            target_config (`PreTrainedConfig`): the target's configuration.
            num_hidden_layers (`int`): layers of the drafter.
            target_layer_ids (`list[int]`, *optional*): tapped layers; by default `num_taps` of them, chosen by `spread_taps`.
            num_taps (`int`): number of tapped layers; fewer if the target has fewer layers.
            fields: any other field of `DSparkConfig`, for instance `mask_token_id`, `block_size`, `markov_rank`, `intermediate_size`.
        Returns:
            `DSparkConfig`.
        Raises:
            ValueError: if the target's config lacks what a drafter needs, or a value is out of range.
        """
        text = target_config.get_text_config(decoder=True)
        needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        missing = [name for name in needed if getattr(text, name, None) is None]
        if missing == ["num_attention_heads"]:
            raise ValueError(
                f"The target type {text.model_type!r} has no attention: its recurrent state cannot take rejected tokens back, which "
                "speculative decoding needs. Choose a target with attention, or generate without a drafter."
            )
        if missing:
            raise ValueError(
                f"The config of target type {text.model_type!r} has no {', '.join(missing)}; a drafter needs a decoder-only language "
                "model. Pass the causal LM, not another part of it."
            )
        heads = text.num_attention_heads
        of_target: dict[str, Any] = {
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": _intermediate_size(text),
            "num_attention_heads": heads,
            "num_key_value_heads": _first(text, "num_key_value_heads") or heads,
            "head_dim": _first(text, "head_dim") or text.hidden_size // heads,
            "hidden_act": _first(text, "hidden_act", "hidden_activation", "activation_function") or "silu",
            "rms_norm_eps": _first(text, "rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps") or 1e-6,
            "max_position_embeddings": _first(text, "max_position_embeddings") or 32768,
            "initializer_range": _first(text, "initializer_range") or 0.02,
            "attention_bias": bool(_first(text, "attention_bias")),
            "rope_parameters": _rope_parameters(text),
            "num_target_layers": text.num_hidden_layers,
            "target_model_type": text.model_type,
            "target_name": getattr(target_config, "_name_or_path", None) or None,
            **{name: _first(text, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")},
        }
        if target_layer_ids is None:
            target_layer_ids = spread_taps(text.num_hidden_layers, num_taps)
        return cls(**{**of_target, "num_hidden_layers": num_hidden_layers, "target_layer_ids": target_layer_ids, **fields})


def spread_taps(num_target_layers: int, num_taps: int = 5) -> list[int]:
    """Spread tapped layers evenly from the second layer to the third from last; never the last layer.

    Gives the ids of the released checkpoints: 36 layers: 1, 9, 17, 25, 33; 40 layers: 1, 10, 19, 28, 37. A target too shallow for that is
    tapped from its first layer to its last but one, at fewer layers if it has fewer; a target of one layer at its embeddings.

    Args:
        num_target_layers (`int`): decoder layers of the target.
        num_taps (`int`): how many, at most.
    Returns:
        `list[int]`: strictly increasing layer ids.
    Raises:
        ValueError: if either number is below 1.
    """
    _check_positive("num_target_layers", num_target_layers)
    _check_positive("num_taps", num_taps)
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


def check_tapped_layers(layer_ids: Sequence[int], num_target_layers: int | None) -> None:
    """Refuse tapped layers that are out of range, unordered, or the target's last.

    Args:
        layer_ids (`list[int]`): layer ids, -1 for the embeddings.
        num_target_layers (`int`, *optional*): decoder layers of the target; without it only the order is checked.
    Raises:
        ValueError: for the first rule that is broken.
    """
    if not layer_ids or any(isinstance(i, bool) or not isinstance(i, int) for i in layer_ids):
        raise ValueError(f"target_layer_ids must be a non-empty list of integers; got {layer_ids}.")
    if any(b <= a for a, b in pairwise(layer_ids)):
        raise ValueError(f"target_layer_ids must be strictly increasing; got {layer_ids}.")
    if layer_ids[-1] + 1 == num_target_layers:
        raise ValueError(
            f"target_layer_ids must not hold the last layer ({layer_ids[-1]}); got {layer_ids}. Some versions of transformers return its "
            "hidden state after the final norm, others before it: tap an earlier layer."
        )
    if layer_ids[0] < -1 or (num_target_layers is not None and layer_ids[-1] >= num_target_layers):
        allowed = "at least -1 (the embeddings)" if num_target_layers is None else f"in -1..{num_target_layers - 2}"
        raise ValueError(f"target_layer_ids must be {allowed}; got {layer_ids}.")


def check_block_size(block_size: int | None, longest: int) -> int:
    """Resolve the number of tokens to draft a round.

    Args:
        block_size (`int`, *optional*): `longest` where None.
        longest (`int`): gamma of the checkpoint.
    Returns:
        `int`: in 1..longest.
    Raises:
        ValueError: for less than one token, or more than the checkpoint was trained for.
    """
    if block_size is None:
        return longest
    if not 1 <= block_size <= longest:
        raise ValueError(
            f"block_size must be 1..{longest}, the blocks that this drafter was trained for; got {block_size}. Acceptance collapses beyond "
            "that. Draft fewer tokens, or train a drafter with a longer block."
        )
    return block_size


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
            f"confidence_temperatures must hold one temperature for each of the {block_size} block positions; got {len(temperatures)}. "
            "Calibrate again with this block size."
        )
    if not all(0.0 < t < float("inf") for t in temperatures):
        raise ValueError(f"confidence_temperatures must be positive and finite; got {temperatures}.")


def check_ngram_copying(weights: Sequence[float] | None, table: Sequence[Sequence[float]] | None) -> None:
    """Refuse impossible parameters of n-gram copying.

    Args:
        weights (`list[float]`, *optional*): lambda_1..lambda_M in [0, 1); `None` is no copying.
        table (`list[list[float]]`, *optional*): `(4, 8)` or `(4, 4)`, finite; needs weights.
    Raises:
        ValueError: for numbers out of range, and for a table without weights.
    """
    if weights is None:
        if table is not None:
            raise ValueError("copy_confidence needs copy_weights; got a table without copy_weights. Give both, or neither.")
        return
    if not (
        isinstance(weights, (list, tuple))
        and 1 <= len(weights) <= MAX_COPY_MATCH
        and all(_is_finite_number(w) and 0.0 <= w < 1.0 for w in weights)
    ):
        raise ValueError(
            f"copy_weights must be 1 to {MAX_COPY_MATCH} probabilities below 1, for matches of 1, 2, .. tokens; got {weights}. Fit them "
            "with hf-dspark calibrate --copying."
        )
    if table is None:
        return
    rows, new, old = len(COPY_RELATIONS), len(COPY_FEATURES), _OLDER_COPY_FEATURES
    is_table = isinstance(table, (list, tuple)) and len(table) == rows and all(isinstance(row, (list, tuple)) for row in table)
    if not (is_table and {len(row) for row in table} in ({new}, {old}) and all(_is_finite_number(x) for row in table for x in row)):
        raise ValueError(
            f"copy_confidence must hold {rows} rows ({', '.join(COPY_RELATIONS)}) of {new} finite numbers, or of {old}; got "
            f"{table}. Calibrate again with hf-dspark calibrate --copying."
        )


def _is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1; got {value!r}.")


def _check_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}; got {value!r}.")


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
    theta = float(rope.get("rope_theta") or _first(text, "rope_theta") or 10000.0)
    rope_type = rope.get("rope_type", "default")
    if rope_type not in STATIC_ROPE_TYPES or rope_type == "proportional":
        logger.info("The drafter uses default RoPE with theta %s: the target's RoPE type %r is dynamic or partial.", theta, rope_type)
        rope_type = "default"
    return {"rope_type": "default", "rope_theta": theta} if rope_type == "default" else {**rope, "rope_theta": theta}
