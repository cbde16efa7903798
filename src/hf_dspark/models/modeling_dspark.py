"""The drafter: parallel backbone with injected target context, sequential head, confidence head. Knows PreTrainedModel,
and the target's embedding and head, which it borrows; knows no decoding loop, no training loop and no sampling.

Symbols as in the paper: d width, m taps, r rank of the head, gamma block size, V vocabulary, V_draft the drafter's
vocabulary, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from hf_dspark.cache.kv_cache import RowCache, RowLayout
from hf_dspark.configuration_dspark import DSparkConfig
from hf_dspark.errors import UnboundDrafterError
from hf_dspark.models.backbone import DSparkAttention, DSparkLayer, DSparkRotaryEmbedding, Rope, block_attention, cached_attention
from hf_dspark.models.backbone_gemma4 import Gemma4Layer, Gemma4Norm
from hf_dspark.models.heads import ConfidenceHead, SequentialHead, build_head
from hf_dspark.models.initialization import copy_last_layers
from hf_dspark.models.pretrained import KeptDrafter
from hf_dspark.models.target_embeddings import Borrowed, check_carried, check_fit, input_output_embeddings
from hf_dspark.models.vocabulary import check_draft_ids, choose_mask_token_id, mask_token_for

__all__ = ["DSparkAttention", "DSparkDrafter", "DSparkLayer", "DSparkRotaryEmbedding", "choose_mask_token_id"]


class DSparkDrafter(KeptDrafter):
    """A drafter that proposes gamma tokens a round from its target's hidden states.

    Embedding and head are the target's: `bind` stores references to them outside the module tree, so that saving,
    moving, casting and copying a drafter never touches the target. Parameter names are DeepSpec's, so released
    checkpoints load without renaming.

    Source: paper section 3.1; layout of deepseek-ai/DeepSpec. Differs: the target's weights are borrowed, not copied.

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
                "config.mask_token_id is None; a drafter needs the id of a token that the tokenizer does not use in "
                "text. Set it, or use DSparkDrafter.from_target(target, tokenizer=...), which chooses one."
            )
        d = config.hidden_size
        self.fc = nn.Linear(len(config.target_layer_ids) * d, d, bias=False)
        norm, layer = (Gemma4Norm, Gemma4Layer) if config.backbone == "gemma4" else (Qwen3RMSNorm, DSparkLayer)
        self.hidden_norm = norm(d, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList([layer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = norm(d, eps=config.rms_norm_eps)
        self.rotary_emb = DSparkRotaryEmbedding(config)
        self.markov_head = build_head(config)
        self.confidence_head: ConfidenceHead | None = None
        if config.enable_confidence_head:
            self.confidence_head = ConfidenceHead(d + (config.markov_rank if config.confidence_head_with_markov else 0))
        if config.draft_vocab_size is not None:
            # The first V_draft tokens, until from_target or a checkpoint says otherwise.
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))

        self._borrowed: Borrowed | None = None
        self.post_init()

    # ----------------------------------------------------------------------------------------------------------- making

    @classmethod
    def from_target(
        cls,
        target: PreTrainedModel,
        *,
        tokenizer: Any = None,
        num_hidden_layers: int = 2,
        block_size: int = 7,
        markov_rank: int = 256,
        markov_head_type: str = "vanilla",
        target_layer_ids: list[int] | None = None,
        num_taps: int = 5,
        mask_token_id: int | None = None,
        draft_token_ids: torch.Tensor | None = None,
        init_from_target: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **config_fields: Any,
    ) -> DSparkDrafter:
        """Make a fresh drafter that fits a target, bound to it.

        Args:
            target (`PreTrainedModel` or a PEFT wrapper): the causal LM to draft for.
            tokenizer (*optional*): its tokenizer; `mask_token_id` is chosen from it by `choose_mask_token_id`.
            num_hidden_layers (`int`): backbone layers.
            block_size (`int`): gamma.
            markov_rank (`int`): rank of the sequential head, 0 for none.
            markov_head_type (`str`): `"vanilla"`, `"gated"` or `"rnn"`.
            target_layer_ids (`list[int]`, *optional*): taps; by default spread over depth, never the last layer.
            num_taps (`int`): how many taps to spread; fewer where the target has fewer layers.
            mask_token_id (`int`, *optional*): given instead of a tokenizer.
            draft_token_ids (`torch.LongTensor` of shape `(V_draft,)`, *optional*): target ids that the drafter may
                propose.
            init_from_target (`bool`): start from the target's last layers where shapes allow; what was copied is
                logged.
            dtype (`torch.dtype`, *optional*): of the parameters; by default the target's.
            device (*optional*): of the parameters; by default the target's embedding's.
            config_fields: any other field of `DSparkConfig`, for instance `intermediate_size` or
                `enable_confidence_head`.
        Returns:
            `DSparkDrafter`: bound, in evaluation mode.
        Raises:
            ValueError: if no mask token can be chosen, the given one is a special token in use, or a field is out of
                range.
        """
        mask_token_id = mask_token_for(target, tokenizer, mask_token_id)
        if draft_token_ids is not None:
            draft_token_ids = check_draft_ids(draft_token_ids, target.config.get_text_config(decoder=True).vocab_size)
            config_fields["draft_vocab_size"] = len(draft_token_ids)
        config = DSparkConfig.from_target_config(
            target.config,
            num_hidden_layers=num_hidden_layers,
            block_size=block_size,
            markov_rank=markov_rank,
            markov_head_type=markov_head_type,
            target_layer_ids=target_layer_ids,
            num_taps=num_taps,
            mask_token_id=mask_token_id,
            **config_fields,
        )
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
        """Borrow a target's embedding and head, after checking once that drafter and target fit.

        Binding again to the same target does nothing; to another one, checks again. Embeddings that scale (Gemma) are
        used through the target's own module, so the drafter sees what the target sees.

        Args:
            target (`PreTrainedModel` or a PEFT wrapper): the causal LM to draft for.
        Returns:
            `DSparkDrafter`: itself.
        Raises:
            BindingError: listing everything that does not fit; also when the copies of embedding or head that a
                foreign file carried differ from the target's.
        """
        embedding, head = input_output_embeddings(target)
        borrowed = self._borrowed
        if borrowed is not None and borrowed.embedding is embedding and borrowed.head is head:
            return self
        check_fit(self.config, self.draft_token_ids, target, embedding)
        check_carried(self._carried, target, embedding, head, self.draft_token_ids)
        self._carried = {}
        softcap = getattr(target.config.get_text_config(decoder=True), "final_logit_softcapping", None)
        if not self.config.vocab_size:  # nothing of this drafter depends on it, but transformers asks for it
            self.config.vocab_size = target.config.get_text_config(decoder=True).vocab_size
        self._borrowed = Borrowed(target, embedding, head, softcap, raw=self.config.raw_embeddings)
        return self

    @property
    def bound(self) -> bool:
        """Whether `bind` has been called; a loaded or unpickled drafter is not bound."""
        return self._borrowed is not None

    @property
    def target(self) -> PreTrainedModel | None:
        """The target bound to, or `None`; not kept alive by the drafter."""
        return None if self._borrowed is None else self._borrowed.target()

    def _require_bound(self) -> Borrowed:
        if self._borrowed is None:
            raise UnboundDrafterError(
                "This drafter has no target yet: it borrows the target's embedding and head, and has none of its own. "
                "Call drafter.bind(target) first, or let target.generate(..., assistant_model=drafter) do it."
            )
        return self._borrowed

    # --------------------------------------------------------------------------------------------------------- drafting

    def project_taps(self, taps: torch.Tensor) -> torch.Tensor:
        """H_ctx = RMSNorm(W_c [H^(l1); ..; H^(lm)]).

        Source: paper Eq. 2.

        Args:
            taps (`torch.Tensor` of shape `(..., m * d)`): outputs of the tapped target layers, any dtype and device.
        Returns:
            `torch.Tensor` of shape `(..., d)`: in the drafter's dtype, on its device.
        """
        weight = self.hidden_norm.weight
        return self.hidden_norm(self.fc(taps.to(weight.device, weight.dtype)))

    @torch.no_grad()
    def extend_context(self, taps: torch.Tensor, layout: RowLayout, cache: RowCache) -> None:
        """Write keys and values of newly committed tokens into the drafter's cache, in every layer.

        Source: paper Eq. 3; positions are the tokens' own. Leaves `cache.lengths` to the caller.

        Args:
            taps (`torch.Tensor` of shape `(T, m * d)`): tapped hidden states of T tokens, row after row.
            layout (`RowLayout`): where those tokens belong.
            cache (`RowCache`): the drafter's own.
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

        The anchor sits at its own position, `starts[r]`, right after the context; it is the first slot that predicts, or, with
        `config.sample_from_anchor` false, the one before that. The block's keys and values are scratch: they lie in the cache beyond
        `lengths` and are overwritten later.

        Source: paper section 3.1.1.

        Args:
            anchor_ids (`torch.LongTensor` of shape `(R,)`): last committed token of each row.
            starts (`Sequence[int]`): context tokens of each row in the cache.
            cache (`RowCache`): the drafter's own.
            gamma (`int`, *optional*): tokens to draft; by default, and at most, `config.block_size`.
            row_ids (`list[int]`, *optional*): the cache's rows that these are; 0..R-1 where None.
        Returns:
            `torch.Tensor` of shape `(R, gamma, d)`: h_1..h_gamma, after the final norm.
        Raises:
            ValueError: if gamma is below 1 or longer than the checkpoint's block.
            UnboundDrafterError: before `bind`.
        """
        gamma = self._check_gamma(gamma)
        rows, first = len(starts), self.config.first_slot
        slots = gamma + first
        layout = RowLayout(starts, [slots] * rows, self.hidden_norm.weight.device, row_ids=row_ids)
        x = self._block_inputs(anchor_ids, slots)
        positions = layout.positions.view(rows, slots)
        rope = self._rope(x, positions)
        mask = None
        places = torch.arange(layout.max_end, device=x.device)
        if min(starts) != max(starts):
            mask = places < layout.ends[:, None, None, None]
        near = None
        if self._slides:
            near = self._near(places, positions, positions[:, :1])[:, None]
            if self.config.causal_sliding_block:
                near = near & (places <= positions[:, None, :, None])
            near = near if mask is None else near & mask

        def attend(i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            cache.write(i, k.flatten(0, 1), v.flatten(0, 1), layout)
            keys, values = cache.view(i, layout)
            return cached_attention(q, keys, values, near if self._is_sliding(i) else mask)

        for layer in self.layers:
            x = layer(x, rope, attend)
        return self.norm(x)[:, first:]

    def base_logits(self, h: torch.Tensor) -> torch.Tensor:
        """U: the target's frozen head on the drafter's hidden states, at draft ids only where those are fewer.

        A logit soft-cap of the target is applied here, before any sequential head adds to it. Gradients reach `h`,
        never the head.

        Args:
            h (`torch.Tensor` of shape `(..., d)`): hidden states.
        Returns:
            `torch.Tensor` of shape `(..., V_draft)`: in the head's dtype, on the device of `h`.
        Raises:
            UnboundDrafterError: before `bind`.
        """
        return self._require_bound().logits(h, self._draft_ids_cached()).to(h.device)

    def confidence(self, h: torch.Tensor, prev_ids: torch.Tensor) -> torch.Tensor | None:
        """Logits of c_k, before the sigmoid and before calibration.

        Source: paper Eq. 7.

        Args:
            h (`torch.Tensor` of shape `(..., d)`): hidden states.
            prev_ids (`torch.LongTensor` of shape `(...,)`): x_{k-1}, target ids; unused by heads without the Markov
                feature.
        Returns:
            `torch.Tensor` of shape `(...,)`, float32, or `None` where the drafter has no confidence head.
        """
        if self.confidence_head is None:
            return None
        if self.config.confidence_head_with_markov:
            head = cast(SequentialHead, self.markov_head)
            h = torch.cat((h, head.embed_previous(prev_ids)), dim=-1)
        return self.confidence_head(h).float()

    def survival(self, confidence_logits: torch.Tensor) -> torch.Tensor:
        """a_k = prod_{i<=k} sigmoid(logit_i / T_i): probability that tokens 1..k all survive.

        Source: paper section 3.2.1. T_i are `config.confidence_temperatures`, or 1 where there are none. With `config.copy_confidence` they
        are for logits that it has adjusted (`hf_dspark.decoding.ngram_copy.adjusted`).

        Args:
            confidence_logits (`torch.Tensor` of shape `(..., gamma)`): from `confidence`.
        Returns:
            `torch.Tensor` of shape `(..., gamma)`: float32 in [0, 1], non-increasing along the last dimension.
        Raises:
            ValueError: if there are more positions than temperatures.
        """
        logits = confidence_logits.float()
        temperatures = self.config.confidence_temperatures
        if temperatures is not None:
            gamma = logits.shape[-1]
            if gamma > len(temperatures):
                raise ValueError(f"There are temperatures for {len(temperatures)} block positions; got confidences for {gamma}.")
            logits = logits / torch.tensor(temperatures[:gamma], device=logits.device)
        return torch.sigmoid(logits).cumprod(dim=-1)

    # ------------------------------------------------------------------------------------------------------- vocabulary

    @property
    def draft_token_ids(self) -> torch.Tensor | None:
        """`torch.LongTensor` of shape `(V_draft,)`: target id of each draft id; `None` for the whole vocabulary."""
        return self._draft_ids_cached()

    def to_target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Target ids of draft ids: draft_id + d2t[draft_id].

        Args:
            draft_ids (`torch.LongTensor` of any shape): indices into the last dimension of `base_logits`.
        Returns:
            `torch.LongTensor` of the same shape.
        """
        return draft_ids if self.config.draft_vocab_size is None else draft_ids + self.d2t[draft_ids]

    def values_at(self, values: torch.Tensor, target_ids: torch.Tensor, outside: float = 0.0) -> torch.Tensor:
        """Values over the draft vocabulary at some tokens.

        Args:
            values (`torch.Tensor` of shape `(..., V_draft)`): p_d, or logits.
            target_ids (`torch.LongTensor` of shape `(...,)`): one a distribution.
            outside (`float`): where the drafter cannot propose that token.
        Returns:
            `torch.Tensor` of shape `(...,)`.
        """
        if self.config.draft_vocab_size is None:
            return values.gather(-1, target_ids[..., None])[..., 0]
        self._draft_ids_cached()
        places = self.__dict__["_draft_ids"][2].to(values.device)[target_ids]
        found = values.gather(-1, places.clamp(min=0)[..., None])[..., 0]
        return torch.where(places >= 0, found, outside)

    def widen(self, probabilities: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """Spread values over the draft vocabulary onto the target's, with `fill` elsewhere.

        Args:
            probabilities (`torch.Tensor` of shape `(..., V_draft)`): p_d, or logits with `fill=-inf`.
            fill (`float`): value of the tokens that the drafter cannot propose.
        Returns:
            `torch.Tensor` of shape `(..., V)`.
        """
        if self.config.draft_vocab_size is None:
            return probabilities
        wide = probabilities.new_full((*probabilities.shape[:-1], self.config.vocab_size), fill)
        ids = cast(torch.Tensor, self._draft_ids_cached())
        return wide.index_copy_(-1, ids.to(wide.device), probabilities)

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

        A block sees the context strictly before its anchor, and itself. Only block tokens are queries, so the cost
        follows the number of anchors. With one anchor this equals `draft_hidden` after that context.

        Source: paper section 3.3.

        Args:
            taps (`torch.Tensor` of shape `(B, S, m * d)`): tapped hidden states; index in the sequence is the position
                id.
            anchor_ids (`torch.LongTensor` of shape `(B, A)`): tokens at the anchors.
            anchor_positions (`torch.LongTensor` of shape `(B, A)`): their positions.
            context_mask (`torch.BoolTensor` of shape `(B, S)`, *optional*): false at padding.
            gamma (`int`, *optional*): block length, `config.block_size` by default.
        Returns:
            `torch.Tensor` of shape `(B, A, gamma, d)`: after the final norm.
        Raises:
            ValueError: if gamma is below 1 or longer than the checkpoint's block.
            UnboundDrafterError: before `bind`.
        """
        gamma = self._check_gamma(gamma)
        context = self.project_taps(taps)
        length = context.shape[1]
        anchors = anchor_positions.shape[1]
        anchor_positions = anchor_positions.to(context.device)
        first = self.config.first_slot
        slots = gamma + first
        x = self._block_inputs(anchor_ids, slots).flatten(1, 2)
        steps = torch.arange(slots, device=x.device)
        rope = self._rope(x, (anchor_positions[..., None] + steps).flatten(1))
        past = torch.arange(length, device=x.device)
        context_rope = self._rope(context, past[None])

        sees_context = past < anchor_positions[..., None]
        if context_mask is not None:
            sees_context = sees_context & context_mask.to(device=x.device, dtype=torch.bool)[:, None, :]
        hidden_keys = ~sees_context.repeat_interleave(slots, dim=1)[:, None, None]
        far_keys = hidden_keys
        if self._slides:
            queries = (anchor_positions[..., None] + steps).flatten(1)
            far_keys = hidden_keys | ~self._near(past, queries, anchor_positions.repeat_interleave(slots, dim=1))[:, None, None]

        def attend(i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            attention = self._attention(i)
            context_k, context_v = attention.keys_values(context, context_rope)
            dropout = attention.attention_dropout if self.training else 0.0
            sliding = self._is_sliding(i)
            causal = sliding and self.config.causal_sliding_block
            return block_attention(q, k, v, context_k, context_v, far_keys if sliding else hidden_keys, slots, dropout, causal)

        for layer in self.layers:
            x = layer(x, rope, attend)
        return self.norm(x).unflatten(1, (anchors, slots))[:, :, first:]

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

    def _near(self, keys: torch.Tensor, queries: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """Which keys at positions `(S,)` lie in the window of queries at `(B, Q)`, whose anchors are at `(B, Q)`: `(B, Q, S)`."""
        first = anchors if self.config.window_from_anchor else queries
        return keys > (first - cast(int, self.config.sliding_window)).expand_as(queries)[..., None]

    @property
    def _slides(self) -> bool:
        return "sliding_attention" in cast(list[str], self.config.layer_types)

    def _check_gamma(self, gamma: int | None) -> int:
        longest = self.config.block_size
        if gamma is None:
            return longest
        if not 1 <= gamma <= longest:
            raise ValueError(
                f"A block of {gamma} tokens was asked for; this checkpoint was trained for 1..{longest}. Acceptance "
                "collapses beyond that: ask for fewer, or train with a longer block_size."
            )
        return gamma

    def _block_inputs(self, anchor_ids: torch.Tensor, slots: int) -> torch.Tensor:
        """Embeddings of [anchor, mask, .., mask], `(..., gamma, d)` in the drafter's dtype, from ids `(...,)`."""
        borrowed = self._require_bound()
        weight = self.hidden_norm.weight
        ids = anchor_ids.new_full((*anchor_ids.shape, slots), self.config.mask_token_id)
        ids[..., 0] = anchor_ids
        return borrowed.embed(ids).to(weight.device, weight.dtype)

    def _rope(self, x: torch.Tensor, positions: torch.Tensor) -> Rope:
        """cos and sin with a heads dimension, `(..., 1, head_dim)` from positions of shape `(...,)`."""
        flat = positions.reshape(1, -1)
        cos, sin = self.rotary_emb(x, flat)
        shape = (*positions.shape, 1, cos.shape[-1])
        return cos.reshape(shape), sin.reshape(shape)

    def _draft_ids_cached(self) -> torch.Tensor | None:
        if self.config.draft_vocab_size is None:
            return None
        version = -1 if self.d2t.is_inference() else self.d2t._version
        key = (self.d2t.data_ptr(), version, self.d2t.device)
        cached = self.__dict__.get("_draft_ids")
        if cached is None or cached[0] != key:
            ids = self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)
            places = torch.full((self.config.vocab_size,), -1, device=ids.device).scatter_(
                0, ids, torch.arange(len(ids), device=ids.device)
            )
            cached = self.__dict__["_draft_ids"] = (key, ids, places)
        return cached[1]


AutoConfig.register("dspark", DSparkConfig, exist_ok=True)
AutoModel.register(DSparkConfig, DSparkDrafter, exist_ok=True)
