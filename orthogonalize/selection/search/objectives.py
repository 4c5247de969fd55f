"""What is known of a tried edit, and which of several is the best.

An edit has several objectives, all to be small: how much is left to do, the KL from the base along the base's own
answers and at their first token, and for every preserved set the KL along its answers and the share of its prompts for
which the behaviour changes. Edits that no other beats in all of them
are the Pareto front. One number, `Trial.cost`, orders them, and `best` allows for the noise of KLs from a few prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy
import torch
from pydantic import BaseModel, ConfigDict, Field

from ...edits.config import EditConfig

# An edit does what it should if at most this share of the target prompts is left, or no larger one than of prompts that
# are as they should be already. No larger a share of a preserved set may change its behaviour.
LEFT = 0.01
PRICE = 1.0  # nats per token for a unit of share: a percentage point above LEFT weighs as much as a KL of 0.01
MOST_CONFIRMED = 0.5  # largest share of the answers of an edit that is chosen
BANDWIDTH = 2.0  # log-odds; of `share_left` for one prompt
LARGEST_TIE = 1.5  # KLs that differ by a larger factor are not tied, however noisy they are


class AnswerShares(NamedTuple):
    """Shares of generated answers: those that are not as they should be, and those that are degenerate."""

    left: float
    degenerate: float


CheckAnswers = Callable[[], AnswerShares]
"""Generates the present model's answers to the target val prompts, and tells what they are like."""


class Trial(BaseModel):
    """One edit tried on val prompts.

    Attributes:
        left: share of target prompts that are not as they should be: that still show the behaviour, or that do not
            show it yet where it is to be strengthened (see `share_left`).
        before: the same in the base model.
        usual: the same in the base model of prompts that are as they should be: of negative prompts, whose answers may
            begin with the behaviour's tokens too, or of positive ones where the behaviour is to be strengthened; less
            cannot be asked of an edit that brings the one to the other.
        score: mean behaviour score (log-odds) of the target prompts.
        kl: KL(base || edited) along the base's own answers to negative prompts, in nats per token.
        first_kl: the same at the first token of those answers, in nats.
        ce_increase: relative increase of the cross-entropy of those answers (0.1 is 10%). It is reported only, since a
            model that becomes more certain of its answers lowers it.
        preserved: `kl` of every preserved set, by name.
        flipped: share of every preserved set for which the edit changes whether the behaviour shows (see
            `share_flipped`).
        kls: `kl` by prompt, as in `Drift.kls`, under "" and the names of the preserved sets. A run folder omits it.
        confirmed: share of target prompts whose generated answer is not as it should be; None if not checked.
        degenerate: share of those answers that are empty, repeat themselves or switch language; None likewise.
        degenerate_before: the same of the base model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    choice: EditConfig
    left: float
    before: float = 1.0
    usual: float = 0.0
    score: float
    kl: float
    first_kl: float
    ce_increase: float
    preserved: dict[str, float] = Field(default_factory=dict)
    flipped: dict[str, float] = Field(default_factory=dict)
    kls: dict[str, list[float]] = Field(default_factory=dict, repr=False)
    confirmed: float | None = None
    degenerate: float | None = None
    degenerate_before: float | None = None

    @property
    def objectives(self) -> tuple[float, ...]:
        """All that should be small; what is not a number is infinite."""
        values = (self.left, self.kl, self.first_kl, *self.preserved.values(), *self.flipped.values())
        return tuple(math.inf if math.isnan(value) else value for value in values)

    @property
    def drift(self) -> float:
        """The mean of `kl` and the KLs of the preserved sets, each of which counts as much."""
        kls = self.objectives[1], *self.objectives[3 : 3 + len(self.preserved)]
        return sum(kls) / len(kls)

    @property
    def excess(self) -> float:
        """What is beyond the allowed shares: `LEFT`, or for the target `usual` if that is larger."""
        flipped = self.objectives[3 + len(self.preserved) :]
        return max(0.0, self.objectives[0] - max(LEFT, self.usual)) + sum(max(0.0, each - LEFT) for each in flipped)

    @property
    def cost(self) -> float:
        """What orders edits, in nats per token: the drift, and `PRICE` for each unit of `excess`.

        Edits that do what they should cost their drift alone. For the others, behaviour and drift have a rate of
        exchange, so that a tiny gain in one cannot outweigh any loss in the other.
        """
        return self.drift + PRICE * self.excess

    @property
    def order(self) -> tuple[float, ...]:
        """Sort key, best first: the cost, then the single objectives."""
        return (self.cost, *self.objectives)


def share_left(scores: torch.Tensor) -> float:
    """The share of prompts whose behaviour score (log-odds) is above 0, allowing for unseen prompts close to these.

    This is the observed share, or its kernel estimate `mean Phi(score / h)`, whichever is larger: a few val prompts
    just below 0 do not show that a hundred others are. Phi is the normal distribution function. The bandwidth h shrinks
    with the number of prompts as in Silverman's rule, `2 n^(-1/5)`, which is 1 at 32; it does not depend on the scores,
    so that lowering any score never raises the estimate. Scores that are not a number count as above 0.
    """
    known = torch.nan_to_num(scores.double(), nan=math.inf, posinf=math.inf, neginf=-math.inf)
    observed = (known > 0).double().mean().item()
    bandwidth = BANDWIDTH * len(known) ** -0.2
    return float(max(observed, torch.special.ndtr(known / bandwidth).mean().item()))


def share_flipped(base: torch.Tensor, edited: torch.Tensor) -> float:
    """The share of prompts for which an edit changes whether the behaviour shows, from scores before and after.

    This is the share of scores that change sign, or `mean |Phi(base / h) - Phi(edited / h)|`, whichever is larger, with
    Phi and h as in `share_left`: a score that comes close to 0 counts in part.
    """
    bandwidth = BANDWIDTH * len(base) ** -0.2
    shown = [torch.special.ndtr(scores.double().nan_to_num(nan=math.inf) / bandwidth) for scores in (base, edited)]
    signs = ((base > 0) != (edited > 0)).double().mean().item()
    return float(max(signs, (shown[0] - shown[1]).abs().mean().item()))


def _dominates(one: Trial, other: Trial) -> bool:
    pairs = list(zip(one.objectives, other.objectives, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other beats: none is as good in all objectives and better in one. In the given order."""
    return [t for t in trials if not any(_dominates(other, t) for other in trials)]


