"""Evaluation setup: the model, data and judges, found and checked before any engine starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import open_checkpoint
from ..checkpoints.settings_files import context_length
from ..core.errors import OrthogonalizeError
from ..core.files import fingerprint
from ..core.journal import Journal
from ..core.progress import note
from ..data.prompts import Source, Split
from ..engines.base import Engine, EngineOptions
from ..engines.registry import ENGINES, check_engine, engine_state, open_engine
from ..models.loading import load_tokenizer
from ..models.names import public_name
from ..models.resolve import folder_state
from ..selection.run_folder import Run
from .choosing import choosing_suites, why_nothing_is_chosen
from .judges.measured_answers import Judgements, add_behaviour, add_judgements, ask_judges, judges_for
from .judges.registry import judge_name
from .judges.runner import Ready
from .measures.suite import behaviour_judge, check_run_measure
from .plan import EvalPlan, Measurements, make_plan
from .suites.registry import check_names


@dataclass(frozen=True)
class EvalSetup:
    """Everything that measuring a model and its edits needs.

    `choosing` is what is measured on the run's val prompts to choose among edits, if anything. `behaviour_judge` is the
    judge whose refusals are the run's behaviour, if one is, and `named` what reports say of that behaviour.
    """

    folder: Path
    tokenizer: Any
    plan: EvalPlan
    judges: list[Ready]
    engine: str
    options: EngineOptions
    suites: list[str]
    max_new_tokens: int
    limit: int | None
    choosing: EvalPlan | None = None
    behaviour_judge: str | None = None
    named: Mapping[str, Any] = field(default_factory=dict)

    @property
    def plans(self) -> dict[Split, EvalPlan]:
        """What is measured of every model, by split of the run's prompts."""
        plans: dict[Split, EvalPlan] = {"test": self.plan}
        if self.choosing is not None:
            plans["val"] = self.choosing
        return plans

    def start(self, folder: Path) -> Engine:
        """An engine on the checkpoint `folder`; use it as a context manager."""
        context = max(plan.max_model_len for plan in self.plans.values())
        return open_engine(self.engine, folder, self.tokenizer, context, self.options)

    @cached_property
    def state(self) -> str:
        """A fingerprint of the engine and the model."""
        return fingerprint([engine_state(self.engine, self.options), folder_state(self.folder)])

    def label(self, name: str, *of_edit: Any) -> str:
        """A model's label in the journal: its name, with a fingerprint of the model and the engine."""
        return f"{name}@{fingerprint([self.state, *of_edit])[:16]}"

    def judgements(self, models: dict[str, Measurements], journal: Journal) -> dict[str, Judgements]:
        """The judgements of every model's answers, by model; their series are added to the models' own."""
        found = ask_judges(self.judges, self.plan, models, self.engine, self.options, journal)
        for label, measured in models.items():
            add_judgements(self.plan, self.judges, measured, found[label])
            if self.behaviour_judge is not None:
                add_behaviour(self.plan, measured, found[label][self.behaviour_judge])
        return found

    def description(self) -> dict[str, Any]:
        """The fields of a report that say how it was measured."""
        return {
            **self.named,
            "engine": self.engine,
            "engine_version": ENGINES.find(self.engine).version,
            "suites": self.suites,
            "max_new_tokens": self.max_new_tokens,
            "limit": self.limit,
            "judges": {ready.judge.name: public_name(ready.model) for ready in self.judges},
            "data": self.plan.data,
            "sensitive": self.plan.sensitive,
        }


def check_request(suites: Sequence[str], engine: str, options: EngineOptions, data: Path | str | None) -> None:
    """Check names and options before anything is fetched or read.

    Raises:
        OrthogonalizeError: an unknown suite or engine, options that the engine does not take, or no data folder.
    """
    check_names(suites)
    check_engine(engine, options)
    if data is not None and not Path(data).is_dir():
        raise OrthogonalizeError(f"no such folder: {data} (--data)")


def prepare(
    run: Run,
    folder: Path,
    *,
    suites: Sequence[str],
    engine: str,
    max_new_tokens: int,
    limit: int | None,
    data: Path | str | None,
    judges: Sequence[str],
    options: EngineOptions,
    choose: bool = False,
    prompts: Mapping[str, Source] | None = None,
    measure: str | None = None,
) -> EvalSetup:
    """Find and read everything that measuring the checkpoint `folder` on the test prompts of `run` needs.

    The arguments are those of `commands.evaluate.evaluate`. With `choose`, val prompts are measured as well, if that
    can be done (see `why_nothing_is_chosen`).

    Raises:
        OrthogonalizeError: something is missing, damaged or inconsistent.
    """
    judge = None
    if "behaviour" in suites:
        left_out = check_run_measure(run.info.measure, measure, engine)
        if left_out is not None:
            note(f"suite behaviour is left out: {left_out}")
            suites = [name for name in suites if name != "behaviour"]
        else:
            judge = behaviour_judge(run.info.measure)
    tokenizer, local = load_tokenizer(folder), None if data is None else Path(data)
    positions = context_length(open_checkpoint(folder).config)
    plan = make_plan(run, tokenizer, suites, max_new_tokens, limit, local, positions, prompts=prompts)
    choosing = None
    if choose and why_nothing_is_chosen(run, suites) is None:
        names = choosing_suites(suites)
        choosing = make_plan(run, tokenizer, names, max_new_tokens, limit, positions=positions, split="val")
    if judge is not None and judge not in judges:
        judges = [*judges, judge]
    ready = judges_for(plan, judges)
    return EvalSetup(
        folder, tokenizer, plan, ready, engine, options, list(suites), max_new_tokens, limit, choosing,
        None if judge is None else judge_name(judge), _named(run),
    )  # fmt: skip


def _named(run: Run) -> dict[str, Any]:
    """What reports say of a run's behaviour: its name, its measure, and where the prompts come from, without paths."""
    sources = {side: ", ".join(map(public_name, text.split(", "))) for side, text in run.info.sources.items()}
    measure = f"{run.info.measure.public_name}: {run.info.measure.describe(run.info.behaviour_words)}"
    return {"concept": run.info.concept or "", "measure": measure, "sources": sources}
