"""Architecture files: where each model family writes to and reads from its residual stream, as data.

There is one TOML file per family, validated by the classes below. Axes are never inferred from shapes: models that
are not described are rejected, as are checkpoints with a tensor as wide as the stream that is not described. See
docs/architectures.md for how to read and write these files.

Names of tensors and modules are relative: in blocks to the layer, elsewhere to the decoder. In tables of tensors, the
value is the axis that corresponds to the residual stream.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from ..core.errors import OrthogonalizeError, shown

MOST_LAYERS = 10_000  # of any model
SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts")  # what configurations call their number


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Layout(_Data):
    """One naming scheme of a family's checkpoints: the decoder's prefix, and the full name of the head."""

    decoder: str
    head: str


class Norms(_Data):
    """The family's norms: `(offset + weight) * x / rms(x)`; for LayerNorm with x centred, plus a bias.

    `epsilon` is the constant under the root, or its configuration key.
    """

    kind: Literal["rms", "layer"] = "rms"
    epsilon: str | float
    offset: float = 0.0
    parameters: bool = True


class Bias(_Data):
    """A bias on the outputs of a block.

    Attributes:
        flags: configuration values that create it; empty if it always exists.
        zeros: the weights whose biases the flags create as well.
        on: the writes that have it, if not all do.
        served: which implementation in vLLM reads it: its own, only its Transformers backend, or none; `unknown` if it
            has not been tried.
    """

    flags: dict[str, bool] = {}
    zeros: tuple[str, ...] = ()
    on: tuple[str, ...] = ()
    served: Literal["vllm", "transformers", "never", "unknown"] = "vllm"


class ValueBias(_Data):
    """A bias of the value projection that vLLM reads; since attention weights sum to one, it adds a constant.

    `weight` is the value projection, `output` the output projection after it.
    """

    weight: str
    output: str
    flags: dict[str, bool] = {}
    zeros: tuple[str, ...] = ()


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Part(_Data):
    """A module whose output is added to the stream: its writes, its reads and the norms around it.

    Attributes:
        norm: names that the norm before it may have; empty if it reads the stream directly.
        post_norm: the norms that its output passes before it is added, in this order; another part's may join before
            the last.
        sometimes: those of them that only some models or layers have.
        stored_as: the modules of writes that transformers keeps under other names than checkpoints do.
        scale: the configuration path (see `setting`) of a factor on the output.
        scale_inside: whether the module applies that factor itself.
    """

    module: str
    writes: dict[str, int]
    reads: dict[str, int] = {}
    norm: tuple[str, ...] = ()
    post_norm: Annotated[tuple[str, ...], BeforeValidator(_several)] = ()
    sometimes: tuple[str, ...] = ()
    stored_as: dict[str, str] = {}
    scale: str | None = None
    scale_inside: bool = False
    bias: Bias | None = None
    value_bias: ValueBias | None = None


class Embedded(_Data):
    """A tensor that writes to the stream before the first block.

    Attributes:
        rows: whether each token looks up one row; otherwise the tensor is a linear map.
        unless: a tensor whose presence means that this one does not write.
        tied: whether a tied head shares it.
        image: whether only image tokens pass through it (its name is relative to the root).
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

    Attributes:
        norm: the module of that norm; none if the last block's own is the last.
        flags: the configuration keys that tie it.
        tied: whether it is tied if none of them is set.
        untied: which implementation in vLLM supports weights of its own: vLLM's class, only the Transformers
            backend, or none; or nobody has tried.
        before: a projection that reads the stream instead of the head.
    """

    axis: int = 1
    norm: str | None = None
    flags: tuple[str, ...] = ("tie_word_embeddings",)
    tied: bool = False
    untied: Literal["vllm", "transformers", "never", "unknown"] = "vllm"
    before: str | None = None


class AsLlama(_Data):
    """When a family's model can be stored as a Llama.

    Attributes:
        requires: configuration keys that must be set; or unset or absent; or one of several values or absent.
        fused: the weights of a block that Llama stores as several, which are stacked along the first axis in this
            order: Llama's name of each, and its share of the rows, as a number or a configuration key.
    """

    requires: dict[str, bool | list[str | float]] = {}
    fused: dict[str, dict[str, int | str]] = {}

    def hindrance(self, config: Mapping[str, Any]) -> str | None:
        """Why a model cannot be stored as a Llama, such as "sliding_window is 4096"; None if it can."""
        for key, wanted in self.requires.items():
            value = setting(config, key)
            if key == "sliding_window" and value and value >= setting(config, "max_position_embeddings", value + 1):
                continue  # no text is longer than the window
            if bool(value) != wanted if isinstance(wanted, bool) else value not in (None, *wanted):
                return f"{key} is {value}"
        return None


class Architecture(_Data):
    """One model family, as described by its TOML file.

    Attributes:
        layer_count: the configuration keys that may say how many layers there are, by a number or a list of them.
        embed_module: the module in the decoder whose output is the embedding, where others than the blocks read it.
        normalised: whether the stream itself passes through norms, so that what no block writes can come back.
        active_stream: the configuration key with the number of the stream that parts read and write, where blocks pass
            on several, [streams, batch, tokens, d].
        images_attended: whether blocks only attend to what an image encoder gives, so that no image enters the stream.
        refused: edits that weights of this family cannot make exactly, and why: of the `embed`ding, of what blocks
            and the head read (`reads`), by `constants` in blocks, or `conditional` ones.
    """

    family: str
    model_types: tuple[str, ...]
    layer_count: Annotated[tuple[str, ...], BeforeValidator(_several)]
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
    embed_module: str | None = None
    normalised: bool = False
    active_stream: str | None = None
    images_attended: bool = False
    refused: dict[Literal["embed", "reads", "constants", "conditional"], str] = {}

    def layers(self, config: Mapping[str, Any]) -> int:
        """The number of layers that `config` (a parsed config.json) declares, as a number or as a list of them."""
        key = next((key for key in self.layer_count if setting(config, key) is not None), self.layer_count[0])
        listed = setting(config, key)
        found = len(listed) if isinstance(listed, list | str) and listed else self._number(config, key)
        if found > MOST_LAYERS:
            raise OrthogonalizeError(
                f"config.json of this {self.family} model has {found} layers, beyond {MOST_LAYERS}"
            )
        return found

    def block(self, layer: int) -> str:
        """The name of block `layer` in the decoder."""
        return self.layer.replace("{layer}", str(layer))  # not `format`, which a description could ask for any width

    def width(self, config: Mapping[str, Any]) -> int:
        """The width of the residual stream that `config` declares."""
        return self._number(config, self.hidden_size)

    def experts(self, config: Mapping[str, Any]) -> int:
        """The number of routed experts per layer; 0 if there are none."""
        counts = (setting(config, key) for key in self.expert_count)
        return next((count for count in counts if type(count) is int), 0)

    def stacked(self, name: str, config: Mapping[str, Any]) -> int:
        """The number of experts whose matrices a tensor with three axes holds; 0 if there are none."""
        shared = (setting(config, key) for key in SHARED_EXPERTS) if "shared_expert" in name else ()
        return next((count for count in shared if type(count) is int), self.experts(config))

    def _number(self, config: Mapping[str, Any], key: str) -> int:
        value = setting(config, key)
        if type(value) is not int:
            raise OrthogonalizeError(f"config.json of this {self.family} model has no integer {key!r}")
        if value < 1:
            raise OrthogonalizeError(f"config.json of this {self.family} model has {key} = {value}, which is below 1")
        return value

    def epsilon(self, config: Mapping[str, Any]) -> float:
        """The constant under the root of the norms; 1e-6 if the configuration does not set it."""
        named = self.norms.epsilon
        return float(setting(config, named, 1e-6)) if isinstance(named, str) else named

    def is_parallel(self, config: Mapping[str, Any]) -> bool:
        """Whether attention and MLP read the same stream, so that either can carry a constant."""
        return bool(setting(config, self.parallel, False)) if isinstance(self.parallel, str) else self.parallel

    def parts(self, kind: str) -> dict[str, Part]:
        """The parts of attention or MLP blocks."""
        return self.attn if kind == "attn" else self.mlp

    def scale(self, key: str | None, config: Mapping[str, Any]) -> float:
        """The value of the factor `key`; `sqrt_width` means the square root of the stream's width."""
        if key is None:
            return 1.0
        return self.width(config) ** 0.5 if key == "sqrt_width" else float(setting(config, key, 1.0))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's part of a configuration: the nested one of a multimodal wrapper, else all of it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def setting(config: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """The value at `path` (keys and list indices, separated by dots) in the text model's configuration."""
    found: Any = text_config(config)
    for key in path.split("."):
        if isinstance(found, Mapping) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return default
    return default if found is None else found


def without_experts(name: str) -> str:
    """A tensor's name as descriptions have it, with `{expert}` for the number of an expert."""
    return re.sub(r"(?<=experts)\.\d+\.", ".{expert}.", name)