def shortlist(trials: Sequence[Trial]) -> list[Trial]:
    """The edits to choose from, given all of them with the best first: that one, and the rest of the Pareto front.

    The best is usually on the front; an edit that only generated answers showed to be the best may not be.
    """
    front = pareto_front(trials)
    return [t for i, t in enumerate(trials) if i == 0 or t in front]


def why_none(trials: Sequence[Trial]) -> str | None:
    """Why no edit is chosen, given all of them with the best first; None if that one does what it should.

    Where the base is as it should be already, the weakest edit would be the best. Otherwise the best has to bring the
    base at least half of the way, in first tokens (or what stands in for them) and in answers, if those were checked.
    """
    if not trials:
        return None
    best, allowed = trials[0], max(LEFT, trials[0].usual)
    if best.before <= allowed:
        return (
            f"in the unedited model, {100 * best.before:.1f}% of the target val prompts are left to change, and up to "
            f"{100 * allowed:.1f}% counts as done"
        )
    if best.left > (best.before + allowed) / 2:
        return f"the best edit brings {100 * best.before:.1f}% of the target val prompts only to {100 * best.left:.1f}%"
    if best.confirmed is not None and best.confirmed > MOST_CONFIRMED:
        return f"{100 * best.confirmed:.0f}% of the best edit's answers are not as they should be"
    return None


def drifts_more(kls: Mapping[str, Sequence[float]], than: Mapping[str, Sequence[float]]) -> bool:
    """Whether one edit's mean KL is really larger than another's, given the KLs of both on the same prompts.

    It is if the 95% paired t interval of the difference is above 0. Sets of prompts weigh the same, as in
    `Trial.drift`; with several, the degrees of freedom are those of the smallest. Without an interval (one prompt, or a
    KL that is not finite), any difference is real.
    """
    with np.errstate(invalid="ignore"):
        differences = [np.subtract(kls[name], than[name]) for name in kls]
    fewest = min(map(len, differences))
    mean = float(np.mean([d.mean() for d in differences]))
    if fewest < 2 or not math.isfinite(mean):
        return not mean <= 0
    variance = sum(d.var(ddof=1) / len(d) for d in differences) / len(differences) ** 2
    return mean > float(scipy.stats.t.ppf(0.975, fewest - 1)) * math.sqrt(variance)


def best(trials: Sequence[Trial]) -> Trial:
    """The best trial: the cheapest, unless another is tied with it in KL and has less excess of behaviour.

    Tied are edits on the Pareto front whose KL is not really larger (`drifts_more`), and at most `LARGEST_TIE` times as
    large: with few prompts, or one that dominates, the interval alone would hide large differences.
    """
    cheapest = min(trials, key=lambda t: t.order)
    tied = [
        t
        for t in pareto_front(trials)
        if t.drift <= LARGEST_TIE * cheapest.drift and not drifts_more(t.kls, cheapest.kls)
    ]
    return min([cheapest, *tied], key=lambda t: (t.excess, *t.order))
