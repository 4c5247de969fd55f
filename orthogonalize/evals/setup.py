"""Evaluation setup: the model, data and judges, found and checked before any engine starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..core.errors import OrthogonalizeError
from ..core.files import fingerprint
from ..core.journal import Journal
from ..data.prompts import Source, Split
from ..engines.base import Engine, EngineOptions
from ..engines.registry import ENGINES, check_engine, engine_state, open_engine
from ..models.loading import load_tokenizer
from ..models.resolve import context_length, folder_state, public_name
from ..selection.run_folder import Run
from .choosing import choosing_suites, why_nothing_is_chosen
from .judges.measured_answers import Judgements, add_judgements, ask_judges, judges_for
from .judges.runner import ReadyJudge
from .plan import EvalPlan, Measurements, make_plan
from .suites.registry import check_names


@dataclass(frozen=True)
class EvalSetup:
    """Everything that measuring a model and its edits needs.

    `choosing` is what is measured on the run's val prompts to choose among edits, if anything.
    """

    folder: Path
    tokenizer: Any
    plan: EvalPlan
    judges: list[ReadyJudge]
    engine: str
    options: EngineOptions
    suites: list[str]
    max_new_tokens: int
    limit: int | None
    choosing: EvalPlan | None = None

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
        return found

    def description(self) -> dict[str, Any]:
        """The fields of a report that say how it was measured."""
        return {
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
) -> EvalSetup:
    """Find and read everything that measuring the checkpoint `folder` on the test prompts of `run` needs.

    The arguments are those of `commands.evaluate.evaluate`. With `choose`, val prompts are measured as well, if that
    can be done (see `why_nothing_is_chosen`).

    Raises:
        OrthogonalizeError: something is missing, damaged or inconsistent.
    """
    tokenizer, local = load_tokenizer(folder), None if data is None else Path(data)
    positions = context_length(folder)
    plan = make_plan(run, tokenizer, suites, max_new_tokens, limit, local, positions, prompts=prompts)
    choosing = None
    if choose and why_nothing_is_chosen(run, suites) is None:
        names = choosing_suites(suites)
        choosing = make_plan(run, tokenizer, names, max_new_tokens, limit, positions=positions, split="val")
    ready = judges_for(plan, judges)
    return EvalSetup(folder, tokenizer, plan, ready, engine, options, list(suites), max_new_tokens, limit, choosing)
