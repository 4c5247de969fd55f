"""Ask vLLM, by experiment on a small random model, what a description leaves open."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...architectures.open_questions import HEAD, Answer, answered, open_flags, open_names
from ...architectures.schema import Architecture, architecture_of, remember
from ...checkpoints.checkpoint import Checkpoint, open_checkpoint
from ...core.errors import OrthogonalizeError, shown
from ...core.files import fingerprint, write_atomically
from ...core.foreign import has
from ...core.progress import note, track
from ...core.temporary_folders import temporary_folder
from ...models.describe.twin import SERVED_SIZES, load_twin, logits, save_twin
from ...models.loading import load_config
from ...models.resolve import cache_folder
from ...models.sites import Sites
from ..registry import ENGINES
from .questions import PROMPTS, QUESTIONS, open_questions

SECONDS = 900  # that all starts of vLLM may take, on a busy machine
WORDS = {
    "vllm": "read by vLLM",
    "transformers": "read by vLLM's Transformers backend alone",
    "never": "not read by vLLM",
}
_failures: dict[str, str] = {}  # why there is no answer, in this process; so that no edit waits for the same again


def ask_server(source: Checkpoint) -> str:
    """Find out what the description of the model of `source` leaves open, and have `architecture_of` know it.

    The answers are kept in the cache by all that they depend on. Returns why something is still open, if it is.
    """
    architecture = architecture_of(source.config)
    if not open_names(architecture):
        return ""
    if not has("vllm"):
        return "an experiment would tell, but vllm is not installed: install it"
    key = _key(source, architecture)
    file = cache_folder() / "descriptions" / f"{key}.json"
    answers, how = _kept(file, architecture), f"by an earlier experiment on vLLM ({file})"
    if answers is None and key not in _failures:
        started = time.monotonic()
        try:
            answers, reason = _asked(source, architecture)
        except OrthogonalizeError as error:
            answers, reason = {}, str(error)
        if reason:
            _failures[key] = reason
        else:
            with suppress(OSError):  # without a cache, the next command repeats the experiment
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, json.dumps(answers))
        how = f"by an experiment on vLLM in {time.monotonic() - started:.0f} s"
    if answers:
        note(f"{shown(architecture.family, 60)}: {how}, {_said(answers)}")
    found = answered(architecture, answers or {})
    remember(source.config, found)
    if key in _failures:
        _failures[_key(source, found)] = _failures[key]
    return _failures.get(key, "")


def _said(answers: dict[str, Answer]) -> str:
    return "; ".join(
        f"{'an untied head' if name == HEAD else f'the bias of {name}'} is {WORDS[answer]}"
        for name, answer in answers.items()
    )


def _kept(file: Path, architecture: Architecture) -> dict[str, Answer] | None:
    """The answers in `file`, if it has all that are open."""
    with suppress(OSError, ValueError):
        answers = json.loads(file.read_text("utf-8"))
        if isinstance(answers, dict) and answers.keys() >= set(open_names(architecture)):
            return answers if all(answer in list(WORDS) for answer in answers.values()) else None
    return None


def _asked(source: Checkpoint, architecture: Architecture) -> tuple[dict[str, Answer], str]:
    """The answers, and why there is none to the other questions.

    Raises:
        OrthogonalizeError: there is none at all.
    """
    config = load_config(source.path)
    if config.get_text_config() is not config:
        raise OrthogonalizeError(
            "vLLM runs the text model of a wrapper in another class than on its own, so it is not asked"
        )
    config = deepcopy(config)
    for flag, value in open_flags(architecture).items():
        setattr(config, flag, value)
    with temporary_folder() as twin:
        save_twin(config, twin, SERVED_SIZES, torch.bfloat16)
        small = open_checkpoint(twin)
        sites = Sites(architecture, small.config, small.tensors)
        questions = open_questions(sites)
        asked = {
            "questions": [asdict(question) for question in questions],
            "control": _control(sites),
            "backend": architecture.transformers_class,
            "expected": _expected(twin),
        }
        (twin / QUESTIONS).write_text(json.dumps(asked), "utf-8")
        answers, reason = _served(twin)
    lacking = set(open_names(architecture)) - {question.name for question in questions}
    return answers, reason or (f"a small model of its class has none: {', '.join(sorted(lacking))}" if lacking else "")


def _control(sites: Sites) -> str:
    """A tensor that every server reads: an embedding with a row per token.

    Raises:
        OrthogonalizeError: there is none.
    """
    name = next((name for entry, name in sites.embedded() if entry.rows), None)
    if name is None:
        raise OrthogonalizeError("it has no embedding with a row per token, so no experiment can be checked")
    return name


def _expected(twin: Path) -> list[float]:
    """What transformers gives for the log-probability of every prompt's tokens but the first."""
    ids = torch.tensor(PROMPTS)
    found = logits(load_twin(twin), ids)[:, :-1].log_softmax(-1)
    return found.gather(-1, ids[:, 1:, None]).sum((1, 2)).tolist()


def _served(twin: Path) -> tuple[dict[str, Answer], str]:
    """What the program `server` prints about the model in the folder `twin`."""
    paths = [str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", f"{__package__}.server", str(twin)]
    with track("asking vLLM", None):
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, errors="replace", check=False, timeout=SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise OrthogonalizeError(f"vLLM did not answer in {SECONDS} s") from error
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"answers"')]
    if not lines:
        code = done.returncode
        how = f"signal {-code}" if code < 0 else f"status {code}"
        last = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise OrthogonalizeError(f"vLLM ended with {how}: {shown(last, 200)}")
    told: dict[str, Any] = json.loads(lines[-1])
    return told["answers"], shown(told["reason"], 400)


def _key(source: Checkpoint, architecture: Architecture) -> str:
    """What the answers depend on: the configuration, the description, the libraries and the device."""
    versions = {name: version(name) for name in ("orthogonalize", "transformers", "torch")}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    described = architecture.model_dump(mode="json")
    return fingerprint([source.config, described, versions, ENGINES.find("vllm").version, device])[:32]
