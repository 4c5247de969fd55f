"""Compare any two checkpoints, without a recipe or a description of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core.files import parse_json
from ..core.progress import track
from ..core.words import counted
from .checkpoint import Checkpoint
from .quantization import row_reader
from .safetensors_file import DTYPES, row_blocks
from .tensor_diff import (
    GRAIN,
    Blocks,
    ChangeDirections,
    Difference,
    SharedDirections,
    common_directions,
    difference,
    removal_along,
)

PROJECTED = 0.05  # largest share of a component that counts as projected out (rounding leaves some)
ALIGNED = 0.99  # smallest cosine of two directions that count as the same


@dataclass
class Audit:
    """Every difference between two checkpoints, by tensor name.

    `changed` is `|W' - W| / |W|` (infinite if shapes differ, 0 for the same numbers in another format);
    `differences` describes the tensors whose numbers can be compared. `config` holds the configuration values that
    differ (base's, this one's) and `side_files` the other files that do; `notes` says how each of those differs.
    `common` are the directions that the changes share, and `along` is what each change did along them, by tensor name.
    """

    changed: dict[str, float] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    same: int = 0
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    side_files: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    differences: dict[str, Difference] = field(default_factory=dict)
    common: SharedDirections | None = None
    along: dict[str, ChangeDirections] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._counts})"

    @property
    def _counts(self) -> str:
        return f"{counted(len(self.changed), 'tensor')} changed, {len(self.added)} added, {len(self.missing)} missing"

    def along_common(self, name: str) -> ChangeDirections | None:
        """The change of tensor `name` along the common directions; None if it is not along them."""
        return self.along.get(name)

    def projected(self) -> dict[str, float]:
        """The share of the common directions left in each tensor that they were projected out of."""
        along = {name: self.along_common(name) for name in self.differences}
        return {name: d.left for name, d in along.items() if d is not None and d.left <= PROJECTED}

    def verdict(self) -> str:
        """One sentence that describes the change."""
        if not (self.changed or self.added or self.missing):
            return "the weights are identical to the base's"
        altered = [name for name, change in self.changed.items() if change != 0]
        if not (altered or self.added or self.missing):
            return "the weights are identical to the base's, in another number format"
        compared = [d for d in self.differences.values() if d.rank is not None]
        if self.common is None or not compared:
            low = [d.rank for d in compared if d.rank]
            if low and len(low) == len(altered):
                return f"changes of low rank (at most {max(low)}) without a common direction"
            return "changes of high rank: further training, another model, or another number format"
        rank, count = len(self.common.basis), self.common.shared_by[0]
        where = (
            f"{count} of {self.common.of} changed tensors share {'a direction' if rank == 1 else f'{rank} directions'}"
        )
        projected = self.projected()
        if len(projected) >= count / 2:
            return (
                f"an orthogonalisation of rank {rank}: {where}, projected out of {len(projected)} "
                f"(at most {max(projected.values()):.1e} of it is left)"
            )
        along = [self.along_common(name) for name in self.differences]
        strengths = sorted(d.strength for d in along if d is not None and math.isfinite(d.strength))
        middle = strengths[len(strengths) // 2] if strengths else math.nan
        return f"an edit of rank {rank}: {where} (strength about {middle:.2g}, where 1 projects and 2 mirrors)"

    def document(self) -> dict[str, Any]:
        """The audit as values that JSON can hold, with directions as lists of numbers."""
        tensors = {
            name: {
                "change": _finite_or_none(change),
                **(_difference_json(self.differences[name]) if name in self.differences else {}),
            }
            for name, change in self.changed.items()
        }
        return {
            "verdict": self.verdict(), "changed": tensors, "added": self.added, "missing": self.missing,
            "same": self.same, "config": {key: list(pair) for key, pair in self.config.items()},
            "files": {name: self.notes.get(name, "differs") for name in self.side_files},
            "common": None if self.common is None else {
                "directions": [[round(x, 8) for x in row] for row in self.common.basis.tolist()],
                "shared_by": list(self.common.shared_by), "of": self.common.of,
            },
            "projected": self.projected(),
        }  # fmt: skip


def _finite_or_none(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _difference_json(found: Difference) -> dict[str, Any]:
    return {
        "rank": found.rank,
        "energy": _finite_or_none(found.energy),
        "axes": [
            {
                "axis": d.axis,
                "rank": len(d.basis),
                "left": _finite_or_none(d.left),
                "strength": _finite_or_none(d.strength),
            }
            for d in found.directions
        ],
    }


def audit(edited: Checkpoint, base: Checkpoint) -> Audit:
    """Compare the tensors (a block of rows at a time), configuration and side files of two checkpoints."""
    result = Audit()
    mine, theirs = edited.tensors, base.tensors
    result.added = sorted(mine.keys() - theirs.keys())
    result.missing = sorted(theirs.keys() - mine.keys())
    both = sorted(mine.keys() & theirs.keys())
    with track("comparing tensors", sum(theirs[name].size for name in both), "bytes") as advance:
        for name in both:
            if mine[name].shape != theirs[name].shape:
                result.changed[name] = math.inf
            elif mine[name].dtype == theirs[name].dtype and _same_bytes(edited, base, name):
                result.same += 1
            else:
                _compare(edited, base, name, result)
            advance(theirs[name].size)
    result.common = common_directions(result.differences)
    if result.common is not None:
        for name, found in result.differences.items():
            along = _along(edited, base, name, found, result.common.basis)
            if along is not None:
                result.along[name] = along
    compare_settings(edited, base, result)
    return result


def compare_settings(edited: Checkpoint, base: Checkpoint, result: Audit) -> None:
    """Add to `result` how the configuration and the side files of two checkpoints differ."""
    for key in sorted(edited.config.keys() | base.config.keys()):
        pair = (base.config.get(key), edited.config.get(key))
        if pair[0] != pair[1]:
            result.config[key] = pair
    for side in sorted({str(f) for f in base.side_files()} | {str(f) for f in edited.side_files()}):
        note = _describe_file_difference(edited.path / side, base.path / side)
        if note is not None:
            result.side_files.append(side)
            result.notes[side] = note


def _compare(edited: Checkpoint, base: Checkpoint, name: str, result: Audit) -> None:
    shape = base.tensors[name].shape
    kinds = [DTYPES.get(checkpoint.tensors[name].dtype) for checkpoint in (base, edited)]
    known = [kind for kind in kinds if kind is not None]
    if len(known) < 2:
        result.changed[name] = math.nan if kinds[0] == kinds[1] else math.inf
        return
    if not (shape and all(kind.is_floating_point for kind in known)):
        result.changed[name] = _relative_change(edited.read(name), base.read(name))
        return
    found = difference(shape, max(known, key=lambda kind: GRAIN.get(kind, 0.0)), _blocks(edited, base, name))
    result.changed[name] = found.change
    if found.change != 0:
        result.differences[name] = found


def _blocks(edited: Checkpoint, base: Checkpoint, name: str) -> Blocks:
    """Blocks of rows of a tensor of both checkpoints, the base's first."""
    old, new = row_reader(base, name), row_reader(edited, name)

    def blocks() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for first, last in row_blocks(base.tensors[name].shape):
            yield old(first, last), new(first, last)

    return blocks


