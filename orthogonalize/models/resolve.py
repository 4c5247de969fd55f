"""Resolve a model (folder, Hub id or .gguf file) to a local checkpoint folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..checkpoints.checkpoint import RECIPE, open_checkpoint
from ..core.errors import OrthogonalizeError, first_line
from .gguf import convert_gguf

# What a checkpoint needs; copies of the weights in other formats stay on the Hub.
HUB_PATTERNS = [
    *("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"),
    *("LICENSE*", "NOTICE*", "README.md"),
]


SETTINGS = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")  # files that change what a checkpoint computes


HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"


def cache_folder() -> Path:
    """Where converted models are kept: $ORTHOGONALIZE_CACHE, else the user's cache folder."""
    named = os.environ.get("ORTHOGONALIZE_CACHE")
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(root) / "orthogonalize"


def cached(name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` of the cache, which `make` writes where it is not there; who wants it meanwhile waits."""
    folder = cache_folder() / name
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")):
        if not folder.exists():
            make(folder)
    return folder


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the Hub's cache is a snapshot of; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def is_hub_id(model: str) -> bool:
    """Whether `model` has the form owner/name and is no path here."""
    return bool(re.fullmatch(HUB_ID, model)) and not Path(model).exists()


def public_name(model: str) -> str:
    """What to call `model` in public: its Hub id, or its folder's name without the path."""
    return model if is_hub_id(model) else Path(os.path.abspath(model)).name


def find_model(model: str, revision: str | None = None) -> Path:
    """The local folder of `model`: itself, a converted .gguf file, or a download from the Hub.

    Raises:
        OrthogonalizeError: there is no such model, or it is no sound safetensors checkpoint.
    """
    path = Path(model)
    if path.exists() and revision not in (None, commit_of(path)):
        raise OrthogonalizeError(f"--revision {revision} is for models of the Hub, and {model} lies here")
    if path.is_dir():
        folder = path
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise OrthogonalizeError(f"no such file: {model}")
        stat = path.stat()
        folder = cached(f"{path.stem}-{stat.st_size:x}-{stat.st_mtime_ns:x}", partial(convert_gguf, path))
    elif is_hub_id(model):
        folder = _download(model, revision)
    else:
        raise OrthogonalizeError(f"no such model: {model!r} is neither a folder, a .gguf file nor a Hub id owner/name")
    open_checkpoint(folder)
    return folder


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_PATTERNS))
    except GatedRepoError as error:
        raise OrthogonalizeError(f"{model} is gated: accept its terms on the Hub and log in (hf auth login)") from error
    except RepositoryNotFoundError as error:
        raise OrthogonalizeError(
            f"no such model: {model!r} is neither a folder here nor on the Hub (a private one needs hf auth login)"
        ) from error
    except Exception as error:  # whatever the network and its libraries raise
        raise OrthogonalizeError(
            f"no such folder here, and the Hub did not answer for {model!r}: {first_line(error)}"
        ) from error


def context_length(folder: Path) -> int | None:
    """The most tokens that the model's configuration allows, where it says so."""
    config = open_checkpoint(folder).config
    text = config.get("text_config") or {}
    found = [c.get(key) for c in (config, text) for key in ("max_position_embeddings", "n_positions")]
    return next((n for n in found if isinstance(n, int)), None)


def file_states(files: Iterable[Path]) -> list[Any]:
    """Paths, sizes and times of files."""
    found = [(file.resolve(), file.stat()) for file in files]
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in found]


def folder_state(folder: Path) -> list[Any]:
    """What changes when a checkpoint does, its tokenizer and settings too, without reading it: its files' state.

    Not the recipe, which `verify` adds to.
    """
    weights = [file.path for _, file in sorted(open_checkpoint(folder).files.items())]
    return file_states(weights + sorted(f for f in folder.iterdir() if f.suffix in SETTINGS and f.name != RECIPE))
