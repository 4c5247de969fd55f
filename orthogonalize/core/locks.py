"""Locks on output paths: two commands that would write one place exclude each other.

A lock is a POSIX record lock on a hidden file beside the output. The kernel frees it when its process ends, however it
ends, so that a lock left behind is taken over.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import ParamSpec, TypeVar

from .errors import OrthogonalizeError

P = ParamSpec("P")
T = TypeVar("T")

UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # file systems without locks
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)

# The locks of this process by file: the thread that holds it, and how often. Record locks do not exclude threads.
_held: dict[Path, tuple[int, int]] = {}
_changed = threading.Condition()


class InUseError(OrthogonalizeError):
    """Another process is writing the same place."""


def try_lock(descriptor: int, wait: bool = False) -> bool:
    """Lock an open file for this process; False if another process holds it (or waits until it does not).

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


@contextmanager
def locked(place: Path, folder: Path | None = None, wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing `place` in this context; nested contexts of one thread share the lock.

    Where no lock can be created nothing can be written either, which is left for the command itself to report.

    Args:
        folder: where to keep the lock; by default beside `place`.
        wait: wait for the other process instead of raising an error.

    Raises:
        InUseError: another process, or thread, holds the lock; the message names it.
    """
    place = Path(os.path.abspath(place))
    file = (folder or place.parent).resolve() / f".{place.name}.lock"
    thread = threading.get_ident()
    with _changed:
        holder, depth = _held.get(file, (thread, 0))
        while holder != thread and wait:
            _changed.wait()
            holder, depth = _held.get(file, (thread, 0))
        if holder != thread:
            raise InUseError(f"{place} is being written by another thread of this process; choose a different path")
        _held[file] = thread, depth + 1
    try:
        if depth:
            yield
        else:
            yield from _acquired(place, file, wait)
    finally:
        with _changed:
            if depth:
                _held[file] = thread, depth
            else:
                del _held[file]
                _changed.notify_all()


def _acquired(place: Path, file: Path, wait: bool) -> Iterator[None]:
    made = _make_parents(file.parent)
    try:
        descriptor = _open_locked(place, file, wait)
        try:
            yield
        finally:
            if descriptor is not None:
                with suppress(OSError):
                    file.unlink()  # still locked, so that nobody takes over a file that is about to vanish
                os.close(descriptor)
    finally:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def _make_parents(folder: Path) -> list[Path]:
    """Create a folder; returns the folders that did not exist, innermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def _open_locked(place: Path, file: Path, wait: bool) -> int | None:
    """The descriptor of a lock file that this process has locked; None where there can be no lock."""
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OrthogonalizeError(f"{file} is a symbolic link, not a lock; remove it") from error
            if error.errno in UNWRITABLE or not file.parent.is_dir():
                return None
            raise
        try:
            if not try_lock(descriptor, wait):
                raise InUseError(
                    f"{place} is being written by {_holder(descriptor)}; wait for it, or choose a different path"
                )
            if _is_still(file, descriptor):
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno in UNSUPPORTED:
                return None
            raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # removed by the process that held it; try the next


def _is_still(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    pid, _, host = os.pread(descriptor, 300, 0).decode("utf-8", "replace").partition(" ")
    if not pid.isdecimal():
        return "another process"
    name = "".join(c for c in host if c.isalnum() or c in ".-_")[:64]
    return f"process {pid}" if name == socket.gethostname() else f"process {pid} on {name}"


def exclusive(command: Callable[P, T]) -> Callable[P, T]:
    """Hold the lock of the argument `out` while `command` runs (see `locked`)."""
    parameters = signature(command)

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with locked(Path(parameters.bind(*args, **kwargs).arguments["out"])):
            return command(*args, **kwargs)

    return run
