"""The `hf_dspark.generate` API, and what the patched `target.generate(..., assistant_model=drafter)` comes to."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from hf_dspark.adapters.lora import adapter_for_call, check_choice, plain_drafter
from hf_dspark.budgets.budget import Budget
from hf_dspark.calibration.online import OnlineCalibration
from hf_dspark.decoding.candidate_generator import stock_loop
from hf_dspark.decoding.checks import with_assistant_fields
from hf_dspark.decoding.generate import GenerateDSparkOutput, generate_batch
from hf_dspark.decoding.options import Options
from hf_dspark.decoding.verify import DEFAULT_VERIFICATION
from hf_dspark.errors import UnsupportedOptionError, UnsupportedTargetError
from hf_dspark.integration import patched
from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.targets.model_inputs import input_device
from hf_dspark.utils.compat import CACHE, cache_in, with_cache_renamed
from hf_dspark.utils.logging import warn_once

logger = logging.getLogger(__name__)

# Prepared arguments of transformers' loop that this one has no use for.
_UNUSED = ("assistant_model", "inputs_tensor", "assistant_tokenizer", "tokenizer")


@dataclass(frozen=True)
class _Call:
    """A drafter with the options of one call, in the place of `assistant_model`."""

    drafter: DSparkDrafter
    options: Options
    is_dspark_drafter: ClassVar[bool] = True

    @property
    def config(self) -> Any:
        """Of the drafter: transformers compares vocabularies before it decodes."""
        return self.drafter.config


def assisted_decoding(original: Any, target: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """What `GenerationMixin._assisted_decoding` does for an assistant that is a DSpark drafter.

    Args:
        original (`Callable`): transformers' own method.
        target (`PreTrainedModel`): whose method it is.
        args, kwargs: as `generate` calls that method.
    """
    assistant = kwargs["assistant_model"]
    call = assistant if isinstance(assistant, _Call) else _Call(plain_drafter(assistant), Options())
    with adapter_for_call(call.drafter, call.options.adapter):
        return _decode(original, target, call, *args, **kwargs)


def _decode(original: Any, target: Any, call: _Call, *args: Any, **kwargs: Any) -> Any:
    """This package's loop; the original with our candidates where a target takes one row only."""
    drafter = call.drafter
    options = with_assistant_fields(call.options, drafter, kwargs.get("generation_config"))
    try:
        return generate_batch(target, drafter, options, *args, **{k: v for k, v in kwargs.items() if k not in _UNUSED})
    except UnsupportedTargetError as refused:
        ids = args[0] if args else kwargs["input_ids"]
        if not refused.one_row_works or ids.shape[0] > 1:
            raise
        if options.generator is not None:
            raise UnsupportedOptionError(
                f"{refused} That loop draws from torch's own generator: call torch.manual_seed instead of seed= or generator=."
            ) from refused
        if options.round_callback is not None:
            raise UnsupportedOptionError(f"{refused} That loop reports no rounds: leave online_calibration out.") from refused
        warn_once(logger, f"{refused} Doing so for this batch of one.")
    if kwargs["generation_config"].cache_implementation == "static" or options.compile:
        raise UnsupportedOptionError(
            "Transformers' own loop, which would decode for this target, is not compiled: leave compile and cache_implementation out."
        )
    cache = cache_in(kwargs)
    if cache is not None and cache.get_seq_length() > 0:
        # transformers' assisted loop (seen in 5.23) reads the whole text on top of what a cache holds already.
        kwargs[CACHE] = DynamicCache(config=target.config.get_text_config(decoder=True))
    kwargs["assistant_model"] = drafter
    with stock_loop(target, drafter, options):
        return original(target, *args, **kwargs)


