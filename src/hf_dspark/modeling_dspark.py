"""The drafter: parallel backbone with injected target context, sequential head, confidence head. Knows PreTrainedModel,
and the target's embedding and head, which it borrows; knows no decoding loop, no training loop and no sampling.

Symbols as in the paper: d width, m taps, r rank of the head, gamma block size, V vocabulary, V_draft the drafter's
vocabulary, R rows.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    rotate_half,
)

from hf_dspark.configuration_dspark import DSparkConfig
from hf_dspark.conversion import (
    EMBEDDING_KEY,
    HUB_ARGUMENTS,
    LM_HEAD_KEY,
    TensorRecord,
    check_own_config,
    check_tensors,
    deepspec_config,
    list_tensors,
    read_config,
    recognise_format,
    same_weights,
)
from hf_dspark.errors import BindingError, CheckpointError, UnboundDrafterError
from hf_dspark.heads import ConfidenceHead, SequentialHead, build_head
from hf_dspark.row_cache import RowCache, RowLayout

logger = logging.getLogger(__name__)

Rope = tuple[torch.Tensor, torch.Tensor]
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_MASK_NAMES = re.compile(r"mask|reserved|unused|gh_stars", re.IGNORECASE)


class DSparkAttention(Qwen3Attention):
    """Qwen3's projections and norms; what the queries look at is the caller's business.

    Source: paper Eq. 3: the same key and value weights serve the block and the injected context.
    """

    def queries(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Queries of shape `(..., heads, head_dim)`, normalised and rotated, from `x` of shape `(..., d)`."""
        return _rotate(self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim))), rope)

    def keys_values(self, x: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (normalised and rotated) and values, each `(..., kv_heads, head_dim)`, from `x` of shape `(..., d)`."""
        keys = _rotate(self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim))), rope)
        return keys, self.v_proj(x).unflatten(-1, (-1, self.head_dim))

    def forward(self, x: torch.Tensor, rope: Rope, attend: Attend) -> torch.Tensor:
        """Attention output of shape `(..., d)`; `attend(layer, q, k, v)` returns `(..., heads * head_dim)`."""
        return self.o_proj(attend(self.layer_idx, self.queries(x, rope), *self.keys_values(x, rope)))


class DSparkRotaryEmbedding(Qwen3RotaryEmbedding):
    """Qwen3's, with frequencies that stay float32 when the drafter is cast.

    In bfloat16 the angles would be off by whole turns at long contexts.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> DSparkRotaryEmbedding:
        super()._apply(fn, recurse)
        for name in ("inv_freq", "original_inv_freq"):
            cast = getattr(self, name)
            if cast.dtype != torch.float32 and cast.device.type != "meta":
                exact = type(self)(self.config).inv_freq
                setattr(self, name, exact.to(device=cast.device, dtype=torch.float32))
        return self


class DSparkLayer(GradientCheckpointingLayer):
    """One pre-norm layer of the backbone."""

    def __init__(self, config: DSparkConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = DSparkAttention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: torch.Tensor, rope: Rope, attend: Attend) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Borrowed:
    """The target's embedding and head, outside the module tree: not saved, moved, cast or copied with the drafter."""

    def __init__(self, target: PreTrainedModel, embedding: nn.Module, head: nn.Module, softcap: float | None) -> None:
        self.target = weakref.ref(target)
        self.embedding = embedding
        self.head = head
        self.softcap = softcap
        self._reduced: tuple[tuple[Any, ...], torch.Tensor, torch.Tensor | None] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Borrowed:
        return self

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # A pickled drafter comes back unbound.

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        # Through the module, not its weight: some families scale inside it (Gemma), adapters and offloading wrap it.
        with torch.no_grad():
            weight = getattr(self.embedding, "weight", None)
            if weight is not None and weight.device.type != "meta":
                ids = ids.to(weight.device)
            return self.embedding(ids)

    def logits(self, h: torch.Tensor, draft_ids: torch.Tensor | None) -> torch.Tensor:
        head: Any = self.head
        plain = type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks and not hasattr(head, "_hf_hook")
        if plain:
            weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
            if draft_ids is not None:
                weight, bias = self._rows(weight, bias, draft_ids)
            logits = F.linear(h.to(weight.device, weight.dtype), weight, bias)
        else:
            weight = getattr(head, "weight", None)
            if weight is not None and weight.device.type != "meta":
                h = h.to(weight.device, weight.dtype if weight.is_floating_point() else None)
            logits = head(h)
            if draft_ids is not None:
                logits = logits.index_select(-1, draft_ids.to(logits.device))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _rows(self, weight: torch.Tensor, bias: torch.Tensor | None, draft_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Copied once, not every round; again when the target's head moved or was written to.
        version = -1 if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version, weight.dtype, weight.device, draft_ids.data_ptr(), len(draft_ids))
        if self._reduced is None or self._reduced[0] != key:
            ids = draft_ids.to(weight.device)
            self._reduced = (key, weight[ids], None if bias is None else bias[ids])
        return self._reduced[1], self._reduced[2]


class DSparkDrafter(PreTrainedModel):
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
    _no_split_modules: ClassVar[list[str]] = ["DSparkLayer"]
    _supports_sdpa = True

    is_dspark_drafter = True

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__(config)
        if config.mask_token_id is None:
            raise ValueError(
                "config.mask_token_id is None; a drafter needs the id of a token that the tokenizer does not use in "
                "text. Set it, or "
                "use DSparkDrafter.from_target(target, tokenizer=...), which chooses one."
            )
        d = config.hidden_size
        self.fc = nn.Linear(len(config.target_layer_ids) * d, d, bias=False)
        self.hidden_norm = Qwen3RMSNorm(d, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList([DSparkLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = Qwen3RMSNorm(d, eps=config.rms_norm_eps)
        self.rotary_emb = DSparkRotaryEmbedding(config)
        self.markov_head = build_head(config)
        self.confidence_head: ConfidenceHead | None = None
        if config.enable_confidence_head:
            self.confidence_head = ConfidenceHead(d + (config.markov_rank if config.confidence_head_with_markov else 0))
        if config.draft_vocab_size is not None:
            # The first V_draft tokens, until from_target or a checkpoint says otherwise.
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))

        self.budget: Any = "full"
        self._borrowed: _Borrowed | None = None
        self._carried: dict[str, TensorRecord] = {}
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
        text = target.config.get_text_config(decoder=True)
        in_use = _token_ids_in_use(target)
        if mask_token_id is None:
            if tokenizer is None:
                raise ValueError(
                    "from_target needs tokenizer= (to choose a mask token that text does not use) or mask_token_id=; got neither."
                )
            mask_token_id = choose_mask_token_id(tokenizer, text.vocab_size, in_use)
        else:
            _check_mask_token(mask_token_id, text.vocab_size, in_use, tokenizer)
        if draft_token_ids is not None:
            draft_token_ids = _check_draft_ids(draft_token_ids, text.vocab_size)
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
            drafter._copy_from_target(target)
        return drafter

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None, *model_args: Any, **kwargs: Any) -> DSparkDrafter:
        """Load a drafter, strictly, in this package's own format or DeepSpec's (`Qwen3DSparkModel`, DSpark and DFlash).

        Copies of embedding and head that DeepSpec's files carry are not loaded; `bind` compares them with the target's.
        The drafter comes unbound: `generate` binds it, or `bind(target)` does.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): folder or Hub repository.
            kwargs: as in `PreTrainedModel.from_pretrained`; fields of `DSparkConfig` override the stored ones.
        Returns:
            `DSparkDrafter`.
        Raises:
            CheckpointError: for a format that is not understood, and for missing, unexpected or mis-shaped tensors, all
                in one list.
            ValueError: for a block longer than the checkpoint's.
        """
        if pretrained_model_name_or_path is None:
            config, state = kwargs.get("config"), kwargs.get("state_dict")
            if isinstance(config, DSparkConfig) and state is not None:
                check_tensors(cls._expected_tensors(config), {k: TensorRecord.of(k, v) for k, v in state.items()}, "state_dict")
            return super().from_pretrained(None, *model_args, **kwargs)
        source = str(pretrained_model_name_or_path)
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        raw = read_config(source, **hub)
        if raw is None:
            raise CheckpointError(
                f"{source!r} holds no config.json. Give the folder or repository of a drafter; adapters are loaded "
                "onto one with "
                "PeftModel.from_pretrained(drafter, adapter)."
            )
        kind = recognise_format(raw, source)
        if kind == "dspark":
            check_own_config(raw, source)

        fields = {f.name for f in dataclasses.fields(DSparkConfig)} - {"dtype"}
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if key in fields}
        longest = raw.get("block_size")
        if isinstance(longest, int) and overrides.get("block_size", longest) > longest:
            raise ValueError(
                f"{source!r} was trained for blocks of {longest} tokens; got block_size={overrides['block_size']}. "
                "Acceptance "
                f"collapses beyond what was trained: use 1..{longest}."
            )
        config = kwargs.pop("config", None)
        if not isinstance(config, DSparkConfig):
            if kind == "deepspec":
                config = deepspec_config(raw, source, **overrides)
            else:
                config = DSparkConfig.from_pretrained(config or source, **hub, **overrides)

        found = list_tensors(source, kwargs.get("variant"), **hub)
        expected = cls._expected_tensors(config)
        if kind == "deepspec":
            matrix = torch.empty(config.vocab_size, config.hidden_size, device="meta")
            expected.update({EMBEDDING_KEY: matrix, LM_HEAD_KEY: matrix})
        check_tensors(expected, found, source)

        if kind == "dspark":
            return super().from_pretrained(source, *model_args, config=config, **{**kwargs, "use_safetensors": True})
        carried = {key: found.pop(key) for key in (EMBEDDING_KEY, LM_HEAD_KEY)}
        state = {name: record.read() for name, record in found.items()}
        kwargs = {key: value for key, value in kwargs.items() if key not in (*HUB_ARGUMENTS, "variant", "use_safetensors")}
        loaded = super().from_pretrained(None, *model_args, config=config, state_dict=state, **kwargs)
        drafter = loaded[0] if isinstance(loaded, tuple) else loaded
        drafter._carried = carried
        drafter.config.name_or_path = drafter.name_or_path = source
        return loaded

    @classmethod
    def _expected_tensors(cls, config: DSparkConfig) -> dict[str, torch.Tensor]:
        """Every tensor that a checkpoint with this config holds, without storage."""
        with torch.device("meta"):
            return dict(cls(copy.deepcopy(config)).state_dict())

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
                DeepSpec file carried differ from the target's.
        """
        embedding, head = _input_output_embeddings(target)
        borrowed = self._borrowed
        if borrowed is not None and borrowed.embedding is embedding and borrowed.head is head:
            return self
        text = target.config.get_text_config(decoder=True)
        self._check_fit(target, text, embedding)
        self._check_carried(target, embedding, head)
        self._carried = {}
        self._borrowed = _Borrowed(target, embedding, head, getattr(text, "final_logit_softcapping", None))
        return self

    @property
    def bound(self) -> bool:
        """Whether `bind` has been called; a loaded or unpickled drafter is not bound."""
        return self._borrowed is not None

    @property
    def target(self) -> PreTrainedModel | None:
        """The target bound to, or `None`; not kept alive by the drafter."""
        return None if self._borrowed is None else self._borrowed.target()

    def _require_bound(self) -> _Borrowed:
        if self._borrowed is None:
            raise UnboundDrafterError(
                "This drafter has no target yet: it borrows the target's embedding and head, and has none of its own. "
                "Call "
                "drafter.bind(target) first, or let target.generate(..., assistant_model=drafter) do it."
            )
        return self._borrowed

    def _check_fit(self, target: PreTrainedModel, text: Any, embedding: nn.Module) -> None:
        config = self.config
        wrong = [
            f"{what}: the drafter was made for {own}, the target has {theirs}"
            for what, own, theirs in (
                ("hidden size", config.hidden_size, text.hidden_size),
                ("vocabulary", config.vocab_size, text.vocab_size),
                ("decoder layers", config.num_target_layers, text.num_hidden_layers),
            )
            if own != theirs
        ]
        weight = getattr(embedding, "weight", None)
        if weight is not None and weight.is_floating_point() and weight.dim() == 2:
            rows, width = weight.shape
            if width != config.hidden_size and width != text.hidden_size:
                wrong.append(f"embedding width: the drafter needs {config.hidden_size}, the target's is {width}")
            if config.mask_token_id >= rows:
                wrong.append(f"mask token id {config.mask_token_id}: the target's embedding has rows 0..{rows - 1} only")
        if getattr(target.config, "is_encoder_decoder", False):
            wrong.append("kind of model: the target is an encoder-decoder, a drafter needs a decoder-only language model")
        ids = self.draft_token_ids
        if ids is not None and (ids.min() < 0 or ids.max() >= config.vocab_size):
            wrong.append(f"d2t: it maps draft ids to {int(ids.min())}..{int(ids.max())}, outside 0..{config.vocab_size - 1}")
        if wrong:
            made_for = f" (made for {config.target_name or config.target_model_type})" if config.target_model_type else ""
            raise BindingError(
                f"This drafter{made_for} does not fit the target {type(target).__name__}:\n"
                + "\n".join(f"  {line}" for line in wrong)
                + "\nUse the target that it was trained for, or make a new one with "
                "DSparkDrafter.from_target(target, ...)."
            )
        if config.target_model_type not in (None, text.model_type):
            logger.warning(
                "This drafter was made for a target of type %r; it is bound to one of type %r.",
                config.target_model_type,
                text.model_type,
            )

    def _check_carried(self, target: PreTrainedModel, embedding: nn.Module, head: nn.Module) -> None:
        differs = []
        for key, module in ((EMBEDDING_KEY, embedding), (LM_HEAD_KEY, head)):
            record = self._carried.get(key)
            if record is None:
                continue
            weight = getattr(module, "weight", None)
            if weight is None or not weight.is_floating_point() or weight.device.type == "meta":
                logger.warning(
                    "The target's %s is quantized or offloaded and could not be compared with the checkpoint's copy.",
                    key,
                )
                continue
            if not Path(record.path).exists():
                raise CheckpointError(f"{record.path} is gone, but its {key} must be compared with the target's. Load the drafter again.")
            if not same_weights(record, weight):
                differs.append(f"{key}: stored {record.shape}, target's {tuple(weight.shape)}")
        if differs:
            raise BindingError(
                "The drafter's checkpoint carries copies of the weights of the target that it was trained for, and "
                "those of "
                f"{type(target).__name__} differ:\n"
                + "\n".join(f"  {line}" for line in differs)
                + "\nBind it to the target that its model card names."
            )

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
    def draft_hidden(self, anchor_ids: torch.Tensor, starts: Sequence[int], cache: RowCache, gamma: int | None = None) -> torch.Tensor:
        """Run the backbone on one block a row: [anchor, mask, .., mask], all positions at once.

        The anchor sits at its own position, `starts[r]`, right after the context; it is the first position that
        predicts. The block's keys and values are scratch: they lie in the cache beyond `lengths` and are overwritten
        later. Rows are the cache's rows 0..R-1.

        Source: paper section 3.1.1.

        Args:
            anchor_ids (`torch.LongTensor` of shape `(R,)`): last committed token of each row.
            starts (`Sequence[int]`): context tokens of each row in the cache.
            cache (`RowCache`): the drafter's own.
            gamma (`int`, *optional*): tokens to draft; by default, and at most, `config.block_size`.
        Returns:
            `torch.Tensor` of shape `(R, gamma, d)`: h_1..h_gamma, after the final norm.
        Raises:
            ValueError: if gamma is below 1 or longer than the checkpoint's block.
            UnboundDrafterError: before `bind`.
        """
        gamma = self._check_gamma(gamma)
        rows = len(starts)
        layout = RowLayout(starts, [gamma] * rows, self.hidden_norm.weight.device)
        x = self._block_inputs(anchor_ids, gamma)
        rope = self._rope(x, layout.positions.view(rows, gamma))
        mask = None
        if min(starts) != max(starts):
            ends = torch.tensor(starts, device=x.device)[:, None, None, None] + gamma
            mask = torch.arange(layout.max_end, device=x.device) < ends

        def attend(i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            cache.write(i, k.flatten(0, 1), v.flatten(0, 1), layout)
            keys, values = cache.view(i, layout)
            # Query heads that share a key head lie along the query length, so that keys and values are not expanded.
            heads, groups = k.shape[-2], q.shape[-2] // k.shape[-2]
            q = q.unflatten(2, (heads, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            return out.unflatten(2, (groups, gamma)).permute(0, 3, 1, 2, 4).flatten(2)

        for layer in self.layers:
            x = layer(x, rope, attend)
        return self.norm(x)

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

        Source: paper section 3.2.1. T_i are `config.confidence_temperatures`, or 1 where there are none.

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
        if self.config.draft_vocab_size is None:
            return None
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def to_target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Target ids of draft ids: draft_id + d2t[draft_id].

        Args:
            draft_ids (`torch.LongTensor` of any shape): indices into the last dimension of `base_logits`.
        Returns:
            `torch.LongTensor` of the same shape.
        """
        return draft_ids if self.config.draft_vocab_size is None else draft_ids + self.d2t[draft_ids]

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
        x = self._block_inputs(anchor_ids, gamma).flatten(1, 2)
        steps = torch.arange(gamma, device=x.device)
        rope = self._rope(x, (anchor_positions[..., None] + steps).flatten(1))
        past = torch.arange(length, device=x.device)
        context_rope = self._rope(context, past[None])

        sees_context = past < anchor_positions[..., None]
        if context_mask is not None:
            sees_context = sees_context & context_mask.to(device=x.device, dtype=torch.bool)[:, None, :]
        hidden_keys = ~sees_context.repeat_interleave(gamma, dim=1)[:, None, None]

        def attend(i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            attention = self._attention(i)
            context_k, context_v = attention.keys_values(context, context_rope)
            dropout = attention.attention_dropout if self.training else 0.0
            return _block_attention(q, k, v, context_k, context_v, hidden_keys, gamma, dropout)

        for layer in self.layers:
            x = layer(x, rope, attend)
        return self.norm(x).unflatten(1, (anchors, gamma))

    def forward(
        self,
        taps: torch.Tensor,
        anchor_ids: torch.Tensor,
        anchor_positions: torch.Tensor,
        context_mask: torch.Tensor | None = None,
        gamma: int | None = None,
    ) -> torch.Tensor:
        """Same as `training_hidden`, so that wrappers that go through `forward` (data parallel, PEFT) work."""
        return self.training_hidden(taps, anchor_ids, anchor_positions, context_mask, gamma)

    # --------------------------------------------------------------------------------------------------------- internal

    def get_input_embeddings(self) -> nn.Module | None:
        """`None`: the embedding is the target's."""
        return None

    def get_output_embeddings(self) -> nn.Module | None:
        """`None`: the head is the target's."""
        return None

    def _attention(self, layer: int) -> DSparkAttention:
        return cast(DSparkLayer, self.layers[layer]).self_attn

    def _check_gamma(self, gamma: int | None) -> int:
        longest = self.config.block_size
        if gamma is None:
            return longest
        if not 1 <= gamma <= longest:
            raise ValueError(
                f"A block of {gamma} tokens was asked for; this checkpoint was trained for 1..{longest}. Acceptance "
                "collapses beyond "
                "that: ask for fewer, or train with a longer block_size."
            )
        return gamma

    def _block_inputs(self, anchor_ids: torch.Tensor, gamma: int) -> torch.Tensor:
        """Embeddings of [anchor, mask, .., mask], `(..., gamma, d)` in the drafter's dtype, from ids `(...,)`."""
        borrowed = self._require_bound()
        weight = self.hidden_norm.weight
        ids = anchor_ids.new_full((*anchor_ids.shape, gamma), self.config.mask_token_id)
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
            cached = self.__dict__["_draft_ids"] = (key, self.draft_token_ids)
        return cached[1]

    @torch.no_grad()
    def _copy_from_target(self, target: PreTrainedModel) -> list[str]:
        """Start the backbone from the target's last layers, where shapes agree; returns the names copied."""
        decoder = target.get_decoder()
        theirs = next((m for name in ("layers", "h") if isinstance(m := getattr(decoder, name, None), nn.ModuleList)), None)
        copied: list[str] = []

        def copy_into(name: str, weight: torch.Tensor | None) -> None:
            own = self.get_parameter(name)
            if weight is not None and weight.is_floating_point() and weight.shape == own.shape and weight.device.type != "meta":
                own.copy_(weight)
                copied.append(name)

        for i in range(-len(self.layers), 0):
            if theirs is None or len(theirs) < -i:
                continue
            layer, prefix = theirs[i], f"layers.{i + len(self.layers)}"
            attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                copy_into(f"{prefix}.self_attn.{name}.weight", getattr(getattr(attention, name, None), "weight", None))
            for name in ("q_norm", "k_norm"):
                copy_into(f"{prefix}.self_attn.{name}.weight", _rms_scale(getattr(attention, name, None)))
            for name in ("gate_proj", "up_proj", "down_proj"):
                copy_into(f"{prefix}.mlp.{name}.weight", getattr(getattr(mlp, name, None), "weight", None))
            copy_into(f"{prefix}.input_layernorm.weight", _rms_scale(getattr(layer, "input_layernorm", None)))
            # The norm before the MLP: Gemma calls it otherwise, and uses our name for a norm after the attention, as
            # OLMo 2 does.
            before_mlp = getattr(layer, "pre_feedforward_layernorm", None)
            if before_mlp is None and not hasattr(layer, "post_feedforward_layernorm"):
                before_mlp = getattr(layer, "post_attention_layernorm", None)
            copy_into(f"{prefix}.post_attention_layernorm.weight", _rms_scale(before_mlp))
        copy_into("norm.weight", _rms_scale(getattr(decoder, "norm", None)))
        logger.info(
            "Copied %d of the backbone's tensors from the last layers of %s: %s.",
            len(copied),
            type(target).__name__,
            ", ".join(copied) or "none has the same name and shape",
        )
        return copied


def choose_mask_token_id(tokenizer: Any, vocab_size: int, in_use: Iterable[int] = ()) -> int:
    """Choose a token id for the drafter's mask that text never produces.

    In this order: the tokenizer's own mask token; the last row of the embedding that no token of the tokenizer reaches;
    an added token whose name says that it is spare (mask, reserved, unused; StarCoder's `<gh_stars>`, which SmolLM2
    inherits), the last such one; the last added special token. Tokens in use (bos, eos, pad, unk and the like) and
    tokens that the chat template writes are left out.

    Args:
        tokenizer: a transformers tokenizer.
        vocab_size (`int`): rows of the target's embedding.
        in_use (`Iterable[int]`): further ids to leave out.
    Returns:
        `int`: the id.
    Raises:
        ValueError: if there is no such token.
    """
    named = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id")
    taken = {*in_use, *(i for name in named if (i := getattr(tokenizer, name, None)) is not None)}
    own = getattr(tokenizer, "mask_token_id", None)
    if own is not None and 0 <= own < vocab_size and own not in taken:
        return own
    added = tokenizer.added_tokens_decoder
    highest = max(len(tokenizer) - 1, *added, 0)
    if vocab_size - 1 > highest and vocab_size - 1 not in taken:
        return vocab_size - 1
    template = str(getattr(tokenizer, "chat_template", None) or "")
    spare = [
        (token_id, str(token))
        for token_id, token in sorted(added.items())
        if 0 <= token_id < vocab_size and token_id not in taken and str(token) not in template
    ]
    by_name = [token_id for token_id, text in spare if _MASK_NAMES.search(text)]
    special = [token_id for token_id, _ in spare if getattr(added[token_id], "special", False)]
    if by_name or special:
        return (by_name or special)[-1]
    raise ValueError(
        "The tokenizer has no spare token that could serve as the drafter's mask: no unused embedding row, no mask, "
        "reserved or unused "
        "token. Pass mask_token_id= with a token that your text never contains."
    )


def _check_mask_token(mask_token_id: int, vocab_size: int, in_use: set[int], tokenizer: Any) -> None:
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(f"mask_token_id must be a row of the target's embedding, 0..{vocab_size - 1}; got {mask_token_id}.")
    named = ("bos_token_id", "eos_token_id", "pad_token_id")
    if mask_token_id in in_use | {getattr(tokenizer, name, None) for name in named}:
        raise ValueError(
            f"mask_token_id {mask_token_id} is the target's bos, eos or pad token; the drafter could not tell it from "
            "text. Choose a "
            "token that the tokenizer does not use, or pass tokenizer= and let one be chosen."
        )
    if tokenizer is not None and mask_token_id < len(tokenizer) and mask_token_id not in tokenizer.added_tokens_decoder:
        logger.warning(
            "mask_token_id %d (%r) is an ordinary token of the tokenizer.",
            mask_token_id,
            tokenizer.decode([mask_token_id]),
        )


def _token_ids_in_use(target: PreTrainedModel) -> set[int]:
    """bos, eos and pad ids of the target's config and generation config."""
    found: set[int] = set()
    text = target.config.get_text_config(decoder=True)
    for config in (target.config, text, getattr(target, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return found


def _check_draft_ids(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    ids = torch.as_tensor(ids)
    if ids.dim() != 1 or ids.dtype.is_floating_point or ids.dtype == torch.bool or ids.numel() == 0:
        raise ValueError(f"draft_token_ids must be a non-empty 1-D tensor of token ids; got shape {tuple(ids.shape)}, {ids.dtype}.")
    ids = ids.to(device="cpu", dtype=torch.int64).sort().values
    if ids[0] < 0 or ids[-1] >= vocab_size:
        raise ValueError(f"draft_token_ids must lie in 0..{vocab_size - 1}; got {int(ids[0])}..{int(ids[-1])}.")
    if (ids[1:] == ids[:-1]).any():
        raise ValueError(f"draft_token_ids must not repeat; {int((ids[1:] == ids[:-1]).sum())} of {len(ids)} do.")
    return ids


def _input_output_embeddings(target: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The target's embedding and head modules, found through transformers' accessors, which PEFT wrappers forward."""
    try:
        embedding, head = target.get_input_embeddings(), target.get_output_embeddings()
    except (AttributeError, NotImplementedError) as error:
        raise BindingError(
            f"{type(target).__name__} does not tell its input and output embeddings ({error}). A target is a transformers causal LM."
        ) from error
    if embedding is None or head is None:
        lacks = "input embedding" if embedding is None else "language-model head"
        raise BindingError(f"{type(target).__name__} has no {lacks}. Pass the causal LM (AutoModelForCausalLM), not its base model.")
    return embedding, head


@torch.no_grad()
def _rms_scale(norm: nn.Module | None) -> torch.Tensor | None:
    """What an RMSNorm multiplies by (its weight, or one plus it as in Gemma); `None` for another kind of norm."""
    weight = getattr(norm, "weight", None)
    if norm is None or weight is None or "RMSNorm" not in type(norm).__name__ or weight.device.type == "meta":
        return None
    scale = norm(torch.ones_like(weight)[None])[0]  # ones have RMS one
    for candidate in (weight, 1.0 + weight):
        if torch.allclose(scale.float(), candidate.float(), rtol=1e-2, atol=1e-3):
            return candidate.detach()
    return None


def _rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    cos, sin = rope
    return x * cos + rotate_half(x) * sin


def _block_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    context_k: torch.Tensor,
    context_v: torch.Tensor,
    hidden_keys: torch.Tensor,
    gamma: int,
    dropout: float = 0.0,
) -> torch.Tensor:
    """One softmax over the context and the query's own block; scores against other blocks never exist.

    Args:
        q (`torch.Tensor` of shape `(B, A * gamma, H, D)`): queries of the blocks, one block after the other.
        k, v (`torch.Tensor` of shape `(B, A * gamma, Hkv, D)`): keys and values of the blocks.
        context_k, context_v (`torch.Tensor` of shape `(B, S, Hkv, D)`): keys and values of the context.
        hidden_keys (`torch.BoolTensor` of shape `(B, 1, 1, A * gamma, S)`): true where a query must not look.
        gamma (`int`): block length.
        dropout (`float`): probability of dropping an attention weight.
    Returns:
        `torch.Tensor` of shape `(B, A * gamma, H * D)`.
    """
    _, length, kv_heads, size = context_k.shape
    rows = q.shape[1]
    groups, anchors = q.shape[2] // kv_heads, rows // gamma

    def by_block(t: torch.Tensor) -> torch.Tensor:  # (B, Hkv, g, A * gamma, n) -> (B, Hkv, A, g * gamma, n)
        return t.unflatten(3, (anchors, gamma)).transpose(2, 3).flatten(3, 4)

    def by_row(t: torch.Tensor) -> torch.Tensor:  # and back
        return t.unflatten(3, (groups, gamma)).transpose(2, 3).flatten(3, 4)

    q = (q * size**-0.5).unflatten(2, (kv_heads, groups)).permute(0, 2, 3, 1, 4)  # (B, Hkv, g, A * gamma, D)
    k, v = (t.unflatten(1, (anchors, gamma)).permute(0, 3, 1, 2, 4) for t in (k, v))  # (B, Hkv, A, gamma, D)
    outside = (q.flatten(2, 3) @ context_k.permute(0, 2, 3, 1)).unflatten(2, (groups, rows))
    inside = by_row(by_block(q) @ k.transpose(-1, -2))  # (B, Hkv, g, A * gamma, gamma)
    weights = torch.cat((outside.masked_fill(hidden_keys, float("-inf")), inside), dim=-1).softmax(dim=-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    from_context, from_block = weights.split((length, gamma), dim=-1)
    out = (from_context.flatten(2, 3) @ context_v.transpose(1, 2)).unflatten(2, (groups, rows))
    out = out + by_row(by_block(from_block) @ v)
    return out.permute(0, 3, 1, 2, 4).flatten(2)


AutoConfig.register("dspark", DSparkConfig, exist_ok=True)
AutoModel.register(DSparkConfig, DSparkDrafter, exist_ok=True)
