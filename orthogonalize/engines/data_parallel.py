"""Data parallelism: several vLLM engines on one checkpoint, each in its own process on its own devices.

vLLM's offline `LLM` runs one replica, so every replica here is a process with one `VllmEngine`; prompts are distributed
round-robin and results returned in order.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch

from ..core.errors import InPlaceError, OrthogonalizeError
from ..models.logprobs import Completion, Likeliest
from .base import EngineOptions, Ids, Part


def _serve(connection: Connection, folder: Path, max_model_len: int, options: EngineOptions, devices: str) -> None:
    """A replica's process: start the engine, then serve (method, arguments) calls until None arrives."""
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    from .vllm import VllmEngine

    try:
        with VllmEngine(folder, max_model_len, options) as engine:
            connection.send(("ready", None))
            while (call := connection.recv()) is not None:
                method, arguments = call
                connection.send(("done", getattr(engine, method)(*arguments)))
    except EOFError:  # the parent is gone
        pass
    except Exception as error:  # unless it is one of our own errors, it is a defect; only the parent can report it
        known = isinstance(error, OrthogonalizeError)
        with suppress(OSError):  # the parent may be gone by now
            state = "not in place" if isinstance(error, InPlaceError) else "failed"
            connection.send((state, str(error) if known else f"an engine failed: {type(error).__name__}: {error}"))


class EngineGroup:
    """`options.data_parallel_size` engines behind the interface of one (see `base.Engine`)."""

    def __init__(self, folder: Path, max_model_len: int, options: EngineOptions) -> None:
        self.folder, self.max_model_len, self.options = folder, max_model_len, options
        self.connections: list[Connection] = []
        self.processes: list[Any] = []

    def __enter__(self) -> Self:
        spawn = multiprocessing.get_context("spawn")
        each = self.options.tensor_parallel_size * self.options.pipeline_parallel_size
        for devices in [_devices(replica, each) for replica in range(self.options.data_parallel_size)]:
            here, there = spawn.Pipe()
            arguments = (there, self.folder, self.max_model_len, self.options, devices)
            process = spawn.Process(target=_serve, args=arguments, daemon=False)
            process.start()
            there.close()
            self.connections.append(here)
            self.processes.append(process)
        try:
            self._replies()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for connection in self.connections:
            try:
                connection.send(None)
            except OSError:
                continue
        for process in self.processes:
            process.join(timeout=30)
            if process.is_alive():
                process.terminate()
        self.connections, self.processes = [], []

    @contextmanager
    def _connected(self, number: int) -> Iterator[None]:
        """A context in which a lost connection to replica `number` becomes an error that names it."""
        try:
            yield
        except (EOFError, OSError) as error:
            raise OrthogonalizeError(f"engine {number} of {len(self.connections)} died") from error

    def _ask(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        with self._connected(number):
            self.connections[number].send((method, arguments))

    def _replies(self) -> list[Any]:
        results = []
        for number, connection in enumerate(self.connections):
            with self._connected(number):
                state, result = connection.recv()
            if state in ("failed", "not in place"):
                raise (InPlaceError if state == "not in place" else OrthogonalizeError)(result)
            results.append(result)
        return results

    def _distribute(self, method: str, columns: tuple[Sequence[Any], ...], *rest: Any) -> list[Any]:
        count = len(self.connections)
        for number in range(count):
            self._ask(number, method, (*(list(column[number::count]) for column in columns), *rest))
        result: list[Any] = [None] * len(columns[0])
        for number, part in enumerate(self._replies()):
            result[number::count] = part
        return result

    def answers(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[list[int]]:
        return self._distribute("answers", (prompts,), max_new_tokens)

    def scores(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[Completion]:
        return self._distribute("scores", (prompts, completions))

    def choices(self, contexts: Sequence[Ids], choices: Sequence[Sequence[Ids]]) -> list[list[float]]:
        return self._distribute("choices", (contexts, choices))

    def likeliest(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[Likeliest]:
        return self._distribute("likeliest", (prompts, completions))

    def load(self, weights: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        """Write the tensors to disk once and load them in every replica."""
        from .vllm import stored_weights

        with stored_weights(weights) as folder:
            for number in range(len(self.connections)):
                self._ask(number, "load_from", (folder,))
            self._replies()

    def fingerprint(self, part: Part = "all") -> str:
        for number in range(len(self.connections)):
            self._ask(number, "fingerprint", (part,))
        return " ".join(self._replies())


def _devices(replica: int, each: int) -> str:
    """The devices of a replica, out of those visible to this process; "" without a GPU."""
    if not torch.cuda.is_available():
        return ""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    mine = visible[replica * each : (replica + 1) * each]
    if len(mine) < each:
        raise OrthogonalizeError(
            f"each of the engines needs {each} GPUs, but only {len(visible)} are visible in all; "
            "lower --data-parallel-size or --tensor-parallel-size"
        )
    return ",".join(mine)
