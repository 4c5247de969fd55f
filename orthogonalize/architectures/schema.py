"""Architectures as data: where each family writes to, and reads from, its residual stream.

One TOML file a family, checked by the classes below. The code never guesses an axis from a shape:
what is not described is refused, and so is a checkpoint with a tensor as wide as the stream that its
description does not name. docs/architectures.md tells how to read and write these files.

Names of tensors and modules are relative: those of blocks to their layer, the others to the decoder.
Wherever tensors are listed the value is the axis that is the residual stream.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ..core.errors import OrthogonalizeError


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Layout(_Data):
    """One way in which checkpoints of a family are named: before all names, and the head's whole name."""

    decoder: str
    head: str


class Norms(_Data):
    """What the family's norms do: `(offset + weight) * x / rms(x)`, or the same of a centred x, plus a bias.

    `epsilon` is the configuration's key for the constant under the root, or that constant.
    """

    kind: Literal["rms", "layer"] = "rms"
    epsilon: str | float
    offset: float = 0.0
    parameters: bool = True


class Bias(_Data):
    """A bias on the outputs of a block: what switches it on, and who reads it.

    `flags` are configuration values that create it (none: it is always there) and `zeros` the
    weights whose biases they create beside it. `on` are the writes that have one, where not all of them
    do. `served` names the implementation that reads it: vLLM's own, or only the Transformers backend in vLLM.
    """

    flags: dict[str, bool] = {}
    zeros: tuple[str, ...] = ()
    on: tuple[str, ...] = ()
    served: Literal["vllm", "transformers"] = "vllm"


class ValueBias(_Data):
    """A bias of the value projection that vLLM reads: attention weights sum to one, so it adds a constant.

    `weight` is the value projection, `output` the output projection that it passes through.
    """

    weight: str
    output: str
    flags: dict[str, bool] = {}
    zeros: tuple[str, ...] = ()


class Part(_Data):
    """A module whose output is added to the stream: what it writes, what it reads, and the norms around it.

    `norm` lists the names that the norm before it may have; without one it reads the stream itself.
    `scale` is the configuration's key (dots and numbers lead into it) for a factor on the output;
    `scale_inside` says that the module multiplies by it itself.
    """

    module: str
    writes: dict[str, int]
    reads: dict[str, int] = {}
    norm: tuple[str, ...] = ()
    post_norm: str | None = None
    scale: str | None = None
    scale_inside: bool = False
    bias: Bias | None = None
    value_bias: ValueBias | None = None


class Embedded(_Data):
    """A tensor that writes the stream before the first block.

    `rows` are vectors of the stream that are looked up (each token meets exactly one), otherwise the
    tensor is a linear map. `unless` names a tensor whose presence makes this one no write, `tied` the
    tensor that a tied head shares, `image` what only image tokens pass (named from the root).
    """

    weight: str
    axis: int
    rows: bool = True
    scale: str | None = None
    unless: str | None = None
    tied: bool = False
    image: bool = False


class Head(_Data):
    """The output head: the norm before it, and how it is tied to the embedding.

    `flags` are the configuration's words for tying and `tied` what holds where it is silent.
    `untied` says who runs it with weights of its own: vLLM's class, only the Transformers backend in
    vLLM, or nobody. `before` names a projection that reads the stream instead of the head.
    """

    axis: int = 1
    norm: str
    flags: tuple[str, ...] = ("tie_word_embeddings",)
    tied: bool = False
    untied: Literal["vllm", "transformers", "never"] = "vllm"
    before: str | None = None


class AsLlama(_Data):
    """When a family's model is a Llama in all but name.

    `requires` are configuration keys that must be on, or off (or absent), or have one of some values (or none).
    `fused` are the weights of a block that Llama stores as several, stacked along their first axis in this order:
    how it names each, and its share, a number or the configuration's key for one.
    """

    requires: dict[str, bool | list[str | float]] = {}
    fused: dict[str, dict[str, int | str]] = {}

    def hindrance(self, config: Mapping[str, Any]) -> str | None:
        """What keeps a model from being a Llama, in words; None where nothing does."""
        for key, wanted in self.requires.items():
            value = setting(config, key)
            if key == "sliding_window" and value and value >= setting(config, "max_position_embeddings", value + 1):
                continue  # no text is so long that it closes
            if bool(value) != wanted if isinstance(wanted, bool) else value not in (None, *wanted):
                return f"{key} is {value}"
        return None


