"""Options of one call that transformers' `generate` has no argument for, from the call to the loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import CompileConfig

from hf_dspark.budgets.budget import Budget, RoundCallback
from hf_dspark.decoding.verify import DEFAULT_VERIFICATION, check_verification

# Tokens of one prompt pass: enough to fill the machine, few enough to bound its memory.
PREFILL_TOKENS = 2048


@dataclass(frozen=True)
class Options:
    """What one call decodes with.

    Args:
        budget (`str` or `Budget`, *optional*): what is drafted and verified; the drafter's own where None.
        max_verify_tokens (`int`, *optional*): most tokens of one verification pass, anchors included.
        block_size (`int`, *optional*): gamma; the drafter's where None.
        copying (`bool`): n-gram copying, where the checkpoint has weights for it.
        verification (`str`): how drawn tokens are judged, `"block"` or `"token"`.
        adapter (`str`, *optional*): which of the drafter's adapters drafts.
        generator (`torch.Generator`, *optional*): source of all randomness of the call; torch's default generator where None.
        round_callback (`RoundCallback`, *optional*): told of finished rounds, with confidences; may set the next rounds' temperatures.
        sample (`bool`): draw tokens; arg-max otherwise.
        prefill_tokens (`int`): most tokens of one prompt pass.
        compile (`bool` or `CompileConfig`): run rounds as compiled graphs, by this config or by what suits the device.
    Raises:
        ValueError: for an unknown verification.
    """

    budget: str | Budget | None = None
    max_verify_tokens: int | None = None
    block_size: int | None = None
    copying: bool = True
    verification: str = DEFAULT_VERIFICATION
    adapter: str | None = None
    generator: torch.Generator | None = None
    round_callback: RoundCallback | None = None
    sample: bool = False
    prefill_tokens: int = PREFILL_TOKENS
    compile: bool | CompileConfig = False

    def __post_init__(self) -> None:
        check_verification(self.verification)
