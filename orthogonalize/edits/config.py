"""A choice: method, source, scope and strength of an edit, and the intervention that it means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from ..core.errors import OrthogonalizeError
from ..core.interventions import AffineMap, Intervention, Method, Site, removal
from ..directions.direction_set import Directions
from ..directions.leace import Eraser
from .scopes import chosen_layers, map_sites, parse_scope, shift_sites

# The INLP directions whose classifiers were at least so accurate.
RANK_BY_ACCURACY = {"acc99": 0.99, "acc95": 0.95}


def direction_kind(method: Method, directions: Directions) -> str:
    """Which kind of direction `method` takes: `inlp` for nullspace, and for reflect where there is one."""
    if method == "leace":
        return "leace"
    if method == "nullspace" or (method == "reflect" and directions.subspaces):
        return "inlp"
    return "dim"


class EditConfig(BaseModel):
    """Everything that determines an edit besides the directions themselves.

    `coefficient` is the length that `actadd` adds along the unit direction, in units of the stream;
    None is the length of the mean difference itself. `alpha` is that of `reflect`: 1 projects, 2
    mirrors. `rank` keeps the first directions of an INLP basis: so many, or those that were found before
    a classifier fell under 99% (`acc99`) or 95% (`acc95`) held-out accuracy. `orthogonal` is LEACE's
    orthogonal form. `strength` scales the whole map.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Method
    scope: str = "all"
    strength: float = 1.0
    per_layer: bool = False
    position: int | None = None
    layer: int | None = None
    rank: Annotated[int, Field(ge=1)] | Literal["acc99", "acc95"] | None = None
    orthogonal: bool = False
    alpha: float = 2.0
    coefficient: float | None = None

    def describe(self) -> str:
        """One line for people."""
        words = [self.method, self.scope]
        if self.per_layer:
            words.append("each layer along its own direction")
        elif self.layer is not None:
            words.append(f"direction of layer {self.layer}")
        if self.position is not None:
            words.append(f"position {self.position}")
        if self.coefficient is not None:
            words.append(f"coefficient {self.coefficient:g}")
        if self.method == "reflect":
            words.append(f"alpha {self.alpha:g}")
        if self.rank is not None:
            words.append(f"rank {self.rank}")
        if self.orthogonal:
            words.append("orthogonal form")
        if self.strength != 1.0:
            words.append(f"strength {self.strength:g}")
        return ", ".join(words)

    def shift_vector(self, unit: torch.Tensor, norm: float) -> torch.Tensor:
        """What `actadd` adds along `unit` [d], where the mean difference has length `norm`."""
        length = norm if self.coefficient is None else self.coefficient
        return self.strength * length * unit

    def removal_strength(self) -> float:
        """The factor on `B^T B`: alpha for reflect, else 1, times the strength."""
        return self.strength * (self.alpha if self.method == "reflect" else 1.0)


def intervention_from_basis(
    choice: EditConfig, basis: torch.Tensor, norm: float, layer_count: int, ranking: Sequence[int] | None = None
) -> Intervention:
    """The intervention of `choice` along one shared orthonormal `basis` [k, d].

    `norm` is the length that `actadd` adds where the choice names no coefficient.
    """
    scope = parse_scope(choice.scope)
    if choice.method == "leace":
        raise OrthogonalizeError("leace needs the covariances that extract fits; use --run, extracted with leace")
    if isinstance(choice.rank, str):
        raise OrthogonalizeError(f"rank {choice.rank} needs INLP's accuracies; use --run, or give a number")
    if choice.rank is not None and choice.rank > len(basis):
        raise OrthogonalizeError(
            f"rank {choice.rank} was asked for, and the basis there has {len(basis)} directions; "
            "give a smaller --rank, or extract with more prompts and --max-rank"
        )
    basis = basis[: choice.rank]
    if choice.method in ("ablate", "actadd") and len(basis) > 1:
        raise OrthogonalizeError(f"{choice.method} takes one direction, not {len(basis)}; use nullspace, or --rank 1")
    if choice.method == "actadd":
        vector = choice.shift_vector(basis[0], norm)
        return shift_sites(scope, layer_count, lambda _: vector, choice.layer, ranking)
    shared = removal(basis, choice.removal_strength())
    return map_sites(scope, layer_count, lambda _: shared, choice.layer, ranking)