def bias_name(weight: str) -> str:
    """The name of the bias that belongs to `weight`."""
    return weight.removesuffix(".weight") + ".bias" if weight.endswith(".weight") else weight + "_bias"


def _merge(base: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping) and "module" not in value
        result[key] = _merge(base[key], value) if both else value
    return result


def parse(text: str, name: str) -> Architecture | None:
    """The architecture in the TOML `text` of file `name`; None for a base file that others extend.

    `like = "other"` inherits from the file of that name; a part that names its module replaces the inherited one
    entirely, other tables are merged.

    Raises:
        OrthogonalizeError: the text does not match the schema.
    """
    try:
        data = _inherit(tomllib.loads(text))
        return Architecture.model_validate(data) if "model_types" in data else None
    except (ValidationError, tomllib.TOMLDecodeError) as error:
        raise OrthogonalizeError(f"architecture file {name} is not valid: {error}") from error


def _inherit(data: dict[str, Any]) -> dict[str, Any]:
    name = data.pop("like", None)
    if name is None:
        return data
    file = resources.files(__package__) / f"{name}.toml"
    if not file.is_file():
        raise OrthogonalizeError(f"architecture file inherits from {name!r}, which does not exist")
    base = _inherit(tomllib.loads(file.read_text("utf-8")))
    return _merge({k: v for k, v in base.items() if k not in ("family", "model_types")}, data)


