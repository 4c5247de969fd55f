"""Architectures as data: where each family writes to, and reads from, its residual stream.

One TOML file a family. The code never guesses an axis from a shape: what is not described is
refused. `{layer}` in a name stands for the layer's number.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import OrthogonalizeError


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ZeroBias(_Data):
    """A bias that a configuration flag creates beside the one wanted; it is written as zeros."""

    bias: str
    weight: str


class Write(_Data):
    """A tensor whose `axis` is the residual stream, written by a linear map."""

    weight: str
    axis: int
    bias: str | None = None
    bias_flag: str | None = None
    bias_flag_also_creates: tuple[ZeroBias, ...] = ()


class Read(_Data):
    """A tensor whose `axis` reads the normalised residual stream."""

    weight: str
    axis: int


class Norm(_Data):
    """The RMS norm through which a block reads the stream: `module(x) = weight * x / rms(x)`."""

    weight: str
    module: str


class Site(_Data):
    """An attention or MLP block: the module whose output is added, its writes and its reads."""

    module: str
    norm: Norm
    writes: tuple[Write, ...]
    reads: tuple[Read, ...]


class Embedding(_Data):
    """The token embedding, the first write of all."""

    weight: str
    axis: int
    module: str


class Head(_Data):
    """The output head and the norm before it; `tied_flag` is the configuration's word for tying."""

    weight: str
    axis: int
    norm: Norm
    tied_flag: str

    @property
    def reads(self) -> tuple[Read, ...]:
        """The head as a reader of the stream."""
        return (Read(weight=self.weight, axis=self.axis),)


class Architecture(_Data):
    """One family, as its TOML file describes it."""

    family: str
    model_types: tuple[str, ...]
    layer_count: str
    hidden_size: str
    norm_epsilon: str
    decoder: str
    layer_module: str
    embedding: Embedding
    attn: Site
    mlp: Site
    head: Head

    def layers(self, config: dict[str, Any]) -> int:
        """The number of layers that `config` (a parsed config.json) declares."""
        return self._number(config, self.layer_count)

    def width(self, config: dict[str, Any]) -> int:
        """The width d_model of the residual stream that `config` declares."""
        return self._number(config, self.hidden_size)

    def _number(self, config: dict[str, Any], key: str) -> int:
        if type(config.get(key)) is not int:
            raise OrthogonalizeError(f"config.json of this {self.family} model has no whole number {key!r}")
        return int(config[key])

    def epsilon(self, config: dict[str, Any]) -> float:
        """The constant inside the root of the norms; 1e-6 where the configuration is silent."""
        return float(config.get(self.norm_epsilon, 1e-6))


@cache
def families() -> dict[str, Architecture]:
    """Every described architecture, by `model_type`."""
    described: dict[str, Architecture] = {}
    for file in sorted(resources.files(__name__).iterdir(), key=lambda f: f.name):
        if not file.name.endswith(".toml"):
            continue
        try:
            architecture = Architecture.model_validate(tomllib.loads(file.read_text("utf-8")))
        except (ValidationError, tomllib.TOMLDecodeError) as error:
            raise OrthogonalizeError(f"architecture file {file.name} is not valid: {error}") from error
        for model_type in architecture.model_types:
            described[model_type] = architecture
    return described


def architecture_of(config: dict[str, Any]) -> Architecture:
    """The description of the model that `config` (a parsed config.json) belongs to.

    Raises:
        OrthogonalizeError: no file describes its `model_type`.
    """
    model_type = config.get("model_type")
    described = families()
    if model_type not in described:
        raise OrthogonalizeError(
            f"architecture {model_type!r} has no description (described: {', '.join(sorted(described))}); "
            "add one as a TOML file in orthogonalize/architectures"
        )
    return described[model_type]
