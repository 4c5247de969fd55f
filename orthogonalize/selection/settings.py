"""Settings of `extract`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core.changed_settings import change_settings
from ..core.errors import OrthogonalizeError
from ..data.prompts import GOALS, MINIMUM_TRAIN, Goal, Side
from ..data.thoughts import THINKING, Thinking
from ..directions.finders.registry import DEFAULT_FINDERS, FINDERS
from ..directions.inlp.nullspace import Classifier, Solver
from ..directions.means import ARITHMETIC, find_mean
from ..directions.orthogonal import HARMLESS_MEAN
from ..engines.base import ONE_DEVICE, EngineOptions

SCORINGS = ("local", "global")
ENGINES = ("auto", "hf", "stream", "vllm")
FURTHER_PER_TRAIN = (
    2  # spare negative prompts per train prompt, of which conditional edits leave the first tokens alone
)


@dataclass(frozen=True)
class Settings:
    """Settings of `extract`; defaults follow the reference implementation where it has them.

    Attributes:
        finders: names of the direction finders.
        engine: `hf` holds the whole model on one device, `stream` one block at a time, `vllm` in an engine; `auto`
            picks `hf` where the model fits.
        engine_options: how the engine `vllm` is spread over devices.
        device, dtype: where and how the model runs; None chooses the dtype by device.
        seed: of the split of the prompts and of the draws.
        seeds: how often the prompts are halved, to measure how stable the directions are; 1 measures nothing.
        train, val, test: prompts per side in each split.
        system: system prompt.
        template_arguments: passed to the chat template.
        chat_template: whether prompts are sent in the chat template.
        sensitive: whether the prompts are sensitive, so that eval folds them and their answers.
        measure: what shows the behaviour (see `evals.measures`); `auto` takes what tells the two sides apart.
        wording: a file of phrases, one per line, that the measure `wording` looks for; None is those of refusals.
        behaviour_tokens: first tokens of the behaviour, as ids or text; None learns them.
        thinking: what becomes of a thought before the answer (see `ChatFormat.thinking`).
        filtered: whether to drop prompts on which the model does not behave as expected.
        mean: how `dim` and the negative side's mean are averaged: `arithmetic`, `winsorized` (optionally with a
            quantile, `winsorized:0.99`) or `geometric-median`.
        orthogonal_to: `harmless-mean` makes every direction but LEACE's orthogonal to the negative side's mean at the
            same position and layer.
        max_rank, solver, classifier: of INLP (see `inlp`).
        scoring: `local`, and optionally `global` to also score every candidate at every write.
        layers, positions: the layers, and the tokens counted from the end of the prompt, whose directions are scored;
            None scores all.
        scored: maximum number of val prompts per side to score single directions on; None uses all. Whole edits are
            tried on all positive prompts, whatever this is.
        enough: how many directions of a finder are scored: those that are the best by estimates. 0 scores all, as the
            engines `stream` and `vllm` always do.
        trials: number of whole edits to try; 0 skips the search.
        goal: `remove` takes the behaviour out of what shows it; `calibrate` does so too, and keeps it on the preserved
            prompts, which show it rightly; `strengthen` extends it to target prompts, which do not show it.
        target: a source of the prompts to which the goal `strengthen` extends the behaviour.
        preserve: sources of prompts whose outputs an edit should not move.
        own_answers: a file with the model's own answers to its prompts (rows of `prompt` and `answer`), for the engine
            `stream`, which generates none.
        answers: number of the model's own answers to negative prompts along which an edit's KL is measured.
        description: a TOML file that describes the model's architecture, instead of what is shipped or found.
        trust_remote_code: whether to run code from the model's repository.
        download: whether a model on the Hub is downloaded, or read where it is, once per pass of the engine `stream`;
            None: read there if the disk has no room for it.
    """

    finders: Sequence[str] = DEFAULT_FINDERS
    engine: str = "auto"
    engine_options: EngineOptions = ONE_DEVICE
    device: str = "auto"
    dtype: torch.dtype | None = None
    seed: int = 0
    seeds: int = 1
    train: int = 128
    val: int = 48
    test: int = 100
    system: str | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    chat_template: bool = True
    sensitive: bool = False
    measure: str = "auto"
    wording: Path | str | None = None
    behaviour_tokens: Sequence[int | str] | None = None
    thinking: Thinking = "off"
    filtered: bool = True
    mean: str = ARITHMETIC
    orthogonal_to: str | None = None
    max_rank: int | None = None
    solver: Solver = "newton"
    classifier: Classifier = "logistic"
    scoring: Sequence[str] = ("local",)
    layers: Sequence[int] | None = None
    positions: Sequence[int] | None = None
    scored: int | None = 16
    enough: int = 8
    trials: int = 32
    own_answers: Path | str | None = None
    answers: int = 32
    goal: Goal = "remove"
    target: str | None = None
    preserve: Sequence[str] = ()
    description: Path | str | None = None
    trust_remote_code: bool = False
    download: bool | None = None

    def counts(self, side: Side) -> dict[str, int]:
        """The number of prompts of a side to draw for each split.

        Spare ones serve to measure how stable the directions are, and negative ones to fit conditional edits to.
        """
        stability = self.train if self.seeds > 1 else 0
        spare = max(stability, FURTHER_PER_TRAIN * self.train) if side == "negative" else stability
        return {"train": self.train, "val": self.val, "test": self.test, "spare": spare}

    def with_changes(self, **changes: Any) -> Settings:
        """A copy with other values.

        Raises:
            OrthogonalizeError: there is no such setting.
        """
        return change_settings(self, "extract", changes)

    def check(self) -> None:
        """Check the values.

        Raises:
            OrthogonalizeError: a value is not valid; the message names its option.
        """
        if set(self.finders) - set(FINDERS) or "dim" not in self.finders:
            others = " and ".join(name for name in FINDERS if name != "dim")
            raise OrthogonalizeError(f"--finders must name dim, and may add {others}; got {','.join(self.finders)}")
        if self.engine not in ENGINES:
            raise OrthogonalizeError(f"--engine must be one of {', '.join(ENGINES)}; got {self.engine}")
        if self.engine in ("hf", "stream") and self.engine_options != ONE_DEVICE:
            raise OrthogonalizeError(f"--engine {self.engine} runs without vLLM and does not take its options")
        if self.engine_options.data_parallel_size > 1:
            raise OrthogonalizeError("extract uses one engine; give --tensor-parallel-size instead")
        if self.engine == "vllm" and self.trust_remote_code:
            raise OrthogonalizeError("--engine vllm runs its own classes only, not --trust-remote-code")
        if self.engine == "stream" and self.trust_remote_code:
            raise OrthogonalizeError("--engine stream runs transformers' own classes only, not --trust-remote-code")
        loading = "vllm" if self.engine_options != ONE_DEVICE else self.engine
        if self.download is False and loading not in ("auto", "stream"):
            raise OrthogonalizeError(f"--no-download needs --engine stream; --engine {loading} loads the whole model")
        if self.own_answers is not None and not Path(self.own_answers).is_file():
            raise OrthogonalizeError(f"no such file: {self.own_answers} (--own-answers)")
        if self.engine in ("hf", "vllm") and self.own_answers is not None:
            raise OrthogonalizeError(
                f"--own-answers is for --engine stream; --engine {self.engine} generates the answers itself"
            )
        find_mean(self.mean)
        if self.orthogonal_to not in (None, HARMLESS_MEAN):
            raise OrthogonalizeError(f"--orthogonal-to must be {HARMLESS_MEAN}; got {self.orthogonal_to}")
        if set(self.scoring) - set(SCORINGS) or "local" not in self.scoring:
            raise OrthogonalizeError(f"--scoring must name local, and may add global; got {','.join(self.scoring)}")
        if self.train < MINIMUM_TRAIN or self.val < 1 or self.test < 0 or self.seeds < 1:
            raise OrthogonalizeError(
                f"--train must be at least {MINIMUM_TRAIN}, --val and --seeds at least 1, --test at least 0"
            )
        if self.enough < 0:
            raise OrthogonalizeError(f"--enough must be 0 or more; got {self.enough}")
        if self.scored is not None and self.scored < 1:
            raise OrthogonalizeError(f"--scored must be at least 1; got {self.scored}")
        if self.thinking not in THINKING:
            raise OrthogonalizeError(f"--thinking must be one of {', '.join(THINKING)}; got {self.thinking}")
        if self.wording is not None and self.measure not in ("auto", "wording"):
            raise OrthogonalizeError(f"--wording belongs to --measure wording, not to {self.measure}")
        if self.goal not in GOALS:
            raise OrthogonalizeError(f"--goal must be one of {', '.join(GOALS)}; got {self.goal}")
        if (self.target is not None) != (self.goal == "strengthen"):
            raise OrthogonalizeError(
                "--goal strengthen needs --target, the prompts that are to show the behaviour; no other goal takes it"
            )
        if self.goal == "calibrate" and not self.preserve:
            raise OrthogonalizeError(
                "--goal calibrate needs --preserve: prompts on which the behaviour is right and has to stay"
            )
        if self.classifier == "svm" and self.solver != "sklearn":
            raise OrthogonalizeError("--classifier svm needs --solver sklearn")
