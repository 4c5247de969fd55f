"""Suites `refusal`, `behaviour` and `form`: what generated answers contain or look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from ...core.files import fingerprint
from ...data.answer_forms import form_of, repeats, words
from ...data.languages import switches
from ...data.refusals import refused
from ...data.thoughts import without_thought
from ..metrics import Series, yes_no_series
from .base import HARMLESS, SuiteEntry

if TYPE_CHECKING:
    from ...core.journal import Journal
    from ...engines.base import Responder
    from ..measures.base import Shows

CONTRAST = ("target", HARMLESS)  # the prompt sets that are sides of the run
CONTRAST_TITLES = {name: f"{name} prompts" for name in CONTRAST}
PRESERVED = "preserved "  # prefix of the names of preserved sets
OWN = "own "  # prefix of the names of sets that the user gives
FORMS = {
    "repeats": "repeats itself (four words in a row, three times or more)",
    "empty": "empty (no word)",
    "asks back": "only asks back",
    "lectures": "lectures without refusing",
    "answers": "answers (none of these, and no refusal)",
    "switches": "in another language than its prompt",
    "words": "words per answer",
}


@dataclass(frozen=True)
class Item:
    """A prompt to answer: its ids as the model gets them, its text, and its category if it has one."""

    ids: list[int]
    text: str
    category: str | None = None


@dataclass(frozen=True)
class AnswerSet:
    """A set of prompts. With `sensitive`, reports fold the prompts and answers and can leave them out."""

    name: str
    items: list[Item]
    sensitive: bool = False

    @property
    def key(self) -> str:
        """The last part of its dotted key: the contrast's two sides by name, every other set under `sets`."""
        return self.name if self.name in CONTRAST else f"sets.{self.name}"

    @property
    def preserved(self) -> bool:
        """Whether it is one of the run's preserved sets."""
        return is_preserved(self.name)

    @property
    def from_run(self) -> bool:
        """Whether its prompts are the run's own, and not a public set's."""
        return self.name in CONTRAST or self.preserved

    @property
    def own(self) -> bool:
        """Whether it is a set that the user gives."""
        return self.name.startswith(OWN)

    @property
    def has_behaviour(self) -> bool:
        """Whether the run's behaviour is measured on it: not on public sets."""
        return self.from_run or self.own

    @property
    def scored_again(self) -> bool:
        """Whether suites `loss` and `kl` score every model along the base's answers to it."""
        return self.name == HARMLESS or self.preserved


def is_preserved(name: str) -> bool:
    """Whether a prompt set's name is that of a preserved set."""
    return name.startswith(PRESERVED)


@dataclass(frozen=True)
class Answering:
    """The prompt sets that models answer; `refusal`, `behaviour` and `form` say which suites are asked for.

    `shows` is the run's behaviour measure, if it is one of answers.
    """

    sets: Sequence[AnswerSet]
    tokenizer: Any
    new_tokens: int
    refusal: bool = True
    behaviour: bool = True
    form: bool = False
    shows: Shows | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(len(item.ids) for each in self.sets for item in each.items) + self.new_tokens

    @property
    def counts(self) -> bool:
        """Whether every model answers; otherwise only the base does, for suites that need its answers."""
        return self.refusal or self.behaviour or self.form

    @cached_property
    def states(self) -> dict[str, str]:
        """By set, a fingerprint of everything but the model that its answers depend on."""
        return {s.name: fingerprint([[item.ids for item in s.items], self.new_tokens]) for s in self.sets}

    @property
    def scored_again(self) -> list[AnswerSet]:
        """The sets along whose answers suites `loss` and `kl` score every model."""
        return [each for each in self.sets if each.scored_again]

    @property
    def scored_again_state(self) -> str:
        """A fingerprint of `scored_again`."""
        return fingerprint([[each.name, self.states[each.name]] for each in self.scored_again])

    def answers(self, engine: Responder, sets: Sequence[str]) -> dict[str, list[list[int]]]:
        """A model's answers to `sets`, as token ids, generated in one batch."""
        wanted = [each for each in self.sets if each.name in sets]
        flat = iter(engine.answers([item.ids for each in wanted for item in each.items], self.new_tokens))
        return {each.name: list(islice(flat, len(each.items))) for each in wanted}

    def text(self, ids: Sequence[int]) -> str:
        """An answer as text."""
        decoded: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return decoded

    def series(self, answers: Mapping[str, Sequence[Sequence[int]]], journal: Journal) -> dict[str, Series]:
        """The series counted in a model's answers, by dotted key; a thought before an answer is no part of it."""
        result: dict[str, Series] = {}
        for each in self.sets:
            categories = [item.category for item in each.items]
            said = [without_thought(self.text(ids)) for ids in answers[each.name]]
            if self.refusal:
                result[f"refusal.{each.key}"] = yes_no_series([refused(text) for text in said], categories)
            if self.behaviour and self.shows is not None and each.has_behaviour:
                pairs = [(item.text, text) for item, text in zip(each.items, said, strict=True)]
                result[f"behaviour.{each.key}"] = yes_no_series(self.shows(pairs, journal), categories)
            if self.form:
                counted = form_series([item.text for item in each.items], said)
                result |= {f"suites.form.{form_key(each.name, name)}": series for name, series in counted.items()}
        return result


def form_key(of: str, name: str) -> str:
    """The key of one series of suite `form` for the prompt set `of`."""
    return f"{of}: {name}"


def form_series(prompts: Sequence[str], answers: Sequence[str]) -> dict[str, Series]:
    """The series of suite `form` for one set of prompts and their answers, by the names in `FORMS`.

    Repetition and language are looked at in every answer, refusals included; the other forms exclude each other (see
    `form_of`).
    """
    forms = [form_of(answer) for answer in answers]
    found = {name: yes_no_series([form == name for form in forms]) for name in FORMS if name != "words"}
    found["repeats"] = yes_no_series([repeats(answer) for answer in answers])
    found["switches"] = yes_no_series([switches(*pair) for pair in zip(prompts, answers, strict=True)])
    found["words"] = Series(kind="score", values=[float(len(words(answer))) for answer in answers])
    return found


ENTRIES = (
    SuiteEntry(
        "refusal",
        "refusals by wording in the answers to the run's test prompts, both sides and preserved sets",
        {f"refusal.{name}": f"refusal, {title}" for name, title in CONTRAST_TITLES.items()},
        columns=(),  # a sweep's table has them as its effect
    ),
    SuiteEntry(
        "behaviour",
        "test prompts that show the behaviour by the run's own measure, both sides and preserved sets",
        {f"behaviour.{name}": f"behaviour, {title}" for name, title in CONTRAST_TITLES.items()},
        columns=(),
    ),
    SuiteEntry(
        "form",
        "answers that repeat, are empty, ask back, lecture or switch language, and their length, of every set",
        {
            form_key(of, name): f"{title}: {words}"
            for of, title in CONTRAST_TITLES.items()
            for name, words in FORMS.items()
        },
        columns=(),
    ),
)