def intervention_from_directions(
    choice: EditConfig, directions: Directions, ranking: Sequence[int] | None = None
) -> Intervention:
    """The intervention of `choice` along extracted directions, shared or each layer's own.

    Raises:
        OrthogonalizeError: no direction exists at the chosen position and layer.
    """
    kind = direction_kind(choice.method, directions)
    if choice.position is None or (choice.layer is None and not choice.per_layer):
        raise OrthogonalizeError("an edit needs the direction's position and layer; give --position and --layer")
    position = choice.position
    if position not in directions.positions:
        raise OrthogonalizeError(
            f"the run has no position {position}; it has {directions.positions[0]} to {directions.positions[-1]}"
        )
    if choice.layer is not None and not 0 <= choice.layer <= directions.layer_count:
        raise OrthogonalizeError(f"the run has no layer {choice.layer}; its layers are 0 to {directions.layer_count}")

    if choice.method == "leace":
        return _erasure(choice, directions, position, ranking)

    def basis_at(layer: int) -> torch.Tensor | None:
        basis = directions.basis(kind, position, layer)
        if basis is None or not isinstance(choice.rank, str):
            return basis
        return basis[: directions.subspaces[position, layer].leading(RANK_BY_ACCURACY[choice.rank])]

    if not choice.per_layer:
        assert choice.layer is not None
        basis = basis_at(choice.layer)
        if basis is None:
            wanted = "INLP found no" if kind == "inlp" else "the two sides have no"
            raise _no_direction(wanted, position, choice.layer, "dim,inlp")
        norm = directions.mean_diff(position, choice.layer).norm().item()
        numbered = choice.model_copy(update={"rank": len(basis)}) if isinstance(choice.rank, str) else choice
        return intervention_from_basis(numbered, basis, norm, directions.layer_count, ranking)

    def vector_at(layer: int) -> torch.Tensor | None:
        basis = basis_at(layer)
        if basis is None:
            return None
        return choice.shift_vector(basis[0], directions.mean_diff(position, layer).norm().item())

    def map_at(layer: int) -> AffineMap | None:
        basis = basis_at(layer)
        first = choice.rank if isinstance(choice.rank, int) else None
        return None if basis is None else removal(basis[:first], choice.removal_strength())

    scope = parse_scope(choice.scope)
    if choice.method == "actadd":
        return shift_sites(scope, directions.layer_count, vector_at, choice.layer, ranking)
    return map_sites(scope, directions.layer_count, map_at, choice.layer, ranking)


def _no_direction(wanted: str, position: int, layer: int, methods: str) -> OrthogonalizeError:
    return OrthogonalizeError(
        f"{wanted} direction at position {position}, layer {layer}; "
        f"choose another, or extract again with --methods {methods}"
    )


def _erasure(choice: EditConfig, directions: Directions, position: int, ranking: Sequence[int] | None) -> Intervention:
    """LEACE on the write sites of a scope: the linear part at each, and the shift that restores the mean once.

    What a set of writes adds to the stream has a mean, of which the linear part removes `u v^T mean`. With
    the embedding in scope that is the stream's own mean where the eraser was fitted, and the shift
    goes in with the embedding; else it is what the chosen blocks add on average, and the shift goes
    in with the last of them. With each layer's own eraser, every block restores what it removed.

    Raises:
        OrthogonalizeError: `from:l`, as no reader has a place for the shift.
    """
    scope = parse_scope(choice.scope)
    if scope.kind == "from":
        raise OrthogonalizeError(
            "leace has no scope 'from': its shift has no exact place behind a reader's norm; "
            "use all, upto:l or layers:…, or nullspace with from:l"
        )

    def eraser_at(stream: int) -> Eraser | None:
        source = stream if choice.per_layer else choice.layer
        assert source is not None
        return directions.eraser(position, source, choice.orthogonal)

    if not choice.per_layer and eraser_at(0) is None:
        wanted = "the two sides have no" if directions.readers is not None else "LEACE was not extracted, so it has no"
        raise _no_direction(wanted, position, choice.layer or 0, "dim,inlp,leace")

    def linear_at(stream: int) -> AffineMap | None:
        eraser = eraser_at(stream)
        return None if eraser is None else eraser.affine(choice.strength).unshifted

    count = directions.layer_count
    writes = dict(map_sites(scope, count, linear_at, choice.layer, ranking).writes)
    layers = chosen_layers(scope, count, choice.layer, ranking)
    added = {layer: directions.mean(position, layer + 1) - directions.mean(position, layer) for layer in layers}
    means: dict[Site, torch.Tensor] = {}
    if choice.per_layer:
        means = {Site("mlp", layer): mean for layer, mean in added.items()}
        means[Site("embed")] = directions.mean(position, 0)
    elif Site("embed") in writes:
        assert choice.layer is not None
        means[Site("embed")] = directions.mean(position, choice.layer)
    else:
        means[Site("mlp", layers[-1])] = torch.stack(list(added.values())).sum(0)
    for site, mean in means.items():
        if site in writes:
            u, v = writes[site].u, writes[site].v
            writes[site] = AffineMap(u, v, u @ (v.mT @ mean))
    return Intervention(writes=writes)