class Architecture(_Data):
    """One family, as its TOML file describes it."""

    family: str
    model_types: tuple[str, ...]
    layer_count: str
    hidden_size: str
    expert_count: tuple[str, ...] = ("num_experts", "num_local_experts")
    decoder_modules: tuple[str, ...]
    layer: str
    layouts: tuple[Layout, ...]
    norms: Norms
    embed: dict[str, Embedded]
    attn: dict[str, Part]
    mlp: dict[str, Part] = {}
    head: Head
    parallel: str | bool = False
    as_llama: AsLlama | None = None
    transformers_class: str = "TransformersForCausalLM"
    requires: dict[str, bool] = {}
    inert: tuple[str, ...] = ()

    def layers(self, config: Mapping[str, Any]) -> int:
        """The number of layers that `config` (a parsed config.json) declares."""
        return self._number(config, self.layer_count)

    def width(self, config: Mapping[str, Any]) -> int:
        """The width of the residual stream that `config` declares."""
        return self._number(config, self.hidden_size)

    def experts(self, config: Mapping[str, Any]) -> int:
        """The number of routed experts a layer; 0 where the model has none."""
        counts = (setting(config, key) for key in self.expert_count)
        return next((count for count in counts if type(count) is int), 0)

    def _number(self, config: Mapping[str, Any], key: str) -> int:
        value = setting(config, key)
        if type(value) is not int:
            raise OrthogonalizeError(f"config.json of this {self.family} model has no whole number {key!r}")
        return value

    def epsilon(self, config: Mapping[str, Any]) -> float:
        """The constant inside the root of the norms; 1e-6 where the configuration is silent."""
        named = self.norms.epsilon
        return float(setting(config, named, 1e-6)) if isinstance(named, str) else named

    def is_parallel(self, config: Mapping[str, Any]) -> bool:
        """Whether both blocks of a layer read the same stream, so that either may carry a constant."""
        return bool(setting(config, self.parallel, False)) if isinstance(self.parallel, str) else self.parallel

    def parts(self, kind: str) -> dict[str, Part]:
        """The parts of attention or MLP blocks."""
        return self.attn if kind == "attn" else self.mlp

    def scale(self, key: str | None, config: Mapping[str, Any]) -> float:
        """The factor behind `key`; `sqrt_width` stands for the root of the stream's width."""
        if key is None:
            return 1.0
        return self.width(config) ** 0.5 if key == "sqrt_width" else float(setting(config, key, 1.0))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's part of a configuration: the nested one of a multimodal wrapper, else all of it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def setting(config: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """The value at `path` (keys and list positions, separated by dots) in the text model's configuration."""
    found: Any = text_config(config)
    for key in path.split("."):
        if isinstance(found, Mapping) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return default
    return default if found is None else found


def bias_name(weight: str) -> str:
    """What the bias beside `weight` is called."""
    return weight.removesuffix(".weight") + ".bias" if weight.endswith(".weight") else weight + "_bias"


def _merged(base: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping) and "module" not in value
        result[key] = _merged(base[key], value) if both else value
    return result


def parse(text: str, name: str) -> Architecture | None:
    """The description in the TOML `text` of file `name`; None for a layout that others build upon.

    `like = "other"` takes over the file of that name and changes what is said again; a part that
    names its module is said anew as a whole.

    Raises:
        OrthogonalizeError: it does not fit the schema.
    """
    try:
        data = _complete(tomllib.loads(text))
        return Architecture.model_validate(data) if "model_types" in data else None
    except (ValidationError, tomllib.TOMLDecodeError) as error:
        raise OrthogonalizeError(f"architecture file {name} is not valid: {error}") from error


def _complete(data: dict[str, Any]) -> dict[str, Any]:
    name = data.pop("like", None)
    if name is None:
        return data
    file = resources.files(__package__) / f"{name}.toml"
    if not file.is_file():
        raise OrthogonalizeError(f"architecture file builds upon {name!r}, which does not exist")
    base = _complete(tomllib.loads(file.read_text("utf-8")))
    return _merged({k: v for k, v in base.items() if k not in ("family", "model_types")}, data)


@cache
def families() -> dict[str, Architecture]:
    """Every described architecture, by `model_type`."""
    described: dict[str, Architecture] = {}
    for file in sorted(resources.files(__package__).iterdir(), key=lambda f: f.name):
        if not file.name.endswith(".toml"):
            continue
        architecture = parse(file.read_text("utf-8"), file.name)
        for model_type in architecture.model_types if architecture else ():
            if model_type in described:
                raise OrthogonalizeError(f"architecture file {file.name} describes {model_type}, which another does")
            described[model_type] = architecture  # type: ignore[assignment]
    return described


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The description of the model that `config` (a parsed config.json) belongs to.

    Raises:
        OrthogonalizeError: no file describes its `model_type`, or it uses what none can describe.
    """
    model_type = config.get("model_type")
    described = families()
    if model_type not in described:
        raise OrthogonalizeError(
            f"architecture {model_type!r} has no description (described: {', '.join(sorted(described))}); "
            "`orthogonalize describe MODEL` drafts one, which goes into orthogonalize/architectures"
        )
    architecture = described[str(model_type)]
    for key, wanted in architecture.requires.items():
        if setting(config, key, wanted) != wanted:
            raise OrthogonalizeError(
                f"{architecture.family} with {key} = {setting(config, key)} has no description: its stream itself "
                "passes through a norm, so no edit of its weights is exact"
            )
    return architecture
