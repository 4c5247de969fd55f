"""Compiled loops: every argument is checked before they run, and at every size they agree with plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthogonalize.checkpoints.rounding.base import GRIDS, Scales
from orthogonalize.checkpoints.rounding.vector_edit import VectorEdit, nearest
from orthogonalize.core.interventions import AffineMap

D, N, K = 6, 5, 2
FP8 = torch.float8_e4m3fn


def a_map(d: int, k: int, seed: int = 0) -> AffineMap:
    numbers = np.random.default_rng(seed)
    u, v = (torch.from_numpy(numbers.standard_normal((d, k)) / d**0.5) for _ in range(2))
    return AffineMap(u, v, torch.from_numpy(0.1 * numbers.standard_normal(d)))


def stored(by_rows: bool = False, kind: type = np.uint16) -> np.ndarray:
    return np.zeros((N, D) if by_rows else (D, N), kind)


def frozen() -> np.ndarray:
    array = stored()
    array.flags.writeable = False
    return array


def unaligned() -> np.ndarray:
    return np.frombuffer(bytearray(2 * D * N + 1), np.uint16, offset=1).reshape(D, N)


ALIAS = np.zeros((D, N), np.float32)
WRONG = {
    "narrow": ((np.zeros((D - 1, N), np.uint16), False, 0, N), {}),
    "wide": ((np.zeros((D + 1, N), np.uint16), False, 0, N), {}),
    "rows for columns": ((stored(True), False, 0, N), {}),
    "columns for rows": ((stored(), True, 0, D), {}),
    "too many vectors": ((stored(), False, 0, N + 1), {}),
    "before the first": ((stored(), False, -1, N), {}),
    "backwards": ((stored(), False, 3, 2), {}),
    "another format": ((stored(kind=np.float32), False, 0, N), {}),
    "three axes": ((np.zeros((1, D, N), np.uint16), False, 0, 1), {}),
    "transposed": ((stored(True).T, False, 0, N), {}),
    "strided": ((np.zeros((D, 2 * N), np.uint16)[:, ::2], False, 0, N), {}),
    "read only": ((frozen(), False, 0, N), {}),
    "unaligned": ((unaligned(), False, 0, N), {}),
    "few components": ((stored(), False, 0, N), {"given": np.zeros((K - 1, N))}),
    "components of few vectors": ((stored(), False, 0, N), {"given": np.zeros((K, N - 1))}),
    "components that are integers": ((stored(), False, 0, N), {"given": np.zeros((K, N), int)}),
    "few rows of scales": ((stored(), False, 0, N), {"scales": Scales(np.ones((2, 1)), (2, N))}),
    "few columns of scales": ((stored(), False, 0, N), {"scales": Scales(np.ones((3, 1)), (2, N - 1))}),
    "scales of no entries": ((stored(), False, 0, N), {"scales": Scales(np.ones((3, 1)), (0, N))}),
    "new scales of another shape": (
        (stored(), False, 0, N),
        {"scales": Scales(np.ones((3, 1)), (2, N), np.ones((2, 1)))},
    ),
}


@pytest.mark.parametrize("cancels", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument_is_refused(name, cancels):
    positional, named = WRONG[name]
    with pytest.raises(ValueError, match="must be"):
        VectorEdit(a_map(D, K), torch.bfloat16, cancels)(*positional, **named)


def test_arguments_that_share_memory_are_refused():
    edit = nearest(a_map(D, K), torch.float16)
    with pytest.raises(ValueError, match="memory of their own"):
        edit(ALIAS, False, 0, N, given=ALIAS[:K])
    with pytest.raises(ValueError, match="memory of their own"):
        edit(ALIAS, False, 0, N, scales=Scales(ALIAS[:, :1], (1, N)))


def test_map_of_a_batch_is_refused():
    u = torch.zeros(2, D, K).double()
    with pytest.raises(ValueError, match="one vector"):
        nearest(AffineMap(u, u, torch.zeros(2, D).double()), torch.bfloat16)


def rounded(y: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """`y` rounded to the grid of `dtype`, by NumPy: ties to even, subnormals, and no value above the largest."""
    grid = GRIDS[dtype]
    exponent = np.maximum(np.frexp(y)[1] - 1, grid.lowest)
    unit = np.exp2(exponent - grid.bits)
    return np.clip(np.rint(y / unit) * unit, -grid.largest, grid.largest)


@settings(deadline=None, max_examples=150)
@given(
    d=st.sampled_from([1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 97]),
    n=st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129]),
    k=st.integers(0, 9),
    by_rows=st.booleans(),
    conditional=st.booleans(),
    scaled=st.booleans(),
    cancels=st.booleans(),
    block=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    ends=st.tuples(st.integers(0, 129), st.integers(0, 129)),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, FP8, torch.float32]),
    seed=st.integers(0, 50),
)  # fmt: skip
def test_every_size_agrees_with_numpy(d, n, k, by_rows, conditional, scaled, cancels, block, ends, dtype, seed):
    """Around the edges of tiles: what is outside the range stays, and what is inside is near the exact edit."""
    affine, numbers = a_map(d, k, seed), np.random.default_rng(seed)
    first, last = sorted(min(end, n) for end in ends)
    scaled = scaled and dtype == FP8
    shape = (-(-d // block[0]), -(-n // block[1]))
    scales = Scales(numbers.uniform(0.5, 2, shape).astype(np.float32), block) if scaled else None
    factor = np.ones((d, n))
    if scales is not None:
        factor = scales.values[np.arange(d)[:, None] // block[0], np.arange(n) // block[1]].astype(np.float64)
    x = rounded(numbers.standard_normal((d, n)), dtype)
    given = numbers.standard_normal((k, n)) if conditional else None
    u, v, s = (t.numpy() for t in (affine.u, affine.v, affine.s))
    exact = x * factor - u @ (v.T @ (x * factor) if given is None else given) + s[:, None]

    held = x.T.copy() if by_rows else x.copy()
    narrow = torch.from_numpy(held).to(dtype)
    if dtype == torch.bfloat16:
        array = narrow.view(torch.uint16).numpy()
    else:
        array = narrow.numpy() if dtype == torch.float32 else narrow.float().numpy()
        array = array.astype(np.float64) if dtype == torch.float32 else array
    VectorEdit(affine, dtype, cancels)(array, by_rows, first, last, scales, given)
    after = torch.from_numpy(array.copy())
    after = (after.view(torch.bfloat16) if dtype == torch.bfloat16 else after).double().numpy()
    after = after.T if by_rows else after
    inside = np.zeros(n, bool)
    inside[first:last] = True
    assert np.array_equal(after[:, ~inside], x[:, ~inside])
    near, edited = exact[:, inside] / factor[:, inside], after[:, inside]
    assert np.array_equal(edited, rounded(edited, dtype))
    unit = np.exp2(np.maximum(np.frexp(np.abs(near).max(0, initial=1e-6))[1], GRIDS[dtype].lowest) - GRIDS[dtype].bits)
    arithmetic = 1e-12 if dtype == torch.float32 else 1e-4
    assert (np.abs(edited - near) <= (3 if cancels else 0.51) * unit + arithmetic).all()
