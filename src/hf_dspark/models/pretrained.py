"""A drafter as it is kept: loaded, saved and pushed, with the adapters and the calibration that go with it. Knows PreTrainedModel and
stored files; knows no layers and no drafting, which its subclass has.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from hf_dspark.adapters.files import LoadedAdapter, adapter_base, check_fitted_to, config_of, install_adapter, load_adapter, save_adapter
from hf_dspark.adapters.lora import adapter_names, unload
from hf_dspark.calibration.records import check_calibration, copying_of, find_calibration, save_calibration
from hf_dspark.checkpoints.reader import StoredDrafter, open_drafter
from hf_dspark.checkpoints.tensor_files import TensorRecord, check_finite, check_tensors
from hf_dspark.configuration_dspark import DSparkConfig
from hf_dspark.hub.files import HUB_ARGUMENTS

if TYPE_CHECKING:
    from typing_extensions import Self

# What a drafter decodes with where nobody says otherwise, once its confidences can be trusted.
CALIBRATED_BUDGET = "load-aware"


class KeptDrafter(PreTrainedModel):
    """What every drafter can do with files, adapters and calibrations, whatever it is made of.

    Args:
        config (`DSparkConfig`): as its subclass takes it.
    """

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__(config)
        self.budget: Any = CALIBRATED_BUDGET if config.confidence_temperatures else "full"
        self.calibration: dict[str, Any] | None = None
        self._carried: dict[str, TensorRecord] = {}

    # -------------------------------------------------------------------------------------------------- files and adapters

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None, *model_args: Any, **kwargs: Any) -> Self:
        """Load a drafter, strictly, in this package's own format or another one of `checkpoints.formats`: DeepSpec's, speculators',
        z-lab's, SpecForge's, Model-Optimizer's, transformers' own DFlash.

        Copies of embedding and head that some files carry are not loaded; `bind` compares them with the target's.
        The drafter comes unbound: `generate` binds it, or `bind(target)` does. An adapter's folder gives the drafter that
        it names as its base, with the adapter on it, not merged.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): folder or Hub repository.
            kwargs: as in `PreTrainedModel.from_pretrained`; fields of `DSparkConfig` override the stored ones. `calibration=` takes the
                temperatures from another repository or folder, or from a record in memory, instead of the checkpoint's own.
        Returns:
            the drafter.
        Raises:
            CheckpointError: for a format that is not understood, and for missing, unexpected or mis-shaped tensors, all
                in one list.
            ValueError: for a block longer than the checkpoint's.
        """
        elsewhere = kwargs.pop("calibration", None)
        if elsewhere is not None:
            loaded = cls.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
            drafter = loaded[0] if isinstance(loaded, tuple) else loaded
            shared = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs and key not in ("revision", "subfolder")}
            record = elsewhere if isinstance(elsewhere, Mapping) else find_calibration(str(elsewhere), **shared)
            check_fitted_to(record, drafter, "the record" if isinstance(elsewhere, Mapping) else repr(str(elsewhere)))
            drafter.set_calibration(record)
            return loaded
        if pretrained_model_name_or_path is None:
            config, state = kwargs.get("config"), kwargs.get("state_dict")
            if isinstance(config, DSparkConfig) and state is not None:
                check_tensors(cls._expected_tensors(config), {k: TensorRecord.of(k, v) for k, v in state.items()}, "state_dict")
            return super().from_pretrained(None, *model_args, **kwargs)
        source = str(pretrained_model_name_or_path)
        base = adapter_base(source, kwargs)
        if base is not None:
            of_adapter = {key: kwargs.pop(key) for key in ("revision", "subfolder", "adapter_name") if key in kwargs}
            loaded = cls.from_pretrained(base, *model_args, **kwargs)
            drafter = loaded[0] if isinstance(loaded, tuple) else loaded
            shared = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
            drafter.load_adapter(source, **of_adapter, **shared)
            return loaded
        stored = open_drafter(source, kwargs, cls._expected_tensors)
        if stored.form is None:
            loaded = super().from_pretrained(source, *model_args, config=stored.config, **{**kwargs, "use_safetensors": True})
            drafter = loaded[0] if isinstance(loaded, tuple) else loaded
            check_finite(drafter.state_dict(), source)
            drafter._take_calibration(stored, source)
            return loaded
        state = {name: record.read() for name, record in stored.tensors.items()}
        check_finite(state, source)
        kwargs = {key: value for key, value in kwargs.items() if key not in (*HUB_ARGUMENTS, "variant", "use_safetensors")}
        loaded = super().from_pretrained(None, *model_args, config=stored.config, state_dict=state, **kwargs)
        drafter = loaded[0] if isinstance(loaded, tuple) else loaded
        drafter._carried = stored.carried
        drafter._take_calibration(stored, source)
        drafter.config.name_or_path = drafter.name_or_path = source
        return loaded

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

        An adapter's folder is for `load_adapter` on the drafter that it was trained on, or for `from_pretrained`, which
        finds that drafter by its name. For an ordinary checkpoint call `hf_dspark.adapters.merge_adapter` first.

        Args:
            save_directory (`str` or `Path`): made where it is missing.
            state_dict, is_main_process, push_to_hub, kwargs: as in `PreTrainedModel.save_pretrained`.
        Raises:
            RuntimeError: if several adapters are active, or none (`save_adapter` takes a name).
        """
        if not adapter_names(self):
            if is_main_process:
                # Before the weights: what is uploaded from this folder is listed as they are written.
                save_calibration(save_directory, self.calibration)
            super().save_pretrained(save_directory, state_dict=state_dict, is_main_process=is_main_process, **kwargs)
            if push_to_hub and is_main_process:
                self._push_as_asked(save_directory, kwargs)
            return
        if is_main_process:
            save_adapter(self, save_directory, state_dict=state_dict)
            if push_to_hub:
                self._push_as_asked(save_directory, kwargs)

    def _push_as_asked(self, folder: str | Path, options: dict[str, Any]) -> None:
        known = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "max_shard_size", "tags")
        self.push_to_hub(options.get("repo_id") or Path(folder).name, **{key: options[key] for key in known if key in options})

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Push the drafter, or the adapter that it holds, to the Hub: weights, config, calibration, results and a card, in one commit.

        Args:
            repo_id (`str`): `owner/name`; made where it is missing.
            options: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr`, `max_shard_size` and `tags` as
                in `PreTrainedModel.push_to_hub`; `licence` for the card.
        Returns:
            `huggingface_hub.CommitInfo`.
        Raises:
            HubError: if the Hub refuses, or cannot be reached.
        """
        from hf_dspark.checkpoints.push import push_drafter  # a door of the model, but work of a layer above it

        return push_drafter(self, repo_id, **options)

    def load_adapter(
        self,
        peft_model_id: str | None = None,
        adapter_name: str | None = None,
        peft_config: Any = None,
        adapter_state_dict: dict[str, torch.Tensor] | None = None,
        *,
        is_trainable: bool = False,
        hotswap: bool | str = "auto",
        load_config: Any = None,
        adapter_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> LoadedAdapter:
        """Load an adapter, after checking that it was trained on this drafter and that no tensor is missing or too many.

        The adapter becomes the active one, beside those loaded before.

        Args:
            peft_model_id (`str`): folder or Hub repository.
            adapter_name (`str`, *optional*): `"default"` where None.
            peft_config (`peft.PeftConfig` or `dict`), adapter_state_dict: an adapter in memory instead; which drafter it
                was trained on is not known then.
            is_trainable (`bool`): whether it gets gradients.
            hotswap: only `False` and `"auto"`.
            load_config, adapter_kwargs: as `from_pretrained` passes them.
            kwargs: `check_base=False` to load onto another drafter on purpose; `revision`, `token`, .. for the Hub.
        Returns:
            `LoadedAdapter`: what transformers' method returns; everything fits, so its lists are empty.
        Raises:
            CheckpointError: for an adapter of another drafter, or tensors that do not fit. Nothing has changed.
            ValueError: for a name that is taken or cannot be, and for a hotswap.
        """
        name = adapter_name or "default"
        if hotswap is True:
            raise ValueError(f"A drafter's adapters are not swapped in place; call delete_adapter({name!r}), then load_adapter.")
        if peft_model_id is None and peft_config is not None and adapter_state_dict is not None:
            config = config_of(peft_config)
            install_adapter(self, config, adapter_state_dict, name, trainable=is_trainable)
        else:
            source = peft_model_id or getattr(load_config, "pretrained_model_name_or_path", None)
            if source is None:
                raise ValueError("load_adapter needs a folder or repository, or peft_config together with adapter_state_dict.")
            load_adapter(self, source, name, trainable=is_trainable, **{**(adapter_kwargs or {}), **kwargs})
            self.__dict__["_adapter_folder"] = source
        return LoadedAdapter()

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """Drop adapters; without the last one this is a plain drafter again, all of it trainable.

        Args:
            adapter_names (`list[str]` or `str`): loaded ones.
        Raises:
            ValueError: for one that is not loaded.
        """
        super().delete_adapter(adapter_names)
        if not self._hf_peft_config_loaded:
            unload(self)

    @classmethod
    def _expected_tensors(cls, config: DSparkConfig) -> dict[str, torch.Tensor]:
        """Every tensor that a checkpoint with this config holds, without storage."""
        with torch.device("meta"):
            return dict(cls(copy.deepcopy(config)).state_dict())

    # --------------------------------------------------------------------------------------------------------- calibration

    def set_calibration(self, record: Mapping[str, Any]) -> Self:
        """Decode with calibrated confidences, and save them with the drafter. Copying goes with them: as the record says, or not at all.

        The drafter's own budget becomes the load-aware one, as it is for calibrated checkpoints.

        Args:
            record (`dict`): from `hf-dspark calibrate` or `OnlineCalibration.record()`: `temperatures` and what they were fitted on.
        Returns:
            the drafter itself.
        Raises:
            CheckpointError: for a record that is none, or is for another block size.
        """
        self.calibration = check_calibration(record, self.config.block_size, str(self.config.name_or_path or "this drafter"))
        self.config.confidence_temperatures = [float(t) for t in self.calibration["temperatures"]]
        self.config.copy_weights, self.config.copy_confidence = copying_of(self.calibration)
        self.budget = CALIBRATED_BUDGET
        return self

    def _take_calibration(self, stored: StoredDrafter, source: str) -> None:
        """Keep the record that lay beside the weights, unless it says that it was fitted to others."""
        if stored.calibration is not None and stored.own_block == self.config.block_size:
            check_fitted_to(stored.calibration, self, repr(source))
        self.calibration = stored.calibration

    def drop_calibration(self) -> None:
        """Forget temperatures, and copying, that were fitted to other weights; the drafter's own budget is `full` again."""
        if self.config.confidence_temperatures is not None or self.calibration is not None or self.config.copy_weights is not None:
            self.config.confidence_temperatures = self.calibration = None
            self.config.copy_weights = self.config.copy_confidence = None
            self.budget = "full"
