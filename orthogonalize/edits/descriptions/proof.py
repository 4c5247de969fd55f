"""Prove a description on a small random twin: what hooks do, edited weights must do, and a missed write must show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from ...architectures.open_questions import answered, open_names, parts_with_bias
from ...architectures.schema import Architecture, remember
from ...checkpoints.checkpoint import Checkpoint, open_checkpoint
from ...core.errors import OrthogonalizeError, first_line
from ...core.interventions import AffineMap, ConditionalMap, Intervention, Site, block_sites, removal, shift
from ...core.temporary_folders import temporary_folder
from ...models.describe.block_probe import ObservedModel
from ...models.describe.twin import load_twin, logits, token_ids
from ...models.hooks import intervened, map_input
from ...models.sites import Sites
from ...models.stream import Stream
from ..bake import bake
from ..plan import EditPlan

EXACT = 1e-9  # the largest difference of a logit that counts as none, in float64 arithmetic
SHOWS = 1e-6  # the smallest that a missed write has to make
MOVES = 1e-2  # the smallest that an edit of every site has to make, or nothing was compared


@dataclass
class Proof:
    """What was measured: the largest difference of a logit between hooks and weights, by kind of edit.

    `refused` names the kinds that are not exact, and why; `missed` is the smallest difference that leaving out one
    of the writes makes.
    """

    gaps: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    missed: float = float("inf")


def prove(architecture: Architecture, twin: Path) -> Proof:
    """Prove `architecture` on the model in the folder `twin` (see `describe.twin`).

    Writes of blocks must be exact. The embedding, reads, constants in blocks and conditional edits may fail, which is
    then part of the result. What only a server can tell is taken to be as the edits need it.

    Raises:
        OrthogonalizeError: a write is missing from the description, or wrong in it.
    """
    checkpoint = open_checkpoint(twin)
    types = (*architecture.model_types, str(checkpoint.config["model_type"]))  # of an image model's text model
    architecture = architecture.model_copy(update={"model_types": types})
    architecture = answered(architecture, dict.fromkeys(open_names(architecture), "vllm"))
    with _known(checkpoint, architecture), temporary_folder() as scratch:
        return _Bench(checkpoint, architecture, scratch).proof()


@contextmanager
def _known(checkpoint: Checkpoint, architecture: Architecture) -> Iterator[None]:
    remember(checkpoint.config, architecture)
    try:
        yield
    finally:
        remember(checkpoint.config, None)


class _Bench:
    """A twin, and edits of it that are compared with hooks."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture, scratch: Path) -> None:
        self.checkpoint, self.architecture, self.scratch = checkpoint, architecture, scratch
        self.layers = architecture.layers(checkpoint.config)
        self.width = architecture.width(checkpoint.config)
        self.sites = Sites(architecture, checkpoint.config, checkpoint.tensors)
        self.model = load_twin(checkpoint.path)
        self.ids = token_ids(self.model)
        self.plain = logits(self.model, self.ids)
        self.blocks = [s for s in block_sites(range(self.layers)) if architecture.parts(s.kind)]
        self.edited = 0

    def basis(self, rank: int, seed: int) -> torch.Tensor:
        """Orthonormal rows [rank, d] of mean zero, as a LayerNorm needs them."""
        rows = torch.randn(rank, self.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        basis: torch.Tensor = torch.linalg.qr((rows - rows.mean(1, keepdim=True)).T)[0]
        return basis.T.contiguous()

    def oblique(self, seed: int) -> AffineMap:
        """A removal whose u and v span different subspaces; a different one at every site finds a mistaken site."""
        v = self.basis(2, seed).T
        u = v + 0.3 * self.basis(2, seed + 100).T
        return AffineMap(u @ torch.linalg.inv(v.T @ u), v, torch.zeros(self.width, dtype=torch.float64))

    def weights(self, plan: EditPlan) -> Any:
        """The model with the planned edit in its weights."""
        self.edited += 1
        out = self.scratch / str(self.edited)
        out.mkdir()
        plan.write(out)
        return load_twin(out)

    def gap(self, intervention: Intervention) -> float:
        """The largest difference of a logit between hooks and weights."""
        with intervened(self.model, intervention, renormalise=False):
            hooked = logits(self.model, self.ids)
        if self.difference(hooked, self.plain) < MOVES:
            raise OrthogonalizeError("the edit did nothing, so nothing was compared")
        return self.difference(hooked, logits(self.weights(bake(self.checkpoint, intervention)), self.ids))

    @staticmethod
    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        """The largest of any logit."""
        found = (a - b).abs().max().item()
        return float("inf") if found != found else found

    def proof(self) -> Proof:
        """See `prove`."""
        self.sites.check_complete()
        found = Proof(refused={str(kind): why for kind, why in self.architecture.refused.items()})
        writes = Intervention({site: self.oblique(number) for number, site in enumerate(self.blocks)})
        found.gaps["blocks"] = self.gap(writes)
        if found.gaps["blocks"] > EXACT:
            raise OrthogonalizeError(
                f"edited weights of blocks differ from hooks by {found.gaps['blocks']:.1e}, so a write is described "
                "wrongly"
            )
        if not self.architecture.normalised:
            self.check_stream()
        found.missed = self.smallest_miss(writes)
        first = Intervention({Site("embed"): self.oblique(90)})
        reads = {site: self.oblique(int(site.layer or 0)) for site in self.blocks} | {Site("head"): self.oblique(99)}
        constants = self.every_constant()
        for kind, intervention in (
            ("conditional", self.every_matrix), ("embed", lambda: first), ("reads", lambda: Intervention(reads=reads)),
            *([("constants", lambda: constants)] if constants.writes else []),
        ):  # fmt: skip
            if kind in found.refused:
                continue
            try:
                gap = self.gap(intervention())
            except Exception as error:  # hooks on unknown modules raise anything
                found.refused[kind] = f"hooks do not fit: {first_line(error)}"
                continue
            found.gaps[kind] = gap
            if kind == "reads" and gap <= EXACT and self.still_read():
                found.refused[kind] = "something reads the stream besides what experiments found"
            if gap > EXACT:
                found.refused[kind] = f"edited weights differ from hooks by {gap:.1e}"
        return found

    def check_stream(self) -> None:
        """Remove a direction from every write: blocks may then only pass on what they got of it, times one factor.

        This does not depend on where the description says that blocks write.
        """
        direction = self.basis(1, 5)[0]
        plan = bake(self.checkpoint, Intervention({site: removal(direction[None]) for site in self.blocks}))
        model = self.weights(plan)
        stream = Stream(model, self.architecture, self.checkpoint.config)
        blocks = {str(layer): stream.block(layer) for layer in range(self.layers)}
        ins, outs = ObservedModel(model, self.ids).observe(blocks)
        for layer in blocks:
            if layer not in ins or layer not in outs:
                raise OrthogonalizeError(f"block {layer} does not take and give the residual stream")
            before, after = (h[layer].double() @ direction for h in (ins, outs))
            factor = (before @ after) / (before @ before)
            if (after - factor * before).norm() > 1e-4 * before.norm():
                raise OrthogonalizeError(
                    f"block {layer} still writes a direction that was removed from every write, so one is missing"
                )

    def still_read(self) -> bool:
        """Whether blocks see a direction that was removed from everything that reads, whatever the description says.

        What goes into the first block is mirrored along it, which no norm notices if no block writes it either.
        """
        direction = self.basis(1, 5)
        reads = {site: removal(direction) for site in [*self.blocks, Site("head")]}
        writes = {site: removal(direction) for site in self.blocks}
        model = self.weights(bake(self.checkpoint, Intervention(writes, reads)))
        plain = logits(model, self.ids)
        mirror = map_input(Stream(model, self.architecture, self.checkpoint.config).block(0), removal(direction, 2.0))
        mirrored = logits(model, self.ids)
        mirror.remove()
        return self.difference(plain, mirrored) > SHOWS

    def smallest_miss(self, intervention: Intervention) -> float:
        """The smallest difference of a logit that leaving out one kind of write makes.

        Raises:
            OrthogonalizeError: leaving one out does not show, so that it is no write.
        """
        with intervened(self.model, intervention, renormalise=False):
            hooked = logits(self.model, self.ids)
        smallest = float("inf")
        for kind in ("attn", "mlp"):
            for part in self.architecture.parts(kind).values():
                for template in part.writes:
                    names = [w.name for n in range(self.layers) for w in self.sites.writes(part, n, [template])]
                    if not names:
                        continue
                    plan = bake(self.checkpoint, intervention)
                    for name in names:
                        del plan.checkpoint.edits[name]
                    shown = self.difference(hooked, logits(self.weights(plan), self.ids))
                    if shown < SHOWS:
                        raise OrthogonalizeError(f"leaving out {template} does not show, so it is no write")
                    smallest = min(smallest, shown)
        return smallest

    def every_constant(self) -> Intervention:
        """A different constant at every block where the description has a bias for it."""
        maps: dict[Site, AffineMap] = {}
        for number, site in enumerate(self.blocks if parts_with_bias(self.architecture) else ()):
            constant = Intervention({site: shift(2 * self.basis(1, 50 + number)[0])})
            with suppress(OrthogonalizeError):  # another block of the layer may have one
                bake(self.checkpoint, constant)
                maps |= constant.writes
        return Intervention(maps)

    def every_matrix(self) -> Intervention:
        """A different conditional map of every write matrix, and of every expert but the first."""
        maps = {}
        for number, site in enumerate(self.blocks):
            for matrix, (_, stored) in self.sites.write_matrices(site).items():
                shapes = [self.sites.tensors[write.name].shape for write in stored]
                experts = len(stored) if len(stored) > 1 else shapes[0][0] if len(shapes[0]) == 3 else 0
                inputs = sum(map(prod, shapes)) // self.width // max(1, experts)
                generator = torch.Generator().manual_seed(number)
                shape = (experts, 2, inputs) if experts else (2, inputs)
                c = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
                if experts > 1:
                    c[0] = 0
                maps[matrix] = ConditionalMap(self.basis(2, number), c)
        return Intervention(conditional=maps)
