"""A rounding scheme from outside the package: toward zero, in plain NumPy and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from orthogonalize.checkpoints.rounding.base import EditStats, Scales
from orthogonalize.core.interventions import AffineMap


def round_toward_zero(numbers: torch.Tensor) -> torch.Tensor:
    """Float64 `numbers` to bfloat16, which is a float32 without its lower 16 bits, and back."""
    near = numbers.float()
    near = torch.where(near.double().abs() > numbers.abs(), torch.nextafter(near, torch.zeros(())), near)
    return (near.view(torch.int32) & ~0xFFFF).view(torch.float32).double()


class TowardZero:
    """The edit of bfloat16 vectors, rounded toward zero: a `VectorKernel`."""

    def __init__(self, affine: AffineMap) -> None:
        self.affine = affine

    def __call__(
        self,
        stored: np.ndarray[Any, Any],
        by_rows: bool,
        first: int,
        last: int,
        scales: Scales | None = None,
        given: np.ndarray[Any, Any] | None = None,
    ) -> EditStats:
        assert stored.dtype == np.uint16
        assert scales is None
        bits = torch.from_numpy(stored[first:last] if by_rows else stored[:, first:last].T)  # [n, d], shared memory
        x = bits.view(torch.bfloat16).double() if by_rows else bits.contiguous().view(torch.bfloat16).double()
        y = self.affine(x) if given is None else x - torch.from_numpy(given[:, first:last]).T @ self.affine.u.T
        q = round_toward_zero(y)
        bits.copy_(q.to(torch.bfloat16).view(torch.uint16))
        wanted, lost = (y - x) @ self.affine.v, (q - y) @ self.affine.v
        return EditStats(*(float(t.square().sum()) for t in (x, q - x, q - y, wanted, lost)))


def toward_zero(affine: AffineMap, dtype: torch.dtype) -> TowardZero:
    assert dtype == torch.bfloat16
    return TowardZero(affine)
