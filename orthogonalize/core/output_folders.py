"""Output folders: created under a temporary name and renamed when complete."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from safetensors import SafetensorError

from .errors import OrthogonalizeError
from .files import check_regular_files
from .locks import locked

UNFINISHED = re.compile(r"\..*\.(partial|journal|lock)(-[0-9a-f]+|-measured)?$")
WITHOUT_REPLACING, EXCHANGE = 1, 2  # flags of renameat2
CONFIG = "config.toml"  # the options that made a folder, which the command line saves there


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
            *("candidates.json", "plots", "stages.json", "tokens.json", "preserved.jsonl", "fits", CONFIG),
            "readout.safetensors",
        }
    ),
)
EDITED = FolderKind("orthogonalize.json")
REPORT = FolderKind("report.json", frozenset({"report.json", "report.html", CONFIG}))
# pareto.png: what earlier versions wrote.
SWEEP = FolderKind("sweep.json", frozenset({"sweep.json", "sweep.html", "pareto.png", CONFIG}))
DEMO = FolderKind("run", frozenset({"edited", "run", "report.json", "report.html", ".report", CONFIG}))


def check_finished_run(folder: Path) -> None:
    """Check that `folder` is a run that `extract` has finished.

    Raises:
        OrthogonalizeError: it is not.
    """
    if (folder / "run.json").is_file():
        return
    if (folder / RUN.mark).is_file():
        raise OrthogonalizeError(f"run folder {folder} is unfinished; re-run the same extract command to resume it")
    raise OrthogonalizeError(f"{folder} is not a run folder (it has no run.json); create one with extract")


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


def check_file(out: Path) -> None:
    """Reject a file to write whose folder does not exist, before any work is done.

    Raises:
        OrthogonalizeError: there is no such folder, it is not writable, or `out` is a folder itself.
    """
    if out.is_dir():
        raise OrthogonalizeError(f"{out} is a folder; name a file")
    if not out.absolute().parent.is_dir():
        raise OrthogonalizeError(f"{out} cannot be written: there is no folder {out.parent}")
    if not os.access(out if out.exists() else out.absolute().parent, os.W_OK):
        raise OrthogonalizeError(f"{out} cannot be written: it is not writable for you")


def check_run_folder(out: Path, kind: FolderKind) -> None:
    """Reject an output path that is neither free nor an existing output of this `kind` that can be resumed.

    Raises:
        OrthogonalizeError: something else exists at `out`, or it holds a pipe, device or socket.
    """
    if not out.exists() and not out.is_symlink():
        check_free(out, kind)
    elif out.is_symlink() or not out.is_dir() or not kind.matches(out):
        raise OrthogonalizeError(f"{out} already exists and was not created by this command; choose a different --out")
    else:
        check_regular_files(out)


def check_space(out: Path, needed: int, advice: str = "choose a different --out") -> None:
    """Refuse to start if the disk of `out` has fewer than `needed` bytes free."""
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OrthogonalizeError(
            f"{out} needs {needed / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB free; make room or {advice}"
        )


def _clean_up(out: Path, scratch: Path) -> None:
    """Clean up after killed runs: remove partial folders of `out`, and restore one that was being replaced.

    The caller holds the lock of `out`, so that nobody is writing them.
    """
    for what in ("partial", "previous"):
        name = re.compile(re.escape(f".{out.name}.{what}-") + "[0-9a-f]+")
        for stale in scratch.iterdir() if scratch.is_dir() else ():
            if not name.fullmatch(stale.name) or stale.is_symlink() or not stale.is_dir():
                continue
            if what == "previous" and not out.exists():
                stale.rename(out)
            shutil.rmtree(stale, ignore_errors=True)


def _rename(old: Path, new: Path, flag: int) -> bool:
    """Rename in one step, without replacing or by exchanging; False if the system cannot.

    Raises:
        OSError: the rename failed; `FileExistsError` if `new` exists and must not be replaced.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    here = -100  # AT_FDCWD
    if call(here, os.fsencode(old), here, os.fsencode(new), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(new))


def _publish(partial: Path, out: Path, previous: Path, kind: FolderKind, force: bool) -> None:
    """Move the complete folder `partial` to `out`, after a second look at what is there by now.

    With `force` an earlier output is exchanged for it, so that there is one at every moment.

    Raises:
        OrthogonalizeError: something that may not be replaced has appeared at `out`.
    """
    check_free(out, kind, force)
    if out.exists():
        if not _rename(partial, out, EXCHANGE):
            out.rename(previous)
            partial.rename(out)
        return
    try:
        if not _rename(partial, out, WITHOUT_REPLACING):
            partial.rename(out)
    except FileExistsError as error:
        raise OrthogonalizeError(f"{out} appeared while it was being written, and is kept; try again") from error


@contextmanager
def complete_folder(out: Path, kind: FolderKind, force: bool = False, scratch: Path | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder to write into; rename it to `out` when the block succeeds.

    On any error, Ctrl-C included, the temporary folder is removed and an existing `out` is kept. The next run
    cleans up after a killed one. Other processes cannot write `out` meanwhile (see `locks.locked`).

    Args:
        out: the final path.
        kind: see `check_free`; so is `force`.
        scratch: where to create the temporary folder, on the same file system; by default beside `out`.

    Raises:
        OrthogonalizeError: `out` cannot be used (see `check_free`) or is being written, or the disk fills up.
    """
    with locked(out, scratch):
        yield from _complete_folder(out.absolute(), kind, force, (scratch or out.parent).absolute())


def _complete_folder(out: Path, kind: FolderKind, force: bool, scratch: Path) -> Iterator[Path]:
    _clean_up(out, scratch)
    check_free(out, kind, force)
    for folder in (out.parent, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(8)
    partial = scratch / f".{out.name}.partial-{token}"
    previous = scratch / f".{out.name}.previous-{token}"
    partial.mkdir()
    try:
        yield partial
        _publish(partial, out, previous, kind, force)
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

    def locked(self) -> AbstractContextManager[None]:
        """See `locks.locked`."""
        return locked(self.folder)

    def complete(self, force: bool = False) -> AbstractContextManager[Path]:
        """See `complete_folder`."""
        return complete_folder(self.folder, self.kind, force)
