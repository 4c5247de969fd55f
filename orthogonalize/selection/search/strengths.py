"""Strengths of the single write sites of an edit, by natural-gradient steps: as little KL as the behaviour allows.

An edit whose sites have the strengths s moves the model's distributions from the base's by some `s^T F s / 2` nats per
token, where F is the Fisher information of the strengths (Amari 1998); the mean behaviour score of the target changes
by its gradient. A step takes, of the s that by this gradient keep the behaviour where the edit has brought it, the one
of least `s^T F s`. The next step starts there, with a new gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy
import torch

from ...core.interrupts import check
from ...core.interventions import AffineMap, Intervention, Site
from ...models.activations import batches, pad
from ...models.forward.logits import logits_at
from ...models.forward.partial import StreamCache
from ...models.gradients import frozen
from ...models.hooks import intervened
from ..readouts import log_odds
from ..scoring import last_logits

STEPS = 4
LARGEST = 1.5  # the most that a site's map is multiplied by; the least is 0, which leaves the site alone
STRIDE = 0.5  # the most by which a step changes that: further away, the gradient says little
# Where logits are linear in s, the KL from the base is the integral of (1 - t) s^T F(t s) s over t from 0 to 1. Gauss's
# rule of one point for the weight 1 - t takes F at a third of the strengths.
GAUSS = 1 / 3
DRAWS = 4  # of noise for the Fisher matrix, for every answer
RIDGE = 0.01  # added to its diagonal, in units of the mean entry there
LEAST_INFORMATION = 1e-9  # nats per token: an edit that moves nothing has none
BATCH_TOKENS = 1024  # in one backward pass
BATCH = 2**25  # logits in one backward pass: 128 MiB in float32, some times over

Ids = Sequence[Sequence[int]]
"""Token ids by prompt or answer."""


class StrengthGradients:
    """Derivatives of what a model says with respect to the strengths of an edit's write sites.

    Every row of a batch has a vector of strengths of its own, so that one backward pass differentiates all rows. The
    edit acts as the baked weights do. Prompts of `behaviour` must be the same each time: what lies below the first site
    is computed once.

    Attributes:
        sites: the write sites, in the order of all vectors here.
    """

    def __init__(self, model: Any, writes: Mapping[Site, AffineMap]) -> None:
        self.model, self.sites = model, tuple(writes)
        self._edit = Intervention(writes=writes)
        self._streams = StreamCache(model, min(0 if site.layer is None else site.layer for site in self.sites))
        self._recorded: set[int] = set()

    @contextmanager
    def _varied(self, strengths: Sequence[float], rows: int) -> Iterator[torch.Tensor]:
        """Edit the model at these strengths in this context; gives them as a variable [rows, sites]."""
        variable = torch.tensor(strengths, dtype=torch.float64).repeat(rows, 1).requires_grad_()
        by_site = dict(zip(self.sites, variable.unbind(1), strict=True))
        edited = intervened(self.model, self._edit, renormalise=False, strengths=by_site)
        with frozen(self.model), torch.enable_grad(), edited:
            yield variable

    def behaviour(self, ids: Ids, tokens: Sequence[int], strengths: Sequence[float]) -> tuple[float, np.ndarray]:
        """The mean behaviour score (log-odds) of prompts, and its gradient [sites]."""
        total, gradient = 0.0, np.zeros(len(self.sites))
        for number, group in enumerate(batches(ids, BATCH_TOKENS)):
            padded, lengths = pad([ids[i] for i in group], self.model.device)
            stream = self._streams.resumed if number in self._recorded else self._streams.recording
            with self._varied(strengths, len(group)) as variable, stream(number):
                score = log_odds(last_logits(self.model, padded, lengths), tokens).sum()
                (rows,) = torch.autograd.grad(score, variable)
            self._recorded.add(number)
            total += score.item()
            gradient += rows.sum(0).numpy()
            check()
        return total / len(ids), gradient / len(ids)

    def fisher(
        self, prompts: Ids, answers: Ids, strengths: Sequence[float], draws: int = DRAWS, seed: int = 0
    ) -> np.ndarray:
        """The Fisher information [sites, sites] at these strengths, a mean over the tokens of the answers.

        With J the derivative of the logits at one place of an answer, this is the mean of `J^T (diag p - p p^T) J`. For
        standard normal noise e, the vector `a = sqrt(p) e - p (sqrt(p) . e)` has that covariance, so that the gradient
        of `a . logits` is a sample; places have noise of their own, so one pass samples the sum over an answer. To draw
        tokens instead has the same mean, but where a model is nearly certain hardly any draw says anything.
        """
        total = np.zeros((len(self.sites), len(self.sites)))
        generator = torch.Generator(self.model.device).manual_seed(seed)
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        vocabulary = self.model.config.get_text_config().vocab_size
        for group in batches(rows, min(BATCH_TOKENS, max(1, BATCH // vocabulary))):
            padded, _ = pad([rows[i] for i in group], self.model.device)
            start = min(len(prompts[i]) for i in group) - 1
            with self._varied(strengths, len(group)) as variable:
                found = logits_at(self.model, padded, padded.shape[1] - start, use_cache=False)
                places = [slice(len(prompts[i]) - 1 - start, len(rows[i]) - 1 - start) for i in group]
                logits = torch.cat([row[place] for row, place in zip(found, places, strict=True)])
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                p = logits.detach().softmax(-1)
                for _ in range(draws):
                    noise = p.sqrt() * torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device)
                    along = noise - p * noise.sum(-1, keepdim=True)
                    (sample,) = torch.autograd.grad((along * logits).sum(), variable, retain_graph=True)
                    total += (sample.mT @ sample).numpy()
                    check()
        return total / (draws * sum(map(len, answers)))


@dataclass(frozen=True)
class StrengthSteps:
    """Steps to strengths that cost less KL and keep the behaviour of the target.

    Attributes:
        target: prompts whose behaviour the edit changes, as token ids.
        tokens: the behaviour's first tokens.
        sets: prompts with the base's own answers to them, along which the model should not move; all sets weigh the
            same.
        shows: whether the target should show the behaviour.
        kept: the mean behaviour score that the edit has brought the target to.
    """

    gradients: StrengthGradients
    target: Ids
    tokens: Sequence[int]
    sets: Sequence[tuple[Ids, Ids]]
    shows: bool
    kept: float

    @cached_property
    def _fisher(self) -> np.ndarray:
        at = [GAUSS] * len(self.gradients.sites)
        mean = np.mean([self.gradients.fisher(*each, at) for each in self.sets], axis=0)
        ridge = RIDGE * max(np.trace(mean) / len(mean), LEAST_INFORMATION)
        found: np.ndarray = mean + ridge * np.eye(len(mean))
        return found

    def after(self, strengths: Sequence[float]) -> list[float]:
        """The strengths to try next, from 0 to `LARGEST` and within `STRIDE` of these, in hundredths."""
        score, gradient = self.gradients.behaviour(self.target, self.tokens, strengths)
        sign = 1.0 if self.shows else -1.0
        now = np.asarray(strengths)
        least = float(sign * (self.kept - score + gradient @ now))
        low, high = np.maximum(now - STRIDE, 0.0), np.minimum(now + STRIDE, LARGEST)
        found = least_strengths(self._fisher, sign * gradient, least, low, high)
        return [round(abs(each), 2) for each in found.tolist()]  # where the bound is 0, rounding can be on either side


def least_strengths(
    fisher: np.ndarray, gradient: np.ndarray, least: float, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """The strengths s with the least `s^T F s` of those with `gradient . s >= least` and `low <= s <= high`.

    If there are none, those within the bounds with the largest `gradient . s`. For a given multiplier m of the
    constraint, s minimises `s^T F s / 2 - m gradient . s` within the bounds, which is a bounded least-squares problem;
    `gradient . s` grows with m, so m is the root of one equation.

    Args:
        fisher: F [sites, sites], positive definite.
        low, high: the bounds [sites], the former below the latter.
    """
    if np.maximum(gradient * low, gradient * high).sum() <= least:
        return np.where(gradient > 0, high, np.where(gradient < 0, low, np.clip(0.0, low, high)))
    root = np.linalg.cholesky(fisher)
    whitened = scipy.linalg.solve_triangular(root, gradient, lower=True)

    def strengths(multiplier: float) -> np.ndarray:
        found: np.ndarray = scipy.optimize.lsq_linear(root.T, multiplier * whitened, (low, high), method="bvls").x
        return found

    def excess(multiplier: float) -> float:
        return float(gradient @ strengths(multiplier)) - least

    if excess(0.0) >= 0:
        return strengths(0.0)
    largest = 1.0
    while excess(largest) < 0:
        largest *= 2
    return strengths(scipy.optimize.brentq(excess, 0.0, largest, xtol=1e-12 * largest))
