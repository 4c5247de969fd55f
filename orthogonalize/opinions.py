"""What judges say of the answers of every model that was measured."""

from __future__ import annotations

from collections.abc import Sequence

from .engines import EngineName, EngineOptions
from .errors import OrthogonalizeError
from .journal import Journal, fingerprint_of
from .judges import Opinion
from .judging import ReadyJudge, opinion_series, ready_judges
from .models import folder_state
from .plans import Measured, Plan
from .portions import Portions
from .report import Verdict

Opinions = dict[str, dict[str, list[Opinion]]]  # by judge, then by prompt set


def judges_for(plan: Plan, names: Sequence[str]) -> list[ReadyJudge]:
    """The judges called `names`, ready; refused where `plan` has no answers for them."""
    try:
        ready = ready_judges(names)
    except OrthogonalizeError as error:
        raise OrthogonalizeError(f"{error}; or --judge none") from error
    if ready and not plan.answers_count:
        raise OrthogonalizeError("judges need answers; add --suite refusal")
    return ready


def ask_judges(
    judges: Sequence[ReadyJudge],
    plan: Plan,
    models: dict[str, Measured],
    engine: EngineName,
    options: EngineOptions,
    journal: Journal,
) -> dict[str, Opinions]:
    """Every judge's opinion on every model's answers, by model; a judge's model is started once for all of them."""
    result: dict[str, Opinions] = {label: {} for label in models}
    for ready in judges:
        places = [(label, each, i) for label in models for each in plan.sets for i in range(len(each.items))]
        texts = [(plan_item.items[i].text, models[label].answers[plan_item.name][i]) for label, plan_item, i in places]

        step = f"judge/{ready.judge.name}={ready.model}@{fingerprint_of(folder_state(ready.folder))[:12]}"

        def ask(ready: ReadyJudge = ready, texts: list[tuple[str, str]] = texts, step: str = step) -> list[Opinion]:
            return ready.opinions(texts, engine, options, lambda running: Portions(running, journal, step))

        found = journal.step(step, ask)
        for (label, each, _), opinion in zip(places, found, strict=True):
            result[label].setdefault(ready.judge.name, {}).setdefault(each.name, []).append(Opinion(*opinion))
    return result


def add_opinions(plan: Plan, judges: Sequence[ReadyJudge], measured: Measured, opinions: Opinions) -> None:
    """Put what judges say among a model's series."""
    categories = {each.name: [item.category for item in each.items] for each in plan.sets}
    keys = {each.name: each.key for each in plan.sets}
    for ready in judges:
        name = ready.judge.name
        measured.series |= opinion_series(name, ready.judge.says, opinions[name], categories, keys)


def verdict(base: Opinion, edited: Opinion) -> Verdict:
    """What a judge says of both answers to one prompt."""
    return Verdict(
        base_harmful=base.harmful,
        edited_harmful=edited.harmful,
        base_refusal=base.refusal,
        edited_refusal=edited.refusal,
    )
