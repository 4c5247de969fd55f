"""Output folders: created under a temporary name and renamed when complete."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from safetensors import SafetensorError

from .errors import OrthogonalizeError

UNFINISHED = re.compile(r"\..*\.(partial|journal)(-\d+|-measured)?$")


@dataclass(frozen=True)
class FolderKind:
    """How to recognize an output folder of a command; `--force` replaces no other folder.

    Attributes:
        mark: a file that the folder contains.
        parts: the only names that it may contain; None allows any.
    """

    mark: str
    parts: frozenset[str] | None = None

    def matches(self, folder: Path) -> bool:
        """Whether `folder` is of this kind, or holds nothing but what a killed run left behind."""
        names = {p.name for p in folder.iterdir() if not UNFINISHED.match(p.name)}
        return not names or (self.mark in names and (self.parts is None or names <= self.parts))


RUN = FolderKind(
    "stages.json",
    frozenset(
        {
            *("run.json", "prompts.jsonl", "activations.safetensors", "directions.safetensors"),
            *("candidates.json", "plots", "stages.json", "tokens.json", "preserved.jsonl", "fits"),
        }
    ),
)
EDITED = FolderKind("orthogonalize.json")
REPORT = FolderKind("report.json", frozenset({"report.json", "report.html"}))


def check_free(out: Path, kind: FolderKind, force: bool = False, inputs: Sequence[Path] = ()) -> None:
    """Reject an unusable output path before any work is done.

    Raises:
        OrthogonalizeError: `out` cannot be created; or exists and `force` is off, it is not a folder of this
            `kind`, or it contains one of the `inputs`.
    """
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir():
        raise OrthogonalizeError(f"{out} cannot be created: {parent} is a file")
    try:
        TemporaryFile(dir=parent).close()
    except OSError as error:
        raise OrthogonalizeError(f"{out} cannot be created: {parent} is not writable ({error.strerror})") from error
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise OrthogonalizeError(f"{out} already exists; choose a different --out, or replace it with --force")
    if out.is_symlink() or not out.is_dir() or not kind.matches(out):
        raise OrthogonalizeError(
            f"{out} was not created by this command, so --force does not replace it; remove it yourself"
        )
    for path in inputs:
        if path.exists() and path.resolve().is_relative_to(out.resolve()):
            raise OrthogonalizeError(f"{out} contains {path}, which this command reads; choose a different --out")


def check_run_folder(out: Path, kind: FolderKind) -> None:
    """Reject an output path that is neither free nor an existing output of this `kind` that can be resumed.

    Raises:
        OrthogonalizeError: something else exists at `out`.
    """
    if not out.exists() and not out.is_symlink():
        check_free(out, kind)
    elif out.is_symlink() or not out.is_dir() or not kind.matches(out):
        raise OrthogonalizeError(f"{out} already exists and was not created by this command; choose a different --out")


def check_space(out: Path, needed: int, advice: str = "choose a different --out") -> None:
    """Refuse to start if the disk of `out` has fewer than `needed` bytes free."""
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OrthogonalizeError(
            f"{out} needs {needed / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB free; make room or {advice}"
        )


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _clean_up(out: Path, scratch: Path) -> None:
    """Clean up after killed runs: remove partial folders of `out`, and restore one that was being replaced."""
    for what in ("partial", "previous"):
        for stale in scratch.glob(f".{out.name}.{what}-*"):
            if _alive(stale.name.rpartition("-")[2]):
                continue
            if what == "previous" and not out.exists():
                stale.rename(out)
            shutil.rmtree(stale, ignore_errors=True)


@contextmanager
def complete_folder(out: Path, kind: FolderKind, force: bool = False, scratch: Path | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder to write into; rename it to `out` when the block succeeds.

    On any error, Ctrl-C included, the temporary folder is removed and an existing `out` is kept. The next run
    cleans up after a killed one.

    Args:
        out: the final path.
        kind: see `check_free`; so is `force`.
        scratch: where to create the temporary folder, on the same file system; by default beside `out`.

    Raises:
        OrthogonalizeError: `out` cannot be used (see `check_free`), or the disk fills up.
    """
    out = out.absolute()
    scratch = (scratch or out.parent).absolute()
    _clean_up(out, scratch)
    check_free(out, kind, force)
    for folder in (out.parent, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    partial = scratch / f".{out.name}.partial-{os.getpid()}"
    previous = scratch / f".{out.name}.previous-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if out.exists():
            out.rename(previous)
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk as an exception class of its own.
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
            raise OrthogonalizeError(
                f"the disk filled up while writing {out}; no partial output was left behind"
            ) from error
        raise
    finally:
        if previous.exists() and not out.exists():  # interrupted between the two renames
            previous.rename(out)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)


@dataclass(frozen=True)
class OutputFolder:
    """An output folder and its kind."""

    folder: Path
    kind: FolderKind

    def check_free(self, force: bool = False, inputs: Sequence[Path] = ()) -> None:
        """See `check_free`."""
        check_free(self.folder, self.kind, force, inputs)

    def complete(self, force: bool = False) -> AbstractContextManager[Path]:
        """See `complete_folder`."""
        return complete_folder(self.folder, self.kind, force)
