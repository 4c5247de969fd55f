"""Being stopped: by Ctrl-C, or by a scheduler's TERM, wherever the signal happens to arrive."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = False  # no lock: a second signal may arrive in the middle of the first


def _stop(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    raise KeyboardInterrupt


@contextmanager
def signals_handled() -> Iterator[None]:
    """In here a signal to stop raises KeyboardInterrupt, and `check` does so again where that was swallowed.

    Python drops what is raised while it cleans up after an object; the work would go on as if nothing were said.
    What this process was started to ignore (jobs in a shell's background ignore Ctrl-C), it ignores.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, _stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked = False


def check() -> None:
    """Stop here, if that was asked for; called before an engine is asked for anything.

    Raises:
        KeyboardInterrupt: it was.
    """
    global _asked
    if _asked:
        _asked = False
        raise KeyboardInterrupt
