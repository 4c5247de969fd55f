"""MXFP4 weights as gpt-oss ships them: decoded, edited and encoded by the same rule.

A fused weight X [experts, in, out] is stored as `X_blocks` [experts, out, in/32, 16], two numbers of four bits (E2M1)
per byte, and `X_scales` [experts, out, in/32], the exponents of powers of two (E8M0) that multiply 32 numbers each (OCP
Microscaling Formats 1.0). The scale of a block is the smallest under which its largest number fits, and is
kept where it still does, so that what is decoded and encoded again has the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..core.interventions import AffineMap
from .checkpoint import Checkpoint
from .rounding.base import GRIDS, EditStats, Scales
from .rounding.registry import DEFAULT_ROUNDING, ROUNDING_SCHEMES
from .safetensors_file import TensorInfo
from .tensor_edit import TensorEdit, TensorRecord

FP4 = torch.float4_e2m1fn_x2
BLOCKS, SCALES = "_blocks", "_scales"
PASSES = 4  # in which what rounding lost of the edit is taken out again
BLOCK = 32  # numbers that share a scale
BIAS = 127  # of the exponents of scales
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
CODES = torch.cat([VALUES, -VALUES])
# A block whose largest number was just above 3 was stored as 3, which half of its scale could hold as well.
FINER = 2.5
FITS = GRIDS[FP4].largest * (1 + 2.0**-6)  # numbers just above the largest round to it


def packed_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The fused weights [experts, in, out] that `tensors` hold in MXFP4, under the names that they have unpacked."""
    found = {}
    for stored, info in tensors.items():
        name = stored.removesuffix(BLOCKS)
        scales = tensors.get(name + SCALES)
        if name == stored or scales is None or {info.dtype, scales.dtype} != {"U8"}:
            continue
        if len(info.shape) == 4 and info.shape[:3] == scales.shape and info.shape[3] == BLOCK // 2 and all(info.shape):
            experts, rows, groups, _ = info.shape
            found[name] = TensorInfo(name, "MXFP4", (experts, groups * BLOCK, rows), 0, 0)
    return found


def unpack(blocks: torch.Tensor) -> torch.Tensor:
    """The numbers [..., 32 n] of blocks [..., n, 16], without their scales, in float32."""
    pairs = torch.stack([blocks & 15, blocks >> 4], -1)
    return CODES.to(blocks.device)[pairs.int()].flatten(-3)


