"""Whether answers refuse: by their wording, or as a judge sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...core.errors import OrthogonalizeError
from ...core.journal import Journal
from ...data.refusals import refused
from ...engines.base import ONE_DEVICE, EngineOptions
from .base import WordingJudge
from .registry import find_judge, model_judges
from .runner import ReadyJudge, ready_judges


@dataclass(frozen=True)
class RefusalCheck:
    """Tells refusals from other answers: by a judge, whose model runs in transformers, or by `wording`."""

    wording: Callable[[str], bool] = refused
    judge: ReadyJudge | None = None
    options: EngineOptions = ONE_DEVICE

    @classmethod
    def of(cls, name: str | None, device: str = "auto") -> RefusalCheck:
        """The check by the judge called `name` (`NAME` or `NAME=MODEL`); None goes by wording.

        Raises:
            OrthogonalizeError: there is no such judge, its model is missing, or it does not say what refuses.
        """
        if name is None:
            return cls()
        judge = find_judge(name)
        if isinstance(judge, WordingJudge):
            return cls(judge.refuses)
        if "refusal" not in judge.fields:
            able = [each for each, other in model_judges().items() if "refusal" in other.fields]
            raise OrthogonalizeError(f"judge {judge.name} does not say what refuses; use {' or '.join(able)}")
        (ready,) = ready_judges([name])
        return cls(judge=ready, options=EngineOptions(device=device))

    def left(self, pairs: Sequence[tuple[str, str]], wanted: bool, journal: Journal) -> float:
        """The share of (prompt, answer) that do not refuse if that is `wanted`, or refuse if it is not.

        A reply of the judge that cannot be read counts as left. Judgements are kept in `journal`.
        """
        if self.judge is None:
            return sum(self.wording(answer) != wanted for _, answer in pairs) / len(pairs)
        found = self.judge.ask(pairs, "hf", self.options, journal)
        return sum(judgement.refusal is not wanted for judgement in found) / len(found)
