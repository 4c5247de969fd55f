"""A choice: method, source, scope and strength of an edit, and the intervention that it means."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict

from .directions import Directions
from .errors import OrthogonalizeError
from .interventions import AffineMap, Intervention, Method, removal
from .scopes import map_sites, parse_scope, shift_sites


def direction_kind(method: Method, directions: Directions) -> str:
    """Which kind of direction `method` takes: `inlp` for nullspace, and for reflect where there is one."""
    if method == "nullspace" or (method == "reflect" and directions.subspaces):
        return "inlp"
    return "dim"


class Choice(BaseModel):
    """Everything that determines an edit besides the directions themselves.

    `coefficient` is the length that `actadd` adds along the unit direction, in units of the stream;
    None is the length of the mean difference itself. `alpha` is that of `reflect`: 1 projects, 2
    mirrors. `strength` scales the whole map.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Method
    scope: str = "all"
    strength: float = 1.0
    per_layer: bool = False
    position: int | None = None
    layer: int | None = None
    rank: int | None = None
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
    choice: Choice, basis: torch.Tensor, norm: float, layer_count: int, ranking: Sequence[int] | None = None
) -> Intervention:
    """The intervention of `choice` along one shared orthonormal `basis` [k, d].

    `norm` is the length that `actadd` adds where the choice names no coefficient.
    """
    scope = parse_scope(choice.scope)
    if choice.rank is not None and choice.rank > len(basis):
        raise OrthogonalizeError(f"rank {choice.rank} was asked for, and the basis there has {len(basis)}")
    basis = basis[: choice.rank]
    if choice.method in ("ablate", "actadd") and len(basis) > 1:
        raise OrthogonalizeError(f"{choice.method} takes one direction, not {len(basis)}; use nullspace, or --rank 1")
    if choice.method == "actadd":
        vector = choice.shift_vector(basis[0], norm)
        return shift_sites(scope, layer_count, lambda _: vector, choice.layer, ranking)
    shared = removal(basis, choice.removal_strength())
    return map_sites(scope, layer_count, lambda _: shared, choice.layer, ranking)


def intervention_from_directions(
    choice: Choice, directions: Directions, ranking: Sequence[int] | None = None
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

    def basis_at(layer: int) -> torch.Tensor | None:
        return directions.basis(kind, position, layer)

    if not choice.per_layer:
        assert choice.layer is not None
        basis = basis_at(choice.layer)
        if basis is None:
            wanted = "INLP found no" if kind == "inlp" else "the two sides have no"
            raise OrthogonalizeError(
                f"{wanted} direction at position {position}, layer {choice.layer}; "
                "choose another, or extract again with --methods dim,inlp"
            )
        norm = directions.mean_diff(position, choice.layer).norm().item()
        return intervention_from_basis(choice, basis, norm, directions.layer_count, ranking)

    def vector_at(layer: int) -> torch.Tensor | None:
        basis = basis_at(layer)
        if basis is None:
            return None
        return choice.shift_vector(basis[0], directions.mean_diff(position, layer).norm().item())

    def map_at(layer: int) -> AffineMap | None:
        basis = basis_at(layer)
        return None if basis is None else removal(basis[: choice.rank], choice.removal_strength())

    scope = parse_scope(choice.scope)
    if choice.method == "actadd":
        return shift_sites(scope, directions.layer_count, vector_at, choice.layer, ranking)
    return map_sites(scope, directions.layer_count, map_at, choice.layer, ranking)
