"""Baking: which tensors of a checkpoint realise an intervention, and how their axes meet its maps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from .architectures import Architecture, Norm, Write, architecture_of
from .checkpoint import Addition, Checkpoint
from .errors import OrthogonalizeError
from .interventions import AffineMap, Intervention, Site
from .quantisation import check_editable
from .rewriting import Rewrite
from .tensoredits import TensorEdit


@dataclass
class Bake(Rewrite):
    """The plan of an edit, made site by site."""

    architecture: Architecture = field(kw_only=True)

    def _stored(self, name: str, site: Site) -> str:
        if name in self.additions:
            return name
        check_editable(self.source, name)
        if name not in self.source.tensors:
            raise OrthogonalizeError(
                f"{self.source.path} lacks {name}, which every {self.architecture.family} model has at {site}"
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
            self.additions[head.weight] = Addition.copy(self.source, self._stored(embedding.weight, Site("embed")))
        if not stored or self.source.config.get(head.tied_flag):
            self.config_changes[head.tied_flag] = False


def bake(source: Checkpoint, intervention: Intervention) -> Bake:
    """Plan the edit that realises `intervention` in the weights of `source`; nothing is written.

    Raises:
        OrthogonalizeError: the architecture is not described, the widths differ, a tensor is missing
            or not editable, or a constant has no exact place.
    """
    plan = Bake(source, architecture=architecture_of(source.config))
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
