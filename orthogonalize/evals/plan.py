"""A plan: which suites are measured, on which data, read and checked before any engine starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from ..core.errors import OrthogonalizeError
from ..core.files import fingerprint
from ..core.journal import Journal
from ..core.progress import note
from ..data.benchmarks import (
    ALPACA,
    ARC,
    MMLU,
    PILE,
    PROMPT_SETS,
    TRUTHFULQA,
    BenchmarkSet,
    as_documented,
    instructions,
)
from ..data.chat import ChatFormat
from ..data.refusals import LEAST_TOKENS
from ..engines.base import Engine
from ..selection.run_folder import Run
from .metrics import Record, Series
from .resumable import ResumableEngine
from .suites.answers import Answering, AnswerSet, Item
from .suites.base import BaseOutputs, Suite
from .suites.kl import Divergences
from .suites.lm_eval import PREFIX, harness_tasks
from .suites.losses import OwnLosses, alpaca_losses, pile_losses
from .suites.multiple_choice import SETS, MultipleChoice

DEFAULT_SUITES = ("refusal", "behaviour", "loss", "kl")
CONTRAST = {"target": "positive", "harmless": "negative"}  # sets of answers, and the side of the run that they are
TEXTS = {"pile": PILE, "alpaca": ALPACA}
CHOICES: dict[str, BenchmarkSet] = {"mmlu": MMLU, "arc": ARC, "truthfulqa": TRUTHFULQA}
SUITES = (*DEFAULT_SUITES, *TEXTS, *CHOICES, *PROMPT_SETS)
TEXT_COUNT = 100  # texts of a set that have no limit given


class Measurements(Record):
    """One model's series by dotted key, and its answers as text by prompt set."""

    series: dict[str, Series] = Field(default_factory=dict)
    answers: dict[str, list[str]] = Field(default_factory=dict)


@dataclass(frozen=True)
class EvalPlan:
    """What is measured of every model: `answering` first, if anything is answered, then `suites`."""

    suites: list[Suite]
    answering: Answering | None
    data: dict[str, str]

    @property
    def sets(self) -> Sequence[AnswerSet]:
        """The prompt sets that are answered."""
        return self.answering.sets if self.answering else ()

    @property
    def max_model_len(self) -> int:
        """The context that an engine needs: every request leaves room for one token more."""
        answers = [self.answering.longest] if self.answering else []
        return max(answers + [suite.longest for suite in self.suites]) + 1

    @property
    def sensitive(self) -> bool:
        """Whether any set's prompts and answers are folded, and left out on request."""
        return any(each.sensitive for each in self.sets)

    @property
    def answers_count(self) -> bool:
        """Whether every model answers, rather than the base alone for the sake of its own losses."""
        return self.answering is not None and self.answering.counts

    def _answer_steps(self, label: str, is_base: bool) -> dict[str, str]:
        """By set, the journal's step for a model's answers to it."""
        if self.answering is None or not (is_base or self.answering.counts):
            return {}
        return {name: f"{label}/answers {name}@{state[:16]}" for name, state in self.answering.states.items()}

    def steps(self, label: str, is_base: bool = False) -> list[str]:
        """The journal's steps for one model; `label` is its name and state."""
        return [*self._answer_steps(label, is_base).values(), *(_step(label, suite) for suite in self.suites)]

    def measure(
        self, engine: Engine | None, memory: BaseOutputs, journal: Journal, label: str, is_base: bool = False
    ) -> Measurements:
        """Measure the model that `engine` holds; what `journal` has already is not measured again.

        The base comes first and leaves in `memory` what the others are compared with. `engine` may be
        None where the journal has every step.
        """
        result = Measurements()
        if steps := self._answer_steps(label, is_base):
            self._take_answers(self._answers(engine, journal, label, steps), memory, result, is_base)
        for suite in self.suites:

            def work(suite: Suite = suite) -> dict[str, Any]:
                assert engine is not None
                series = suite.measure(ResumableEngine(engine, journal, _step(label, suite)), memory)
                made: dict[str, Any] = {"series": {key: s.model_dump() for key, s in series.items()}}
                if is_base and suite.name == "kl":
                    made["distributions"] = [d.rows() for d in memory.distributions]
                return made

            stored = journal.step(_step(label, suite), work)
            result.series |= {key: Series.model_validate(s) for key, s in stored["series"].items()}
            if is_base and suite.name == "kl":
                memory.restore(stored["distributions"])
        return result

    def _answers(
        self, engine: Engine | None, journal: Journal, label: str, steps: Mapping[str, str]
    ) -> dict[str, list[list[int]]]:
        """A model's answers by set; those that the journal lacks are asked together, and each kept for itself."""
        assert self.answering is not None
        lacking = [name for name, step in steps.items() if not journal.has(step)]
        if lacking:
            assert engine is not None
            together = f"{label}/answers@{fingerprint([steps[name] for name in lacking])[:16]}"
            found = self.answering.answers(ResumableEngine(engine, journal, together), lacking)
            journal.put({steps[name]: found[name] for name in lacking}, replaces=together)
        return {name: journal.done[step] for name, step in steps.items()}

    def _take_answers(
        self, answers: dict[str, list[list[int]]], memory: BaseOutputs, result: Measurements, is_base: bool
    ) -> None:
        assert self.answering is not None
        result.answers = {name: [self.answering.text(ids) for ids in rows] for name, rows in answers.items()}
        result.series |= self.answering.series(answers)
        if is_base and any(s.name in ("loss", "kl") for s in self.suites):
            harmless = next(each for each in self.sets if each.name == "harmless")
            memory.remember([item.ids for item in harmless.items], answers["harmless"])


