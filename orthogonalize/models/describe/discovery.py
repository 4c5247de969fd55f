"""Find by experiment where an unknown model writes and reads its residual stream.

The experiments run on a small random model of the same class. What each block adds to the stream is decomposed into
outputs of its modules, which reveals the modules, their factors and the norms after them. Then every tensor axis as
wide as the stream is tested: if a direction is projected out of all of them, no block writes or reads it; an axis
whose omission brings it back is a write or a read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...architectures.schema import bias_name, without_experts
from ...checkpoints.checkpoint import Checkpoint, open_checkpoint
from ...core.errors import OrthogonalizeError
from ...core.progress import track
from .block_probe import FoundPart, ObservedModel, block_parts, is_multiple, is_norm, norm_behaviour
from .twin import twin_class

DETECTED = 1e-3  # relative size from which an effect counts; below, it may be float32 rounding


@dataclass
class Findings:
    """Results of the experiments; fields are named as in architecture files."""

    decoder_module: str
    decoder: str
    layer: str
    parts: dict[str, list[FoundPart]]
    embed: dict[str, int]
    embed_factor: float
    head: str
    head_norm: str
    kind: str
    offset: float
    parameters: bool
    inert: list[str]
    refused: dict[str, str] = field(default_factory=dict)
    embed_module: str | None = None
    normalised: bool = False


@dataclass(frozen=True)
class _Names:
    """Prefixes of a checkpoint's names: `before` the number of a block, and of the `decoder`."""

    before: str
    decoder: str

    @classmethod
    def of(cls, names: Iterable[str], layers: int, beyond: bool = False) -> _Names:
        """Infer the prefixes from `names`; `beyond` allows layers after the last, for multi-token prediction.

        Raises:
            OrthogonalizeError: no prefix is followed by the numbers of all layers.
        """
        numbers: dict[str, set[int]] = {}
        for name in names:
            found = re.match(r"(.*?)\.?\b(\d+)\.", name)
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
        self.amounts = torch.randn(2, 13, 1, generator=generator)
        self.names = _Names.of(list(self.tensors), len(self.plain.blocks))

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

    def is_matrix(self, group: str) -> bool:
        """Whether the tensors of `group` have more than one axis."""
        return any(self.names.group(n) == group and t.dim() > 1 for n, t in self.tensors.items())

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


@contextmanager
def _shift_reads(lab: Experiments, probe: ObservedModel, parts: Mapping[int, list[FoundPart]]) -> Iterator[None]:
    """Add the direction, times a different amount per token, to everything that the parts read."""
    amount = lab.amounts * lab.direction.float()

    def shift_output(_m: Any, _i: Any, output: torch.Tensor) -> torch.Tensor:
        return output + amount.reshape(output.shape)

    def shift_input(_m: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] + amount.reshape(args[0].shape), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + amount}

    with ExitStack() as stack:
        for layer, found in parts.items():
            modules = probe.inner(layer)
            for norm in {norm for part in found for norm in part.norms}:
                stack.callback(modules[norm].register_forward_hook(shift_output).remove)
            for part in found:
                if not part.norms:
                    stack.callback(modules[part.module].register_forward_pre_hook(shift_input, with_kwargs=True).remove)
        yield


def _measure(
    lab: Experiments, probe: ObservedModel, parts: Mapping[int, list[FoundPart]]
) -> tuple[float, dict[tuple[int, str], float], dict[tuple[int, str], float]]:
    """The direction's share of the first block's input and of each part's output, and the effect of a shift."""
    names = [(layer, name) for layer, found in parts.items() for p in found for name in (p.module, p.written)]
    watched = {f"{layer}/{name}": probe.inner(layer)[name] for layer, name in names}
    ins, outs = probe.observe({"first": probe.blocks[0], **watched})
    with _shift_reads(lab, probe, parts):
        _, moved = probe.observe(watched)
    r = lab.direction.float()

    def share(h: torch.Tensor) -> float:
        return float(((h @ r).abs() / h.norm(dim=-1)).max())

    keys = [(layer, p.module) for layer, found in parts.items() for p in found]
    written = {
        (layer, p.module): share((ins if p.post_norms else outs)[f"{layer}/{p.written}"])
        for layer, found in parts.items()
        for p in found
    }
    change = {}
    for key in keys:
        before, after = (o[f"{key[0]}/{key[1]}"] for o in (outs, moved))
        change[key] = ((after - before).norm() / before.norm()).item()
    return share(ins["first"]), written, change


def _find_head(lab: Experiments) -> tuple[str, str, nn.Module]:
    """The head's tensor name, and the name and module of the norm before it."""
    probe = lab.plain
    output = probe.model.get_output_embeddings()
    given: list[torch.Tensor] = []
    handle = output.register_forward_pre_hook(lambda _m, args: given.append(args[0].reshape(-1, args[0].shape[-1])))
    base = probe.list_name.rpartition(".")[0]
    outside = {
        n: m
        for n, m in probe.model.named_modules()
        if is_norm(m) and not n.startswith(probe.list_name + ".") and n.startswith(base)
    }
    _, outs = probe.observe(outside)
    handle.remove()
    norm = next((n for n, out in outs.items() if is_multiple(given[0], out)), None) or next(iter(outs), None)
    if norm is None:
        raise OrthogonalizeError("there is no norm before the head")
    name = next((n for n, t in lab.tensors.items() if t.equal(output.weight) and "embed_tokens" not in n), None)
    return name or "lm_head.weight", norm.removeprefix(base + "."), outside[norm]


