"""Judge the answers of every measured model, and add the judgements to its series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...core.errors import OrthogonalizeError
from ...core.journal import Journal
from ...engines.base import EngineOptions
from ..metrics import yes_no_series
from ..plan import EvalPlan, Measurements
from .base import Judgement
from .runner import Ready, judgement_series, ready_judges

Judgements = dict[str, dict[str, list[Judgement]]]  # by judge, then by prompt set


def judges_for(plan: EvalPlan, names: Sequence[str]) -> list[Ready]:
    """The judges called `names`, ready to run.

    Raises:
        OrthogonalizeError: as `ready_judges`, or no answers are generated under `plan`.
    """
    if names and not plan.every_model_answers:
        raise OrthogonalizeError("judges need answers; add --suite refusal")
    try:
        return ready_judges(names)
    except OrthogonalizeError as error:
        raise OrthogonalizeError(f"{error}; or --judge none") from error


def ask_judges(
    judges: Sequence[Ready],
    plan: EvalPlan,
    models: dict[str, Measurements],
    engine: str,
    options: EngineOptions,
    journal: Journal,
) -> dict[str, Judgements]:
    """The judgements of all answers, by model; each judge's engine starts once for all models."""
    result: dict[str, Judgements] = {label: {} for label in models}
    if not judges:
        return result
    places = [(label, each, i) for label in models for each in plan.sets for i in range(len(each.items))]
    texts = [(each.items[i].text, models[label].answers[each.name][i]) for label, each, i in places]
    for ready in judges:
        found = ready.ask(texts, engine, options, journal)
        for (label, each, _), judgement in zip(places, found, strict=True):
            result[label].setdefault(ready.judge.name, {}).setdefault(each.name, []).append(judgement)
    return result


def add_judgements(plan: EvalPlan, judges: Sequence[Ready], measured: Measurements, judgements: Judgements) -> None:
    """Add the judges' series to a model's."""
    categories = {each.name: [item.category for item in each.items] for each in plan.sets}
    keys = {each.name: each.key for each in plan.sets}
    for ready in judges:
        name = ready.judge.name
        measured.series |= judgement_series(name, ready.judge.fields, judgements[name], categories, keys)


def add_behaviour(plan: EvalPlan, measured: Measurements, judgements: Mapping[str, Sequence[Judgement]]) -> None:
    """Add the behaviour of a run whose measure is a judge: what that judge calls refusals, by prompt set."""
    for each in plan.sets:
        if each.has_behaviour:
            flags = [judgement.refusal for judgement in judgements[each.name]]
            categories = [item.category for item in each.items]
            measured.series[f"behaviour.{each.key}"] = yes_no_series(flags, categories)
