"""INLP against scikit-learn, classifier by classifier, and on degenerate inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.samples import two_sides
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import orthonormal
from orthogonalize.directions.inlp.logistic import Samples, fit_batch, fit_logistic
from orthogonalize.directions.inlp.newton import fit_by_newton
from orthogonalize.directions.inlp.nullspace import Subspace, inlp, stratified_split


def published_inlp(positive, negative, rank, seed=0):
    """Ravfogel et al.'s loop with scikit-learn in all d dimensions, on the same split, balanced accuracy."""
    x = torch.cat([positive, negative]).double().numpy()
    y = np.r_[np.ones(len(positive)), np.zeros(len(negative))]
    fit, held = (rows.numpy() for rows in stratified_split(len(positive), len(negative), seed))
    projected, found, accuracies = x, [], []
    for _ in range(rank):
        classifier = LogisticRegression(C=0.1, solver="newton-cholesky", tol=1e-12, max_iter=1000)
        classifier.fit(projected[fit], y[fit])
        right = classifier.predict(projected[held]) == y[held]
        accuracies.append((right[y[held] == 1].mean() + right[y[held] == 0].mean()) / 2)
        found.append(classifier.coef_[0])
        basis = np.linalg.qr(np.array(found).T)[0]
        projected = x - x @ basis @ basis.T
    return orthonormal(torch.tensor(np.array(found))), accuracies


def assert_agrees(mine, theirs, accuracies, at_least=5):
    assert mine.rank >= at_least
    for i, (a, b) in enumerate(zip(mine.basis, theirs, strict=False)):
        assert abs((a @ b).item()) >= 0.9999, i
        if i >= at_least and mine.accuracies[i] != pytest.approx(accuracies[i]):
            break  # from here on the two search different residuals
    assert list(mine.accuracies[:at_least]) == pytest.approx(accuracies[:at_least])


@pytest.mark.parametrize(
    ("n", "m", "d", "directions"),
    [(40, 40, 12, 8), (60, 60, 40, 8), (20, 20, 300, 8), (400, 400, 24, 8), (70, 25, 48, 8), (12, 12, 1200, 5)],
    ids=["n > d", "n about d", "d > n", "n >> d", "unbalanced sides", "d >> n"],
)
def test_every_direction_equals_scikit_learns(n, m, d, directions):
    """Where d >> n each classifier is some ten times weaker than the last, which costs both of them digits."""
    positive, negative = two_sides(n, d, m=m)
    mine = inlp(positive, negative, max_rank=directions, min_accuracy=0.0)
    assert_agrees(mine, *published_inlp(positive, negative, directions))


def test_repeated_samples_count_as_often_as_they_occur():
    positive, negative = (torch.cat([side, side[:10], side[:10]]) for side in two_sides(30, 100))
    assert_agrees(inlp(positive, negative, 6, min_accuracy=0.0), *published_inlp(positive, negative, 6))


def test_constant_features_are_never_part_of_a_direction():
    positive, negative = two_sides(30, 50)
    positive[:, 7], negative[:, 7] = 1e4, 1e4
    found = inlp(positive, negative, 5, min_accuracy=0.0)
    assert found.basis[:, 7].abs().max() < 1e-9
    positive[:, 7], negative[:, 7] = 0, 0
    assert torch.allclose(inlp(positive, negative, 5, min_accuracy=0.0).basis, found.basis, atol=1e-7)


def test_widely_separated_sides_converge_to_scikit_learns():
    positive, negative = two_sides(40, 80, gap=60.0)
    assert_agrees(inlp(positive, negative, 5, min_accuracy=0.0), *published_inlp(positive, negative, 5))


@pytest.mark.parametrize("d", [16, 700])
def test_batch_equals_its_problems_solved_alone(d):
    sides = [two_sides(24, d, gap=g, seed=i) for i, g in enumerate((0.3, 1.0, 3.0, 0.0, 1.5, 2.0))]
    positive, negative = (torch.stack([s[k] for s in sides], dim=1).reshape(24, 2, 3, d) for k in (0, 1))
    found = inlp(positive, negative, 6)
    assert found.shape == (2, 3)
    for (i, j), one in found.items():
        alone = inlp(positive[:, i, j], negative[:, i, j], 6)
        assert one.accuracies == alone.accuracies
        assert torch.allclose(one.basis, alone.basis, atol=1e-8)
        assert found[i, j] is one
    assert found.basis.shape == (2, 3, found.rank.max(), d)
    assert torch.isnan(found.accuracies).sum() == found.rank.max() * 6 - found.rank.sum()


