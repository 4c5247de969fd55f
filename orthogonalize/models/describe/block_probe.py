"""Observe the modules of an unknown model: what its blocks add to the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import nn

from ...core.errors import OrthogonalizeError

FITS = 1e-4  # largest relative error at which a sum or a multiple counts as exact
MOST_PARTS = 3


@dataclass
class FoundPart:
    """A module that adds to the stream, by its name in the block; its output is multiplied by `factor`."""

    module: str
    factor: float
    post_norm: str | None = None
    norm: str | None = None
    writes: dict[str, int] = field(default_factory=dict)
    reads: dict[str, int] = field(default_factory=dict)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, judging by the name of its class."""
    return "norm" in type(module).__name__.lower() and not list(module.children())


class ObservedModel:
    """A model whose blocks and module inputs and outputs are observed."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self.model, self.ids = model, ids
        config = model.config.get_text_config()
        self.width = int(config.hidden_size)
        count = int(config.num_hidden_layers)
        lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        if not lists:
            raise OrthogonalizeError(f"{type(model).__name__} does not keep its {count} blocks in a ModuleList")
        self.list_name, self.blocks = max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))

    @torch.inference_mode()
    def logits(self) -> torch.Tensor:
        out: torch.Tensor = self.model(input_ids=self.ids, use_cache=False).logits
        return out

    def observe(self, modules: Mapping[str, nn.Module]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """First inputs and outputs [tokens, d] of `modules` in one run, if they are as wide as the stream."""
        ins: dict[str, torch.Tensor] = {}
        outs: dict[str, torch.Tensor] = {}

        def wide(value: Any) -> bool:
            return isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[-1] == self.width

        with ExitStack() as stack:
            for name, module in modules.items():

                def hook(_m: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                    given, made = _hidden(args, kwargs), _first(output)
                    if wide(given):
                        ins[name] = given.reshape(-1, self.width).clone()
                    if wide(made):
                        outs[name] = made.reshape(-1, self.width).clone()

                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            self.logits()
        return ins, outs

    def inner(self, layer: int) -> dict[str, nn.Module]:
        """The modules of a block by name, except dropout, in order of depth."""
        found = [(n, m) for n, m in self.blocks[layer].named_modules() if n and not isinstance(m, nn.Dropout)]
        return dict(sorted(found, key=lambda pair: pair[0].count(".")))


def _decompose(delta: torch.Tensor, outputs: Mapping[str, torch.Tensor]) -> dict[str, float] | None:
    """The smallest set of `outputs` that `delta` is a weighted sum of, with their weights; None if there is none."""
    for depth in range(3):
        names = [n for n, out in outputs.items() if n.count(".") <= depth and out.shape == delta.shape]
        for size in range(1, MOST_PARTS + 1):
            for chosen in combinations(names, size):
                matrix = torch.stack([outputs[n].flatten() for n in chosen], dim=1).double()
                solution = torch.linalg.lstsq(matrix, delta.flatten().double().unsqueeze(1)).solution.squeeze(1)
                missed = (matrix @ solution - delta.flatten()).norm() / delta.norm()
                if missed < FITS and all(abs(w) > FITS for w in solution.tolist()):
                    return dict(zip(chosen, solution.tolist(), strict=True))
    return None


def is_multiple(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether `a` is a scalar multiple of `b`."""
    if a is None or b is None or a.shape != b.shape:
        return False
    factor = (a * b).sum() / b.pow(2).sum()
    return bool((a - factor * b).norm() < FITS * a.norm())


def block_parts(probe: ObservedModel, layer: int) -> list[FoundPart]:
    """The modules whose outputs sum to what a block adds to the stream, in execution order.

    Raises:
        OrthogonalizeError: the block's contribution is not such a sum.
    """
    modules = probe.inner(layer)
    block = {"": probe.blocks[layer], **modules}
    ins, outs = probe.observe(block)
    found = _decompose(outs[""] - ins[""], {n: o for n, o in outs.items() if n})
    if found is None:
        raise OrthogonalizeError(
            f"the contribution of block {layer} is not a sum of its modules' outputs: the stream itself passes "
            "through a norm, so weights cannot be edited exactly"
        )
    order = list(modules)
    parts = []
    norms = [n for n, m in modules.items() if is_norm(m) and "." not in n]
    behind = {n for n in found if is_norm(modules[n])}
    for name in sorted(found, key=lambda n: list(outs).index(n)):  # in execution order
        part = FoundPart(name, found[name])
        if name in behind:
            part.post_norm = name
            part.module = next(n for n in order if n not in norms and is_multiple(outs.get(n), ins[name]))
        before = [n for n in norms if n not in behind]
        if part.module in ins:
            part.norm = next((n for n in before if is_multiple(ins[part.module], outs.get(n))), None)
        elif before:  # its input is not as wide as the stream: the module ends a chain that follows a norm
            ran = list(outs)
            part.norm = max((n for n in before if ran.index(n) < ran.index(part.module)), key=ran.index, default=None)
        parts.append(part)
    return parts


def norm_behaviour(probe: ObservedModel, norm: nn.Module) -> tuple[str, float, bool]:
    """Kind, offset and whether there is a weight, inferred from what a norm does to its input.

    Raises:
        OrthogonalizeError: it is neither an RMSNorm nor a LayerNorm.
    """
    ins, outs = probe.observe({"norm": norm})
    x, out = ins["norm"].double(), outs["norm"].double()
    bias = getattr(norm, "bias", None)
    out = out if bias is None else out - bias.double()
    weight = getattr(norm, "weight", None)
    tried = {}
    for kind in ("rms", "layer"):
        core = x if kind == "rms" else x - x.mean(-1, keepdim=True)
        core = core / (core.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        for offset in (0.0, 1.0):
            scale = torch.ones(x.shape[-1]) if weight is None else offset + weight.double()
            tried[kind, offset] = ((core * scale - out).norm() / out.norm()).item()
    kind, offset = min(tried, key=lambda key: tried[key])
    if tried[kind, offset] > 0.05:
        raise OrthogonalizeError(f"{type(norm).__name__} is neither an RMSNorm nor a LayerNorm")
    return kind, offset if weight is not None else 0.0, weight is not None
