"""Multiple choice: MMLU and ARC-Challenge with five examples, TruthfulQA MC1; by the likelihood of each choice.

Prompts and scoring are those of lm-evaluation-harness (mmlu, arc_challenge, truthfulqa_mc1: the choice
with the largest summed log-probability), so that numbers can be compared; the chat template is not used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ...core.errors import OrthogonalizeError
from ...core.files import fingerprint
from ...data.benchmarks import ARC, ARC_SHOTS, MMLU, MMLU_SHOTS, TRUTHFULQA, evenly, rows
from ...data.tokenization import encode_open_ended
from ...engines.base import Responder
from ..metrics import Series, yes_no_series
from .base import BaseOutputs

SHOTS = 5
LETTERS = "ABCD"
TOKENISED = 256  # questions at a time: what a tokenizer returns takes a hundred bytes a token
QUESTIONS = 500  # of MMLU, as in eliroc98/refusal_direction


@dataclass(frozen=True)
class Question:
    """A context, the texts that may follow it, the index of the right one, and a category where there is one."""

    context: str
    choices: tuple[str, ...]
    answer: int
    category: str | None = None


def encode(tokenizer: Any, questions: Sequence[Question]) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Ids of every context and of what follows it, split where the context's own ids end.

    A context's trailing spaces go to its choices: most vocabularies have them in the next word's token.
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
                raise OrthogonalizeError(f"a choice of {name} has no token of its own: {question.choices!r}")
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
        """The share of right answers, by category; `memory` is not needed."""
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
                f"{MMLU_SHOTS} has {len(shots[subject])} examples of {subject!r}, fewer than {SHOTS}"
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
        raise OrthogonalizeError(f"{ARC_SHOTS} has {len(shots)} examples, fewer than {SHOTS}")
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


# The examples that every TruthfulQA question is asked behind (Lin et al. 2022, appendix E).
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
    """TruthfulQA MC1: one right answer among several, behind the benchmark's own six examples."""
    head = "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in _TRUTHFULQA_EXAMPLES)
    return [
        Question(
            f"{head}Q: {row['question']}\nA:",
            tuple(f" {choice}" for choice in row["mc1_targets"]["choices"]),
            list(row["mc1_targets"]["labels"]).index(1),
        )
        for row in evenly(rows(TRUTHFULQA, data), limit)
    ]


SETS: dict[str, Callable[[Path | None, int | None], list[Question]]] = {
    "mmlu": mmlu,
    "arc": arc,
    "truthfulqa": truthfulqa,
}
