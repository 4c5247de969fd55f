"""A small random model with some of its tensors changed, and what its blocks then write and read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...architectures.schema import bias_name, without_experts
from ...checkpoints.checkpoint import Checkpoint, open_checkpoint
from ...core.errors import OrthogonalizeError
from .block_probe import FoundPart, ObservedModel, is_multiple, is_norm
from .twin import twin_class

DETECTED = 1e-3  # relative size from which an effect counts; below, it may be float32 rounding


@dataclass(frozen=True)
class Names:
    """Prefixes of a checkpoint's names: `before` the number of a block, and of the `decoder`."""

    before: str
    decoder: str

    def outside(self, inner: str) -> Names:
        """The same where the decoder is the module that holds `inner`, which holds the blocks."""
        return Names(self.before, self.decoder.removesuffix(f"{inner}.")) if inner else self

    @classmethod
    def of(cls, names: Iterable[str], layers: int, beyond: bool = False) -> Names:
        """Infer the prefixes from `names`; `beyond` allows layers after the last, for multi-token prediction.

        Raises:
            OrthogonalizeError: no prefix is followed by the numbers of all layers.
        """
        numbers: dict[str, set[int]] = {}
        for name in names:
            found = re.match(r"(.*?)\.?\b(\d{1,9})\.", name)
            if found:
                numbers.setdefault(found[1], set()).add(int(found[2]))
        wanted = set(range(layers))
        fitting = [b for b, seen in numbers.items() if seen == wanted or (beyond and seen > wanted)]
        if not fitting:
            raise OrthogonalizeError("the checkpoint's tensor names do not contain block numbers")
        before = max(fitting, key=lambda b: sum(n.startswith(b + ".") for n in names))
        return cls(before, before.rpartition(".")[0] + "." if "." in before else "")

    def group(self, name: str) -> str:
        """A tensor's name in architecture files, without layer and expert numbers."""
        found = re.fullmatch(re.escape(self.before) + r"\.\d+\.(.+)", name)
        return without_experts(found[1]) if found else name


def inner_module(layer: str) -> str:
    """The module between the decoder and its blocks, by the blocks' name in it; empty if there is none."""
    return layer.removesuffix(".{layer}").rpartition(".")[0]


def _project_out(tensor: torch.Tensor, axis: int, direction: torch.Tensor) -> torch.Tensor:
    rows = tensor.double().movedim(axis, -1)
    return (rows - (rows @ direction).unsqueeze(-1) * direction).movedim(-1, axis).to(tensor.dtype)


