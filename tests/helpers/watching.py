"""What code does that nobody asked it to do, as Python's audit events show it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname")
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
CODE = ("import", "compile", "exec", "pickle.find_class")
_watchers: list[Watcher] = []


class Watcher:
    """Notes connections, processes, code from `folder`, and files that `word` names; refuses all connections."""

    def __init__(self, folder: Path, word: str) -> None:
        self.folder, self.word, self.seen = folder, word, list[str]()

    def note(self, event: str, arguments: tuple[object, ...]) -> None:
        said = f"{event}{arguments!r}"
        strange = event in NETWORK or event in PROCESSES or (event in CODE and self._is_theirs(said))
        if strange or (event == "open" and self.word in str(arguments[0]).removeprefix(str(self.folder))):
            self.seen.append(said[:300])
        if event in NETWORK:
            raise OSError("no network in this test")

    def _is_theirs(self, said: str) -> bool:
        return str(self.folder) in said or self.word in said


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    for watcher in _watchers:
        watcher.note(event, arguments)


@contextmanager
def watching(folder: Path, word: str) -> Iterator[Watcher]:
    """Watch this process, whose strangers' files lie in `folder` and name `word` wherever they can."""
    if not hasattr(sys, "_orthogonalize_watched"):  # audit hooks stay for as long as the process
        sys.addaudithook(_hook)
        sys._orthogonalize_watched = True  # type: ignore[attr-defined]
    watcher = Watcher(folder, word)
    _watchers.append(watcher)
    try:
        yield watcher
    finally:
        _watchers.remove(watcher)
