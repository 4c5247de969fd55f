"""Leak and strength of every edited tensor along the maps of its own edit, read from the stored checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.mxfp4 import packed_tensors
from ..checkpoints.plan import CheckpointPlan
from ..checkpoints.quantization import row_reader
from ..checkpoints.quantizing.stored import packed_floats
from ..checkpoints.safetensors_file import row_blocks
from ..checkpoints.tensor_edit import TensorEdit
from ..core.progress import track

Rows = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class TensorLeak:
    """What a stored tensor shows of its planned edit.

    `rank` is the number of directions of its map (for a pure shift 1, that of the shift). `leak` is the share of the
    planned change along them that is missing or too much (see `TensorRecord`); None if nothing was to change.
    `strength` is how much of the base's component along them is gone: 1 after a projection, 2 after a reflection;
    None for a constant that is added. `left` is the share of that component that is still there.
    """

    rank: int
    leak: float | None
    strength: float | None
    left: float | None


def _components(rows: Rows, shape: tuple[int, ...], edit: TensorEdit) -> torch.Tensor:
    """The component of a tensor that its map reads, [..., k] in float64, a block of rows at a time."""
    v = edit.vectors_map().v
    total, parts = torch.zeros((), dtype=torch.float64), []
    for first, last in row_blocks(shape):
        block = rows(first, last).to(torch.float64)
        if edit.axis % len(shape) == 0:
            total = total + block.movedim(0, -1) @ v[first:last]
        else:
            parts.append(block.movedim(edit.axis, -1) @ v)
    return torch.cat(parts) if parts else total


def _base_rows(plan: CheckpointPlan, name: str) -> Rows:
    """Reads rows of a tensor before its edit; one that the edit adds has its added values."""
    addition = plan.additions.get(name)
    if addition is None:
        return row_reader(plan.source, name)
    if addition.copy_of is not None:
        return row_reader(plan.source, addition.copy_of)
    whole = addition.make()
    return lambda first, last: whole[first:last]


def _leak(edit: TensorEdit, before: torch.Tensor, after: torch.Tensor) -> TensorLeak:
    """From the components [..., k] of base and stored tensor along the map."""
    affine = edit.vectors_map()
    planned = edit.planned_change(before)
    change = float(planned.norm())
    error = float((after - before - planned).norm())
    square = float(before.square().sum())
    added = affine.shifts or not edit.affine.rank or not square
    return TensorLeak(
        rank=affine.rank,
        leak=error / change if change else None,
        strength=None if added else 1 - float((before * after).sum()) / square,
        left=None if added else math.sqrt(float(after.square().sum()) / square),
    )


def tensor_leaks(edited: Checkpoint, plan: CheckpointPlan) -> dict[str, TensorLeak]:
    """By name, the leak of every tensor that `plan` edits and `edited` holds in the planned shape."""
    stored = edited.tensors | packed_tensors(edited.tensors) | packed_floats(edited.tensors)
    names = [name for name in sorted(plan.edits) if name in stored]
    found = {}
    with track("leaks along the recipe's maps", len(names), "tensors") as advance:
        for name in names:
            shape = tuple(stored[name].shape)
            if shape == plan.shape(name):
                edit = plan.edits[name]
                before, after = (
                    _components(rows, shape, edit) for rows in (_base_rows(plan, name), row_reader(edited, name))
                )
                found[name] = _leak(edit, before, after)
            advance(1)
    return found