def test_basis_is_orthonormal_signed_and_stops_in_time():
    """The first direction points to the positive side; none below the accuracy threshold is kept."""
    positive, negative = two_sides()
    found = inlp(positive, negative)
    identity = torch.eye(found.rank, dtype=torch.float64)
    assert torch.allclose(found.basis @ found.basis.T, identity, atol=1e-12)
    assert ((positive.mean(0) - negative.mean(0)).double() @ found.basis[0]) > 0
    assert all(a >= 0.55 for a in found.accuracies)
    assert found.stopped_at < 0.55
    assert 1 <= found.rank < 20


def test_long_basis_stays_orthonormal():
    """Each direction leaves less of the data; Gram matrices updated from each other would lose it."""
    positive, negative = two_sides(40, 200, gap=4.0)
    found = inlp(positive, negative, max_rank=30, min_accuracy=0.0)
    assert found.rank >= 12
    assert (found.basis @ found.basis.T - torch.eye(found.rank, dtype=torch.float64)).abs().max() < 1e-12


def test_large_samples_and_weak_classifiers_lose_no_precision():
    """As in late layers: samples of norm in the hundreds, and weights that shrink towards rounding error."""
    positive, negative = two_sides(40, 576, gap=6.0, seed=7)
    scale = 30 * torch.exp(1.5 * torch.randn(576, generator=torch.Generator().manual_seed(2)))
    positive, negative = positive * scale, negative * scale
    found = inlp(positive, negative, max_rank=18, min_accuracy=0.0)
    assert found.rank == 18
    assert_agrees(found, *published_inlp(positive, negative, 5))
    # The directions as combinations of the samples, before they are refined.
    x = torch.cat([positive, negative]).double()[None]
    x = x - x.mean(1, keepdim=True)
    data, labels = Samples(x, x), torch.tensor([1.0] * 40 + [0.0] * 40).double()
    combinations = [data.project_off(fit_logistic(data, labels, 0.1)[0]) for _ in range(18)]
    rows = torch.cat(combinations) @ x[0]
    assert (rows @ rows.T - torch.eye(18, dtype=torch.float64)).abs().max() < 1e-9


def test_indistinguishable_sides_have_no_subspace():
    same = torch.randn(200, 30, generator=torch.Generator().manual_seed(1))
    assert inlp(same[:100], same[100:]).rank <= 3
    assert inlp(torch.ones(10, 4), torch.ones(10, 4)).rank == 0
    assert inlp(torch.ones(30, 4), torch.ones(10, 4)).rank == 0  # unequal sizes alone give no direction


def test_leading_directions_end_where_the_accuracy_falls():
    found = Subspace(torch.eye(4), (1.0, 0.995, 0.97, 0.99))
    assert [found.leading(a) for a in (0.99, 0.95, 0.5, 1.1)] == [2, 4, 4, 1]


@pytest.mark.parametrize("classifier", ["logistic", "svm"])
def test_scikit_learn_classifiers_can_be_chosen(classifier):
    positive, negative = two_sides(30, 60)
    found = inlp(positive, negative, 4, min_accuracy=0.0, solver="sklearn", classifier=classifier)
    assert torch.allclose(found.basis @ found.basis.T, torch.eye(4, dtype=torch.float64), atol=1e-10)
    own = inlp(positive, negative, 4, min_accuracy=0.0)
    cosines = (found.basis * own.basis).sum(-1)
    assert (cosines > 0.9999).all() if classifier == "logistic" else cosines[0] > 0.7


