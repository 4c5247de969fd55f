"""Conditional maps: theorems about the ridge regression that they solve."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import ConditionalMap, orthonormal
from orthogonalize.directions.conditional import InputMoments, solve_from_moments, solve_from_samples

D, N, K = 10, 14, 2


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int = 0, tokens: int = 60, inputs: int = N):
    """Directions, a write matrix, and inputs of target, harmless and preserved tokens with different spreads."""
    r, weight = orthonormal(drawn(seed, K, D)), drawn(seed + 1, D, inputs)
    target = drawn(seed + 2, tokens, inputs) + 2 * drawn(seed + 3, inputs)
    harmless, preserved = 0.7 * drawn(seed + 4, 2 * tokens, inputs), drawn(seed + 5, tokens, inputs)
    return r, weight, target, harmless, preserved


def with_values(r, weight, inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return inputs, inputs @ weight.mT @ r.mT


def moments(*pair: torch.Tensor) -> InputMoments:
    return InputMoments(pair[0].shape[-1], pair[1].shape[-1] if len(pair) > 1 else 0).update(*pair)


def objective(c, r, weight, target, harmless, preserved, w_t, w_k, ridge):
    m = (harmless @ weight.mT @ r.mT).mean(0)
    scale = ridge * (harmless.square().mean() + w_k * preserved.square().mean())
    lost = (target @ weight.mT @ r.mT - m - target @ c.mT).square().sum(-1).mean()
    moved = (harmless @ c.mT).square().sum(-1).mean() + w_k * (preserved @ c.mT).square().sum(-1).mean()
    return w_t * lost + moved + scale * c.square().sum()


@given(st.integers(0, 50), st.floats(0.01, 10), st.floats(0, 10), st.floats(1e-3, 1))
@settings(max_examples=25, deadline=None)
def test_the_solution_has_no_gradient(seed, w_t, w_k, ridge):
    """The normal equations hold: autograd's derivative of the objective vanishes at the solution."""
    r, weight, target, harmless, preserved = problem(seed)
    found = solve_from_samples(
        r, with_values(r, weight, target), with_values(r, weight, harmless), [preserved],
        target_weight=w_t, preserve_weight=w_k, ridge=ridge,
    )  # fmt: skip
    c = found.c.clone().requires_grad_()
    value = objective(c, r, weight, target, harmless, preserved, w_t, w_k, ridge)
    (slope,) = torch.autograd.grad(value, c)
    zero = torch.zeros_like(c, requires_grad=True)
    value = objective(zero, r, weight, target, harmless, preserved, w_t, w_k, ridge)
    (at_zero,) = torch.autograd.grad(value, zero)
    assert slope.norm() <= 1e-9 * at_zero.norm()


def test_scikit_learn_solves_the_same_regression():
    """Ridge on the stacked tokens: target rows with their values, all others with 0."""
    r, weight, target, harmless, preserved = problem(3)
    w_t, w_k, ridge = 0.3, 2.0, 0.05
    found = solve_from_samples(
        r, with_values(r, weight, target), with_values(r, weight, harmless), [preserved],
        target_weight=w_t, preserve_weight=w_k, ridge=ridge,
    )  # fmt: skip
    values = target @ weight.mT @ r.mT - (harmless @ weight.mT @ r.mT).mean(0)
    x = torch.cat([target, harmless, preserved])
    y = torch.cat([values, torch.zeros(len(harmless) + len(preserved), K)])
    each = [(w_t, target), (1.0, harmless), (w_k, preserved)]
    weights = np.concatenate([np.full(len(rows), w / len(rows)) for w, rows in each])
    alpha = ridge * (harmless.square().mean() + w_k * preserved.square().mean()).item()
    theirs = Ridge(alpha=alpha, fit_intercept=False, solver="cholesky").fit(x.numpy(), y.numpy(), sample_weight=weights)
    assert np.allclose(found.c.numpy(), theirs.coef_, rtol=0, atol=1e-9 * np.abs(theirs.coef_).max())


@pytest.mark.parametrize("tokens", [3, 8])
def test_dual_and_primal_solutions_agree(tokens):
    r, weight, target, harmless, preserved = problem(7, tokens, inputs=64)
    pairs = with_values(r, weight, target), with_values(r, weight, harmless)
    how = {"target_weight": 0.2, "preserve_weight": 3.0, "ridge": 1e-3}
    dual = solve_from_samples(r, *pairs, [preserved], **how)
    primal = solve_from_moments(r, *(moments(*pair) for pair in pairs), [moments(preserved)], **how)
    assert 4 * tokens < 64, "the dual is the smaller system here"
    assert (dual.c - primal.c).norm() <= 1e-9 * primal.c.norm()


