"""Place LEACE's erasers on the write sites of a scope."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core.errors import OrthogonalizeError
from ..core.interventions import AffineMap, Intervention, Site
from ..directions.direction_set import Directions
from ..directions.leace import Eraser
from .build import no_direction
from .config import EditConfig
from .scopes import layers_in_scope, map_sites, parse_scope


def erasure(choice: EditConfig, directions: Directions, ranking: Sequence[int] | None) -> Intervention:
    """LEACE on the write sites of a scope: the linear part at each, and the shift that restores the mean once.

    From the mean of what the writes add to the stream, the linear part removes `u v^T mean`, which the shift restores.
    If the embedding is in scope, that mean is the mean of the stream where the eraser was fitted, and the embedding
    adds the shift. Otherwise it is the mean of what the blocks in scope add, and the last of them adds the shift. With
    each layer's own eraser, every block restores what it removes.

    Raises:
        OrthogonalizeError: the scope is `from:l`, where no site can add the shift, or there is no eraser.
    """
    position = choice.position
    assert position is not None
    scope = parse_scope(choice.scope)
    if scope.kind == "from":
        raise OrthogonalizeError(
            "leace cannot use scope 'from', because its shift cannot be added exactly after a norm; "
            "use all, upto:l or layers:…, or nullspace with from:l"
        )

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

    count = directions.layer_count
    writes = dict(map_sites(scope, count, linear_at, choice.layer, ranking).writes)
    layers = layers_in_scope(scope, count, choice.layer, ranking)
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
