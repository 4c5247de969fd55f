"""Rounding of an edited matrix to a quantised format that keeps the edit, under scales that are given.

Rounding to nearest would add noise along the edited directions as along all others. Instead, as for every other format
(see `rounding.vector_edit`), each vector of the stream goes to numbers near it whose component along them is the same.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from ...core.interventions import AffineMap
from ..rounding.base import GRIDS, Scales
from ..rounding.registry import ROUNDING_SCHEMES
from ..tensor_edit import TensorEdit

PASSES = 4  # in which what rounding lost is taken out again: steps of four bits are larger than most changes
TASKS = 8  # parts of a matrix that are rounded in parallel


class _Vectors(NamedTuple):
    """A matrix [out, in] of numbers as vectors of the stream, and their scales."""

    by_rows: bool
    number: int
    scales: Scales


def _as_vectors(shape: torch.Size, factors: torch.Tensor, axis: int) -> _Vectors:
    group, by_rows = shape[1] // factors.shape[1], axis % 2 == 1
    every = (group, 1) if by_rows else (1, group)
    table = (factors.mT if by_rows else factors).contiguous().numpy()
    return _Vectors(by_rows, shape[0 if by_rows else 1], Scales(table, every))


def keep_edit(
    weight: torch.Tensor, factors: torch.Tensor, edit: TensorEdit, dtype: torch.dtype, rounding: str
) -> torch.Tensor:
    """`weight` [out, in] in float32, with every number one that `dtype` times its scale can hold.

    Args:
        weight: the edited matrix.
        factors: [out, in / group] in float32, what stored numbers are multiplied by.
        edit: how it was edited: the components along its map are kept.
        dtype: a key of `GRIDS`.
        rounding: the name of a rounding scheme.
    """
    v = edit.vectors_map().v
    wide = factors.repeat_interleave(weight.shape[1] // factors.shape[1], -1)
    largest = GRIDS[dtype].largest
    numbers = (weight.float() / wide).clamp(-largest, largest).contiguous()
    by_rows, count, scales = _as_vectors(weight.shape, factors, edit.axis)

    def component(matrix: torch.Tensor) -> torch.Tensor:
        return (matrix if by_rows else matrix.mT).double() @ v

    wanted = component(weight)
    back = AffineMap(torch.linalg.pinv(v).mT.contiguous(), v, torch.zeros(len(v), dtype=torch.float64))
    kernel = ROUNDING_SCHEMES.find(rounding).load()(back, dtype)
    step = max(64, -(-count // TASKS))
    with ThreadPoolExecutor(TASKS) as pool:
        for _ in range(1 + PASSES):
            excess = (component(numbers.double() * wide.double()) - wanted).mT.contiguous().numpy()
            parts = [
                pool.submit(kernel, numbers.numpy(), by_rows, first, min(first + step, count), scales, excess)
                for first in range(0, count, step)
            ]
            for part in parts:
                part.result()
    return numbers * wide
