"""The plan of a checkpoint's changes: tensors to edit, tensors to add, configuration to set; and writing it to disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..core.progress import Progress
from .checkpoint import Addition, Checkpoint
from .mxfp4 import BLOCKS, SCALES, PackedEdit, packed_tensors
from .quantization import edited_scales, scale_name
from .rounding.base import Scales
from .rounding.registry import DEFAULT_ROUNDING
from .safetensors_file import TensorInfo
from .settings_files import with_changes
from .tensor_edit import TensorEdit
from .writer import Changes, Written, write_other_files, write_weights


@dataclass
class CheckpointPlan:
    """What changes in a checkpoint: tensors to edit, tensors to add, configuration to set, and how to round.

    In `config_changes`, None stands for a key to be removed; `texts` are new contents of files beside the weights, by
    name.

    Nothing here knows the model: names are those of the tensors in `source`.
    """

    source: Checkpoint
    edits: dict[str, TensorEdit] = field(default_factory=dict)
    additions: dict[str, Addition] = field(default_factory=dict)
    config_changes: dict[str, Any] = field(default_factory=dict)
    rounding: str = DEFAULT_ROUNDING
    texts: dict[str, str] = field(default_factory=dict)

    def has_tensor(self, name: str) -> bool:
        """Whether the edited checkpoint has a tensor `name`."""
        return name in self.source.tensors or name in self.additions or name in self.packed

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name` in the edited checkpoint."""
        if name in self.additions:
            return self.additions[name].shape
        return tuple((self.packed if name in self.packed else self.source.tensors)[name].shape)

    @property
    def packed(self) -> dict[str, TensorInfo]:
        """The weights that are stored in MXFP4, under the names that they have unpacked."""
        return packed_tensors(self.source.tensors)

    def set_text_config(self, key: str, value: Any) -> None:
        """Set `key` of the text model's configuration, which multimodal models nest under `text_config`.

        None removes it.
        """
        nested = self.source.config.get("text_config")
        if isinstance(nested, dict):
            changed = self.config_changes.setdefault("text_config", dict(nested))
            self.config_changes["text_config"] = with_changes(changed, {key: value})
        else:
            self.config_changes[key] = value

    def disable_remote_code(self) -> None:
        """Disable the model's remote code, which does not know the tensors that the edit adds."""
        if self.source.config.get("auto_map"):
            self.config_changes["auto_map"] = {}

    @property
    def output_bytes(self) -> int:
        """Total size of the edited checkpoint's weight files, in bytes."""
        return self.bytes_of(self.source.files)

    @property
    def changed_bytes(self) -> int:
        """Total size of the weight files that differ from the source's, in bytes."""
        return self.bytes_of(self.changed_files)

    @property
    def changed_files(self) -> set[str]:
        """The names of the weight files that differ from the source's."""
        names, home = self.changes.names, self._file_of_additions
        return {
            name
            for name, file in self.source.files.items()
            if name == home or file.renamed or names & file.tensors.keys()
        }

    @property
    def _file_of_additions(self) -> str | None:
        return self.source.file_for(self.additions) if self.additions else None

    def bytes_of(self, files: Iterable[str]) -> int:
        """Total size of these weight files in the edited checkpoint, in bytes."""
        added = {self._file_of_additions: sum(addition.size for addition in self.additions.values())}
        return sum(self.source.files[name].size + added.get(name, 0) for name in files)

    @cached_property
    def _scales(self) -> tuple[dict[str, Scales], dict[str, torch.Tensor]]:
        """The scales of edited FP8 tensors, and the new values of scale tensors; the plan must be complete."""
        scales: dict[str, Scales] = {}
        replaced: dict[str, torch.Tensor] = {}
        for name, edit in self.edits.items():
            found = edited_scales(self.source, edit) if name in self.source.tensors else None
            if found is not None:
                scales[name], table = found
                if table is not None:
                    replaced[str(scale_name(self.source, name))] = table
        return scales, replaced

    @property
    def changes(self) -> Changes:
        """The changes to tensors, as `write_weights` takes them."""
        scales, replaced = self._scales
        stored = self.packed
        plain = {name: edit for name, edit in self.edits.items() if name not in stored}
        edits = [PackedEdit(self.source, edit, self.rounding) for name, edit in self.edits.items() if name not in plain]
        packed = {name: edit for edit in edits for name in edit.names}
        return Changes(plain, self.additions, scales, replaced, self.rounding, packed)

    @property
    def changed_tensors(self) -> set[str]:
        """Every tensor that differs from the source's: edited, added, or a scale tensor with new values."""
        return {*self.changes.names, *self.additions}

    @property
    def touched(self) -> set[str]:
        """Every source tensor that may change, scales of quantised ones included; found without reading any."""
        packed = self.packed
        names = (
            {name + BLOCKS, name + SCALES} if name in packed else {name, scale_name(self.source, name)}
            for name in self.edits
        )
        return {name for each in names for name in each if name is not None}

    def edited(self, name: str) -> torch.Tensor:
        """Tensor `name` of the edited checkpoint, in its stored dtype."""
        changes = self.changes
        if name in changes.packed:
            return changes.packed[name].result()[0][name]
        addition = self.additions.get(name)
        tensor = addition.make() if addition else self.source.read(name)
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
        """Write the edited checkpoint into the empty folder `target` (see `writer.write_weights`)."""
        written = write_weights(
            self.source, target, self.changes, progress, workers=workers, link=link, expected=expected
        )
        write_other_files(self.source, target, self.additions, self.config_changes, self.texts, link=link)
        return written
