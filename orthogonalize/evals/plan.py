"""The evaluation plan: suites with their data, read and checked before any engine starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from ..core.errors import OrthogonalizeError
from ..core.files import fingerprint
from ..core.journal import Journal
from ..core.progress import note
from ..data.benchmarks import PROMPT_SETS, as_documented, instructions
from ..data.chat import ChatFormat
from ..data.contrast import is_sensitive
from ..data.prompts import Side, Source, Split, load_prompts, source_name, source_names
from ..data.refusals import LEAST_TOKENS
from ..engines.base import Engine
from ..selection.run_folder import Run
from .measures.suite import BehaviourSuite, shows_in_answers
from .metrics import Record, Series
from .resumable import ResumableEngine
from .suites.answers import CONTRAST, OWN, PRESERVED, Answering, AnswerSet, Item
from .suites.base import BaseOutputs, Suite, SuiteContext, SuiteEntry, report_key
from .suites.registry import FAMILIES, SUITES, family_arguments


class Measurements(Record):
    """One model's series by dotted key, and its answers as text by prompt set."""

    series: dict[str, Series] = Field(default_factory=dict)
    answers: dict[str, list[str]] = Field(default_factory=dict)


@dataclass(frozen=True)
class EvalPlan:
    """What to measure of every model: first the answers to the prompts of `answering`, then each of `suites`.

    `data` says where each suite's data come from. With `base_answers`, a suite needs the base's answers to harmless
    and preserved prompts.
    """

    suites: list[Suite]
    answering: Answering | None
    data: dict[str, str]
    base_answers: bool

    @property
    def sets(self) -> Sequence[AnswerSet]:
        """The prompt sets that are answered."""
        return self.answering.sets if self.answering else ()

    @property
    def max_model_len(self) -> int:
        """The context that an engine needs, in tokens: the longest request and one generated token."""
        answers = [self.answering.longest] if self.answering else []
        return max(answers + [suite.longest for suite in self.suites]) + 1

    @property
    def sensitive(self) -> bool:
        """Whether any prompt set is sensitive."""
        return any(each.sensitive for each in self.sets)

    @property
    def every_model_answers(self) -> bool:
        """Whether every model answers the prompts, and not only the base for suites that need its answers."""
        return self.answering is not None and self.answering.counts

    def _answer_steps(self, label: str, is_base: bool) -> dict[str, str]:
        """By set, the journal step of a model's answers to it."""
        if self.answering is None or not (is_base or self.answering.counts):
            return {}
        return {name: f"{label}/answers {name}@{state[:16]}" for name, state in self.answering.states.items()}

    def steps(self, label: str, is_base: bool = False) -> list[str]:
        """The journal steps of one model; `label` is its name and state."""
        return [*self._answer_steps(label, is_base).values(), *(_step(label, suite) for suite in self.suites)]

    def measure(
        self, engine: Engine | None, memory: BaseOutputs, journal: Journal, label: str, is_base: bool = False
    ) -> Measurements:
        """Measure the model in `engine`; steps that `journal` already has are not repeated.

        The base must be measured first: its outputs go to `memory`, and other models are compared with them. `engine`
        may be None if the journal has every step.
        """
        result = Measurements()
        if steps := self._answer_steps(label, is_base):
            self._take_answers(self._answers(engine, journal, label, steps), memory, result, journal, is_base)
        for suite in self.suites:

            def work(suite: Suite = suite) -> dict[str, Any]:
                assert engine is not None
                had, kept = bool(memory.distributions), suite.name in memory.kept
                series = suite.measure(ResumableEngine(engine, journal, _step(label, suite)), memory)
                made: dict[str, Any] = {
                    "series": {report_key(suite.name, k): s.model_dump() for k, s in series.items()}
                }
                if suite.name in memory.kept and not kept:
                    made["kept"] = memory.kept[suite.name]
                if memory.distributions and not had:
                    made["distributions"] = {
                        name: [d.rows() for d in found] for name, found in memory.distributions.items()
                    }
                return made

            stored = journal.step(_step(label, suite), work)
            result.series |= {key: Series.model_validate(s) for key, s in stored["series"].items()}
            if "kept" in stored:
                memory.kept[suite.name] = stored["kept"]
            if "distributions" in stored:
                memory.restore(stored["distributions"])
        return result

    def _answers(
        self, engine: Engine | None, journal: Journal, label: str, steps: Mapping[str, str]
    ) -> dict[str, list[list[int]]]:
        """A model's answers by set; missing ones are generated together and stored set by set."""
        assert self.answering is not None
        missing = [name for name, step in steps.items() if not journal.has(step)]
        if missing:
            assert engine is not None
            together = f"{label}/answers@{fingerprint([[steps[name] for name in missing]])[:16]}"
            found = self.answering.answers(ResumableEngine(engine, journal, together), missing)
            journal.put({steps[name]: found[name] for name in missing}, replaces=together)
        return {name: journal.done[step] for name, step in steps.items()}

    def _take_answers(
        self,
        answers: dict[str, list[list[int]]],
        memory: BaseOutputs,
        result: Measurements,
        journal: Journal,
        is_base: bool,
    ) -> None:
        assert self.answering is not None
        result.answers = {name: [self.answering.text(ids) for ids in rows] for name, rows in answers.items()}
        result.series |= self.answering.series(answers, journal)
        if is_base and self.base_answers:
            for each in self.answering.scored_again:
                memory.remember(each.name, [item.ids for item in each.items], answers[each.name])