def _along(
    edited: Checkpoint, base: Checkpoint, name: str, found: Difference, common: torch.Tensor
) -> ChangeDirections | None:
    """The change of one tensor along the `common` directions [k, width]; None if it is not along them.

    A change that has more directions of its own is measured again along the common ones alone.
    """
    for own in found.directions:
        if own.basis.shape[1] != common.shape[1]:
            continue
        cosines = torch.linalg.svdvals(own.basis @ common.mT)
        if len(cosines) and float(cosines.min()) >= ALIGNED:
            if len(own.basis) <= len(common):
                return own
            return removal_along(_blocks(edited, base, name), own.axis, common, base.tensors[name].shape)
    return None


def _relative_change(new: torch.Tensor, old: torch.Tensor) -> float:
    return float((new.double() - old.double()).norm() / old.double().norm())


def _same_bytes(edited: Checkpoint, base: Checkpoint, name: str) -> bool:
    pairs = zip(edited.file_of(name).chunks(name), base.file_of(name).chunks(name), strict=True)
    return all(a == b for a, b in pairs)


def _describe_file_difference(mine: Path, theirs: Path) -> str | None:
    """How two files differ, in a few words; None if they are identical."""
    if not (mine.is_file() and theirs.is_file()):
        return "only here" if mine.is_file() else "only in the base"
    ours, other = mine.read_bytes(), theirs.read_bytes()
    if ours == other:
        return None
    try:
        new, old = parse_json(ours), parse_json(other)
    except ValueError:
        return "differs"
    if not (isinstance(new, dict) and isinstance(old, dict)):
        return "differs"
    keys = sorted(key for key in new.keys() | old.keys() if new.get(key) != old.get(key))
    return f"differs in {', '.join(keys)}" if keys else "the same values, formatted differently"
