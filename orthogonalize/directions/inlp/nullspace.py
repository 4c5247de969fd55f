"""Iterative nullspace projection (Ravfogel et al. 2020), exact and batched, with an ordered basis.

The weights of an L2-regularised classifier lie in the span of its samples, `w = X^T a`. So with n samples in d >> n
dimensions every fit has n unknowns and needs only the Gram matrix of the data. Newton's method solves many
(position, layer) pairs as one batch. Projecting the data off `w` is a rank-one change of the Gram matrix, so no step
after the first works in d dimensions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from ...core.errors import OrthogonalizeError
from ...core.progress import Progress
from .logistic import Samples, fit_logistic

C = 0.1  # inverse of the regularisation strength, as in eliroc98/refusal_direction
MIN_ACCURACY = 0.55
MAX_RANK = 20
HELD_OUT = 0.2
# Number of Gram matrices that fit into the cache of a CPU.
PAIRS_ON_CPU = 8

Solver = Literal["newton", "sklearn"]
Classifier = Literal["logistic", "svm"]


@dataclass(frozen=True)
class Subspace:
    """A subspace found by INLP: an orthonormal `basis` [k, d] in the order found, and each classifier's accuracy.

    The first direction points to the positive side; accuracies are on held-out samples. `stopped_at` is the accuracy of
    the classifier that ended the search, which is not part of the basis; None if the search ended for another reason.
    """

    basis: torch.Tensor
    accuracies: tuple[float, ...]
    stopped_at: float | None = None

    def __repr__(self) -> str:
        accuracies = f", accuracies {self.accuracies[0]:.2f} to {self.accuracies[-1]:.2f}" if self.accuracies else ""
        return f"Subspace(rank {self.rank}, width {self.basis.shape[-1]}{accuracies})"

    @property
    def rank(self) -> int:
        """The number of directions."""
        return len(self.basis)

    def leading(self, accuracy: float) -> int:
        """The number of directions found before a classifier's accuracy fell below `accuracy`; at least 1."""
        below = [i for i, a in enumerate(self.accuracies) if a < accuracy]
        return max(1, below[0] if below else self.rank)


@dataclass(frozen=True)
class Subspaces:
    """The subspaces of a batch of `shape`; `found[i, j]` is a `Subspace`."""

    shape: tuple[int, ...]
    found: tuple[Subspace, ...]

    def __repr__(self) -> str:
        ranks = [s.rank for s in self.found]
        return (
            f"Subspaces(shape {self.shape}, ranks {min(ranks)} to {max(ranks)}, width {self.found[0].basis.shape[-1]})"
        )

    def __getitem__(self, index: int | tuple[int, ...]) -> Subspace:
        return self.found[int(np.ravel_multi_index(index if isinstance(index, tuple) else (index,), self.shape))]

    def __len__(self) -> int:
        return len(self.found)

    def __iter__(self) -> Iterator[Subspace]:
        return iter(self.found)

    def items(self) -> Iterator[tuple[tuple[int, ...], Subspace]]:
        """Every index with its subspace."""
        return zip(product(*map(range, self.shape)), self.found, strict=True)

    @property
    def rank(self) -> torch.Tensor:
        """The rank at every index, [*shape]."""
        return torch.tensor([s.rank for s in self.found]).reshape(self.shape)

    @property
    def basis(self) -> torch.Tensor:
        """All bases as one tensor [*shape, k, d], padded with zeros to the largest rank k."""
        most = max(s.rank for s in self.found)
        filled = [torch.cat([s.basis, s.basis.new_zeros(most - s.rank, s.basis.shape[1])]) for s in self.found]
        return torch.stack(filled).reshape(*self.shape, most, -1)

    @property
    def accuracies(self) -> torch.Tensor:
        """All accuracies as one tensor [*shape, k], padded with NaN to the largest rank k."""
        most = max(s.rank for s in self.found)
        rows = [[*s.accuracies, *[float("nan")] * (most - s.rank)] for s in self.found]
        return torch.tensor(rows, dtype=torch.float64).reshape(*self.shape, most)


