"""Ask vLLM which parameters of a small random model it reads. Run as a program, in a process of its own.

vLLM changes much in the process that it runs in, transformers' classes among it, and may end it. The program takes a
folder with the model and the questions about it, and prints lines of JSON: the answers so far, at last all.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from ...checkpoints.checkpoint import SINGLE, Checkpoint, open_checkpoint
from ...core.errors import OrthogonalizeError
from ...core.temporary_folders import temporary_folder
from ..base import EngineOptions
from ..vllm import VllmEngine
from ..weight_swap import WeightSwap
from .passing import may_pass
from .questions import PROMPTS, QUESTIONS, InconclusiveError, OtherModelError, PassingError, Question, Served, ask

LENGTH = 32  # tokens of the context
ANSWER = 4  # tokens of answers that are compared
# Of two log-probabilities of a token: bfloat16 moves a small model's by some hundredths, another model's differ by one.
FAR = 0.15
OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True, "max_num_seqs": 4, "enable_prefix_caching": False}
ON_GPU = {"kv_cache_memory_bytes": 2**28, "enforce_eager": True}
BESIDE = EngineOptions(gpu_memory_utilization=0.05)  # whatever else is on the GPU


class _Served:
    """A running engine, whose weights are swapped."""

    def __init__(self, engine: VllmEngine, source: Checkpoint) -> None:
        self.engine, self.source, self.swapper = engine, source, WeightSwap(engine, source)
        self.plain = self.scores()

    def check(self, control: str) -> None:
        """Check that experiments will show something; `control` is a tensor that every server reads.

        Raises:
            OrthogonalizeError: its log-probabilities are no numbers, or weights cannot be swapped.
        """
        if not self.is_number():
            raise OrthogonalizeError("vLLM leaves parameters of a small model of this class unset")
        if not self.reads(control):
            raise InconclusiveError(f"vLLM does not take {control} of a small model of this class in place")

    def check_same(self, expected: Sequence[float]) -> None:
        """Check that it serves the model: the prompts' log-probabilities are transformers', and answers go with them.

        An answer depends on what the server keeps of earlier tokens, which it may do for attention alone; so the
        tokens of most answers must be the likeliest when they are read as part of a prompt, too. (Rounding to bfloat16
        changes some: those of 13 to 15 of 16 answers were, in small models of Qwen3, Cohere and Gemma 2.)

        Raises:
            OtherModelError: it does not.
        """
        rest = len(PROMPTS[0]) - 1
        gaps = [abs(a - b) / rest**0.5 for a, b in zip(self.plain, expected, strict=True)]
        again = self.engine.scores(PROMPTS, self.engine.answers(PROMPTS, ANSWER))
        if median(gaps) > FAR or sum(answer.greedy for answer in again) <= len(again) / 2:
            raise OtherModelError("vLLM's Transformers backend does not compute what transformers does")

    def is_number(self) -> bool:
        """See `questions.Server`."""
        return all(map(math.isfinite, self.plain))

    def scores(self) -> list[float]:
        """Log-probabilities of the prompts' tokens."""
        return [c.logprob for c in self.engine.scores([p[:1] for p in PROMPTS], [p[1:] for p in PROMPTS])]

    def reads(self, tensor: str) -> bool:
        """See `questions.Server`."""
        self.swapper.apply({tensor: lambda: torch.full_like(self.source.read(tensor), math.nan)})
        found = self.scores()
        self.swapper.restore()
        if self.scores() != self.plain:
            raise InconclusiveError(f"vLLM does not take {tensor} of a small model of this class back")
        if not any(map(math.isnan, found)) and found != self.plain:
            raise InconclusiveError(f"vLLM's scores change with {tensor} of a small model, but are numbers")
        return any(map(math.isnan, found))


