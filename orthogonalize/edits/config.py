"""EditConfig: the method, direction, scope and strength of an edit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..core.interventions import Site
from ..core.words import counted
from .methods.registry import METHODS

Components = Literal["attn", "mlp", "both"]


class EditConfig(BaseModel):
    """Everything that determines an edit except the directions themselves.

    Attributes:
        method: the name of an edit method.
        scope: where to edit (see `scopes.parse_scope`).
        strength: scale of the whole map.
        site_strengths: what scales the maps at single write sites besides, by the site's name (`embed`, `attn.3`,
            `mlp.3`); 0 leaves a site as it is. Any mapping or pairs; those that are not 1 are kept, in order of the
            sites.
        per_layer: whether each site is edited along its own layer's direction, instead of all along one.
        position, layer: where the direction was extracted; the position is counted from the end of the prompt.
        rank: the number of directions to use of an INLP basis; `acc99` and `acc95` use those found before a
            classifier's held-out accuracy fell below 99% or 95%; None uses all.
        orthogonal: for `leace`, whether to use its orthogonal form.
        alpha: for `reflect`, 1 projects and 2 mirrors.
        coefficient: for `actadd`, the length added along the unit direction, in units of the stream; None is the length
            of the mean difference.
        span: for `conditional`, what is taken out at each site: its own stream's `direction`, the span of the mean
            differences at all `positions` of the template, or `inlp`'s basis.
        components: for `conditional`, the blocks that are edited.
        target_weight, preserve_weight, first_weight, ridge: for `conditional`, the weights of the regression (see
            `directions.conditional`).
        sequential: for `conditional`, whether the target is read behind the edits of earlier groups of layers.
        to: for `ablate`, what the component along the direction becomes: zero, or that of the harmless (negative)
            side's mean at the direction's position and layer.
        finder: the finder of the directions, one of the method's `finders`; None is the first of these that found any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: str
    scope: str = "all"
    strength: float = 1.0
    site_strengths: tuple[tuple[str, float], ...] = ()
    per_layer: bool = False
    position: int | None = None
    layer: int | None = None
    rank: Annotated[int, Field(ge=1)] | Literal["acc99", "acc95"] | None = None
    orthogonal: bool = False
    alpha: float = 2.0
    coefficient: float | None = None
    span: Literal["direction", "positions", "inlp"] = "direction"
    components: Components = "both"
    target_weight: Annotated[float, Field(gt=0)] = 0.3
    preserve_weight: Annotated[float, Field(ge=0)] = 1.0
    first_weight: Annotated[float, Field(ge=0)] = 3.0
    ridge: Annotated[float, Field(gt=0)] = 0.01
    sequential: bool = True
    to: Literal["zero", "harmless-mean"] = "zero"
    finder: str | None = None

    @field_validator("method")
    @classmethod
    def _is_known(cls, method: str) -> str:
        return METHODS.find(method).name

    @field_validator("site_strengths", mode="before")
    @classmethod
    def _are_pairs(cls, given: Any) -> Any:
        return tuple(given.items()) if isinstance(given, Mapping) else given

    @field_validator("site_strengths")
    @classmethod
    def _are_write_sites(cls, pairs: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
        sites = {_write_site(name): strength for name, strength in pairs}
        if len(sites) < len(pairs):
            raise ValueError("a site is named twice")
        # In execution order; the embedding has no layer, and `attn` is before `mlp`.
        order = sorted(sites, key=lambda site: (-1 if site.layer is None else site.layer, site.kind))
        return tuple((str(site), sites[site]) for site in order if sites[site] != 1.0)

    def describe(self) -> str:
        """A description in one line."""
        words = [self.method, self.scope]
        if METHODS[self.method].fitted:
            words += self._describe_fit()
        elif self.per_layer:
            words.append("each layer along its own direction")
        elif self.layer is not None:
            words.append(f"direction of layer {self.layer}")
        if self.position is not None:
            words.append(f"position {self.position}")
        several = (
            self.scope.startswith(("all", "top:", "layers:")) and not self.scope.removeprefix("layers:").isdecimal()
        )
        if METHODS[self.method].adds and several:
            words.append("one constant per layer, which accumulate")
        if self.finder is not None:
            words.append(f"finder {self.finder}")
        if self.coefficient is not None:
            words.append(f"coefficient {self.coefficient:g}")
        if "alpha" in METHODS[self.method].options:
            words.append(f"alpha {self.alpha:g}")
        if self.to != "zero":
            words.append("to the harmless mean")
        if self.rank is not None:
            words.append(f"rank {self.rank}")
        if self.orthogonal:
            words.append("orthogonal form")
        if self.strength != 1.0:
            words.append(f"strength {self.strength:g}")
        if self.site_strengths:
            values = sorted({strength for _, strength in self.site_strengths})
            scale = " to ".join(f"{value:g}" for value in dict.fromkeys((values[0], values[-1])))
            words.append(f"times {scale} at {counted(len(self.site_strengths), 'site')}")
        return ", ".join(words)

    def _describe_fit(self) -> list[str]:
        spans = {"direction": "each layer's own direction", "positions": "all positions", "inlp": "INLP's directions"}
        words = [spans[self.span], f"target weight {self.target_weight:g}"]
        if self.components != "both":
            words.append("attention only" if self.components == "attn" else "MLPs only")
        if self.preserve_weight != 1.0:
            words.append(f"preserve weight {self.preserve_weight:g}")
        if self.first_weight != 3.0:
            words.append(f"first weight {self.first_weight:g}")
        if self.ridge != 0.01:
            words.append(f"ridge {self.ridge:g}")
        if not self.sequential:
            words.append("from one reading")
        return words


def _write_site(name: str) -> Site:
    try:
        site = Site.parse(name)
    except ValueError:
        site = Site("head")
    if site.kind == "head":  # which only reads
        raise ValueError(f"{name[:40]!r} is not a write site, such as embed, attn.3 or mlp.3")
    return site
