"""Write a checkpoint into the Hub's local cache (`--cache OWNER/NAME`), where libraries load it by name.

The layout is huggingface_hub's: `models--OWNER--NAME` holds the files by content hash (`blobs`),
a folder of links to them per commit (`snapshots`), and the commit of each branch (`refs`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.checkpoint import RECIPE
from ..core.errors import OrthogonalizeError
from ..core.files import file_hash
from ..core.locks import locked
from ..core.output_folders import FolderKind, check_free, complete_folder
from ..models.names import is_hub_id
from .recipe import load_recipe

LARGE = 10 * 2**20  # bytes; the Hub stores larger files in LFS
LARGE_KINDS = (".safetensors", ".model", ".bin")  # stored in LFS whatever their size
SCRATCH = ".locks"  # the one folder that scans of the cache skip


class _Edited(FolderKind):
    """A cached repository whose every revision is an edited checkpoint."""

    def matches(self, folder: Path) -> bool:
        snapshots = list(folder.glob("snapshots/*"))
        return bool(snapshots) and all((snapshot / self.mark).is_file() for snapshot in snapshots)


EDITED = _Edited(RECIPE)


@dataclass(frozen=True)
class CachedRepository:
    """The repository `name` (`owner/name`) in the local Hub cache."""

    name: str

    @property
    def folder(self) -> Path:
        """Its folder, whether or not it exists."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.name, repo_type="model")

    def snapshot(self) -> Path | None:
        """The folder of its main revision if that is an edited checkpoint, else None.

        Raises:
            OrthogonalizeError: the name is not a valid repository name.
        """
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            recipe = try_to_load_from_cache(self.name, RECIPE, cache_dir=self.folder.parent)
        except HFValidationError as error:
            raise OrthogonalizeError(f"{self.name} is not a valid repository name: {error}") from error
        return Path(recipe).parent if isinstance(recipe, str) else None

    def check_free(self, force: bool = False, inputs: Sequence[Path] = ()) -> None:
        """Refuse a name that cannot be written to, before any work is done.

        Raises:
            OrthogonalizeError: the name is invalid; or the repository exists without `force`, is not an edited
                checkpoint, or holds one of the `inputs`.
        """
        self.snapshot()  # refuses invalid names
        if self.name.count("/") != 1:
            raise OrthogonalizeError(f"--cache {self.name}: give OWNER/NAME")
        if self.folder.exists() and not force:
            raise OrthogonalizeError(
                f"{self.name} already exists in the Hub's cache; choose another name, or replace it with --force"
            )
        if self.folder.exists() and not EDITED.matches(self.folder):
            raise OrthogonalizeError(
                f"{self.name} in the Hub's cache has revisions that this command did not create, so --force does not "
                "replace it; choose another name"
            )
        check_free(self.folder, EDITED, force, inputs)

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes from writing the repository (see `locks.locked`)."""
        self.snapshot()  # refuses invalid names
        return locked(self.folder, self.folder.parent / SCRATCH)

    @contextmanager
    def complete(self, force: bool = False) -> Iterator[Path]:
        """Yield an empty folder for the checkpoint; it becomes the repository when the block succeeds.

        As with `complete_folder`, nothing is visible until then, and nothing is left behind on an error.
        """
        scratch = self.folder.parent / SCRATCH
        with complete_folder(self.folder, EDITED, force, scratch=scratch) as partial:
            files = partial / "files"
            files.mkdir()
            yield files
            _move_into_layout(files, partial)


def _move_into_layout(files: Path, repository: Path) -> None:
    """Move the checkpoint in `files` into the cache layout of a `repository` whose only revision is `main`."""
    known = load_recipe(files).weights
    blobs = repository / "blobs"
    blobs.mkdir()
    names = {}
    for path in sorted(path for path in files.rglob("*") if path.is_file()):
        name = path.relative_to(files)
        names[name] = known.get(str(name)) or blob_name(path)
        path.replace(blobs / names[name])
    commit = _commit_id(names)
    snapshot = repository / "snapshots" / commit
    for name, blob in names.items():
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, "utf-8")
    for folder in (*sorted((f for f in files.rglob("*")), reverse=True), files):
        folder.rmdir()


def _commit_id(names: Mapping[Path, str]) -> str:
    """A revision id in git's format that depends only on the files."""
    return hashlib.sha1("".join(f"{blob} {name}\n" for name, blob in sorted(names.items())).encode()).hexdigest()


def blob_name(file: Path) -> str:
    """The Hub's name for a file's content: its SHA-256 if it is stored in LFS, else its git hash."""
    from huggingface_hub.utils.sha import git_hash

    if file.stat().st_size <= LARGE and file.suffix not in LARGE_KINDS:
        return git_hash(file.read_bytes())
    return file_hash(file)


def edited_folder(checkpoint: Path | str) -> Path:
    """The folder of an edited checkpoint, given by its path or by its name in the Hub's cache."""
    found = CachedRepository(str(checkpoint)).snapshot() if is_hub_id(str(checkpoint)) else None
    return found or Path(checkpoint)
