"""Where the residual stream passes through a running transformers model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..architectures.schema import Architecture, Norms, Part, architecture_of, setting
from ..core.errors import OrthogonalizeError
from ..core.interventions import Site


@dataclass(frozen=True)
class Stream:
    """The modules of a transformers model that the residual stream passes through."""

    model: nn.Module
    architecture: Architecture
    config: Mapping[str, Any]

    @classmethod
    def of(cls, model: Any) -> Stream:
        """The stream of `model`, located by its architecture file."""
        config = model.config.to_dict()
        return cls(model, architecture_of(config), config)

    @property
    def decoder_name(self) -> str:
        """The name of the module that contains the blocks."""
        for name in self.architecture.decoder_modules:
            if self._module(f"{name}.{self.architecture.block(0)}") is not None:
                return name
        raise OrthogonalizeError(
            f"{type(self.model).__name__} does not have its blocks where {self.architecture.family} models have them"
        )

    def _module(self, name: str) -> nn.Module | None:
        try:
            return self.model.get_submodule(name)
        except AttributeError:  # absent, or None
            return None

    @property
    def decoder(self) -> nn.Module:
        return self.model.get_submodule(self.decoder_name)

    @property
    def layer_count(self) -> int:
        return self.architecture.layers(self.config)

    def block_name(self, layer: int) -> str:
        return f"{self.decoder_name}.{self.architecture.block(layer)}"

    def block(self, layer: int) -> nn.Module:
        return self.model.get_submodule(self.block_name(layer))

    def active(self, hidden: torch.Tensor) -> torch.Tensor:
        """The stream [batch, tokens, d] that the parts of a block read and write, of what goes into the block.

        Raises:
            OrthogonalizeError: that is several streams, and the description does not say which of them it is.
        """
        if hidden.dim() == 3 and hidden.shape[-1] == self.architecture.width(self.config):
            return hidden
        if hidden.dim() != 4 or self.architecture.active_stream is None:
            raise OrthogonalizeError(
                f"blocks of {self.architecture.family} models pass on several streams, from which no directions are "
                "read; give one to edit (--direction)"
            )
        return hidden[int(setting(self.config, self.architecture.active_stream, 0))]

    def with_active(self, hidden: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """What goes into a block, `hidden`, with another stream for the `active` one."""
        if hidden.dim() == 3:
            return active
        number = int(setting(self.config, str(self.architecture.active_stream), 0))
        return torch.stack([active if n == number else each for n, each in enumerate(hidden)])

    @property
    def head_norm(self) -> nn.Module:
        """The norm before the head (and before any projection in between); the head itself if there is none."""
        if self.architecture.head.norm is None:
            head: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]
            return head
        return self.model.get_submodule(f"{self.decoder_name}.{self.architecture.head.norm}")

    def parts(self, site: Site) -> list[Part]:
        """The described parts of a block at `site` that exist in this layer."""
        block = self.block_name(int(site.layer or 0))
        return [
            part
            for part in self.architecture.parts(site.kind).values()
            if self._module(f"{block}.{part.module}") is not None
        ]

    def find(self, site: Site, name: str) -> nn.Module | None:
        """The module `name` in the block of `site`, or None."""
        return self._module(f"{self.block_name(int(site.layer or 0))}.{name}")

    def inner(self, site: Site, name: str) -> nn.Module:
        """The module `name` in the block of `site`."""
        return self.model.get_submodule(f"{self.block_name(int(site.layer or 0))}.{name}")

    def output(self, site: Site, part: Part) -> nn.Module:
        """The module whose output is added to the stream; norms after the block count as part of it."""
        return [self.inner(site, part.module), *self.post_norms(site, part)][-1]

    def post_norms(self, site: Site, part: Part) -> list[nn.Module]:
        """The norms that the output of `part` passes before it is added, in order."""
        held = [part.stored_as.get(f"{name}.weight", name) for name in part.post_norm]
        found = [(name, self.find(site, module)) for name, module in zip(part.post_norm, held, strict=True)]
        return [m if m is not None else self.inner(site, n) for n, m in found if m or n not in part.sometimes]

    def post_scale(self, site: Site, part: Part) -> torch.Tensor | None:
        """What the norms after `part` multiply its output by, [d] on the CPU; None if there are none."""
        scales = [norm_weight(norm, self.architecture.norms) for norm in self.post_norms(site, part)]
        return torch.stack(scales).prod(0) if scales else None

    def norm(self, site: Site, part: Part) -> nn.Module | None:
        """The norm through which `part` reads; None if it reads the stream directly."""
        block = self.block_name(int(site.layer or 0))
        held = (part.stored_as.get(f"{name}.weight", name) for name in part.norm)
        found = (self._module(f"{block}.{name}") for name in held)
        return next((module for module in found if module is not None), None)


def squares_of(norms: Norms, epsilon: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of x [..., d] that gives the square [..., 1] of what such a norm divides x by."""

    def squares(x: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if norms.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        return x.pow(2).mean(-1, keepdim=True) + epsilon

    return squares


def norm_weight(norm: nn.Module, norms: Norms) -> torch.Tensor:
    """What `norm` multiplies by, [d], on the CPU and in the dtype of its weight."""
    return norms.offset + norm.weight.detach().cpu()  # type: ignore[operator]