def discover(folder: Path) -> Findings:
    """Find every write and read of the small random model in `folder`.

    Raises:
        OrthogonalizeError: its stream passes through a norm, or its structure is unknown.
    """
    lab = Experiments(folder)
    observed = {layer: block_parts(lab.plain, layer) for layer in range(len(lab.plain.blocks))}
    parts = {layer: found for layer, (found, _) in observed.items()}
    normalised = any(through for _, through in observed.values())
    head, head_norm, norm = _find_head(lab)
    candidates = lab.candidates(head)
    everything = lab.project_out(candidates)
    first, written, change = _measure(lab, everything, parts)
    if max(written.values()) > DETECTED:
        worst = max(written, key=lambda key: written[key])
        raise OrthogonalizeError(
            f"{worst[1]} of block {worst[0]} writes a direction even when it is projected out of every tensor as wide "
            f"as the stream ({written[worst]:.1e} of its output)"
        )
    refused: dict[str, str] = {}
    if normalised:
        refused = dict.fromkeys(("embed", "reads"), "the stream itself passes through a norm in every block")
    elif first > DETECTED:
        refused["embed"] = "what the first block reads is not a sum of rows and matrices that could be edited"
    if max(change.values()) > DETECTED and not normalised:
        refused["reads"] = "blocks read the stream through more than the norms before them"
    embed: dict[str, int] = {}
    inert: list[str] = []
    with track("testing tensors", len(candidates), "axes") as advance:
        for group, axis in candidates:
            probe = lab.project_out(c for c in candidates if c != (group, axis))
            first, written, change = _measure(lab, probe, parts)
            used = first > DETECTED and "embed" not in refused
            if used:
                embed[group] = axis
            for layer, found in parts.items():
                for part in found:
                    if written[layer, part.module] > DETECTED:
                        part.writes[group] = axis
                        part.stored_as |= lab.renamed(group, layer)
                        used = True
            # Everything after a reader changes with it, so the first part that changes is the reader.
            reader = next((p for layer, ps in parts.items() for p in ps if change[layer, p.module] > DETECTED), None)
            if reader is not None and "reads" not in refused:
                reader.reads[group] = axis
                used = True
            if not used:
                inert.append(group)
            advance(1)
    table = lab.plain.model.get_input_embeddings()
    base = lab.plain.list_name.rpartition(".")[0]
    if "embed" in refused:
        embed = {next(n for n, t in lab.tensors.items() if t.equal(table.weight)): 1}
    used_groups = embed.keys() | {g for found in parts.values() for p in found for g in (*p.writes, *p.reads)}
    kind, offset, parameters = norm_behaviour(lab.plain, norm)
    ins, _ = lab.plain.observe({"first": lab.plain.blocks[0]})
    rows = table.weight[lab.ids].reshape(-1, table.weight.shape[-1]).detach()
    fits = rows.shape == ins["first"].shape and len(embed) == 1
    named = next(n for n, m in lab.plain.model.named_modules() if m is table)
    elsewhere = [g for g in inert if "." in g and g in lab.tensors and g not in used_groups and not g.endswith("bias")]
    _, given = lab.plain.observe({"table": table})
    alone = len(embed) == 1 and "table" in given and is_multiple(given["table"], ins["first"]) and bool(elsewhere)
    reading = {part.module for found in parts.values() for part in found if part.reads}
    for layer, found in parts.items():
        for part in found:
            if part.module not in reading:  # what went before it by chance
                part.norms = []
            lab.stored_norms(part, layer)
    return Findings(
        decoder_module=lab.plain.list_name.rpartition(".")[0],
        decoder=lab.names.decoder,
        layer=lab.plain.list_name.rpartition(".")[2] + ".{layer}",
        parts=_merge(parts),
        embed={k.removeprefix(lab.names.decoder): a for k, a in embed.items()},
        embed_factor=((ins["first"] * rows).sum() / rows.pow(2).sum()).item() if fits else 1.0,
        head=head,
        head_norm=head_norm,
        kind=kind,
        offset=offset,
        parameters=parameters,
        inert=[
            g.removeprefix(lab.names.decoder) for g in dict.fromkeys(inert) if g not in used_groups and lab.is_matrix(g)
        ],
        refused=refused,
        normalised=normalised,
        embed_module=named.removeprefix(base + ".") if alone and named.startswith(base + ".") else None,
    )


def layout_of(names: Iterable[str], layers: int, findings: Findings) -> tuple[str, str]:
    """The prefix of the decoder's names and the name of the head in the full model's checkpoint."""
    listed = list(names)
    decoder = _Names.of(listed, layers, beyond=True).decoder
    short = findings.head.rpartition(".")[0].rpartition(".")[2] + ".weight"
    stored = next((n for n in listed if n == short or n.endswith("." + short)), None)
    outer = decoder.removesuffix("model.") if decoder.endswith("language_model.model.") else ""
    return decoder, stored or outer + short


def _merge(parts: Mapping[int, list[FoundPart]]) -> dict[str, list[FoundPart]]:
    """The parts of all layers by kind: if a layer has two, attention (or another mixer) comes first, the MLP last."""
    merged: dict[str, dict[str, FoundPart]] = {"attn": {}, "mlp": {}}
    for found in parts.values():
        for part in found:
            mixer = (part.norms == found[0].norms and bool(part.norms)) or part is found[0]
            kind = "attn" if _is_mixer(part.module, mixer) else "mlp"
            mine = merged[kind].setdefault(part.module, part)
            if mine is not part:
                mine.merge(part)
    return {kind: list(found.values()) for kind, found in merged.items()}


def _is_mixer(module: str, likely: bool) -> bool:
    if re.search(r"mlp|moe|feed_forward|ffn|fc2", module):
        return False
    return likely or bool(re.search(r"attn|attention|mamba|mixer", module))
