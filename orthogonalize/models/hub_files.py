"""Models on the Hub: download one whole, or read its weight files where they are, by range requests."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from threading import Event, Thread
from typing import Any

from ..checkpoints.checkpoint import CARD, INDEX, Checkpoint, open_checkpoint, weight_names
from ..checkpoints.known_files import DOWNLOADED, DRAFTS
from ..core import progress
from ..core.errors import OrthogonalizeError, first_line

# What is downloaded beside the weights, which the index names.
HUB_PATTERNS = (*DOWNLOADED, *DRAFTS, CARD, INDEX)
RETRIES = 5  # of a connection that brings nothing, in a row
LOOK = 1.0  # seconds between two looks at a download
WAIT = 1.0  # seconds before the first of them; each later one waits that much longer


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on the Hub at one commit (see `RemoteFile`)."""

    repository: str
    commit: str
    name: str
    size: int
    sha256: str

    def read_into(self, start: int, view: memoryview) -> None:
        """See `RemoteFile`."""
        done = 0
        for piece in self._pieces(start, start + len(view)):
            view[done : done + len(piece)] = piece
            done += len(piece)

    def download(self, folder: Path, going_on: Callable[[], None]) -> Path:
        """See `RemoteFile`."""
        target = folder / Path(self.name).name
        with target.open("xb") as file:
            for piece in self._pieces(0, self.size):
                going_on()
                file.write(piece)
        return target

    def _pieces(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to `end`; where the connection is cut, a new one resumes."""
        failures = 0
        while start < end:
            before, problem = start, "it sends less than was asked for"
            try:
                for piece in self._answer(start, end):
                    start += len(piece)
                    yield piece
            except OrthogonalizeError:
                raise
            except Exception as error:  # the network and its libraries can raise anything
                response = getattr(error, "response", None)
                if response is not None:  # an answer of the Hub, which was asked again already if that could help
                    raise self._changed() if response.status_code == 404 else self._lost(first_line(error)) from error
                problem = first_line(error)
            failures = 0 if start > before else failures + 1
            if failures > RETRIES:
                raise self._lost(problem)
            if start < end:
                time.sleep(WAIT * failures)

    def _answer(self, start: int, end: int) -> Iterator[bytes]:
        """What one request for the bytes from `start` to `end` brings."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        url = hf_hub_url(self.repository, self.name, revision=self.commit)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        # Exceptions of the body would end up in the backoff, which cannot resume.
        with http_stream_backoff("GET", url, headers=headers, timeout=timeout, retry_on_exceptions=()) as response:
            hf_raise_for_status(response)
            self._check_unchanged(response.history[0] if response.history else response)
            if response.status_code != 206:
                raise self._lost("its server does not answer requests for parts of files")
            yield from response.iter_bytes()  # as they come: larger pieces would be lost with the connection

    def _check_unchanged(self, response: Any) -> None:
        """Check what the Hub itself, not the store that it refers to, says of the file.

        Raises:
            OrthogonalizeError: it is of another commit, or has other content.
        """
        from huggingface_hub import constants

        commit = response.headers.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT, self.commit)
        tag = response.headers.get(constants.HUGGINGFACE_HEADER_X_LINKED_ETAG) or response.headers.get("ETag")
        if commit != self.commit or (tag is not None and tag.removeprefix("W/").strip('"') != self.sha256):
            raise self._changed()

    def _changed(self) -> OrthogonalizeError:
        return OrthogonalizeError(
            f"{self.name} of {self.repository} is no longer on the Hub as it was at {self.commit[:12]}, when reading "
            "began; start again"
        )

    def _lost(self, why: str) -> OrthogonalizeError:
        return OrthogonalizeError(
            f"{self.name} of {self.repository} at {self.commit[:12]} cannot be read from the Hub: {why}"
        )


