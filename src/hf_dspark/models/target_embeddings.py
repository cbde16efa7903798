"""The embedding and head of a drafter's target: finding them, checking that they fit, using them outside the module tree."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import nn
from transformers import PreTrainedModel

from hf_dspark.checkpoints.tensor_files import EMBEDDING_KEY, LM_HEAD_KEY, TensorRecord, same_weights
from hf_dspark.configuration_dspark import DSparkConfig, check_tapped_layers
from hf_dspark.errors import BindingError, CheckpointError

logger = logging.getLogger(__name__)


class TargetEmbeddings:
    """The target's embedding and head, by reference: not saved, moved, cast or copied with the drafter.

    Args:
        target (`PreTrainedModel` or a PEFT wrapper): whose they are; held weakly.
        embedding, head (`nn.Module`): from `input_output_embeddings`.
        raw (`bool`): leave out the target's embedding scale and logit soft-cap.
    """

    def __init__(self, target: PreTrainedModel, embedding: nn.Module, head: nn.Module, *, raw: bool) -> None:
        self.target = weakref.ref(target)
        self.embedding = embedding
        self.head = head
        self.raw = raw
        self.softcap = None if raw else getattr(target.config.get_text_config(decoder=True), "final_logit_softcapping", None)
        self._reduced: tuple[tuple[Any, ...], torch.Tensor, torch.Tensor | None] | None = None
        self._graph_rows: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._stale = False

    def __deepcopy__(self, memo: dict[int, Any]) -> TargetEmbeddings:
        return self

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # a pickled drafter comes back unbound

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of `ids` `(...)`: `(..., d)`, scaled as the target scales them unless they are raw."""
        # Through the module, not its weight: some families scale inside it (Gemma), adapters and offloading wrap it.
        with torch.no_grad():
            weight = weight_of(self.embedding)
            if weight is None or weight.device.type != "meta":
                ids = ids if weight is None else ids.to(weight.device)
                raw = self.raw and weight is not None and weight.is_floating_point()
                return F.embedding(ids, cast(torch.Tensor, weight)) if raw else self.embedding(ids)
            if not self.raw:
                return self.embedding(ids)
            with align_module_device(self.embedding):  # offloaded: the weight comes for as long as this is open
                weight = cast(torch.Tensor, self.embedding.weight)
                return F.embedding(ids.to(weight.device), weight)

    def logits(self, h: torch.Tensor, draft_ids: torch.Tensor | None) -> torch.Tensor:
        """Soft-capped logits of `h` `(..., d)`, at the draft ids or, without them, at all: `(..., V_draft)`."""
        head: Any = self.head
        plain = type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks and not hasattr(head, "_hf_hook")
        if plain:
            weight, bias = head.weight, head.bias
            if draft_ids is not None:
                weight, bias = self._rows(weight, bias, draft_ids)
            weight, bias = weight.detach(), None if bias is None else bias.detach()
            # As a 2-D matrix: for a batch of one with odd strides, matmul would copy the whole head.
            rows = h.to(weight.device, weight.dtype).reshape(-1, h.shape[-1])
            logits = F.linear(rows, weight, bias).reshape(*h.shape[:-1], weight.shape[0])
        else:
            # Quantized heads and heads with hooks get the dtype that the target's own layers give them.
            target = self.target()
            h = h if target is None else h.to(target.dtype)
            weight = weight_of(head)
            if weight is not None and weight.device.type != "meta":
                h = h.to(weight.device, weight.dtype if weight.is_floating_point() else None)
            logits = head(h)
            if draft_ids is not None:
                logits = logits.index_select(-1, draft_ids.to(logits.device))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def sync(self, draft_ids: torch.Tensor | None) -> None:
        """Copy the head's rows to where compiled graphs read them, who do not look whether they are to be copied again."""
        if draft_ids is None or type(self.head) is not nn.Linear:
            return
        rows = self._rows(self.head.weight, self.head.bias, draft_ids)
        kept = self._graph_rows
        if self._reduced is None or kept is None or [_form(one) for one in kept] != [_form(one) for one in rows]:
            self._graph_rows = rows
            return
        for old, new in zip(kept, rows, strict=True):
            if old is not None and new is not None and old is not new:
                old.copy_(new)
        self._reduced = (self._reduced[0], *kept)

    def refresh(self) -> None:
        """Copy the head's rows again when they are next needed: what was written to its weight through `.data` has left no trace."""
        self._stale = True

    def _rows(self, weight: torch.Tensor, bias: torch.Tensor | None, draft_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Copied once a binding, not every round; again if the target's head moved or was written to.
        version = -1 if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version, weight.dtype, weight.device, draft_ids.data_ptr(), len(draft_ids))
        if self._reduced is None or self._stale or self._reduced[0] != key:
            self._stale = False  # first: what another thread finds stale meanwhile is copied again
            with torch.inference_mode(False), torch.no_grad():  # kept over calls, of which others may need gradients
                ids = draft_ids.to(weight.device)
                self._reduced = (key, weight[ids], None if bias is None else bias[ids])
        return self._reduced[1], self._reduced[2]


def _form(tensor: torch.Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def weight_of(module: nn.Module) -> torch.Tensor | None:
    """The module's weight; None where it has none or hides it behind a method, as dynamically quantized layers do."""
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, torch.Tensor) else None