@cache
def families() -> dict[str, Architecture]:
    """All described architectures by `model_type`."""
    described: dict[str, Architecture] = {}
    for file in sorted(resources.files(__package__).iterdir(), key=lambda f: f.name):
        if not file.name.endswith(".toml"):
            continue
        architecture = parse(file.read_text("utf-8"), file.name)
        for model_type in architecture.model_types if architecture else ():
            if model_type in described:
                raise OrthogonalizeError(f"architecture file {file.name} describes {model_type}, but so does another")
            described[model_type] = architecture  # type: ignore[assignment]
    return described


_found: list[tuple[Mapping[str, Any], Architecture]] = []  # of single models, in this process; the last one counts


def _is_same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two configurations can be of one model: no whole number that both state differs, except token ids."""
    first, second = text_config(one), text_config(other)
    shared = [key for key in first.keys() & second.keys() if not key.endswith("_token_id")]
    return all(first[key] == second[key] for key in shared if type(first[key]) is type(second[key]) is int)


def remember(config: Mapping[str, Any], architecture: Architecture | None) -> None:
    """Let `architecture_of` answer `architecture` for the model of `config`, whatever the files say; None ends that."""
    _found[:] = [(own, each) for own, each in _found if not _answers(own, each, config)]
    if architecture is not None:
        _found.append((dict(config), architecture))


def remembered(config: Mapping[str, Any]) -> Architecture | None:
    """What was last given to `remember` for the model of `config`."""
    return next((each for known, each in reversed(_found) if _answers(known, each, config)), None)


def _answers(own: Mapping[str, Any], architecture: Architecture, config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in architecture.model_types and _is_same_model(own, config)


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture of the model that `config` (a parsed config.json) belongs to.

    That is what was found for this model in this process (see `remember`), else what the file of its family says.

    Raises:
        OrthogonalizeError: no file describes its `model_type`, or it has an unsupported setting.
    """
    own = remembered(config)
    if own is not None:
        return own
    model_type = config.get("model_type")
    described = families()
    if not isinstance(model_type, str) or model_type not in described:
        raise OrthogonalizeError(
            f"architecture {shown(repr(model_type), 100)} is not supported: no file describes it; "
            "run `orthogonalize describe MODEL` to draft one for orthogonalize/architectures"
        )
    architecture = described[model_type]
    for key, wanted in architecture.requires.items():
        if setting(config, key, wanted) != wanted:
            raise OrthogonalizeError(
                f"{architecture.family} with {key} = {shown(setting(config, key), 60)} is not supported: its stream "
                "itself passes through a norm, so its weights cannot be edited exactly"
            )
    return architecture
