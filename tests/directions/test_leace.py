"""LEACE: its theorems, two independent ways to compute it, and the concept-erasure package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from concept_erasure import LeaceFitter
from helpers.samples import two_sides
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import oas
from sklearn.linear_model import LogisticRegression

from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.directions.leace import Eraser, Moments, leace, oas_shrinkage

SHAPES = {"n > d": (80, 30, 24), "d > n": (25, 40, 150)}
FORMS = [(False, True), (False, False), (True, False)]


def doubled(n, m, d, seed=0):
    positive, negative = two_sides(n, d, m=m, seed=seed)
    return positive.double() + 3, negative.double() + 3


@pytest.mark.parametrize(("orthogonal", "shrinkage"), FORMS, ids=["shrunk", "plain", "orthogonal"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_eraser_satisfies_the_theorems(shape, orthogonal, shrinkage):
    positive, negative = doubled(*shape)
    eraser = leace(positive, negative, orthogonal=orthogonal, shrinkage=shrinkage)
    after = [eraser(side) for side in (positive, negative)]
    assert (after[0].mean(0) - after[1].mean(0)).abs().max() < 1e-10, "the classes have one mean"
    assert (torch.cat(after).mean(0) - torch.cat([positive, negative]).mean(0)).abs().max() < 1e-10
    assert (eraser(after[0]) - after[0]).abs().max() < 1e-10, "erasing twice is erasing once"
    matrix = eraser.affine().linear(torch.eye(shape[2], dtype=torch.float64))
    assert torch.linalg.matrix_rank(torch.eye(shape[2]) - matrix, rtol=1e-8) == 1


def test_closed_form_moves_the_samples_least():
    """Of all erasers with the theorems' property, LEACE's has the least mean squared change in the norm of S^-1."""
    positive, negative = doubled(*SHAPES["n > d"])
    x = torch.cat([positive, negative])
    centred = x - x.mean(0)
    inverse = torch.linalg.inv(centred.T @ centred / len(x))

    def moved(eraser: Eraser) -> tuple[float, float]:
        change = eraser(x) - x
        return change.pow(2).sum().item(), (change @ inverse * change).sum().item()

    plain, orthogonal = leace(positive, negative, shrinkage=False), leace(positive, negative, orthogonal=True)
    assert moved(plain)[0] < moved(orthogonal)[0]
    assert moved(plain)[1] < moved(orthogonal)[1]


@pytest.mark.parametrize(("orthogonal", "shrinkage"), FORMS, ids=["shrunk", "plain", "orthogonal"])
def test_linear_probe_is_at_chance_on_the_fitted_data(orthogonal, shrinkage):
    positive, negative = doubled(60, 60, 20)
    y = np.r_[np.ones(60), np.zeros(60)]
    eraser = leace(positive, negative, orthogonal=orthogonal, shrinkage=shrinkage)
    before, after = (torch.cat(sides).numpy() for sides in ((positive, negative), (eraser(positive), eraser(negative))))
    probe = LogisticRegression(C=1e6, tol=1e-12, max_iter=10_000)
    assert probe.fit(before, y).score(before, y) > 0.85
    weights = probe.fit(after, y).coef_[0]
    assert np.abs(weights).max() < 1e-6, "the best probe is a constant"
    assert np.abs(probe.predict_proba(after)[:, 1] - 0.5).max() < 1e-6


@pytest.mark.parametrize("form", ["leace", "orth"])
def test_eraser_equals_the_concept_erasure_package(form):
    """Its constrained branch scales the wrong axis (0.2.4), so that is off; its shrinkage is another formula."""
    positive, negative = doubled(*SHAPES["n > d"])
    x, z = torch.cat([positive, negative]), torch.cat([torch.ones(80), torch.zeros(30)]).double()
    theirs = LeaceFitter.fit(x, z, method=form, constrain_cov_trace=False, shrinkage=False, svd_tol=1e-8).eraser
    mine = leace(positive, negative, orthogonal=form == "orth", shrinkage=False)
    assert (mine(x) - theirs(x)).abs().max() < 1e-8


@pytest.mark.parametrize("shrinkage", [True, False])
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 9999))
def test_span_and_streamed_covariance_give_the_same_eraser(shrinkage, seed):
    positive, negative = doubled(14, 11, 32, seed)
    moments = Moments(32)
    for a, b in zip(positive.split(5), negative.split(4), strict=True):
        moments.update(a, b)
    streamed, spanned = moments.eraser(shrinkage=shrinkage), leace(positive, negative, shrinkage=shrinkage)
    for name in ("u", "v", "mean"):
        assert torch.allclose(getattr(streamed, name), getattr(spanned, name), rtol=1e-6, atol=1e-9), name


def test_moments_do_not_depend_on_how_samples_are_split():
    positive, negative = doubled(40, 30, 12)
    whole = Moments(12).update(positive, negative)
    parts = Moments(12)
    for part in positive.split(7):
        parts.update(positive=part)
    for part in negative.split(13):
        parts.update(negative=part)
    assert torch.allclose(parts.scatter, whole.scatter, atol=1e-9)
    assert torch.allclose(parts.means["positive"], positive.mean(0), atol=1e-12)
    pooled = torch.cat([positive - positive.mean(0), negative - negative.mean(0)])
    assert torch.allclose(whole.scatter, pooled.T @ pooled, atol=1e-9)


def test_shrinkage_equals_scikit_learns():
    x = torch.cat(doubled(12, 18, 40))
    centred = x - x.mean(0)
    covariance = centred.T @ centred / len(x)
    _, expected = oas(x.numpy())
    assert oas_shrinkage(covariance.trace(), covariance.pow(2).sum(), 30, 40).item() == pytest.approx(expected)


def test_shrinkage_erases_more_of_unseen_samples():
    """With d >> n the plain inverse fits the samples' noise."""
    positive, negative = doubled(130, 130, 200)
    fitted = [side[:30] for side in (positive, negative)]

    def left(shrinkage: bool) -> float:
        eraser = leace(*fitted, shrinkage=shrinkage)
        unseen = eraser(positive[30:]).mean(0) - eraser(negative[30:]).mean(0)
        return (unseen.norm() / (positive[30:].mean(0) - negative[30:].mean(0)).norm()).item()

    assert left(True) < left(False)


def test_batch_equals_its_problems_solved_alone():
    sides = [doubled(9, 8, 40, seed) for seed in range(4)]
    positive, negative = (torch.stack([s[k] for s in sides], dim=1).reshape(-1, 2, 2, 40) for k in (0, 1))
    found = leace(positive, negative)
    assert found.u.shape == (2, 2, 40)
    for i in range(4):
        alone = leace(*sides[i])
        assert torch.equal(found[divmod(i, 2)].v, alone.v)


def test_sides_with_equal_means_have_nothing_to_erase():
    side = doubled(10, 10, 30)[0]
    eraser = leace(side, side.clone())
    assert eraser.rank == 0
    assert torch.equal(eraser(side), side)
    with pytest.raises(OrthogonalizeError, match="NaN"):
        leace(torch.full((4, 3), float("nan")), torch.zeros(4, 3))
    with pytest.raises(OrthogonalizeError, match="the same width"):
        leace(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(OrthogonalizeError, match="both classes"):
        Moments(3).update(torch.zeros(4, 3)).eraser()
