"""Removals that restore a mean: LEACE's erasers, and ablation to the harmless mean (ACE)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..core.errors import OrthogonalizeError
from ..core.interventions import AffineMap, Intervention, Site, removal
from ..directions.direction_set import Directions
from ..directions.leace import Eraser
from .build import no_direction
from .config import EditConfig
from .scopes import Scope, layers_in_scope, map_sites, parse_scope


def erasure(choice: EditConfig, directions: Directions, ranking: Sequence[int] | None) -> Intervention:
    """LEACE on the write sites of a scope; both sides' mean is restored (see `_restore_means`).

    Raises:
        OrthogonalizeError: the scope is `from:l`, where no site can add the shift, or there is no eraser.
    """
    position = choice.position
    assert position is not None
    scope = _write_scope(choice, "leace", "nullspace")

    def eraser_at(stream: int) -> Eraser | None:
        source = stream if choice.per_layer else choice.layer
        assert source is not None
        return directions.eraser(position, source, choice.orthogonal)

    if not choice.per_layer and eraser_at(0) is None:
        lacking = None if directions.readers is not None else "the run has no LEACE eraser, so there is no"
        raise no_direction("leace", position, choice.layer or 0, lacking)

    def linear_at(stream: int) -> AffineMap | None:
        eraser = eraser_at(stream)
        return None if eraser is None else eraser.affine(choice.strength).unshifted

    def mean_at(layer: int) -> torch.Tensor:
        return directions.mean(position, layer)

    count = directions.layer_count
    linear = map_sites(scope, count, linear_at, choice.layer, ranking)
    return _restore_means(choice, linear, layers_in_scope(scope, count, choice.layer, ranking), mean_at)


def ablation_to_mean(
    choice: EditConfig, directions: Directions, finder: str, ranking: Sequence[int] | None
) -> Intervention:
    """Ablation on the write sites of a scope, to the harmless (negative) side's mean instead of zero.

    This is the projection of affine concept editing (ACE; Marshall, Scherlis and Belrose 2024), `h - r r^T h + r r^T m`
    with m the harmless mean at the direction's position and layer. Over scope `all` the stream has the component of m
    along r everywhere; over layers, what the blocks in scope add along r becomes what they add to the harmless prompts
    on average (see `_restore_means`). A strength below 1 moves that share of the way.

    Raises:
        OrthogonalizeError: the scope is `from:l`, where no site can add the shift; there is no direction, or the
            directions were stored without the harmless means.
    """
    position = choice.position
    assert position is not None
    scope = _write_scope(choice, "ablate --to harmless-mean", "--to zero")

    def linear_at(stream: int) -> AffineMap | None:
        source = stream if choice.per_layer else choice.layer
        assert source is not None
        basis = directions.basis(finder, position, source)
        return None if basis is None else removal(basis, choice.strength)

    if not choice.per_layer and linear_at(0) is None:
        raise no_direction(finder, position, choice.layer or 0)

    def mean_at(layer: int) -> torch.Tensor:
        return directions.negative_mean(position, layer)

    count = directions.layer_count
    linear = map_sites(scope, count, linear_at, choice.layer, ranking)
    return _restore_means(choice, linear, layers_in_scope(scope, count, choice.layer, ranking), mean_at)


def _write_scope(choice: EditConfig, name: str, instead: str) -> Scope:
    """The scope of an edit that adds a shift."""
    scope = parse_scope(choice.scope)
    if scope.kind == "from":
        raise OrthogonalizeError(
            f"{name} cannot use scope 'from', because its shift cannot be added exactly after a norm; "
            f"use all, upto:l or layers:…, or {instead} with from:l"
        )
    return scope


def _restore_means(
    choice: EditConfig, linear: Intervention, layers: Sequence[int], mean_at: Callable[[int], torch.Tensor]
) -> Intervention:
    """`linear` with the shifts that restore the mean once.

    From the mean of what the writes add to the stream, the linear part removes `u v^T mean`, which the shift restores.
    If the embedding is in scope, that mean is the mean of the stream where the direction was fitted, and the embedding
    adds the shift. Otherwise it is the mean of what the blocks in scope add, and the last of them adds the shift. With
    each layer's own direction, every block restores what it removes.

    Args:
        layers: the layers in scope.
        mean_at: the mean [d] of the stream at a layer.
    """
    writes = dict(linear.writes)
    added = {layer: mean_at(layer + 1) - mean_at(layer) for layer in layers}
    means: dict[Site, torch.Tensor] = {}
    if choice.per_layer:
        means = {Site("mlp", layer): mean for layer, mean in added.items()}
        means[Site("embed")] = mean_at(0)
    elif Site("embed") in writes:
        assert choice.layer is not None
        means[Site("embed")] = mean_at(choice.layer)
    else:
        means[Site("mlp", layers[-1])] = torch.stack(list(added.values())).sum(0)
    for site, mean in means.items():
        if site in writes:
            u, v = writes[site].u, writes[site].v
            writes[site] = AffineMap(u, v, u @ (v.mT @ mean))
    return Intervention(writes=writes)
