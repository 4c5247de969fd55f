"""Names of models, and whether they can be one; without torch, so that the command line answers at once."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..core.errors import OrthogonalizeError

HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"


def is_hub_id(model: str) -> bool:
    """Whether `model` has the form owner/name and is not an existing path."""
    return bool(re.fullmatch(HUB_ID, model)) and not Path(model).exists()


def public_name(model: str) -> str:
    """The name of `model` for published files: its Hub id, or its folder's name without the path."""
    return model if is_hub_id(model) else Path(os.path.abspath(model)).name


def check_model_name(model: str) -> None:
    """Check that `model` is a folder or a .gguf file that exists, or has the form of a Hub id.

    Raises:
        OrthogonalizeError: it is none of these.
    """
    path = Path(model)
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return
    if path.suffix == ".gguf":
        raise OrthogonalizeError(f"no such file: {model}")
    if not is_hub_id(model):
        raise OrthogonalizeError(f"no such model: {model!r} is not a folder, a .gguf file or a Hub id owner/name")


def check_adapter_name(adapter: str) -> None:
    """Check that `adapter` is the folder of an adapter.

    Raises:
        OrthogonalizeError: it is not.
    """
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise OrthogonalizeError(f"{adapter} is not an adapter folder (it has no adapter_config.json)")


def check_folder_name(checkpoint: str) -> None:
    """Check that `checkpoint` is a folder, or a name under which `edit` may have written into the Hub's cache.

    Raises:
        OrthogonalizeError: it is neither.
    """
    if not Path(checkpoint).is_dir() and not is_hub_id(checkpoint):
        raise OrthogonalizeError(f"no such model folder: {checkpoint}")
