"""What every suite of measures has in common, and what the base leaves for those measured after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...core.errors import OrthogonalizeError
from ...engines.base import Responder
from ...models.logprobs import Likeliest
from ..metrics import Series


@dataclass
class BaseOutputs:
    """What the base said and how likely it found each word.

    `own` and `own_prompts` are the base's non-empty answers to harmless prompts and those prompts, as ids;
    `distributions` its likeliest tokens along them. Set once, by the first (the base's) measurement.
    """

    own: list[list[int]] = field(default_factory=list)
    own_prompts: list[list[int]] = field(default_factory=list)
    distributions: list[Likeliest] = field(default_factory=list)

    def remember(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> None:
        """Keep the base's harmless answers as what every model is scored on.

        Raises:
            OrthogonalizeError: they are all empty.
        """
        kept = [(list(p), list(a)) for p, a in zip(prompts, answers, strict=True) if a]
        if not kept:
            raise OrthogonalizeError("every answer of the base model is empty; leave out --suite loss and kl")
        self.own_prompts, self.own = [p for p, _ in kept], [a for _, a in kept]

    def restore(self, rows: Sequence[Any]) -> None:
        """Take the base's distributions as a file holds them (see `Likeliest.rows`)."""
        self.distributions = [Likeliest.of(pair) for pair in rows]


class Suite(Protocol):
    """Measures that are taken together. Data are read when a suite is made, so that what is missing shows early."""

    @property
    def name(self) -> str: ...

    @property
    def longest(self) -> int:
        """The most tokens that it sends in one request."""

    @property
    def state(self) -> str:
        """A fingerprint of what it asks and counts, as far as that is its own."""

    def measure(self, engine: Responder, memory: BaseOutputs) -> dict[str, Series]:
        """Series by the dotted key under which the report stores them."""
