"""Loads, saves and pushes a drafter, with its adapters and its calibration: the base class of `DSparkDrafter`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from hf_dspark.adapters.files import adapter_base, check_fitted_to, install_adapter, load_adapter, save_adapter
from hf_dspark.adapters.lora import adapter_names, unload
from hf_dspark.calibration.records import check_calibration, copying_of, find_calibration, save_calibration
from hf_dspark.checkpoints.reader import open_drafter
from hf_dspark.checkpoints.tensor_files import TensorRecord, check_finite, check_tensors
from hf_dspark.configuration_dspark import DSparkConfig
from hf_dspark.hub.files import HUB_ARGUMENTS, hub_arguments
from hf_dspark.utils.files import follow_umask

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from typing_extensions import Self

# The budget of a drafter whose confidences are calibrated.
CALIBRATED_BUDGET = "load-aware"
_PUSH_OPTIONS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "max_shard_size", "tags")


class DSparkPreTrainedModel(PreTrainedModel):
    """What every drafter does with files, adapters and calibrations."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__(config)
        self.budget: Any = CALIBRATED_BUDGET if config.confidence_temperatures else "full"
        self.calibration: dict[str, Any] | None = None
        self._carried: dict[str, TensorRecord] = {}
        self._adapter_folder: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *model_args: Any,
        calibration: str | Path | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a drafter, strictly, in any of the formats of `hf_dspark.checkpoints.formats`; it comes unbound.

        Copies of embedding and head that some files carry are not loaded; `bind` compares them with the target's. An adapter's folder
        gives the drafter that it names as its base, with the adapter on it, not merged.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): folder or Hub repository.
            calibration (`str`, `Path` or `dict`, *optional*): a folder, a repository or a record that calibrates it, instead of the
                checkpoint's own.
            kwargs: as in `PreTrainedModel.from_pretrained`; fields of `DSparkConfig` override the stored ones.
        Raises:
            CheckpointError: for a format that cannot be read, and for missing, unexpected, mis-shaped or mis-typed tensors, all in one
                list.
            ValueError: for a block longer than the checkpoint's.
        """
        with_info = kwargs.pop("output_loading_info", False)
        shared = {key: value for key, value in hub_arguments(kwargs).items() if key not in ("revision", "subfolder")}
        drafter, info = cls._load(pretrained_model_name_or_path, *model_args, **kwargs)
        if calibration is not None:
            record = calibration if isinstance(calibration, Mapping) else find_calibration(str(calibration), **shared)
            check_fitted_to(record, drafter, "the record" if isinstance(calibration, Mapping) else repr(str(calibration)))
            drafter.set_calibration(record)
        loaded: Any = (drafter, info) if with_info else drafter
        return loaded

    @classmethod
    def _load(cls, name: str | Path | None, *model_args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """The drafter, and what `output_loading_info` gives."""
        if name is None:
            config, state = kwargs.get("config"), kwargs.get("state_dict")
            if isinstance(config, DSparkConfig) and state is not None:
                check_tensors(cls.expected_tensors(config), {k: TensorRecord.of(k, v) for k, v in state.items()}, "state_dict")
            return super().from_pretrained(None, *model_args, output_loading_info=True, **kwargs)
        source = str(name)
        of_adapter = {**(kwargs.pop("adapter_kwargs", None) or {}), "adapter_name": kwargs.pop("adapter_name", None)}
        is_adapter, base = adapter_base(source, hub_arguments(kwargs))
        if base is not None:
            of_adapter |= hub_arguments(kwargs)
            drafter, info = cls._load(base, *model_args, **{k: v for k, v in kwargs.items() if k not in ("revision", "subfolder")})
        else:
            stored = open_drafter(source, kwargs, cls.expected_tensors)
            of_adapter |= hub_arguments(kwargs)
            state = {name: record.read() for name, record in stored.tensors.items()}
            check_finite(state, source)
            kwargs = {key: value for key, value in kwargs.items() if key not in (*HUB_ARGUMENTS, "variant", "use_safetensors")}
            drafter, info = super().from_pretrained(
                None, *model_args, config=stored.config, state_dict=state, output_loading_info=True, **kwargs
            )
            drafter._carried, drafter.calibration = stored.carried, stored.calibration
            drafter.config.name_or_path = drafter.name_or_path = source
            if stored.calibration is not None:
                check_fitted_to(stored.calibration, drafter, repr(source))
        if is_adapter:
            drafter.load_adapter(source, **of_adapter)
        return drafter, info

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        state_dict: dict[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the drafter, or, where it holds an adapter, that adapter alone: a few megabytes, without the drafter.

        An adapter's folder is for `load_adapter` on the drafter that it was trained on, or for `from_pretrained`, which finds that drafter
        by its name. For an ordinary checkpoint call `hf_dspark.adapters.merge_adapter` first. Arguments are transformers' own.

        Raises:
            RuntimeError: if several adapters are active, or none (`save_adapter` takes a name).
        """
        if adapter_names(self):
            if is_main_process:
                save_adapter(self, save_directory, state_dict=state_dict)
        else:
            if is_main_process:
                save_calibration(save_directory, self.calibration)
            super().save_pretrained(save_directory, state_dict=state_dict, is_main_process=is_main_process, **kwargs)
            if is_main_process:
                follow_umask(*Path(save_directory).glob("model*.safetensors"))
        if push_to_hub and is_main_process:
            options = {key: kwargs[key] for key in _PUSH_OPTIONS if key in kwargs}
            self.push_to_hub(kwargs.get("repo_id") or Path(save_directory).name, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Push the drafter, or the adapter that it holds, to the Hub: weights, config, calibration, results and a card, in one commit.

        Args:
            repo_id (`str`): `owner/name`; made where it is missing.
            options: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr`, `max_shard_size` and `tags` as
                in `PreTrainedModel.push_to_hub`; `licence` for the card.
        Raises:
            HubError: if the Hub refuses, or cannot be reached.
        """
        from hf_dspark.checkpoints.push import push_drafter  # imports the templates of cards

        return push_drafter(self, repo_id, **options)

    @classmethod
    def expected_tensors(cls, config: DSparkConfig) -> dict[str, torch.Tensor]:
        """Every tensor that a checkpoint with this config holds, without storage."""
        with torch.device("meta"):
            return dict(cls(copy.deepcopy(config)).state_dict())

    def load_adapter(
        self,
        peft_model_id: str | None = None,
        adapter_name: str | None = None,
        peft_config: Any = None,
        adapter_state_dict: dict[str, torch.Tensor] | None = None,
        *,
        is_trainable: bool = False,
        hotswap: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        """transformers' method, with the checks of `hf_dspark.adapters.files.load_adapter`, which takes the other `kwargs`.

        `peft_config` with `adapter_state_dict` is an adapter in memory, whose base is not checked. `hotswap` can only be False or "auto".

        Raises:
            CheckpointError, ValueError: as there. Nothing has changed.
        """
        name = adapter_name or "default"
        if hotswap is True:
            raise ValueError(f"A drafter's adapters are not swapped in place; call delete_adapter({name!r}), then load_adapter.")
        if peft_model_id is not None:
            load_adapter(self, peft_model_id, name, trainable=is_trainable, **kwargs)
            self._adapter_folder = str(peft_model_id)
        elif peft_config is not None and adapter_state_dict is not None:
            install_adapter(self, peft_config, adapter_state_dict, name, trainable=is_trainable)
        else:
            raise ValueError("load_adapter needs a folder or repository, or peft_config together with adapter_state_dict.")

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """Drop adapters, which must be loaded; without the last one this is a plain drafter again, all of it trainable."""
        super().delete_adapter(adapter_names)
        if not self._hf_peft_config_loaded:
            unload(self)

    def set_calibration(self, record: Mapping[str, Any]) -> Self:
        """Calibrate the confidences, and set copying as the record says; the drafter's own budget becomes the load-aware one.

        Args:
            record (`dict`): from `hf-dspark calibrate` or `OnlineCalibration.record()`.
        Raises:
            CheckpointError: for a record that is none, or is for another block size.
        """
        self.calibration = check_calibration(record, self.config.block_size, str(self.config.name_or_path or "this drafter"))
        self.config.confidence_temperatures = [float(t) for t in self.calibration["temperatures"]]
        self.config.copy_weights, self.config.copy_confidence = copying_of(self.calibration)
        self.budget = CALIBRATED_BUDGET
        return self

    def drop_calibration(self) -> None:
        """Remove temperatures and copying that were fitted to other weights; the drafter's own budget is `full` again."""
        if self.config.confidence_temperatures is not None or self.calibration is not None or self.config.copy_weights is not None:
            self.config.confidence_temperatures = self.calibration = None
            self.config.copy_weights = self.config.copy_confidence = None
            self.budget = "full"
