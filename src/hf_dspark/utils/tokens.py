"""Ids of special tokens."""

from __future__ import annotations

from typing import Any


def eos_token_ids(*sources: Any) -> list[int]:
    """The ids that end a text, from everything that names some.

    Args:
        sources: generation configs, model configs, tokenizers (whatever has `eos_token_id`: a number, a list or None), or models, which
            stand for their generation config; None is skipped.
    Returns:
        `list[int]`: distinct, in ascending order; empty where nothing ends a text.
    """
    found: set[int] = set()
    for source in sources:
        ids = getattr(getattr(source, "generation_config", source), "eos_token_id", None)
        found.update(int(one) for one in (ids if isinstance(ids, (list, tuple)) else [ids]) if one is not None)
    return sorted(found)
