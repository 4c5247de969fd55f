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
from .twin import logits, model_inputs

FITS = 1e-4  # largest relative error at which a sum or a multiple counts as exact
MOST_PARTS = 3


@dataclass
class FoundPart:
    """A module that adds to the stream, by its name in the block; its output is multiplied by `factor`.

    `norms` are those before it, which may differ by layer, and `post_norms` those that its output passes, in order;
    `sometimes` are those of the latter that only some layers have. `stored_as` are the modules of writes that have
    other names in checkpoints.
    """

    module: str
    factor: float
    post_norms: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    sometimes: list[str] = field(default_factory=list)
    writes: dict[str, int] = field(default_factory=dict)
    reads: dict[str, int] = field(default_factory=dict)
    stored_as: dict[str, str] = field(default_factory=dict)

    @property
    def written(self) -> str:
        """The module to look at for what the part writes: its own output, or what goes into the first norm after it."""
        return self.post_norms[0] if self.post_norms else self.module

    def merge(self, other: FoundPart) -> None:
        """Take up what was found in another layer."""
        self.writes |= other.writes
        self.reads |= other.reads
        self.stored_as |= other.stored_as
        self.norms += [name for name in other.norms if name not in self.norms]
        apart = set(self.post_norms) ^ set(other.post_norms)
        longer = max(self.post_norms, other.post_norms, key=len)
        self.post_norms = longer + [n for n in (*self.post_norms, *other.post_norms) if n not in longer]
        self.sometimes = [n for n in self.post_norms if n in {*self.sometimes, *other.sometimes, *apart}]


def _written(value: Any, width: int) -> Any:
    """What a module's output adds to the stream: its first item, and a bias [d] that some leave to the block to add."""
    if not isinstance(value, tuple | list):
        return value
    biases = [v for v in value[1:] if isinstance(v, torch.Tensor) and v.shape == (width,)]
    return value[0] + sum(biases) if biases and isinstance(value[0], torch.Tensor) else value[0]


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
        every = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        lists = [pair for pair in every if len(pair[1]) == count]
        lists = lists or [pair for pair in every if 2 * len(pair[1]) == count]  # blocks that count as two layers
        if not lists:
            raise OrthogonalizeError(f"{type(model).__name__} does not keep its {count} blocks in a ModuleList")
        self.list_name, self.blocks = max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))

    @torch.inference_mode()
    def logits(self) -> torch.Tensor:
        if next(self.model.parameters()).dtype is torch.float64:
            return logits(self.model, self.ids)
        out: torch.Tensor = self.model(**model_inputs(self.model, self.ids)).logits
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
                    given, made = _hidden(args, kwargs), _written(output, self.width)
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


def _reduced(delta: torch.Tensor, outputs: Mapping[str, torch.Tensor]) -> dict[str, float] | None:
    """As `_decompose`, for any number of outputs: all distinct ones are taken, and those without weight dropped."""
    chosen: list[str] = []
    for name in sorted(outputs, key=lambda n: n.count(".")):  # not what a module passes on
        out = outputs[name]
        if name.count(".") <= 1 and out.shape == delta.shape and not any(is_multiple(out, outputs[n]) for n in chosen):
            chosen.append(name)
    weights: list[float] = []
    for _ in range(2):  # once to find those with a weight, once more with these alone
        if not chosen:
            return None
        matrix = torch.stack([outputs[n].flatten() for n in chosen], dim=1).double()
        solution = torch.linalg.lstsq(matrix, delta.flatten().double().unsqueeze(1)).solution.squeeze(1)
        if (matrix @ solution - delta.flatten()).norm() > FITS * delta.norm():
            return None
        weights = [w for w in solution.tolist() if abs(w) > FITS]
        chosen = [n for n, w in zip(chosen, solution.tolist(), strict=True) if abs(w) > FITS]
    return dict(zip(chosen, weights, strict=True))