def stratified_split(
    positive: int, negative: int, seed: int, share: float = HELD_OUT
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers to fit on and to hold out; the same share of each side is held out, but at least two.

    Rows 0 to `positive` - 1 are positive, the rest negative.
    """
    generator = torch.Generator().manual_seed(seed)
    fit, held = [], []
    for start, count in ((0, positive), (positive, negative)):
        order = start + torch.randperm(count, generator=generator)
        out = _held_out_count(count, share)
        held.append(order[:out])
        fit.append(order[out:])
    return torch.cat(fit), torch.cat(held)


def _held_out_count(count: int, share: float = HELD_OUT) -> int:
    return max(2, round(count * share))


def _largest_rank(fitted: int, width: int, wanted: int | None) -> int:
    """The largest rank to search for: `wanted`, if the samples allow it, or the default.

    Raises:
        OrthogonalizeError: the samples do not allow it.
    """
    possible = min(fitted - 1, width)  # centring removes one dimension
    if wanted is None:
        return min(MAX_RANK, possible)
    if wanted > width:
        raise OrthogonalizeError(f"rank {wanted} exceeds the width of the residual stream, {width}")
    if wanted > possible:
        side = next(n for n in range(4, 10 * wanted + 20) if 2 * (n - _held_out_count(n)) > wanted)
        raise OrthogonalizeError(
            f"rank {wanted} needs at least {wanted + 1} samples to fit (about {side} prompts per side, with a fifth "
            f"held out), but there are {fitted}; give more prompts or a smaller rank"
        )
    return wanted


def inlp(
    positive: torch.Tensor,
    negative: torch.Tensor,
    max_rank: int | None = None,
    min_accuracy: float = MIN_ACCURACY,
    seed: int = 0,
    solver: Solver = "newton",
    classifier: Classifier = "logistic",
    progress: Progress | None = None,
) -> Subspace | Subspaces:
    """Find directions that separate the two sides, one after another.

    Each step projects the samples off the previous directions and fits an L2-regularised classifier: logistic
    regression that minimises `|w|^2 / 2 + C sum(log loss)` with C = 0.1 and a free intercept (scikit-learn's
    objective). The search ends at the first classifier whose balanced accuracy on a stratified held-out fifth is below
    `min_accuracy`.

    Args:
        positive, negative: activations [n, d] and [m, d], or [n, ..., d] and [m, ..., d] for a batch
            of problems on the same prompts. The problems are solved in float64, on the device of the tensors.
        max_rank: the maximum number of directions; by default 20, or as many as the samples allow.
        min_accuracy: balanced accuracy below which the search ends.
        seed: seed of the split.
        solver: `newton` solves all problems as one batch; `sklearn` fits scikit-learn's classifiers one by one.
        classifier: `logistic`, or (with `sklearn`) `svm`, a linear support vector machine.
        progress: called with the number of problems just solved.

    Returns:
        A `Subspace`, or `Subspaces` of shape [...] for a batch.

    Raises:
        OrthogonalizeError: a side has fewer than 4 samples, `max_rank` needs more, samples are not finite, or the
            shapes do not match.
    """
    if positive.dim() < 2 or positive.shape[1:] != negative.shape[1:]:
        raise OrthogonalizeError(
            f"INLP takes two sets of activations of the same width, [n, d] or [n, ..., d]; got "
            f"{list(positive.shape)} and {list(negative.shape)}"
        )
    if min(len(positive), len(negative)) < 4:
        raise OrthogonalizeError("INLP needs at least 4 samples on each side")
    if classifier == "svm" and solver != "sklearn":
        raise OrthogonalizeError("--classifier svm needs --solver sklearn")
    shape, width = positive.shape[1:-1], positive.shape[-1]
    fit, held = stratified_split(len(positive), len(negative), seed)
    most = _largest_rank(len(fit), width, max_rank)
    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).to(positive.device, torch.float64)
    samples = torch.cat([positive, negative]).reshape(len(labels), -1, width).transpose(0, 1)
    size = PAIRS_ON_CPU if samples.device.type == "cpu" else len(samples)

    def search(part: torch.Tensor) -> list[Subspace]:
        if not torch.isfinite(part).all():
            raise OrthogonalizeError("the activations given to INLP are NaN or infinite")
        wide = part.to(torch.float64)
        if solver == "newton":
            return _search(wide, labels, fit.to(wide.device), held.to(wide.device), most, min_accuracy)
        return [_search_sklearn(one, labels, fit, held, most, min_accuracy, classifier) for one in wide]

    found: list[Subspace] = []
    # Filters of warnings, which the scikit-learn solver needs, are not thread-safe.
    workers = torch.get_num_threads() if solver == "newton" else 1
    for part in _map_in_threads(search, torch.split(samples, size), workers):
        found += part
        if progress:
            progress(len(part))
    return Subspaces(tuple(shape), tuple(found)) if shape else found[0]


def _map_in_threads(
    search: Callable[[torch.Tensor], list[Subspace]], parts: Sequence[torch.Tensor], workers: int
) -> Iterator[list[Subspace]]:
    """The results of `search` for every part, in order; on a CPU by `workers` threads, each of which computes alone.

    For matrices of a few hundred rows, several threads per operation cost more than they gain.
    """
    if parts[0].device.type != "cpu":
        yield from map(search, parts)
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(workers, "inlp", torch.set_num_threads, (1,))
    try:
        with threadpool_limits(1, user_api="blas"):
            yield from pool.map(search, parts)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _balanced_accuracy(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean recall of the two sides for scores [..., n], positive above 0, and labels [n] of 0 and 1."""
    right = ((scores > 0) == (labels > 0)).to(torch.float64)
    recalls: list[torch.Tensor] = [right[..., labels == label].mean(-1) for label in (0, 1)]
    return torch.stack(recalls).mean(0)


def _search(
    samples: torch.Tensor, labels: torch.Tensor, fit: torch.Tensor, held: torch.Tensor, most: int, min_accuracy: float
) -> list[Subspace]:
    """INLP on a batch of samples [pairs, n, d] in float64."""
    centre = samples[:, fit].mean(1, keepdim=True)  # a shift of the data only changes the intercept
    fitted = samples[:, fit] - centre
    data = Samples(fitted, samples[:, held] - centre)
    pairs = len(samples)
    alive = list(range(pairs))
    coefficients: list[list[torch.Tensor]] = [[] for _ in range(pairs)]
    accuracies: list[list[float]] = [[] for _ in range(pairs)]
    stopped: list[float | None] = [None] * pairs
    for _ in range(most):
        dual, intercept, margins = fit_logistic(data, labels[fit], C)
        accuracy = _balanced_accuracy(data.held_scores(dual) + intercept[:, None], labels[held])
        spread = (margins - intercept[:, None]).abs().amax(-1)
        learnt = spread > 100 * C * data.noise  # otherwise only rounding errors are left
        keep = learnt & (accuracy >= min_accuracy)
        rows = list(zip(alive, accuracy.tolist(), learnt.tolist(), keep.tolist(), strict=True))
        for pair, share, some, kept in rows:
            if kept:
                accuracies[pair].append(share)
            elif some:
                stopped[pair] = share
        alive, data, dual = [pair for pair, _, _, kept in rows if kept], data.select(keep), dual[keep]
        if not alive:
            break
        for pair, combined in zip(alive, data.project_off(dual), strict=True):
            coefficients[pair].append(combined)
    bases = _bases(coefficients, fitted)
    return [Subspace(*parts) for parts in zip(bases, map(tuple, accuracies), stopped, strict=True)]


def _bases(coefficients: list[list[torch.Tensor]], fitted: torch.Tensor) -> list[torch.Tensor]:
    """Orthonormal bases [k, d] from weights of the samples [pairs, n, d], all pairs of the same rank at once."""
    bases = [fitted.new_zeros(0, fitted.shape[-1])] * len(coefficients)
    by_rank: dict[int, list[int]] = {}
    for pair, rows in enumerate(coefficients):
        by_rank.setdefault(len(rows), []).append(pair)
    for rank, pairs in by_rank.items():
        if rank:
            combined = torch.stack([torch.stack(coefficients[pair]) for pair in pairs])
            for pair, basis in zip(pairs, _orthonormalize_rows(combined @ fitted[pairs]), strict=True):
                bases[pair] = basis.clone()
    return bases


def _orthonormalize_rows(rows: torch.Tensor) -> torch.Tensor:
    """Orthonormalize nearly orthonormal rows [..., k, d] to full precision; keeps their order and signs."""
    q, r = torch.linalg.qr(rows.mT)
    signed: torch.Tensor = q * torch.sign(r.diagonal(dim1=-2, dim2=-1))[..., None, :]
    return signed.mT.contiguous()


def _search_sklearn(
    samples: torch.Tensor,
    labels: torch.Tensor,
    fit: torch.Tensor,
    held: torch.Tensor,
    most: int,
    min_accuracy: float,
    classifier: Classifier,
) -> Subspace:
    """INLP on samples [n, d] with scikit-learn's classifiers, in coordinates of the span of the fitted samples."""
    from sklearn.exceptions import ConvergenceWarning

    fitted = samples[fit]
    centre = fitted.mean(0)
    _, singular, frame = torch.linalg.svd(fitted - centre, full_matrices=False)
    frame = frame[singular > 1e-10 * singular[:1]]
    coordinates = (samples - centre) @ frame.mT
    found: list[torch.Tensor] = []
    accuracies: list[float] = []
    stopped = None
    while len(found) < min(most, len(frame)):
        model = _sklearn_classifier(classifier)
        with warnings.catch_warnings():
            # If the Newton step is undefined, scikit-learn warns and uses L-BFGS.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(coordinates[fit].cpu().numpy(), labels[fit].cpu().numpy())
        weight = torch.from_numpy(model.coef_[0]).to(samples)
        scores = torch.from_numpy(model.decision_function(coordinates[held].cpu().numpy())).to(samples)
        if weight.norm() <= 1e-12 / singular[0]:
            break
        accuracy = _balanced_accuracy(scores, labels[held]).item()
        if accuracy < min_accuracy:
            stopped = accuracy
            break
        for _ in range(2):  # twice is enough: the second pass removes what rounding left
            for other in found:
                weight = weight - (weight @ other) * other
        found.append(weight / weight.norm())
        accuracies.append(accuracy)
        coordinates = coordinates - (coordinates @ found[-1])[:, None] * found[-1]
    basis = torch.stack(found) @ frame if found else frame[:0]
    return Subspace(basis, tuple(accuracies), stopped)


def _sklearn_classifier(classifier: Classifier) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    if classifier == "svm":
        return LinearSVC(C=C, tol=1e-6, max_iter=100_000)
    return LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10, max_iter=500)
