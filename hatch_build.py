"""Build hook: ships the bundled drafter inside built wheels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

DRAFTER = "model_cards/smollm2-dspark"


class BundledDrafterHook(BuildHookInterface):
    """Adds the drafter's folder to a standard wheel as `hf_dspark/_data/smollm2-dspark`.

    An editable install gets nothing added: there the package finds the folder in the checkout. A standard wheel without
    the drafter would break the name `smollm2-dspark` for everyone who installs it, so that build stops instead.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "standard":
            return
        folder = Path(self.root, DRAFTER)
        if not (folder / "config.json").is_file():
            raise RuntimeError(
                f"cannot build a wheel: {folder} holds no config.json, so the bundled drafter would be missing; "
                "build from a complete checkout or source distribution"
            )
        build_data["force_include"][str(folder)] = "hf_dspark/_data/smollm2-dspark"
