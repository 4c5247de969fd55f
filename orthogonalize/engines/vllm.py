"""The vLLM engine, which serves a checkpoint from disk at full speed, without hooks."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import torch

from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..checkpoints.settings_files import quantization
from ..core.errors import InPlaceError, OrthogonalizeError
from ..core.progress import track
from ..core.temporary_folders import temporary_folder
from ..models.loading import choose_dtype
from ..models.logprobs import Completion, Likeliest
from ..models.tokenizer.faithful import faithful_folder
from .base import LIKELIEST, ONE_DEVICE, Engine, EngineOptions, Ids, Part
from .choice_search import ChoiceSearch
from .registry import check_engine

SLICE = 256  # prompts between progress updates; each slice keeps the engine's batch full
# Families whose queries reach the rotary embedding as [token, head, dimension]. The CPU kernel of vLLM 0.32 expects all
# heads in the last axis and rotates them wrongly (except with DeepSeek's YaRN); vLLM's Python version is correct.
ROTATED_BY_HEAD = ("lfm2", "deepseek_v2", "deepseek_v3")
MOST_FILES = 1024  # that weights to swap in are stored in
MOST_THREADS = 8  # that make and store them: each holds a file's tensors in memory

_for_sockets = ExitStack()
atexit.register(_for_sockets.close)


def set_environment(on_cpu: bool, parallel: bool = False) -> None:
    """Set the environment variables that vLLM reads, unless the user has set them."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if "VLLM_RPC_BASE_PATH" not in os.environ:  # its sockets: in a folder that only this user can enter
        os.environ["VLLM_RPC_BASE_PATH"] = str(_for_sockets.enter_context(temporary_folder()))
    # `ForcedDecoding` is a logits processor for vLLM's V1 model runner; V2 has a different interface.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    if on_cpu:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        # Without a GPU, compiling the few lines that rank log-probabilities takes longer than running them.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        torch._dynamo.config.disable = True
        # On a CPU, a separate engine process takes 20 s to start and has no benefit.
        if not parallel:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    else:  # once CUDA was queried, a forked process cannot use it
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def dtype_for(checkpoint: Checkpoint, on_cpu: bool) -> str:
    """The dtype to run a model in: as stored, where vLLM would run float32 in bfloat16.

    A CPU without bfloat16 instructions runs bfloat16 checkpoints in float32, which is ten times as fast there, as the
    engine of transformers does; quantized ones stay as vLLM has them.
    """
    stored = checkpoint.dtype or "auto"
    if on_cpu and stored == "bfloat16" and quantization(checkpoint.config) is None:
        return str(choose_dtype(torch.device("cpu"), stored)).removeprefix("torch.")
    return stored


