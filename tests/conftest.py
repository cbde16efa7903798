"""What all tests share: tests marked `gpu` are skipped where there is no CUDA device; `hub` is a Hub on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers.utils.hub

from tests.loopback_hub import TOKEN, LoopbackHub


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A loopback Hub, with the client pointed at it: a fresh cache, and the token that may write."""
    running = LoopbackHub()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", running.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the loopback Hub speaks git-lfs
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # remembers the first endpoint it saw
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield running
    running.close()
