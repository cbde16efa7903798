"""`generate` for a batch: from transformers' prepared arguments to the loop and back to transformers' outputs."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hf_dspark.budgets.budget import Budget
from hf_dspark.budgets.named import make_budget
from hf_dspark.calibration.online import OnlineCalibration
from hf_dspark.configuration_dspark import check_block_size
from hf_dspark.decoding.cache_reuse import hand_over, resume
from hf_dspark.decoding.checks import check_call, check_placement, prompt_masks
from hf_dspark.decoding.kept_graphs import compiled_graphs
from hf_dspark.decoding.loop import DecodingLoop, Recorder, Rules
from hf_dspark.decoding.options import Options
from hf_dspark.decoding.profiler import started
from hf_dspark.decoding.row_processors import RowProcessors
from hf_dspark.decoding.row_stopping import RowStopping
from hf_dspark.decoding.state import FinishedRow, State
from hf_dspark.decoding.statistics import DecodingStats
from hf_dspark.errors import UnsupportedOptionError, UnsupportedTargetError
from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.targets.self_test import check_length
from hf_dspark.targets.target import Target
from hf_dspark.utils.compat import CACHE, cache_in
from hf_dspark.utils.logging import warn_once

logger = logging.getLogger(__name__)


@dataclass
class GenerateDSparkOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate=True`: transformers' fields and `stats`.

    Attributes:
        stats (`DecodingStats`): rounds, drafted, verified and accepted tokens of every row, tau, and where the time went.
    """

    stats: DecodingStats | None = None


