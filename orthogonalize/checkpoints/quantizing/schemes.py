"""Schemes of `edit --quantize`: what they are called here and in compressed-tensors, and how they store a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..safetensors_file import TensorInfo
from .names import SchemeName

Stored = dict[str, tuple[str, tuple[int, ...]]]
"""Dtypes (as safetensors calls them) and shapes of what replaces a weight, by the suffix of its name."""


@dataclass(frozen=True)
class Scheme:
    """A quantised format of weights [out, in].

    Attributes:
        preset: its name in compressed-tensors, whose format is called `format`.
        grid: what the stored numbers can be, as a key of `rounding.base.GRIDS`.
        group: how many numbers of a row share a scale; None: the whole row does.
        shared: whether matrices that servers fuse must share one scale besides.
    """

    name: SchemeName
    preset: str
    format: str
    grid: torch.dtype
    group: int | None = None
    shared: bool = False

    def stored(self, info: TensorInfo) -> Stored:
        """What replaces the weight `info`."""
        rows, columns = info.shape
        if self.group is None:
            return {"": ("F8_E4M3", (rows, columns)), "_scale": (info.dtype, (rows, 1))}
        scales = (rows, columns // self.group)
        packed: Stored = {"_packed": ("U8", (rows, columns // 2))}
        if not self.shared:
            return packed | {"_scale": ("U8", scales)}
        return packed | {"_scale": ("F8_E4M3", scales), "_global_scale": ("F32", (1,))}


SCHEMES: dict[SchemeName, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp8", "FP8_DYNAMIC", "float-quantized", torch.float8_e4m3fn),
        Scheme("mxfp4", "MXFP4", "mxfp4-pack-quantized", torch.float4_e2m1fn_x2, group=32),
        Scheme("nvfp4", "NVFP4A16", "nvfp4-pack-quantized", torch.float4_e2m1fn_x2, group=16, shared=True),
    )
}
