"""Baking: what an intervention means for the tensors of a checkpoint.

With `M h = h - u (v^T h) + s` at a write site, a stored matrix becomes `W - u (v^T W)` along its
stream axis and its bias `b - u (v^T b) + s`; an embedding row is a vector of the stream itself.
At a read site the norm stands between: `W D M D^-1`, with D the norm's weight. All arithmetic is
float64, rounded once to the stored dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from .architectures import Architecture, Norm, Write, architecture_of
from .checkpoint import Addition, Checkpoint, Progress, write_checkpoint
from .errors import OrthogonalizeError
from .interventions import AffineMap, Intervention, Site
from .tensorfile import EDITABLE


@dataclass(frozen=True)
class TensorRecord:
    """What an edit did to one tensor, for the recipe.

    `leak` is `|v^T W'| / |v^T W|` (Frobenius), the share of the written component that is left
    after the edit and its rounding (for reads, `|W' D v| / |W D v|`); None where there was none.
    `change` is `|W' - W| / |W|`.
    """

    name: str
    site: str
    leak: float | None
    change: float


def matrix_written(weight: torch.Tensor, axis: int, affine: AffineMap) -> torch.Tensor:
    """`W - u (v^T W)` along the stream `axis`, in float64."""
    return affine.linear(weight.to(torch.float64).movedim(axis, -1)).movedim(-1, axis)


def vectors_written(vectors: torch.Tensor, axis: int, affine: AffineMap) -> torch.Tensor:
    """The full map, shift included, on vectors of the stream (a bias, embedding rows), in float64."""
    return affine(vectors.to(torch.float64).movedim(axis, -1)).movedim(-1, axis)


def matrix_read(weight: torch.Tensor, axis: int, affine: AffineMap, norm: torch.Tensor) -> torch.Tensor:
    """`W D M D^-1` along the stream `axis`, in float64; `norm` [d] is the diagonal of D.

    A coordinate where D is zero is never read, so nothing can be moved out of it: its column stays.
    """
    rows = weight.to(torch.float64).movedim(axis, -1)
    scale = norm.to(torch.float64)
    inverse = torch.where(scale == 0, 0.0, 1 / torch.where(scale == 0, 1.0, scale))
    wide = affine.to(weight.device, torch.float64)
    return (rows - ((rows * scale) @ wide.u) @ (inverse.unsqueeze(-1) * wide.v).mT).movedim(-1, axis)


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> float | None:
    base = whole.norm().item()
    return part.norm().item() / base if base else None


@dataclass(frozen=True)
class TensorEdit:
    """One tensor's edit: how its stream `axis` meets the map of `site`."""

    name: str
    site: Site
    axis: int
    affine: AffineMap
    part: Literal["matrix", "vectors", "read"]
    norm: torch.Tensor | None = None

    def exact(self, weight: torch.Tensor) -> torch.Tensor:
        """The edited tensor in float64, before rounding."""
        match self.part:
            case "matrix":
                return matrix_written(weight, self.axis, self.affine)
            case "vectors":
                return vectors_written(weight, self.axis, self.affine)
            case "read":
                assert self.norm is not None
                return matrix_read(weight, self.axis, self.affine, self.norm)

    def component(self, weight: torch.Tensor) -> torch.Tensor:
        """The part of `weight` that the map looks at: `v^T W`, or `W D v` for a read."""
        vectors = weight.to(torch.float64).movedim(self.axis, -1)
        return (vectors if self.norm is None else vectors * self.norm.to(torch.float64)) @ self.affine.v

    def apply(self, weight: torch.Tensor) -> tuple[torch.Tensor, TensorRecord]:
        """The edited tensor in the dtype of `weight`, and what was measured.

        Raises:
            OrthogonalizeError: `weight` holds NaN or infinite values.
        """
        if not torch.isfinite(weight).all():
            raise OrthogonalizeError(f"{self.name} holds NaN or infinite values; the checkpoint is damaged")
        edited = self.exact(weight).to(weight.dtype)
        if not torch.isfinite(edited).all():
            raise OrthogonalizeError(
                f"the edit of {self.name} overflows {weight.dtype}; use a smaller strength or length"
            )
        change = _ratio(edited.to(torch.float64) - weight.to(torch.float64), weight.to(torch.float64))
        leak = _ratio(self.component(edited), self.component(weight))
        return edited, TensorRecord(self.name, str(self.site), leak, change or 0.0)


