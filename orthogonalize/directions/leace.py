"""LEACE, the closed-form least-squares concept eraser (Belrose et al. 2023), for a concept with two classes.

The eraser is `x -> x - u v^T (x - mean)`, where u is the difference of the class means and
`v = S^-1 u / (u^T S^-1 u)` with S the covariance of x (their theorem 4.3; with two classes the cross-covariance has
rank one). It makes the class means equal, so that no linear probe does better than chance, and of all maps with that
property it changes x least. With n samples in d >= n dimensions, v lies in the span of the samples and no d x d matrix
is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.errors import OrthogonalizeError
from ..core.interventions import AffineMap
from .inlp.logistic import solve_positive


@dataclass(frozen=True)
class Eraser:
    """The map `x -> x - u v^T (x - mean)`, with u, v and mean [..., d] in float64, for one problem or a batch [...].

    `v^T u = 1`, so the map is a projection; u = v = 0 if the class means are already equal. In the orthogonal form, v
    is parallel to u.
    """

    u: torch.Tensor
    v: torch.Tensor
    mean: torch.Tensor

    def __repr__(self) -> str:
        batch = f"batch {list(self.u.shape[:-1])}" if self.u.dim() > 1 else f"rank {self.rank}"
        return f"Eraser({batch}, width {self.u.shape[-1]})"

    def __getitem__(self, index: int | tuple[int, ...]) -> Eraser:
        return Eraser(self.u[index], self.v[index], self.mean[index])

    @property
    def rank(self) -> int:
        """1, or 0 if there was nothing to erase; for a single problem."""
        return int(bool(self.u.any()))

    def affine(self, strength: float = 1.0) -> AffineMap:
        """The eraser as a map on the stream; its shift preserves the mean."""
        shift = strength * (self.v * self.mean).sum(-1, keepdim=True) * self.u
        return AffineMap(strength * self.u[..., None], self.v[..., None], shift)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Erase the concept from samples x [n, d]."""
        return self.affine()(x)


def oas_shrinkage(trace: torch.Tensor, squares: torch.Tensor, n: int, d: int) -> torch.Tensor:
    """The intensity, in [0, 1], of oracle approximating shrinkage of a covariance (Chen et al. 2010).

    `trace` and `squares` (the sum of squared entries) are those of the maximum-likelihood covariance of `n` samples in
    `d` dimensions. The same as in scikit-learn's `oas`.
    """
    mean_square, variance = squares / d**2, trace / d
    below = (n + 1) * (mean_square - variance**2 / d)
    return torch.where(below > 0, (mean_square + variance**2) / below.clamp(min=1e-300), 1.0).clamp(max=1.0)


