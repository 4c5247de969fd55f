"""Ask vLLM, by experiment on a small random model, what a description leaves open."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch

from ...architectures.open_questions import HEAD, Answer, answered, open_names
from ...architectures.schema import Architecture, architecture_of, remember
from ...checkpoints.checkpoint import Checkpoint
from ...core.errors import shown
from ...core.files import fingerprint, write_atomically
from ...core.foreign import has
from ...core.progress import note
from ...models.resolve import cache_folder
from ..registry import ENGINES
from .questions import Told
from .small_model import experiment

WORDS = {
    "vllm": "read by vLLM",
    "transformers": "read by vLLM's Transformers backend alone",
    "never": "not read by vLLM",
}
_failures: dict[str, str] = {}  # why there is no answer, in this process; so that no edit waits for the same again


def ask_server(source: Checkpoint) -> str:
    """Find out what the description of the model of `source` leaves open, and have `architecture_of` know it.

    What was found is kept in the cache by all that it depends on: answers, and why there is none where that is for the
    class and the versions. A reason that may pass is not, and the next command asks again for what has no answer.
    Returns why something is still open, if it is.
    """
    architecture = architecture_of(source.config)
    names = open_names(architecture)
    if not names:
        return ""
    if not has("vllm"):
        return "an experiment would tell, but vllm is not installed: install it"
    key = _key(source, architecture)
    file = cache_folder() / "descriptions" / f"{key}.json"
    told, how = _kept(file, names), f"by an earlier experiment on vLLM ({file})"
    if told.reason:
        _failures[key] = told.reason
        note(f"{shown(architecture.family, 60)}: an earlier experiment on vLLM failed; remove {file} to repeat it")
    elif key not in _failures and not told.answers.keys() >= set(names):
        started = time.monotonic()
        told = experiment(source, architecture, told.answers)
        how = f"by an experiment on vLLM in {time.monotonic() - started:.0f} s"
        _keep(file, told)
        if told.reason:
            _failures[key] = told.reason
    if told.answers:
        note(f"{shown(architecture.family, 60)}: {how}, {_said(told.answers)}")
    found = answered(architecture, told.answers)
    remember(source.config, found)
    if key in _failures:
        _failures[_key(source, found)] = _failures[key]
    return _failures.get(key, "")


def _said(answers: Mapping[str, Answer]) -> str:
    return "; ".join(
        f"{'an untied head' if name == HEAD else f'the bias of {name}'} is {WORDS[answer]}"
        for name, answer in answers.items()
    )


def _kept(file: Path, names: Collection[str]) -> Told:
    """What `file` has: answers to some of the questions `names`, and why there is none to the others."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        stored = Told(**json.loads(file.read_text("utf-8")))
        valid = all(name in names and answer in list(WORDS) for name, answer in stored.answers.items())
        if valid and isinstance(stored.reason, str):
            return stored
    return Told({})


def _keep(file: Path, told: Told) -> None:
    if told.answers or (told.reason and not told.passing):
        with suppress(OSError):  # without a cache, the next command repeats the experiment
            file.parent.mkdir(parents=True, exist_ok=True)
            kept = {"answers": told.answers, "reason": "" if told.passing else told.reason}
            write_atomically(file, json.dumps(kept))


def _key(source: Checkpoint, architecture: Architecture) -> str:
    """What the answers depend on: the configuration, the description, the libraries and the device."""
    versions = {name: version(name) for name in ("orthogonalize", "transformers", "torch")}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    described = architecture.model_dump(mode="json")
    return fingerprint([source.config, described, versions, ENGINES.find("vllm").version, device])[:32]