def is_multiple(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether `a` is a scalar multiple of `b`."""
    if a is None or b is None or a.shape != b.shape:
        return False
    factor = (a * b).sum() / b.pow(2).sum()
    return bool((a - factor * b).norm() < FITS * a.norm())


class _Block:
    """What went into and came out of the modules of one block, in one run."""

    def __init__(self, probe: ObservedModel, layer: int) -> None:
        self.layer, self.modules = layer, probe.inner(layer)
        self.ins, self.outs = probe.observe({"": probe.blocks[layer], **self.modules})
        listed = (n for n, m in self.modules.items() if is_norm(m))
        self.norms = [n for n in listed if "." not in n or n.rpartition(".")[2].isdecimal()]
        self.order = list(self.outs)  # of execution

    def written(self) -> dict[str, float]:
        """The modules whose outputs sum to what the block adds to the stream, and their factors; none if it is no sum.

        Raises:
            OrthogonalizeError: it does not take and give one stream.
        """
        if "" not in self.ins or "" not in self.outs or self.ins[""].shape != self.outs[""].shape:
            raise OrthogonalizeError(f"block {self.layer} does not take and give one residual stream")
        inner = {n: o for n, o in self.outs.items() if n}
        delta = self.outs[""] - self.ins[""]
        found = _decompose(delta, inner) or _reduced(delta, inner)
        if found is None:  # a buffer of the block may multiply the whole stream by one number
            whole = {"": self.ins[""], **inner}
            scaled = _decompose(self.outs[""], whole) or _reduced(self.outs[""], whole)
            if scaled is not None and "" in scaled:
                factor = scaled.pop("")
                found = {name: weight / factor for name, weight in scaled.items()}
        return found or {}

    def through_norms(self, target: torch.Tensor, until: int) -> list[FoundPart] | None:
        """The parts in `target`, if the stream itself passes through norms on its way there; None if it is no sum.

        `until` is the number of modules that ran before.
        """
        ran = {"": self.ins[""]} | {n: self.outs[n] for n in self.order[:until] if n}
        terms = _decompose(target, ran)
        if terms is None:
            return None
        parts: list[FoundPart] = []
        for name, factor in terms.items():
            if name == "":
                continue
            if not is_norm(self.modules[name]):
                parts.append(FoundPart(name, factor))
                continue
            source = self.source(self.ins[name])
            inner = [FoundPart(source, factor, [name])] if source else None
            inner = inner or self.through_norms(self.ins[name], self.order.index(name))
            if inner is None:
                return None
            parts += inner
        return parts

    def source(self, given: torch.Tensor) -> str | None:
        """The module, other than a norm, whose output `given` is, up to a factor."""
        inner = (n for n, m in self.modules.items() if not is_norm(m))
        return next((n for n in inner if is_multiple(self.outs.get(n), given)), None)

    def behind(self, norm: str, factor: float) -> list[FoundPart]:
        """The parts whose outputs pass `norm` before they are added.

        Raises:
            OrthogonalizeError: what goes into the norm is not a sum of modules' outputs.
        """
        given = self.ins[norm]
        source = self.source(given)
        if source is not None:
            return [FoundPart(source, factor, [norm])]
        ran = self.order.index(norm)
        summed = _decompose(given, {n: o for n, o in self.outs.items() if n and self.order.index(n) < ran})
        if summed is None:
            raise OrthogonalizeError(
                f"what {norm} of block {self.layer} normalises is not a sum of modules' outputs: the stream itself "
                "passes through a norm, so weights cannot be edited exactly"
            )
        found = []
        for name in summed:
            inner = self.behind(name, factor) if name in self.norms else [FoundPart(name, factor)]
            for part in inner:
                part.post_norms.append(norm)
            found += inner
        return found

    def inner_norm(self, part: FoundPart) -> str | None:
        """A norm inside the part's module that gives the module's output."""
        inside = [n for n, m in self.modules.items() if is_norm(m) and n.startswith(part.module + ".")]
        return next((n for n in inside if is_multiple(self.outs.get(n), self.outs[part.module])), None)


def block_parts(probe: ObservedModel, layer: int) -> tuple[list[FoundPart], bool]:
    """The modules whose outputs sum to what a block adds to the stream, in execution order.

    Returns:
        The parts, and whether the stream itself passes through norms between them.

    Raises:
        OrthogonalizeError: the block's contribution is not such a sum.
    """
    block = _Block(probe, layer)
    parts: list[FoundPart] = []
    for name, factor in block.written().items():
        parts += block.behind(name, factor) if is_norm(block.modules[name]) else [FoundPart(name, factor)]
    normalised = not parts
    if normalised:
        parts = block.through_norms(block.outs[""], len(block.order) - 1) or []
    if not parts:
        raise OrthogonalizeError(
            f"what block {layer} makes of the stream is not a sum of its modules' outputs, norms in between or not"
        )
    parts.sort(key=lambda part: block.order.index(part.module))
    after = {name for part in parts for name in part.post_norms}
    before = [n for n in block.norms if n not in after]
    for part in parts:
        inner = None if part.post_norms else block.inner_norm(part)
        part.post_norms += [inner] if inner else []
        if part.module in block.ins:
            norm = next((n for n in before if is_multiple(block.ins[part.module], block.outs.get(n))), None)
        else:  # its input is not as wide as the stream: the module ends a chain that follows a norm
            ran = block.order.index(part.module)
            norm = max((n for n in before if block.order.index(n) < ran), key=block.order.index, default=None)
        part.norms += [norm] if norm else []
    return parts, normalised


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
