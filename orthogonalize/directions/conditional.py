"""Conditional edits: take directions out of a write only where its input looks like the target's.

A write matrix computes `W x` from its input x [n]. With orthonormal rows R [k, d] of directions in the stream that it
writes into, `W' = W - R^T C` takes `C x` out along them. C [k, n] is the solution of a ridge regression

    min_C  w_T E_T |R W x - m - C x|^2  +  E_H |C x|^2  +  sum_K w_K E_K |C x|^2  +  l |C|^2

over target tokens T (whose component along R is brought to m, what harmless tokens write on average), harmless tokens
H, and sets K of preserved tokens (whose outputs should not move). Its normal equations are

    C (S_H + sum_K w_K S_K + w_T S_T + l I) = w_T E_T[(R W x - m) x^T],    S = E[x x^T] over the tokens of a set,

with `l = ridge * mean(diag(S_H + sum_K w_K S_K))`, so that `ridge` has no unit. This is the update of MEMIT
(Meng et al. 2023, eq. 14) with values restricted to the span of R. AlphaEdit (Fang et al. 2024) and AlphaSteer (arXiv
2506.07022) are relatives, which project on the null space of what is preserved instead. Bringing a component to the
harmless mean is ACE's idea (arXiv 2411.09003).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core.errors import OrthogonalizeError
from ..core.interventions import ConditionalMap


class InputMoments:
    """Streaming second moments of a matrix's inputs over one set of tokens, in float64.

    Holds E[x x^T] [n, n] and, where values y [k] come with the inputs, E[y x^T] [k, n] and E[y] [k]; never the tokens.
    Products of one update are taken in the inputs' dtype (float32 at least), and summed in float64.
    """

    _SUMS = ("_second", "_cross", "_inputs", "_values")

    def __init__(self, inputs: int, values: int = 0, device: torch.device | str = "cpu") -> None:
        self.count, self.inputs = 0, inputs
        self._second = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self._cross = torch.zeros(values, inputs, dtype=torch.float64, device=device)
        self._inputs = torch.zeros(inputs, dtype=torch.float64, device=device)
        self._values = torch.zeros(values, dtype=torch.float64, device=device)

    def update(self, inputs: torch.Tensor, values: torch.Tensor | None = None) -> InputMoments:
        """Add tokens: inputs [tokens, n] and, where the moments have any, values [tokens, k]."""
        x = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        if (values is None or not values.shape[-1]) != (len(self._values) == 0):
            raise ValueError("these moments take values with every input, or with none")
        self._second += x.mT @ x
        self._inputs += x.sum(0)
        if values is not None:
            y = values.to(x)
            self._cross += y.mT @ x
            self._values += y.sum(0)
        self.count += len(x)
        return self

    def to(self, device: torch.device) -> InputMoments:
        """The same moments on another device."""
        other = copy.copy(self)
        for name in self._SUMS:
            setattr(other, name, getattr(self, name).to(device))
        return other

    def add(self, other: InputMoments) -> None:
        """Add the tokens of other moments, which may be on another device."""
        for name in self._SUMS:
            own = getattr(self, name)
            own += getattr(other, name).to(own.device)
        self.count += other.count

    @classmethod
    def weighted(cls, parts: Sequence[tuple[float, InputMoments]]) -> InputMoments:
        """Moments whose `second` is the weighted sum of those of `parts`; they are of no values."""
        first = parts[0][1]
        found = cls(first.inputs, device=first._second.device)
        for weight, each in parts:
            found._second += weight * each.second
        found.count = 1
        return found

    @property
    def second(self) -> torch.Tensor:
        """E[x x^T], [n, n]."""
        return self._second / self._number

    @property
    def value_mean(self) -> torch.Tensor:
        """E[y], [k]."""
        return self._values / self._number

    def cross(self, origin: torch.Tensor) -> torch.Tensor:
        """E[(y - origin) x^T], [k, n]."""
        return (self._cross - torch.outer(origin.to(self._cross), self._inputs)) / self._number

    @property
    def _number(self) -> int:
        if not self.count:
            raise OrthogonalizeError("a set of tokens for a conditional edit is empty")
        return self.count


def solve_from_moments(
    r: torch.Tensor,
    target: InputMoments,
    harmless: InputMoments,
    preserved: Sequence[InputMoments] = (),
    *,
    origin: torch.Tensor | None = None,
    target_weight: float = 0.1,
    preserve_weight: float = 1.0,
    preserved_weights: Sequence[float] = (),
    ridge: float = 0.01,
) -> ConditionalMap:
    """The conditional map from second moments; the cost is one [n, n] Cholesky factorisation.

    Args:
        r: orthonormal rows [k, d] of the stream.
        target: moments of target tokens; the values are their components `R W x` [k].
        harmless: moments of harmless tokens; with values, their mean is where the target is brought.
        preserved: moments of further sets, each weighted by `preserve_weight`, times its own of `preserved_weights`.
        origin: where the target's component is brought [k], instead of the harmless mean.
        target_weight: w_T; too small leaves part of the behaviour, too large moves harmless outputs.
        ridge: l as a share of the mean squared input.

    Raises:
        OrthogonalizeError: a set is empty, or the system is singular (a zero `ridge` with dependent inputs).
    """
    _check_weights(target_weight, preserve_weight, ridge)
    shares = preserved_weights or [1.0] * len(preserved)
    kept = harmless.second
    for share, each in zip(shares, preserved, strict=True):
        kept = kept + preserve_weight * share * each.second
    system = kept + target_weight * target.second
    system.diagonal().add_(ridge * kept.diagonal().mean())
    m = harmless.value_mean if origin is None else origin
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:
        raise OrthogonalizeError("the inputs are linearly dependent, so a conditional edit needs a ridge above 0")
    c = target_weight * torch.cholesky_solve(target.cross(m).mT, factor).mT
    return ConditionalMap(r.to(torch.float64), c)


def solve_from_samples(
    r: torch.Tensor,
    target: tuple[torch.Tensor, torch.Tensor],
    harmless: tuple[torch.Tensor, torch.Tensor],
    preserved: Sequence[torch.Tensor] = (),
    *,
    origin: torch.Tensor | None = None,
    target_weight: float = 0.1,
    preserve_weight: float = 1.0,
    preserved_weights: Sequence[float] = (),
    ridge: float = 0.01,
) -> ConditionalMap:
    """The same map from the tokens themselves: through the primal or the dual system, whichever is smaller.

    `target` and `harmless` are inputs [tokens, n] and values [tokens, k]; `preserved` are inputs alone. With N tokens
    in all, the dual solves an [N, N] system, since C lies in the span of the inputs: cheaper where N < n.

    Raises:
        OrthogonalizeError: see `solve_from_moments`.
    """
    _check_weights(target_weight, preserve_weight, ridge)
    inputs = target[0].shape[-1]
    tokens = len(target[0]) + len(harmless[0]) + sum(map(len, preserved))
    settings = {
        "target_weight": target_weight, "preserve_weight": preserve_weight, "preserved_weights": preserved_weights,
        "ridge": ridge,
    }  # fmt: skip
    if tokens >= inputs or not ridge:
        values, device = target[1].shape[-1], target[0].device
        t, h = (InputMoments(inputs, values, device).update(*pair) for pair in (target, harmless))
        k = [InputMoments(inputs, device=device).update(x) for x in preserved]
        return solve_from_moments(r, t, h, k, origin=origin, **settings)  # type: ignore[arg-type]
    if not all(len(x) for x in (target[0], harmless[0], *preserved)):
        raise OrthogonalizeError("a set of tokens for a conditional edit is empty")
    x, y = (part.to(torch.float64) for part in target)
    m = harmless[1].to(torch.float64).mean(0) if origin is None else origin.to(x)
    rows = [((target_weight / len(x)) ** 0.5) * x, harmless[0].to(x) / len(harmless[0]) ** 0.5]
    shares = preserved_weights or [1.0] * len(preserved)
    rows += [
        ((preserve_weight * share / len(each)) ** 0.5) * each.to(x)
        for share, each in zip(shares, preserved, strict=True)
    ]
    a = torch.cat(rows)  # S_H + w_K S_K + w_T S_T = a^T a
    kept = a[len(x) :]
    system = a @ a.mT
    system.diagonal().add_(ridge * kept.square().sum() / inputs)
    wanted = torch.zeros(len(a), y.shape[-1]).to(x)
    wanted[: len(x)] = ((target_weight / len(x)) ** 0.5) * (y - m)
    solution = torch.linalg.solve(system, wanted, left=True)
    return ConditionalMap(r.to(torch.float64), solution.mT @ a)


@dataclass(frozen=True)
class Weights:
    """The weights of the regression.

    Attributes:
        target: w_T, of the target's tokens.
        preserve: of all tokens of a preserved set, against 1 for those of harmless prompts.
        first: of the tokens with which answers begin, at the positions where the target's are: a set of its own, since
            they are few among all tokens of an answer, but decide what it will be.
        ridge: see above.
    """

    target: float = 0.3
    preserve: float = 1.0
    first: float = 3.0
    ridge: float = 0.01


class InputTokens:
    """The inputs of one set of tokens, and the values that come with them.

    Kept as they are while there are fewer tokens than inputs, and as moments from then on: whichever is smaller.
    """

    def __init__(self) -> None:
        self.count = 0
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._moments: InputMoments | None = None

    def update(self, inputs: torch.Tensor, values: torch.Tensor) -> InputTokens:
        """Add tokens: inputs [tokens, n] and values [tokens, k]."""
        self.count += len(inputs)
        if self._moments is not None:
            self._moments.update(inputs, values)
            return self
        self._parts.append((inputs.clone(), values.clone()))
        if self.count >= inputs.shape[-1]:
            self._moments, self._parts = self.moments, []
        return self

    def add(self, other: InputTokens, device: torch.device) -> None:
        """Add the tokens of another set, which may be on another device; all are kept on `device`."""
        if not self.count:
            self.count = other.count
            self._parts = [(x.to(device), y.to(device)) for x, y in other._parts]
            self._moments = None if other._moments is None else other._moments.to(device)
        elif other._moments is None:
            for x, y in other._parts:
                self.update(x.to(device), y.to(device))
        else:
            self._moments, self._parts = self.moments, []
            self._moments.add(other._moments)
            self.count += other.count

    @classmethod
    def summed(cls, moments: InputMoments, count: int) -> InputTokens:
        """The second moments of `count` tokens, to which none can be added."""
        found = cls()
        found.count, found._moments = count, moments
        return found

    @property
    def sampled(self) -> bool:
        """Whether the tokens themselves are kept, and not their moments."""
        return self._moments is None

    @property
    def inputs(self) -> int:
        """The width n of the inputs; 0 if there are none."""
        return self._parts[0][0].shape[-1] if self._parts else self._moments.inputs if self._moments else 0

    @property
    def samples(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs [tokens, n] and values [tokens, k], while they are kept.

        Raises:
            OrthogonalizeError: there are no tokens.
        """
        if not self._parts:
            raise OrthogonalizeError("a set of tokens for a conditional edit is empty")
        x, y = zip(*self._parts, strict=True)
        return torch.cat(x), torch.cat(y)

    @property
    def moments(self) -> InputMoments:
        """The second moments of all tokens.

        Raises:
            OrthogonalizeError: there are no tokens.
        """
        if self._moments is not None:
            return self._moments
        if not self._parts:
            raise OrthogonalizeError("a set of tokens for a conditional edit is empty")
        x, y = self._parts[0]
        moments = InputMoments(x.shape[-1], y.shape[-1], x.device)
        for part in self._parts:
            moments.update(*part)
        return moments


