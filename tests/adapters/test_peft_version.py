"""What happens where transformers asks for a newer peft than there is."""

from __future__ import annotations

from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement

from hf_dspark.adapters import add_lora
from tests.tiny import tiny_drafter, tiny_llama


def test_a_peft_that_is_too_old_is_refused_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is put into the drafter, which stays as it was."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "99.0")
    drafter = tiny_drafter(tiny_llama())
    names = set(drafter.state_dict())
    with pytest.raises(RuntimeError, match=r"need peft 99\.0 or newer; got peft \d.*transformers<5\.24"):
        add_lora(drafter)
    assert set(drafter.state_dict()) == names


def test_the_current_transformers_may_be_installed() -> None:
    """5.24 runs everything but adapters, so it is not kept out for their sake."""
    (needed,) = [one for one in map(Requirement, requires("hf-dspark") or ()) if one.name == "transformers"]
    assert "5.24.0" in needed.specifier