def _step(label: str, suite: Suite) -> str:
    return f"{label}/{suite.name}@{suite.state[:16]}"


def _contrast_sets(run: Run, split: Split, chat: ChatFormat, limit: int | None) -> list[AnswerSet]:
    sets = []
    sides: tuple[Side, Side] = (run.target_side, "negative")
    for name, side in zip(CONTRAST, sides, strict=True):
        prompts = [p for p in run.prompts if (p.side, p.split) == (side, split)][:limit]
        if not prompts:
            raise OrthogonalizeError(
                f"the run has no {split} prompts on one side; re-run extract with --{split}, or with more prompts"
            )
        items = [Item(chat.encode(p.text), p.text, p.category) for p in prompts]
        sets.append(AnswerSet(name, items, side in run.info.sensitive))
    return sets


def _preserved_sets(run: Run, chat: ChatFormat, limit: int | None) -> list[AnswerSet]:
    """The test prompts of every preserved source; one that has none is left out with a note."""
    sets = []
    for source, name in source_names(dict.fromkeys(p.source for p in run.preserved)).items():
        texts = [p.text for p in run.preserved if (p.source, p.split) == (source, "test")][:limit]
        if not texts:
            note(f"preserved {name} has no test prompts, so it is not measured; preserve more prompts")
            continue
        items = [Item(ids, text) for ids, text in zip(chat.encode_all(texts), texts, strict=True)]
        sets.append(AnswerSet(PRESERVED + name, items, source in run.info.sensitive_preserved))
    return sets


def _own_set(name: str, source: Source, chat: ChatFormat, limit: int | None) -> AnswerSet:
    if not name or "." in name:
        raise OrthogonalizeError(f"a prompt set cannot be called {name!r}: give it a name without dots")
    found = load_prompts(source)[:limit]
    items = [Item(chat.encode(p.text), p.text, p.category) for p in found]
    return AnswerSet(OWN + name, items, is_sensitive(source))


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
    split: Split = "test",
    prompts: Mapping[str, Source] | None = None,
) -> EvalPlan:
    """Build the suites `names` for the model of `tokenizer`: read all of their data and encode them.

    Args:
        new_tokens: maximum number of tokens per answer.
        limit: maximum number of items per set.
        data: a folder with local copies of public sets; None to read them from the Hub.
        positions: maximum number of tokens that the model takes, where known.
        split: whose prompts of the run are answered.
        prompts: the user's own prompt sources by name; every model answers them as well.

    Raises:
        OrthogonalizeError: data that are missing, empty or damaged.
    """
    entries = [entry for name, entry in SUITES.items() if name in names]
    chat = run.info.chat_format(tokenizer)
    context = SuiteContext(run, tokenizer, chat, data, limit, new_tokens, positions)
    public = [name for name in names if name in PROMPT_SETS]
    own = [_own_set(name, source, chat, limit) for name, source in (prompts or {}).items()]
    context = replace(context, answering=_answering(context, entries, public, split, own))
    suites = [_build(entry, context) for entry in entries if entry.make is not None]
    if "behaviour" in names and not run.info.measure.reads_answers:
        suites.insert(0, _behaviour_suite(context))
    family_suites = [
        suite
        for family in FAMILIES.values()
        if (arguments := family_arguments(family, names))
        for suite in family.make(context, arguments)
    ]
    plan = EvalPlan(
        [*suites, *family_suites],
        context.answering,
        _sources(names, data)
        | {suite.name: suite.source for suite in family_suites}
        | {OWN + name: Path(source_name(source)).name for name, source in (prompts or {}).items()},
        any(entry.needs == "base answers" for entry in entries),
    )
    if positions is not None and plan.max_model_len > positions:
        raise OrthogonalizeError(f"{_too_long(plan)}, but the model takes only {positions} tokens")
    return plan


