"""Being stopped: by Ctrl-C, or by a scheduler's TERM, wherever the signal happens to arrive."""

from __future__ import annotations

import signal
import threading
from types import FrameType

_asked = threading.Event()


def _stop(number: int, frame: FrameType | None) -> None:
    _asked.set()
    raise KeyboardInterrupt


def listen() -> None:
    """From now on a signal to stop raises KeyboardInterrupt, and `check` does so again where that was swallowed.

    Python drops what is raised while it cleans up after an object; the work would go on as if nothing were said.
    """
    _asked.clear()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stop)


def check() -> None:
    """Stop here, if that was asked for.

    Raises:
        KeyboardInterrupt: it was.
    """
    if _asked.is_set():
        raise KeyboardInterrupt
