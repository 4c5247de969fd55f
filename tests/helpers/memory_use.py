"""How much memory work takes beyond what its process had before, whatever other tests this process has run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RESET_PEAK = "5"  # see proc(5), clear_refs


class Growth:
    """The most bytes that the process had at a time, beyond those at the beginning."""

    bytes = 0


def _resident(name: str) -> int:
    (line,) = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(name)]
    return 1024 * int(line.split()[1])


@contextmanager
def memory_growth() -> Iterator[Growth]:
    """The growth of this process's memory in this context, known at its end."""
    growth = Growth()
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    before = _resident("VmRSS")
    try:
        yield growth
    finally:
        growth.bytes = _resident("VmHWM") - before
