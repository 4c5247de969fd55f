"""The interface of an engine, and the options that say on which devices it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from ..core.errors import OrthogonalizeError

if TYPE_CHECKING:
    import torch

    from ..models.logprobs import Completion, Likeliest

LIKELIEST = 100  # tokens per position whose log-probabilities stand for a distribution

Ids = Sequence[int]
Part = int | Literal["all", "outside"]  # of a model: one layer, everything, or everything outside the layers


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is spread over devices. All fields but `device` are vLLM's own and are passed on to it.

    `data_parallel_size` engines run in one process each, on separate devices.
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
    """The part of an engine that evaluation uses. Prompts and completions are token ids; log-probabilities in nats."""

    def answers(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[list[int]]:
        """Greedy completions, without the stop token."""

    def scores(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[Completion]:
        """The log-probability of each completion after its prompt, and whether it is the greedy one."""

    def choices(self, contexts: Sequence[Ids], choices: Sequence[Sequence[Ids]]) -> list[list[float]]:
        """The summed log-probability of every choice after its context, which the choices share.

        The value of the likeliest choice is exact. Another choice of several tokens may get an upper bound instead,
        below the likeliest choice's value.
        """

    def likeliest(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[Likeliest]:
        """The `LIKELIEST` likeliest tokens at every position of each completion."""


class Engine(Responder, Protocol):
    """A running model whose weights can be replaced."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...

    def load(self, weights: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        """Replace checkpoint tensors in place and clear cached prefixes.

        Raises:
            InPlaceError: the engine cannot replace one of them.
        """

    def fingerprint(self, part: Part = "all") -> str:
        """SHA-256 of every weight of a part, as the engine holds it."""


def fingerprint(model: torch.nn.Module, part: Part = "all") -> str:
    """SHA-256 over the names and bytes of the parameters in `part`.

    vLLM's CPU build packs the weights of linear layers into opaque buffers and leaves empty parameters; such a layer
    is applied to the identity matrix instead, which gives its weights back exactly.
    """
    import torch

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
    """The layer that a parameter belongs to: the first number in its name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), "outside")
