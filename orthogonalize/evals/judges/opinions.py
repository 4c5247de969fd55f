"""What judges say of the answers of every model that was measured."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.errors import OrthogonalizeError
from ...core.journal import Journal
from ...engines.base import EngineOptions
from ..plan import EvalPlan, Measurements
from .catalogue import Judgement
from .runner import ReadyJudge, opinion_series, ready_judges

Opinions = dict[str, dict[str, list[Judgement]]]  # by judge, then by prompt set


def judges_for(plan: EvalPlan, names: Sequence[str]) -> list[ReadyJudge]:
    """The judges called `names`, ready; refused where `plan` has no answers for them."""
    if names and not plan.answers_count:
        raise OrthogonalizeError("judges need answers; add --suite refusal")
    try:
        return ready_judges(names)
    except OrthogonalizeError as error:
        raise OrthogonalizeError(f"{error}; or --judge none") from error


def ask_judges(
    judges: Sequence[ReadyJudge],
    plan: EvalPlan,
    models: dict[str, Measurements],
    engine: str,
    options: EngineOptions,
    journal: Journal,
) -> dict[str, Opinions]:
    """Every judge's opinion on every model's answers, by model; a judge's model is started once for all of them."""
    result: dict[str, Opinions] = {label: {} for label in models}
    if not judges:
        return result
    places = [(label, each, i) for label in models for each in plan.sets for i in range(len(each.items))]
    texts = [(each.items[i].text, models[label].answers[each.name][i]) for label, each, i in places]
    for ready in judges:
        found = ready.ask(texts, engine, options, journal)
        for (label, each, _), opinion in zip(places, found, strict=True):
            result[label].setdefault(ready.judge.name, {}).setdefault(each.name, []).append(opinion)
    return result


def add_opinions(plan: EvalPlan, judges: Sequence[ReadyJudge], measured: Measurements, opinions: Opinions) -> None:
    """Put what judges say among a model's series."""
    categories = {each.name: [item.category for item in each.items] for each in plan.sets}
    keys = {each.name: each.key for each in plan.sets}
    for ready in judges:
        name = ready.judge.name
        measured.series |= opinion_series(name, ready.judge.says, opinions[name], categories, keys)
