"""Compare hooks on a tiny model with its baked checkpoint; shared by the architecture tests."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_models import load_tiny, logits, store_tiny
from orthogonalize.architectures.schema import architecture_of
from orthogonalize.checkpoints.checkpoint import INDEX, Checkpoint, open_checkpoint
from orthogonalize.core.interventions import AffineMap, ConditionalMap, Intervention, Site, removal
from orthogonalize.edits.bake import bake
from orthogonalize.edits.plan import EditPlan
from orthogonalize.edits.scopes import map_sites, parse_scope
from orthogonalize.models.hooks import intervened

WIDTH, LAYERS, EXACT = 48, 4, 1e-9


def centred_basis(rank: int, seed: int = 5) -> torch.Tensor:
    """Orthonormal rows [rank, d] of mean zero, as LayerNorm families need them."""
    rows = torch.randn(rank, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr((rows - rows.mean(1, keepdim=True)).T)[0].T.contiguous()


BASIS = centred_basis(3)
ABLATE = removal(BASIS[:1])


def oblique(seed: int) -> AffineMap:
    """A removal whose u and v span different subspaces, as LEACE's do."""
    v = centred_basis(2, seed).T
    u = v + 0.3 * centred_basis(2, seed + 100).T
    return AffineMap(u @ torch.linalg.inv(v.T @ u), v, torch.zeros(WIDTH, dtype=torch.float64))


class Base:
    """A family's tiny checkpoint, and the model it holds."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder if folder.exists() else store_tiny(name, folder)
        self.checkpoint: Checkpoint = open_checkpoint(self.folder)
        self.architecture = architecture_of(self.checkpoint.config)
        self.model = load_tiny(self.folder)
        self.plain = logits(self.model)

    def hooked(self, intervention: Intervention, renormalise: bool = False) -> torch.Tensor:
        with intervened(self.model, intervention, renormalise):
            return logits(self.model)

    @property
    def post_norm(self) -> bool:
        return any(part.post_norm for part in self.architecture.attn.values())


def baked_logits(base: Base, intervention: Intervention, out: Path) -> torch.Tensor:
    """Logits of the baked checkpoint, after checking that it differs from the base only where planned."""
    out.mkdir()
    plan = bake(base.checkpoint, intervention)
    plan.write(out)
    edited, source = open_checkpoint(out), plan.source  # a model stored as a Llama has other tensor names
    for name in source.tensors:
        same = source.read(name).equal(edited.read(name))
        assert same == (name not in plan.checkpoint.edits), name
    assert edited.tensors.keys() - source.tensors.keys() == plan.checkpoint.additions.keys()
    changed = {
        k for k in edited.config | base.checkpoint.config if edited.config.get(k) != base.checkpoint.config.get(k)
    }
    assert changed <= plan.checkpoint.config_changes.keys()
    sides = [
        f
        for f in base.folder.iterdir()
        if f.suffix == ".json" and f.name not in ("config.json", "model.safetensors.index.json")
    ]
    assert all((out / f.name).read_bytes() == f.read_bytes() for f in sides)
    return logits(load_tiny(out))


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def relative(a: torch.Tensor, b: torch.Tensor, reference: torch.Tensor) -> float:
    return ((a - b).norm() / (b - reference).norm()).item()


def compare(base: Base, intervention: Intervention, out: Path, rescaled: bool = False) -> float:
    """Gap between hooks and weights; `rescaled` where they may differ by a positive factor by design."""
    baked = baked_logits(base, intervention, out)
    hooked = base.hooked(intervention)
    assert gap(hooked, base.plain) > 1e-2, "the intervention did nothing, so nothing was compared"
    ideal = base.hooked(intervention, renormalise=True)
    if not rescaled:
        assert gap(ideal, baked) <= EXACT
    return gap(hooked, baked)


def every_write(embed: bool = True) -> Intervention:
    """A different oblique map at every write site: if these are exact, every method and scope is."""
    sites = [Site(kind, layer) for layer in range(LAYERS) for kind in ("attn", "mlp")]
    sites += [Site("embed")] if embed else []
    return Intervention({site: oblique(number) for number, site in enumerate(sites)})


def every_read(first: int = 0) -> Intervention:
    """A different map before every layer that reads, and before the head."""
    reads = {Site(kind, layer): oblique(layer) for layer in range(first, LAYERS) for kind in ("attn", "mlp")}
    return Intervention(reads=reads | {Site("head"): oblique(99)})


def every_write_matrix(base: Base, rank: int = 2) -> Intervention:
    """A different conditional map of every matrix that writes, and of every expert but the first."""
    sites = EditPlan.of(base.checkpoint).sites
    maps = {}
    for number, site in enumerate(Site(kind, layer) for layer in range(LAYERS) for kind in ("attn", "mlp")):
        if not base.architecture.parts(site.kind):
            continue
        for matrix, (_, stored) in sites.write_matrices(site).items():
            shapes = [sites.tensors[write.name].shape for write in stored]
            experts = len(stored) if len(stored) > 1 else shapes[0][0] if len(shapes[0]) == 3 else 0
            inputs = sum(map(prod, shapes)) // WIDTH // max(1, experts)
            generator = torch.Generator().manual_seed(number)
            shape = (experts, rank, inputs) if experts else (rank, inputs)
            c = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
            if experts:
                c[0] = 0
            maps[matrix] = ConditionalMap(centred_basis(rank, number), c)
    return Intervention(conditional=maps)


def ablation(scope: str = "all") -> Intervention:
    return map_sites(parse_scope(scope), LAYERS, lambda _: ABLATE)


def rewritten(source: Path, out: Path, change) -> Path:
    """A single-file copy of a checkpoint, its tensors (by name) transformed by `change`."""
    out.mkdir()
    tensors = {name: t for file in sorted(source.glob("*.safetensors")) for name, t in load_file(file).items()}
    save_file({k: v.contiguous() for k, v in change(tensors).items()}, out / "model.safetensors", {"format": "pt"})
    for file in source.glob("*.json"):
        if file.name != INDEX:
            (out / file.name).write_bytes(file.read_bytes())
    return out


def gap_of(source: Path, plan: EditPlan, intervention: Intervention, out: Path) -> float:
    """Gap between hooks on `source` and the checkpoint that `plan` writes."""
    out.mkdir()
    plan.write(out)
    model = load_tiny(source)
    with intervened(model, intervention, renormalise=False):
        hooked = logits(model)
    return gap(hooked, logits(load_tiny(out)))


def gap_without(source: Path, pattern: str, intervention: Intervention, out: Path) -> float:
    """Gap if the edits of all tensors whose names match `pattern` are omitted."""
    plan = bake(open_checkpoint(source), intervention)
    left_out = [name for name in plan.checkpoint.edits if re.search(pattern, name)]
    assert left_out, "nothing was left out"
    for name in left_out:
        del plan.checkpoint.edits[name]
    return gap_of(source, plan, intervention, out)
