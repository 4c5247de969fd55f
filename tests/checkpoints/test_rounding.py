"""Rounding keeps the edit: what is left of the component, what that costs, and that every bit is reproducible."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthogonalize.checkpoints.rounding.base import EditStats, Scales
from orthogonalize.checkpoints.tensor_edit import TensorEdit, to_numbers
from orthogonalize.core.interventions import AffineMap, Site, removal

SITE = Site("mlp", 0)
FP8 = torch.float8_e4m3fn


def directions(d: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0].T


def weights(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def oblique(d: int, k: int, seed: int = 2) -> AffineMap:
    """A projection along `u` onto the complement of `v`, with a shift, as LEACE makes it."""
    generator = torch.Generator().manual_seed(seed)
    v = directions(d, k, seed).T
    u = v + 0.5 * torch.randn(d, k, generator=generator, dtype=torch.float64) / d**0.5
    return AffineMap(u @ torch.linalg.inv(v.T @ u), v, 0.01 * torch.randn(d, generator=generator, dtype=torch.float64))


def judged(edit: TensorEdit, weight: torch.Tensor) -> tuple[float, float]:
    """Independently, in float64: the leak, and the rounding error as a multiple of nearest rounding's."""
    edited, record = edit.apply(weight)
    exact = edit.exact(weight)
    component, wanted, before = (edit.component(t) for t in (edited, exact, weight))
    leak = ((component - wanted).norm() / (wanted - before).norm()).item()
    assert record.leak == pytest.approx(leak, rel=0.2, abs=1e-6)
    change = ((edited.double() - weight.double()).norm() / weight.double().norm()).item()
    assert record.change == pytest.approx(change, rel=1e-3)
    nearest = exact.to(weight.dtype).double()
    return leak, ((edited.double() - exact).norm() / (nearest - exact).norm()).item()


@pytest.mark.parametrize(
    ("width", "rank", "dtype", "most_leak", "most_error"),
    [
        (3072, 1, torch.bfloat16, 1e-5, 1.2),
        (8192, 1, torch.bfloat16, 1e-5, 1.2),
        (576, 1, torch.bfloat16, 1e-5, 1.2),
        (2048, 16, torch.bfloat16, 1e-3, 1.2),
        (8192, 16, torch.bfloat16, 1e-3, 1.2),
        (2048, 1, torch.float16, 1e-5, 1.2),
        (2048, 1, torch.float32, 1e-6, 1.2),
        (2048, 1, FP8, 1e-4, 1.4),
        (4096, 1, FP8, 1e-4, 1.4),
    ],
)
def test_leak_and_rounding_error_of_a_projection_are_bounded(width, rank, dtype, most_leak, most_error):
    edit = TensorEdit("w", SITE, 0, removal(directions(width, rank)), "matrix")
    leak, error = judged(edit, weights(width, 200, dtype=dtype))
    assert leak <= most_leak
    assert error <= most_error


