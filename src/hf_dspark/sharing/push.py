"""Pushing drafters, adapters and calibrations to the Hub, each as one commit. Knows files and huggingface_hub; knows no decoding.

What is pushed is put together in a temporary folder first, so that a repository never holds half of it.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from hf_dspark.adapter_files import CONFIG_FILE as ADAPTER_CONFIG
from hf_dspark.adapters import adapter_names
from hf_dspark.calibration_files import FILE_NAME as CALIBRATION
from hf_dspark.calibration_files import check_calibration, read_calibration, write_calibration
from hf_dspark.checkpoints import list_tensors
from hf_dspark.errors import CheckpointError, HubError
from hf_dspark.sharing.card import CURVE, DIAGRAM, MARKER, render_card

if TYPE_CHECKING:
    from hf_dspark.modeling_dspark import DSparkDrafter

logger = logging.getLogger(__name__)

# What a broken connection raises: the HTTP library behind huggingface_hub has had several names.
_TransportError = cast(type[Exception], HfHubHTTPError.__bases__[0])

_ATTEMPTS = 3
# Files of an earlier push that say something else than the new one, where the new one does not bring them.
_STALE = ("*.safetensors", "model.safetensors.index.json", CALIBRATION, "recipe*.json", "results/*", CURVE, DIAGRAM)
_RESULTS = ("recipe.json", "results")


def push_drafter(
    drafter: DSparkDrafter,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
    licence: str | None = None,
) -> CommitInfo:
    """Push a drafter, or, where it holds an adapter, that adapter alone, with a card that is rendered from its results.

    Weights without the target's, config, calibration, and the recipe and results of the folder that it was loaded from, as long as its
    weights are still that folder's. A card that somebody wrote by hand keeps its text; only its metadata is brought up to date.

    Args:
        drafter (`DSparkDrafter`): bound or not.
        repo_id (`str`): made where it is missing.
        commit_message, commit_description, private, token, revision, create_pr, max_shard_size, tags: as in
            `PreTrainedModel.push_to_hub`; a `revision` that is missing is made as a branch.
        licence (`str`, *optional*): the Hub's name of a licence, for the card.
    Returns:
        `huggingface_hub.CommitInfo`.
    Raises:
        HubError: if the Hub refuses, or cannot be reached.
    """
    message = commit_message or ("Upload DSpark adapter" if adapter_names(drafter) else "Upload DSpark drafter")
    hub = _Hub(repo_id, token, revision, create_pr)
    hub.prepare(private)
    with tempfile.TemporaryDirectory(prefix="hf_dspark-push-") as made:
        folder = Path(made)
        drafter.save_pretrained(folder, max_shard_size=max_shard_size)
        _take_results_along(drafter, folder)
        card = render_card(folder, name=repo_id, licence=licence, tags=tags)
        _keep_authors_text(card, hub.read("README.md")).save(folder / "README.md")
        return hub.upload(folder, message, commit_description)


def push_calibration(
    calibration: Mapping[str, Any] | str | Path,
    repo_id: str,
    *,
    commit_message: str = "Upload calibration",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Push a calibration alone: to a drafter's repository, whose config then says the same temperatures, or to one of its own.

    `from_pretrained(drafter, calibration=repo_id)` pulls it on top of any copy of the drafter.

    Args:
        calibration (`dict`, or `str` or `Path` of a folder with a `calibration.json`): what `hf-dspark calibrate` wrote.
        repo_id (`str`): made where it is missing.
        commit_message, commit_description, private, token, revision, create_pr: as in `push_drafter`.
    Returns:
        `huggingface_hub.CommitInfo`.
    Raises:
        CheckpointError: if there is no calibration, or it does not fit the drafter in that repository.
        HubError: if the Hub refuses, or cannot be reached.
    """
    record = dict(calibration) if isinstance(calibration, Mapping) else read_calibration(str(calibration))
    if record is None:
        raise CheckpointError(f"{str(calibration)!r} holds no {CALIBRATION}. Run hf-dspark calibrate first.")
    record = check_calibration(record, len(record.get("temperatures", ())), repo_id)
    hub = _Hub(repo_id, token, revision, create_pr)
    hub.prepare(private)
    with tempfile.TemporaryDirectory(prefix="hf_dspark-push-") as made:
        folder = Path(made)
        write_calibration(folder, record)
        stored = hub.read("config.json")
        if stored is not None:
            config = json.loads(stored)
            check_calibration(record, int(config.get("block_size", 0)), repo_id)
            config["confidence_temperatures"] = [float(t) for t in record["temperatures"]]
            (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        operations = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
        return hub.commit(operations, commit_message, commit_description)


class _Hub:
    """One repository and the branch that is written to."""

    def __init__(self, repo_id: str, token: bool | str | None, revision: str | None, create_pr: bool) -> None:
        self.repo_id, self.token, self.revision, self.create_pr = repo_id, token, revision, create_pr
        self.api = HfApi(token=token)

    def prepare(self, private: bool | None) -> None:
        """Make repository and branch where they are missing; refuses before anything is uploaded."""
        try:
            self.repo_id = self.api.create_repo(self.repo_id, private=private, exist_ok=True).repo_id
            if self.revision and not self.revision.startswith("refs/") and self.revision != "main":
                self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
        except (HfHubHTTPError, _TransportError, ConnectionError, ValueError) as error:
            raise self._refused(error) from error

    def read(self, file: str) -> str | None:
        """The text of a file on the branch, None where there is none yet."""
        try:
            path = hf_hub_download(self.repo_id, file, revision=self.revision, token=self.token)
        except (EntryNotFoundError, RevisionNotFoundError):
            return None
        except (HfHubHTTPError, _TransportError, ConnectionError) as error:
            raise self._refused(error) from error
        return Path(path).read_text(encoding="utf-8")

    def upload(self, folder: Path, message: str, description: str | None) -> CommitInfo:
        """Commit a folder, and take away what an earlier push left that it does not hold: one commit, never a part of it."""
        ours = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        try:
            stored = self.api.list_repo_files(self.repo_id, revision=None if self.create_pr else self.revision)
        except (HfHubHTTPError, _TransportError, ConnectionError) as error:
            raise self._refused(error) from error
        stale = [name for name in stored if name not in ours and any(fnmatch(name, pattern) for pattern in _STALE)]
        operations: list[Any] = [CommitOperationAdd(name, path) for name, path in ours.items()]
        return self.commit([*operations, *(CommitOperationDelete(name) for name in stale)], message, description)

    def commit(self, operations: list[Any], message: str, description: str | None) -> CommitInfo:
        return self._try(
            lambda: self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                commit_description=description or "",
                revision=self.revision,
                create_pr=self.create_pr,
            )
        )

    def _try(self, upload: Any) -> CommitInfo:
        """Again after what may pass: files that have arrived are not sent twice. A pull request is opened once only."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return upload()
            except (HfHubHTTPError, _TransportError, ConnectionError) as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                passing = status is None or status >= 500 or status == 429
                if not passing or self.create_pr or attempt == _ATTEMPTS:
                    raise self._refused(error) from error
                logger.warning("Upload to %s broke off (%s); trying again.", self.repo_id, _first_line(error))
        raise AssertionError("unreachable")

    def _refused(self, error: Exception) -> HubError:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, RepositoryNotFoundError) or status == 404:
            step = "Check the name; for a private repository, that the token may read it."
        elif status in (401, 403):
            step = "Log in with `hf auth login`, or give a token that may write there."
        else:
            step = "Check the network and try again; nothing half-written is in the repository."
        return HubError(f"The Hub did not take {self.repo_id!r}: {_first_line(error)} {step}")


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if text.endswith((".", "!")) else text + "."


def _keep_authors_text(new: ModelCard, stored: str | None) -> ModelCard:
    """The new card, or the stored one with the new metadata where its text is its author's own."""
    if stored is None or MARKER in stored:
        return new
    card = ModelCard(stored, ignore_metadata_errors=True)
    fresh = new.data.to_dict()
    for key, value in fresh.items():
        if key == "tags":
            value = list(dict.fromkeys([*(card.data.get("tags") or []), *value]))
        if key in ("tags", "model-index", "library_name") or card.data.get(key) is None:
            card.data[key] = value
    return card


def _take_results_along(drafter: DSparkDrafter, folder: Path) -> None:
    """Copy recipe and results from the folder that the drafter was loaded from, if these are still its weights."""
    source = Path(drafter.name_or_path or "")
    if not drafter.name_or_path or not source.is_dir() or (folder / ADAPTER_CONFIG).is_file() != (source / ADAPTER_CONFIG).is_file():
        return
    found = [source / name for name in _RESULTS if (source / name).exists()]
    if not found:
        return
    if not _same_weights(source, folder):
        logger.warning("The weights have changed since they were loaded from %s, whose results are therefore not pushed.", source)
        return
    for path in found:
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copy(path, folder / path.name)


def _same_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, to bfloat16."""
    try:
        a, b = list_tensors(str(one)), list_tensors(str(other))
    except CheckpointError:
        return False
    if {name: record.shape for name, record in a.items()} != {name: record.shape for name, record in b.items()}:
        return False
    for name, record in a.items():
        left, right = record.read(), b[name].read()
        if left.is_floating_point():
            left, right = left.to(torch.bfloat16), right.to(torch.bfloat16)
        if not torch.equal(left, right):
            return False
    return True