def generate(
    target: PreTrainedModel,
    drafter: DSparkDrafter,
    *,
    budget: str | Budget | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    block_size: int | None = None,
    adapter: str | None = None,
    max_verify_tokens: int | None = None,
    online_calibration: OnlineCalibration | None = None,
    copying: bool = True,
    verification: str = DEFAULT_VERIFICATION,
    num_return_sequences: int = 1,
    compile: bool = False,
    **kwargs: Any,
) -> GenerateDSparkOutput | torch.Tensor:
    """Generate with a DSpark drafter: `target.generate(..., assistant_model=drafter)` with options that transformers has no argument for.

    Args:
        target (`PreTrainedModel` or a PEFT wrapper): the causal language model whose distribution is kept exactly.
        drafter (`DSparkDrafter` or a PEFT wrapper of one): bound to the target by this call if it is not yet.
        budget (`str` or `Budget`, *optional*): `full`, `static:N`, `threshold:P`, `load-aware`, `load-aware-lag2` or an object;
            `drafter.budget` where None.
        seed (`int`, *optional*): seeds a generator of this call's own; the same seed gives the same output.
        generator (`torch.Generator`, *optional*): instead of a seed; on the target's device.
        block_size (`int`, *optional*): draft fewer tokens than the checkpoint's gamma.
        adapter (`str`, *optional*): draft with this one of the drafter's adapters in this call, `"base"` for none of them; as
            the drafter stands where None.
        max_verify_tokens (`int`, *optional*): most tokens of one verification pass, each row's anchor included; caps any budget.
        online_calibration (`OnlineCalibration`, *optional*): compares confidences with what is accepted, in this call and the next ones
            that it is given to, and corrects their temperatures where they drift.
        copying (`bool`): n-gram copying, where the checkpoint has weights for it (`copy_weights`). Without it the confidences of such a
            checkpoint are not calibrated.
        verification (`str`): how drawn tokens are judged: `"block"` verification (Sun et al. 2024, arXiv 2403.10444), which on average
            keeps as many as any rule that is exact round by round, or `"token"` by token (the paper's). Both keep the target's
            distribution; greedily they are the same. Where transformers' own loop drives the drafter, it judges token by token.
        compile (`bool`): run rounds as compiled graphs, as `cache_implementation="static"` does in `target.generate`; `compile_config` says
            how. The first rounds of a new kind wait for the compiler. Made for speed: in float32 the text is the same.
        num_return_sequences (`int`): independent samples of each prompt, next to each other in the result.
        kwargs: everything that `target.generate` takes: inputs, lengths, sampling options, processors, stopping criteria, streamer ..
    Returns:
        `torch.LongTensor` of shape `(B * num_return_sequences, length)`, or a `GenerateDSparkOutput` with `return_dict_in_generate=True`.
    Raises:
        ValueError: for options that cannot be honoured; RuntimeError: for a drafter that cannot be used.
    """
    if not getattr(drafter, "is_dspark_drafter", False):
        raise UnsupportedOptionError(f"hf_dspark.generate needs a DSparkDrafter; got {type(drafter).__name__}.")
    drafter = plain_drafter(drafter)
    check_choice(drafter, adapter)
    if seed is not None and generator is not None:
        raise UnsupportedOptionError("Give either seed or generator, not both.")
    if seed is not None:
        generator = torch.Generator(device=input_device(target)).manual_seed(seed)
    if (beams := _resolve_option(target, kwargs, "num_beams") or 1) > 1:
        # transformers would warn, leave the drafter aside and search.
        raise UnsupportedOptionError(f"Drafted tokens follow one path; got num_beams={beams}. Use num_beams=1, or target.generate.")
    if num_return_sequences > 1:
        if not _resolve_option(target, kwargs, "do_sample"):
            raise UnsupportedOptionError(
                f"num_return_sequences={num_return_sequences} greedy copies would all be the same; set do_sample=True."
            )
        kwargs = _repeated(kwargs, num_return_sequences)
    options = Options(
        budget=budget,
        max_verify_tokens=max_verify_tokens,
        block_size=block_size,
        copying=copying,
        verification=verification,
        adapter=adapter,
        generator=generator,
        round_callback=online_calibration,
        compile=compile,
    )
    # Before transformers' own checks, which would ask for tokenizers where the vocabularies differ.
    drafter.bind(target)
    with patched():
        return target.generate(**with_cache_renamed(kwargs), assistant_model=_Call(drafter, options))


def _resolve_option(target: PreTrainedModel, kwargs: dict[str, Any], name: str) -> Any:
    """An option of this call as `generate` will find it: an argument, else the given config's, else the target's own; None where unset."""
    places = (
        kwargs.get(name),
        getattr(kwargs.get("generation_config"), name, None),
        getattr(target.generation_config, name, None),
    )
    return next((value for value in places if value is not None), None)


def _repeated(kwargs: dict[str, Any], times: int) -> dict[str, Any]:
    per_row = ("inputs", "input_ids", "attention_mask", "position_ids", "token_type_ids")
    return {
        name: value.repeat_interleave(times, dim=0) if name in per_row and value is not None else value for name, value in kwargs.items()
    }
