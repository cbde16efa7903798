"""Pushes drafters, adapters and calibrations to the Hub, each as one commit.

What is pushed is put together in a temporary folder first. Not with `HfApi.upload_folder`: it may spread a folder over several commits.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedModel

from hf_dspark.adapters.files import SIDECAR_FILE, WEIGHTS_FILE
from hf_dspark.adapters.lora import adapter_names
from hf_dspark.calibration.records import check_calibration, find_calibration, note_calibration, write_calibration
from hf_dspark.checkpoints.card import DECODED, MARKER, render_card
from hf_dspark.checkpoints.formats import parse_config
from hf_dspark.checkpoints.tensor_files import list_tensors, tensors_of
from hf_dspark.errors import CheckpointError, HubError
from hf_dspark.hub.files import TransportError, hub_error
from hf_dspark.utils.files import atomic_write_json
from hf_dspark.utils.hashing import file_sha256

logger = logging.getLogger(__name__)

# Files of an earlier push, in the repository's root, that say something else than the new one where that does not bring them.
_STALE = re.compile(r"(model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|calibration\.json)")
_STALE_RESULTS = re.compile(r"(recipe\w*\.json|training_curve\.png|reliability\.png|results/[^/]+\.(json|csv|png))")
_REFUSALS = (HfHubHTTPError, TransportError, OSError, ValueError)


def push_drafter(
    drafter: PreTrainedModel,
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
        repo_id (`str`): made where it is missing, as is the branch `revision`.
        licence (`str`, *optional*): the Hub's name of a licence, for the card.
    Raises:
        CheckpointError: for an adapter whose drafter is a folder on this machine.
        HubError: if the Hub refuses, or cannot be reached, or the repository holds the other kind.
    """
    adapter = bool(adapter_names(drafter))
    with tempfile.TemporaryDirectory(prefix="hf_dspark-push-") as made:
        folder = Path(made)
        drafter.save_pretrained(folder, max_shard_size=max_shard_size)
        if adapter:
            _check_base(folder)
        repository = _Repository(repo_id, token, revision, create_pr, private)
        others = ("model.safetensors", "model.safetensors.index.json") if adapter else (WEIGHTS_FILE,)
        found = next((name for name in others if name in repository.files), None)
        if found is not None:  # one would take the other's files for its own
            pushed, held = ("an adapter", "a drafter") if adapter else ("a drafter", "an adapter")
            raise HubError(f"{repository.repo_id!r} holds {held} ({found}); what is pushed is {pushed}. Name another repository.")
        _copy_results(drafter, folder, adapter)
        weights = {path.name: file_sha256(path) for path in folder.glob("*.safetensors")}
        unchanged = weights.items() <= repository.files.items()
        if unchanged:
            for name in ("recipe.json", DECODED):  # the card tells what the repository says of these very weights
                if name in repository.files and not (folder / name).exists():
                    (folder / name).parent.mkdir(exist_ok=True)
                    (folder / name).write_text(repository.read(name) or "", encoding="utf-8")
        card = render_card(folder, name=repository.repo_id, licence=licence, tags=tags)
        _with_authors_text(card, repository.read("README.md")).save(folder / "README.md")
        message = commit_message or ("Upload DSpark adapter" if adapter else "Upload DSpark drafter")
        return repository.commit(folder, message, commit_description, stale=(_STALE,) if unchanged else (_STALE, _STALE_RESULTS))


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
        repo_id (`str`): made where it is missing, as is the branch `revision`.
    Raises:
        CheckpointError: if there is no calibration, or it does not fit the drafter in that repository.
        HubError: if the Hub refuses, or cannot be reached.
    """
    record = dict(calibration) if isinstance(calibration, Mapping) else find_calibration(str(calibration))
    record = check_calibration(record, None, repo_id)
    repository = _Repository(repo_id, token, revision, create_pr, private)
    with tempfile.TemporaryDirectory(prefix="hf_dspark-push-") as made:
        folder = Path(made)
        write_calibration(folder, record)
        stored = repository.read("config.json")
        if stored is not None:
            config = json.loads(stored)
            form, stated = parse_config(config, repo_id)
            check_calibration(record, stated.block_size, repo_id)
            note_calibration(config, record, foreign=form is not None)
            atomic_write_json(folder / "config.json", config, sort_keys=True)
        return repository.commit(folder, commit_message, commit_description)


class _Repository:
    """A repository on the Hub and the branch that is written to, both made where missing; `files` are names with large ones' SHA-256."""

    def __init__(self, repo_id: str, token: bool | str | None, revision: str | None, create_pr: bool, private: bool | None) -> None:
        self.token, self.revision, self.create_pr = token, revision, create_pr
        self.api = HfApi(token=token)
        with _clear_refusals(repo_id):
            self.repo_id = self.api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision and not revision.startswith("refs/") and revision != "main":
                self.api.create_branch(self.repo_id, branch=revision, exist_ok=True)
            found = self.api.model_info(self.repo_id, revision=None if create_pr else revision, files_metadata=True)
        self.commit_sha = found.sha
        self.files = {one.rfilename: one.lfs.sha256 if one.lfs else None for one in found.siblings or []}

    def read(self, file: str) -> str | None:
        """The text of a file as it is on the branch now, None where there is none."""
        if file not in self.files:
            return None
        with _clear_refusals(self.repo_id):
            path = hf_hub_download(self.repo_id, file, revision=self.commit_sha, token=self.token)
        return Path(path).read_text(encoding="utf-8")

    def commit(self, folder: Path, message: str, description: str | None, stale: tuple[re.Pattern[str], ...] = ()) -> CommitInfo:
        """Commit a folder, and delete stale files that it does not hold, on top of the commit that was seen at first."""
        ours = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        gone = [name for name in self.files if name not in ours and any(pattern.fullmatch(name) for pattern in stale)]
        with _clear_refusals(self.repo_id):
            return self.api.create_commit(
                self.repo_id,
                [*(CommitOperationAdd(name, path) for name, path in ours.items()), *(CommitOperationDelete(name) for name in gone)],
                commit_message=message,
                commit_description=description or "",
                revision=self.revision,
                create_pr=self.create_pr,
                parent_commit=self.commit_sha,
            )


