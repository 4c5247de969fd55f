"""Measure `judge:NAME`: answers that a judge says refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...core.errors import OrthogonalizeError
from .base import AnswerMeasure, Opening, Shows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...core.journal import Journal
    from .base import Pair


def check_argument(argument: str) -> None:
    """Check that there is such a judge (`NAME` or `NAME=MODEL`)."""
    from ..judges.registry import check_judge

    check_judge(argument)


def open_judge(opening: Opening) -> Shows:
    """The judge called `opening.argument` (`NAME` or `NAME=MODEL`); its model runs in transformers.

    Raises:
        OrthogonalizeError: there is no such judge, its model is missing, or it does not say what refuses.
    """
    from ...engines.base import EngineOptions
    from ..judges.base import WordingJudge
    from ..judges.registry import find_judge, model_judges
    from ..judges.runner import ready_judges

    judge = find_judge(opening.argument)
    if isinstance(judge, WordingJudge):
        refuses = judge.refuses
        return lambda pairs, _journal: [refuses(answer) for _, answer in pairs]
    if "refusal" not in judge.fields:
        able = [name for name, other in model_judges().items() if "refusal" in other.fields]
        raise OrthogonalizeError(f"judge {judge.name} does not say what refuses; use {' or '.join(able)}")
    (ready,) = ready_judges([opening.argument])
    options = EngineOptions(device=opening.device)

    def shows(pairs: Sequence[Pair], journal: Journal) -> list[bool | None]:
        return [judgement.refusal for judgement in ready.ask(pairs, "hf", options, journal)]

    return shows


MEASURE = AnswerMeasure(
    "judge", "answers that a judge says refuse", open_judge, argument="NAME", judged=True, check=check_argument
)
