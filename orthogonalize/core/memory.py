"""How much memory this process can still take."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

UNKNOWN = 8 * 2**30  # bytes assumed where the system does not tell


def available_memory() -> int:
    """Bytes of memory that this process can take: the machine's free memory, or what is left of its cgroup's limit."""
    found = [free for free in (_free_on_machine(), _left_in_group()) if free is not None]
    return min(found, default=UNKNOWN)


def _free_on_machine() -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text("utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _left_in_group() -> int | None:
    folder = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):
            return max(0, int((folder / limit).read_text()) - int((folder / used).read_text()))
    return None
