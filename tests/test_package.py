"""The package as it is shipped: version, licence, names."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

from hf_dspark.version import __version__

ROOT = Path(__file__).parents[1]


def test_the_version_is_well_formed_and_in_the_change_log():
    """One version, in the form of PEP 440, with a section of its own in CHANGELOG.md."""
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", __version__)
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_an_installed_package_has_this_version():
    """What pip has installed is what this checkout holds."""
    try:
        installed = importlib.metadata.version("hf-dspark")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("hf-dspark is not installed here; the tests read src/")
    assert installed == __version__


def test_the_licence_is_apache_2():
    """The whole text is there."""
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
