"""Find by experiment where an unknown model writes and reads its residual stream.

The experiments run on a small random model of the same class. What each block adds to the stream is decomposed into
outputs of its modules, which reveals the modules, their factors and the norms after them. Then every tensor axis as
wide as the stream is tested: if a direction is projected out of all of them, no block writes or reads it; an axis
whose omission brings it back is a write or a read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ...core.errors import OrthogonalizeError
from ...core.progress import track
from .block_probe import FoundPart, block_parts, is_multiple, is_norm, norm_behaviour
from .experiments import DETECTED, Experiments, Names, block_writers, inner_module, measure


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
    head_norm: str | None
    kind: str
    offset: float
    parameters: bool
    inert: list[str]
    refused: dict[str, str] = field(default_factory=dict)
    embed_module: str | None = None
    normalised: bool = False


def _find_head(lab: Experiments) -> tuple[str, str | None, nn.Module | None]:
    """The head's tensor name, the name of the norm before it, and a norm of the stream, if there are any."""
    probe = lab.plain
    output = probe.model.get_output_embeddings()
    given: list[torch.Tensor] = []
    handle = output.register_forward_pre_hook(lambda _m, args: given.append(args[0].reshape(-1, args[0].shape[-1])))
    base = lab.base
    outside = {
        n: m
        for n, m in probe.model.named_modules()
        if is_norm(m) and not n.startswith(probe.list_name + ".") and n.startswith(base)
    }
    _, outs = probe.observe(outside)
    handle.remove()
    norm = next((n for n, out in outs.items() if is_multiple(given[0], out)), None) or next(iter(outs), None)
    name = next((n for n, t in lab.tensors.items() if t.equal(output.weight) and "embed_tokens" not in n), None)
    if norm is not None:
        return name or "lm_head.weight", norm.removeprefix(base + "."), outside[norm]
    inside = {n: m for n, m in probe.inner(0).items() if is_norm(m)}
    _, outs = probe.observe(inside)
    return name or "lm_head.weight", None, next((inside[n] for n in outs), None)


REBUILT = "blocks do more with the stream than add to it (norms, scales per channel, several streams)"


@dataclass(frozen=True)
class _Blocks:
    """The parts of every block; `normalised` and `rebuilt` say what else happens to the stream, if anything.

    `rebuilt` blocks add no sum of modules' outputs to it; their parts are the modules that no direction leaves which
    was projected out of everything in blocks.
    """

    parts: dict[int, list[FoundPart]]
    normalised: bool
    rebuilt: bool = False


def _find_blocks(lab: Experiments, candidates: list[tuple[str, int]]) -> _Blocks:
    """The parts of every block of the model.

    Raises:
        OrthogonalizeError: some block has none.
    """
    try:
        observed = {layer: block_parts(lab.plain, layer) for layer in range(len(lab.plain.blocks))}
        found = _Blocks({layer: parts for layer, (parts, _) in observed.items()}, any(n for _, n in observed.values()))
        _, written, _ = measure(lab, lab.project_out(candidates), found.parts)
        if max(written.values()) <= DETECTED:
            return found
        worst = max(written, key=lambda key: written[key])
        raise OrthogonalizeError(
            f"{worst[1]} of block {worst[0]} writes a direction even when it is projected out of every tensor as wide "
            f"as the stream ({written[worst]:.1e} of its output)"
        )
    except OrthogonalizeError:
        inside = lab.project_out(c for c in candidates if lab.in_blocks(c[0]))
        parts = {layer: block_writers(lab, inside, layer) for layer in range(len(lab.plain.blocks))}
        if not all(parts.values()):
            raise
        return _Blocks(parts, normalised=True, rebuilt=True)


def discover(folder: Path) -> Findings:
    """Find every write and read of the small random model in `folder`.

    Raises:
        OrthogonalizeError: its structure is unknown, or it puts out NaN.
    """
    lab = Experiments(folder)
    if not torch.isfinite(lab.plain.logits()).all():
        raise OrthogonalizeError(
            "a small random model with these settings puts out NaN: one in config.json makes no sense; fetch it again"
        )
    head, head_norm, norm = _find_head(lab)
    candidates = lab.candidates(head)
    blocks = _find_blocks(lab, candidates)
    refused = _refusals(lab, blocks, candidates)
    embed, inert = _test_axes(lab, blocks, candidates, refused)
    table = lab.plain.model.get_input_embeddings()
    if "embed" in refused:
        embed = {next(n for n, t in lab.tensors.items() if t.equal(table.weight)): 1}
    used = embed.keys() | {g for found in blocks.parts.values() for p in found for g in (*p.writes, *p.reads)}
    kind, offset, parameters = ("rms", 0.0, True) if norm is None else norm_behaviour(lab.plain, norm)
    _name_norms(lab, blocks.parts)
    factor, embed_module = _describe_embedding(lab, embed, bool(_elsewhere(lab, inert, used)))
    return Findings(
        decoder_module=lab.base,
        decoder=lab.names.decoder,
        layer=lab.layer,
        parts=_merge(blocks.parts),
        embed={k.removeprefix(lab.names.decoder): a for k, a in embed.items()},
        embed_factor=factor,
        head=head,
        head_norm=head_norm,
        kind=kind,
        offset=offset,
        parameters=parameters,
        inert=[g.removeprefix(lab.names.decoder) for g in dict.fromkeys(inert) if g not in used and lab.is_matrix(g)],
        refused=refused,
        normalised=blocks.normalised,
        embed_module=embed_module,
    )


