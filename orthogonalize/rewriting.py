"""A planned edit of a whole checkpoint, and its writing to disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Addition, Checkpoint, Progress, write_checkpoint
from .tensoredits import Rounding, TensorEdit, TensorRecord


@dataclass
class Rewrite:
    """What an edit does to a checkpoint: tensors to change, tensors to add, configuration to set."""

    source: Checkpoint
    edits: dict[str, TensorEdit] = field(default_factory=dict)
    additions: dict[str, Addition] = field(default_factory=dict)
    config_changes: dict[str, Any] = field(default_factory=dict)
    records: dict[str, TensorRecord] = field(default_factory=dict)
    rounding: Rounding = "cancelling"

    @property
    def output_bytes(self) -> int:
        """Bytes of weights in the edited checkpoint."""
        return self.source.weight_bytes + sum(addition.size for addition in self.additions.values())

    def edited(self, name: str) -> torch.Tensor:
        """Tensor `name` of the edited checkpoint, rounded to its stored dtype."""
        addition = self.additions.get(name)
        tensor = addition.make() if addition else self.source.read(name)
        if name not in self.edits:
            return tensor
        tensor, self.records[name] = self.edits[name].apply(tensor, self.rounding)
        return tensor

    def write(self, target: Path, progress: Progress | None = None) -> None:
        """Write the edited checkpoint into the empty folder `target`."""
        made = {
            name: Addition(addition.dtype, addition.shape, lambda name=name: self.edited(name))  # type: ignore[misc]
            for name, addition in self.additions.items()
        }
        changed = {name for name in self.edits if name not in self.additions}
        write_checkpoint(self.source, target, changed, self.edited, made, self.config_changes, progress)
