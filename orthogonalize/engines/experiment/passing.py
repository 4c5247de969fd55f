"""Which failures of an experiment may pass: those for want of memory, time, disk or the like, whatever the model."""

from __future__ import annotations

import errno
import re
import signal
from collections.abc import Iterator

from ...core.errors import OUT_OF_MEMORY, OrthogonalizeError

# As vLLM, torch and the system word it. Nothing here names a class of models.
SHORT = re.compile(
    rf"{OUT_OF_MEMORY.pattern}|available memory|free memory|memory profiling|less than desired|"
    r"no space left|disk quota|too many open files|new thread|resource temporarily|busy or unavailable|"
    r"address already in use|connection (refused|reset)|timed out|timeout",
    re.IGNORECASE,
)
CODES = {
    errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EADDRINUSE, errno.EIO,
}  # fmt: skip
# By users, schedulers and the kernel when memory (or /dev/shm: SIGBUS) runs out; a class that crashes vLLM gets others.
SIGNALS = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGBUS, signal.SIGXCPU}


def may_pass(error: BaseException) -> bool:
    """Whether `error`, or one that caused it, is for want of something that there may be more of another time."""
    return any(
        isinstance(cause, MemoryError | TimeoutError | ConnectionError)
        or (isinstance(cause, OSError) and cause.errno in CODES)
        or says_short(str(cause))
        for cause in _causes(error)
    )


def says_short(text: str) -> bool:
    """Whether a message names something that is short."""
    return SHORT.search(text) is not None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The errors behind `error`, without those of this package that only wrap one: they advise about memory anyway."""
    while error is not None:
        before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if before is None or not isinstance(error, OrthogonalizeError):
            yield error
        error = before
