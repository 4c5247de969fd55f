"""Datasets on the Hub, if it can be reached; its libraries would try for a minute before they say that it cannot."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from ..core.errors import OrthogonalizeError, first_line

SECONDS = 5.0  # for a connection


def is_reachable(address: str) -> bool:
    """Whether the host of an address takes connections; a proxy is trusted to reach every host."""
    parts = urlsplit(address)
    if parts.scheme in getproxies() or parts.hostname is None:
        return True
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), SECONDS).close()
    except OSError:
        return False
    return True


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Let the Hub's libraries use what they have stored, without retries, in this context if the Hub is unreachable."""
    import datasets
    from huggingface_hub import constants

    settings = (constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")
    before = [getattr(module, name) for module, name in settings]
    offline = not is_reachable(constants.ENDPOINT)
    try:
        for module, name in settings:
            setattr(module, name, offline or getattr(module, name))
        yield
    finally:
        for (module, name), value in zip(settings, before, strict=True):
            setattr(module, name, value)


def dataset_rows(source: str, split: str) -> list[Any]:
    """All rows of one split of a dataset.

    Raises:
        OrthogonalizeError: it cannot be read.
    """
    from datasets import load_dataset  # slow to import, and only Hub sources need it

    try:
        with offline_if_unreachable():
            return list(load_dataset(source, split=split))
    except Exception as error:  # the library raises a class of its own for every kind of failure
        raise OrthogonalizeError(
            f"dataset {source!r} (split {split!r}) cannot be read: {first_line(error)}; "
            "check the name, the split, your access and the network"
        ) from error
