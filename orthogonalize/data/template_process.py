"""Render chat templates in a process of its own, since a template from anybody may loop or take all memory.

The process starts once, with a fresh interpreter (forking one that has threads and torch is unsafe), and serves every
later request.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

SECONDS = 10.0  # per chat
STARTING = 300.0  # seconds that the process may take to start, on a busy machine
PRIVATE = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")  # in names of variables that it has no need of


class TemplateError(Exception):
    """A template did not render a chat; the message is the reason in one line."""


class _Worker:
    """The running process."""

    def __init__(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not any(word in k.upper() for word in PRIVATE)}
        script = Path(__file__).with_name("template_worker.py")
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self.received = b""
        self._line(STARTING)

    @property
    def usable(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def _line(self, seconds: float) -> bytes:
        """The next line that the process writes.

        Raises:
            TemplateError: it does not write one in time, or ends.
        """
        assert self.process.stdout is not None
        descriptor, end = self.process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self.received:
            left = end - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise TemplateError(f"it takes longer than {seconds:g} seconds")
            part = os.read(descriptor, 2**20)
            if not part:
                code = self.process.wait()
                how = signal.Signals(-code).name if code < 0 else f"status {code}"
                raise TemplateError(f"the process that renders it ended with {how}")
            self.received += part
        line, _, self.received = self.received.partition(b"\n")
        return line

    def render(self, template: str, chats: Sequence[Any], arguments: Mapping[str, Any]) -> Iterator[str]:
        assert self.process.stdin is not None
        request = {"template": template, "chats": list(chats), "arguments": dict(arguments)}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        for _ in chats:
            answer = json.loads(self._line(SECONDS))
            if "error" in answer:
                raise TemplateError(answer["error"])
            if not answer["text"].strip():
                raise TemplateError("it writes nothing")
            yield answer["text"]

    def end(self) -> None:
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


_worker: _Worker | None = None
_busy = threading.Lock()


def render(template: str, chats: Sequence[Any], arguments: Mapping[str, Any]) -> list[str]:
    """Every one of `chats` (lists of messages) as text, up to where the answer begins.

    Args:
        arguments: passed to the template; plain JSON values.

    Raises:
        TemplateError: the template rejects a chat, fails, or exceeds a limit on time, memory or size.
    """
    global _worker
    with _busy:
        try:
            if _worker is None or not _worker.usable:
                _end()
                _worker = _Worker()
            return list(_worker.render(template, chats, arguments))
        except BaseException as error:  # answers that are still to come belong to no request
            _end()
            if isinstance(error, BrokenPipeError):
                raise TemplateError("the process that renders it ended") from error
            raise


def _end() -> None:
    global _worker
    if _worker is not None:
        _worker.end()
        _worker = None


atexit.register(_end)
