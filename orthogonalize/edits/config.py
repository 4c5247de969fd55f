"""EditConfig: method, direction, scope and strength of an edit; everything but the directions themselves."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from .methods.registry import METHODS


class EditConfig(BaseModel):
    """Everything that determines an edit besides the directions themselves.

    `coefficient` is the length that `actadd` adds along the unit direction, in units of the stream;
    None is the length of the mean difference itself. `alpha` is that of `reflect`: 1 projects, 2
    mirrors. `rank` keeps the first directions of an INLP basis: that many, or those found before
    a classifier's held-out accuracy fell below 99% (`acc99`) or 95% (`acc95`). `orthogonal` is LEACE's
    orthogonal form. `strength` scales the whole map.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: str
    scope: str = "all"
    strength: float = 1.0
    per_layer: bool = False
    position: int | None = None
    layer: int | None = None
    rank: Annotated[int, Field(ge=1)] | Literal["acc99", "acc95"] | None = None
    orthogonal: bool = False
    alpha: float = 2.0
    coefficient: float | None = None

    @field_validator("method")
    @classmethod
    def _is_known(cls, method: str) -> str:
        return METHODS.find(method).name

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
        if "alpha" in METHODS[self.method].options:
            words.append(f"alpha {self.alpha:g}")
        if self.rank is not None:
            words.append(f"rank {self.rank}")
        if self.orthogonal:
            words.append("orthogonal form")
        if self.strength != 1.0:
            words.append(f"strength {self.strength:g}")
        return ", ".join(words)