def cpu_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` on a CPU for a model of this config.json."""
    arguments: dict[str, Any] = {"enforce_eager": True, "block_size": 32}
    if config.get("model_type") in ROTATED_BY_HEAD:
        arguments["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
    return arguments


def engine_arguments(checkpoint: Checkpoint, options: EngineOptions, on_cpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` for a checkpoint, beside its path, tokenizer and length."""
    arguments: dict[str, Any] = {
        "dtype": dtype_for(checkpoint, on_cpu),
        "max_logprobs": LIKELIEST,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        # Files of other formats beside the checkpoint are not what was validated.
        "config_format": "hf",
        "load_format": "safetensors",
        "trust_remote_code": False,
        "worker_extension_cls": "orthogonalize.engines.worker.EngineWorker",
        "logits_processors": ["orthogonalize.engines.forced_decoding:ForcedDecoding"],
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
    }
    if options.distributed_executor_backend:
        arguments["distributed_executor_backend"] = options.distributed_executor_backend
    # Prompts are text only; no memory for images, and no image processor, is needed.
    if "vision_config" in checkpoint.config:
        arguments["limit_mm_per_prompt"] = {"image": 0, "video": 0}
    if on_cpu:
        return arguments | cpu_arguments(checkpoint.config)
    return arguments | {"gpu_memory_utilization": options.gpu_memory_utilization}


def patch_llvmlite_introspection() -> None:
    """Make llvmlite's library object raise AttributeError for dunder names.

    On a CPU, vLLM inspects every object of every module at start, and llvmlite (loaded by numba) returns a function for
    any attribute, `__dict__` included. No symbol of LLVM has a dunder name.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    wrapper = type(ffi.lib) if ffi is not None and hasattr(ffi, "lib") else None
    if wrapper is None or getattr(wrapper, "_dunders_raise", False):
        return
    find = wrapper.__getattr__

    def symbol(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return find(self, name)

    wrapper.__getattr__, wrapper._dunders_raise = symbol, True


def open_vllm(folder: Path, tokenizer: Any, max_model_len: int, options: EngineOptions) -> Engine:
    """One vLLM engine, or a group of them if `options` ask for data parallelism. The tokenizer is not needed."""
    if options.data_parallel_size > 1:
        from .data_parallel import EngineGroup

        return EngineGroup(folder, max_model_len, options)
    return VllmEngine(folder, max_model_len, options)


class VllmEngine:
    """One vLLM engine; `Engine` documents its methods."""

    def __init__(self, folder: Path, max_model_len: int, options: EngineOptions = ONE_DEVICE, **extra: Any) -> None:
        self.folder, self.max_model_len, self.options, self.extra = folder, max_model_len, options, extra
        self.llm: Any = None
        self.tokenizer = ExitStack()  # its folder, if it has one of its own

    def __enter__(self) -> Self:
        checkpoint = open_checkpoint(self.folder)
        checkpoint.check_nothing_beside()
        checkpoint.check_biases()
        check_engine("vllm", self.options)
        on_cpu = not torch.cuda.is_available()
        set_environment(on_cpu, self.options.parallel)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its dependencies warn at import
            from vllm import LLM

        arguments = engine_arguments(checkpoint, self.options, on_cpu)
        patch_llvmlite_introspection()
        arguments["tokenizer"] = str(self.tokenizer.enter_context(faithful_folder(self.folder)))
        with (
            _explained(f"vLLM did not start on {self.folder}"),
            track("starting vLLM", None),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            self.llm = LLM(model=str(self.folder), max_model_len=self.max_model_len, **(arguments | self.extra))
        return self

    def __exit__(self, *exc: object) -> None:
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        self.tokenizer.close()
        gc.collect()

    def generate(self, activity: str, rows: Sequence[Ids], parameters: Any) -> list[Any]:
        """vLLM's outputs for prompts given as ids.

        `activity` names the work in progress bars and errors; `parameters` is one for all prompts, or one per prompt.

        Raises:
            OrthogonalizeError: the engine died.
        """
        outputs: list[Any] = []
        with track(activity, len(rows), "prompts") as advance:
            for start in range(0, len(rows), SLICE):
                part = rows[start : start + SLICE]
                chosen = parameters[start : start + SLICE] if isinstance(parameters, list) else parameters
                outputs += self.generate_slice(activity, part, chosen)
                advance(len(part))
        return outputs

    def generate_slice(self, activity: str, rows: Sequence[Ids], parameters: Any) -> list[Any]:
        """`generate` in one go, without a progress bar."""
        given: list[Any] = [{"prompt_token_ids": list(ids)} for ids in rows]
        with _explained(f"vLLM failed while {activity}"):
            found: list[Any] = self.llm.generate(given, parameters, use_tqdm=False)
        return found

    def ask_workers(self, activity: str, method: str, *arguments: Any) -> list[Any]:
        """Call a method of `EngineWorker` in every worker."""
        with _explained(f"vLLM failed while {activity}"):
            found: list[Any] = self.llm.collective_rpc(method, args=arguments)
        return found

    def answers(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[list[int]]:
        return [_answer(output) for output in self.generate("answering", prompts, _greedy(max_new_tokens))]

    def answers_slice(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[list[int]]:
        """`answers` in one go, without a progress bar."""
        return [_answer(output) for output in self.generate_slice("answering", prompts, _greedy(max_new_tokens))]

    def stream(self, prompt: Ids, max_new_tokens: int, show: Callable[[list[int]], object]) -> list[int]:
        """The answer to one prompt; `show` gets all of its tokens so far whenever there are more."""
        engine, name, found = self.llm.llm_engine, "stream", list[int]()
        with _explained("vLLM failed while answering"):
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, _greedy(max_new_tokens))
            try:
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        found = _answer(output)
                        show(found)
            except BaseException:
                with suppress(Exception):  # the engine may be dead; if not, it must be free for the next prompt
                    engine.abort_request([name])
                raise
        return found

    def scores(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[Completion]:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
        outputs = self.generate("scoring completions", rows, parameters)
        return [
            _completion(output.prompt_logprobs, row, len(prompt))
            for output, row, prompt in zip(outputs, rows, prompts, strict=True)
        ]

    def choices(self, contexts: Sequence[Ids], choices: Sequence[Sequence[Ids]]) -> list[list[float]]:
        from .forced_decoding import decide

        searches = [ChoiceSearch(row) for row in choices]
        # A CPU's time grows with the tokens, fewest with one branch at a time; a GPU's grows with the steps.
        at_once = None if torch.cuda.is_available() else 1
        with (
            _explained("vLLM failed while scoring choices"),
            track("scoring choices", len(searches), "questions") as done,
        ):
            decide(self.llm.llm_engine, contexts, searches, at_once, done)
        return [search.bounds() for search in searches]

    def likeliest(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[Likeliest]:
        from vllm import SamplingParams

        count = min(LIKELIEST, self.llm.llm_engine.vllm_config.model_config.get_vocab_size())
        parameters = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=count, detokenize=False)
        rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
        result = []
        for prompt, output in zip(prompts, self.generate("reading distributions", rows, parameters), strict=True):
            found = [_ranked(entry, count) for entry in output.prompt_logprobs[len(prompt) :]]
            result.append(
                Likeliest(
                    torch.tensor([[i for i, _ in row] for row in found], dtype=torch.long),
                    torch.tensor([[v for _, v in row] for row in found], dtype=torch.float64),
                )
            )
        return result

    def load(self, weights: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        with stored_weights(weights) as folder:
            self.load_from(folder)

    def load_from(self, folder: Path) -> None:
        """Replace weights by the tensors in the safetensors files of `folder`."""
        with _explained("vLLM failed while swapping weights", InPlaceError):
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        # Cached prefixes were computed by the old weights.
        if not self.llm.reset_prefix_cache():
            raise InPlaceError("vLLM did not clear its prefix cache, so weights cannot be swapped in place")

    def fingerprint(self, part: Part = "all") -> str:
        with _explained("vLLM failed while reading its weights", InPlaceError):
            return "-".join(self.llm.collective_rpc("weights_fingerprint", args=(part,)))


@contextmanager
def stored_weights(weights: Mapping[str, Callable[[], torch.Tensor]]) -> Iterator[Path]:
    """A temporary folder with `weights` in safetensors files, which are made in several threads."""
    names = list(weights)
    per_file = -(-len(names) // MOST_FILES) or 1
    with temporary_folder() as folder, ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS)) as pool:
        parts = [names[start : start + per_file] for start in range(0, len(names), per_file)]
        jobs = [
            pool.submit(_store, {name: weights[name] for name in part}, folder / f"{number:05}.safetensors")
            for number, part in enumerate(parts)
        ]
        try:
            for job in jobs:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)
        yield folder


def _store(weights: Mapping[str, Callable[[], torch.Tensor]], file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shard = {name: make().contiguous() for name, make in weights.items()}
    try:
        save_file(shard, file)
    except (SafetensorError, OSError) as error:
        raise OrthogonalizeError(
            f"{file.parent.parent} is too small for the weights to swap in ({error}); set TMPDIR to a larger folder"
        ) from error


def _greedy(max_new_tokens: int) -> Any:
    """The sampling parameters of a greedy answer."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=max_new_tokens, detokenize=False)


def _answer(output: Any) -> list[int]:
    """The token ids of an answer, without the stop token."""
    ids = list(output.outputs[0].token_ids)
    return ids[:-1] if output.outputs[0].finish_reason == "stop" else ids


def _completion(logprobs: Sequence[Any], ids: Sequence[int], start: int) -> Completion:
    """The score of `ids[start:]`. vLLM 0.24 omits cached positions from `logprobs`, so positions count from the end."""
    entries = [logprobs[i - len(ids)][ids[i]] for i in range(start, len(ids))]
    return Completion(sum(e.logprob for e in entries), all(e.rank == 1 for e in entries))


def _ranked(entry: Mapping[int, Any], count: int) -> list[tuple[int, float]]:
    """The `count` likeliest tokens of one position, best first, without the prompt's own token if it ranks lower."""
    best = sorted(entry.items(), key=lambda item: (-item[1].logprob, item[0]))[:count]
    return [(token, found.logprob) for token, found in best]


@contextmanager
def _explained(failure: str, kind: type[OrthogonalizeError] = OrthogonalizeError) -> Iterator[None]:
    """A context in which any exception becomes one line: the failure, its reason and what to try."""
    try:
        yield
    except OrthogonalizeError:
        raise
    except Exception as error:
        lines = [line for line in str(error).strip().splitlines() if "For further information visit" not in line]
        reason = lines[-1].strip() if lines else type(error).__name__
        hint = _memory_hint(not torch.cuda.is_available())
        raise kind(f"{failure}: {reason}; {hint}, or use --engine hf") from error


def _memory_hint(on_cpu: bool) -> str:
    if on_cpu:
        space = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
        return f"the cache takes VLLM_CPU_KVCACHE_SPACE={space} GiB: raise it if too small, otherwise free memory"
    return (
        "if it is out of memory: raise --gpu-memory-utilization if the GPU is free, lower it if others use the GPU, "
        "or split the model with --tensor-parallel-size"
    )
