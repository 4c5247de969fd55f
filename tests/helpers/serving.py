"""Serve baked tiny checkpoints in vLLM: is every parameter read, and do the scores equal transformers'?

Run as a program with a work folder and names of tiny models, it prints one JSON line per model. The engine
starts in this process with a patched loader: all parameters are NaN before the weights are read, so that
parameters missing from the file, and tensors unknown to the class, show up.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

SETTINGS = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}

TOP = 5
FAR = 2e-2  # log-probabilities that differ by more are different
SPREAD = 0.15  # of the head: with logits of spread 1, bfloat16 rounding moves log-probabilities by three times FAR
RANK = 48  # of the edit, a quarter of the width: it must still move them by far more than FAR
PROMPTS, LENGTH = 3, 17
# Keys of the Hub's config.json that transformers' class does not need, and sizes that vLLM's kernels need.
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
QUIETER = {"spread": SPREAD / 2}  # these lose more to rounding, and their edits move more
GATED_DELTA = QUIETER | {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
LINEAR = ["qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5 multimodal", "qwen3_5_moe multimodal"]
SERVED: dict[str, dict[str, Any]] = {
    "lfm2": QUIETER
    | {"conv_dim": 192, "conv_dim_out": 192, "block_dim": 192, "block_ff_dim": 200, "block_multiple_of": 1},
    "granitemoehybrid": {"spread": 0.1},
    "gpt2": {"spread": 0.2},
    "deepseek_v2": LATENT | QUIETER,
    "deepseek_v2 lite": LATENT | QUIETER,
    "deepseek_v3": LATENT | QUIETER | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    **dict.fromkeys(LINEAR, GATED_DELTA),
}
BFLOAT16_ONLY = LINEAR  # "CPU GDN attention requires BF16"
# vLLM's own class lacks the parallel residual and fails ("weights were not initialized"), so such a model is
# served by vLLM's backend for transformers' classes, edited or not.
BACKEND = {"stablelm parallel"}


def _holds(parameter: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether `tensor` is `parameter`, or consecutive rows of it (vLLM stacks q, k, v and gate, up)."""
    if parameter.dim() != tensor.dim() or parameter.shape[1:] != tensor.shape[1:]:
        return False
    rows, size = parameter.shape[0], tensor.shape[0]
    return any(torch.equal(parameter[i : i + size], tensor) for i in range(0, rows - size + 1, max(1, size // 2)))


class LoadProof:
    """What an engine's loader missed: parameters that stayed NaN, and tensors of the edit that were dropped."""

    def __init__(self, added: dict[str, torch.Tensor]) -> None:
        self.added = added
        self.uninitialised: list[str] = []
        self.dropped: list[str] = []

    def __enter__(self) -> LoadProof:
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        self.original = original = DefaultModelLoader.load_weights

        def load_weights(loader: Any, model: Any, config: Any) -> None:
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data.fill_(float("nan"))
            original(loader, model, config)
            parameters = dict(model.named_parameters())
            self.uninitialised = [n for n, p in parameters.items() if p.is_floating_point() and p.isnan().any()]
            self.dropped = [
                name
                for name, tensor in self.added.items()
                if tensor.any() and not any(_holds(p.data, tensor.to(p.dtype)) for p in parameters.values())
            ]

        DefaultModelLoader.load_weights = load_weights
        return self

    def __exit__(self, *exc: object) -> None:
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        DefaultModelLoader.load_weights = self.original


def served(
    folder: Path, prompts: list[list[int]], dtype: str, proof: LoadProof, backend: bool
) -> list[list[dict[int, float]]]:
    """Log-probabilities of the TOP tokens at every position of `prompts`, from vLLM."""
    from vllm import LLM, SamplingParams

    from orthogonalize.engines.vllm import cpu_arguments, patch_llvmlite_introspection

    patch_llvmlite_introspection()

    config = json.loads((folder / "config.json").read_text())
    on_gpu = {"gpu_memory_utilization": 0.1, "enforce_eager": True}  # several engines share it
    with proof:
        llm = LLM(
            model=str(folder), skip_tokenizer_init=True, dtype=dtype, max_model_len=64, max_num_seqs=4,
            disable_log_stats=True, max_logprobs=TOP, enable_prefix_caching=False,
            limit_mm_per_prompt={"image": 0, "video": 0} if "vision_config" in config else {},
            model_impl="transformers" if backend else "auto",
            **(on_gpu if torch.cuda.is_available() else cpu_arguments(config)),
        )  # fmt: skip
    try:
        parameters = SamplingParams(max_tokens=1, prompt_logprobs=TOP, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
        return [[{t: v.logprob for t, v in at.items()} for at in out.prompt_logprobs[1:]] for out in outputs]
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def load(folder: Path, dtype: torch.dtype) -> Any:
    from orthogonalize.models.loading import model_class

    return model_class(folder).from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


@torch.inference_mode()
def scores(model: Any, prompts: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [prompt, position, token] from transformers."""
    return model(input_ids=prompts).logits.float().log_softmax(-1)


def steady_prompts(folder: Path) -> torch.Tensor:
    """The PROMPTS of many random prompts that move least under rounding to bfloat16 and under twice as much noise.

    Where a router is near a tie, any rounding picks another expert, and two correct implementations differ by
    as much as experts do. Such prompts compare nothing; transformers alone finds them, before vLLM runs.
    """
    candidates = torch.randint(3, 90, (96, LENGTH), generator=torch.Generator().manual_seed(0))
    model = load(folder, torch.float32)
    exact = scores(model, candidates)
    stored = {name: p.detach().clone() for name, p in model.named_parameters()}
    noise = torch.Generator().manual_seed(1)
    moved = (scores(load(folder, torch.bfloat16), candidates) - exact).abs().amax((1, 2))
    for _ in range(4):
        for name, parameter in model.named_parameters():
            parameter.data = stored[name] * (1 + 2**-8 * torch.randn(parameter.shape, generator=noise))
        moved = moved.maximum((scores(model, candidates) - exact).abs().amax((1, 2)))
    return candidates[moved.argsort()[:PROMPTS]]


def top(table: torch.Tensor) -> list[list[dict[int, float]]]:
    """The TOP scores, in the form that `served` returns."""
    best = table.topk(TOP)
    return [
        [dict(zip(tokens, values, strict=True)) for tokens, values in zip(at.tolist(), of.tolist(), strict=True)]
        for at, of in zip(best.indices, best.values, strict=True)
    ]


def gap(served_top: list[list[dict[int, float]]], reference: torch.Tensor) -> float:
    """The largest difference in any log-probability among vLLM's first TOP."""
    differences = []
    for positions, table in zip(served_top, reference, strict=True):
        for row, at in enumerate(positions):
            best = sorted(at.items(), key=lambda pair: -pair[1])[:TOP]
            differences += [abs(value - table[row, token].item()) for token, value in best]
    return max(differences)


def intervention_for(name: str, architecture: Any) -> Any:
    """The most that the family allows: a removal at every write, and a constant where one can be stored."""
    from orthogonalize.core.interventions import Intervention, Site, removal

    width = 192
    rows = torch.randn(RANK, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    basis = torch.linalg.qr((rows - rows.mean(1, keepdim=True)).T)[0].T
    sites = [Site(kind, layer) for layer in range(4) for kind in ("attn", "mlp")]
    sites += [Site("embed")] if architecture.head.untied != "never" else []
    return Intervention({site: removal(basis) for site in sites}), basis


def bake_tiny(name: str, folder: Path) -> tuple[Any, str]:
    """Store the tiny model `name` and its edit; returns the plan, and where it put a constant."""
    from dataclasses import replace

    from helpers.tiny_models import store_tiny
    from orthogonalize.architectures.schema import architecture_of
    from orthogonalize.checkpoints.checkpoint import open_checkpoint
    from orthogonalize.core.errors import OrthogonalizeError
    from orthogonalize.core.interventions import Intervention, Site, shift
    from orthogonalize.edits.bake import bake

    settings = {"spread": SPREAD} | SERVED.get(name, {})
    source = open_checkpoint(store_tiny(name, folder / "base", torch.bfloat16, 64, **settings))
    intervention, basis = intervention_for(name, architecture_of(source.config))
    plan, constant = None, "none"
    for site in (Site("mlp", 1), Site("attn", 1)):
        maps = dict(intervention.writes)
        maps[site] = replace(maps[site], s=shift(2 * basis[0]).s)
        try:
            plan, constant = bake(source, Intervention(maps)), str(site)
            break
        except OrthogonalizeError:
            continue
    plan = plan or bake(source, intervention)
    (folder / "edited").mkdir()
    plan.write(folder / "edited")
    return plan, constant


def prove(name: str, folder: Path) -> dict[str, Any]:
    """Bake the tiny model `name`, serve it, and compare.

    `moved` is what the edit does to transformers' scores, `rounding` what bfloat16 does to those of the edited
    model. `NAME@own` is served by its own class even where the edit needs another: the effect of a wrong choice.
    """
    name, _, own = name.partition("@")
    from orthogonalize.checkpoints.checkpoint import open_checkpoint

    started = time.time()
    plan, constant = bake_tiny(name, folder)
    if own:
        config = json.loads((folder / "edited" / "config.json").read_text())
        config["architectures"] = open_checkpoint(folder / "base").config["architectures"]
        (folder / "edited" / "config.json").write_text(json.dumps(config))
    edited = open_checkpoint(folder / "edited")
    proof = LoadProof({n: edited.read(n) for n in plan.checkpoint.additions})
    result: dict[str, Any] = {"name": name, "constant": constant, "added": len(plan.checkpoint.additions)}
    by = (
        ["TransformersForCausalLM"]
        if name in BACKEND
        else plan.checkpoint.config_changes.get("architectures", ["its own class"])
    )
    # Everything in transformers first: vLLM's backend modifies its classes.
    prompts = steady_prompts(folder / "edited")
    wide = scores(load(folder / "edited", torch.float32), prompts)
    narrow = scores(load(folder / "edited", torch.bfloat16), prompts)
    base = scores(load(folder / "base", torch.float32), prompts)
    result |= {"served_by": by[0], "moved": gap(top(base), wide), "rounding": gap(top(narrow), wide)}
    for dtype, reference in (("float32", wide), ("bfloat16", narrow)):
        if dtype == "float32" and name in BFLOAT16_ONLY:
            continue
        try:
            of_vllm = served(folder / "edited", prompts.tolist(), dtype, proof, name in BACKEND)
        except Exception as error:  # any failure of an engine: a class or a kernel that this build lacks
            result |= {"error": reason(error)}
            break
        result |= {f"gap_{dtype}": gap(of_vllm, reference)}
    result |= {"uninitialised": proof.uninitialised, "dropped": proof.dropped}
    return result | {"seconds": round(time.time() - started, 1)}


def reason(error: Exception) -> str:
    """The informative line of an engine's error."""
    lines = [line for line in str(error).strip().splitlines() if "further information" not in line]
    return (lines or [type(error).__name__])[-1].strip()[:300]


def environment() -> dict[str, str]:
    """What a process needs that imports the package and these helpers."""
    known = [path for path in [os.environ.get("PYTHONPATH")] if path]
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2]), *known]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def serve(names: list[str], folder: Path) -> list[dict[str, Any]]:
    """Measure tiny models in a separate process, since an engine leaves a lot of state behind."""
    done = subprocess.run(
        [sys.executable, __file__, folder, *names], env=environment(), capture_output=True, text=True, check=False
    )
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    assert len(results) == len(names), done.stderr[-2000:]
    return results


if __name__ == "__main__":
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    work = Path(sys.argv[1])
    for number, model in enumerate(sys.argv[2:]):
        (work / str(number)).mkdir(parents=True)
        print(json.dumps(prove(model, work / str(number))), flush=True)
