"""The checkpoint that an engine starts on, so that any of several edits can be swapped into it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from safetensors.torch import save_file

from ..checkpoints.checkpoint import INDEX, Addition, Checkpoint
from ..checkpoints.plan import CheckpointPlan
from ..checkpoints.settings_files import with_changes
from ..checkpoints.writer import Changes, write_weights
from ..core.errors import OrthogonalizeError
from ..core.output_folders import check_space
from ..core.temporary_folders import temporary_folder

Weights = Mapping[str, Callable[[], torch.Tensor]]


def check_room(plans: Iterable[CheckpointPlan]) -> None:
    """Check that the largest of several edited checkpoints fits into the folder for temporary files.

    Raises:
        OrthogonalizeError: it does not.
    """
    home = Path(gettempdir())

    def needed(plan: CheckpointPlan) -> int:
        linked = plan.source.path.stat().st_dev == home.stat().st_dev
        return plan.changed_bytes if linked else plan.output_bytes

    check_space(home, max(map(needed, plans)), "set TMPDIR to a folder with room")


@contextmanager
def own_folder(plan: CheckpointPlan) -> Iterator[Path]:
    """A temporary folder with the edited checkpoint, for an engine that serves this edit alone."""
    with temporary_folder() as folder:
        plan.write(folder, link=True)
        yield folder


@dataclass(frozen=True)
class SharedBase:
    """The checkpoint structure that lets any of several edits be swapped into one engine."""

    source: Checkpoint  # with tensors under the names that the engine uses
    additions: Mapping[str, Addition]
    config: Mapping[str, Any]

    @classmethod
    def of(cls, source: Checkpoint, plans: Sequence[CheckpointPlan]) -> SharedBase:
        """For the edits `plans` of `source`.

        Raises:
            OrthogonalizeError: two edits need different configurations.
        """
        additions: dict[str, Addition] = {}
        config = dict(source.config)
        for plan in plans:
            additions |= plan.additions
            for key, value in plan.config_changes.items():
                if config.get(key, value) != value and config[key] != source.config.get(key):
                    raise OrthogonalizeError(f"two edits need different values of {key}; sweep them separately")
                config = with_changes(config, {key: value})
        return cls(next((plan.source for plan in plans if plan.source.renamed), source), additions, config)

    @property
    def state(self) -> list[Any]:
        """The structure as JSON, for fingerprints."""
        return [self.config, sorted(self.additions), bool(self.source.renamed)]


@contextmanager
def common_folder(source: Checkpoint, plans: Sequence[CheckpointPlan]) -> Iterator[Path]:
    """A temporary checkpoint equivalent to `source`, with every tensor and setting that any of `plans` adds.

    Added biases are zero and an added head is a copy of the embedding, so any of the edits can be swapped into an
    engine started on it. Weight files are linked; only those whose tensors an edit renames are copied.

    Raises:
        OrthogonalizeError: two edits need different configurations.
    """
    common = SharedBase.of(source, plans)
    additions, config = common.additions, common.config
    if not additions and config == source.config:
        yield source.path
        return
    source = common.source
    with temporary_folder() as folder:
        # Renamed, since loaders take a lone model.safetensors for the whole model.
        links = {file: f"weights-{number:05}.safetensors" for number, file in enumerate(source.files)}
        for file in (*source.files, *map(str, source.side_files())):
            link = folder / links.get(file, file)
            if file in source.files and source.files[file].renamed:
                check_space(folder, source.files[file].path.stat().st_size)
                write_weights(source, folder, Changes({}, {}), names=[file])
                (folder / file).rename(link)
                continue
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((source.path / file).resolve())
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        home = "weights-added.safetensors"
        save_file({key: addition.make().contiguous() for key, addition in additions.items()}, folder / home)
        weight_map = {tensor: links[file] for file, held in source.files.items() for tensor in held.tensors}
        index = {"metadata": {}, "weight_map": weight_map | dict.fromkeys(additions, home)}
        (folder / INDEX).write_text(json.dumps(index) + "\n", "utf-8")
        yield folder


def edited_weights(plan: CheckpointPlan) -> Weights:
    """Every tensor that `plan` changes (and scales of quantized ones), computed as for a checkpoint on disk."""
    return {name: partial(plan.edited, name) for name in plan.changes.names}
