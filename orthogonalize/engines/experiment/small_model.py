"""Run `server`, which asks vLLM about a model, on a small random model of a class."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ...architectures.open_questions import HEAD, Answer, answered, open_flags, open_names
from ...architectures.schema import Architecture, families
from ...checkpoints.checkpoint import Checkpoint, open_checkpoint
from ...core.errors import OrthogonalizeError, first_line, shown
from ...core.foreign import has
from ...core.progress import track
from ...core.temporary_folders import temporary_folder
from ...models.describe.twin import SERVED_SIZES, load_twin, logits, save_twin
from ...models.describe.wrapper_twin import save_wrapper_twin
from ...models.loading import load_config
from ...models.sites import Sites
from .passing import SIGNALS, may_pass, says_short
from .questions import PROMPTS, QUESTIONS, PassingError, Told, open_questions

AGAIN = "that may pass: free memory, wait or install it, and run the command again"
SECONDS = 900  # that all starts of vLLM may take, on a busy machine


def experiment(source: Checkpoint, architecture: Architecture, known: Mapping[str, Answer]) -> Told:
    """The answers to what `architecture` leaves open, those `known` included, and why there is none to the others.

    What goes wrong on a small Llama as well is no fault of the class, so that it may pass, like memory that is short.
    """
    told, started = _tried(load_config(source.path), architecture, known)
    if told.passing:
        return replace(told, reason=f"{told.reason}; {AGAIN}")
    if told.reason and started:
        llama = answered(families()["llama"], {HEAD: "unknown"})
        other, _ = _tried(AutoConfig.for_model("llama"), llama, {})
        if other.reason:
            why = f"{other.reason}; no small Llama runs here either: mend that, and run the command again"
            return Told(told.answers, why, passing=True)
    return told


def _tried(config: Any, architecture: Architecture, known: Mapping[str, Answer]) -> tuple[Told, bool]:
    """What vLLM tells of a small model, and whether it was asked at all."""
    with temporary_folder() as twin:
        try:
            lacking = _store_questions(config, architecture, known, twin)
        except (OrthogonalizeError, OSError) as error:
            return Told(known, first_line(error), isinstance(error, PassingError) or may_pass(error)), False
        told = _served(twin)
    told = replace(told, answers={**known, **told.answers})
    if lacking and not told.reason:
        return Told(told.answers, f"a small model of its class has none: {', '.join(sorted(lacking))}"), False
    return told, True


def _store_questions(
    config: Any, architecture: Architecture, known: Mapping[str, Answer], twin: Path
) -> Collection[str]:
    """Store a small model and the questions about it in the folder `twin`; the questions that it has no tensors for.

    Raises:
        OrthogonalizeError: there is no such model, or no question about it.
    """
    config = deepcopy(config)
    text = config.get_text_config()
    if text is not config and not has("torchvision"):  # which vLLM imports for every such class
        raise PassingError("vLLM runs a model of texts and images only with torchvision, which is not installed")
    for flag, value in open_flags(architecture).items():
        setattr(text, flag, value)
    save = save_twin if text is config else save_wrapper_twin  # vLLM runs a wrapper's text model in a class of its own
    save(config, twin, SERVED_SIZES, torch.bfloat16)
    small = open_checkpoint(twin)
    sites = Sites(architecture, small.config, small.tensors)
    questions = open_questions(sites)
    asked = {
        "questions": [asdict(question) for question in questions],
        "known": dict(known),
        "control": _control(sites),
        "backend": architecture.transformers_class if text is config else None,  # which would leave images out
        "expected": _expected(twin),
    }
    (twin / QUESTIONS).write_text(json.dumps(asked), "utf-8")
    return set(open_names(architecture)) - {question.name for question in questions}


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


def _served(twin: Path) -> Told:
    """What the program `server` prints about the model in the folder `twin`."""
    paths = [str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", f"{__package__}.server", str(twin)]
    with track("asking vLLM", None):
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, errors="replace", check=False, timeout=SECONDS
            )
        except subprocess.TimeoutExpired as stopped:
            said = stopped.stdout or b""
            partly = _last(said.decode(errors="replace") if isinstance(said, bytes) else said, "partly")
            return Told(partly or {}, f"vLLM did not answer in {SECONDS} s", passing=True)
    told = _last(done.stdout, "told")
    if told is not None:
        return Told(told["answers"], shown(told["reason"], 160), told["passing"])
    code = done.returncode
    how = f"signal {-code}" if code < 0 else f"status {code}"
    line = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
    passing = -code in SIGNALS or says_short(line)
    return Told(_last(done.stdout, "partly") or {}, f"vLLM ended with {how}: {shown(line, 120)}", passing)


def _last(output: str, key: str) -> Any:
    """What the program `server` said last of `key`: all that it was told, or the answers before it had all."""
    start = f'{{"{key}":'
    lines = [line for line in output.splitlines() if line.startswith(start) and line.endswith("}")]
    return json.loads(lines[-1])[key] if lines else None
