"""Iterative nullspace projection (Ravfogel et al. 2020), exact and batched, with an ordered basis.

An L2-regularised classifier lies in the span of its samples, so with n samples in d >> n dimensions
every fit is a problem in n unknowns: the weights are `w = X^T a`, and all that is needed of the data is
their Gram matrix. Newton's method solves it, many (position, layer) pairs as one batch. Projecting the
data off `w` changes the Gram matrix by one rank, so no step after the first sees d dimensions at all.
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

C = 0.1  # inverse regularisation, as in eliroc98/refusal_direction
MIN_ACCURACY = 0.55
MAX_RANK = 20
HELD_OUT = 0.2
# On a CPU, so many Gram matrices at a time stay in its cache.
PAIRS_ON_CPU = 8

Solver = Literal["newton", "sklearn"]
Classifier = Literal["logistic", "svm"]


@dataclass(frozen=True)
class Subspace:
    """What INLP found: `basis` [k, d] orthonormal, in the order found, and each classifier's held-out accuracy.

    The first direction points towards the positive side. The classifier that ended the search is not
    part of it; its accuracy is `stopped_at`, None where the search ended for another reason.
    """

    basis: torch.Tensor
    accuracies: tuple[float, ...]
    stopped_at: float | None = None

    @property
    def rank(self) -> int:
        return len(self.basis)

    def leading(self, accuracy: float) -> int:
        """How many directions were found before a classifier fell under `accuracy`; at least the first."""
        below = [i for i, a in enumerate(self.accuracies) if a < accuracy]
        return max(1, below[0] if below else self.rank)


@dataclass(frozen=True)
class Subspaces:
    """One subspace for every index of a batch of `shape`; `found[i, j]` is a `Subspace`."""

    shape: tuple[int, ...]
    found: tuple[Subspace, ...]

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
        """All bases as one tensor [*shape, k, d], filled up with zeros to the largest rank k."""
        most = max(s.rank for s in self.found)
        filled = [torch.cat([s.basis, s.basis.new_zeros(most - s.rank, s.basis.shape[1])]) for s in self.found]
        return torch.stack(filled).reshape(*self.shape, most, -1)

    @property
    def accuracies(self) -> torch.Tensor:
        """All accuracies as one tensor [*shape, k], filled up with NaN to the largest rank k."""
        most = max(s.rank for s in self.found)
        rows = [[*s.accuracies, *[float("nan")] * (most - s.rank)] for s in self.found]
        return torch.tensor(rows, dtype=torch.float64).reshape(*self.shape, most)


def stratified_split(
    positive: int, negative: int, seed: int, share: float = HELD_OUT
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers for fitting and for the held-out check, the same share of each side held out.

    Rows 0 to `positive` - 1 are positive, the rest negative. At least two of each side are held out.
    """
    generator = torch.Generator().manual_seed(seed)
    fit, held = [], []
    for start, count in ((0, positive), (positive, negative)):
        order = start + torch.randperm(count, generator=generator)
        out = _held_out(count, share)
        held.append(order[:out])
        fit.append(order[out:])
    return torch.cat(fit), torch.cat(held)


def _held_out(count: int, share: float = HELD_OUT) -> int:
    return max(2, round(count * share))