@torch.no_grad()
def generate_batch(
    model: PreTrainedModel,
    drafter: DSparkDrafter,
    options: Options,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    streamer: BaseStreamer | None = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> GenerateDSparkOutput | torch.Tensor:
    """Decode a batch speculatively, with the target's exact distribution.

    Args:
        model (`PreTrainedModel`): the target.
        drafter (`DSparkDrafter`): bound here if it is not yet.
        options (`Options`): what transformers has no argument for.
        input_ids (`torch.LongTensor` of shape `(B, n)`): prompts, left-padded.
        logits_processor, stopping_criteria, generation_config: as `generate` has prepared them.
        streamer (`BaseStreamer`, *optional*): B = 1 only; gets each round's tokens, 1-D.
        model_kwargs: attention_mask, past_key_values and what else `generate` prepares. A cache is filled, and returned, for a single row
            without padding; for batches it stays as it is and None is returned.
    Raises:
        UnsupportedTargetError, UnsupportedOptionError, BindingError: before anything is computed or changed.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedTargetError(f"{type(model).__name__} is an encoder-decoder; DSpark needs a decoder-only causal language model.")
    check_call(generation_config, model_kwargs, input_ids, streamer, synced_gpus)
    options = _resolved(options, drafter, generation_config)
    budget = make_budget(drafter.budget if options.budget is None else options.budget, options.max_verify_tokens)
    _check_confidence(budget, options, drafter)
    check_placement(model, drafter)
    drafter.bind(model)
    target = Target(model, drafter.config.target_layer_ids)
    remembered_length = getattr(generation_config, "_mask_length", None)
    masks = prompt_masks(input_ids, model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"), remembered_length)
    batch = len(input_ids)
    stopping = RowStopping(stopping_criteria, batch)
    max_length = stopping.max_length if stopping.max_length is not None else generation_config.max_length
    check_length(model, max_length)
    # A static cache is transformers' way to ask for compiled rounds, which keep buffers of their own.
    cache = None if generation_config.cache_implementation == "static" else cache_in(model_kwargs)
    whole = batch == 1 and masks is None  # a single row without padding: its cache can be handed over
    if not whole and cache is not None and cache.get_seq_length() > 0:
        raise UnsupportedOptionError("DSpark decoding does not support past_key_values with a padded prompt; leave the padding out.")
    _check_calibration(options, processors := RowProcessors(logits_processor, batch))
    rules = Rules(
        processors,
        stopping,
        _recorder(generation_config),
        emit=None if streamer is None else lambda request, tokens: streamer.put(tokens.cpu()),
        keep_context=whole and cache is not None,
    )
    texts = list(input_ids.to(target.device))
    state = State(target.device, limit=max_length + drafter.config.block_size + 2)
    known = resume(cache, drafter, state, texts[0]) if whole else 0
    graphs = compiled_graphs(model, drafter, options.compile, target.device, max_length + drafter.config.block_size)
    budget = started(budget, model, drafter, options.sample, compiled=graphs is not None)
    with drafter.decoding_for(model), nullcontext() if graphs is None else graphs.use() as graphs, target.open():
        loop = DecodingLoop(target, drafter, budget, options, rules, state, graphs, single_row=batch == 1)
        loop.join(range(batch), texts, None if masks is None else list(masks.to(target.device)), known)
        loop.run()
    if streamer is not None:
        streamer.end()
    rows = [loop.finished[request] for request in range(batch)]
    output_ids = _padded(rows, generation_config).to(input_ids.device)
    if whole and cache is not None:
        if loop.compiled is not None:
            loop.compiled.give_up_buffers(state)
        hand_over(cache, state, drafter, output_ids[0, :-1], drafted=loop.drafter is not None)
    if not generation_config.return_dict_in_generate:
        return output_ids
    return GenerateDSparkOutput(
        sequences=output_ids,
        scores=_stacked(rules.recorder.scores),
        logits=_stacked(rules.recorder.logits),
        stats=loop.stats,
        **{CACHE: cache if whole else None},
    )


def _recorder(config: GenerationConfig) -> Recorder:
    """What the caller wants kept of scores and logits."""
    wanted = (config.return_dict_in_generate and asked for asked in (config.output_scores, config.output_logits))
    return Recorder(*({} if one else None for one in wanted))


def _resolved(options: Options, drafter: DSparkDrafter, config: GenerationConfig) -> Options:
    """The options with what the drafter and the generation config say."""
    block_size = check_block_size(options.block_size, drafter.config.block_size)
    chunk = getattr(config, "prefill_chunk_size", None) or options.prefill_tokens
    compiles = options.compile or config.cache_implementation == "static"
    compiled = (getattr(config, "compile_config", None) or options.compile or True) if compiles and not config.disable_compile else False
    if getattr(config, "compile_config", None) is not None and compiled is False:
        warn_once(logger, "compile_config is not followed: set cache_implementation='static', or compile=True in hf_dspark.generate.")
    return replace(options, block_size=block_size, sample=bool(config.do_sample), prefill_tokens=chunk, compile=compiled)


def _check_confidence(budget: Budget, options: Options, drafter: DSparkDrafter) -> None:
    callback = options.round_callback
    if (budget.needs_confidence or callback is not None) and drafter.confidence_head is None:
        raise UnsupportedOptionError(
            f"{f'Budget {budget!r}' if budget.needs_confidence else 'Online calibration'} needs a drafter with a confidence head; this "
            "one has none. Use 'full' or 'static:N'."
        )
    if isinstance(callback, OnlineCalibration):
        callback.check(drafter.config, options.copying, options.verification if options.sample else None)


def _check_calibration(options: Options, processors: RowProcessors) -> None:
    if processors.in_order and options.sample and options.round_callback is not None:
        raise UnsupportedOptionError(
            "Online calibration cannot sample with logits processors that may keep a state: tokens are accepted by another rule then. "
            "Declare the processor (its name is in the warning) with `stateless = True`, or leave online_calibration out."
        )


def _padded(rows: list[FinishedRow], config: GenerationConfig) -> torch.Tensor:
    """All rows' ids, `(B, longest)`, padded on the right."""
    pad = getattr(config, "_pad_token_tensor", None)
    fill = 0 if pad is None else int(pad.flatten()[0])
    return torch.nn.utils.rnn.pad_sequence([row.ids for row in rows], batch_first=True, padding_value=fill)


def _stacked(by_request: dict[int, list[torch.Tensor]] | None) -> tuple[torch.Tensor, ...] | None:
    """One `(B, V)` tensor a generated position, as transformers returns them; zeros where a row had already ended."""
    if by_request is None:
        return None
    rows = [by_request[request] for request in sorted(by_request)]
    blank = torch.zeros_like(rows[0][0])
    return tuple(torch.stack([r[k] if k < len(r) else blank for r in rows]) for k in range(max(map(len, rows))))