def download_model(model: str, revision: str | None) -> Path:
    """The folder in the Hub's cache with a model: what is known to belong to it, and the weights that its index names.

    Raises:
        OrthogonalizeError: there is no such model, or it cannot be downloaded.
    """
    folder = _download(model, revision, HUB_PATTERNS)
    with _watched(model, folder):
        return _download(model, folder.name, [escape(name) for name in weight_names(folder)])


@contextmanager
def _watched(model: str, folder: Path) -> Iterator[None]:
    """Show how much of the missing weights has arrived in the Hub's cache, by looking there: files grow in place."""
    try:
        size = sum(file.size for file in _missing(model, folder).values()) if progress.is_shown() else 0
    except OrthogonalizeError:
        size = 0  # whoever downloads meets the same error, and says it
    if not size:
        yield
        return
    blobs, over = folder.parents[1] / "blobs", Event()
    with progress.track("downloading the model", size, "bytes") as advance:

        def look(seen: int = _stored(blobs)) -> None:
            while not over.wait(LOOK):
                advance(max(0, (now := _stored(blobs)) - seen))
                seen = max(seen, now)

        watcher = Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


def _stored(folder: Path) -> int:
    """The bytes in a folder's files, which come and go."""
    size = 0
    for file in folder.glob("*"):
        with suppress(OSError):
            size += file.stat().st_size
    return size


def _download(model: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder in the Hub's cache with the files of a model that match `patterns`, downloaded where they are missing.

    Raises:
        OrthogonalizeError: there is no such model, or it cannot be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise OrthogonalizeError(f"{model} is gated: accept its terms on the Hub and log in (hf auth login)") from error
    except RepositoryNotFoundError as error:
        raise OrthogonalizeError(
            f"no such model: {model!r} is neither a local folder nor on the Hub (private models need hf auth login)"
        ) from error
    except Exception as error:  # the network and its libraries can raise anything
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise OrthogonalizeError(
                f"{model} does not fit on the disk of the Hub's cache; set HF_HOME to a larger one, or read it where "
                "it is with --no-download"
            ) from error
        raise OrthogonalizeError(
            f"{model!r} is not a local folder and cannot be downloaded from the Hub: {first_line(error)}"
        ) from error


def open_on_hub(model: str, revision: str | None) -> Checkpoint:
    """A model on the Hub of which everything but large weight files is downloaded.

    Weight files that are in the Hub's cache already are read there, the others from the Hub.

    Raises:
        OrthogonalizeError: there is no such model, or it is not a valid safetensors checkpoint.
    """
    folder = _download(model, revision, HUB_PATTERNS)
    remote = _missing(model, folder)
    small = [escape(name) for name, file in remote.items() if not file.sha256]  # in git itself, with git's hashes
    if small:
        _download(model, folder.name, small)
    return open_checkpoint(folder, {name: file for name, file in remote.items() if file.sha256})


def _missing(model: str, folder: Path) -> dict[str, HubFile]:
    """The weight files of a model on the Hub that are not in its `folder` in the Hub's cache, by name."""
    names = [name for name in weight_names(folder) if not (folder / name).is_file()]
    return _files_on_hub(model, folder.name, names) if names else {}


def _files_on_hub(model: str, commit: str, names: Collection[str]) -> dict[str, HubFile]:
    """The files `names` of a model on the Hub, by name; the `sha256` of those in git itself is empty."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(model, revision=commit, files_metadata=True)
    except Exception as error:  # the network and its libraries can raise anything
        raise OrthogonalizeError(f"the files of {model!r} on the Hub cannot be listed: {first_line(error)}") from error
    return {
        file.rfilename: HubFile(model, commit, file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else "")
        for file in info.siblings or ()
        if file.rfilename in names
    }


def missing_bytes(model: str, revision: str | None) -> int:
    """How much of a model's weights on the Hub is not in the Hub's cache, in bytes.

    Raises:
        OrthogonalizeError: see `open_on_hub`.
    """
    return sum(file.size for file in _missing(model, _download(model, revision, HUB_PATTERNS)).values())