def _largest_rank(fitted: int, width: int, wanted: int | None) -> int:
    """The rank to search to: what was `wanted`, refused where the samples cannot give it."""
    possible = min(fitted - 1, width)  # one dimension of n samples is their mean's
    if wanted is None:
        return min(MAX_RANK, possible)
    if wanted > width:
        raise OrthogonalizeError(f"rank {wanted} was asked for, and the residual stream has {width} dimensions")
    if wanted > possible:
        side = next(n for n in range(4, 10 * wanted + 20) if 2 * (n - _held_out(n)) > wanted)
        raise OrthogonalizeError(
            f"rank {wanted} needs at least {wanted + 1} samples to fit (about {side} prompts a side, with a fifth "
            f"held out), and there are {fitted}; give more prompts or a smaller rank"
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
    """Find the directions along which the two sides can be told apart, one after the other.

    Each step fits an L2-regularised classifier on what the previous directions leave: logistic
    regression that minimises `|w|^2 / 2 + C sum(log loss)` with C = 0.1 and a free intercept
    (scikit-learn's objective). The direction is kept if the classifier is right on at least
    `min_accuracy` of a stratified held-out fifth; where the sides differ in size, each counts half.

    Args:
        positive, negative: activations [n, d] and [m, d], or [n, ..., d] and [m, ..., d] for a batch
            of problems on the same prompts. Solved in float64, on the device of the tensors.
        max_rank: the most directions to keep; by default 20, or fewer where the samples allow fewer.
        seed: of the split.
        solver: `newton` solves all problems as one batch; `sklearn` fits scikit-learn's classifiers
            one by one.
        classifier: `logistic`, or (with `sklearn`) `svm`, a linear support vector machine.
        progress: called with the number of problems that are done.

    Returns:
        A `Subspace`, or `Subspaces` of shape [...] for a batch.

    Raises:
        OrthogonalizeError: fewer than 4 samples on a side or fewer than `max_rank` needs, samples
            that are not finite, or shapes that do not fit.
    """
    if positive.dim() < 2 or positive.shape[1:] != negative.shape[1:]:
        raise OrthogonalizeError(
            f"INLP takes two sets of activations of one width, [n, d] or [n, ..., d]; got "
            f"{list(positive.shape)} and {list(negative.shape)}"
        )
    if min(len(positive), len(negative)) < 4:
        raise OrthogonalizeError("INLP needs at least 4 samples on each side")
    if classifier == "svm" and solver != "sklearn":
        raise OrthogonalizeError("the support vector machine is scikit-learn's; give --solver sklearn with it")
    shape, width = positive.shape[1:-1], positive.shape[-1]
    fit, held = stratified_split(len(positive), len(negative), seed)
    most = _largest_rank(len(fit), width, max_rank)
    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).to(positive.device, torch.float64)
    samples = torch.cat([positive, negative]).reshape(len(labels), -1, width).transpose(0, 1)
    size = PAIRS_ON_CPU if samples.device.type == "cpu" else len(samples)

    def search(part: torch.Tensor) -> list[Subspace]:
        if not torch.isfinite(part).all():
            raise OrthogonalizeError("INLP was given NaN or infinite activations")
        wide = part.to(torch.float64)
        if solver == "newton":
            return _search(wide, labels, fit.to(wide.device), held.to(wide.device), most, min_accuracy)
        return [_search_sklearn(one, labels, fit, held, most, min_accuracy, classifier) for one in wide]

    found: list[Subspace] = []
    # scikit-learn's warnings are kept back in a way that threads would undo for each other.
    workers = torch.get_num_threads() if solver == "newton" else 1
    for part in _in_parallel(search, torch.split(samples, size), workers):
        found += part
        if progress:
            progress(len(part))
    return Subspaces(tuple(shape), tuple(found)) if shape else found[0]


def _in_parallel(
    search: Callable[[torch.Tensor], list[Subspace]], parts: Sequence[torch.Tensor], workers: int
) -> Iterator[list[Subspace]]:
    """`search` of every part, in order; on a CPU by so many `workers`, each of which computes in one thread.

    For matrices of a few hundred rows more threads an operation cost more than they gain.
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
    """Mean over both sides of the share on the right side of 0: scores [..., n], labels [n] of 0 and 1."""
    right = ((scores > 0) == (labels > 0)).to(torch.float64)
    recalls: list[torch.Tensor] = [right[..., labels == label].mean(-1) for label in (0, 1)]
    return torch.stack(recalls).mean(0)


def _search(
    samples: torch.Tensor, labels: torch.Tensor, fit: torch.Tensor, held: torch.Tensor, most: int, min_accuracy: float
) -> list[Subspace]:
    """INLP on a batch of samples [pairs, n, d] in float64."""
    centre = samples[:, fit].mean(1, keepdim=True)  # the free intercept makes any shift of the data immaterial
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
        learnt = spread > 100 * C * data.noise  # else nothing but rounding is left to learn from
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
    """Orthonormal bases [k, d] from combinations of the samples [pairs, n, d], all pairs of one rank together."""
    bases = [fitted.new_zeros(0, fitted.shape[-1])] * len(coefficients)
    by_rank: dict[int, list[int]] = {}
    for pair, rows in enumerate(coefficients):
        by_rank.setdefault(len(rows), []).append(pair)
    for rank, pairs in by_rank.items():
        if rank:
            combined = torch.stack([torch.stack(coefficients[pair]) for pair in pairs])
            for pair, basis in zip(pairs, _polished(combined @ fitted[pairs]), strict=True):
                bases[pair] = basis.clone()
    return bases


def _polished(rows: torch.Tensor) -> torch.Tensor:
    """Nearly orthonormal rows [..., k, d] made orthonormal to the last bit, in order and with their signs."""
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
    """INLP on samples [n, d] with scikit-learn's classifiers, in coordinates of the fitted samples' span."""
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
            # Where the data leave the Newton step undefined, scikit-learn says so and uses L-BFGS.
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