@contextmanager
def _clear_refusals(repo_id: str) -> Iterator[None]:
    """Whatever the Hub answers with becomes one `HubError` that names the next step."""
    try:
        yield
    except _REFUSALS as error:
        otherwise = "Check the network and push again; nothing half-written is in the repository."
        raise hub_error(error, f"The Hub did not take {repo_id!r}", otherwise) from error


def _with_authors_text(new: ModelCard, stored: str | None) -> ModelCard:
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


def _copy_results(drafter: PreTrainedModel, folder: Path, adapter: bool) -> None:
    """Copy recipe and results from the folder that drafter or adapter was loaded from, if these are still its weights."""
    source = Path((drafter._adapter_folder if adapter else drafter.name_or_path) or "")
    found = [source / name for name in ("recipe.json", "results") if (source / name).exists()] if source.name and source.is_dir() else []
    if not found:
        return
    if not _same_weights(source, folder, adapter):
        logger.warning("The weights have changed since they were loaded from %s, whose results are therefore not pushed.", source)
        return
    for path in found:
        shutil.copytree(path, folder / path.name) if path.is_dir() else shutil.copy(path, folder)


def _same_weights(one: Path, other: Path, adapter: bool) -> bool:
    """Whether two folders hold the same tensors, to bfloat16."""
    try:
        a, b = (tensors_of(str(folder), WEIGHTS_FILE) or {} if adapter else list_tensors(str(folder)) for folder in (one, other))
    except CheckpointError:
        return False
    pairs = ((record.read(), b[name].read()) for name, record in a.items())
    same = (torch.equal(x.bfloat16(), y.bfloat16()) if x.is_floating_point() else torch.equal(x, y) for x, y in pairs)
    return a.keys() == b.keys() and all(same)