def pack(numbers: torch.Tensor) -> torch.Tensor:
    """Blocks [..., n, 16] of numbers [..., 32 n] that four bits can hold."""
    codes = (torch.searchsorted(VALUES, numbers.abs().contiguous()) + 8 * torch.signbit(numbers)).to(torch.uint8)
    pairs = codes.view(*codes.shape[:-1], -1, BLOCK // 2, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def factors(scales: torch.Tensor) -> torch.Tensor:
    """The powers of two that scales stand for."""
    return torch.ldexp(torch.ones(scales.shape, device=scales.device), scales.int() - BIAS)


def dequantize_experts(source: Checkpoint, name: str) -> torch.Tensor:
    """Weight `name` [experts, in, out] in float64."""
    return decode_experts(source.read(name + BLOCKS), source.read(name + SCALES), torch.float64)


def decode_experts(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight [experts, in, out] of its blocks and scales, on their device; exact in bfloat16 and wider dtypes."""
    experts, rows, groups, _ = blocks.shape
    wide = torch.promote_types(dtype, torch.float32)
    result = torch.empty(experts, groups * BLOCK, rows, dtype=dtype, device=blocks.device)
    for own, numbers, table in zip(result, blocks, scales, strict=True):
        own.copy_((unpack(numbers).to(wide) * factors(table).to(wide).repeat_interleave(BLOCK, -1)).mT)
    return result


@dataclass(frozen=True)
class PackedEdit:
    """The edit of a weight in MXFP4: `edit` says what changes in it, as if it were unpacked."""

    source: Checkpoint
    edit: TensorEdit
    rounding: str

    @property
    def names(self) -> tuple[str, str]:
        """The names of the stored tensors: blocks and scales."""
        return self.edit.name + BLOCKS, self.edit.name + SCALES

    def result(self) -> tuple[dict[str, torch.Tensor], TensorRecord]:
        """The new values of both stored tensors, and the record of the edit.

        Raises:
            OrthogonalizeError: see `TensorEdit.record`.
        """
        blocks, scales = (self.source.read(name) for name in self.names)
        stats, count = EditStats(), 0
        for expert in range(len(blocks)):
            given = None
            if self.edit.given is not None:
                count = self.edit.given.shape[1] // len(blocks)
                given = self.edit.given[:, expert * count : (expert + 1) * count]
            stats = stats.plus(self._edit_expert(blocks[expert], scales[expert], given))
        values = dict(zip(self.names, (blocks, scales), strict=True))
        return values, self.edit.record(stats, FP4)

    def _edit_expert(self, blocks: torch.Tensor, scales: torch.Tensor, given: torch.Tensor | None) -> EditStats:
        """Edit one expert's blocks [out, in/32, 16] and scales [out, in/32] in place."""
        numbers, former = unpack(blocks), factors(scales)
        by_rows = self.edit.axis % 3 == 1  # vectors of the stream are what its input multiplies
        largest = self._largest(numbers * former.repeat_interleave(BLOCK, -1), by_rows, given)
        fitting = torch.ceil(torch.log2(largest / FITS)).clamp(-BIAS, BIAS) + BIAS
        refits = ((largest > former * FITS) | (largest < former * FINER)) & (largest > 0) & largest.isfinite()
        scales.copy_(torch.where(refits, fitting, scales.float()).to(torch.uint8))
        old, new = (table.mT.contiguous() if by_rows else table for table in (former, factors(scales)))
        tables = Scales(old.numpy(), (BLOCK, 1) if by_rows else (1, BLOCK), new.numpy())
        vectors = numbers.shape[0 if by_rows else 1]
        components = None if given is None else given.numpy()
        kernel = self.edit.kernel(FP4, self.rounding)
        unedited = (numbers * former.repeat_interleave(BLOCK, -1)).double()
        stats = kernel(numbers.numpy(), by_rows, 0, vectors, tables, components)
        if self.rounding == DEFAULT_ROUNDING:
            stats = self._settle(numbers, tables._replace(values=new.numpy(), edited=None), unedited, given, stats)
        blocks.copy_(pack(numbers))
        return stats

    def _settle(
        self, numbers: torch.Tensor, scales: Scales, before: torch.Tensor, given: torch.Tensor | None, stats: EditStats
    ) -> EditStats:
        """Take what rounding lost of the edit out of `numbers` [out, in], again and again, and measure what is left.

        Steps between numbers of four bits are larger than most changes, so one pass of rounding does not end.
        """
        by_rows = self.edit.axis % 3 == 1
        affine, table = self.edit.vectors_map(), torch.from_numpy(scales.values)
        v = affine.v
        wide = (table.mT if by_rows else table).repeat_interleave(BLOCK, -1).double()

        def component(weight: torch.Tensor) -> torch.Tensor:
            return (weight if by_rows else weight.mT) @ v

        old = component(before)
        taken = old if given is None else given.double().mT
        wanted = old - taken @ (v.mT @ affine.u).mT + v.mT @ affine.s
        correction = AffineMap(torch.linalg.pinv(v).mT.contiguous(), v, torch.zeros_like(affine.s))
        kernel = ROUNDING_SCHEMES.find(self.rounding).load()(correction, FP4)
        for _ in range(PASSES):
            missing = component(numbers * wide) - wanted
            kernel(numbers.numpy(), by_rows, 0, len(missing), scales, missing.mT.contiguous().numpy())
        lost = float((component(numbers * wide) - wanted).square().sum())
        return stats._replace(lost=lost, change=float((numbers * wide - before).square().sum()))

    def _largest(self, weight: torch.Tensor, by_rows: bool, given: torch.Tensor | None) -> torch.Tensor:
        """The largest number of every block of the edited `weight` [out, in]."""
        affine = self.edit.vectors_map()
        u, v, s = affine.u.float(), affine.v.float(), affine.s.float()
        vectors = weight if by_rows else weight.mT
        taken = vectors @ v if given is None else given.float().mT
        edited = vectors - taken @ u.mT + s
        edited = edited if by_rows else edited.mT
        return edited.abs().reshape(len(edited), -1, BLOCK).amax(-1)