def solve(
    r: torch.Tensor,
    sets: tuple[InputTokens, InputTokens, Sequence[tuple[float, InputTokens]]],
    weights: Weights,
    origin: torch.Tensor | None = None,
) -> ConditionalMap:
    """The conditional map of target, harmless and (weighted) preserved tokens, on the CPU.

    It is solved in its primal or dual form, whichever is smaller.

    Raises:
        OrthogonalizeError: see `solve_from_moments`.
    """
    target, harmless, weighted = sets
    preserved = [each for _, each in weighted]
    settings: dict[str, Any] = {
        "origin": origin, "target_weight": weights.target, "preserved_weights": [weight for weight, _ in weighted],
        "ridge": weights.ridge,
    }  # fmt: skip
    every = (target, harmless, *preserved)
    if all(each.sampled for each in every) and sum(each.count for each in every) < target.inputs:
        kept = [each.samples[0] for each in preserved]
        found = solve_from_samples(r, target.samples, harmless.samples, kept, **settings)
    else:
        found = solve_from_moments(r, target.moments, harmless.moments, [k.moments for k in preserved], **settings)
    return ConditionalMap(found.r.cpu(), found.c.cpu())


def _check_weights(target: float, preserve: float, ridge: float) -> None:
    if not (target > 0 and preserve >= 0 and ridge >= 0):
        raise OrthogonalizeError("a conditional edit needs a target weight above 0 and no negative weight or ridge")
