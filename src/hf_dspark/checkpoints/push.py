"""Pushing drafters, adapters and calibrations to the Hub, each as one commit. Knows files and huggingface_hub; knows no decoding.

What is pushed is put together in a temporary folder first, so that a repository never holds half of it.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from hf_dspark.adapters.files import CONFIG_FILE as ADAPTER_CONFIG
from hf_dspark.adapters.files import SIDECAR_FILE
from hf_dspark.adapters.lora import adapter_names
from hf_dspark.calibration.records import check_calibration, find_calibration, note_calibration, write_calibration
from hf_dspark.checkpoints.card import MARKER, render_card
from hf_dspark.checkpoints.formats.own import own_config
from hf_dspark.checkpoints.formats.reading import foreign_config, recognise_format
from hf_dspark.checkpoints.tensor_files import list_tensors, tensors_of
from hf_dspark.errors import CheckpointError, HubError
from hf_dspark.hub.files import TransportError
from hf_dspark.utils.hashing import file_sha256

if TYPE_CHECKING:
    from hf_dspark.models.modeling_dspark import DSparkDrafter

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
# Files of an earlier push, in the repository's root, that say something else than the new one where that does not bring them.
_STALE = re.compile(r"(model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|calibration\.json)")
_STALE_RESULTS = re.compile(r"(recipe\w*\.json|training_curve\.png|reliability\.png|results/[^/]+\.(json|csv|png))")
_RESULTS = ("recipe.json", "results")
_DRAFTER, _ADAPTER = "model.safetensors", "adapter_model.safetensors"


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
        CheckpointError: for an adapter whose drafter is a folder on this machine.
        HubError: if the Hub refuses, or cannot be reached, or the repository holds the other kind.
    """
    adapter = bool(adapter_names(drafter))
    message = commit_message or ("Upload DSpark adapter" if adapter else "Upload DSpark drafter")
    with tempfile.TemporaryDirectory(prefix="hf_dspark-push-") as made:
        folder = Path(made)
        drafter.save_pretrained(folder, max_shard_size=max_shard_size)
        if adapter:
            _check_base(folder)
        hub = _Hub(repo_id, token, revision, create_pr)
        hub.prepare(private)
        hub.check_kind(adapter)
        _take_results_along(drafter, folder)
        unchanged = hub.same_weights(folder)
        if unchanged:
            hub.bring_results(folder)
        card = render_card(folder, name=hub.repo_id, licence=licence, tags=tags)
        _keep_authors_text(card, hub.read("README.md")).save(folder / "README.md")
        return hub.upload(folder, message, commit_description, keep_results=unchanged)


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
    record = dict(calibration) if isinstance(calibration, Mapping) else find_calibration(str(calibration))
    record = check_calibration(record, None, repo_id)
    hub = _Hub(repo_id, token, revision, create_pr)
    hub.prepare(private)
    with tempfile.TemporaryDirectory(prefix="hf_dspark-push-") as made:
        folder = Path(made)
        write_calibration(folder, record)
        stored = hub.read("config.json")
        if stored is not None:
            config = json.loads(stored)
            form = recognise_format(config, repo_id)
            stated = own_config(config, repo_id) if form is None else foreign_config(form, config, repo_id)
            check_calibration(record, stated.block_size, repo_id)
            note_calibration(config, record, foreign=form is not None)
            (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        operations = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
        return hub.commit(operations, commit_message, commit_description)


class _Hub:
    """One repository and the branch that is written to."""

    def __init__(self, repo_id: str, token: bool | str | None, revision: str | None, create_pr: bool) -> None:
        self.repo_id, self.token, self.revision, self.create_pr = repo_id, token, revision, create_pr
        self.api = HfApi(token=token)

    def prepare(self, private: bool | None) -> None:
        """Make repository and branch where they are missing, and see what is there; refuses before anything is uploaded."""
        try:
            self.repo_id = self.api.create_repo(self.repo_id, private=private, exist_ok=True).repo_id
            if self.revision and not self.revision.startswith("refs/") and self.revision != "main":
                self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            found = self.api.model_info(self.repo_id, revision=None if self.create_pr else self.revision, files_metadata=True)
        except (HfHubHTTPError, TransportError, ConnectionError, ValueError) as error:
            raise self._refused(error) from error
        self.commit_sha = found.sha
        self.files = {one.rfilename: one.lfs.sha256 if one.lfs else None for one in found.siblings or []}

    def check_kind(self, adapter: bool) -> None:
        """Refuse to put an adapter into a drafter's repository, or the other way round: one would take the other's files for its own."""
        theirs = (_ADAPTER,) if not adapter else (_DRAFTER, f"{_DRAFTER}.index.json")
        found = next((name for name in theirs if name in self.files), None)
        if found is not None:
            pushed, held = ("an adapter", "a drafter") if adapter else ("a drafter", "an adapter")
            raise HubError(f"{self.repo_id!r} holds {held} ({found}); what is pushed is {pushed}. Name another repository.")

    def read(self, file: str) -> str | None:
        """The text of a file as it is on the branch now, None where there is none."""
        if file not in self.files:
            return None
        try:
            path = hf_hub_download(self.repo_id, file, revision=self.commit_sha, token=self.token)
        except (HfHubHTTPError, TransportError, ConnectionError, OSError) as error:
            raise self._refused(error) from error
        return Path(path).read_text(encoding="utf-8")

    def same_weights(self, folder: Path) -> bool:
        """Whether the repository holds these very weight files."""
        ours = {path.name: file_sha256(path) for path in folder.glob("*.safetensors")}
        return bool(ours) and all(self.files.get(name) == digest for name, digest in ours.items())

    def bring_results(self, folder: Path) -> None:
        """Copy the repository's recipe and decoded results into a folder that has none, for its card to tell them."""
        for name in ("recipe.json", "results/decoded.json"):
            if name in self.files and not (folder / name).exists():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(self.read(name) or "", encoding="utf-8")

    def upload(self, folder: Path, message: str, description: str | None, *, keep_results: bool) -> CommitInfo:
        """Commit a folder, and take away what an earlier push left that it does not hold: one commit, never a part of it."""
        ours = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        stale = [name for name in self.files if name not in ours and _STALE.fullmatch(name)]
        if not keep_results:
            stale += [name for name in self.files if name not in ours and _STALE_RESULTS.fullmatch(name)]
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
                parent_commit=self.commit_sha,
            )
        )

    def _try(self, upload: Any) -> CommitInfo:
        """Again after what may pass: files that have arrived are not sent twice. A pull request is opened once only."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return upload()
            except ValueError as error:  # the card's metadata, which the Hub checks
                raise self._refused(error) from error
            except (HfHubHTTPError, TransportError, ConnectionError) as error:
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
        elif status in (409, 412):
            step = "It has changed since this push began: push again."
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
    for key, value in new.data.to_dict().items():
        if key == "tags":
            value = list(dict.fromkeys([*(card.data.get("tags") or []), *value]))
        if key in ("tags", "library_name") or (key != "model-index" and card.data.get(key) is None):
            card.data[key] = value
    # What was measured of other weights must not stay.
    card.data["eval_results"], card.data["model_name"] = new.data.get("eval_results"), new.data.get("model_name")
    return card


def _check_base(folder: Path) -> None:
    """Refuse to publish an adapter that nobody else could put onto its drafter."""
    base = json.loads((folder / SIDECAR_FILE).read_text(encoding="utf-8")).get("base") or ""
    if not base or Path(base).exists():
        raise CheckpointError(
            f"This adapter's drafter is the folder {base!r}, which others do not have. Push the drafter first, load it by its "
            "repository's name, load the adapter onto it, and push that."
        )


def _take_results_along(drafter: DSparkDrafter, folder: Path) -> None:
    """Copy recipe and results from the folder that drafter or adapter was loaded from, if these are still its weights."""
    adapter = (folder / ADAPTER_CONFIG).is_file()
    name = drafter.__dict__.get("_adapter_folder") if adapter else drafter.name_or_path
    source = Path(name or "")
    if not name or not source.is_dir():
        return
    found = [source / one for one in _RESULTS if (source / one).exists()]
    if not found:
        return
    if not _same_weights(source, folder, _ADAPTER if adapter else None):
        logger.warning("The weights have changed since they were loaded from %s, whose results are therefore not pushed.", source)
        return
    for path in found:
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copy(path, folder / path.name)


def _same_weights(one: Path, other: Path, file: str | None = None) -> bool:
    """Whether two folders hold the same tensors, to bfloat16; of an adapter's file where it is named."""
    try:
        a, b = (list_tensors(str(folder)) if file is None else tensors_of(folder / file) for folder in (one, other))
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