def taken(rank: int, vectors: int, size: float) -> torch.Tensor:
    """Given components of a conditional edit, of that size where those of `weights` are 1."""
    return size * torch.randn(rank, vectors, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize(
    ("width", "rank", "size", "dtype", "most_leak"),
    [
        (576, 1, 0.3, torch.bfloat16, 1e-4),
        (576, 1, 0.01, torch.bfloat16, 2e-3),
        (4096, 1, 0.01, torch.bfloat16, 1e-3),
        (4096, 5, 0.01, torch.bfloat16, 1e-2),
        (2048, 1, 0.01, torch.float16, 1e-4),
        (2048, 1, 0.01, FP8, 5e-3),
    ],
)
def test_leak_of_a_conditional_edit_is_bounded(width, rank, size, dtype, most_leak):
    """Against the size of what is taken out, which is small; nearest rounding loses most of it."""
    weight, given = weights(width, 200, dtype=dtype), taken(rank, 200, size)
    r = directions(width, rank)
    edit = TensorEdit("w", SITE, 0, removal(r), "matrix", given=given)
    exact = weight.double() - r.T @ given
    assert torch.allclose(edit.exact(weight), exact, atol=1e-12)
    edited, record = edit.apply(weight)
    leak = ((r @ (edited.double() - exact)).norm() / given.norm()).item()
    assert leak <= most_leak
    assert record.leak == pytest.approx(leak, rel=0.2, abs=3e-6)
    if size < 0.1 and dtype == torch.bfloat16:
        assert edit.apply(weight, "nearest")[1].leak > 0.2


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_given_components_belong_to_their_vectors(axis):
    """Float64 is not rounded: fused experts [4, 6, 5] along every axis, against plain arithmetic."""
    weight = weights(4, 6, 5, dtype=torch.float64)
    d = weight.shape[axis]
    r, given = directions(d, 2), taken(2, weight.numel() // d, 1.0)
    edited, _ = TensorEdit("w", SITE, axis, removal(r), "matrix", given=given).apply(weight)
    vectors = weight.movedim(axis, -1)
    expected = (vectors - (given.T @ r).reshape(vectors.shape)).movedim(-1, axis)
    assert torch.allclose(edited, expected, atol=1e-14)


def test_nearest_rounding_leaks_far_more():
    weight = weights(3072, 200)
    edit = TensorEdit("w", SITE, 0, removal(directions(3072, 1)), "matrix")
    edited, record = edit.apply(weight, "nearest")
    assert record.leak > 1e-3
    exact = edit.exact(weight)
    different = edited != exact.to(torch.bfloat16)  # only at ties in float32 arithmetic
    assert different.double().mean() < 1e-3
    assert (edited.double() - exact).norm() <= (exact.to(torch.bfloat16).double() - exact).norm() * (1 + 1e-6)


MAPS = {
    "projection": lambda d: removal(directions(d, 1)),
    "strength 0.6": lambda d: removal(directions(d, 2), 0.6),
    "mirror": lambda d: removal(directions(d, 1), 2.0),
    "oblique": lambda d: oblique(d, 1),
    "oblique of rank 2": lambda d: oblique(d, 2),
    "shift": lambda d: AffineMap(torch.zeros(d, 0).double(), torch.zeros(d, 0).double(), 0.1 * directions(d, 1)[0]),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(
    ("shape", "axis", "part"),
    [
        ((1024, 130), 0, "matrix"),  # as linear layers are stored
        ((130, 1024), 1, "matrix"),  # transposed
        ((3, 1024, 70), 1, "matrix"),  # fused experts
        ((3, 70, 1024), 2, "matrix"),  # fused experts, transposed
        ((300, 1024), 1, "vectors"),  # an embedding
        ((300, 1024), 1, "read"),
        ((2, 1024, 70), 1, "read"),
    ],
)
def test_leak_and_error_are_bounded_for_every_map_and_layout(name, shape, axis, part):
    """Against the exact edit's component along the map's directions."""
    affine = MAPS[name](1024)
    if part != "vectors" and not affine.rank:
        pytest.skip("a shift acts on vectors of the stream only")
    norm = 1 + 0.4 * torch.randn(1024, generator=torch.Generator().manual_seed(3)) if part == "read" else None
    leak, error = judged(TensorEdit("w", SITE, axis, affine, part, norm), weights(*shape))
    assert leak <= (1e-5 if affine.rank < 2 else 1e-3)
    assert error <= 1.2


def test_read_side_projection_leaves_no_component():
    affine, norm = oblique(512, 1), 1 + 0.4 * torch.randn(512)
    weight = weights(200, 512)
    edited, _ = TensorEdit("w", SITE, 1, affine, "read", norm).apply(weight)
    before = weight.double() * norm.double() @ affine.u
    assert ((edited.double() * norm.double()) @ affine.u).norm() <= 1e-5 * before.norm()


@settings(deadline=None, max_examples=40)
@given(
    d=st.integers(1, 70),
    n=st.integers(1, 140),
    k=st.integers(1, 3),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_result_is_close_to_the_exact_edit(d, n, k, seed, scale, dtype):
    """And along the directions no worse than nearest rounding."""
    weight = (weights(d, n, dtype=torch.float32, seed=seed) * scale).to(dtype)
    edit = TensorEdit("w", SITE, 0, removal(directions(d, min(k, d), seed)), "matrix")
    edited, _ = edit.apply(weight)
    plain, _ = edit.apply(weight, "nearest")
    exact = edit.exact(weight)
    assert torch.isfinite(edited).all()
    floor = 1e-6 * weight.double().norm() + d * n * 2.0**-150

    def lost(t: torch.Tensor) -> torch.Tensor:
        return (edit.component(t) - edit.component(exact)).norm(dim=-1)

    assert (lost(edited) <= lost(plain) * (1 + 1e-3) + floor).all()
    # Never further from the exact value than two units in the last place of the largest entry, plus the error of
    # the arithmetic where nearly all of a vector is removed.
    unit = 2 * torch.finfo(dtype).eps * exact.abs().amax() + torch.finfo(dtype).smallest_normal
    assert (edited.double() - exact).abs().max() <= 2 * unit + 1e-6 * weight.double().abs().max()


@settings(deadline=None, max_examples=25)
@given(cut=st.integers(1, 199), seed=st.integers(0, 100), rows=st.booleans(), k=st.sampled_from([1, 3, 16]))
def test_cutting_a_tensor_changes_no_bit(cut, seed, rows, k):
    weight = weights(200, 96, seed=seed) if rows else weights(96, 200, seed=seed)
    edit = TensorEdit("w", SITE, 1 if rows else 0, removal(directions(96, k, seed)), "matrix")
    whole, _ = edit.apply(weight)
    numbers = to_numbers(weight.clone())
    kernel = edit.kernel(torch.bfloat16, "cancelling")
    parts = EditStats()
    for first, last in ((cut, 200), (0, cut)):
        parts = parts.plus(kernel(numbers, rows, first, last))
    assert torch.equal(torch.from_numpy(numbers).view(torch.bfloat16), whole)


def test_transposed_tensor_gives_the_same_bits():
    weight = weights(512, 100)
    affine = removal(directions(512, 1))
    columns, _ = TensorEdit("w", SITE, 0, affine, "matrix").apply(weight)
    rows, _ = TensorEdit("w", SITE, 1, affine, "matrix").apply(weight.T.contiguous())
    assert torch.equal(columns, rows.T)


def test_untouched_values_stay_bit_for_bit():
    weight = weights(256, 60)
    weight[:, 7] = 0  # nothing is written here, so there is nothing to remove
    direction = directions(256, 1)
    direction[0, 100:] = 0
    direction /= direction.norm()
    edited, _ = TensorEdit("w", SITE, 0, removal(direction), "matrix").apply(weight)
    assert torch.equal(edited[100:], weight[100:])
    assert not edited[:, 7].any()


@pytest.mark.parametrize("every", [(128, 128), (256, 200)])
def test_scaled_fp8_keeps_its_scales_and_the_edit(every):
    """Block scales and one scale per tensor, against plain torch arithmetic."""
    real = weights(256, 200, dtype=torch.float32) * 0.02
    shape = (-(-256 // every[0]), -(-200 // every[1]))
    scales = torch.zeros(shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            block = real[i * every[0] : (i + 1) * every[0], j * every[1] : (j + 1) * every[1]]
            scales[i, j] = block.abs().max() / 448
    wide = scales.repeat_interleave(every[0], 0)[:256].repeat_interleave(every[1], 1)[:, :200]
    stored = (real / wide).to(FP8)
    direction = directions(256, 1)
    edit = TensorEdit("w", SITE, 0, removal(direction), "matrix")
    edited, record = edit.apply(stored, scales=Scales(scales.numpy(), every))
    before, after = stored.double() * wide.double(), edited.double() * wide.double()
    leak = ((direction @ after).norm() / (direction @ before).norm()).item()
    assert leak <= 1e-4
    assert record.leak == pytest.approx(leak, rel=0.2, abs=1e-6)
    exact = edit.exact(before)
    nearest = ((exact / wide.double()).to(FP8)).double() * wide.double()
    assert (after - exact).norm() <= 1.4 * (nearest - exact).norm()


def test_value_that_the_dtype_cannot_hold_is_refused():
    from orthogonalize.core.errors import OrthogonalizeError

    weight = torch.full((8, 3), 60000.0).to(torch.float16)
    edit = TensorEdit("w", SITE, 0, removal(torch.eye(8, dtype=torch.float64)[:1], 3.0), "matrix")
    with pytest.raises(OrthogonalizeError, match="overflows"):
        edit.apply(weight)
    weight[0, 0] = float("nan")
    with pytest.raises(OrthogonalizeError, match="NaN"):
        edit.apply(weight)
