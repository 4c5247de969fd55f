"""Gradients with respect to what passes through a model, not to its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..core.interventions import Site
from .forward.block_inputs import capturing_inputs
from .stream import Stream


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Compute no gradients of the weights in this context, and keep nothing for them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@dataclass
class TracedStream:
    """The inputs of blocks and what their parts write, in a forward pass that can be differentiated.

    `inputs` has one tensor [batch, tokens, d] a block and, last, what the head's norm reads; `outputs` has those that
    the parts of each block write.
    """

    inputs: list[torch.Tensor] = field(default_factory=list)
    outputs: list[list[torch.Tensor]] = field(default_factory=list)


@contextmanager
def traced(model: Any) -> Iterator[TracedStream]:
    """Trace the forward pass in this context, from the embedding on, with gradients."""
    stream, found = Stream.of(model), TracedStream()

    def begin(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_()

    def enter(layer: int, hidden: torch.Tensor) -> None:
        found.inputs.append(hidden)
        if layer < stream.layer_count:
            found.outputs.append([])

    def wrote(_module: Any, _inputs: Any, output: Any) -> None:
        found.outputs[-1].append(output[0] if isinstance(output, tuple | list) else output)

    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(torch.enable_grad())
        stack.callback(model.get_input_embeddings().register_forward_hook(begin).remove)
        stack.enter_context(capturing_inputs(model, enter))
        for layer in range(stream.layer_count):
            sites = (Site("attn", layer), Site("mlp", layer))
            for module in {stream.output(site, part) for site in sites for part in stream.parts(site)}:
                stack.callback(module.register_forward_hook(wrote).remove)
        yield found
