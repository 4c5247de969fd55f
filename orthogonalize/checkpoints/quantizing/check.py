"""Compare a quantised checkpoint with what its plan gives, with the base, and with plain quantisation of the base."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ...core.progress import track
from ..checkpoint import Checkpoint
from ..diff import Audit, compare_settings
from ..quantization import dequantize
from ..safetensors_file import stored_bytes
from ..tensor_edit import TensorEdit
from .plan import QuantizedPlan, StoredTensor
from .stored import dequantize_found, packed_float


@dataclass(frozen=True)
class QuantizationError:
    """What quantisation did to one edited matrix.

    `error` is the distance of the stored numbers from the unquantised edit, relative to it; `against_plain`, that
    distance relative to the one from the base to the base quantised without any edit (None if that is zero).
    """

    error: float
    against_plain: float | None


@dataclass
class QuantizedCheck:
    """How a quantised checkpoint differs from its base (`audit`), and from its plan.

    `rebuilt` says whether edited and quantised tensors have the bytes of the plan, and `unexpected` names what else
    does not. `quantized` are the matrices that are quantised. `leak`, `error` and `against_plain` are over those of
    them that are edited (see `recipe.QuantizationCost`); `errors` has each.
    """

    audit: Audit
    quantized: frozenset[str] = frozenset()
    rebuilt: bool = True
    unexpected: list[str] = field(default_factory=list)
    errors: dict[str, QuantizationError] = field(default_factory=dict)
    leak: float = 0.0
    error: float = 0.0
    against_plain: float | None = None

    @property
    def cost(self) -> dict[str, Any] | None:
        """`leak`, `error` and `against_plain`; None if no edited matrix is quantised."""
        keys = ("leak", "error", "against_plain")
        return {key: getattr(self, key) for key in keys} if self.errors else None


@dataclass
class _Squares:
    """Sums of squares over matrices."""

    lost: float = 0.0
    wanted: float = 0.0
    error: float = 0.0
    edited: float = 0.0
    plain: float = 0.0


@dataclass(frozen=True)
class _Pair:
    """What the plan makes of a tensor, and the checkpoint that should hold it."""

    made: StoredTensor
    edited: Checkpoint
    fits: bool  # the checkpoint holds the tensor, in the planned shape

    @cached_property
    def after(self) -> torch.Tensor:
        """The tensor's numbers in the checkpoint, decoded once, in float64."""
        return dequantize(self.edited, self.made.name).double()


def _square(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().sum())


def check_quantized(edited: Checkpoint, plan: QuantizedPlan) -> QuantizedCheck:
    """Compare the checkpoint `edited`, a tensor at a time, with what `plan` gives."""
    found, squares, plain = QuantizedCheck(Audit(), plan.weights), _Squares(), plan.without_edit()
    source, planned = plan.plan.source, set[str]()
    files = {name: plan.names(file, name) for name, file in source.files.items()}
    with track("comparing with the recipe's", sum(map(len, files.values())), "tensors") as advance:
        for names in files.values():
            for name in names:
                pair = _Pair(plan.stored(name), edited, _fits(edited, plan, name))
                planned |= pair.made.stored.keys()
                _check_tensor(pair, plan, found)
                if name in plan.weights and name in plan.plan.edits and pair.fits:
                    without = dequantize_found(plain.stored(name).stored, name)
                    found.errors[name] = _measure(pair, plan.plan.edits[name], without, squares)
                del pair  # before the next one is read
                advance(1)
    extra = sorted(edited.tensors.keys() - planned)
    found.audit.added += [name for name in extra if name not in found.audit.added]
    found.unexpected += extra
    compare_settings(edited, source, found.audit)
    if found.errors:
        found.leak = math.sqrt(squares.lost / squares.wanted) if squares.wanted else 0.0
        found.error = math.sqrt(squares.error / squares.edited) if squares.edited else 0.0
        found.against_plain = math.sqrt(squares.error / squares.plain) if squares.plain else None
    return found


def _fits(edited: Checkpoint, plan: QuantizedPlan, name: str) -> bool:
    """Whether the checkpoint holds tensor `name`, in the planned shape."""
    info = edited.tensors.get(name) or packed_float(edited.tensors, name)
    return info is not None and info.shape == plan.plan.shape(name)


def _check_tensor(pair: _Pair, plan: QuantizedPlan, found: QuantizedCheck) -> None:
    """Compare what a tensor of the unquantised edit became."""
    name, expected, edited = pair.made.name, pair.made.stored, pair.edited
    missing = [each for each in expected if each not in edited.tensors]
    same = not missing and all(stored_bytes(edited.read(each)) == stored_bytes(t) for each, t in expected.items())
    ours = name in plan.weights or name in plan.plan.edits
    if not same and ours:
        found.rebuilt = False
    if not same and not (ours and pair.fits):
        found.unexpected.append(name)
    found.audit.missing += missing
    if name in plan.plan.additions:
        found.audit.added.append(name)
    elif not pair.fits:
        found.audit.changed[name] = math.inf
    elif same and not ours:
        found.audit.same += 1
    else:
        before = pair.made.before.double()
        length, moved = float(before.norm()), float((pair.after - before).norm())
        found.audit.changed[name] = moved / length if length else math.inf if moved else 0.0


def _measure(pair: _Pair, edit: TensorEdit, plain: torch.Tensor, squares: _Squares) -> QuantizationError:
    """The error of one edited matrix, which is added to `squares`; `plain` is the base's, quantised without an edit."""
    before, exact, stored = pair.made.before.double(), pair.made.edited.double(), pair.after
    old = edit.component(before)
    change = edit.planned_change(old)
    own = _Squares(
        lost=_square(edit.component(stored) - old - change),
        wanted=_square(change),
        error=_square(stored - exact),
        edited=_square(exact),
        plain=_square(plain - before),
    )
    for key, value in vars(own).items():
        setattr(squares, key, getattr(squares, key) + value)
    return QuantizationError(
        math.sqrt(own.error / own.edited) if own.edited else 0.0,
        math.sqrt(own.error / own.plain) if own.plain else None,
    )
