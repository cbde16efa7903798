"""The drafter: a parallel backbone over the target's hidden states, a sequential head and a confidence head.

Symbols as in the paper: d width, m tapped layers (see `DSparkConfig`), r rank of the sequential head, gamma block size, V vocabulary of the
target, V_draft of the drafter, R rows.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.cache.layout import RowLayout
from hf_dspark.configuration_dspark import DSparkConfig, check_block_size
from hf_dspark.errors import BindingError, UnboundDrafterError
from hf_dspark.models.backbone import (
    DSparkAttention,
    DSparkLayer,
    DSparkRMSNorm,
    DSparkRotaryEmbedding,
    Rope,
    block_attention,
    cached_attention,
)
from hf_dspark.models.backbone_gemma4 import Gemma4Layer, Gemma4Norm
from hf_dspark.models.heads import ConfidenceHead, SequentialHead, build_head
from hf_dspark.models.initialization import copy_last_layers
from hf_dspark.models.mask_token import mask_token_for
from hf_dspark.models.pretrained import DSparkPreTrainedModel
from hf_dspark.models.target_embeddings import TargetEmbeddings, check_carried, check_fit, input_output_embeddings
from hf_dspark.models.vocabulary import DraftVocabularyMixin, check_draft_ids
from hf_dspark.utils.constants import constant

_LOCK = threading.RLock()
_DECODING: weakref.WeakKeyDictionary[DSparkDrafter, int] = weakref.WeakKeyDictionary()  # calls that run with a drafter


class DSparkDrafter(DraftVocabularyMixin, DSparkPreTrainedModel):
    """A drafter that proposes gamma tokens a round from its target's hidden states.

    Embedding and head are the target's: `bind` references them outside the module tree, so that saving, moving, casting and copying a
    drafter never touches the target. Parameter names are DeepSpec's, so released checkpoints load without renaming.

    Source: paper section 3.1; layout of deepseek-ai/DeepSpec. Differs: the target's weights are referenced, not copied.

    Args:
        config (`DSparkConfig`): shapes; `mask_token_id` must be set.
    """

    config_class = DSparkConfig
    base_model_prefix = "drafter"
    main_input_name = "taps"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DSparkLayer", "Gemma4Layer"]
    _supports_sdpa = True

    is_dspark_drafter = True

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__(config)
        if config.mask_token_id is None:
            raise ValueError(
                "config.mask_token_id is None; a drafter needs the id of a token that the tokenizer does not use in text. Set it, or use "
                "DSparkDrafter.from_target(target, tokenizer=...), which chooses one."
            )
        d = config.hidden_size
        self.fc = nn.Linear(len(config.target_layer_ids) * d, d, bias=False)
        norm, layer = (Gemma4Norm, Gemma4Layer) if config.backbone == "gemma4" else (DSparkRMSNorm, DSparkLayer)
        self.hidden_norm = norm(d, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList([layer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = norm(d, eps=config.rms_norm_eps)
        self.rotary_emb = DSparkRotaryEmbedding(config)
        self.markov_head = build_head(config)
        self.confidence_head: ConfidenceHead | None = None
        if config.enable_confidence_head:
            self.confidence_head = ConfidenceHead(d + (config.markov_rank if config.confidence_head_with_markov else 0))
        if config.draft_vocab_size is not None:
            # The first V_draft tokens, until from_target or a checkpoint sets others.
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self._target_embeddings: TargetEmbeddings | None = None
        self.post_init()

    # ---------------------------------------------------------------------------------------------------------- creation

    @classmethod
    def from_target(
        cls,
        target: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        mask_token_id: int | None = None,
        draft_token_ids: torch.Tensor | None = None,
        init_from_target: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **config_fields: Any,
    ) -> DSparkDrafter:
        """Create a drafter with new weights that fits a target, and bind it.

        Args:
            target (`PreTrainedModel` or a PEFT wrapper): the causal LM to draft for.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer, to choose a mask token.
            mask_token_id (`int`, *optional*): given instead of a tokenizer.
            draft_token_ids (`torch.LongTensor` of shape `(V_draft,)`, *optional*): target ids that the drafter may propose.
            init_from_target (`bool`): start from the target's last layers where shapes agree; logs what was copied.
            dtype (`torch.dtype`, *optional*): of the parameters; by default the target's.
            device (*optional*): of the parameters; by default that of the target's embedding.
            config_fields: arguments of `DSparkConfig.from_target_config`: `num_hidden_layers` (default 2), `block_size` (7),
                `markov_head_type` ("vanilla"), `markov_rank` (256), `num_taps` (5), `target_layer_ids`, ..
        Returns:
            `DSparkDrafter`: bound, in evaluation mode.
        Raises:
            ValueError: if no mask token can be chosen, the given one is a special token in use, or a field is out of range.
        """
        mask_token_id = mask_token_for(target, tokenizer, mask_token_id)
        if draft_token_ids is not None:
            draft_token_ids = check_draft_ids(draft_token_ids, target.config.get_text_config(decoder=True).vocab_size)
            config_fields["draft_vocab_size"] = len(draft_token_ids)
        config = DSparkConfig.from_target_config(target.config, mask_token_id=mask_token_id, **config_fields)
        weight = target.get_input_embeddings().weight
        if dtype is None:
            dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
        if device is None:
            device = weight.device if weight.device.type != "meta" else "cpu"
        drafter = cls(config)
        if draft_token_ids is not None:
            drafter.d2t.copy_(draft_token_ids - torch.arange(len(draft_token_ids)))
        drafter = drafter.to(device=device, dtype=dtype).eval()
        drafter.config.dtype = dtype
        drafter.bind(target)
        if init_from_target:
            copy_last_layers(target, drafter)
        return drafter

    # ---------------------------------------------------------------------------------------------------------- binding

    def bind(self, target: PreTrainedModel) -> DSparkDrafter:
        """Use a target's embedding and head from now on, after checking that drafter and target fit.

        Every call of `generate` binds. Binding again to the same target takes in what was written to its head since, also through `.data`
        (weight syncs, merged adapters). Embeddings that scale (Gemma) are used through the target's own module, so the drafter gets what
        the target gets.

        Args:
            target (`PreTrainedModel` or a PEFT wrapper): the causal LM to draft for.
        Returns:
            `DSparkDrafter`: itself.
        Raises:
            BindingError: listing everything that does not fit; also if the copies of embedding or head in the drafter's checkpoint differ
                from the target's, and while it decodes for another target.
        """
        embedding, head = input_output_embeddings(target)
        current = self._target_embeddings
        if current is not None and current.embedding is embedding and current.head is head:
            current.refresh()
            return self
        self._check_free()
        check_fit(self.config, self.draft_token_ids, target, embedding)
        check_carried(self._carried, target, embedding, head, self.draft_token_ids)
        with _LOCK:
            self._check_free()
            self._carried = {}
            if not self.config.vocab_size:  # no weight of this drafter depends on it, but transformers reads it
                self.config.vocab_size = target.config.get_text_config(decoder=True).vocab_size
            self._target_embeddings = TargetEmbeddings(target, embedding, head, raw=self.config.raw_embeddings)
        return self

    def _check_free(self) -> None:
        if _DECODING.get(self):
            raise BindingError(
                f"This drafter is decoding for another target right now ({type(self.target).__name__}, in another thread or further up), "
                "and would go on with this target's embeddings. Load a second drafter for this target, or wait."
            )

    @contextmanager
    def decoding_for(self, target: PreTrainedModel) -> Iterator[None]:
        """Bound to this target for as long as this is open, in any number of threads; `bind` refuses others meanwhile."""
        with _LOCK:
            self.bind(target)
            _DECODING[self] = _DECODING.get(self, 0) + 1
        try:
            yield
        finally:
            with _LOCK:
                _DECODING[self] -= 1

    @property
    def bound(self) -> bool:
        """Whether `bind` has been called; a loaded or unpickled drafter is not bound."""
        return self._target_embeddings is not None

    @property
    def target(self) -> PreTrainedModel | None:
        """The target bound to, held weakly, or `None`."""
        return None if self._target_embeddings is None else self._target_embeddings.target()

    @property
    def target_rows(self) -> TargetEmbeddings | None:
        """The target's embedding and head as this drafter uses them, one object a binding."""
        return self._target_embeddings

    def sync_target_rows(self) -> None:
        """Take in what was written to the target's head since `bind`, before compiled graphs read it."""
        self._require_bound().sync(self.draft_token_ids)

    def _require_bound(self) -> TargetEmbeddings:
        if self._target_embeddings is None:
            raise UnboundDrafterError(
                "This drafter is not bound to a target, whose embedding and head it needs. Call drafter.bind(target) first, or "
                "target.generate(..., assistant_model=drafter), which binds it."
            )
        return self._target_embeddings

    # --------------------------------------------------------------------------------------------------------- drafting

    def project_taps(self, taps: torch.Tensor) -> torch.Tensor:
        """Project the taps to the drafter's context: H_ctx = RMSNorm(W_c [H^(l1); ..; H^(lm)]).

        Source: paper Eq. 2.

        Args:
            taps (`torch.Tensor` of shape `(..., m * d)`): hidden states of the tapped layers, any dtype and device.
        Returns:
            `torch.Tensor` of shape `(..., d)`: in the drafter's dtype, on its device.
        """
        weight = self.hidden_norm.weight
        return self.hidden_norm(self.fc(taps.to(weight.device, weight.dtype)))

    @torch.no_grad()
    def extend_context(self, taps: torch.Tensor, layout: RowLayout, cache: RowCache) -> None:
        """Write keys and values of newly committed tokens into the drafter's cache, in every layer.

        Source: paper Eq. 3.

        Args:
            taps (`torch.Tensor` of shape `(T, m * d)`): of T tokens, row after row.
            layout (`RowLayout`): their rows and positions.
            cache (`RowCache`): the drafter's.
        """
        context = self.project_taps(taps)
        rope = self._rope(context, layout.positions)
        for i in range(len(self.layers)):
            keys, values = self._attention(i).keys_values(context, rope)
            cache.write(i, keys, values, layout)

    @torch.no_grad()
    def draft_hidden(
        self,
        anchor_ids: torch.Tensor,
        starts: Sequence[int],
        cache: RowCache,
        gamma: int | None = None,
        row_ids: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Run the backbone on one block a row: [anchor, mask, .., mask], all positions at once.

        The anchor's position is `starts[r]`, right after the context. Its slot is the first that predicts, or, with
        `config.sample_from_anchor` false, the one before that. The block's keys and values are scratch: the next `extend_context`
        overwrites them.

        Source: paper section 3.1.1.

        Args:
            anchor_ids (`torch.LongTensor` of shape `(R,)`): last committed token of each row.
            starts (`Sequence[int]`): context tokens of each row in the cache.
            cache (`RowCache`): the drafter's.
            gamma (`int`, *optional*): tokens to draft; by default, and at most, `config.block_size`.
            row_ids (`list[int]`, *optional*): the rows' numbers in the cache; 0..R-1 where None.
        Returns:
            `torch.Tensor` of shape `(R, gamma, d)`: h_1..h_gamma, after the final norm.
        Raises:
            ValueError: if gamma is below 1 or longer than the checkpoint's block.
            UnboundDrafterError: before `bind`.
        """
        return self.block_hidden(anchor_ids, self.block_layout(starts, gamma, row_ids), cache)

    def block_layout(self, starts: Sequence[int], gamma: int | None = None, row_ids: Sequence[int] | None = None) -> RowLayout:
        """Where the slots of one block a row lie; arguments and errors as in `draft_hidden`."""
        slots = check_block_size(gamma, self.config.block_size) + self.config.first_slot
        return RowLayout(starts, [slots] * len(starts), self.hidden_norm.weight.device, row_ids=row_ids)

    @torch.no_grad()
    def block_hidden(self, anchor_ids: torch.Tensor, layout: RowLayout, cache: RowCache) -> torch.Tensor:
        """`draft_hidden` of a given `block_layout`."""
        slots = layout.max_count
        x = self._block_inputs(anchor_ids, slots)
        positions = layout.positions.view(-1, slots)
        rope = self._rope(x, positions)
        keys_at = torch.arange(layout.max_end, device=x.device)
        mask = None if layout.equal_ends else keys_at < layout.ends[:, None, None, None]
        window, low = None, 0
        if self._slides:
            window = self._in_window(keys_at, positions, positions[:, :1])[:, None]
            if self.config.causal_sliding_block:
                window = window & (keys_at <= positions[:, None, :, None])
            window = window if mask is None else window & mask
            low = layout.first_key(self.config.sliding_window)
            window = window[..., low:]

        def attend(i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            cache.write(i, k.flatten(0, 1), v.flatten(0, 1), layout)
            keys, values = cache.view(i, layout)
            if self._is_sliding(i):
                return cached_attention(q, keys[:, :, low:], values[:, :, low:], window)
            return cached_attention(q, keys, values, mask)

        for layer in self.layers:
            x = layer(x, rope, attend)
        return self.norm(x)[:, self.config.first_slot :]

    def base_logits(self, h: torch.Tensor) -> torch.Tensor:
        """U: the target's frozen head on the drafter's hidden states, at the draft ids.

        The target's logit soft-cap is applied here, before the sequential head adds to it. Gradients reach `h`, never the head.

        Args:
            h (`torch.Tensor` of shape `(..., d)`): hidden states.
        Returns:
            `torch.Tensor` of shape `(..., V_draft)`: in the head's dtype, on the device of `h`.
        Raises:
            UnboundDrafterError: before `bind`.
        """
        return self._require_bound().logits(h, self.draft_token_ids).to(h.device)

    def confidence(self, h: torch.Tensor, prev_ids: torch.Tensor) -> torch.Tensor | None:
        """Logits of c_k, before the sigmoid and before calibration.

        Source: paper Eq. 7.

        Args:
            h (`torch.Tensor` of shape `(..., d)`): hidden states.
            prev_ids (`torch.LongTensor` of shape `(...,)`): x_{k-1}, target ids; unused by heads without the Markov feature.
        Returns:
            `torch.Tensor` of shape `(...,)`, float32, or `None` if the drafter has no confidence head.
        """
        if self.confidence_head is None:
            return None
        if self.config.confidence_head_with_markov:
            head = cast(SequentialHead, self.markov_head)
            h = torch.cat((h, head.embed_previous(prev_ids)), dim=-1)
        return self.confidence_head(h).float()

    # --------------------------------------------------------------------------------------------------------- training

    def training_hidden(
        self,
        taps: torch.Tensor,
        anchor_ids: torch.Tensor,
        anchor_positions: torch.Tensor,
        context_mask: torch.Tensor | None = None,
        gamma: int | None = None,
    ) -> torch.Tensor:
        """Hidden states of the blocks of many anchors a sequence, in one pass with gradients.

        A block sees the context strictly before its anchor, and itself; with one anchor this equals `draft_hidden` after that context. Only
        block tokens are queries, so the cost grows with the number of anchors.

        Source: paper section 3.3.

        Args:
            taps (`torch.Tensor` of shape `(B, S, m * d)`): of B sequences; the index in the sequence is the position id.
            anchor_ids (`torch.LongTensor` of shape `(B, A)`): tokens at A anchors.
            anchor_positions (`torch.LongTensor` of shape `(B, A)`): their positions.
            context_mask (`torch.BoolTensor` of shape `(B, S)`, *optional*): false at padding.
            gamma (`int`, *optional*): block length, `config.block_size` by default.
        Returns:
            `torch.Tensor` of shape `(B, A, gamma, d)`: after the final norm.
        Raises:
            ValueError: if gamma is below 1 or longer than the checkpoint's block.
            UnboundDrafterError: before `bind`.
        """
        gamma = check_block_size(gamma, self.config.block_size)
        context = self.project_taps(taps)
        anchor_positions = anchor_positions.to(context.device)
        first = self.config.first_slot
        slots = gamma + first
        x = self._block_inputs(anchor_ids, slots).flatten(1, 2)
        positions = (anchor_positions[..., None] + torch.arange(slots, device=x.device)).flatten(1)
        rope = self._rope(x, positions)
        past = torch.arange(context.shape[1], device=x.device)
        context_rope = self._rope(context, past[None])

        sees_context = past < anchor_positions[..., None]
        if context_mask is not None:
            sees_context = sees_context & context_mask.to(device=x.device, dtype=torch.bool)[:, None, :]
        hidden_keys = ~sees_context.repeat_interleave(slots, dim=1)[:, None, None]
        far_keys = hidden_keys
        if self._slides:
            anchors = anchor_positions.repeat_interleave(slots, dim=1)
            far_keys = hidden_keys | ~self._in_window(past, positions, anchors)[:, None, None]

        def attend(i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            attention = self._attention(i)
            context_k, context_v = attention.keys_values(context, context_rope)
            dropout = attention.attention_dropout if self.training else 0.0
            sliding = self._is_sliding(i)
            causal = sliding and self.config.causal_sliding_block
            return block_attention(q, k, v, context_k, context_v, far_keys if sliding else hidden_keys, slots, dropout, causal)

        for layer in self.layers:
            x = layer(x, rope, attend)
        return self.norm(x).unflatten(1, (-1, slots))[:, :, first:]

    # For wrappers that go through `forward` (data parallel, PEFT).
    forward = training_hidden

    # --------------------------------------------------------------------------------------------------------- internal

    def get_input_embeddings(self) -> nn.Module | None:
        """`None`: the embedding is the target's."""
        return None

    def get_output_embeddings(self) -> nn.Module | None:
        """`None`: the head is the target's."""
        return None

    def _attention(self, layer: int) -> DSparkAttention:
        return cast(DSparkLayer, self.layers[layer]).self_attn

    def _is_sliding(self, layer: int) -> bool:
        return cast(list[str], self.config.layer_types)[layer] == "sliding_attention"

    def _in_window(self, keys: torch.Tensor, queries: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """Whether keys at positions `(S,)` lie in the window of queries at `(B, Q)`, whose anchors are at `(B, Q)`: `(B, Q, S)`."""
        first = anchors if self.config.window_from_anchor else queries
        return keys > (first - cast(int, self.config.sliding_window)).expand_as(queries)[..., None]

    @property
    def _slides(self) -> bool:
        return "sliding_attention" in cast(list[str], self.config.layer_types)

    def _block_inputs(self, anchor_ids: torch.Tensor, slots: int) -> torch.Tensor:
        """Embeddings of [anchor, mask, .., mask], `(..., gamma, d)` in the drafter's dtype, from ids `(...,)`."""
        weight = self.hidden_norm.weight
        ids = nn.functional.pad(anchor_ids[..., None], (0, slots - 1), value=cast(int, self.config.mask_token_id))
        return self._require_bound().embed(ids).to(weight.device, weight.dtype)

    def _rope(self, x: torch.Tensor, positions: torch.Tensor) -> Rope:
        """cos and sin as `rotate` takes them, with a heads dimension, `(..., 1, head_dim)` from positions of shape `(...,)`."""
        flat = positions.reshape(1, -1)
        cos, sin = self.rotary_emb(x, flat)
        half, shape = sin.shape[-1] // 2, (*positions.shape, 1, cos.shape[-1])
        signs = constant((-1.0,) * half + (1.0,) * half, sin.device)
        return cos.reshape(shape), (sin * signs.to(sin.dtype)).reshape(shape)


AutoConfig.register("dspark", DSparkConfig, exist_ok=True)
AutoModel.register(DSparkConfig, DSparkDrafter, exist_ok=True)