def input_output_embeddings(target: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The target's embedding and head modules, through transformers' accessors, which PEFT wrappers forward.

    Raises:
        BindingError: if the target has no embedding or no head.
    """
    try:
        embedding, head = target.get_input_embeddings(), target.get_output_embeddings()
    except (AttributeError, NotImplementedError) as error:
        raise BindingError(
            f"{type(target).__name__} has no accessor for its input and output embeddings ({error}). Pass a transformers causal LM."
        ) from error
    if embedding is None or head is None:
        lacks = "input embedding" if embedding is None else "language-model head"
        raise BindingError(f"{type(target).__name__} has no {lacks}. Pass the causal LM (AutoModelForCausalLM), not its base model.")
    return embedding, head


def check_fit(config: DSparkConfig, draft_token_ids: torch.Tensor | None, target: PreTrainedModel, embedding: nn.Module) -> None:
    """Refuse a target that a drafter with this config was not made for.

    Args:
        config (`DSparkConfig`): the drafter's.
        draft_token_ids (`torch.LongTensor` of shape `(V_draft,)`, *optional*): target ids of the draft ids.
        target (`PreTrainedModel` or a PEFT wrapper): the target.
        embedding (`nn.Module`): its embedding.
    Raises:
        BindingError: listing everything that does not fit.
    """
    text = target.config.get_text_config(decoder=True)
    wrong = [
        f"{what}: the drafter was made for {own}, the target has {theirs}"
        for what, own, theirs in (
            ("hidden size", config.hidden_size, text.hidden_size),
            ("vocabulary", config.vocab_size, text.vocab_size),
            ("decoder layers", config.num_target_layers, text.num_hidden_layers),
        )
        if own != theirs and own not in (None, 0)
    ]
    if config.num_target_layers is None:
        try:
            check_tapped_layers(config.target_layer_ids, text.num_hidden_layers)
        except ValueError as error:
            wrong.append(f"taps: {error}")
    weight = weight_of(embedding)
    if weight is not None and weight.is_floating_point() and weight.dim() == 2:
        rows, width = weight.shape
        if width != config.hidden_size and width != text.hidden_size:
            wrong.append(f"embedding width: the drafter needs {config.hidden_size}, the target's is {width}")
        if (config.mask_token_id or 0) >= rows:
            wrong.append(f"mask token id {config.mask_token_id}: the target's embedding has rows 0..{rows - 1} only")
    if getattr(target.config, "is_encoder_decoder", False):
        wrong.append("kind of model: the target is an encoder-decoder, a drafter needs a decoder-only language model")
    ids = draft_token_ids
    if ids is not None and (ids.min() < 0 or ids.max() >= config.vocab_size):
        wrong.append(f"d2t: it maps draft ids to {int(ids.min())}..{int(ids.max())}, outside 0..{config.vocab_size - 1}")
    if wrong:
        made_for = f" (made for {config.target_name or config.target_model_type})" if config.target_model_type else ""
        raise BindingError(
            f"This drafter{made_for} does not fit the target {type(target).__name__}:\n"
            + "\n".join(f"  {line}" for line in wrong)
            + "\nUse the target that it was trained for, or create a drafter with DSparkDrafter.from_target(target, ...)."
        )
    if config.target_model_type not in (None, text.model_type):
        logger.warning(
            "This drafter was made for a target of type %r; it is bound to one of type %r.",
            config.target_model_type,
            text.model_type,
        )


def check_carried(
    carried: Mapping[str, TensorRecord],
    target: PreTrainedModel,
    embedding: nn.Module,
    head: nn.Module,
    draft_token_ids: torch.Tensor | None = None,
) -> None:
    """Compare the copies of embedding and head that a foreign checkpoint carries with the target's own.

    Args:
        carried (`Mapping[str, TensorRecord]`): the copies, by tensor name; may be empty.
        target (`PreTrainedModel` or a PEFT wrapper): the target.
        embedding, head (`nn.Module`): its embedding and head.
        draft_token_ids (`torch.LongTensor` of shape `(V_draft,)`, *optional*): rows of the head that the copy holds; all where None.
    Raises:
        BindingError: if one of them differs.
        CheckpointError: if the file is gone.
    """
    differs = []
    for key, module in ((EMBEDDING_KEY, embedding), (LM_HEAD_KEY, head)):
        record = carried.get(key)
        if record is None:
            continue
        weight = weight_of(module)
        if weight is None or not weight.is_floating_point() or weight.device.type == "meta":
            logger.warning("The target's %s is quantized or offloaded and could not be compared with the checkpoint's copy.", key)
            continue
        if not Path(record.path).exists():
            raise CheckpointError(f"{record.path} is gone, but its {key} must be compared with the target's. Load the drafter again.")
        if key == LM_HEAD_KEY and draft_token_ids is not None:
            weight = weight.detach()[draft_token_ids.to(weight.device)]
        if not same_weights(record, weight):
            differs.append(f"{key}: stored {record.shape}, target's {tuple(weight.shape)}")
    if differs:
        raise BindingError(
            f"The checkpoint carries weights of the target that the drafter was trained for; those of {type(target).__name__} differ:\n"
            + "\n".join(f"  {line}" for line in differs)
            + "\nBind it to the target that its model card names."
        )
