"""The plan of an edit: the changes to a checkpoint, filled in site by site."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..architectures.schema import Architecture, architecture_of
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.plan import CheckpointPlan
from ..checkpoints.quantization import check_editable
from ..checkpoints.safetensors_file import EDITABLE, show_shape
from ..checkpoints.tensor_edit import TensorEdit
from ..checkpoints.writer import Written
from ..core.errors import OrthogonalizeError
from ..core.interventions import AffineMap, Site, shift
from ..core.words import counted
from ..models.sites import Sites


@dataclass
class EditPlan:
    """An edit of a model: what changes in its checkpoint, and where its sites are.

    `bake` makes it. Everything that only writes files, or swaps weights, needs `checkpoint` alone.
    """

    checkpoint: CheckpointPlan
    sites: Sites

    @classmethod
    def of(cls, source: Checkpoint) -> EditPlan:
        """The plan that changes nothing in `source`.

        Raises:
            OrthogonalizeError: the architecture has no description.
        """
        plan = CheckpointPlan(source)
        return cls(plan, Sites(architecture_of(source.config), source.config, source.tensors | plan.packed))

    def __repr__(self) -> str:
        edited, added = len(self.checkpoint.edits), len(self.checkpoint.additions)
        return f"EditPlan({self.architecture.family}: {counted(edited, 'tensor')} edited, {added} added)"

    @property
    def source(self) -> Checkpoint:
        """The checkpoint to edit, with its tensors under the names that they have in the result."""
        return self.checkpoint.source

    @property
    def architecture(self) -> Architecture:
        """The description of the model's family."""
        return self.sites.architecture

    @property
    def has_post_norms(self) -> bool:
        """Whether a norm follows what blocks write, so that only the direction of a write counts, not its length."""
        parts = (*self.architecture.attn.values(), *self.architecture.mlp.values())
        return any(part.post_norm for part in parts)

    def write(self, target: Path, **options: Any) -> Written:
        """Write the edited checkpoint into the empty folder `target` (see `CheckpointPlan.write`)."""
        return self.checkpoint.write(target, **options)

    def convert_to(self, architecture: Architecture, source: Checkpoint) -> None:
        """Continue as a model of another family: the same weights, under the tensor names of `source`."""
        self.checkpoint.source = source
        self.sites = Sites(architecture, source.config, source.tensors)

    def check_tensor(self, name: str, site: Site) -> str:
        """`name`, once checked that the edited checkpoint has such a tensor and that its format can be edited.

        Raises:
            OrthogonalizeError: it is missing, or stored in a format that cannot be edited.
        """
        added = self.checkpoint.additions.get(name)
        if added is not None:
            if added.dtype not in EDITABLE:
                raise AssertionError(f"{name} is added as {added.dtype}, which cannot be edited")
            return name
        if name in self.checkpoint.packed:
            return name
        check_editable(self.source, name)
        if name not in self.source.tensors:
            raise OrthogonalizeError(
                f"{self.source.path} lacks {name}, which every {self.architecture.family} model has at {site}"
            )
        return name

    def check_shape(self, name: str, site: Site, axis: int, width: int) -> str:
        """`name`, once checked (see `check_tensor`) that the tensor has `width` entries along `axis`.

        A tensor with three axes holds one matrix per routed or shared expert of the configuration.

        Raises:
            OrthogonalizeError: it is missing, cannot be edited, or has another shape.
        """
        shape = self.checkpoint.shape(self.check_tensor(name, site))
        wanted = f"{width} along axis {axis}"
        fits = -len(shape) <= axis < len(shape) and shape[axis] == width
        experts = self.architecture.stacked(name, self.source.config)
        if fits and len(shape) == 3 and experts:
            wanted, fits = f"{wanted} and {experts} experts along axis 0", shape[0] == experts
        if not fits or len(shape) > 3 or not all(shape):
            raise OrthogonalizeError(
                f"{name} has the shape {show_shape(shape)}, but config.json and the edit need {wanted}; "
                "fetch the checkpoint again"
            )
        return name

    def edit(self, name: str, site: Site, axis: int, affine: AffineMap, part: Literal["matrix", "vectors"]) -> None:
        """Plan the edit of one tensor along its stream `axis`."""
        self.check_shape(name, site, axis, affine.width)
        self.checkpoint.edits[name] = TensorEdit(name, site, axis, affine, part)

    def edit_reader(self, name: str, site: Site, axis: int, affine: AffineMap, norm: torch.Tensor) -> TensorEdit:
        """Plan the edit of a tensor that reads the stream along `axis` through a norm with weight `norm` [d]."""
        self.check_shape(name, site, axis, affine.width)
        self.checkpoint.edits[name] = TensorEdit(name, site, axis, affine, "read", norm)
        return self.checkpoint.edits[name]

    def edit_given(self, name: str, site: Site, axis: int, affine: AffineMap, given: torch.Tensor) -> None:
        """Plan to take the components `given` out of one matrix along its stream `axis` (see `TensorEdit.given`)."""
        self.check_shape(name, site, axis, affine.width)
        self.checkpoint.edits[name] = TensorEdit(name, site, axis, affine, "matrix", given=given)

    def add_constant(self, name: str, site: Site, vector: torch.Tensor, axis: int = -1) -> None:
        """Add `vector` along `axis` of tensor `name`, on top of whatever is already planned for it."""
        axis %= len(self.checkpoint.shape(self.check_shape(name, site, axis, len(vector))))
        planned = self.checkpoint.edits.get(name)
        affine = shift(vector)
        if planned is not None:
            affine = replace(planned.affine, s=planned.affine.s + affine.s)
            site = planned.site
        self.checkpoint.edits[name] = TensorEdit(name, site, axis, affine, "vectors")

    def serve_with_transformers(self) -> None:
        """Make vLLM run the model by its Transformers backend; transformers itself ignores this key."""
        self.checkpoint.disable_remote_code()
        self.checkpoint.config_changes["architectures"] = [self.architecture.transformers_class]
