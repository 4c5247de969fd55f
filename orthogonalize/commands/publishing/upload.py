"""Upload a staged folder to the Hub: in one commit, and again after a cut connection, from where it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...checkpoints.checkpoint import RECIPE, walk
from ...core.errors import OrthogonalizeError, first_line
from ...core.progress import note, track
from .refusals import explain, is_cut, status_of
from .settings import PushSettings

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
# What loaders could take for the model's weights, by its ending; on the Hub only.
WEIGHTS = tuple(
    f"*{ending}"
    for ending in (
        *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth", ".pt", ".ckpt", ".h5", ".ot"),
        *(".msgpack", ".gguf", ".GGUF", ".onnx", ".onnx_data", ".tflite", ".npz", ".pkl", ".distcp", ".nemo"),
    )
)
WAITS = (1, 2, 4, 8, 16)  # seconds before each further attempt
MESSAGE = "Upload an edited checkpoint with its recipe and card"


def upload(token: str, stage: Path, repository: str, settings: PushSettings) -> str:
    """Upload everything in `stage`; returns the address of the repository, branch or pull request.

    Raises:
        OrthogonalizeError: the Hub refuses, or the connection fails again and again; the message says what to do.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        url = _prepare(api, repository, settings)
        return _commit(api, stage, repository, settings) or url
    except OrthogonalizeError:
        raise
    except Exception as error:  # whatever the network and its libraries raise
        raise explain(error, repository) from error


def check_token(token: str, repository: str) -> None:
    """Ask the Hub whether it accepts the token, before the weights are read.

    Raises:
        OrthogonalizeError: it does not, or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        HfApi(token=token).whoami()
    except Exception as error:  # whatever the network and its libraries raise
        raise explain(error, repository) from error


def _again(action: Callable[[], T]) -> T:
    """The result of `action`, tried again after cut connections."""
    for wait in WAITS:
        try:
            return action()
        except Exception as error:
            if not is_cut(error):
                raise
            note(f"the connection was cut ({first_line(error)}); trying again in {wait} s")
            time.sleep(wait)
    return action()


def _prepare(api: HfApi, repository: str, settings: PushSettings) -> str:
    """Create the repository or look at it, so that nothing is uploaded to a place of another kind; its address.

    Raises:
        OrthogonalizeError: it is public, or holds a model that is not an edit of this tool.
    """
    url = f"{api.endpoint}/{repository}"
    if not settings.create_pr:
        url = str(
            _again(lambda: api.create_repo(repository, repo_type="model", private=not settings.public, exist_ok=True))
        )
    info = _again(lambda: api.model_info(repository))
    if not settings.public and not info.private:
        raise OrthogonalizeError(f"{repository} exists and is public; give --public, or choose another name")
    if settings.create_pr:
        return url
    files = [each.rfilename for each in info.siblings or []]
    if settings.branch is None and RECIPE not in files and any(_is_weights(name) for name in files):
        raise OrthogonalizeError(
            f"{repository} exists and holds another model; choose another name, or upload to a --branch of it"
        )
    if settings.public and info.private:
        _again(lambda: api.update_repo_settings(repository, private=False))
    if settings.gated is not None:
        gate = settings.gated
        _again(lambda: api.update_repo_settings(repository, gated=gate))
    if settings.branch is not None:
        branch = settings.branch
        _again(lambda: api.create_branch(repository, branch=branch, exist_ok=True))
        return f"{url}/tree/{branch}"
    return url


def _is_weights(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in WEIGHTS)


def _count_nothing(_size: int) -> None:
    """The client's own bars count."""


def _commit(api: HfApi, stage: Path, repository: str, settings: PushSettings) -> str | None:
    """Upload the files, then commit all of them at once, so that no weights are on the Hub without their recipe.

    Weights that an earlier upload left are deleted in the same commit: loaders would take them.

    Returns:
        the pull request's address, if one was opened.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    names = [str(name) for name in walk(stage)]
    files = [CommitOperationAdd(name, stage / name) for name in names]
    target: dict[str, Any] = {"revision": settings.branch, "create_pr": settings.create_pr}
    size = sum((stage / name).stat().st_size for name in names)
    with track("uploading", size, "bytes") if are_progress_bars_disabled() else nullcontext(_count_nothing) as advance:
        for name, file in zip(names, files, strict=True):
            _again(lambda file=file: api.preupload_lfs_files(repository, [file], free_memory=False, **target))  # type: ignore[misc]
            advance((stage / name).stat().st_size)
    there = _again(lambda: api.list_repo_files(repository, revision=settings.branch))
    old = [CommitOperationDelete(name) for name in there if _is_weights(name) and name not in names]

    def commit() -> Any:
        return api.create_commit(repository, [*old, *files], commit_message=settings.message or MESSAGE, **target)

    if not settings.create_pr:
        return _again(commit) and None
    try:
        return str(commit().pr_url)
    except Exception as error:
        if is_cut(error) and status_of(error) is None:  # a second attempt could open a second one
            raise OrthogonalizeError(
                f"the connection was cut while the pull request was opened; look at {repository} whether it is there"
            ) from error
        raise
