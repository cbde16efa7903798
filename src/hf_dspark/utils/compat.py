"""Names that transformers has changed within the supported versions.

Version 5.24 calls the key-value cache `cache` where versions before say `past_key_values`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers.generation.utils import GenerateDecoderOnlyOutput

CACHE = "cache" if "cache" in {field.name for field in dataclasses.fields(GenerateDecoderOnlyOutput)} else "past_key_values"
CACHE_NAMES = ("cache", "past_key_values")


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The key-value cache among keyword arguments, by either name; None where there is none."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def with_cache_renamed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments with the key-value cache under the name that this version of transformers gives it."""
    return {CACHE if name in CACHE_NAMES else name: value for name, value in kwargs.items()}
