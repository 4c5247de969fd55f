"""Weights in four-bit floats as compressed-tensors stores them: which there are, and their numbers.

A weight X [out, in] is stored as `X_packed` [out, in / 2], two numbers (E2M1) per byte, the first in the lower bits,
and `X_scale`: in MXFP4 the exponents of powers of two (E8M0) for 32 numbers each, in NVFP4 FP8 numbers for 16 each, to
be divided by the one number in `X_global_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..checkpoint import Checkpoint
from ..mxfp4 import CODES, factors
from ..safetensors_file import TensorInfo

PACKED, SCALE, GLOBAL = "_packed", "_scale", "_global_scale"


def packed_float(tensors: Mapping[str, TensorInfo], name: str) -> TensorInfo | None:
    """Weight `name` as it is unpacked, if `tensors` hold it in four-bit floats."""
    packed, scale = tensors.get(name + PACKED), tensors.get(name + SCALE)
    if packed is None or scale is None or packed.dtype != "U8" or len(packed.shape) != 2:
        return None
    group = {"U8": 32, "F8_E4M3": 16 if name + GLOBAL in tensors else 0}.get(scale.dtype)
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    fits = group and rows and columns and columns % group == 0 and scale.shape == (rows, columns // group)
    return TensorInfo(name, "F4", (rows, columns), 0, 0) if fits else None


def packed_floats(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The weights that `tensors` hold in four-bit floats, under the names that they have unpacked."""
    names = (stored.removesuffix(PACKED) for stored in tensors if stored.endswith(PACKED))
    return {name: info for name in names if (info := packed_float(tensors, name))}


def decode(packed: torch.Tensor, scale: torch.Tensor, shared: torch.Tensor | None) -> torch.Tensor:
    """The numbers [out, in] in float64 of a weight that is stored in four bits."""
    numbers = CODES[torch.stack([packed & 15, packed >> 4], -1).int()].flatten(-2).double()
    table = factors(scale) if shared is None else scale.float() / shared
    return numbers * table.double().repeat_interleave(numbers.shape[1] // table.shape[1], -1)


def dequantize_packed(source: Checkpoint, name: str) -> torch.Tensor:
    """Weight `name` [out, in] in float64."""
    shared = source.read(name + GLOBAL) if name + GLOBAL in source.tensors else None
    return decode(source.read(name + PACKED), source.read(name + SCALE), shared)


def dequantize_found(found: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Weight `name` [out, in] in float64, from the tensors that replace it, in FP8 or four bits."""
    if name in found:
        return found[name].double() * found[name + SCALE].double()
    return decode(found[name + PACKED], found[name + SCALE], found.get(name + GLOBAL))
