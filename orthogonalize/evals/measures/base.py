"""The kinds of behaviour measure: those that a forward pass answers, and those that need generated answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...core.journal import Journal
    from ...selection.readouts import Readout
    from .evidence import Evidence

SEPARATES = 0.5  # the least difference of the sides' shares at which a measure tells them apart
Pair = tuple[str, str]  # a prompt and the answer to it
Shows = Callable[[Sequence[Pair], "Journal"], list[bool | None]]
"""Whether each answer shows the behaviour; None where that cannot be told. A judge keeps its replies in the journal."""


def _accept(_argument: str) -> None:
    """Any argument will do."""


@dataclass(frozen=True)
class Opening:
    """What a measure of answers is opened with.

    Args:
        argument: what follows the colon of `--measure NAME:ARGUMENT`.
        phrases: what to look for in answers, for `wording`.
        device: where a judge's model runs.
    """

    argument: str = ""
    phrases: Sequence[str] = field(default_factory=tuple)
    device: str = "auto"


@dataclass(frozen=True)
class PassMeasure:
    """A measure that reads one forward pass per prompt, so that the many trials of a search can afford it.

    Args:
        name: the value of `--measure`.
        summary: what it says of a prompt, as in the table of docs/measuring.md.
        fit: makes its readout from what the unedited model does on the train and val prompts.
    """

    name: str
    summary: str
    fit: Callable[[Evidence], Readout]

    @property
    def usage(self) -> str:
        """How it is named on the command line."""
        return self.name


@dataclass(frozen=True)
class AnswerMeasure:
    """A measure of generated answers, for the filter, the confirmation of the best edits and eval.

    Args:
        name: the value of `--measure`, before a colon if it takes an argument.
        summary: as for `PassMeasure`.
        open: prepares it; raises `OrthogonalizeError` if it cannot be used.
        argument: what its argument is called in help texts, such as `NAME`; "" if it takes none.
        own_code: whether it runs code that a run only names, which eval then has to be told again.
        judged: whether its argument is a judge, which eval asks once for all models.
        check: checks the argument without loading anything, and raises `OrthogonalizeError`.
    """

    name: str
    summary: str
    open: Callable[[Opening], Shows]
    argument: str = ""
    own_code: bool = False
    judged: bool = False
    check: Callable[[str], None] = _accept

    @property
    def usage(self) -> str:
        """How it is named on the command line."""
        return f"{self.name}:{self.argument}" if self.argument else self.name


Measure = PassMeasure | AnswerMeasure


def by_rule(rule: Callable[[str, str], bool | None]) -> Callable[[Opening], Shows]:
    """The `open` of a measure that is a function of a prompt and its answer."""
    return lambda _: lambda pairs, _journal: [rule(prompt, answer) for prompt, answer in pairs]


def separation(positive: Iterable[bool | None], negative: Iterable[bool | None]) -> float:
    """The share of positive prompts that show the behaviour less that of negative ones (Youden's J)."""
    shares = [mean(bool(each) for each in side) for side in (positive, negative)]
    return shares[0] - shares[1]
