"""Signal handling: Ctrl-C, and what else asks a process to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_requested = False  # no lock: a second signal may arrive while the first is handled


def _stop(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True
    raise KeyboardInterrupt


@contextmanager
def handle_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on the signals in `STOPPING` in this context.

    `check` raises it again if it was swallowed: Python discards exceptions raised in destructors, so the work would
    silently continue. Signals that the process was started to ignore (background jobs of a shell ignore Ctrl-C, and
    `nohup` the end of the terminal) stay ignored.
    """
    global _requested
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, _stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _requested = False


def check() -> None:
    """Stop here if a signal requested it; called between steps of long work.

    Raises:
        KeyboardInterrupt: a signal arrived and its exception was swallowed.
    """
    global _requested
    if _requested:
        _requested = False
        raise KeyboardInterrupt
