"""Series (one value per item), the measures computed from them, and paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from .intervals import (
    compared_increase,
    compared_means,
    increase,
    loss_interval,
    mcnemar,
    proportion_interval,
    share_difference_interval,
)

Kind = Literal["share", "loss", "divergence", "score"]


class Record(BaseModel):
    """A model that is stored as JSON; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class Rate(Record):
    """A share of items with Wilson's 95% interval, also by category if items have categories.

    `unparseable` counts items whose judgement could not be read; they count as neither side and are not in `n`.
    If `n` is 0, `value` means nothing.
    """

    value: float
    n: int
    ci95: tuple[float, float]
    unparseable: int = 0
    by_category: dict[str, Rate] = {}


class Loss(Record):
    """Cross-entropy in nats per token over `n` texts, bootstrap 95% interval; `perplexity` is its exponential.

    If texts have categories, it is also given by category.
    """

    value: float
    n: int
    ci95: tuple[float, float] | None
    tokens: int
    perplexity: float
    by_category: dict[str, Loss] = {}


class Divergence(Record):
    """KL(base || model) in nats per token over `n` prompts, bootstrap 95% interval; zero for the base itself."""

    value: float
    n: int
    ci95: tuple[float, float] | None
    tokens: int


class Score(Record):
    """The mean of any other number per item (a task's own metric), bootstrap 95% interval."""

    value: float
    n: int
    ci95: tuple[float, float] | None


Measure = Rate | Loss | Divergence | Score


class Paired(Record):
    """Base against edited on the same `n` items.

    `difference` is edited minus base (for a loss: relative to the base). `ci95` and `p` come as a pair that agrees:
    for shares Tango's score interval and McNemar's score test, otherwise one bootstrap distribution (below six
    pairs there is no interval, and `p` is that of a permutation test). `p` is None for a divergence, which is zero for
    the base by definition. `by_category` repeats all of it for shares and losses, by category.
    """

    difference: float
    n: int
    ci95: tuple[float, float] | None = None
    p: float | None = None
    by_category: dict[str, Paired] = {}


class Series(Record):
    """One model's values by item, of one kind; None for an item without a readable value.

    A "share" holds 0 or 1 per item, a "loss" or "divergence" a sum over `tokens` tokens, a "score" any number.
    """

    kind: Kind
    values: list[float | None]
    tokens: list[int] = []
    categories: list[str | None] = []

    def known(self) -> list[float]:
        """The values that are not None."""
        return [v for v in self.values if v is not None]

    def names(self) -> list[str]:
        """The categories, sorted."""
        return sorted({c for c in self.categories if c is not None})

    def part(self, category: str) -> Series:
        """The items of one category."""
        kept = [i for i, each in enumerate(self.categories) if each == category]
        tokens = [self.tokens[i] for i in kept] if self.tokens else []
        return Series(kind=self.kind, values=[self.values[i] for i in kept], tokens=tokens)

    def measure(self) -> Measure:
        """The value with its interval."""
        match self.kind:
            case "share":
                return self._rate()
            case "loss" | "divergence":
                known = self.known()
                tokens = [t for v, t in zip(self.values, self.tokens, strict=True) if v is not None]
                value = sum(known) / sum(tokens) if known else 0.0
                found = Divergence(value=value, n=len(known), ci95=loss_interval(known, tokens), tokens=sum(tokens))
                if self.kind == "divergence":
                    return found
                parts = {name: self.part(name).measure() for name in self.names()}
                by_category = {name: part for name, part in parts.items() if isinstance(part, Loss)}
                return Loss(**found.model_dump(), perplexity=perplexity_of(value), by_category=by_category)
            case "score":
                known = self.known()
                value = sum(known) / len(known) if known else 0.0
                return Score(value=value, n=len(known), ci95=loss_interval(known, [1] * len(known)))

    def _rate(self) -> Rate:
        known = self.known()
        count, n = round(sum(known)), len(known)
        return Rate(
            value=count / n if n else 0.0,
            n=n,
            ci95=proportion_interval(count, n) if n else (0.0, 1.0),
            unparseable=len(self.values) - n,
            by_category={name: self.part(name)._rate() for name in self.names()},
        )


def perplexity_of(loss: float) -> float:
    """The exponential of a loss in nats per token, capped to stay finite."""
    return math.exp(min(loss, 700.0))


def yes_no_series(flags: Sequence[bool | None], categories: Sequence[str | None] = ()) -> Series:
    """A series of yes (True), no (False) or neither (None) per item."""
    values = [None if flag is None else float(flag) for flag in flags]
    return Series(kind="share", values=values, categories=list(categories))


def same_kind(base: Series, edited: Series) -> tuple[Series, Series]:
    """Both series with the same kind: if only one model has nothing but yes and no, both become scores."""
    if base.kind == edited.kind:
        return base, edited
    if {base.kind, edited.kind} != {"share", "score"}:
        raise AssertionError(f"a {base.kind} is compared with a {edited.kind}")
    return base.model_copy(update={"kind": "score"}), edited.model_copy(update={"kind": "score"})


def kept_share(base: Series, edited: Series) -> Rate:
    """Of the items for which the base's yes/no series says yes, the share for which the edited model's still does."""
    values = [after for before, after in zip(base.values, edited.values, strict=True) if before == 1.0]
    return Series(kind="share", values=values)._rate()


def compare(base: Series, edited: Series) -> Paired:
    """The paired comparison, over the items for which both models have a value."""
    base, edited = same_kind(base, edited)
    pairs = [(a, b) for a, b in zip(base.values, edited.values, strict=True) if a is not None and b is not None]
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    match base.kind:
        case _ if not pairs:
            return Paired(difference=0.0, n=0)
        case "share":
            return Paired(
                difference=(sum(after) - sum(before)) / len(pairs),
                n=len(pairs),
                ci95=share_difference_interval([bool(v) for v in before], [bool(v) for v in after]),
                p=mcnemar([bool(v) for v in before], [bool(v) for v in after]),
                by_category={name: compare(base.part(name), edited.part(name)) for name in base.names()},
            )
        case "loss":
            return Paired(
                difference=float(increase(np.asarray(before), np.asarray(after))),
                n=len(pairs),
                **compared_increase(before, after)._asdict(),
                by_category={name: compare(base.part(name), edited.part(name)) for name in base.names()},
            )
        case "divergence":
            both = zip(base.values, edited.values, base.tokens, strict=True)
            tokens = [count for a, b, count in both if a is not None and b is not None]
            return Paired(
                difference=(sum(after) - sum(before)) / sum(tokens),
                n=len(pairs),
                ci95=loss_interval([b - a for a, b in pairs], tokens),
            )
        case _:
            return Paired(
                difference=(sum(after) - sum(before)) / len(pairs),
                n=len(pairs),
                **compared_means(before, after)._asdict(),
            )


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"loss.pile": x} as {"loss": {"pile": x}}."""
    result: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        place = result
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return result