@contextmanager
def _unset_is_nan() -> Iterator[None]:
    """A context in which parameters that no file fills are NaN; vLLM takes whatever is in memory."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader as Loader

    load = Loader.load_weights

    def load_weights(loader: Any, model: Any, config: Any) -> None:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data.fill_(math.nan)
        load(loader, model, config)

    Loader.load_weights = load_weights
    try:
        yield
    finally:
        Loader.load_weights = load


def _store_variant(
    source: Checkpoint, folder: Path, left_out: Sequence[Question], spoiled: Sequence[str], backend: str | None
) -> None:
    """Store the model in `folder` without what some questions are about, and with NaN in `spoiled`."""
    dropped = {tensor for question in left_out for tensor in question.created}
    kept = {name: source.read(name) for name in source.tensors if name not in dropped}
    kept |= {name: torch.full_like(kept[name], math.nan) for name in spoiled}
    save_file(kept, folder / SINGLE, {"format": "pt"})
    without = {key: value for question in left_out for key, value in question.without.items()}
    config = source.config | without | ({"architectures": [backend]} if backend else {})
    if "text_config" in config:  # of a wrapper, whose class may look for the head's flag in either place
        config["text_config"] = config["text_config"] | without
    (folder / "config.json").write_text(json.dumps(config))


@contextmanager
def _started(folder: Path) -> Iterator[VllmEngine]:
    """A running engine.

    Raises:
        OrthogonalizeError: with vLLM's own reason, and without advice about the user's model.
    """
    options = OPTIONS | (ON_GPU if torch.cuda.is_available() else {})
    with ExitStack() as stack:
        try:
            engine = stack.enter_context(VllmEngine(folder, LENGTH, BESIDE, **options))
        except OrthogonalizeError as error:
            raise OrthogonalizeError(f"vLLM does not run a small model of this class: {_said(error)}") from error
        yield engine


def _said(error: BaseException) -> str:
    """vLLM's own reason for an error of the engine."""
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines()]
    said = [line for line in lines if line and "For further information" not in line]
    return said[-1] if said else type(error.__cause__ or error).__name__


@contextmanager
def _told_apart() -> Iterator[None]:
    """A context in which failures that may pass are `PassingError`s."""
    try:
        yield
    except PassingError:
        raise
    except Exception as error:
        if may_pass(error):
            raise PassingError(f"vLLM stopped while it was asked: {_said(error)}") from error
        raise


@dataclass(frozen=True)
class _Starter:
    """Starts vLLM on the model of `source`, or on it without what some of the questions `every` are about.

    Attributes:
        control: the embedding.
        expected: transformers' log-probabilities of the prompts.
        backend: the class that stands for vLLM's Transformers backend; None if the model has no use for it.
    """

    source: Checkpoint
    every: Sequence[Question]
    control: str
    expected: Sequence[float]
    backend: str | None

    @contextmanager
    def __call__(self, served: Served, stored: Sequence[Question], spoiled: Sequence[str]) -> Iterator[_Served]:
        """See `questions.Start`."""
        left_out = [question for question in self.every if question not in stored]
        backend = self.backend if served == "transformers" else None
        with _told_apart(), temporary_folder() as folder:
            _store_variant(self.source, folder, left_out, spoiled, backend)
            with _started(folder) as engine:
                running = _Served(engine, open_checkpoint(folder))
                if not spoiled:
                    running.check(self.control)
                    if backend is not None:  # another implementation than the unedited model's
                        running.check_same(self.expected)
                yield running


def main(folder: Path) -> None:
    """Answer the questions about the model in `folder`."""
    given = json.loads((folder / QUESTIONS).read_text("utf-8"))
    every = [Question.read(question) for question in given["questions"]]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the loader is changed in this process
    with _unset_is_nan():
        start = _Starter(open_checkpoint(folder), every, given["control"], given["expected"], given["backend"])
        told = ask(every, start, given["known"], lambda answers: _print(partly=answers), bool(given["backend"]))
    _print(told=asdict(told))


def _print(**said: Any) -> None:
    """Print a line of JSON; vLLM prints others."""
    print(f"\n{json.dumps(said)}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
