"""Measure `wording`: answers that contain one of some phrases; refusals by default."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.refusals import contains_any
from .base import AnswerMeasure, Opening, Shows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...core.journal import Journal
    from .base import Pair


def open_wording(opening: Opening) -> Shows:
    """Looks for the phrases of `opening`, ignoring case and the shape of apostrophes."""

    def shows(pairs: Sequence[Pair], _journal: Journal) -> list[bool | None]:
        return [contains_any(answer, opening.phrases) for _, answer in pairs]

    return shows


MEASURE = AnswerMeasure(
    "wording", "answers that contain a phrase: refusals, or those of `--wording FILE`", open_wording
)