def _scale_against(direction: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """`direction` [..., d] scaled so that its inner product with u is 1; 0 where u is 0."""
    product = (direction * u).sum(-1, keepdim=True)
    return torch.where(product > 0, direction / torch.where(product > 0, product, 1.0), 0.0)


def _difference(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """The difference of two means [d]; exactly 0 if it is within their rounding error."""
    u = positive - negative
    return u if u.norm() > 1e-13 * (positive.norm() + negative.norm()) else torch.zeros_like(u)


class Moments:
    """Streaming means and covariance of two classes, in float64; memory is d x d for any number of samples."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.counts = {"positive": 0, "negative": 0}
        zeros = torch.zeros(width, dtype=torch.float64, device=device)
        self.means = {"positive": zeros, "negative": zeros}
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)  # within the classes

    def update(self, positive: torch.Tensor | None = None, negative: torch.Tensor | None = None) -> Moments:
        """Add samples [n, d] of either class (pairwise merging of means and scatter; Chan, Golub and LeVeque 1983)."""
        for side, samples in (("positive", positive), ("negative", negative)):
            if samples is None or not len(samples):
                continue
            x = samples.to(self.scatter)
            before, count = self.counts[side], len(x)
            mean = x.mean(0)
            delta = mean - self.means[side]
            centred = x - mean
            self.scatter += centred.mT @ centred + before * count / (before + count) * torch.outer(delta, delta)
            self.means[side] = self.means[side] + delta * count / (before + count)
            self.counts[side] = before + count
        return self

    def eraser(self, orthogonal: bool = False, shrinkage: bool = True) -> Eraser:
        """The eraser for the samples so far (see `leace`)."""
        n, m = self.counts["positive"], self.counts["negative"]
        if not (n and m):
            raise OrthogonalizeError("LEACE needs samples of both classes")
        total = n + m
        u = _difference(self.means["positive"], self.means["negative"])
        mean = (n * self.means["positive"] + m * self.means["negative"]) / total
        if orthogonal:
            return Eraser(u, _scale_against(u, u), mean)
        covariance = self.scatter / total + n * m / total**2 * torch.outer(u, u)
        width = len(u)
        if shrinkage:
            trace = covariance.trace()
            share = oas_shrinkage(trace, covariance.pow(2).sum(), total, width)
            covariance = (1 - share) * covariance + share * trace / width * torch.eye(width).to(covariance)
        return Eraser(u, _scale_against(torch.linalg.pinv(covariance, hermitian=True, rtol=1e-10) @ u, u), mean)


def leace(
    positive: torch.Tensor, negative: torch.Tensor, *, orthogonal: bool = False, shrinkage: bool = True
) -> Eraser:
    """The least-squares eraser of the difference between two sets of activations.

    Args:
        positive, negative: activations [n, d] and [m, d], or [n, ..., d] and [m, ..., d] for a batch.
        orthogonal: project along the mean difference instead (the orthogonal eraser of the paper's appendix). It
            erases as much on these samples, but changes them more.
        shrinkage: shrink the covariance (see `oas_shrinkage`). Without shrinkage, n samples in n or more dimensions
            do not determine the covariance, and the eraser fits their noise. The class means become equal either way.

    Raises:
        OrthogonalizeError: a side has no samples, the shapes do not match, or samples are not finite.
    """
    if positive.dim() < 2 or positive.shape[1:] != negative.shape[1:] or not (len(positive) and len(negative)):
        raise OrthogonalizeError(
            f"LEACE takes two sets of activations of the same width, [n, d] or [n, ..., d]; got "
            f"{list(positive.shape)} and {list(negative.shape)}"
        )
    shape, width = positive.shape[1:-1], positive.shape[-1]
    count = len(positive) + len(negative)
    flat = [side.reshape(len(side), -1, width) for side in (positive, negative)]
    found: list[Eraser] = []
    for i in range(flat[0].shape[1]):
        sides = [side[:, i].to(torch.float64) for side in flat]
        if not all(bool(torch.isfinite(side).all()) for side in sides):
            raise OrthogonalizeError("the activations given to LEACE are NaN or infinite")
        if orthogonal or count > width:
            found.append(Moments(width, positive.device).update(*sides).eraser(orthogonal, shrinkage))
        else:
            found.append(_eraser_from_gram(sides[0], sides[1], shrinkage))
    stacked = [torch.stack([getattr(e, name) for e in found]).reshape(*shape, width) for name in ("u", "v", "mean")]
    return Eraser(*stacked)


def _eraser_from_gram(positive: torch.Tensor, negative: torch.Tensor, shrinkage: bool) -> Eraser:
    """The eraser computed from the Gram matrix [n, n] of the samples, equal to that from the covariance [d, d].

    Let X be the centred samples, t the weights with `u = X^T t`, and `g X^T X + b I` the shrunk covariance. Its inverse
    maps u to a multiple of `X^T (X X^T + b / g)^-1 t`.
    """
    n, m, width = len(positive), len(negative), positive.shape[-1]
    samples = torch.cat([positive, negative])
    mean = samples.mean(0)
    x = samples - mean
    t = torch.cat([torch.full((n,), 1 / n), torch.full((m,), -1 / m)]).to(x)
    u = _difference(positive.mean(0), negative.mean(0))
    gram = x @ x.mT
    if not shrinkage:
        return Eraser(u, _scale_against(x.mT @ (torch.linalg.pinv(gram, hermitian=True, rtol=1e-10) @ t), u), mean)
    trace = gram.trace() / (n + m)
    share = oas_shrinkage(trace, gram.pow(2).sum() / (n + m) ** 2, n + m, width)
    if share >= 1:
        return Eraser(u, _scale_against(u, u), mean)
    gram.diagonal().add_(share * trace / width * (n + m) / (1 - share))
    weights = solve_positive(gram[None], t[None, :, None])[0, :, 0]
    return Eraser(u, _scale_against(x.mT @ weights, u), mean)
