"""Resolve a model (folder, Hub id or .gguf file) to a local checkpoint folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import RECIPE, Checkpoint, open_checkpoint
from ..core.errors import OrthogonalizeError, first_line
from ..core.files import check_regular, file_hash, fingerprint
from ..core.locks import locked
from ..core.progress import note
from .gguf import convert_gguf
from .hub_files import download_model, missing_bytes, open_on_hub
from .names import check_model_name, is_hub_id

CONVERTERS = ("orthogonalize", "transformers", "gguf")  # packages whose versions change what a .gguf file becomes


def cache_folder() -> Path:
    """The folder of converted models: $ORTHOGONALIZE_CACHE, else `orthogonalize` in the user's cache folder."""
    named = os.environ.get("ORTHOGONALIZE_CACHE")
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(root) / "orthogonalize"


def cached(name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` in the cache, written by `make` if it does not exist; concurrent processes wait for it."""
    folder = cache_folder() / name
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=True):
        if not folder.exists():
            make(folder)
    return folder


def commit_of(folder: Path) -> str | None:
    """The commit of a snapshot folder in the Hub's cache; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def find_model(model: str, revision: str | None = None) -> Path:
    """The local folder of `model`: itself, a converted .gguf file, or a download from the Hub.

    Raises:
        OrthogonalizeError: there is no such model, or it is not a valid safetensors checkpoint.
    """
    path = Path(model)
    if path.exists() and revision not in (None, commit_of(path)):
        raise OrthogonalizeError(f"--revision {revision} is only for models on the Hub, but {model} is a local path")
    check_model_name(model)
    if path.is_dir():
        folder = path
    elif path.suffix == ".gguf":
        check_regular(path)
        versions = [version(name) for name in CONVERTERS]
        content = fingerprint([file_hash(path), versions])
        folder = cached(f"{path.stem}-{content[:16]}", partial(convert_gguf, path))
    else:
        folder = download_model(model, revision)
    open_checkpoint(folder)
    return folder


def find_checkpoint(model: str, revision: str | None = None, download: bool | None = None) -> Checkpoint:
    """The checkpoint of `model`, opened (see `find_model`).

    Args:
        download: whether weight files on the Hub are downloaded, or read where they are; None: as the disk has room.

    Raises:
        OrthogonalizeError: see `find_model`.
    """
    from huggingface_hub import constants

    if is_hub_id(model) and not constants.HF_HUB_OFFLINE:
        if download is None:
            download = _has_room(model, revision)
        if not download:
            return open_on_hub(model, revision)
    return open_checkpoint(find_model(model, revision))


def _has_room(model: str, revision: str | None) -> bool:
    """Whether the disk of the Hub's cache has room for a model; says so if not."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    needed = missing_bytes(model, revision)
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if needed <= free:
        return True
    note(f"{model} is read from the Hub piece by piece: its {needed / 1e9:.1f} GB do not fit into {free / 1e9:.1f} GB")
    return False


def find_recipe(recipe: str) -> Path:
    """The file of a recipe: itself, that of a checkpoint folder, or that of a repository on the Hub, given by its name.

    Raises:
        OrthogonalizeError: the Hub has no such repository, or it has no recipe.
    """
    if not is_hub_id(recipe):
        return Path(recipe)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(recipe, RECIPE))
    except EntryNotFoundError as error:
        raise OrthogonalizeError(
            f"{recipe} has no {RECIPE} on the Hub, or cannot be reached: {first_line(error)}"
        ) from error
    except Exception as error:  # the network and its libraries can raise anything
        raise OrthogonalizeError(
            f"no recipe at {recipe!r}: no such file, and not on the Hub: {first_line(error)}"
        ) from error


def folder_state(folder: Path) -> str:
    """A state that changes whenever the content of a checkpoint's weights, tokenizer or settings does.

    The recipe does not count, since `verify` updates it.
    """
    opened = open_checkpoint(folder)
    stats = [file.path.stat() for file in opened.files.values()]
    now = (folder.resolve(), *((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats))
    if now not in _weights_read:  # in this process
        _weights_read[now] = opened.fingerprint()
    return fingerprint([_weights_read[now], opened.settings_fingerprint()])


_weights_read: dict[tuple[Any, ...], dict[str, str]] = {}
