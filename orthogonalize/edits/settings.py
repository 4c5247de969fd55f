"""EditSettings: which edit `edit` makes, and how it is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from ..checkpoints.rounding.registry import ROUNDING_SCHEMES
from ..core.errors import OrthogonalizeError
from .config import EditConfig


@dataclass(frozen=True)
class EditSettings:
    """Settings of `edit`. Those up to `coefficient` are fields of `EditConfig`; None takes the run's, or the default.

    Attributes:
        rounding: how stored weights are rounded (see `--rounding`); None is the default scheme, which keeps the edit.
        workers: weight files written at a time.
        link: make hard links to the source's files in which nothing changes.
        shard: `i/n`: write only that share of the files; the output appears with the last one.
        format: `lora` writes the edit as a PEFT adapter, where it changes linear layers only.
        force: replace an output that this tool made.
        revision: branch, tag or commit of a model on the Hub.
    """

    method: str | None = None
    scope: str | None = None
    strength: float | None = None
    per_layer: bool | None = None
    position: int | None = None
    layer: int | None = None
    rank: int | str | None = None
    orthogonal: bool | None = None
    alpha: float | None = None
    coefficient: float | None = None
    rounding: str | None = None
    workers: int = 1
    link: bool = False
    shard: str | None = None
    format: Literal["checkpoint", "lora"] = "checkpoint"
    force: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.rounding is not None:
            ROUNDING_SCHEMES.find(self.rounding)

    def changed(self, **changes: Any) -> EditSettings:
        """A copy with other values.

        Raises:
            OrthogonalizeError: there is no such setting.
        """
        unknown = sorted(changes.keys() - self.__dataclass_fields__.keys())
        if unknown:
            raise OrthogonalizeError(
                f"edit has no setting {unknown[0]!r}; available: {', '.join(self.__dataclass_fields__)}"
            )
        return replace(self, **changes)

    @property
    def chosen(self) -> dict[str, Any]:
        """The fields of `EditConfig` that are given."""
        values = {name: getattr(self, name) for name in EditConfig.model_fields}
        return {name: value for name, value in values.items() if value is not None}
