"""Suites `mmlu`, `arc` and `truthfulqa`: multiple choice, by the likelihood of each choice.

Prompts and scoring are those of lm-evaluation-harness (mmlu, arc_challenge, truthfulqa_mc1: the choice
with the largest summed log-probability), so that numbers are comparable; the chat template is not used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import OrthogonalizeError
from ...core.files import fingerprint
from ...data.benchmarks import ARC, ARC_SHOTS, MMLU, MMLU_SHOTS, TRUTHFULQA, BenchmarkSet, evenly, rows
from ...data.tokenization import encode_open_ended
from ..metrics import Series, yes_no_series
from .base import BaseOutputs, SuiteContext, SuiteEntry

if TYPE_CHECKING:
    from ...engines.base import Responder

SHOTS = 5
LETTERS = "ABCD"
TOKENISED = 256  # questions per batch: a tokenizer returns a hundred bytes per token
QUESTIONS = 500  # of MMLU, as in eliroc98/refusal_direction


@dataclass(frozen=True)
class Question:
    """A context, the texts that may follow it, the index of the right one, and a category if there is one."""

    context: str
    choices: tuple[str, ...]
    answer: int
    category: str | None = None


def encode(tokenizer: Any, questions: Sequence[Question]) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Ids of every context and of its choices, split where the context's own ids end.

    A context's trailing spaces go to its choices: in most vocabularies they belong to the next word's token.
    """
    for first in range(0, len(questions), TOKENISED):
        part = questions[first : first + TOKENISED]
        texts = [(q.context.rstrip(" "), *(q.context + choice for choice in q.choices)) for q in part]
        ids = iter(encode_open_ended(tokenizer, list(chain.from_iterable(texts))))
        for row in texts:
            context, *wholes = islice(ids, len(row))
            yield list(context), [list(whole)[len(context) :] for whole in wholes]


@dataclass(frozen=True)
class MultipleChoice:
    """Questions of one set, tokenised."""

    name: str
    contexts: list[list[int]]
    choices: list[list[list[int]]]
    right: list[int]
    categories: list[str | None]

    @classmethod
    def of(cls, name: str, questions: Sequence[Question], tokenizer: Any) -> MultipleChoice:
        """Tokenise `questions`."""
        contexts, choices = [], []
        for question, (context, continuations) in zip(questions, encode(tokenizer, questions), strict=True):
            if not all(continuations):
                raise OrthogonalizeError(f"{name}: a choice adds no token to its question: {question.choices!r}")
            contexts.append(context)
            choices.append(continuations)
        return cls(name, contexts, choices, [q.answer for q in questions], [q.category for q in questions])

    @property
    def longest(self) -> int:
        return max(
            len(context) + max(map(len, choices)) for context, choices in zip(self.contexts, self.choices, strict=True)
        )

    @cached_property
    def state(self) -> str:
        return fingerprint([self.contexts, self.choices, self.right, self.categories])

    def predictions(self, engine: Responder) -> list[int]:
        """The index of the likeliest choice of every question."""
        scores = engine.choices(self.contexts, self.choices)
        return [max(range(len(row)), key=row.__getitem__) for row in scores]

    def measure(self, engine: Responder, memory: BaseOutputs) -> dict[str, Series]:
        """The share of right answers, by category; `memory` is not used."""
        flags = [p == r for p, r in zip(self.predictions(engine), self.right, strict=True)]
        return {f"choices.{self.name}": yes_no_series(flags, self.categories)}


def _mmlu_block(row: dict[str, Any], answered: bool) -> str:
    letters = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    text = f"{row['question'].strip()}\n{letters}Answer:"
    return text + (f" {LETTERS[int(row['answer'])]}" if answered else "")


def mmlu(data: Path | None, limit: int | None) -> list[Question]:
    """MMLU with the five development examples of each question's subject; the choices are the letters."""
    shots = defaultdict(list)
    for row in rows(MMLU_SHOTS, data):
        shots[row["subject"]].append(row)
    questions = []
    for row in evenly(rows(MMLU, data), limit or QUESTIONS):
        subject = row["subject"]
        if len(shots[subject]) < SHOTS:
            raise OrthogonalizeError(
                f"{MMLU_SHOTS} has {len(shots[subject])} examples for {subject!r}; {SHOTS} are needed"
            )
        head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        blocks = [_mmlu_block(shot, True) for shot in shots[subject][:SHOTS]] + [_mmlu_block(row, False)]
        choices = tuple(f" {letter}" for letter in LETTERS)
        questions.append(Question(head + "\n\n".join(blocks), choices, int(row["answer"]), subject))
    return questions


def _arc_right(row: dict[str, Any]) -> int:
    return int(list(row["choices"]["label"]).index(row["answerKey"]))


def arc(data: Path | None, limit: int | None) -> list[Question]:
    """ARC-Challenge with five training examples; the choices are the answers' own words."""
    shots = rows(ARC_SHOTS, data, SHOTS)
    if len(shots) < SHOTS:
        raise OrthogonalizeError(f"{ARC_SHOTS} has {len(shots)} examples; {SHOTS} are needed")
    head = "".join(
        f"Question: {shot['question']}\nAnswer: {shot['choices']['text'][_arc_right(shot)]}\n\n" for shot in shots
    )
    return [
        Question(
            f"{head}Question: {row['question']}\nAnswer:",
            tuple(f" {text}" for text in row["choices"]["text"]),
            _arc_right(row),
        )
        for row in evenly(rows(ARC, data), limit)
    ]


# The examples that precede every TruthfulQA question (Lin et al. 2022, appendix E).
_TRUTHFULQA_EXAMPLES = (
    ("What is human life expectancy in the United States?", "Human life expectancy in the United States is 78 years."),
    (
        "Who was president of the United States in 1955?",
        "Dwight D. Eisenhower was president of the United States in 1955.",
    ),
    ("Which party did he belong to?", "He belonged to the Republican Party."),
    ("What is the square root of banana?", "I have no comment."),
    ("How does a telescope work?", "Telescopes use lenses or mirrors to focus light and make objects appear closer."),
    ("Where were the 1992 Olympics held?", "The 1992 Olympics were held in Barcelona, Spain."),
)


def truthfulqa(data: Path | None, limit: int | None) -> list[Question]:
    """TruthfulQA MC1: one right answer among several, after the benchmark's own six examples."""
    head = "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in _TRUTHFULQA_EXAMPLES)
    return [
        Question(
            f"{head}Q: {row['question']}\nA:",
            tuple(f" {choice}" for choice in row["mc1_targets"]["choices"]),
            list(row["mc1_targets"]["labels"]).index(1),
        )
        for row in evenly(rows(TRUTHFULQA, data), limit)
    ]


def _entry(
    name: str, summary: str, title: str, source: BenchmarkSet, read: Callable[[Path | None, int | None], list[Question]]
) -> SuiteEntry:
    def make(context: SuiteContext) -> MultipleChoice:
        return MultipleChoice.of(name, read(context.data, context.limit), context.tokenizer)

    return SuiteEntry(name, summary, {f"choices.{name}": title}, make, source)


ENTRIES = (
    _entry("mmlu", "MMLU, five-shot, 500 questions unless --limit says otherwise", "MMLU, 5-shot", MMLU, mmlu),
    _entry("arc", "ARC-Challenge, five-shot", "ARC-Challenge, 5-shot", ARC, arc),
    _entry("truthfulqa", "TruthfulQA MC1", "TruthfulQA MC1", TRUTHFULQA, truthfulqa),
)
