"""The grid of a number format: round to its values, and step between them; compiled (see `kernels`)."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic


@intrinsic
def power_of_two(_context: Any, x: Any) -> Any:
    """The largest power of two not above |x| (0 for subnormal x), by masking all bits but the exponent's."""
    width, mask = {types.float32: (32, 0x7F800000), types.float64: (64, 0x7FF0000000000000)}[x]

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        whole = ir.IntType(width)
        masked = builder.and_(builder.bitcast(arguments[0], whole), ir.Constant(whole, mask))
        return builder.bitcast(masked, arguments[0].type)

    return x(x), generate


@intrinsic
def convert(_context: Any, x: Any, like: Any) -> Any:
    """Convert `x` to the type of `like`: between the bits of a bfloat16 and a float32, else unchanged."""
    narrow, whole, kept = x == types.uint16, ir.IntType(32), 16
    if x == like:
        return x(x, like), lambda _context, _builder, _signature, arguments: arguments[0]

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if narrow:
            bits = builder.shl(builder.zext(arguments[0], whole), ir.Constant(whole, kept))
            return builder.bitcast(bits, ir.FloatType())
        bits = builder.lshr(builder.bitcast(arguments[0], whole), ir.Constant(whole, kept))
        return builder.trunc(bits, ir.IntType(16))

    return like(x, like), generate


@njit(nogil=True, inline="always")
def round_number(x: Any, lowest: Any, unit: Any, magic: Any, largest: Any) -> Any:
    """Round `x` to the grid, ties to even: adding and subtracting 1.5 x 2^23 units drops the lower bits."""
    step = max(power_of_two(x), lowest) * unit * magic
    return min(max((x + step) - step, -largest), largest)


@njit(nogil=True, inline="always")
def scale_at(scales: Any, group: Any, j: Any, like: Any) -> Any:
    """The scale of entry `group`, `j`; 1, at no cost, if there are no scales."""
    return type(like)(1) if scales is None else scales[group, j]


@njit(nogil=True)
def round_row(row: Any, scales: Any, group: Any, grid: Any) -> None:
    """Round `row` [n] to the grid times the scale of each entry, in place."""
    lowest, unit, magic, largest = grid
    for j in range(row.shape[0]):
        scale = scale_at(scales, group, j, unit)
        row[j] = round_number(row[j] / scale, lowest, unit, magic, largest) * scale


@njit(nogil=True, inline="always")
def step_across(q: Any, y: Any, lowest: Any, unit: Any) -> Any:
    """The step from `q` to its neighbour on the other side of `y`."""
    step = max(power_of_two(q), lowest) * unit
    return -step if q > y else step


@njit(nogil=True)
def steps(q: Any, y: Any, scales: Any, group: Any, grid: Any, step: Any) -> None:
    """The step [n] from each entry of a row to its other neighbour; 0 if that is beyond the largest value."""
    lowest, unit, _, largest = grid
    for j in range(q.shape[0]):
        scale = scale_at(scales, group, j, unit)
        step[j] = step_across(q[j] / scale, y[j] / scale, lowest, unit) * scale
        step[j] = step[j] if abs(q[j] + step[j]) <= largest * scale else 0
