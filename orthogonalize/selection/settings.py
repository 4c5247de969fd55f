"""How `extract` works: what can be set, and which settings cannot work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..core.errors import OrthogonalizeError
from ..data.prompts import MINIMUM_TRAIN
from ..directions.finders.registry import FINDERS
from ..directions.inlp.nullspace import Classifier, Solver

SCORINGS = ("local", "global")


@dataclass(frozen=True)
class Settings:
    """How `extract` works; the defaults are the reference's where it has them.

    `scored` is the most val prompts a side that score single directions (None is all of them); whole
    edits are tried on all positive ones, and on the model's own answers to `answers` negative ones.
    `trials` is how many edits; 0 skips that. `seeds` is how many draws of the prompts show how stable
    the directions are (1 shows nothing). `scoring` may add `global`: every candidate at every write.
    `sensitive` marks a contrast of one's own as that; eval then folds its prompts and answers.
    """

    finders: Sequence[str] = field(default_factory=lambda: tuple(FINDERS))
    device: str = "auto"
    dtype: torch.dtype | None = None
    seed: int = 0
    seeds: int = 1
    train: int = 128
    val: int = 32
    test: int = 100
    system: str | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    chat_template: bool = True
    sensitive: bool = False
    behaviour_tokens: Sequence[int | str] | None = None
    filtered: bool = True
    max_rank: int | None = None
    solver: Solver = "newton"
    classifier: Classifier = "logistic"
    scoring: Sequence[str] = ("local",)
    scored: int | None = None
    trials: int = 32
    answers: int = 32
    trust_remote_code: bool = False

    def check(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            OrthogonalizeError: naming the option.
        """
        if set(self.finders) - set(FINDERS) or "dim" not in self.finders:
            others = " and ".join(name for name in FINDERS if name != "dim")
            raise OrthogonalizeError(f"--finders must name dim, and may add {others}; got {','.join(self.finders)}")
        if set(self.scoring) - set(SCORINGS) or "local" not in self.scoring:
            raise OrthogonalizeError(f"--scoring must name local, and may add global; got {','.join(self.scoring)}")
        if self.train < MINIMUM_TRAIN or self.val < 1 or self.test < 0 or self.seeds < 1:
            raise OrthogonalizeError(f"--train must be at least {MINIMUM_TRAIN}, --val and --seeds 1 and --test 0")
        if self.classifier == "svm" and self.solver != "sklearn":
            raise OrthogonalizeError("--classifier svm is scikit-learn's; give --solver sklearn with it")
