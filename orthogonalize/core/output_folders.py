"""Output folders that appear under their final name only when complete."""

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

UNFINISHED = re.compile(r"\..*\.(partial|journal)(-\d+)?$")


@dataclass(frozen=True)
class FolderKind:
    """What a command's output folder looks like: only such a folder does `--force` replace.

    `mark` must be in it; nothing but `parts` may be, unless `parts` is None.
    """

    mark: str
    parts: frozenset[str] | None = None

    def made(self, folder: Path) -> bool:
        # What a killed run left half-written is no reason to refuse.
        names = {p.name for p in folder.iterdir() if not UNFINISHED.match(p.name)}
        return not names or (self.mark in names and (self.parts is None or names <= self.parts))


RUN = FolderKind(
    "stages.json",
    frozenset(
        {
            *("run.json", "prompts.jsonl", "activations.safetensors", "directions.safetensors"),
            *("candidates.json", "plots", "stages.json"),
        }
    ),
)
EDITED = FolderKind("orthogonalize.json")
REPORT = FolderKind("report.json", frozenset({"report.json", "report.html"}))


def check_free(out: Path, kind: FolderKind, force: bool = False, inputs: Sequence[Path] = ()) -> None:
    """Refuse an output path that cannot be used, before any work is done for it.

    Raises:
        OrthogonalizeError: `out` exists without `force`, is no folder of this `kind`, or holds one of
            the `inputs`.
    """
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir():
        raise OrthogonalizeError(f"{out} cannot be made: {parent} is a file")
    try:
        TemporaryFile(dir=parent).close()
    except OSError as error:
        raise OrthogonalizeError(f"{out} cannot be made: {parent} cannot be written to ({error.strerror})") from error
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise OrthogonalizeError(f"{out} exists; choose another --out, or --force to replace it")
    if out.is_symlink() or not out.is_dir() or not kind.made(out):
        raise OrthogonalizeError(
            f"{out} is no earlier output of this command, so --force leaves it; remove it yourself"
        )
    for path in inputs:
        if path.exists() and path.resolve().is_relative_to(out.resolve()):
            raise OrthogonalizeError(f"{out} holds {path}, which this command reads; choose another --out")


def check_run_folder(out: Path, kind: FolderKind) -> None:
    """Refuse an output path that is neither free nor an earlier output of this `kind`, which can be gone on with.

    Raises:
        OrthogonalizeError: it is something else.
    """
    if not out.exists() and not out.is_symlink():
        check_free(out, kind)
    elif out.is_symlink() or not out.is_dir() or not kind.made(out):
        raise OrthogonalizeError(f"{out} exists and is no folder that this command made; choose another --out")


def check_space(out: Path, needed: int, advice: str = "choose another --out") -> None:
    """Refuse to start when the disk of `out` has fewer than `needed` bytes free."""
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OrthogonalizeError(
            f"{out} needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; make room or {advice}"
        )


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _tidy(out: Path, scratch: Path) -> None:
    """Undo what killed runs left of `out`: half-written folders, and a former one that was about to be replaced."""
    for what in ("partial", "previous"):
        for stale in scratch.glob(f".{out.name}.{what}-*"):
            if _alive(stale.name.rpartition("-")[2]):
                continue
            if what == "previous" and not out.exists():
                stale.rename(out)
            shutil.rmtree(stale, ignore_errors=True)


@contextmanager
def complete_folder(out: Path, kind: FolderKind, force: bool = False, scratch: Path | None = None) -> Iterator[Path]:
    """Give an empty folder beside `out` to write into; move it to `out` when the block succeeds.

    On any error, Ctrl-C included, the half-written folder is removed and what stood at `out` stays.
    What a killed run left behind is removed by the next one. `scratch` is a folder of the same file system
    to write in, where beside `out` is no place for it.

    Raises:
        OrthogonalizeError: `out` exists (see `check_free`) or the disk fills up.
    """
    out = out.absolute()
    scratch = (scratch or out.parent).absolute()
    _tidy(out, scratch)
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
        # The safetensors library reports a full disk in a class of its own.
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
            raise OrthogonalizeError(f"the disk filled up while writing {out}; nothing was left behind") from error
        raise
    finally:
        if previous.exists() and not out.exists():  # interrupted between the two renames
            previous.rename(out)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)


@dataclass(frozen=True)
class OutputFolder:
    """A folder that a command makes, of a `kind`."""

    folder: Path
    kind: FolderKind

    def check_free(self, force: bool = False, inputs: Sequence[Path] = ()) -> None:
        """See `check_free`."""
        check_free(self.folder, self.kind, force, inputs)

    def complete(self, force: bool = False) -> AbstractContextManager[Path]:
        """See `complete_folder`."""
        return complete_folder(self.folder, self.kind, force)
