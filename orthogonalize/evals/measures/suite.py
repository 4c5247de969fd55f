"""Suite `behaviour`: a run's behaviour measure on its test prompts, as `extract` used it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...core.errors import OrthogonalizeError
from ...core.files import fingerprint
from ...engines.registry import ENGINES
from ..judges.base import WordingJudge
from ..judges.registry import find_judge
from ..metrics import Series, yes_no_series
from .base import AnswerMeasure, Opening, Shows
from .registry import find_measure

if TYPE_CHECKING:
    from ...engines.base import Responder
    from ...selection.behaviour import MeasureInfo
    from ...selection.readouts import FirstToken, NearerSide, Readout
    from ..suites.answers import AnswerSet
    from ..suites.base import BaseOutputs


@dataclass(frozen=True)
class BehaviourSuite:
    """The behaviour of every model by a readout: one forward pass per prompt, no answers."""

    readout: Readout
    sets: Sequence[AnswerSet]
    name: str = "behaviour"

    @property
    def rows(self) -> list[list[int]]:
        """The prompts of all sets, as ids."""
        return [item.ids for each in self.sets for item in each.items]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, and one more."""
        return max(map(len, self.rows)) + 1

    @property
    def state(self) -> str:
        """A fingerprint of the prompts and the readout."""
        return fingerprint([[each.key for each in self.sets], self.rows, str(self.readout)])

    def measure(self, engine: Responder, memory: BaseOutputs) -> dict[str, Series]:
        """The series `behaviour.…` of every set."""
        from ...selection.readouts import FirstToken, NearerSide

        if isinstance(self.readout, FirstToken):
            scores = first_token_scores(engine, self.rows, self.readout)
        else:
            assert isinstance(self.readout, NearerSide)
            scores = _nearer_side_scores(engine, self.rows, self.readout)
        flags = iter([score > 0 for score in scores])
        return {
            f"behaviour.{each.key}": yes_no_series(
                [next(flags) for _ in each.items], [item.category for item in each.items]
            )
            for each in self.sets
        }


def first_token_scores(engine: Responder, rows: Sequence[Sequence[int]], readout: FirstToken) -> list[float]:
    """The scores of `FirstToken`, from the log-probabilities that an engine gives."""
    choices = [[token] for token in readout.tokens]
    scores = []
    for logprobs in engine.choices(rows, [choices] * len(rows)):
        p = min(max(sum(math.exp(each) for each in logprobs), 1e-8), 1 - 1e-8)
        scores.append(math.log(p) - math.log1p(-p) - readout.threshold)
    return scores


def _nearer_side_scores(engine: Any, rows: Sequence[Sequence[int]], readout: NearerSide) -> list[float]:
    from ...selection.scoring import read_outputs

    model = getattr(engine, "engine", engine).model  # that of an engine with `hooks`, behind the one that resumes
    return [float(score) for score in readout.scores(read_outputs(model, rows, readout.layers))]


def check_run_measure(info: MeasureInfo, given: str | None, engine: str) -> str | None:
    """Check that eval can use a run's measure; returns why suite `behaviour` is left out, if it has to be.

    Args:
        given: the value of `--measure`, which measures of one's own code need: a run of somebody else's can name any.
        engine: the engine's name.

    Raises:
        OrthogonalizeError: `given` is another measure, or is missing where it is needed.
    """
    measure, _ = find_measure(info.name)
    if given is not None and given != info.name:
        raise OrthogonalizeError(f"the run's behaviour measure is {info.name}; extract again with --measure {given}")
    if isinstance(measure, AnswerMeasure) and measure.own_code and given is None:
        raise OrthogonalizeError(
            f"the run's behaviour measure runs code that the run names; if it is yours, add --measure {info.name}"
        )
    if info.name == "direction" and not ENGINES.find(engine).hooks:
        able = " or ".join(f"--engine {entry.name}" for entry in ENGINES.values() if entry.hooks)
        return f"the run's behaviour measure, direction, reads activations, which {engine} does not give; use {able}"
    return None


def shows_in_answers(info: MeasureInfo) -> Shows | None:
    """The run's measure, if it is one of answers that needs no judge model's engine."""
    measure, argument = find_measure(info.name)
    if not isinstance(measure, AnswerMeasure) or behaviour_judge(info) is not None:
        return None
    return measure.open(Opening(argument, info.phrases))


def behaviour_judge(info: MeasureInfo) -> str | None:
    """The judge model (`NAME` or `NAME=MODEL`) whose refusals are the run's behaviour, if one is."""
    measure, argument = find_measure(info.name)
    judged = isinstance(measure, AnswerMeasure) and measure.judged
    return argument if judged and not isinstance(find_judge(argument), WordingJudge) else None
