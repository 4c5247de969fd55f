"""An edited checkpoint in a quantised format: which matrices are quantised, and what every tensor becomes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from ...core.errors import OrthogonalizeError
from ..plan import CheckpointPlan
from ..safetensors_file import DTYPES, TensorFile, TensorInfo, header_bytes
from ..tensor_edit import TensorEdit, TensorRecord
from .library import Quantizer
from .rounding import keep_edit
from .stored import dequantize_found

NEAREST = "nearest"  # the rounding scheme that is the library's own


@dataclass(frozen=True)
class StoredTensor:
    """What one tensor of an unquantised edit becomes.

    Attributes:
        before: the tensor before its edit.
        edited: the tensor behind its edit, before it is quantised.
        stored: what replaces it, by name.
    """

    name: str
    before: torch.Tensor
    edited: torch.Tensor
    stored: dict[str, torch.Tensor]
    _edit: TensorEdit | None
    _unquantized: TensorRecord | None

    def record(self) -> TensorRecord | None:
        """The record of its edit, and of the quantisation that followed; None if it has no edit."""
        if self._edit is None or self.stored.get(self.name) is self.edited:
            return self._unquantized
        return _record(self._edit, self.before, dequantize_found(self.stored, self.name))


@dataclass(frozen=True)
class QuantizedPlan:
    """The edit `plan` of an unquantised checkpoint, whose result is then quantised.

    Attributes:
        weights: the names of the matrices that are quantised.
        fused: for some of them, the matrices that servers fuse with each, itself included.
    """

    plan: CheckpointPlan
    quantizer: Quantizer
    weights: frozenset[str]
    fused: Mapping[str, tuple[str, ...]]
    _largest: dict[str, float] = field(default_factory=dict, repr=False, compare=False)

    def without_edit(self) -> QuantizedPlan:
        """The source itself, quantised in the same way."""
        return QuantizedPlan(CheckpointPlan(self.plan.source), self.quantizer, self.weights, self.fused)

    def unquantized(self) -> CheckpointPlan:
        """The edit alone."""
        changes = {key: value for key, value in self.plan.config_changes.items() if key != "quantization_config"}
        return replace(self.plan, config_changes=changes)

    def infos(self, file: TensorFile, name: str) -> list[TensorInfo]:
        """The tensors that replace those of the source's weight file `name`, and their places."""
        end, found = 0, []
        for info in self._before(file, name):
            for part in self._parts(info):
                found.append(replace(part, start=end, end=end + part.size))
                end += part.size
        return found

    def _before(self, file: TensorFile, name: str) -> Iterator[TensorInfo]:
        """The tensors of one file of the unquantised edit: the source's in their order, then what the edit adds."""
        yield from sorted(file.tensors.values(), key=lambda info: info.start)
        if name == self.plan.source.file_for(self.plan.additions):
            for added, addition in self.plan.additions.items():
                yield TensorInfo(added, addition.dtype, addition.shape, 0, addition.size)

    def _parts(self, info: TensorInfo) -> Iterator[TensorInfo]:
        if info.name not in self.weights:
            yield info
            return
        for suffix, (dtype, shape) in self.quantizer.scheme.stored(info).items():
            yield TensorInfo(info.name + suffix, dtype, shape, 0, DTYPES[dtype].itemsize * math.prod(shape))

    @property
    def output_bytes(self) -> int:
        """Total size of the weight files that are written, in bytes."""
        total = 0
        for name, file in self.plan.source.files.items():
            infos = self.infos(file, name)
            total += len(header_bytes(infos, file.metadata)) + sum(info.size for info in infos)
        return total

    def names(self, file: TensorFile, name: str) -> list[str]:
        """The tensors of the unquantised edit that belong to the source's weight file `name`, in order."""
        return [info.name for info in self._before(file, name)]

    def edited(self, name: str, file: TensorFile | None = None) -> torch.Tensor:
        """Tensor `name` of the unquantised edit, read from `file` if it is given."""
        tensor, edit = self.before(name, file), self.plan.edits.get(name)
        return tensor if edit is None else edit.apply(tensor, self.plan.rounding)[0]

    def before(self, name: str, file: TensorFile | None = None) -> torch.Tensor:
        """Tensor `name` before its edit; one that the edit adds has its added values."""
        addition = self.plan.additions.get(name)
        return addition.make() if addition else (file or self.plan.source.file_of(name)).read(name)

    def stored(self, name: str, file: TensorFile | None = None) -> StoredTensor:
        """What tensor `name` becomes, read from `file` if it is given.

        Raises:
            OrthogonalizeError: it is to be quantised and holds NaN or infinite values, or its edit cannot be made.
        """
        before, edit = self.before(name, file), self.plan.edits.get(name)
        edited, record = (before, None) if edit is None else edit.apply(before, self.plan.rounding)
        stored = self._quantize(name, edited, edit) if name in self.weights else {name: edited}
        return StoredTensor(name, before, edited, stored, edit, record)

    def _quantize(self, name: str, weight: torch.Tensor, edit: TensorEdit | None) -> dict[str, torch.Tensor]:
        scheme = self.quantizer.scheme
        if not bool(torch.isfinite(weight).all()):
            raise OrthogonalizeError(f"{name} holds NaN or infinite values, which {scheme.name} cannot; it is damaged")
        scales = self.quantizer.scales(weight, self._shared_largest(name, weight) if scheme.shared else 0.0)
        if edit is not None and self.plan.rounding != NEAREST:
            weight = keep_edit(weight, scales.factors, edit, scheme.grid, self.plan.rounding)
        return {name + suffix: tensor for suffix, tensor in self.quantizer.store(weight, scales).items()}

    def _shared_largest(self, name: str, weight: torch.Tensor) -> float:
        """The largest number of all matrices of the unquantised edit that are fused with `weight`, called `name`."""
        self._largest[name] = float(weight.abs().max())
        for other in self.fused.get(name, ()):
            if other not in self._largest:
                self._largest[other] = float(self.edited(other).abs().max())
        return max(self._largest[each] for each in self.fused.get(name, (name,)))


def _record(edit: TensorEdit, before: torch.Tensor, after: torch.Tensor) -> TensorRecord:
    """The record of an edit and of the quantisation that followed."""
    old, new = edit.component(before), edit.component(after)
    planned, length = edit.planned_change(old), float(before.double().norm())
    wanted = float(planned.norm())
    leak = float((new - old - planned).norm()) / wanted if wanted else None
    change = float((after - before.double()).norm()) / length if length else 0.0
    return TensorRecord(edit.name, str(edit.site), leak, change)
