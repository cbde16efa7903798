"""LoRA adapters for drafters, in memory (`lora`) and as files (`files`). Imports: utils, hub."""

from hf_dspark.adapters.lora import (
    BASE,
    DEFAULT_TARGETS,
    TARGET_GROUPS,
    active_adapters,
    adapter_names,
    add_lora,
    merge_adapter,
    target_pattern,
)

__all__ = ["BASE", "DEFAULT_TARGETS", "TARGET_GROUPS", "active_adapters", "adapter_names", "add_lora", "merge_adapter", "target_pattern"]
