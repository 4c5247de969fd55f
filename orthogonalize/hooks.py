"""Hooks: the yardstick. The same interventions, on a running transformers model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .architectures import architecture_of
from .interventions import AffineMap, Intervention, Site


def _first(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _with_first(output: Any, tensor: torch.Tensor) -> Any:
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


def map_output(module: nn.Module, affine: AffineMap) -> torch.utils.hooks.RemovableHandle:
    """Apply `affine` to what `module` returns (the first item of a tuple)."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return _with_first(output, affine(_first(output)))

    return module.register_forward_hook(hook)


def map_input(module: nn.Module, affine: AffineMap) -> torch.utils.hooks.RemovableHandle:
    """Apply `affine` to the hidden states that `module` is given first."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (affine(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": affine(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _map_norm(norm: nn.Module, affine: AffineMap, epsilon: float) -> torch.utils.hooks.RemovableHandle:
    """Let `norm` (RMS) read `M x` while it divides by the scale of `x`, as baked readers do."""

    def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        mapped = affine(x)
        result: torch.Tensor = norm.forward(mapped)
        squares = (mapped.pow(2).mean(-1, keepdim=True) + epsilon) / (x.pow(2).mean(-1, keepdim=True) + epsilon)
        return result * squares.sqrt().to(result.dtype)

    return norm.register_forward_hook(hook)


@contextmanager
def intervened(model: nn.Module, intervention: Intervention, renormalise: bool = True) -> Iterator[nn.Module]:
    """Run a transformers `model` under `intervention` for the length of the block.

    Write sites are mapped where they are added to the stream. Read sites are mapped before their
    norm; the norm then divides by the scale of the mapped stream, as if the stream itself had been
    mapped. Baked readers cannot see that scale: `renormalise=False` divides by the unmapped one,
    which weights reproduce exactly (design: the two differ by a positive factor for every token).
    """
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    architecture = architecture_of(config)
    with ExitStack() as stack:

        def add(handle: torch.utils.hooks.RemovableHandle) -> None:
            stack.callback(handle.remove)

        for site, affine in intervention.writes.items():
            module = architecture.embedding.module if site.kind == "embed" else _block(architecture, site).module
            add(map_output(model.get_submodule(module.format(layer=site.layer)), affine))
        for site, affine in intervention.reads.items():
            norm = architecture.head.norm if site.kind == "head" else _block(architecture, site).norm
            module_ = model.get_submodule(norm.module.format(layer=site.layer))
            add(map_input(module_, affine) if renormalise else _map_norm(module_, affine, architecture.epsilon(config)))
        yield model


def _block(architecture: Any, site: Site) -> Any:
    return architecture.attn if site.kind == "attn" else architecture.mlp


@contextmanager
def layer_projected(model: nn.Module, layer: int, affine: AffineMap) -> Iterator[nn.Module]:
    """The reference's local intervention: block `layer`'s input and both its outputs are mapped.

    (eliroc98/refusal_direction; Arditi et al. 2024, section 2.4.) The accumulated stream is mapped
    at the input, which no weight can do, so this serves to score directions and is never baked. A
    shift belongs to the stream, so the outputs are mapped without it.
    """
    architecture = architecture_of(model.config.to_dict())  # type: ignore[operator, union-attr]
    block = model.get_submodule(architecture.layer_module.format(layer=layer))
    outputs = [model.get_submodule(s.module.format(layer=layer)) for s in (architecture.attn, architecture.mlp)]
    handles = [map_input(block, affine), *(map_output(output, affine.unshifted) for output in outputs)]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def input_shifted(model: nn.Module, layer: int, affine: AffineMap) -> Iterator[nn.Module]:
    """Map the input of block `layer` only (activation addition at the source layer)."""
    architecture = architecture_of(model.config.to_dict())  # type: ignore[operator, union-attr]
    handle = map_input(model.get_submodule(architecture.layer_module.format(layer=layer)), affine)
    try:
        yield model
    finally:
        handle.remove()


@contextmanager
def capturing_inputs(model: nn.Module, take: Callable[[int, torch.Tensor], None]) -> Iterator[nn.Module]:
    """Call `take(layer, hidden_states)` at the input of every block, and of the head's norm last.

    Hidden states are [batch, tokens, d]; index `layer_count` is the stream that the head reads.
    """
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    architecture = architecture_of(config)
    layers = architecture.layers(config)
    names = [architecture.layer_module.format(layer=layer) for layer in range(layers)]
    names.append(architecture.head.norm.module)
    handles = []
    for layer, name in enumerate(names):

        def hook(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: int = layer) -> None:
            take(layer, args[0] if args else kwargs["hidden_states"])

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