class Experiments:
    """A small random model's checkpoint, and models built from it with some tensors changed."""

    def __init__(self, folder: Path) -> None:
        self.source: Checkpoint = open_checkpoint(folder)
        self.tensors = {name: self.source.read(name).float() for name in self.source.tensors}
        generator = torch.Generator().manual_seed(1)
        options = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
        model = twin_class(folder).from_pretrained(folder, trust_remote_code=False, **options).float().eval()

        def load(tensors: Mapping[str, torch.Tensor]) -> Any:
            settings = {"config": deepcopy(model.config), "state_dict": dict(tensors)}
            return type(model).from_pretrained(None, **settings, **options).float()

        self.load = load
        self.plain = ObservedModel(model, torch.zeros(1, 1, dtype=torch.long))
        vocabulary = int(self.plain.model.config.get_text_config().vocab_size)
        self.ids = torch.randint(3, min(vocabulary, 80), (2, 13), generator=generator)
        self.plain.ids = self.ids
        self.direction = torch.randn(self.plain.width, generator=generator, dtype=torch.float64)
        self.direction /= self.direction.norm()
        self.base, self.layer = self._decoder()
        self.names = Names.of(list(self.tensors), len(self.plain.blocks)).outside(inner_module(self.layer))

    def _decoder(self) -> tuple[str, str]:
        """The innermost module that holds the blocks and the embedding, and the blocks' name in it."""
        table = self.plain.model.get_input_embeddings()
        name = next(n for n, m in self.plain.model.named_modules() if m is table)
        base = first = self.plain.list_name.rpartition(".")[0]
        while base and not name.startswith(f"{base}."):
            base = base.rpartition(".")[0]
        base = base or first
        return base, self.plain.list_name.removeprefix(f"{base}.") + ".{layer}"

    def candidates(self, head: str) -> list[tuple[str, int]]:
        """(group, axis) of every axis as wide as the stream, of matrices and the biases beside them."""
        weights = {n for n, t in self.tensors.items() if t.dim() > 1 and n.startswith(self.names.decoder) and n != head}
        biases = {bias_name(n) for n in weights} & self.tensors.keys()
        biases |= {n for n, t in self.tensors.items() if t.dim() == 1 and self._is_bare(n)}
        found = {
            (self.names.group(n), axis): None
            for n in self.tensors
            if n in weights | biases
            for axis, size in enumerate(self.tensors[n].shape)
            if size == self.plain.width
        }
        return list(found)

    def _is_bare(self, name: str) -> bool:
        """Whether a vector of a block belongs to no norm, so that it may be added as it is."""
        owner = name.removeprefix(self.names.before + ".").partition(".")[2].rpartition(".")[0]
        held = dict(self.plain.blocks[0].named_modules()) | dict(self.plain.blocks[-1].named_modules())
        norm = "norm" in owner.rpartition(".")[2] or (owner in held and is_norm(held[owner]))
        return name.startswith(self.names.before + ".") and name.endswith("bias") and not norm

    def shift(self, like: torch.Tensor) -> torch.Tensor:
        """The direction times a different amount per token, in the shape of `like` [..., d]."""
        amounts = torch.randn(like.numel() // like.shape[-1], 1, generator=torch.Generator().manual_seed(2))
        return (amounts * self.direction.float()).reshape(like.shape)

    def share(self, hidden: torch.Tensor) -> float:
        """The direction's largest share of `hidden` [tokens, d]."""
        return float(((hidden @ self.direction.float()).abs() / hidden.norm(dim=-1)).max())

    def in_blocks(self, group: str) -> bool:
        """Whether the tensors of `group` belong to blocks; the others go by their full names."""
        return group not in self.tensors

    def is_matrix(self, group: str) -> bool:
        """Whether the tensors of `group` have more than one axis."""
        return any(self.names.group(n) == group and t.dim() > 1 for n, t in self.tensors.items())

    def only_reads(self, group: str) -> bool:
        """Whether the matrix `group` of blocks takes the stream and gives something of another width."""
        module = group.removesuffix(".weight")
        held = {
            f"{n}": b.get_submodule(module) for n, b in enumerate(self.plain.blocks) if module in self.plain.inner(n)
        }
        ins, outs = self.plain.observe(held)
        return bool(held) and ins.keys() == held.keys() and not outs

    def is_per_channel(self, group: str) -> bool:
        """Whether the tensors of `group` are kernels [d, 1, k] of convolutions, which mix no channels."""
        shapes = (t.shape for n, t in self.tensors.items() if self.names.group(n) == group)
        return all(len(shape) == 3 and shape[1] == 1 for shape in shapes)

    def stored_norms(self, part: FoundPart, layer: int) -> None:
        """Name the norms of `part` as checkpoints do, and note which modules they are."""
        block = self.plain.blocks[layer]
        for names in (part.norms, part.post_norms):
            for place, module in enumerate(names):
                weight = getattr(block.get_submodule(module), "weight", None)
                prefix = f"{self.names.before}.{layer}."
                if weight is None or f"{prefix}{module}.weight" in self.tensors:
                    continue
                held = (n for n, t in self.tensors.items() if n.startswith(prefix) and t.shape == weight.shape)
                found = next((n for n in held if self.tensors[n].equal(weight)), None)
                if found is not None:
                    stored = found.removeprefix(prefix)
                    names[place] = stored.removesuffix(".weight")
                    part.stored_as[stored] = module

    def renamed(self, group: str, layer: int) -> dict[str, str]:
        """The module in block `layer` that holds the matrix `group`, if its name is not that of the tensor."""
        name, block = f"{self.names.before}.{layer}.{group}", self.plain.blocks[layer]
        stored = self.tensors.get(name)
        if stored is None or not group.endswith(".weight") or group in dict(block.named_parameters()):
            return {}
        held = next((n for n, p in block.named_parameters() if p.shape == stored.shape and p.equal(stored)), None)
        return {group: held.removesuffix(".weight")} if held and held.endswith(".weight") else {}

    def project_out(self, axes: Iterable[tuple[str, int]]) -> ObservedModel:
        """The model with the direction projected out of all of `axes`."""
        by_group: dict[str, list[int]] = {}
        for group, axis in axes:
            by_group.setdefault(group, []).append(axis)
        tensors = dict(self.tensors)
        for name, tensor in self.tensors.items():
            for axis in by_group.get(self.names.group(name), []):
                tensor = _project_out(tensor, axis, self.direction)
            tensors[name] = tensor
        return ObservedModel(self.load(tensors).eval(), self.ids)

    def matters(self, group: str, axis: int) -> bool:
        """Whether the model's logits change if the direction is projected out of one axis."""
        before, after = self.plain.logits(), self.project_out([(group, axis)]).logits()
        return bool((after - before).norm() > DETECTED * before.norm())


@contextmanager
def _shift_reads(lab: Experiments, probe: ObservedModel, parts: Mapping[int, list[FoundPart]]) -> Iterator[None]:
    """Add the direction, times a different amount per token, to everything that the parts read."""

    def shift_output(_m: Any, _i: Any, output: torch.Tensor) -> torch.Tensor:
        return output + lab.shift(output)

    def shift_input(_m: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] + lab.shift(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + lab.shift(kwargs["hidden_states"])}

    with ExitStack() as stack:
        for layer, found in parts.items():
            modules = probe.inner(layer)
            for norm in {norm for part in found for norm in part.norms}:
                stack.callback(modules[norm].register_forward_hook(shift_output).remove)
            for part in found:
                if not part.norms:
                    stack.callback(modules[part.module].register_forward_pre_hook(shift_input, with_kwargs=True).remove)
        yield


def measure(
    lab: Experiments, probe: ObservedModel, parts: Mapping[int, list[FoundPart]]
) -> tuple[float, dict[tuple[int, str], float], dict[tuple[int, str], float]]:
    """The direction's share of the first block's input and of each part's output, and the effect of a shift."""
    names = [(layer, name) for layer, found in parts.items() for p in found for name in (p.module, p.written)]
    watched = {f"{layer}/{name}": probe.inner(layer)[name] for layer, name in names}
    ins, outs = probe.observe({"first": probe.blocks[0], **watched})
    with _shift_reads(lab, probe, parts):
        _, moved = probe.observe(watched)
    keys = [(layer, p.module) for layer, found in parts.items() for p in found]
    written = {
        (layer, p.module): lab.share((ins if p.post_norms else outs)[f"{layer}/{p.written}"])
        for layer, found in parts.items()
        for p in found
    }
    change = {}
    for key in keys:
        before, after = (o[f"{key[0]}/{key[1]}"] for o in (outs, moved))
        change[key] = ((after - before).norm() / before.norm()).item()
    return lab.share(ins["first"]) if "first" in ins else 0.0, written, change


def block_writers(lab: Experiments, silenced: ObservedModel, layer: int) -> list[FoundPart]:
    """The outermost modules of a block that write, in execution order, whatever the block then does with the stream.

    In `silenced`, where the direction is projected out of every tensor in blocks, it is missing in their outputs,
    though the stream itself holds that of the embedding. They have modules of their own, or are single matrices whose
    output is only added to something. Whether what they write reaches the stream is for the proof to find out.
    """
    modules = silenced.inner(layer)
    ins, outs = lab.plain.observe({"": lab.plain.blocks[layer], **lab.plain.inner(layer)})
    _, silent = silenced.observe(modules)
    order, found = list(outs), list[FoundPart]()
    norms = [n for n, m in modules.items() if is_norm(m) and n in outs]
    for name, module in modules.items():
        inside = any(name.startswith(part.module + ".") for part in found)
        if inside or name not in silent or is_norm(module) or lab.share(silent[name]) >= DETECTED:
            continue
        part = FoundPart(name, 1.0, post_norms=[n for n in norms if is_multiple(ins[n], outs[name])][:1])
        if (list(module.children()) and name in ins) or (name not in ins and _is_added(lab, layer, part)):
            found.append(part)
    before = [n for n in norms if not any(n in part.post_norms for part in found)]
    for part in found:
        if part.module in ins:
            part.norms = [n for n in before if is_multiple(ins[part.module], outs[n])][:1]
        else:  # it ends a chain that follows a norm
            ran = (n for n in before if "." not in n and order.index(n) < order.index(part.module))
            part.norms = sorted(ran, key=order.index)[-1:]
    return sorted(found, key=lambda part: order.index(part.module))


def _is_added(lab: Experiments, layer: int, part: FoundPart) -> bool:
    """Whether a direction that `part` writes comes out of the module around it as it is."""
    modules = lab.plain.inner(layer)
    around = part.module.rpartition(".")[0]
    watched = {"around": modules[around] if around else lab.plain.blocks[layer]}
    _, before = lab.plain.observe(watched)
    last = modules[part.post_norms[-1] if part.post_norms else part.module]
    handle = last.register_forward_hook(lambda _m, _i, output: output + lab.shift(output))
    _, after = lab.plain.observe(watched)
    handle.remove()
    if "around" not in before:
        return False
    change = (after["around"] - before["around"]).double()
    rest = change - (change @ lab.direction)[:, None] * lab.direction
    return bool(rest.norm() < DETECTED * change.norm())
