"""L2-regularised logistic regression by Newton's method, for a batch of problems, in the span of the data.

Each problem is `min over w, b of |w|^2 / 2 + C sum log(1 + exp(-y (x . w + b)))` with y = +-1. Its solution is
`w = X^T a` with `a = C (t - p)`, where t are the labels as 0 and 1 and p the probabilities. So only the dual weights
`a` and the intercept b are unknown, and the margins are `X X^T a + b`.
"""

from __future__ import annotations

from copy import copy

import torch
from torch.nn.functional import softplus

from .newton import HALVINGS, LEAST_CURVATURE, RISE, STEPS, fit_by_newton

TOLERANCE = 1e-7  # relative to the spread of the margins; the next Newton step would be about its square


class Samples:
    """The samples of a batch of problems, projected off the directions found so far.

    `fitted` [pairs, n, d] and `held` [pairs, m, d] are centred on the mean of the fitted samples. Only products with
    them are needed: if n <= d, they use the Gram matrices [n, n] and [m, n], otherwise the samples. A direction is
    represented by the weights c of the fitted samples, `b = X^T c`.
    """

    def __init__(self, fitted: torch.Tensor, held: torch.Tensor) -> None:
        self.by_gram = fitted.shape[1] <= fitted.shape[2]
        self.fitted = fitted @ fitted.mT if self.by_gram else fitted
        self.held = held @ fitted.mT if self.by_gram else held
        self.left = self.fitted.clone()  # the fitted samples, projected
        # Bound on the rounding error of `X X^T a` for |a| <= 1.
        squares = self.fitted.diagonal(dim1=-2, dim2=-1) if self.by_gram else fitted.pow(2).sum(-1)
        self.noise = torch.finfo(fitted.dtype).eps * fitted.shape[1] * squares.amax(-1)
        self.combinations: list[torch.Tensor] = []  # c [pairs, n]
        self.components: list[torch.Tensor] = []  # X b [pairs, n]
        # Orthonormal [pairs, n, k]: the dual directions that the centred, projected samples map to zero.
        self.idle = fitted.new_full((len(fitted), fitted.shape[1], 1), fitted.shape[1] ** -0.5)

    def select(self, keep: torch.Tensor) -> Samples:
        """The problems where `keep` [pairs] is true."""
        if bool(keep.all()):
            return self
        chosen = copy(self)
        chosen.fitted, chosen.held, chosen.left = self.fitted[keep], self.held[keep], self.left[keep]
        chosen.noise, chosen.idle = self.noise[keep], self.idle[keep]
        chosen.combinations = [c[keep] for c in self.combinations]
        chosen.components = [g[keep] for g in self.components]
        return chosen

    def without_idle(self, dual: torch.Tensor) -> torch.Tensor:
        """`dual` without its idle part, which makes up nearly all of late classifiers.

        The rounding errors of that part would grow from step to step.
        """
        return dual - (self.idle @ (self.idle.mT @ dual[..., None]))[..., 0]

    def scores(self, dual: torch.Tensor) -> torch.Tensor:
        """`X X^T a` [pairs, n] of the projected samples."""
        return _products(self.left, self.left, dual, self.by_gram)

    def held_scores(self, dual: torch.Tensor) -> torch.Tensor:
        """`x . w` [pairs, m] of the held-out samples, with `w = X^T a` of the projected samples."""
        return _products(self.held, self.fitted, self._combination(dual), self.by_gram)

    def _combination(self, dual: torch.Tensor) -> torch.Tensor:
        """The weights c [pairs, n] of the original samples that are equivalent to `dual` for the projected ones."""
        c = dual
        for former, component in zip(self.combinations, self.components, strict=True):
            c = c - (component * dual).sum(-1, keepdim=True) * former
        return c

    def ridge(self, scale: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """`S (I + S X X^T S)^-1 S right` with S = diag(`scale` [pairs, n]) and `right` [pairs, n, k]."""
        s = scale[..., None]
        if self.by_gram:
            matrix = self.left * s
            matrix *= scale[:, None, :]
            matrix.diagonal(dim1=-2, dim2=-1).add_(1)
            return s * solve_positive(matrix, s * right)
        scaled = self.left * s  # the same by a d x d matrix (Woodbury)
        matrix = scaled.mT @ scaled
        matrix.diagonal(dim1=-2, dim2=-1).add_(1)
        return s * (s * right - scaled @ solve_positive(matrix, scaled.mT @ (s * right)))

    def project_off(self, dual: torch.Tensor) -> torch.Tensor:
        """Project all samples off `w = X^T a`; return c [pairs, n] with `w / |w| = X^T c` of the original samples.

        This is Gram-Schmidt, twice, on the original samples: with the projected ones, rounding errors would grow from
        step to step.
        """
        c = self._combination(dual)
        for _ in range(2):
            for former, component in zip(self.combinations, self.components, strict=True):
                c = c - (component * c).sum(-1, keepdim=True) * former
            g = _products(self.fitted, self.fitted, c, self.by_gram)
            norm = (c * g).sum(-1, keepdim=True).sqrt()
            c, g = c / norm, g / norm
        across = g[:, None, :] if self.by_gram else (self.fitted.mT @ c[..., None]).mT
        self.left.baddbmm_(g[..., None], across, alpha=-1)
        idle = self.without_idle(self.without_idle(c / c.norm(dim=-1, keepdim=True)))
        self.idle = torch.cat([self.idle, (idle / idle.norm(dim=-1, keepdim=True))[..., None]], dim=-1)
        self.combinations.append(c)
        self.components.append(g)
        return c


def _products(rows: torch.Tensor, columns: torch.Tensor, dual: torch.Tensor, by_gram: bool) -> torch.Tensor:
    """`R X^T a` for rows R; with Gram matrices, `rows` is already `R X^T`."""
    inner = dual[..., None]
    return (rows @ (inner if by_gram else columns.mT @ inner))[..., 0]


def solve_positive(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solve symmetric positive definite systems [pairs, n, n] for right sides [pairs, n, k]."""
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))


def fit_logistic(data: Samples, labels: torch.Tensor, c: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fit every problem of `data` to `labels` [n] of 0 and 1; all in float64.

    Returns the dual weights a [pairs, n] (without their idle part), the intercepts b [pairs] and the margins
    [pairs, n].
    """
    if not data.by_gram or labels.device.type != "cpu":
        return fit_batch(data, labels, c)
    dual = labels.new_empty(len(data.left), len(labels))
    intercept, margins = labels.new_empty(len(dual)), torch.empty_like(dual)
    grams, idle, noise, truth = (t.numpy() for t in (data.left, data.idle, data.noise, labels))
    duals, intercepts, found = (t.numpy() for t in (dual, intercept, margins))
    fit_by_newton(grams, idle, noise, truth, c, TOLERANCE, duals, intercepts, found)
    return dual, intercept, margins


def fit_batch(data: Samples, labels: torch.Tensor, c: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`fit_logistic` as batched tensor operations: every step is taken for all problems at once."""
    dual = labels.new_zeros(len(data.fitted), len(labels))
    intercept, margins = labels.new_zeros(len(dual)), torch.zeros_like(dual)
    sign = 2 * labels - 1
    active, left = torch.arange(len(dual), device=labels.device), data
    for _ in range(STEPS):
        a, b, m = _newton_step(left, labels, c, margins[active])
        a, b, m = _halve_until_no_worse(dual[active], intercept[active], margins[active], a, b, m, sign, c)
        spread = (m - b[:, None]).abs().amax(-1)
        moved = (m - margins[active]).abs().amax(-1) > TOLERANCE * spread + data.noise[active] * c
        dual[active], intercept[active], margins[active] = a, b, m
        if not bool(moved.any()):
            break
        if not bool(moved.all()):
            active, left = active[moved], left.select(moved)
    return dual, intercept, margins


def _newton_step(
    data: Samples, labels: torch.Tensor, c: float, margins: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One Newton step as reweighted least squares (Rasmussen and Williams 2006, algorithm 3.1, plus an intercept)."""
    p = margins.sigmoid()
    curvature = (p * (1 - p)).clamp(min=LEAST_CURVATURE)
    target = margins + (labels - p) / curvature
    right = torch.stack([target, torch.ones_like(target)], dim=-1)
    solved = data.ridge((c * curvature).sqrt(), right)
    b = solved[..., 0].sum(-1) / solved[..., 1].sum(-1)
    a = data.without_idle(solved[..., 0] - b[:, None] * solved[..., 1])
    return a, b, data.scores(a) + b[:, None]


def _objective(a: torch.Tensor, b: torch.Tensor, m: torch.Tensor, sign: torch.Tensor, c: float) -> torch.Tensor:
    return (a * (m - b[:, None])).sum(-1) / 2 + c * softplus(-sign * m).sum(-1)


def _halve_until_no_worse(
    a0: torch.Tensor, b0: torch.Tensor, m0: torch.Tensor,
    a1: torch.Tensor, b1: torch.Tensor, m1: torch.Tensor, sign: torch.Tensor, c: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Halve the step from (a0, b0, m0) to (a1, b1, m1) where the objective would rise."""
    before = _objective(a0, b0, m0, sign, c)
    step = torch.ones_like(b0)
    for _ in range(HALVINGS):
        s = step[:, None]
        a, b, m = a0 + s * (a1 - a0), b0 + step * (b1 - b0), m0 + s * (m1 - m0)
        worse = _objective(a, b, m, sign, c) > before + RISE * before.abs()
        if not bool(worse.any()):
            break
        step = torch.where(worse, step / 2, step)
    return a, b, m
