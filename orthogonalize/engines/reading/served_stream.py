"""Where the residual stream passes through a model that vLLM runs.

vLLM's classes name most modules as transformers' do. Its blocks hand on the stream in two parts, `hidden_states` and
`residual`, whose sum it is: the addition is left to the next norm.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import nn

from ...architectures.schema import Part, architecture_of
from ...core.errors import OrthogonalizeError
from ...core.interventions import Site
from ...models.stream import Stream

HIDDEN = ("hidden_states", "hidden_state", "x", "inputs")  # what classes call the stream in `forward`
RESIDUAL = "residual"
OTHER_TOWERS = ("vision", "visual", "audio", "speech", "image")


class ServedStream(Stream):
    """The modules of a model that vLLM runs; those of other pipeline stages are placeholders."""

    @classmethod
    def of(cls, model: Any) -> Self:
        """The stream of `model`, vLLM's module of the whole model.

        Raises:
            OrthogonalizeError: its class has its blocks or its last norm elsewhere.
        """
        config = model.config if isinstance(model.config, Mapping) else model.config.to_dict()
        found = cls(model, architecture_of(dict(config)), dict(config))
        found.head_norm  # noqa: B018  # and thereby the decoder
        return found

    @cached_property
    def _decoder_name(self) -> str:
        blocks, _, _ = self.architecture.layer.rpartition(".")
        found = [
            name.removesuffix(blocks).rstrip(".")
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList)
            and len(module) == self.layer_count
            and (name == blocks or name.endswith(f".{blocks}"))
            and not any(word in name for word in OTHER_TOWERS)
        ]
        last = self.architecture.head.norm
        if len(found) != 1 or last is None or self._module(f"{found[0]}.{last}") is None:
            raise _elsewhere(self.model, f"does not have its blocks where {self.architecture.family} models have them")
        return str(found[0])

    @property
    def decoder_name(self) -> str:
        return self._decoder_name

    @cached_property
    def local_layers(self) -> list[int]:
        """The blocks of this pipeline stage."""
        return [layer for layer in range(self.layer_count) if not _is_missing(self.block(layer))]

    @property
    def has_head(self) -> bool:
        """Whether this pipeline stage has the last norm and the head."""
        return not _is_missing(self.head_norm)

    def outputs(self, layer: int) -> list[nn.Module]:
        """The modules of block `layer` whose outputs are added to the stream.

        Raises:
            OrthogonalizeError: one is not found.
        """
        return [
            self.output(site, part)
            for site in (Site("attn", layer), Site("mlp", layer))
            for part in self.served_parts(site)
        ]

    def served_parts(self, site: Site) -> list[Part]:
        """`parts`, where vLLM may call a module otherwise: it is then the one that is left.

        Raises:
            OrthogonalizeError: it cannot be told which one that is.
        """
        found = self.parts(site)
        described = list(self.architecture.parts(site.kind).values())
        if found or not described:
            return found
        block = self.block(int(site.layer or 0))
        taken = {part.module for kind in ("attn", "mlp") for part in self.architecture.parts(kind).values()}
        left = [
            name
            for name, module in block.named_children()
            if name not in taken and "norm" not in name.lower() and any(True for _ in module.parameters())
        ]
        if len(left) != 1:
            raise _elsewhere(self.model, f"does not have {described[0].module} in block {site.layer}")
        return [described[0].model_copy(update={"module": left[0]})]


def _is_missing(module: nn.Module) -> bool:
    """Whether `module` stands for one of another pipeline stage."""
    return type(module).__name__ == "PPMissingLayer"


def _elsewhere(model: nn.Module, what: str) -> OrthogonalizeError:
    return OrthogonalizeError(f"vLLM's {type(model).__name__} {what}; use --engine stream")


@dataclass(frozen=True)
class StreamArguments:
    """Where a block's or a norm's `forward` takes the two parts of the stream."""

    hidden: int
    name: str
    residual: int | None

    @classmethod
    def of(cls, module: nn.Module) -> StreamArguments:
        """Those of `module`.

        Raises:
            OrthogonalizeError: it takes no stream that is known by its name.
        """
        names = list(inspect.signature(type(module).forward).parameters)[1:]  # without self
        found = next((name for name in HIDDEN if name in names), None)
        if found is None:
            raise _elsewhere(module, f"takes its input under another name than {HIDDEN[0]}")
        return cls(names.index(found), found, names.index(RESIDUAL) if RESIDUAL in names else None)

    def parts(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states` and `residual` (None where the stream is whole) of a call, [tokens, d]."""
        hidden = args[self.hidden] if self.hidden < len(args) else kwargs[self.name]
        if self.residual is None:
            return hidden, None
        return hidden, args[self.residual] if self.residual < len(args) else kwargs.get(RESIDUAL)

    def replaced(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with other parts of the stream."""
        positional, named = list(args), dict(kwargs)
        for place, name, value in ((self.hidden, self.name, hidden), (self.residual, RESIDUAL, residual)):
            if place is not None and place < len(positional):
                positional[place] = value
            elif place is not None and (name in named or value is not None):
                named[name] = value
        return tuple(positional), named


NORM_ARGUMENTS = StreamArguments(0, "x", 1)  # of vLLM's norms, which it calls with positional arguments


def stream_of(hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """The stream [tokens, d] of its two parts."""
    return hidden if residual is None else hidden + residual
