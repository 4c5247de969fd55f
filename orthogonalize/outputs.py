"""Output folders that appear under their final name only when complete."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OrthogonalizeError

# A folder is replaced only if one of these shows that this tool made it.
OWN_MARKS = ("orthogonalize.json", "run.json", "report.json")


def check_free(out: Path, force: bool = False) -> None:
    """Refuse an output path that exists, before any work is done for it.

    Raises:
        OrthogonalizeError: `out` exists without `force`, or is something this tool did not make.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise OrthogonalizeError(f"{out} exists; choose another --out, or --force to replace it")
    empty = out.is_dir() and not any(out.iterdir())
    if out.is_symlink() or not out.is_dir() or not (empty or any((out / m).exists() for m in OWN_MARKS)):
        raise OrthogonalizeError(f"{out} was not made by orthogonalize, so --force leaves it alone; remove it yourself")


def check_space(out: Path, needed: int) -> None:
    """Refuse to start when the disk of `out` has fewer than `needed` bytes free."""
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OrthogonalizeError(
            f"{out} needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
            "make room or choose another --out"
        )


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def complete_folder(out: Path, force: bool = False) -> Iterator[Path]:
    """Give an empty folder beside `out` to write into; move it to `out` when the block succeeds.

    On any error, Ctrl-C included, the half-written folder is removed and what stood at `out` stays.
    What a killed run left behind is removed by the next one.

    Raises:
        OrthogonalizeError: `out` exists (see `check_free`) or the disk fills up.
    """
    check_free(out, force)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    for stale in out.parent.glob(f".{out.name}.partial-*"):
        if not _alive(stale.name.rpartition("-")[2]):
            shutil.rmtree(stale, ignore_errors=True)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    previous = out.parent / f".{out.name}.previous-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if out.exists():
            out.rename(previous)
        partial.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OrthogonalizeError(f"the disk filled up while writing {out}; nothing was left behind") from error
        raise
    finally:
        if previous.exists() and not out.exists():  # interrupted between the two renames
            previous.rename(out)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)