def _refusals(lab: Experiments, blocks: _Blocks, candidates: list[tuple[str, int]]) -> dict[str, str]:
    """What weights cannot do, whatever their description, and why."""
    if blocks.normalised:
        why = REBUILT if blocks.rebuilt else "the stream itself passes through a norm in every block"
        return dict.fromkeys(("embed", "reads"), why)
    refused: dict[str, str] = {}
    first, _, change = measure(lab, lab.project_out(candidates), blocks.parts)
    if first > DETECTED:
        refused["embed"] = "what the first block reads is not a sum of rows and matrices that could be edited"
    if max(change.values()) > DETECTED:
        refused["reads"] = "blocks read the stream through more than the norms before them"
    return refused


def _test_axes(
    lab: Experiments, blocks: _Blocks, candidates: list[tuple[str, int]], refused: Mapping[str, str]
) -> tuple[dict[str, int], list[str]]:
    """Note at every part what it writes and reads; the axes that write the embedding, and what does none of these.

    Raises:
        OrthogonalizeError: in a rebuilt stream, a tensor of a block is neither a write nor a read and yet matters.
    """
    embed: dict[str, int] = {}
    inert: list[str] = []
    _, _, always = measure(lab, lab.project_out(candidates), blocks.parts)  # what changes by other ways
    with track("testing tensors", len(candidates), "axes") as advance:
        for group, axis in candidates:
            probe = lab.project_out(c for c in candidates if c != (group, axis))
            first, written, change = measure(lab, probe, blocks.parts)
            used = first > DETECTED and "embed" not in refused
            if used:
                embed[group] = axis
            for layer, found in blocks.parts.items():
                for part in found:
                    if written[layer, part.module] > DETECTED:
                        part.writes[group] = axis
                        part.stored_as |= lab.renamed(group, layer)
                        used = True
            # Everything after a reader changes with it, so the first part that changes is the reader.
            listed = ((p, (layer, p.module)) for layer, found in blocks.parts.items() for p in found)
            reader = next((part for part, key in listed if change[key] > DETECTED >= always[key]), None)
            if reader is not None and ("reads" not in refused or (blocks.rebuilt and lab.in_blocks(group))):
                reader.reads[group] = axis
                used = True
            if not used and blocks.rebuilt and _is_apart(lab, blocks, group) and lab.matters(group, axis):
                raise OrthogonalizeError(
                    f"{group} changes the stream, but is not what any of its parts writes or reads"
                )
            if not used:
                inert.append(group)
            advance(1)
    return embed, inert


def _is_apart(lab: Experiments, blocks: _Blocks, group: str) -> bool:
    """Whether the tensors of `group` are matrices of a block that belong to none of its parts and may write."""
    modules = {part.module for found in blocks.parts.values() for part in found}
    inside = any(group.startswith(f"{module}.") for module in modules)
    return (
        lab.in_blocks(group)
        and lab.is_matrix(group)
        and not (inside or lab.is_per_channel(group) or lab.only_reads(group))
    )


def _name_norms(lab: Experiments, parts: Mapping[int, list[FoundPart]]) -> None:
    reading = {part.module for found in parts.values() for part in found if part.reads}
    for layer, found in parts.items():
        for part in found:
            if part.module not in reading:  # what went before it by chance
                part.norms = []
            lab.stored_norms(part, layer)


def _elsewhere(lab: Experiments, inert: list[str], used: set[str]) -> list[str]:
    """What is as wide as the stream outside of blocks, and neither a write nor a read of theirs."""
    return [g for g in inert if "." in g and g in lab.tensors and g not in used and not g.endswith("bias")]


def _describe_embedding(lab: Experiments, embed: Mapping[str, int], elsewhere: bool) -> tuple[float, str | None]:
    """The factor that multiplies the embedding, and its module if others than the blocks may read its output."""
    table = lab.plain.model.get_input_embeddings()
    ins, _ = lab.plain.observe({"first": lab.plain.blocks[0]})
    _, given = lab.plain.observe({"table": table})
    first = ins.get("first")
    rows = table.weight[lab.ids].reshape(-1, table.weight.shape[-1]).detach()
    fits = first is not None and rows.shape == first.shape and len(embed) == 1
    factor = ((first * rows).sum() / rows.pow(2).sum()).item() if first is not None and fits else 1.0
    base = lab.base
    named = next(n for n, m in lab.plain.model.named_modules() if m is table)
    alone = len(embed) == 1 and is_multiple(given.get("table"), first) and elsewhere
    return factor, named.removeprefix(base + ".") if alone and named.startswith(base + ".") else None


def layout_of(names: Iterable[str], layers: int, findings: Findings) -> tuple[str, str]:
    """The prefix of the decoder's names and the name of the head in the full model's checkpoint."""
    listed = list(names)
    decoder = Names.of(listed, layers, beyond=True).outside(inner_module(findings.layer)).decoder
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
