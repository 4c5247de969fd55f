"""Interventions: affine maps at the sites where a model writes to or reads from its residual stream.

Conditional maps act on one write matrix each, and depend on its input. This module does not depend on any model:
`models.hooks` applies an intervention to a running model, `edits.bake` to the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch

from .errors import OrthogonalizeError

EXPERTS = "experts"  # the name of the routed experts among the write matrices of a block
SHARED_EXPERTS = "shared_experts"  # that of the experts for every token, where these are stacked like routed ones


class Site(NamedTuple):
    """A write or read site: `embed`, `attn.3`, `mlp.3` or (reads only) `head`."""

    kind: Literal["embed", "attn", "mlp", "head"]
    layer: int | None = None

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """The inverse of `str`."""
        kind, _, layer = text.partition(".")
        if kind not in ("embed", "attn", "mlp", "head") or (kind in ("attn", "mlp")) != bool(layer):
            raise ValueError(f"unknown site: {text[:40]!r}")
        return cls(kind, int(layer) if layer else None)  # type: ignore[arg-type]


class WriteMatrix(NamedTuple):
    """One matrix that writes at a site: `name` is that of its module in the block; stacks of experts have fixed names.

    A block has at most one stack of routed experts (`EXPERTS`) and one of shared ones (`SHARED_EXPERTS`), however a
    checkpoint stores them.
    """

    site: Site
    name: str

    def __str__(self) -> str:
        return f"{self.site}:{self.name}"

    @property
    def routed(self) -> bool:
        """Whether this is one matrix per expert, each of which sees the tokens that are routed to it."""
        return self.name in (EXPERTS, SHARED_EXPERTS)

    @classmethod
    def of_experts(cls, site: Site, name: str) -> WriteMatrix:
        """The stack of experts to which the tensor or module `name` belongs."""
        return cls(site, SHARED_EXPERTS if "shared_expert" in name else EXPERTS)

    @classmethod
    def parse(cls, text: str) -> WriteMatrix:
        """The inverse of `str`."""
        site, _, name = text.partition(":")
        return cls(Site.parse(site), name)


@dataclass(frozen=True)
class AffineMap:
    """An affine map of low rank, `h -> h - u (v^T h) + s`; all edit methods have this form.

    `u` and `v` are [d, k], where d is the width of the stream and k the rank (k = 0 for a pure shift);
    `s` is [d], in units of the stream. With a leading batch dimension ([batch, d, k], [batch, d]) each row of
    a batch has its own map.
    """

    u: torch.Tensor
    v: torch.Tensor
    s: torch.Tensor

    def __post_init__(self) -> None:
        if self.u.shape != self.v.shape or self.u.shape[:-1] != self.s.shape:
            raise ValueError(
                f"map shapes do not fit: u {tuple(self.u.shape)}, v {tuple(self.v.shape)}, s {tuple(self.s.shape)}"
            )
        for name in ("u", "v", "s"):  # memory layout changes the last bit of sums, and recipes do not store it
            object.__setattr__(self, name, getattr(self, name).clone(memory_format=torch.contiguous_format))

    def __repr__(self) -> str:
        batch = [f"batch {list(self.s.shape[:-1])}"] if self.s.dim() > 1 else []
        shifts = ["with a shift"] if self.shifts else []
        return f"AffineMap({', '.join([*batch, f'rank {self.rank}', f'width {self.width}', *shifts])})"

    @property
    def width(self) -> int:
        """The width of the stream."""
        return self.u.shape[-2]

    @property
    def rank(self) -> int:
        """The number of directions; 0 for a pure shift."""
        return self.u.shape[-1]

    @property
    def shifts(self) -> bool:
        """Whether the map adds a constant."""
        return bool(self.s.any())

    def to(self, device: torch.device, dtype: torch.dtype) -> AffineMap:
        """The same map on another device and in another dtype."""
        return AffineMap(*(t.to(device=device, dtype=dtype) for t in (self.u, self.v, self.s)))

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """Apply the map to `h` [..., d], computed in float32 or, if wider, the dtype of `h`."""
        wide = torch.promote_types(h.dtype, torch.float32)
        here = self.to(h.device, wide)
        x = h.to(wide)
        shift = here.s if here.s.dim() == 1 else here.s.unsqueeze(-2)
        return (x - (x @ here.v) @ here.u.mT + shift).to(h.dtype)

    @property
    def unshifted(self) -> AffineMap:
        """The map without its shift."""
        return AffineMap(self.u, self.v, torch.zeros_like(self.s))

    def linear(self, h: torch.Tensor) -> torch.Tensor:
        """Apply the map without its shift."""
        return self.unshifted(h)

    def scaled(self, strength: float | torch.Tensor) -> AffineMap:
        """`h - c u (v^T h) + c s` for a number c; for a tensor c [batch], a map for each row of a batch."""
        if not isinstance(strength, torch.Tensor):
            return AffineMap(strength * self.u, self.v, strength * self.s)
        rows = strength.to(self.u)[:, None]
        return AffineMap(rows[..., None] * self.u, self.v.expand(len(rows), *self.v.shape), rows * self.s)

    def is_centred(self, tolerance: float) -> bool:
        """Whether `u` and `v` have, up to `tolerance`, no component along (1, …, 1), which a LayerNorm subtracts."""
        return all(
            bool((part.sum(-2).abs() <= tolerance * part.shape[-2] ** 0.5 * part.norm(dim=-2)).all())
            for part in (self.u, self.v)
        )


def stack_maps(maps: Sequence[AffineMap]) -> AffineMap:
    """Combine maps into one with a leading batch dimension; lower ranks are padded with zeros."""
    most = max(m.rank for m in maps)
    u, v = (torch.stack([torch.nn.functional.pad(t, (0, most - t.shape[-1])) for t in ts])
            for ts in ([m.u for m in maps], [m.v for m in maps]))  # fmt: skip
    return AffineMap(u, v, torch.stack([m.s for m in maps]))


def removal(basis: torch.Tensor, strength: float = 1.0) -> AffineMap:
    """`h - strength * B^T B h` for an orthonormal `basis` B of shape [k, d] (or [batch, k, d]).

    Strength 1 projects the subspace out (Arditi et al. 2024, eq. 4, for k = 1; Ravfogel et al.
    2020, eq. 2, for an INLP basis); strength 2 reflects it.
    """
    columns = basis.to(torch.float64).mT
    return AffineMap(strength * columns, columns, torch.zeros_like(columns[..., 0]))


def shift(vector: torch.Tensor) -> AffineMap:
    """`h + vector` for a `vector` of shape [d] or [batch, d] (Arditi et al. 2024, eq. 3)."""
    s = vector.to(torch.float64)
    nothing = s.new_zeros(*s.shape, 0)
    return AffineMap(nothing, nothing, s)


@dataclass(frozen=True)
class ConditionalMap:
    """What a conditional edit takes out of a write matrix: `W x -> W x - r^T (c x)`.

    `r` [k, d] has orthonormal rows in the stream, `c` [k, n] reads the input x [n] of the matrix; routed experts have
    one each, [experts, k, n]. If a norm follows the block, `r` lies in the stream behind it (see `conjugate`).
    """

    r: torch.Tensor
    c: torch.Tensor

    def __post_init__(self) -> None:
        if self.r.dim() != 2 or self.c.dim() not in (2, 3) or len(self.r) != self.c.shape[-2]:
            raise ValueError(f"map shapes do not fit: r {tuple(self.r.shape)}, c {tuple(self.c.shape)}")
        for name in ("r", "c"):  # as in `AffineMap`
            object.__setattr__(self, name, getattr(self, name).clone(memory_format=torch.contiguous_format))

    def __repr__(self) -> str:
        experts = [f"{len(self.c)} experts"] if self.c.dim() == 3 else []
        parts = [*experts, f"rank {self.rank}", f"{self.c.shape[-1]} inputs", f"width {self.width}"]
        return f"ConditionalMap({', '.join(parts)})"

    @property
    def width(self) -> int:
        """The width of the stream."""
        return self.r.shape[-1]

    @property
    def rank(self) -> int:
        """The number of directions."""
        return len(self.r)

    @property
    def directions(self) -> AffineMap:
        """The map that removes the directions from every write, whatever the input."""
        return removal(self.r)

    def __call__(self, inputs: torch.Tensor, outputs: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """Edited outputs [..., d] from inputs [..., n] and unedited outputs, in float32 or, if wider, their dtype."""
        wide = torch.promote_types(outputs.dtype, torch.float32)
        c = self.c if expert is None else self.c[expert]
        r, c = (part.to(outputs.device, wide) for part in (self.r, c))
        return (outputs.to(wide) - (inputs.to(wide) @ c.mT) @ r).to(outputs.dtype)

    def before_norm(self, scale: torch.Tensor) -> ConditionalMap:
        """The map before a norm with weights `scale` [d] that has the effect of this one after it (see `conjugate`)."""
        return ConditionalMap(conjugate(self.directions, scale).u.mT, self.c)

    def edit(self, weight: torch.Tensor) -> torch.Tensor:
        """The edited matrix [d, n], in float64."""
        return weight.to(torch.float64) - self.r.to(torch.float64).mT @ self.c.to(torch.float64)

    def scaled(self, strength: float) -> ConditionalMap:
        """The same map at another strength."""
        return ConditionalMap(self.r, strength * self.c)


def conjugate(affine: AffineMap, scale: torch.Tensor, truncation: float = 0.1) -> AffineMap:
    """The linear map before a norm with weights `scale` [d] that has the effect of `affine` after it.

    For y = D o / rms(o) and M = 1 - U V^T, the map 1 - D^-1 U V^T D yields M y up to the ratio of the two rms
    values, a positive factor per token. Where D is nearly zero, its inverse would inflate one coordinate and so
    suppress all others: coordinates below `truncation` times the median of |D| are left unchanged and the rest
    are rescaled, which keeps V^T of the output exactly what `affine` makes it.

    Raises:
        OrthogonalizeError: the norm suppresses the direction almost completely.
    """
    d = scale.to(torch.float64)
    u, v = affine.u.to(torch.float64), d.unsqueeze(-1) * affine.v.to(torch.float64)
    kept = d.abs() >= truncation * d.abs().median()
    divided = torch.where(kept, 1 / torch.where(kept, d, 1.0), 0.0).unsqueeze(-1) * u
    overlap, wanted = v.mT @ divided, affine.v.to(torch.float64).mT @ u
    live = u.norm(dim=0) > 0
    if live.any() and torch.linalg.cond(overlap[live][:, live]) > 1e6:
        raise OrthogonalizeError(
            "the norm after a block suppresses this direction almost completely, so it cannot be edited there"
        )
    return AffineMap(divided @ (torch.linalg.pinv(overlap) @ wanted), v, torch.zeros_like(affine.s))


def centred_map(affine: AffineMap) -> AffineMap:
    """The same map with the mean of each direction removed, since a LayerNorm cannot see it.

    Orthonormal directions are made orthonormal again; shifts are kept.
    """
    if not affine.rank or affine.is_centred(1e-12):
        return affine
    u, v = (part - part.mean(-2, keepdim=True) for part in (affine.u, affine.v))
    # V^T U is the strength of the removal, and centring shrinks it: U (V^T U)^-1 restores it.
    before, after = affine.v.mT @ affine.u, v.mT @ u
    return AffineMap(u @ torch.linalg.pinv(after) @ before, v, affine.s)


def centred(intervention: Intervention) -> Intervention:
    """The same intervention with every map centred (see `centred_map`)."""
    return Intervention(
        {site: centred_map(affine) for site, affine in intervention.writes.items()},
        {site: centred_map(affine) for site, affine in intervention.reads.items()},
        intervention.conditional,  # fitted to the writes as they are, so that a mean that they carry does no harm
    )


@dataclass(frozen=True)
class Intervention:
    """Maps by write site (applied to what is written) and by read site (applied to what is read).

    Conditional maps are by write matrix.
    """

    writes: Mapping[Site, AffineMap] = field(default_factory=dict)
    reads: Mapping[Site, AffineMap] = field(default_factory=dict)
    conditional: Mapping[WriteMatrix, ConditionalMap] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(m.shifts for m in self.reads.values()):
            raise ValueError("a map at a read site cannot add a constant; shift the last write before it instead")
        if len(self.widths) > 1:
            raise ValueError(f"maps have different widths: {', '.join(map(str, sorted(self.widths)))}")
        object.__setattr__(self, "writes", MappingProxyType(dict(self.writes)))
        object.__setattr__(self, "reads", MappingProxyType(dict(self.reads)))
        object.__setattr__(self, "conditional", MappingProxyType(dict(self.conditional)))

    def __repr__(self) -> str:
        maps = [*self.writes.values(), *self.reads.values()]
        ranks = sorted({*(each.rank for each in maps), *(each.rank for each in self.conditional.values())})
        if not ranks:
            return "Intervention(empty)"
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        shifts = sum(affine.shifts for affine in maps)
        parts = [f"{len(self.writes)} writes"] if self.writes else []
        parts += [f"{len(self.reads)} reads"] if self.reads else []
        parts += [f"{len(self.conditional)} write matrices"] if self.conditional else []
        parts += [rank, f"width {self.width}"] + ([f"{shifts} with a shift"] if shifts else [])
        return f"Intervention({', '.join(parts)})"

    @property
    def widths(self) -> set[int]:
        """The width of the stream in every map: one, unless the maps belong to different models."""
        maps = (*self.writes.values(), *self.reads.values())
        return {each.width for each in maps} | {each.width for each in self.conditional.values()}

    @property
    def width(self) -> int | None:
        """The width of the stream; None if the intervention is empty."""
        return next(iter(self.widths), None)

    def scaled(self, strengths: Mapping[Site, float]) -> Intervention:
        """The same intervention with the maps at some write sites scaled; a site of strength 0 is not edited.

        Maps at read sites, and at sites that `strengths` does not name, stay as they are.
        """
        writes = {site: (m, strengths.get(site, 1.0)) for site, m in self.writes.items()}
        conditional = {matrix: (m, strengths.get(matrix.site, 1.0)) for matrix, m in self.conditional.items()}
        return Intervention(
            {site: m.scaled(strength) for site, (m, strength) in writes.items() if strength},
            self.reads,
            {matrix: m.scaled(strength) for matrix, (m, strength) in conditional.items() if strength},
        )

    def spares(self, layer: int) -> bool:
        """Whether the stream at the input of block `layer` stays as it is."""
        sites = (*self.writes, *self.reads, *(matrix.site for matrix in self.conditional))
        return all(site.kind == "head" or (site.layer is not None and site.layer >= layer) for site in sites)

    def at(self, layer: int, layer_count: int) -> Intervention | None:
        """The part that acts in block `layer`, or in the head if that is `layer_count`; None if there is none.

        What is written before the first block belongs to it.
        """

        def here(site: Site) -> bool:
            own = {"embed": 0, "head": layer_count}.get(site.kind, site.layer)
            return own == layer

        writes = {site: each for site, each in self.writes.items() if here(site)}
        reads = {site: each for site, each in self.reads.items() if here(site)}
        conditional = {matrix: each for matrix, each in self.conditional.items() if here(matrix.site)}
        return Intervention(writes, reads, conditional) if writes or reads or conditional else None


def block_sites(layers: Iterable[int]) -> list[Site]:
    """The attention and MLP sites of `layers`, in execution order."""
    return [site for layer in layers for site in (Site("attn", layer), Site("mlp", layer))]


def orthonormal(vectors: torch.Tensor) -> torch.Tensor:
    """Orthonormalize the rows of `vectors` [k, d] by Gram-Schmidt in float64, in order; dependent rows are dropped."""
    width = vectors.shape[-1]
    kept, count = vectors.new_zeros(min(vectors.shape), width, dtype=torch.float64), 0
    for vector in vectors.to(torch.float64):
        norm = vector.norm()
        rest = vector
        for _ in range(2):  # twice is enough: the second pass removes what rounding left
            rest = rest - (kept[:count] @ rest) @ kept[:count]
        if rest.norm() > 1e-10 * norm and norm > 0:
            kept[count] = rest / rest.norm()
            count += 1
        if count == width:
            break
    return kept[:count]
