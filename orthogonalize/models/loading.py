"""Finding a model (folder, Hub id or .gguf file) and loading it with transformers."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.checkpoint import open_checkpoint
from ..core.errors import OrthogonalizeError, first_line, ran_out_of_memory


def choose_device(device: str = "auto") -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU."""
    if device != "auto":
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise OrthogonalizeError(f"device {device!r} cannot be used here: {first_line(error)}") from error
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(device: torch.device, stored: Any) -> torch.dtype:
    """The dtype to run in: as stored on a GPU; on a CPU bfloat16 only where it has instructions for it."""
    dtype = getattr(torch, str(stored).removeprefix("torch."), torch.float32)
    if device.type != "cpu":
        return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast and dtype == torch.bfloat16 else torch.float32


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise OrthogonalizeError(f"{folder} has no usable tokenizer: {first_line(error)}") from error


def model_class(folder: Path, trust_remote_code: bool = False) -> Any:
    """The class of transformers that loads a checkpoint: some wrappers for images have only their own."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    known = type(config) in AutoModelForCausalLM._model_mapping or getattr(config, "auto_map", None)
    wrapped = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if wrapped and not known else AutoModelForCausalLM


def load_model(
    folder: Path, device: str = "auto", dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> Any:
    """The transformers model of a checkpoint folder, in evaluation mode.

    `dtype` None chooses by device (see `choose_dtype`). Code in the folder is only run with
    `trust_remote_code`.

    Raises:
        OrthogonalizeError: transformers does not know the model or cannot load it.
    """
    place = choose_device(device)
    from transformers import CONFIG_MAPPING

    config = open_checkpoint(folder).config
    # What transformers has a class of its own for is run by that; code beside it is for older versions.
    if config.get("auto_map") and not trust_remote_code and config.get("model_type") not in CONFIG_MAPPING:
        raise OrthogonalizeError(f"{folder} wants to run its own code, which only extract --trust-remote-code allows")
    chosen = dtype or choose_dtype(place, config.get("dtype") or config.get("torch_dtype"))
    try:
        loader = model_class(folder, trust_remote_code)
        model, found = loader.from_pretrained(
            folder, dtype=chosen, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        if ran_out_of_memory(error):
            raise
        raise OrthogonalizeError(f"transformers cannot load {folder}: {first_line(error)}") from error
    _check_missing(folder, found["missing_keys"])
    return model.to(place).eval()


def check_complete(folder: Path) -> None:
    """Refuse a checkpoint that lacks a tensor: vLLM leaves such ones as they are, transformers makes them up.

    What is missing is seen by transformers' class of the model, which reads names alone here. Not seen for models
    that it has no class for, and for quantised ones, whose names depend on the quantiser.

    Raises:
        OrthogonalizeError: a tensor is missing, or one of several that belong together.
    """
    from transformers import CONFIG_MAPPING

    config = open_checkpoint(folder).config
    if config.get("model_type") not in CONFIG_MAPPING or "quantization_config" in config:
        return
    try:
        _, found = model_class(folder).from_pretrained(folder, device_map="meta", output_loading_info=True)
    except RuntimeError as error:
        raise OrthogonalizeError(f"{folder} is incomplete or of other shapes: {first_line(error)}") from error
    except (ValueError, OSError, KeyError, ImportError):
        return  # no class of transformers' own: the engine may still know the model
    _check_missing(folder, found["missing_keys"])


def _check_missing(folder: Path, names: Collection[str]) -> None:
    if names:
        raise OrthogonalizeError(
            f"{folder} lacks {min(names)} ({len(names)} tensors in all); it is incomplete: fetch or write it again"
        )