def test_a_large_target_weight_is_ablation_on_the_target_span():
    """Targets that span every input: C tends to R W, and the edit to the plain ablation of R."""
    r, weight, target, harmless, _ = problem(11)
    zero = torch.zeros(K, dtype=torch.float64)
    found = solve_from_samples(
        r, with_values(r, weight, target), with_values(r, weight, harmless), origin=zero, target_weight=1e12
    )
    ablated = weight - r.mT @ (r @ weight)
    assert (found.edit(weight) - ablated).norm() <= 1e-9 * weight.norm()


def test_targets_outside_the_harmless_span_cost_harmless_nothing():
    """Removed on the target, while outputs on harmless inputs do not move, both to 1e-9."""
    r, weight, *_ = problem(13)
    basis = torch.linalg.qr(drawn(14, N, N))[0].mT
    target, harmless = drawn(15, 40, 4) @ basis[:4], drawn(16, 40, N - 4) @ basis[4:]
    found = solve_from_samples(
        r, with_values(r, weight, target), with_values(r, weight, harmless), target_weight=1.0, ridge=1e-12
    )
    m = (harmless @ weight.mT @ r.mT).mean(0)
    edited = found.edit(weight)
    assert ((harmless @ (edited - weight).mT).abs().max() / (harmless @ weight.mT).abs().max()) <= 1e-9
    wanted = target @ weight.mT @ r.mT - m  # a linear map cannot add a constant; it fits what the inputs allow
    fitted = torch.linalg.lstsq(target, wanted).solution
    assert (target @ found.c.mT - target @ fitted).norm() <= 1e-9 * wanted.norm()


def test_heavier_preservation_moves_the_preserved_less():
    """And leaves more of the target; the same holds for the ridge and the size of C."""
    r, weight, target, harmless, preserved = problem(17)
    pairs = with_values(r, weight, target), with_values(r, weight, harmless)
    m = pairs[1][1].mean(0)

    def costs(**how):
        c = solve_from_samples(r, *pairs, [preserved], **how).c
        left = (pairs[0][1] - m - target @ c.mT).square().sum(-1).mean()
        return (preserved @ c.mT).square().sum(-1).mean(), left, c.norm()

    found = [costs(preserve_weight=w) for w in (0.0, 0.1, 1.0, 10.0)]
    assert all(b[0] < a[0] and b[1] > a[1] for a, b in pairwise(found))
    sizes = [costs(ridge=ridge)[2] for ridge in (1e-3, 1e-2, 1e-1, 1.0)]
    assert sizes == sorted(sizes, reverse=True)


def test_streamed_moments_equal_moments_of_all_tokens():
    r, weight, target, *_ = problem(19)
    pair = with_values(r, weight, target)
    streamed = InputMoments(N, K)
    for start in range(0, len(target), 7):
        streamed.update(pair[0][start : start + 7], pair[1][start : start + 7])
    whole = moments(*pair)
    origin = drawn(20, K)
    assert torch.allclose(streamed.second, whole.second, rtol=1e-12)
    assert torch.allclose(streamed.cross(origin), whole.cross(origin), rtol=1e-11)


def test_hook_and_weights_agree():
    """Reading the matrix's input gives what the edited matrix writes; a bias does not matter."""
    r, weight, target, harmless, _ = problem(23)
    found = solve_from_samples(r, with_values(r, weight, target), with_values(r, weight, harmless)).scaled(0.7)
    bias, x = drawn(24, D), drawn(25, 5, 3, N)
    hooked = found(x, x @ weight.mT + bias)
    assert (hooked - (x @ found.edit(weight).mT + bias)).abs().max() <= 1e-12 * hooked.abs().max()


def test_what_cannot_be_solved_is_refused():
    r, weight, target, harmless, _ = problem(29)
    pairs = with_values(r, weight, target), with_values(r, weight, harmless)
    with pytest.raises(OrthogonalizeError, match="target weight above 0"):
        solve_from_samples(r, *pairs, target_weight=0)
    with pytest.raises(OrthogonalizeError, match="is empty"):
        solve_from_samples(r, pairs[0], (pairs[1][0][:0], pairs[1][1][:0]))
    flat = [(x * (torch.arange(N) < 3), y) for x, y in pairs]
    with pytest.raises(OrthogonalizeError, match="needs a ridge above 0"):
        solve_from_samples(r, *flat, ridge=0)
    with pytest.raises(ValueError, match="map shapes do not fit"):
        ConditionalMap(r, torch.zeros(K + 1, N))
