"""Baking: which tensors of a checkpoint realise an intervention, and how their axes meet its maps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..architectures.schema import Part, architecture_of, bias_name
from ..checkpoints.checkpoint import Addition, Checkpoint
from ..checkpoints.quantization import real_rows
from ..checkpoints.safetensors_file import DTYPES, row_blocks
from ..checkpoints.tensor_edit import TensorEdit
from ..core.errors import OrthogonalizeError
from ..core.interventions import AffineMap, Intervention, Site, conjugate
from ..models.sites import Located
from .constant_vectors import place_constant
from .site_plan import SitePlan

CENTRED = 1e-6  # largest sum of a unit vector's entries that counts as none


@dataclass
class EditPlan(SitePlan):
    """The plan of an edit, made site by site."""

    def plan_write(self, site: Site, affine: AffineMap) -> None:
        """Plan the edit of everything that writes into the stream at `site`."""
        if site.kind == "embed":
            self._plan_embedding(site, affine)
            return
        if affine.rank:
            for part in self.sites.parts(site):
                self._plan_part(site, part, affine.unshifted)
        if affine.shifts:
            place_constant(self, site, affine.s)

    def _plan_part(self, site: Site, part: Part, affine: AffineMap) -> None:
        layer = int(site.layer or 0)
        if part.post_norm is not None:
            affine = conjugate(affine, self.norm_weight(self.sites.in_layer(f"{part.post_norm}.weight", layer), site))
        for write in self.sites.writes(part, layer):
            self.edit(write.name, site, write.axis, affine, "matrix")
            bias = bias_name(write.name)
            if bias in self.source.tensors:
                self.edit(bias, site, len(self.shape(bias)) - 1, affine, "vectors")

    def _plan_embedding(self, site: Site, affine: AffineMap) -> None:
        carried = not affine.shifts
        for entry, name in self.sites.embedded():
            bias = bias_name(name)
            if affine.rank:
                self.edit(name, site, entry.axis, affine.unshifted, "vectors" if entry.rows else "matrix")
                if not entry.rows and bias in self.source.tensors:
                    self.edit(bias, site, 0, affine.unshifted, "vectors")
            if entry.rows and not carried:
                self.add_constant(name, site, affine.s / self._embedding_scale(entry.scale, name), entry.axis)
                carried = True
            if entry.image and affine.shifts:
                if bias not in self.source.tensors:
                    raise OrthogonalizeError(
                        f"{name} has no bias, so what comes from images cannot be shifted by a constant; "
                        "use ablate, nullspace or reflect"
                    )
                self.add_constant(bias, site, affine.s)
        if self.sites.tied_to in self.edits:
            self.untie_head()

    def _embedding_scale(self, key: str | None, name: str) -> float:
        scale = self.architecture.scale(key, self.source.config)
        if key == "sqrt_width":  # kept by the model in the weights' own dtype
            scale = torch.tensor(scale, dtype=DTYPES[self.source.tensors[name].dtype]).item()
        return scale

    def plan_read(self, site: Site, affine: AffineMap) -> None:
        """Plan the edit of everything that reads the stream at `site`."""
        if site.kind == "head":
            reader = self.sites.reader
            if reader.name == self.sites.head:
                self.untie_head()
            name = f"{self.sites.decoder}{self.architecture.head.norm}.weight"
            norm = name if self.architecture.norms.parameters else None
            self._plan_reads(site, [reader], norm, affine)
            return
        layer = int(site.layer or 0)
        for part in self.sites.parts(site):
            self._plan_reads(site, self.sites.reads(part, layer), self.sites.norm(part, layer), affine, bool(part.norm))

    def _plan_reads(
        self, site: Site, reads: list[Located], norm: str | None, affine: AffineMap, normed: bool = True
    ) -> None:
        centring = normed and self.architecture.norms.kind == "layer"
        if centring and not affine.is_centred(CENTRED):
            raise OrthogonalizeError(
                f"{self.architecture.family} subtracts the mean before it reads, so a direction must be centred first"
            )
        scale = torch.ones(affine.width, dtype=torch.float64) if norm is None else self.norm_weight(norm, site)
        bias = bias_name(norm) if norm else ""
        for read in reads:
            name = self.stored(read.name, site)
            self.edits[name] = TensorEdit(name, site, read.axis, affine, "read", scale)
            if centring and bias in self.source.tensors:
                self._keep_bias_read(self.edits[name], self.source.read(bias).double())

    def _keep_bias_read(self, edit: TensorEdit, bias: torch.Tensor) -> None:
        """Give back what the edited reader no longer sees of the norm's own `bias`, which is no part of the stream."""
        addition, affine = self.additions.get(edit.name), edit.vectors_map()
        name = edit.name if addition is None else addition.copy_of or edit.name
        rows = real_rows(self.source, name)
        component, square = torch.zeros((), dtype=torch.float64), 0.0
        parts: list[torch.Tensor] = []
        for first, last in row_blocks(self.source.tensors[name].shape):
            block = rows(first, last).double()
            square += float(block.square().sum())
            if edit.axis == 0:
                component = component + block.movedim(0, -1) @ affine.v[first:last]
            else:
                parts.append(block.movedim(edit.axis, -1) @ affine.v)
        lost = (torch.cat(parts) if parts else component) @ (affine.u.mT @ bias)
        if lost.norm() <= 1e-12 * square**0.5 * bias.norm():
            return
        own = bias_name(edit.name)
        if own not in self.source.tensors:
            raise OrthogonalizeError(
                f"{edit.name} reads through a LayerNorm with a bias and has none itself, so what it reads along the "
                "direction cannot be taken away exactly; use a scope on the write side (all, upto:l, layers:…)"
            )
        self.add_constant(own, edit.site, lost)

    def norm_weight(self, name: str, site: Site) -> torch.Tensor:
        """What the norm with weight `name` multiplies by, float64."""
        return self.architecture.norms.offset + self.source.read(self.stored(name, site)).double()

    def untie_head(self) -> None:
        """Make the head independent of the embedding, with the values it has now.

        Raises:
            OrthogonalizeError: no server runs such a head of this family.
        """
        head, name, embedding = self.architecture.head, self.sites.head, self.sites.tied_to
        if name not in self.source.tensors:
            if head.untied == "never":
                raise OrthogonalizeError(
                    f"vLLM always takes the embedding of {self.architecture.family} for its head, so neither can be "
                    "edited for it alone; use a scope without them (layers:…, one, top:…)"
                )
            self.additions[name] = Addition.copy(self.source, self.stored(embedding, Site("embed")))
            if head.untied == "transformers":
                self.serve_by_transformers()
        for flag in head.flags:
            for config in (self.source.config, self.source.config.get("text_config")):
                if isinstance(config, dict) and (name in self.additions or config.get(flag, head.tied)):
                    self._set_untied(flag, nested=config is not self.source.config)

    def _set_untied(self, flag: str, nested: bool) -> None:
        if nested:
            self.configure(flag, False)
        else:
            self.config_changes[flag] = False


def bake(source: Checkpoint, intervention: Intervention) -> EditPlan:
    """Plan the edit that realises `intervention` in the weights of `source`; nothing is written.

    Raises:
        OrthogonalizeError: the architecture is not described, or not all of this checkpoint; the widths
            differ, a tensor is missing or not editable, or a constant has no exact place.
    """
    plan = EditPlan(source, architecture=architecture_of(source.config))
    width = plan.architecture.width(source.config)
    if intervention.width not in (None, width):
        raise OrthogonalizeError(
            f"the direction has width {intervention.width} and the model's residual stream {width}; "
            "was it extracted from another model?"
        )
    plan.sites.check_complete()
    plan.sites.check_images()
    for site, affine in intervention.writes.items():
        plan.plan_write(site, affine)
    for site, affine in intervention.reads.items():
        plan.plan_read(site, affine)
    return plan
