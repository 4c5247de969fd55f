"""Apply interventions to a running transformers model with hooks, the reference for baked weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..architectures.schema import Norms
from ..core.errors import OrthogonalizeError
from ..core.interventions import AffineMap, Intervention, Site, conjugate, shift
from .forward.block_inputs import changing_input
from .stream import Stream, squares_of
from .write_matrices import conditionally_edited

Handles = Iterator[torch.utils.hooks.RemovableHandle]
Strength = float | torch.Tensor
"""What scales a map (see `AffineMap.scaled`)."""


def _hidden_states(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def _replace_hidden_states(output: Any, tensor: torch.Tensor) -> Any:
    if isinstance(output, list):
        return [tensor, *output[1:]]
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


def _apply_map(affine: AffineMap, hidden: torch.Tensor) -> torch.Tensor:
    """Apply `affine` to `hidden`, also if a block (OPT's) has flattened the batch that a batch of maps needs."""
    if affine.v.dim() == 3 and hidden.dim() == 2:
        return affine(hidden.reshape(len(affine.v), -1, hidden.shape[-1])).reshape(hidden.shape)
    return affine(hidden)


def _map_biases(output: tuple[Any, ...], affine: AffineMap) -> tuple[Any, ...]:
    """Map the biases [d] that some modules return beside their hidden states, for the block to add."""
    batch, width = affine.v.shape[:-2], affine.v.shape[-2]
    return tuple(
        affine.unshifted(each.expand(*batch, 1, width) if batch else each)
        if isinstance(each, torch.Tensor) and each.shape == (width,)
        else each
        for each in output
    )


def map_output(module: nn.Module, affine: AffineMap) -> torch.utils.hooks.RemovableHandle:
    """Apply `affine` to the output of `module` (the first item of a tuple)."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        mapped = _replace_hidden_states(output, _apply_map(affine, _hidden_states(output)))
        return _map_biases(mapped, affine) if isinstance(mapped, tuple) else mapped

    return module.register_forward_hook(hook)


def map_input(module: nn.Module, affine: AffineMap) -> torch.utils.hooks.RemovableHandle:
    """Apply `affine` to the hidden states that `module` receives."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (affine(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": affine(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _map_norm(norm: nn.Module, affine: AffineMap, norms: Norms, epsilon: float) -> torch.utils.hooks.RemovableHandle:
    """Apply `norm` to `M x` but divide by the scale of `x`, as weights with a baked read do."""
    squares = squares_of(norms, epsilon)

    def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        mapped = affine(x)
        result: torch.Tensor = norm.forward(mapped)
        ratio = (squares(mapped) / squares(x)).sqrt().to(result.dtype)
        bias = getattr(norm, "bias", None)
        return result * ratio if bias is None else (result - bias) * ratio + bias

    return norm.register_forward_hook(hook)


def _map_before_norm(norm: nn.Module, before: AffineMap) -> torch.utils.hooks.RemovableHandle:
    """Apply `before` to the input of a `norm` after a block, as weights with a baked write do (see `conjugate`)."""

    def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = norm.forward(_apply_map(before, inputs[0]))
        return result

    return norm.register_forward_hook(hook)


def _hook_write(stream: Stream, site: Site, affine: AffineMap, renormalise: bool, strength: Strength) -> Handles:
    if site.kind == "embed":  # everything written before the first block
        embedding = stream.architecture.embed_module
        if embedding is not None:
            yield map_output(stream.decoder.get_submodule(embedding), affine.scaled(strength))
        else:
            yield map_input(stream.block(0), affine.scaled(strength))
        return
    parts = stream.parts(site)
    if not parts:  # the family's blocks have no MLP, so attention adds the constant
        site, affine = Site("attn", site.layer), shift(affine.s)
        parts = stream.parts(site)
    mapped: set[nn.Module] = set()
    for number, part in enumerate(parts):
        module, scale = stream.output(site, part), stream.post_scale(site, part)
        if scale is not None and not renormalise:
            before = conjugate(affine, scale)
            yield _map_before_norm(stream.post_norms(site, part)[0], before.scaled(strength))
            continue
        if module in mapped:  # a norm after the sum of several parts
            continue
        mapped.add(module)
        factor = 1.0 if part.scale_inside else stream.architecture.scale(part.scale, stream.config)
        once = replace(affine, s=affine.s / factor) if number == 0 else affine.unshifted
        yield map_output(module, once.scaled(strength))


def _hook_reads(stream: Stream, reads: Mapping[Site, AffineMap], renormalise: bool) -> Handles:
    norms, epsilon = stream.architecture.norms, stream.architecture.epsilon(stream.config)
    hooked: dict[nn.Module, AffineMap] = {}
    for site, affine in reads.items():
        if site.kind == "head":
            read: list[tuple[nn.Module, bool]] = [(stream.head_norm, stream.architecture.head.norm is not None)]
        else:
            pairs = [(stream.norm(site, part), part) for part in stream.parts(site)]
            read = [(stream.inner(site, p.module) if n is None else n, n is not None) for n, p in pairs]
        for module, is_norm in read:
            if module in hooked:  # parallel blocks read through the same norm
                if not all(torch.equal(getattr(hooked[module], k), getattr(affine, k)) for k in ("u", "v")):
                    raise OrthogonalizeError(f"{site} shares its norm with a block that is mapped differently")
                continue
            hooked[module] = affine
            kept = is_norm and not renormalise
            yield _map_norm(module, affine, norms, epsilon) if kept else map_input(module, affine)


@contextmanager
def intervened(
    model: nn.Module,
    intervention: Intervention,
    renormalise: bool = True,
    strengths: Mapping[Site, Strength] = MappingProxyType({}),
) -> Iterator[nn.Module]:
    """Apply `intervention` to a transformers `model` in this context.

    Write sites are mapped where they are added to the stream, after a norm if one follows the block. Read sites
    are mapped before their norm, which then divides by the scale of the mapped stream, as if the stream itself
    had been mapped. Conditional maps change what their write matrix writes. Edited weights cannot reproduce those
    scales: with `renormalise=False` norms use the scales that weights do produce (of the unmapped stream before
    reads, of the mapped block output before a norm that follows it), and weights reproduce the result exactly. The
    two differ by a positive factor per token.

    `strengths` scale the maps at write sites, which may give every row of a batch its own; gradients flow to them.
    """
    stream = Stream.of(model)
    with ExitStack() as stack:
        for site, affine in intervention.writes.items():
            for handle in _hook_write(stream, site, affine, renormalise, strengths.get(site, 1.0)):
                stack.callback(handle.remove)
        for handle in _hook_reads(stream, intervention.reads, renormalise):
            stack.callback(handle.remove)
        if intervention.conditional:
            stack.enter_context(conditionally_edited(model, intervention.conditional, renormalise))
        yield model


@contextmanager
def layer_projected(model: nn.Module, layer: int, affine: AffineMap) -> Iterator[nn.Module]:
    """Map the input and both outputs of block `layer`: the local intervention that scores directions.

    From eliroc98/refusal_direction (Arditi et al. 2024, section 2.4). Mapping the accumulated stream at the input
    is impossible in weights, so this is never baked. A shift is applied once, to the stream; the outputs are
    mapped without it.
    """
    stream = Stream.of(model)
    sites = (Site("attn", layer), Site("mlp", layer))
    outputs = [stream.output(site, part) for site in sites for part in stream.parts(site)]
    with input_shifted(model, layer, affine), ExitStack() as stack:
        for output in outputs:
            stack.callback(map_output(output, affine.unshifted).remove)
        yield model


@contextmanager
def input_shifted(model: nn.Module, layer: int, affine: AffineMap) -> Iterator[nn.Module]:
    """Map only the input of block `layer` (activation addition at the source layer).

    Of several streams, the one that is read is shifted; a direction is taken out of all.
    """
    stream = Stream.of(model)

    def mapped(hidden: torch.Tensor, _named: Mapping[str, Any]) -> torch.Tensor:
        if hidden.dim() == 3:
            return affine(hidden)
        return stream.with_active(affine.unshifted(hidden), affine(stream.active(hidden)))

    with changing_input(stream, layer, mapped):
        yield model