@dataclass
class Bake:
    """The plan of an edit: tensors to change, tensors to add, configuration to set."""

    source: Checkpoint
    architecture: Architecture
    edits: dict[str, TensorEdit] = field(default_factory=dict)
    additions: dict[str, Addition] = field(default_factory=dict)
    config_changes: dict[str, Any] = field(default_factory=dict)
    records: dict[str, TensorRecord] = field(default_factory=dict)

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
        tensor, self.records[name] = self.edits[name].apply(tensor)
        return tensor

    def write(self, target: Path, progress: Progress | None = None) -> None:
        """Write the edited checkpoint into the empty folder `target`."""
        made = {
            name: Addition(addition.dtype, addition.shape, lambda name=name: self.edited(name))  # type: ignore[misc]
            for name, addition in self.additions.items()
        }
        changed = {name for name in self.edits if name not in self.additions}
        write_checkpoint(self.source, target, changed, self.edited, made, self.config_changes, progress)

    def _stored(self, name: str, site: Site) -> str:
        if name in self.additions:
            return name
        info = self.source.tensors.get(name)
        if info is None:
            raise OrthogonalizeError(
                f"{self.source.path} lacks {name}, which every {self.architecture.family} model has at {site}"
            )
        if info.dtype not in EDITABLE:
            raise OrthogonalizeError(
                f"{name} is stored as {info.dtype}, which cannot be edited; start from a bfloat16 or float32 checkpoint"
            )
        return name

    def _edit(self, name: str, site: Site, axis: int, affine: AffineMap, part: Literal["matrix", "vectors"]) -> None:
        self.edits[name] = TensorEdit(self._stored(name, site), site, axis, affine, part)

    def plan_write(self, site: Site, affine: AffineMap) -> None:
        """Plan the edit of everything that writes into the stream at `site`."""
        if site.kind == "embed":
            self._untie_head()
            embedding = self.architecture.embedding
            self._edit(embedding.weight, site, embedding.axis, affine, "vectors")
            return
        for write in (self.architecture.attn if site.kind == "attn" else self.architecture.mlp).writes:
            if affine.rank:
                self._edit(write.weight.format(layer=site.layer), site, write.axis, affine, "matrix")
            bias = write.bias.format(layer=site.layer) if write.bias else None
            if bias is not None and bias not in self.source.tensors and affine.shifts:
                self._switch_on_biases(site, write)
            if bias is not None and (bias in self.source.tensors or bias in self.additions):
                self._edit(bias, site, 0, affine, "vectors")
            elif affine.shifts:
                raise OrthogonalizeError(self._no_bias(site))

    def plan_read(self, site: Site, affine: AffineMap) -> None:
        """Plan the edit of everything that reads the stream at `site`."""
        if site.kind == "head":
            self._untie_head()
            head = self.architecture.head
            norm, reads = head.norm, head.reads
        else:
            block = self.architecture.attn if site.kind == "attn" else self.architecture.mlp
            norm, reads = block.norm, block.reads
        scale = self._norm_weight(norm, site)
        for read in reads:
            name = self._stored(read.weight.format(layer=site.layer), site)
            self.edits[name] = TensorEdit(name, site, read.axis, affine, "read", scale)

    def _norm_weight(self, norm: Norm, site: Site) -> torch.Tensor:
        return self.source.read(self._stored(norm.weight.format(layer=site.layer), site))

    def _no_bias(self, site: Site) -> str:
        return (
            f"{self.architecture.family} has no bias at {site}, so no constant can be written there exactly; "
            "use ablate, nullspace or reflect, or shift the embedding (--layer 0)"
        )

    def _switch_on_biases(self, site: Site, write: Write) -> None:
        """Turn on the flag that gives `write` a bias, and store all the biases it creates, as zeros.

        The flag holds for the whole model, and a server leaves a missing bias uninitialised.
        """
        if write.bias is None or write.bias_flag is None:
            raise OrthogonalizeError(self._no_bias(site))
        self.config_changes[write.bias_flag] = True
        created = [(write.bias, write.weight, write.axis)]
        created += [(zero.bias, zero.weight, 0) for zero in write.bias_flag_also_creates]
        for layer in range(self.architecture.layers(self.source.config)):
            for bias, weight, axis in created:
                name = bias.format(layer=layer)
                if name not in self.source.tensors:
                    info = self.source.tensors[self._stored(weight.format(layer=layer), site)]
                    self.additions.setdefault(name, Addition.zeros(info.dtype, (info.shape[axis],)))

    def _untie_head(self) -> None:
        """Make the head independent of the embedding, with the values it has now."""
        head, embedding = self.architecture.head, self.architecture.embedding
        stored = head.weight in self.source.tensors
        if not stored:
            name = self._stored(embedding.weight, Site("embed"))
            info = self.source.tensors[name]
            self.additions[head.weight] = Addition(info.dtype, info.shape, lambda: self.source.read(name))
        if not stored or self.source.config.get(head.tied_flag):
            self.config_changes[head.tied_flag] = False


def bake(source: Checkpoint, intervention: Intervention) -> Bake:
    """Plan the edit that realises `intervention` in the weights of `source`; nothing is written.

    Raises:
        OrthogonalizeError: the architecture is not described, the widths differ, a tensor is missing
            or not editable, or a constant has no exact place.
    """
    plan = Bake(source, architecture_of(source.config))
    width = plan.architecture.width(source.config)
    if intervention.width not in (None, width):
        raise OrthogonalizeError(
            f"the direction has width {intervention.width} and the model's residual stream {width}; "
            "was it extracted from another model?"
        )
    for site, affine in intervention.writes.items():
        plan.plan_write(site, affine)
    for site, affine in intervention.reads.items():
        plan.plan_read(site, affine)
    return plan
