"""Iterative nullspace projection (Ravfogel et al. 2020) with an ordered basis.

With fewer samples than dimensions, an L2-regularised classifier lies in the span of the data, so
every fit is done in coordinates of that span: the same solution, in n instead of d dimensions.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from .errors import OrthogonalizeError
from .interventions import orthonormal

C = 0.1  # inverse regularisation, as in eliroc98/refusal_direction
MIN_ACCURACY = 0.55


@dataclass(frozen=True)
class Subspace:
    """What INLP found: `basis` [k, d] orthonormal, in the order found, and each classifier's held-out accuracy.

    The first direction points towards the positive side. The classifier that stopped the search is
    not part of it.
    """

    basis: torch.Tensor
    accuracies: tuple[float, ...]

    @property
    def rank(self) -> int:
        return len(self.basis)


def stratified_split(positive: int, negative: int, seed: int, share: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers for fitting and for the held-out check, the same share of each side held out.

    Rows 0 to `positive` - 1 are positive, the rest negative. At least two of each side are held out.
    """
    generator = torch.Generator().manual_seed(seed)
    fit, held = [], []
    for start, count in ((0, positive), (positive, negative)):
        order = start + torch.randperm(count, generator=generator)
        out = max(2, round(count * share))
        held.append(order[:out])
        fit.append(order[out:])
    return torch.cat(fit), torch.cat(held)


def inlp(
    positive: torch.Tensor,
    negative: torch.Tensor,
    max_rank: int = 20,
    min_accuracy: float = MIN_ACCURACY,
    seed: int = 0,
) -> Subspace:
    """Find the directions along which the two sides can be told apart, one after the other.

    Each step fits an L2-regularised logistic regression (C = 0.1) on what the previous directions
    leave, and keeps it if it is right on at least `min_accuracy` of a stratified held-out fifth.

    Args:
        positive, negative: activations [n, d] and [m, d].
        max_rank: the most directions to keep.

    Raises:
        OrthogonalizeError: fewer than 4 samples on a side, or samples that are not finite.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    samples = torch.cat([positive, negative]).to(torch.float64)
    if min(len(positive), len(negative)) < 4:
        raise OrthogonalizeError("INLP needs at least 4 samples on each side")
    if not torch.isfinite(samples).all():
        raise OrthogonalizeError("INLP was given NaN or infinite activations")
    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).numpy()
    fit, held = (rows.numpy() for rows in stratified_split(len(positive), len(negative), seed))
    # The span of the fitted samples: coordinates [n, r] and frame [r, d] with orthonormal rows.
    _, singular, frame = torch.linalg.svd(samples[fit], full_matrices=False)
    frame = frame[singular > 1e-10 * singular[:1]]
    coordinates = samples @ frame.T
    found: list[torch.Tensor] = []
    accuracies: list[float] = []
    while len(found) < min(max_rank, len(frame)):
        classifier = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-8, max_iter=200)
        with warnings.catch_warnings():
            # Where the data leave the Newton step undefined, scikit-learn says so and uses LBFGS.
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier.fit(coordinates[fit].numpy(), labels[fit])
        accuracy = float(classifier.score(coordinates[held].numpy(), labels[held]))
        weight = torch.from_numpy(classifier.coef_[0])
        basis = orthonormal(torch.stack([*found, weight]))
        if accuracy < min_accuracy or len(basis) == len(found):
            break
        found.append(basis[-1])
        accuracies.append(accuracy)
        coordinates = coordinates - (coordinates @ basis[-1])[:, None] * basis[-1]
    basis = torch.stack(found) @ frame if found else frame[:0]
    return Subspace(basis, tuple(accuracies))