def _answering(
    context: SuiteContext, entries: Sequence[SuiteEntry], public: Sequence[str], split: Split, own: Sequence[AnswerSet]
) -> Answering | None:
    """The prompts to answer for `entries`, the `public` prompt sets and the user's `own`; None if nothing needs any."""
    counted = bool(public) or bool(own) or any(entry.make is None for entry in entries)
    if not counted and all(entry.needs == "nothing" for entry in entries):
        return None
    contrast = _contrast_sets(context.run, split, context.chat, context.limit)
    sets = [each for each in contrast if counted or each.scored_again]
    if split == "test":  # val prompts only choose among edits, by the contrast
        sets += _preserved_sets(context.run, context.chat, context.limit)
    sets += [_public_set(name, context.chat, context.data, context.limit) for name in public]
    sets += own
    names = {entry.name for entry in entries}
    answering = Answering(
        sets,
        context.tokenizer,
        context.new_tokens,
        refusal="refusal" in names or bool(public) or bool(own),
        behaviour="behaviour" in names,
        form="form" in names,
        shows=shows_in_answers(context.run.info.measure) if "behaviour" in names else None,
    )
    if split == "test" and answering.refusal and context.new_tokens < LEAST_TOKENS:
        note(
            f"refusals are undercounted in answers of {context.new_tokens} tokens; "
            f"use --max-new-tokens {LEAST_TOKENS} or more"
        )
    return answering


def _behaviour_suite(context: SuiteContext) -> Suite:
    """The run's measure, where it needs no answers."""
    return BehaviourSuite(context.run.readout(), [each for each in context.base_answers.sets if each.has_behaviour])


def _build(entry: SuiteEntry, context: SuiteContext) -> Suite:
    assert entry.make is not None
    with nullcontext() if entry.source is None else as_documented(entry.source):
        return entry.make(context)


def _sources(names: Sequence[str], data: Path | None) -> dict[str, str]:
    """By suite, the public set that it reads."""
    copy = "" if data is None else " (a local copy)"
    found = {name: entry.source for name, entry in SUITES.items()}
    found |= {name: each.source for name, each in PROMPT_SETS.items()}
    return {name: f"{source}{copy}" for name, source in found.items() if source is not None and name in names}


def _too_long(plan: EvalPlan) -> str:
    """Which prompt needs the longest context, and what would shorten it."""
    longest = max(plan.suites, key=lambda s: s.longest, default=None)
    if longest is not None and (plan.answering is None or longest.longest > plan.answering.longest):
        return f"suite {longest.name} needs {plan.max_model_len} tokens (leave it out)"
    size, number, found = max(
        ((len(item.ids), i, s) for s in plan.sets for i, item in enumerate(s.items, 1)),
        key=lambda each: (each[0], each[2].name, each[1]),
    )
    advice = f"leave out --suite {found.name}"
    if found.from_run or found.own:
        advice = "remove it from the run's prompts" if found.from_run else "remove it from --prompts"
    return (
        f"prompt {number} of {found.name} has {size} tokens and needs {plan.max_model_len} with its answer "
        f"({advice}, or lower --max-new-tokens)"
    )
