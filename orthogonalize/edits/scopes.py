"""Scopes: the write or read sites of an edit, and the layer whose direction each site uses."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..architectures.schema import MOST_LAYERS
from ..core.errors import OrthogonalizeError, shown
from ..core.interventions import AffineMap, Intervention, Site, block_sites, shift

NUMBER = r"\d{1,18}"
SPAN = rf"{NUMBER}(-{NUMBER})?"
Kind = Literal["all", "one", "top", "layers", "upto", "from"]


@dataclass(frozen=True)
class Scope:
    """A parsed scope, such as `all`, `one`, `top:50%`, `layers:3,5-9`, `upto:12` or `from:12`."""

    kind: Kind
    layers: tuple[int, ...] = ()
    percent: float = 100.0

    def __str__(self) -> str:
        match self.kind:
            case "layers":
                return "layers:" + ",".join(_ranges(self.layers))
            case "upto" | "from":
                return f"{self.kind}:{self.layers[0]}"
            case "top":
                return f"top:{self.percent:g}%"
            case _:
                return self.kind


def _ranges(layers: Sequence[int]) -> list[str]:
    parts: list[str] = []
    start = previous = None
    for layer in [*layers, None]:
        if previous is not None and layer == previous + 1:
            previous = layer
            continue
        if start is not None:
            parts.append(str(start) if start == previous else f"{start}-{previous}")
        start = previous = layer
    return parts


def parse_scope(text: str) -> Scope:
    """Read a scope as the command line takes it.

    Raises:
        OrthogonalizeError: the text is not a valid scope.
    """
    wrong = OrthogonalizeError(
        f"scope {shown(text, 60)!r} is not one of: all, one, top:50%, layers:3,5-9, upto:12, from:12"
    )
    if text in ("all", "one"):
        return Scope("all" if text == "all" else "one")
    kind, _, rest = text.partition(":")
    match kind:
        case "upto" | "from" if re.fullmatch(NUMBER, rest):
            return Scope(kind, (int(rest),))
        case "top" if re.fullmatch(rf"{NUMBER}(\.\d{{1,9}})?%?", rest):
            percent = float(rest.rstrip("%"))
            if not 0 < percent <= 100:
                raise OrthogonalizeError(f"scope {text!r}: the percentage must be above 0 and at most 100")
            return Scope("top", percent=percent)
        case "layers" if re.fullmatch(rf"{SPAN}(,{SPAN})*", rest):
            layers: set[int] = set()
            for part in rest.split(","):
                first, _, last = part.partition("-")
                span = range(int(first), int(last or first) + 1)
                if span.stop > MOST_LAYERS:
                    raise OrthogonalizeError(f"scope {shown(text, 60)!r}: no model has {MOST_LAYERS} layers")
                if not span:
                    raise OrthogonalizeError(f"scope {text!r}: the range {part} is reversed")
                layers.update(span)
            return Scope("layers", tuple(sorted(layers)))
    raise wrong


def layers_in_scope(scope: Scope, layer_count: int, source: int | None, ranking: Sequence[int] | None) -> list[int]:
    """The layers of `scope` in a model of `layer_count` layers.

    `source` is the layer that the direction comes from (needed by `one`); `ranking` lists layers, best first (needed
    by `top`).

    Raises:
        OrthogonalizeError: a layer does not exist, or the source or ranking is needed but not known.
    """
    last = layer_count - 1
    beyond = [layer for layer in scope.layers if layer > last + (scope.kind in ("upto", "from"))]
    if beyond:
        raise OrthogonalizeError(f"scope {scope}: the model has no layer {beyond[0]} (its layers are 0-{last})")
    match scope.kind:
        case "all":
            return list(range(layer_count))
        case "layers":
            return list(scope.layers)
        case "upto":
            return list(range(scope.layers[0]))
        case "from":
            return list(range(scope.layers[0], layer_count))
        case "one":
            if source is None:
                raise OrthogonalizeError("scope 'one' needs the direction's layer; give --layer")
            if not 0 <= source <= layer_count:
                raise OrthogonalizeError(f"the model has no layer {source} (its layers are 0-{last})")
            return [min(source, last)]
        case "top":
            if ranking is None:
                raise OrthogonalizeError("scope 'top' needs stored scores; use --run, or give layers:…")
            # Layers without scores come last.
            order = [*ranking, *(layer for layer in range(layer_count) if layer not in ranking)]
            count = max(1, math.floor(layer_count * scope.percent / 100 + 0.5))
            return sorted(order[:count])


def removal_sites(scope: Scope, layers: Sequence[int]) -> list[Site]:
    """The write sites of `scope`, given its `layers`; they include the embedding for `all` and `upto`."""
    embed = [Site("embed")] if scope.kind in ("all", "upto") else []
    return [*embed, *block_sites(layers)]


def stream_after(site: Site) -> int:
    """The stream that `site` writes to, as the index of the next block that reads it."""
    return 0 if site.kind == "embed" else int(site.layer or 0) + 1


def map_sites(
    scope: Scope,
    layer_count: int,
    map_for: Callable[[int], AffineMap | None],
    source: int | None = None,
    ranking: Sequence[int] | None = None,
) -> Intervention:
    """Place maps on the sites of `scope`.

    `map_for(stream)` returns the map for the stream at the input of block `stream` (0 to `layer_count`, the last being
    the input of the head), or None to leave that stream unchanged. For a shared direction it ignores its argument.
    """
    layers = layers_in_scope(scope, layer_count, source, ranking)
    if scope.kind == "from":
        reads = {site: map_for(int(site.layer or 0)) for site in block_sites(layers)}
        reads[Site("head")] = map_for(layer_count)
        return Intervention(reads={site: m for site, m in reads.items() if m is not None})
    writes = {site: map_for(stream_after(site)) for site in removal_sites(scope, layers)}
    return Intervention(writes={site: m for site, m in writes.items() if m is not None})


def shift_sites(
    scope: Scope,
    layer_count: int,
    vector_for: Callable[[int], torch.Tensor | None],
    source: int | None = None,
    ranking: Sequence[int] | None = None,
) -> Intervention:
    """Place constant vectors so that the input of every block in `scope` is shifted.

    The vector for block l is added by the last write before it: the MLP of layer l - 1, or the embedding for l = 0. For
    `from:l`, the stream carries a single shift at l to all later blocks.

    Raises:
        OrthogonalizeError: the scope is `upto:l`, which would have to undo the shift.
    """
    if scope.kind == "upto":
        raise OrthogonalizeError(
            "actadd cannot use scope 'upto', because a shift stays in the stream; use 'one', 'from:l' or layers:…"
        )
    layers = layers_in_scope(scope, layer_count, source, ranking)
    if scope.kind == "from":
        layers = [scope.layers[0]]
    elif scope.kind == "one" and source is not None:
        layers = [source]  # may be the input of the head, after the last block
    writes: dict[Site, AffineMap] = {}
    for layer in layers:
        vector = vector_for(layer)
        if vector is not None:
            writes[Site("embed") if layer == 0 else Site("mlp", layer - 1)] = shift(vector)
    return Intervention(writes=writes)
