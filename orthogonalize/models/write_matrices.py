"""The write matrices of a running transformers model: observe their inputs and outputs, and change their outputs.

A dense matrix is a module of its own and is watched by a forward hook. Routed experts are one fused parameter, whose
products are found by the memory that they read (a `TorchFunctionMode`), so that no family needs code of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..architectures.schema import Part
from ..core.errors import OrthogonalizeError
from ..core.interventions import ConditionalMap, Site, WriteMatrix
from .stream import Stream, squares_of

PRODUCTS = {
    nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm,
    torch.bmm, torch.Tensor.bmm,
}  # fmt: skip


@dataclass(frozen=True)
class WriteModule:
    """A write matrix in a running model: the module that holds it, and the part of the block that it belongs to.

    `parameter` is the module's parameter, [experts, …] for routed experts.
    """

    matrix: WriteMatrix
    part: Part
    module: nn.Module
    parameter: str = "weight"


Watch = Callable[[torch.Tensor, torch.Tensor, "int | None"], "torch.Tensor | None"]
"""Called with inputs [..., n], outputs [..., d] (a matrix's own bias added) and, for routed experts, the expert's
number; returns new outputs, or None to leave them."""


def write_modules(stream: Stream, site: Site) -> dict[WriteMatrix, WriteModule]:
    """The matrices that write at `site` of a block, by their name."""
    found: dict[WriteMatrix, WriteModule] = {}
    for part in stream.parts(site):
        for template in part.writes:
            name = template.removesuffix(".weight")
            held = part.stored_as.get(template, name)
            module = None if "{expert}" in name else stream.find(site, held)
            weight = getattr(module, "weight", None)
            if module is not None and isinstance(weight, torch.Tensor) and weight.dim() == 2:
                matrix = WriteMatrix(site, name)
                found[matrix] = WriteModule(matrix, part, module)
                continue
            if template.endswith("bias"):
                continue
            matrix = WriteMatrix.of_experts(site, name)
            experts = _experts_of(stream.inner(site, part.module), part.module, matrix)
            if module is not None and isinstance(weight, torch.Tensor):
                found[matrix] = WriteModule(matrix, part, module)
            elif experts is not None:
                found[matrix] = WriteModule(matrix, part, experts, "down_proj")
    return found


def _experts_of(module: nn.Module, name: str, matrix: WriteMatrix) -> nn.Module | None:
    """The module in `module`, which is called `name`, that holds the experts of `matrix`."""
    inner: str
    each: nn.Module
    for inner, each in module.named_modules(prefix=name):
        weight = each._parameters.get("down_proj")
        if weight is not None and weight.dim() == 3 and WriteMatrix.of_experts(matrix.site, inner) == matrix:
            return each
    return None


class _ExpertProducts(TorchFunctionMode):
    """Calls a `Watch` at every product with a matrix of routed experts."""

    def __init__(self, watched: Mapping[int, tuple[nn.Parameter, Watch]]) -> None:
        super().__init__()
        self.watched = watched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in PRODUCTS or not isinstance(args[1], torch.Tensor):
            return result
        weight = args[1]
        found = self.watched.get(weight.untyped_storage().data_ptr())
        if found is None:
            return result
        parameter, watch = found
        if weight.dim() == 3:  # all experts in one batch
            rows = [(args[0][e], result[e], e) for e in range(len(weight))]
            return torch.stack([_watched(watch, *row) for row in rows])
        expert = (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
        return _watched(watch, args[0], result, expert)


def _watched(watch: Watch, inputs: torch.Tensor, outputs: torch.Tensor, expert: int | None) -> torch.Tensor:
    changed = watch(inputs, outputs, expert)
    return outputs if changed is None else changed


@contextmanager
def watching(model: nn.Module, watches: Mapping[WriteMatrix, Watch]) -> Iterator[nn.Module]:
    """Call the watch of each write matrix whenever it is applied, in this context.

    Raises:
        OrthogonalizeError: the model has no such matrix.
    """
    stream = Stream.of(model)
    routed: dict[int, tuple[nn.Parameter, Watch]] = {}
    with ExitStack() as stack:
        for matrix, watch in watches.items():
            held = _find(stream, matrix)
            module = held.module
            if matrix.routed:
                parameter = module.get_parameter(held.parameter)
                routed[parameter.untyped_storage().data_ptr()] = parameter, watch
                continue
            handle = module.register_forward_hook(lambda _m, args, out, watch=watch: watch(args[0], out, None))
            stack.callback(handle.remove)
        if routed:
            stack.enter_context(_experts_one_by_one(model))
            stack.enter_context(_ExpertProducts(routed))
        yield model


def _find(stream: Stream, matrix: WriteMatrix) -> WriteModule:
    found = write_modules(stream, matrix.site).get(matrix)
    if found is None:
        raise OrthogonalizeError(f"the model has no write matrix {matrix}; was the edit made for another model?")
    return found


@contextmanager
def _experts_one_by_one(model: Any) -> Iterator[None]:
    """Let transformers compute experts in its plain loop, whose products are ordinary ones."""
    before = model.config._experts_implementation
    try:
        if before != "eager":
            model.set_experts_implementation("eager")
        yield
    finally:
        if before != "eager":
            model.set_experts_implementation(before)


@contextmanager
def conditionally_edited(
    model: nn.Module, maps: Mapping[WriteMatrix, ConditionalMap], renormalise: bool = True
) -> Iterator[nn.Module]:
    """Apply conditional maps in this context, with the meaning of `renormalise` in `hooks.intervened`."""
    stream = Stream.of(model)
    watches: dict[WriteMatrix, Watch] = {}
    with ExitStack() as stack:
        for matrix, conditional in maps.items():
            part = _find(stream, matrix).part
            scale = stream.post_scale(matrix.site, part)
            if scale is None:
                watches[matrix] = conditional
                continue
            edited = _BeforeNorm(conditional, scale, stream)
            watches[matrix] = edited
            if renormalise and not matrix.routed:  # an expert sees some of the tokens, the norm their sum over experts
                norm = stream.post_norms(matrix.site, part)[0]
                stack.callback(norm.register_forward_hook(edited.restore_scale).remove)
        stack.enter_context(watching(model, watches))
        yield model


class _BeforeNorm:
    """A conditional map before a norm that follows the block; `restore_scale` undoes what that does to the norm."""

    def __init__(self, conditional: ConditionalMap, scale: torch.Tensor, stream: Stream) -> None:
        self.conditional = conditional.before_norm(scale)
        self.squares = squares_of(stream.architecture.norms, stream.architecture.epsilon(stream.config))
        self.ratio = torch.ones(())

    def __call__(self, inputs: torch.Tensor, outputs: torch.Tensor, expert: int | None) -> torch.Tensor:
        edited = self.conditional(inputs, outputs, expert)
        self.ratio = (self.squares(edited) / self.squares(outputs)).sqrt()
        return edited

    def restore_scale(self, _norm: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return (output * self.ratio.to(output.dtype)).reshape(output.shape)
