"""Checks of what compiled loops are called with: they trust shapes, so a wrong one would corrupt memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from .base import Scales


def _refuse(what: str, array: Any, wanted: str) -> ValueError:
    return ValueError(f"{what} {array.dtype}{list(array.shape)} must be {wanted}")


def check_vectors(
    stored: np.ndarray[Any, Any], by_rows: bool, first: int, last: int, width: int, held: np.dtype[Any]
) -> None:
    """Check that `stored` holds vectors of `width` in format `held`, and that `first` to `last` are among them.

    Raises:
        ValueError: it does not, or it is not one contiguous, aligned, writable matrix.
    """
    if stored.ndim != 2 or stored.dtype != held:
        raise _refuse("the stored vectors", stored, f"a matrix of {held}")
    if stored.shape[1 if by_rows else 0] != width:
        raise _refuse("the stored vectors", stored, f"{width} wide along {'rows' if by_rows else 'columns'}")
    if not (stored.flags.c_contiguous and stored.flags.aligned and stored.flags.writeable):
        raise _refuse("the stored vectors", stored, "contiguous, aligned and writable")
    if not 0 <= first <= last <= stored.shape[0 if by_rows else 1]:
        raise _refuse("the stored vectors", stored, f"at least {last} vectors, from {first} on")


def check_given(given: np.ndarray[Any, Any] | None, stored: np.ndarray[Any, Any], by_rows: bool, rank: int) -> None:
    """Check that `given` holds `rank` components for every vector of `stored`, in memory of its own.

    Raises:
        ValueError: it does not.
    """
    if given is None:
        return
    wanted = (rank, stored.shape[0 if by_rows else 1])
    if given.shape != wanted or given.dtype.kind != "f":
        raise _refuse("the given components", given, f"floating-point numbers {list(wanted)}")
    if np.may_share_memory(given, stored):
        raise _refuse("the given components", given, "in memory of their own")


def check_scales(scales: Scales | None, stored: np.ndarray[Any, Any], by_rows: bool) -> None:
    """Check that every entry of the vectors in `stored` has a scale, in memory of its own.

    Raises:
        ValueError: `scales` has too few, or the new ones have another shape than the old.
    """
    if scales is None:
        return
    shape = stored.shape[::-1] if by_rows else stored.shape
    wanted = tuple(-(-size // every) if every > 0 else -1 for size, every in zip(shape, scales.every, strict=True))
    for table in (scales.values, scales.edited):
        if table is None:
            continue
        if table.shape != wanted or table.dtype.kind != "f":
            raise _refuse("the scales", table, f"floating-point numbers {list(wanted)}")
        if np.may_share_memory(table, stored):
            raise _refuse("the scales", table, "in memory of their own")
