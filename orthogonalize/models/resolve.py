"""Resolve a model (folder, Hub id or .gguf file) to a local checkpoint folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import RECIPE, open_checkpoint
from ..core.errors import OrthogonalizeError, first_line
from ..core.locks import locked
from .gguf import convert_gguf

# The files of a checkpoint that are downloaded; weights in other formats are not.
HUB_PATTERNS = [
    *("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"),
    *("LICENSE*", "NOTICE*", "README.md"),
]
SETTINGS = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")  # files that change what a checkpoint computes
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"


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


def is_hub_id(model: str) -> bool:
    """Whether `model` has the form owner/name and is not an existing path."""
    return bool(re.fullmatch(HUB_ID, model)) and not Path(model).exists()


def public_name(model: str) -> str:
    """The name of `model` for published files: its Hub id, or its folder's name without the path."""
    return model if is_hub_id(model) else Path(os.path.abspath(model)).name


def find_model(model: str, revision: str | None = None) -> Path:
    """The local folder of `model`: itself, a converted .gguf file, or a download from the Hub.

    Raises:
        OrthogonalizeError: there is no such model, or it is not a valid safetensors checkpoint.
    """
    path = Path(model)
    if path.exists() and revision not in (None, commit_of(path)):
        raise OrthogonalizeError(f"--revision {revision} is only for models on the Hub, but {model} is a local path")
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
        raise OrthogonalizeError(f"no such model: {model!r} is not a folder, a .gguf file or a Hub id owner/name")
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
            f"no such model: {model!r} is neither a local folder nor on the Hub (private models need hf auth login)"
        ) from error
    except Exception as error:  # the network and its libraries can raise anything
        raise OrthogonalizeError(
            f"{model!r} is not a local folder and cannot be downloaded from the Hub: {first_line(error)}"
        ) from error


def context_length(folder: Path) -> int | None:
    """The maximum number of tokens that the model's configuration declares, if any."""
    config = open_checkpoint(folder).config
    text = config.get("text_config") or {}
    found = [c.get(key) for c in (config, text) for key in ("max_position_embeddings", "n_positions")]
    return next((n for n in found if isinstance(n, int)), None)


def file_states(files: Iterable[Path]) -> list[Any]:
    """Path, size and modification time of each file."""
    found = [(file.resolve(), file.stat()) for file in files]
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in found]


def folder_state(folder: Path) -> list[Any]:
    """A state that changes whenever a checkpoint's weights, tokenizer or settings do, without reading the files.

    The recipe does not count, since `verify` updates it.
    """
    weights = [file.path for _, file in sorted(open_checkpoint(folder).files.items())]
    return file_states(weights + sorted(f for f in folder.iterdir() if f.suffix in SETTINGS and f.name != RECIPE))
