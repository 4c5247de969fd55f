"""vLLM on a checkpoint as it lies on disk: no hooks, full speed."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch

from .checkpoint import open_checkpoint
from .engines import LIKELIEST, ONE_DEVICE, EngineOptions, Ids, check_installed, fingerprint
from .errors import OrthogonalizeError
from .likelihoods import Completion, Likeliest
from .progress import track

SLICE = 256  # prompts between two signs of progress; each slice keeps the engine's batch full
# Families whose queries reach the rotary embedding as [token, head, dimension]: the CPU kernel of vLLM 0.32 takes
# the last axis for all heads, and rotates wrongly (not with DeepSeek's YaRN). vLLM's own Python does it right.
ROTATED_BY_HEAD = ("lfm2", "deepseek_v2", "deepseek_v3")
SHARD = 2 * 2**30  # bytes of new weights held in memory at a time


def set_environment(on_cpu: bool, parallel: bool = False) -> None:
    """What vLLM reads from the environment, where the user has not said otherwise."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # `apply_model` sends a function of this package to the engine's own processes.
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    if on_cpu:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        # Compiling the few lines that rank log-probabilities takes longer than they ever will, without a GPU.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        torch._dynamo.config.disable = True
        # A process of its own costs a CPU engine 20 s to start, and frees nothing that a GPU would need.
        if not parallel:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    else:  # to have asked for a GPU is enough to make a fork of this process useless to CUDA
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def cpu_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` on a CPU for a model of this config.json."""
    arguments: dict[str, Any] = {"enforce_eager": True, "block_size": 32}
    if config.get("model_type") in ROTATED_BY_HEAD:
        arguments["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
    return arguments


def let_llvmlite_be_looked_at() -> None:
    """vLLM's CPU start looks at every object of every module, and llvmlite's library (numba loads it) answers every
    question about itself, `__dict__` too, with a function of that name. No such name is a symbol of LLVM."""
    ffi = sys.modules.get("llvmlite.binding.ffi")
    wrapper = type(ffi.lib) if ffi is not None and hasattr(ffi, "lib") else None
    if wrapper is None or getattr(wrapper, "_keeps_to_symbols", False):
        return
    find = wrapper.__getattr__

    def symbol(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return find(self, name)

    wrapper.__getattr__, wrapper._keeps_to_symbols = symbol, True


class VllmEngine:
    """One vLLM engine; `Engine` documents its methods."""

    def __init__(self, folder: Path, max_model_len: int, options: EngineOptions = ONE_DEVICE, **extra: Any) -> None:
        self.folder, self.max_model_len, self.options, self.extra = folder, max_model_len, options, extra
        self.llm: Any = None

    def __enter__(self) -> Self:
        check_installed("vllm")
        on_cpu = not torch.cuda.is_available()
        set_environment(on_cpu, self.options.parallel)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own dependencies, at import
            from vllm import LLM

        arguments: dict[str, Any] = {
            "dtype": self._stored_dtype(),
            "max_logprobs": LIKELIEST,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "tensor_parallel_size": self.options.tensor_parallel_size,
            "pipeline_parallel_size": self.options.pipeline_parallel_size,
        }
        if self.options.distributed_executor_backend:
            arguments["distributed_executor_backend"] = self.options.distributed_executor_backend
        config = open_checkpoint(self.folder).config
        # Only text is asked here: room for images, and their processor, need not be there.
        if "vision_config" in config:
            arguments["limit_mm_per_prompt"] = {"image": 0, "video": 0}
        if on_cpu:
            arguments |= cpu_arguments(config)
        else:
            arguments["gpu_memory_utilization"] = self.options.gpu_memory_utilization
        let_llvmlite_be_looked_at()
        with _named(f"vLLM did not start on {self.folder}"), track("starting vLLM", None), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.llm = LLM(model=str(self.folder), max_model_len=self.max_model_len, **(arguments | self.extra))
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

    def generate(self, what: str, rows: Sequence[Ids], parameters: Any) -> list[Any]:
        """vLLM's outputs for prompts given as ids; `parameters` is one for all, or one a prompt.

        Raises:
            OrthogonalizeError: the engine died.
        """
        outputs: list[Any] = []
        with track(what, len(rows), "prompts") as advance:
            for start in range(0, len(rows), SLICE):
                part: list[Any] = [{"prompt_token_ids": list(ids)} for ids in rows[start : start + SLICE]]
                chosen = parameters[start : start + SLICE] if isinstance(parameters, list) else parameters
                with _named(f"vLLM failed while {what}"):
                    outputs += self.llm.generate(part, chosen, use_tqdm=False)
                advance(len(part))
        return outputs

    def answers(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[list[int]]:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, detokenize=False)
        results = []
        for output in self.generate("answering", prompts, parameters):
            ids = list(output.outputs[0].token_ids)
            stopped = output.outputs[0].finish_reason == "stop"
            results.append(ids[:-1] if stopped else ids)
        return results

    def scores(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[Completion]:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
        outputs = self.generate("cross-entropy", rows, parameters)
        return [
            _completion(output.prompt_logprobs, row, len(prompt))
            for output, row, prompt in zip(outputs, rows, prompts, strict=True)
        ]

    def choices(self, contexts: Sequence[Ids], choices: Sequence[Sequence[Ids]]) -> list[list[float]]:
        """Best first: a choice is scored to its end while what is known of it could still be the likeliest.

        The step that computes the shared context scores every choice's first token, and no choice is
        likelier than its beginning. The likeliest by these is then scored to its end, which may tell of
        others that begin alike, and again, until the likeliest is one of which all is known.
        """
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                temperature=0.0, max_tokens=1, logprob_token_ids=sorted({c[0] for c in row}), detokenize=False
            )
            for row in choices
        ]
        outputs = self.generate("multiple choice", contexts, parameters)
        known: list[dict[tuple[int, ...], float]] = [
            {(c[0],): output.outputs[0].logprobs[0][c[0]].logprob for c in row}
            for output, row in zip(outputs, choices, strict=True)
        ]
        while True:
            scores = [[_beginning(choice, found) for choice in row] for row, found in zip(choices, known, strict=True)]
            best = [max(range(len(row)), key=lambda j: row[j][0]) for row in scores]
            asked = [i for i, j in enumerate(best) if scores[i][j][1] < len(choices[i][j])]
            if not asked:
                return [[score for score, _ in row] for row in scores]
            self._score([(contexts[i], choices[i][best[i]], known[i]) for i in asked])

    def _score(self, asked: Sequence[tuple[Ids, Ids, dict[tuple[int, ...], float]]]) -> None:
        """Enter what follows a choice's first token, behind its cached context, into what is known of its question.

        A choice's last token is scored as one that follows, so it need not be computed itself. vLLM leaves
        the log-probabilities of cached positions unset: of a choice that began like one scored before these
        are known, else it is scored again without the cache.
        """
        from vllm import SamplingParams

        def parameters(choice: Ids, cache: bool) -> Any:
            more = {"prompt_logprobs": 0, "skip_reading_prefix_cache": not cache} if len(choice) > 2 else {}
            return SamplingParams(
                temperature=0.0, max_tokens=1, logprob_token_ids=[choice[-1]], detokenize=False, **more
            )

        rows = [[*context, *choice[:-1]] for context, choice, _ in asked]
        choices = [choice for _, choice, _ in asked]
        outputs = self.generate("multiple choice: choices", rows, [parameters(choice, True) for choice in choices])
        again = []
        for n, (context, choice, known) in enumerate(asked):
            hidden = min((outputs[n].num_cached_tokens or 0) - len(context) + 1, len(choice) - 1)
            if any(tuple(choice[: k + 1]) not in known for k in range(1, hidden)):
                again.append(n)
                continue
            _enter(known, outputs[n], rows[n], len(context), choice, max(hidden, 1))
        if again:
            whole = [parameters(choices[n], False) for n in again]
            uncached = self.generate("multiple choice: again", [rows[n] for n in again], whole)
            for n, output in zip(again, uncached, strict=True):
                context, choice, known = asked[n]
                _enter(known, output, rows[n], len(context), choice, 1)

    def likeliest(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[Likeliest]:
        from vllm import SamplingParams

        count = min(LIKELIEST, self.llm.llm_engine.vllm_config.model_config.get_vocab_size())
        parameters = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=count, detokenize=False)
        rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
        result = []
        for prompt, output in zip(prompts, self.generate("distributions", rows, parameters), strict=True):
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
        """Take over the tensors in the safetensors files of `folder`."""
        with _named("vLLM failed while weights were swapped"):
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        # The engine keeps the prefixes that the old weights computed, and would mix them in.
        if not self.llm.reset_prefix_cache():
            raise OrthogonalizeError("vLLM did not clear its prefix cache, so edits cannot be swapped in place")

    def fingerprint(self) -> str:
        with _named("vLLM failed while its weights were read"):
            return "-".join(self.llm.apply_model(fingerprint))


@contextmanager
def stored_weights(weights: Mapping[str, Callable[[], torch.Tensor]]) -> Iterator[Path]:
    """A temporary folder with `weights` as safetensors files, made and held a shard at a time."""
    with tempfile.TemporaryDirectory(prefix="orthogonalize-") as folder:
        shard: dict[str, torch.Tensor] = {}
        number = 0
        for name, make in weights.items():
            shard[name] = make().contiguous()
            if sum(t.nbytes for t in shard.values()) >= SHARD:
                _keep(shard, Path(folder) / f"{number:05}.safetensors")
                shard, number = {}, number + 1
        if shard:
            _keep(shard, Path(folder) / f"{number:05}.safetensors")
        yield Path(folder)


def _keep(shard: dict[str, torch.Tensor], file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(shard, file)
    except (SafetensorError, OSError) as error:
        raise OrthogonalizeError(
            f"weights to be swapped in do not fit into {file.parent.parent} ({error}); set TMPDIR to a folder with room"
        ) from error


def _completion(logprobs: Sequence[Any], ids: Sequence[int], start: int) -> Completion:
    """`ids` from `start` on. vLLM 0.24 leaves cached positions out of `logprobs`, so they are counted from the end."""
    entries = [logprobs[i - len(ids)][ids[i]] for i in range(start, len(ids))]
    return Completion(sum(e.logprob for e in entries), all(e.rank == 1 for e in entries))


def _beginning(choice: Ids, known: Mapping[tuple[int, ...], float]) -> tuple[float, int]:
    """The summed log-probability of a choice's first tokens, as far as they are known, and how many they are."""
    total = 0.0
    for end in range(1, len(choice) + 1):
        found = known.get(tuple(choice[:end]))
        if found is None:
            return total, end - 1
        total += found
    return total, len(choice)


def _enter(known: dict[tuple[int, ...], float], output: Any, row: Ids, context: int, choice: Ids, first: int) -> None:
    """Enter the log-probabilities of `choice` from its token `first` on; `row` is its context and all but its last."""
    for k in range(first, len(choice) - 1):
        place = context + k
        known[tuple(choice[: k + 1])] = output.prompt_logprobs[place - len(row)][row[place]].logprob
    known[tuple(choice)] = output.outputs[0].logprobs[0][choice[-1]].logprob


def _ranked(entry: Mapping[int, Any], count: int) -> list[tuple[int, float]]:
    """The likeliest tokens of one position, best first; the prompt's own token is dropped where it is not one."""
    best = sorted(entry.items(), key=lambda item: (-item[1].logprob, item[0]))[:count]
    return [(token, found.logprob) for token, found in best]


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Whatever the engine or its processes die of in here becomes one line that says `what` and the way out."""
    try:
        yield
    except Exception as error:
        lines = [line for line in str(error).strip().splitlines() if "For further information visit" not in line]
        reason = lines[-1].strip() if lines else type(error).__name__
        hint = _memory_hint(not torch.cuda.is_available())
        raise OrthogonalizeError(f"{what}: {reason}; {hint}, or use --engine hf") from error


def _memory_hint(on_cpu: bool) -> str:
    if on_cpu:
        space = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
        return f"the cache takes VLLM_CPU_KVCACHE_SPACE={space} GiB: raise it if that is too little, else free memory"
    return (
        "if memory is short: raise --gpu-memory-utilization where the GPU has room, lower it where others use the GPU, "
        "or spread the model with --tensor-parallel-size"
    )
