"""EditSettings: the settings of `edit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..checkpoints.quantizing.names import SchemeName
from ..checkpoints.rounding.registry import ROUNDING_SCHEMES
from ..core.changed_settings import change_settings
from ..core.errors import OrthogonalizeError
from .config import EditConfig


@dataclass(frozen=True)
class EditSettings:
    """Settings of `edit`. Those up to `finder` are fields of `EditConfig`, where None is the run's or the default.

    Attributes:
        pick: the number, from 1, of an edit that the run tried and lists; it determines the whole edit.
        rounding: the rounding scheme of stored weights (see `--rounding`); None is the default, which keeps the edit.
        quantize: the scheme by which the edited weights are quantised before they are stored (see `--quantize`).
        workers: number of weight files to write in parallel.
        link: hard-link unchanged files of the source instead of copying them.
        shard: `i/n` writes only that share of the files; the output appears with the last share.
        format: `lora` writes the edit as a PEFT adapter, if it changes only linear layers.
        force: replace an existing output of this tool.
        device: where the model runs, if the edit is fitted to it.
        revision: branch, tag or commit of a model on the Hub.
        download: whether a model on the Hub is downloaded, or read where it is, with at most two of its files (as many
            as `workers`, if these are more) on this disk at a time; None: read there for a `shard`, or if the disk has
            no room for it.
        description: a TOML file that describes the model's architecture, instead of what is shipped or found.
    """

    method: str | None = None
    scope: str | None = None
    strength: float | None = None
    site_strengths: Mapping[str, float] | Sequence[tuple[str, float]] | None = None
    per_layer: bool | None = None
    position: int | None = None
    layer: int | None = None
    rank: int | str | None = None
    orthogonal: bool | None = None
    alpha: float | None = None
    coefficient: float | None = None
    span: str | None = None
    components: str | None = None
    target_weight: float | None = None
    preserve_weight: float | None = None
    first_weight: float | None = None
    ridge: float | None = None
    sequential: bool | None = None
    to: Literal["zero", "harmless-mean"] | None = None
    finder: str | None = None
    pick: int | None = None
    rounding: str | None = None
    quantize: SchemeName | None = None
    workers: int = 1
    link: bool = False
    shard: str | None = None
    format: Literal["checkpoint", "lora"] = "checkpoint"
    force: bool = False
    device: str = "auto"
    revision: str | None = None
    download: bool | None = None
    description: Path | str | None = None

    def __post_init__(self) -> None:
        if self.rounding is not None:
            ROUNDING_SCHEMES.find(self.rounding)
        if self.quantize is not None and self.quantize not in get_args(SchemeName):
            known = ", ".join(get_args(SchemeName))
            raise OrthogonalizeError(f"no scheme of quantisation is called {self.quantize!r}; there are {known}")

    def with_changes(self, **changes: Any) -> EditSettings:
        """A copy with other values.

        Raises:
            OrthogonalizeError: there is no such setting.
        """
        return change_settings(self, "edit", changes)

    @property
    def edit_fields(self) -> dict[str, Any]:
        """The fields of `EditConfig` that are given."""
        values = {name: getattr(self, name) for name in EditConfig.model_fields}
        return {name: value for name, value in values.items() if value is not None}
