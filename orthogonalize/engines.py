"""Engines that answer prompts and score completions: vLLM, and transformers beside it."""

from __future__ import annotations

import gc
import importlib.util
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch

from .checkpoint import open_checkpoint
from .errors import OrthogonalizeError
from .generation import generate, stop_tokens
from .models import load_model
from .progress import track
from .scores import completion_losses

EngineName = Literal["vllm", "hf"]
ENGINES: tuple[EngineName, ...] = ("vllm", "hf")


class Engine(Protocol):
    """What evaluation asks of an engine. Prompts and completions are token ids."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...

    def answers(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy completions, without the stop token."""

    def losses(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[float]:
        """Summed cross-entropy of each completion after its prompt, in nats."""


def check_installed(name: EngineName) -> None:
    """Refuse an engine that is not there, before work is done for it."""
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise OrthogonalizeError("vLLM is not installed; `make setup` installs it, or use --engine hf")


class TransformersEngine:
    """The reference engine: a transformers model in this process."""

    def __init__(self, folder: Path, tokenizer: Any, device: str = "auto", batch: int = 32) -> None:
        self.folder, self.tokenizer, self.device, self.batch = folder, tokenizer, device, batch
        self.model: Any = None

    def __enter__(self) -> Self:
        self.model = load_model(self.folder, self.device)
        return self

    def __exit__(self, *exc: object) -> None:
        self.model = None
        gc.collect()

    def answers(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        with track("answering", len(prompts), "prompts") as advance:
            stops = stop_tokens(self.model, self.tokenizer)
            return generate(self.model, prompts, max_new_tokens, stops, self.batch, advance)

    def losses(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[float]:
        with track("cross-entropy", len(prompts), "answers") as advance:
            return completion_losses(self.model, prompts, completions, advance)


class VllmEngine:
    """vLLM on the checkpoint as it lies on disk: no hooks, full speed."""

    def __init__(self, folder: Path, max_model_len: int, gpu_memory_utilization: float = 0.85) -> None:
        self.folder, self.max_model_len = folder, max_model_len
        self.gpu_memory_utilization = gpu_memory_utilization
        self.llm: Any = None

    def __enter__(self) -> Self:
        check_installed("vllm")
        on_cpu = not torch.cuda.is_available()
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if on_cpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
            os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
            # A process of its own costs a CPU engine 20 s to start, and frees nothing that a GPU would need.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own dependencies, at import
            from vllm import LLM

        options: dict[str, Any] = {"dtype": self._stored_dtype()}
        options |= {"enforce_eager": True} if on_cpu else {"gpu_memory_utilization": self.gpu_memory_utilization}
        try:
            with track("starting vLLM", None), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.llm = LLM(
                    model=str(self.folder),
                    max_model_len=self.max_model_len,
                    disable_log_stats=True,
                    use_tqdm_on_load=False,
                    **options,
                )
        except Exception as error:  # whatever the engine's processes died of
            hint = "set VLLM_CPU_KVCACHE_SPACE (GiB) lower" if on_cpu else "free GPU memory"
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise OrthogonalizeError(
                f"vLLM did not start on {self.folder}: {reason}; {hint}, or use --engine hf"
            ) from error
        return self

    def __exit__(self, *exc: object) -> None:
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        gc.collect()

    def _stored_dtype(self) -> str:
        """The dtype of the checkpoint; vLLM by itself would run a float32 one in bfloat16."""
        config = open_checkpoint(self.folder).config
        return str(config.get("dtype") or config.get("torch_dtype") or "auto")

    def _generate(self, what: str, rows: list[Any], parameters: Any) -> list[Any]:
        """Run in slices, so that progress shows; each slice keeps the engine's batch full."""
        outputs: list[Any] = []
        with track(what, len(rows), "prompts") as advance:
            for start in range(0, len(rows), 256):
                part = rows[start : start + 256]
                outputs += self.llm.generate(part, parameters, use_tqdm=False)
                advance(len(part))
        return outputs

    def answers(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, detokenize=False)
        rows = [{"prompt_token_ids": list(ids)} for ids in prompts]
        results = []
        for output in self._generate("answering", rows, parameters):
            ids = list(output.outputs[0].token_ids)
            stopped = output.outputs[0].finish_reason == "stop"
            results.append(ids[:-1] if stopped else ids)
        return results

    def losses(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[float]:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        rows = [{"prompt_token_ids": [*p, *c]} for p, c in zip(prompts, completions, strict=True)]
        result = []
        for prompt, row, output in zip(prompts, rows, self._generate("cross-entropy", rows, parameters), strict=True):
            ids = row["prompt_token_ids"]
            found = output.prompt_logprobs
            result.append(-sum(found[i][ids[i]].logprob for i in range(len(prompt), len(ids))))
        return result


def open_engine(name: EngineName, folder: Path, tokenizer: Any, max_model_len: int, device: str = "auto") -> Engine:
    """The engine called `name` for a checkpoint folder; use it as a context manager."""
    if name == "hf":
        return TransformersEngine(folder, tokenizer, device)
    return VllmEngine(folder, max_model_len)