def test_unsuitable_input_is_refused():
    with pytest.raises(OrthogonalizeError, match="at least 4"):
        inlp(torch.randn(3, 4), torch.randn(10, 4))
    with pytest.raises(OrthogonalizeError, match="NaN"):
        inlp(torch.full((8, 4), float("nan")), torch.randn(8, 4))
    with pytest.raises(OrthogonalizeError, match="the same width"):
        inlp(torch.randn(8, 4), torch.randn(8, 5))
    with pytest.raises(OrthogonalizeError, match="--solver sklearn"):
        inlp(torch.randn(8, 4), torch.randn(8, 4), classifier="svm")
    with pytest.raises(OrthogonalizeError, match="rank 5 exceeds the width of the residual stream, 4"):
        inlp(torch.randn(80, 4), torch.randn(80, 4), max_rank=5)


def test_too_few_samples_for_a_rank_states_how_many_are_needed():
    with pytest.raises(OrthogonalizeError, match=r"at least 21 samples to fit \(about 14 prompts per side"):
        inlp(torch.randn(10, 64), torch.randn(10, 64), max_rank=20)
    assert inlp(*two_sides(14, 64), max_rank=20, min_accuracy=0.0).rank > 5  # enough samples to ask for that rank


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from([(6, 4), (9, 30), (25, 8)]), st.floats(0.01, 100.0))
def test_newton_solution_has_zero_gradient(seed, shape, scale):
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    x = x - x.mean(1, keepdim=True)
    labels = (torch.arange(shape[0]) % 2).double()
    a, b, margins = fit_logistic(Samples(x, x), labels, 0.1)
    w = (x.mT @ a[..., None])[..., 0]
    left = labels - ((x @ w[..., None])[..., 0] + b[:, None]).sigmoid()
    gradient = w - 0.1 * (x.mT @ left[..., None])[..., 0]
    assert gradient.abs().max() <= 1e-7 * max(1.0, w.abs().max().item()) * max(1.0, scale**2)
    assert left.sum(-1).abs().max() <= 1e-7
    assert torch.allclose(margins, (x @ w[..., None])[..., 0] + b[:, None], atol=1e-6 * scale)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([(6, 8), (25, 40)]), st.floats(0.01, 100.0))
def test_compiled_and_batched_iterations_agree(seed, shape, scale):
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    x = x - x.mean(1, keepdim=True)
    labels = (torch.arange(shape[0]) % 3 > 0).double()
    data = Samples(x, x)
    data.project_off(fit_logistic(data, labels, 0.1)[0])
    for one, other in zip(fit_logistic(data, labels, 0.1), fit_batch(data, labels, 0.1), strict=True):
        assert torch.allclose(one, other, rtol=1e-7, atol=1e-9)


PAIRS, SAMPLES = 2, 5
ARGUMENTS = {
    "grams": (PAIRS, SAMPLES, SAMPLES), "idle": (PAIRS, SAMPLES, 1), "noise": (PAIRS,), "labels": (SAMPLES,),
    "duals": (PAIRS, SAMPLES), "intercepts": (PAIRS,), "margins": (PAIRS, SAMPLES),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("wrong", ["short", "long", "flat", "float32", "frozen", "shared"])
def test_wrong_argument_of_the_compiled_iteration_is_refused(name, wrong):
    given = {each: np.zeros(shape) for each, shape in ARGUMENTS.items()}
    given["labels"][:2] = 1
    filled = name in ("duals", "intercepts", "margins")
    if wrong in ("frozen", "shared") and not filled:
        pytest.skip("it is only read")
    if wrong == "frozen":
        given[name].flags.writeable = False
    elif wrong == "shared":
        given[name] = given["grams"].reshape(-1)[: given[name].size].reshape(given[name].shape)
    else:
        axis = max(given[name].ndim - 2, 0)
        given[name] = {
            "short": np.delete(given[name], 0, axis),
            "long": np.repeat(given[name], 2, axis),
            "flat": given[name].reshape(1, *given[name].shape),
            "float32": given[name].astype(np.float32),
        }[wrong]
    with pytest.raises(ValueError, match="must be"):
        fit_by_newton(**given, c=1.0, tolerance=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_and_cpu_give_the_same_directions():
    positive, negative = (side.reshape(24, 2, 100) for side in two_sides(48, 100))
    here, there = inlp(positive, negative, 5, 0.0), inlp(positive.cuda(), negative.cuda(), 5, 0.0)
    assert torch.allclose(there.basis.cpu(), here.basis, atol=1e-7)
