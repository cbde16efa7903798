"""The one place where transformers is patched, and the explicit door beside it. Sole user of transformers' private
generation names.

`generate()` looks its decoding method up by name; for any `assistant_model` that is
`GenerationMixin._assisted_decoding`. `install` wraps that method: a DSpark drafter goes to this package's loop,
everything else to the original. `uninstall` puts the original back.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.generation.utils import GenerationMixin

from hf_dspark.adapters.lora import adapter_for_call, check_choice, plain_drafter
from hf_dspark.budgets.budget import Budget
from hf_dspark.calibration.online import OnlineCalibration
from hf_dspark.decoding.candidate_generator import stock_loop
from hf_dspark.decoding.generate import CallOptions, GenerateDSparkOutput, call_options, current_options, generate_batch
from hf_dspark.decoding.verify import DEFAULT_VERIFICATION, check_verification
from hf_dspark.errors import UnsupportedOptionError, UnsupportedTargetError
from hf_dspark.targets.target import input_device
from hf_dspark.utils.compat import CACHE, cache_in, with_cache_renamed
from hf_dspark.utils.logging import warn_once

logger = logging.getLogger(__name__)


def install() -> None:
    """Let `target.generate(..., assistant_model=drafter)` decode with a DSpark drafter. Done on import; doing it twice
    changes nothing."""
    original = GenerationMixin._assisted_decoding
    if getattr(original, "_hf_dspark_original", None) is not None:
        return

    # `wraps` keeps the signature, which generate() inspects to see whether `inputs_tensor` is wanted.
    @functools.wraps(original)
    def _assisted_decoding(self: Any, *args: Any, **kwargs: Any) -> Any:
        drafter = kwargs.get("assistant_model")
        if not getattr(drafter, "is_dspark_drafter", False):
            return original(self, *args, **kwargs)
        drafter = plain_drafter(drafter)
        options = current_options()
        with adapter_for_call(drafter, options.adapter):
            return decode(self, drafter, options, *args, **kwargs)

    def decode(self: Any, drafter: Any, options: CallOptions, *args: Any, **kwargs: Any) -> Any:
        """This package's loop; the original with our candidates where a target takes one row only."""
        mine = {k: v for k, v in kwargs.items() if k not in ("assistant_model", "inputs_tensor", "assistant_tokenizer", "tokenizer")}
        try:
            return generate_batch(self, drafter, *args, **mine)
        except UnsupportedTargetError as refused:
            ids = args[0] if args else kwargs["input_ids"]
            if not refused.one_row_works or ids.shape[0] > 1:
                raise
            if options.generator is not None:
                raise UnsupportedOptionError(
                    f"{refused} That loop draws from torch's own generator: call torch.manual_seed instead of seed= or generator=."
                ) from refused
            warn_once(logger, f"{refused} Doing so for this batch of one.")
            cache = cache_in(kwargs)
            if cache is not None and cache.get_seq_length() > 0:
                # transformers' assisted loop (seen in 5.23) reads the whole text on top of what a cache holds already.
                kwargs[CACHE] = DynamicCache(config=self.config.get_text_config(decoder=True))
            kwargs["assistant_model"] = drafter
            if options.online is not None:
                raise UnsupportedOptionError(
                    f"{refused} That loop tells nobody what it accepts: leave online_calibration out."
                ) from refused
            with stock_loop(self, drafter, options.budget, options.block_size, options.max_verify_tokens, options.copying):
                return original(self, *args, **kwargs)

    _assisted_decoding._hf_dspark_original = original  # type: ignore[attr-defined]
    GenerationMixin._assisted_decoding = _assisted_decoding


def uninstall() -> None:
    """Put transformers' own `_assisted_decoding` back."""
    original = getattr(GenerationMixin._assisted_decoding, "_hf_dspark_original", None)
    if original is not None:
        GenerationMixin._assisted_decoding = original


def generate(
    target: Any,
    drafter: Any,
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
    **kwargs: Any,
) -> GenerateDSparkOutput | torch.Tensor:
    """Generate with a DSpark drafter; `target.generate(..., assistant_model=drafter)` with options of this package's
    own.

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
        online_calibration (`OnlineCalibration`, *optional*): watches confidences against what is accepted, in this call and the next ones
            that it is given to, and corrects their temperatures where they drift.
        copying (`bool`): draft what the text repeats too, where the checkpoint has weights for that (`copy_weights`). Without
            it the confidences of such a checkpoint are not calibrated.
        verification (`str`): how drafted tokens are judged where tokens are drawn: over the `"block"` (Sun et al. 2024, arXiv
            2403.10444), which on average keeps as many as any rule that is exact round by round, or `"token"` by token (the paper's).
            Both keep the target's distribution; greedily they are the same. Where transformers' own loop has to drive the drafter, it
            judges token by token.
        num_return_sequences (`int`): independent samples of each prompt, next to each other in the result.
        kwargs: everything that `target.generate` takes: inputs, lengths, sampling options, processors, stopping
            criteria, streamer ..
    Returns:
        `torch.LongTensor` of shape `(B * num_return_sequences, length)`, or a `GenerateDSparkOutput` with
        `return_dict_in_generate=True`.
    Raises:
        ValueError: for options that cannot be honoured; RuntimeError: for a drafter that cannot be used.
    """
    if not getattr(drafter, "is_dspark_drafter", False):
        raise UnsupportedOptionError(f"hf_dspark.generate needs a DSparkDrafter; got {type(drafter).__name__}.")
    drafter = plain_drafter(drafter)
    check_choice(drafter, adapter)
    check_verification(verification)
    if seed is not None and generator is not None:
        raise UnsupportedOptionError("Give either seed or generator, not both.")
    if seed is not None:
        generator = torch.Generator(device=input_device(target)).manual_seed(seed)
    if (beams := _asked(target, kwargs, "num_beams") or 1) > 1:
        # transformers would warn, leave the drafter aside and search.
        raise UnsupportedOptionError(f"Drafted tokens follow one path; got num_beams={beams}. Use num_beams=1, or target.generate.")
    if num_return_sequences > 1:
        if not _asked(target, kwargs, "do_sample"):
            raise UnsupportedOptionError(
                f"num_return_sequences={num_return_sequences} greedy copies would all be the same; set do_sample=True."
            )
        kwargs = _repeated(kwargs, num_return_sequences)
    # Before transformers' own checks, which would ask for tokenizers where the vocabularies differ.
    drafter.bind(target)
    patched = getattr(GenerationMixin._assisted_decoding, "_hf_dspark_original", None) is not None
    install()
    try:
        options = CallOptions(budget, generator, block_size, adapter, max_verify_tokens, online_calibration, copying, verification)
        with call_options(options):
            return target.generate(**with_cache_renamed(kwargs), assistant_model=drafter)
    finally:
        if not patched:
            uninstall()


def _asked(target: Any, kwargs: dict[str, Any], name: str) -> Any:
    """An option of this call as `generate` will find it: an argument, else the given config's, else the target's own;
    None where unset."""
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
