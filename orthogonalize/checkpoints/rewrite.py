"""A planned edit of a whole checkpoint, and its writing to disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..core.progress import Progress
from .checkpoint import Addition, Checkpoint
from .quantization import rescaled, scale_name
from .rounding.vector_edit import Scales
from .tensor_edit import Rounding, TensorEdit
from .writer import Changes, Written, write_rest, write_weights


@dataclass
class CheckpointPlan:
    """What an edit does to a checkpoint: tensors to change, tensors to add, configuration to set."""

    source: Checkpoint
    edits: dict[str, TensorEdit] = field(default_factory=dict)
    additions: dict[str, Addition] = field(default_factory=dict)
    config_changes: dict[str, Any] = field(default_factory=dict)
    rounding: Rounding = "cancelling"

    @property
    def output_bytes(self) -> int:
        """Bytes of weights in the edited checkpoint."""
        return self.bytes_of(self.source.files)

    @property
    def changed_bytes(self) -> int:
        """Bytes of the weight files in it that are not the source's, byte for byte."""
        return self.bytes_of(self.changed_files)

    @property
    def changed_files(self) -> set[str]:
        """The names of the weight files that are not the source's, byte for byte."""
        names, home = self.changes.names, self._home
        return {
            name
            for name, file in self.source.files.items()
            if name == home or file.renamed or names & file.tensors.keys()
        }

    @property
    def _home(self) -> str | None:
        return self.source.home(self.additions) if self.additions else None

    def bytes_of(self, files: Iterable[str]) -> int:
        """Bytes of these weight files in the edited checkpoint."""
        added = {self._home: sum(addition.size for addition in self.additions.values())}
        return sum(self.source.files[name].path.stat().st_size + added.get(name, 0) for name in files)

    @cached_property
    def _scales(self) -> tuple[dict[str, Scales], dict[str, torch.Tensor]]:
        """The scales of edited FP8 tensors, and the scale tensors that get other values; the plan must be complete."""
        scales: dict[str, Scales] = {}
        replaced: dict[str, torch.Tensor] = {}
        for name, edit in self.edits.items():
            found = rescaled(self.source, edit) if name in self.source.tensors else None
            if found is not None:
                scales[name], table = found
                if table is not None:
                    replaced[str(scale_name(self.source, name))] = table
        return scales, replaced

    @property
    def changes(self) -> Changes:
        """What is done to the tensors."""
        scales, replaced = self._scales
        return Changes(self.edits, self.additions, scales, replaced, self.rounding)

    @property
    def touched(self) -> set[str]:
        """Every tensor of the source that may change, found without reading one: scales of quantised ones, too."""
        scales = (scale_name(self.source, name) for name in self.edits)
        return {*self.edits, *(name for name in scales if name is not None)}

    def edited(self, name: str) -> torch.Tensor:
        """Tensor `name` of the edited checkpoint, rounded to its stored dtype."""
        addition = self.additions.get(name)
        tensor = addition.make() if addition else self.source.read(name)
        changes = self.changes
        if name not in self.edits:
            return changes.replaced.get(name, tensor)
        return self.edits[name].apply(tensor, changes.rounding, changes.scales.get(name))[0]

    def write(
        self,
        target: Path,
        progress: Progress | None = None,
        *,
        workers: int = 1,
        link: bool = False,
        expected: Mapping[str, str] | None = None,
    ) -> Written:
        """Write the edited checkpoint into the empty folder `target` (see `writing.write_weights`)."""
        written = write_weights(
            self.source, target, self.changes, progress, workers=workers, link=link, expected=expected
        )
        write_rest(self.source, target, self.additions, self.config_changes, link=link)
        return written
