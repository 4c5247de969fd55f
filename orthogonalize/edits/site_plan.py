"""A rewrite of a model whose sites are known: which tensors hold what, and what is planned for them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch

from ..architectures.schema import Architecture
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.quantization import check_editable
from ..checkpoints.rewrite import CheckpointPlan
from ..checkpoints.safetensors_file import EDITABLE
from ..checkpoints.tensor_edit import TensorEdit
from ..core.errors import OrthogonalizeError
from ..core.interventions import AffineMap, Site, shift
from ..models.sites import Sites


@dataclass
class SitePlan(CheckpointPlan):
    """What an edit does to a checkpoint, told by site and tensor."""

    architecture: Architecture = field(kw_only=True)

    @cached_property
    def sites(self) -> Sites:
        """The description, applied to the source's tensors."""
        return Sites(self.architecture, self.source.config, self.source.tensors)

    @property
    def rescales(self) -> bool:
        """Whether what blocks write keeps its direction only, for a norm behind them sets its length."""
        parts = (*self.architecture.attn.values(), *self.architecture.mlp.values())
        return any(part.post_norm for part in parts)

    def convert_to(self, architecture: Architecture, source: Checkpoint) -> None:
        """Go on with the same model as another family's, whose tensors `source` has."""
        self.architecture, self.source = architecture, source
        self.__dict__.pop("sites", None)

    def stored(self, name: str, site: Site) -> str:
        """`name`, once it is sure that such a tensor is there and can be edited."""
        if name in self.additions:
            if self.additions[name].dtype not in EDITABLE:
                raise AssertionError(f"{name} is added as {self.additions[name].dtype}, which holds no edit")
            return name
        check_editable(self.source, name)
        if name not in self.source.tensors:
            raise OrthogonalizeError(
                f"{self.source.path} lacks {name}, which every {self.architecture.family} model has at {site}"
            )
        return name

    def holds(self, name: str) -> bool:
        """Whether the edited checkpoint has a tensor `name`."""
        return name in self.source.tensors or name in self.additions

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the edited checkpoint."""
        return self.additions[name].shape if name in self.additions else tuple(self.source.tensors[name].shape)

    def edit(self, name: str, site: Site, axis: int, affine: AffineMap, part: Literal["matrix", "vectors"]) -> None:
        """Plan the edit of one tensor along its stream `axis`."""
        self.edits[name] = TensorEdit(self.stored(name, site), site, axis, affine, part)

    def add_constant(self, name: str, site: Site, vector: torch.Tensor, axis: int = -1) -> None:
        """Add `vector` along `axis` of tensor `name`, after whatever is planned for it already."""
        axis %= len(self.shape(self.stored(name, site)))
        planned = self.edits.get(name)
        affine = shift(vector)
        if planned is not None:
            affine = replace(planned.affine, s=planned.affine.s + affine.s)
            site = planned.site
        self.edits[name] = TensorEdit(name, site, axis, affine, "vectors")

    def configure(self, key: str, value: Any) -> None:
        """Set `key` of the text model's configuration."""
        nested = self.source.config.get("text_config")
        if isinstance(nested, dict):
            changed = self.config_changes.setdefault("text_config", dict(nested))
            changed[key] = value
        else:
            self.config_changes[key] = value

    def disable_remote_code(self) -> None:
        """Have nobody run code that came with the model: it does not know what the edit adds."""
        if self.source.config.get("auto_map"):
            self.config_changes["auto_map"] = {}

    def serve_by_transformers(self) -> None:
        """Have vLLM run the model by its Transformers backend; transformers itself ignores this key."""
        self.disable_remote_code()
        self.config_changes["architectures"] = [self.architecture.transformers_class]