def _step(label: str, suite: Suite) -> str:
    return f"{label}/{suite.name}@{suite.state[:16]}"


def check_names(names: Sequence[str]) -> None:
    """Refuse unknown suites.

    Raises:
        OrthogonalizeError: one is unknown, or none is named.
    """
    wrong = [s for s in names if s not in SUITES and not (s.startswith(PREFIX) and s != PREFIX)]
    twice = next((s for s in names if list(names).count(s) > 1), None)
    if twice is not None:
        raise OrthogonalizeError(f"suite {twice} is named twice")
    if wrong or not names:
        raise OrthogonalizeError(
            f"no suite {', '.join(wrong)!r}; there are: {', '.join(SUITES)}, {PREFIX}TASK (any task of lm-eval)"
        )


def _contrast_sets(run: Run, chat: ChatFormat, limit: int | None) -> list[AnswerSet]:
    test = [p for p in run.prompts if p.split == "test"]
    sets = []
    for name, side in CONTRAST.items():
        prompts = [p for p in test if p.side == side][:limit]
        if not prompts:
            raise OrthogonalizeError(
                "the run has no test prompts on one side; extract again with --test, or with more prompts"
            )
        items = [Item(chat.encode(p.text), p.text, p.category) for p in prompts]
        sets.append(AnswerSet(name, items, side in run.info.sensitive))
    return sets


def _public_set(name: str, chat: ChatFormat, data: Path | None, limit: int | None) -> AnswerSet:
    items = [Item(chat.encode(text), text, category) for text, category in instructions(PROMPT_SETS[name], data, limit)]
    return AnswerSet(name, items, PROMPT_SETS[name].sensitive)


def make_plan(
    run: Run,
    tokenizer: Any,
    names: Sequence[str],
    new_tokens: int,
    limit: int | None = None,
    data: Path | None = None,
    positions: int | None = None,
) -> EvalPlan:
    """Read all data that the suites `names` need and encode it for the model of `tokenizer`.

    `limit` is the most items of any set; `data` a folder with local copies of public sets (else the
    Hub); `positions` the most tokens that the model takes, where known.

    Raises:
        OrthogonalizeError: data that are missing, empty or damaged.
    """
    chat = ChatFormat(tokenizer, run.info.system, run.info.template_arguments, run.info.chat_template)
    public = [name for name in names if name in PROMPT_SETS]
    counted = "refusal" in names or "behaviour" in names or bool(public)
    own = "loss" in names or "kl" in names
    sets: list[AnswerSet] = []
    answering = None
    if counted or own:
        contrast = _contrast_sets(run, chat, limit)
        sets = [each for each in contrast if counted or each.name == "harmless"]
        sets += [_public_set(name, chat, data, limit) for name in public]
        answering = Answering(
            sets,
            tokenizer,
            new_tokens,
            frozenset(run.info.behaviour_tokens),
            refusal="refusal" in names or bool(public),
            behaviour="behaviour" in names,
        )
        if answering.refusal and new_tokens < LEAST_TOKENS:
            note(f"refusals are undercounted in answers of {new_tokens} tokens; {LEAST_TOKENS} are the least usual")
    suites: list[Suite] = []
    if answering and "loss" in names:
        suites.append(OwnLosses(answering.longest, answering.states["harmless"]))
    if answering and "kl" in names:
        suites.append(Divergences(answering.longest, answering.states["harmless"]))
    if "pile" in names:
        with as_documented(TEXTS["pile"]):
            suites.append(pile_losses(tokenizer, data, limit or TEXT_COUNT))
    if "alpaca" in names:
        with as_documented(TEXTS["alpaca"]):
            suites.append(alpaca_losses(tokenizer, chat, data, limit or TEXT_COUNT))
    for name, make in SETS.items():
        if name in names:
            with as_documented(CHOICES[name]):
                suites.append(MultipleChoice.of(name, make(data, limit), tokenizer))
    wanted = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
    harness = harness_tasks(wanted, tokenizer, positions, data, limit)
    suites += harness
    sets_of = TEXTS | CHOICES | {name: PROMPT_SETS[name].source for name in public}
    copy = "" if data is None else " (a local copy)"
    sources = {name: f"{found}{copy}" for name, found in sets_of.items() if name in names}
    sources |= {task.name: task.source for task in harness}
    plan = EvalPlan(suites, answering, sources)
    if positions is not None and plan.max_model_len > positions:
        raise OrthogonalizeError(f"{_too_long(plan)}, and the model takes {positions} tokens")
    return plan


def _too_long(plan: EvalPlan) -> str:
    """What needs the most room, and what would help."""
    longest = max(plan.suites, key=lambda s: s.longest, default=None)
    if longest is not None and (plan.answering is None or longest.longest > plan.answering.longest):
        return f"suite {longest.name} needs {plan.max_model_len} tokens (leave it out)"
    size, name, number = max((len(item.ids), s.name, i) for s in plan.sets for i, item in enumerate(s.items, 1))
    advice = "take it out of the run's prompts" if name in CONTRAST else f"leave --suite {name} out"
    return (
        f"prompt {number} of {name} has {size} tokens and needs {plan.max_model_len} with its answer "
        f"({advice}, or lower --max-new-tokens)"
    )
