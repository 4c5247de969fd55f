"""Build the intervention that an `EditConfig` describes, from one basis or from extracted directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..core.errors import OrthogonalizeError
from ..core.interventions import AffineMap, Intervention, Site, centred
from ..directions.direction_set import Directions
from ..directions.finders.inlp import RANK_BY_ACCURACY
from ..directions.finders.registry import FINDERS
from .config import EditConfig
from .methods.registry import METHODS
from .scopes import parse_scope

if TYPE_CHECKING:
    from .methods.base import EditMethod


def finder_of(method: str, directions: Directions, chosen: str | None = None) -> str:
    """The finder in `directions` whose results `method` uses, which may be `chosen`."""
    return METHODS.find(method).finder(directions, chosen)


def first_direction(directions: Directions, finder: str, position: int, layer: int) -> torch.Tensor | None:
    """The first direction [1, d] that `finder` found there, pointing to the positive side; None without one."""
    basis = directions.basis(finder, position, layer, rank=1)
    if basis is None:
        return None
    return basis if basis[0] @ directions.mean_diff(position, layer) >= 0 else -basis


def intervention_from_basis(
    choice: EditConfig, basis: torch.Tensor, norm: float, layer_count: int, ranking: Sequence[int] | None = None
) -> Intervention:
    """The intervention of `choice` along one shared orthonormal `basis` [k, d].

    `norm` is the length that `actadd` adds if the choice has no coefficient.

    Raises:
        OrthogonalizeError: the method does not accept this basis, or the scope does not fit the model.
    """
    return scale_sites(choice, METHODS.find(choice.method).from_basis(choice, basis, norm, layer_count, ranking))


def intervention_from_directions(
    choice: EditConfig, directions: Directions, ranking: Sequence[int] | None = None, *, layer_norm: bool = False
) -> Intervention:
    """The intervention of `choice` along extracted directions: one shared direction, or each layer's own.

    With `layer_norm`, every map is centred: what a LayerNorm subtracts would otherwise bring the direction back. A
    method that restores a mean then restores the mean that the norms see.

    Raises:
        OrthogonalizeError: there is no direction at the chosen position and layer.
    """
    if choice.position is None or (choice.layer is None and not choice.per_layer):
        raise OrthogonalizeError("an edit needs the position and layer of its direction; give --position and --layer")
    directions.check_place(choice.position, choice.layer)
    method = METHODS.find(choice.method)
    if layer_norm and method.restores_mean(choice):
        directions = directions.centred()
    intervention = method.from_directions(choice, directions, ranking)
    return scale_sites(choice, centred(intervention) if layer_norm else intervention)


def scale_sites(choice: EditConfig, intervention: Intervention) -> Intervention:
    """The intervention with the strengths that `choice` gives to single sites.

    Raises:
        OrthogonalizeError: it does not edit what such a site writes, or restores a mean, which strengths would undo.
    """
    if not choice.site_strengths:
        return intervention
    if METHODS[choice.method].restores_mean(choice):
        raise OrthogonalizeError(
            f"{choice.method} restores a mean by what all its sites remove, so single sites cannot have strengths; "
            "use --strength, or another method"
        )
    strengths = {Site.parse(name): strength for name, strength in choice.site_strengths}
    written = {*intervention.writes, *(matrix.site for matrix in intervention.conditional)}
    for site in strengths:
        if site not in written:
            raise OrthogonalizeError(
                f"--site-strengths names {site}, but {choice.method} over {choice.scope} does not change what it "
                "writes; leave it out, or choose another --scope"
            )
    return intervention.scaled(strengths)


def place_shared_map(
    method: EditMethod,
    choice: EditConfig,
    basis: torch.Tensor,
    norm: float,
    layer_count: int,
    ranking: Sequence[int] | None,
) -> Intervention:
    """The same map of `method` at every site of the scope (see `intervention_from_basis`)."""
    scope = parse_scope(choice.scope)
    if isinstance(choice.rank, str):
        raise OrthogonalizeError(f"--rank {choice.rank} needs INLP's accuracies; use --run, or give a number")
    if choice.rank is not None and choice.rank > len(basis):
        raise OrthogonalizeError(
            f"--rank {choice.rank} exceeds the {len(basis)} directions of the basis; "
            "give a smaller --rank, or extract with more prompts and a larger --max-rank"
        )
    basis = basis[: choice.rank]
    if method.one_direction and len(basis) > 1:
        raise OrthogonalizeError(f"{method.name} takes one direction, not {len(basis)}; use --method nullspace")
    shared = method.map(choice, basis, norm)
    return method.place(scope, layer_count, lambda _: shared, choice.layer, ranking)


def place_maps_along(
    method: EditMethod, choice: EditConfig, directions: Directions, ranking: Sequence[int] | None
) -> Intervention:
    """Maps of `method` along one shared direction, or at each site along the direction of its own layer."""
    finder = method.finder(directions, choice.finder)
    position = choice.position
    assert position is not None

    def basis_at(layer: int) -> torch.Tensor | None:
        if method.one_direction:
            return first_direction(directions, finder, position, layer)
        basis = directions.basis(finder, position, layer)
        if basis is None or not isinstance(choice.rank, str):
            return basis
        leading = FINDERS[finder].leading(directions, position, layer, RANK_BY_ACCURACY[choice.rank])
        if leading is None:
            raise OrthogonalizeError(f"--rank {choice.rank} needs INLP's accuracies, which {finder} does not have")
        return basis[:leading]

    def norm_at(layer: int) -> float:
        return float(directions.mean_diff(position, layer).norm())

    if not choice.per_layer:
        assert choice.layer is not None
        basis = basis_at(choice.layer)
        if basis is None:
            raise no_direction(finder, position, choice.layer)
        numbered = choice.model_copy(update={"rank": len(basis)}) if isinstance(choice.rank, str) else choice
        return method.from_basis(numbered, basis, norm_at(choice.layer), directions.layer_count, ranking)

    def map_at(layer: int) -> AffineMap | None:
        basis = basis_at(layer)
        if basis is None:
            return None
        first = choice.rank if isinstance(choice.rank, int) else None
        if first is not None and first > len(basis) and not method.one_direction:
            raise OrthogonalizeError(
                f"--rank {first} exceeds the {len(basis)} directions of layer {layer}; give a smaller --rank, or leave "
                "out --rank or --per-layer"
            )
        return method.map(choice, basis[:first], norm_at(layer))

    return method.place(parse_scope(choice.scope), directions.layer_count, map_at, choice.layer, ranking)


def no_direction(finder: str, position: int, layer: int, lacking: str | None = None) -> OrthogonalizeError:
    """The error for a place where `finder` found nothing; `lacking` replaces the finder's own wording."""
    return OrthogonalizeError(
        f"{lacking or FINDERS[finder].lacking} direction at position {position}, layer {layer}; "
        f"choose another, or extract again with --finders {','.join(dict.fromkeys(('dim', finder)))}"
    )
