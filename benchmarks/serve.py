"""Tokens per second: base in vLLM, edited in vLLM, and the base with hooks in transformers, on the same prompts.

    python benchmarks/serve.py                        the demo's model, on this machine
    python benchmarks/serve.py --shape llama-3-8b --prompts 159 --new-tokens 512 --batches 8,64,159
                                                      dummy weights; the shape determines the speed

An edit in the weights costs nothing when served; hooks keep a model out of fast engines. The hooks are those of the
published pipelines (block input, attention output and MLP output of every layer, in the model's own dtype). Every
engine runs in a process of its own, base and edited in turn, so that a machine that slows down slows both. Ratios are
of medians.

The demo's model answers the demo's harmless test prompts. First the base answers them in vLLM; every side then writes
as many tokens to each prompt as the base did, 512 at most, so that all do the same work, in batches that end with
their longest answer. Dummy weights give no real answers: there, every prompt and every answer has the same length.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from sides import hear, show, tell

SHAPES = {
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
    },
    "tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 2048, "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
ON_CPU = not torch.cuda.is_available()
ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
if ON_CPU:
    ENVIRONMENT |= {
        "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip


def random_work(options: dict[str, int], vocabulary: int) -> dict[str, Any]:
    """Random prompts, and how many tokens each is answered with."""
    generator = torch.Generator().manual_seed(0)
    shape = (options["prompts"], options["prompt_tokens"])
    return {
        "prompts": torch.randint(10, vocabulary - 10, shape, generator=generator).tolist(),
        "lengths": [options["new_tokens"]] * options["prompts"],
    }


def demo_work(base: Path, options: dict[str, int]) -> dict[str, Any]:
    """The demo's harmless prompts, each to be answered with `new_tokens` at most."""
    from orthogonalize.data.chat import ChatFormat
    from orthogonalize.data.prompts import concept, load_prompts
    from orthogonalize.models.loading import load_tokenizer

    prompts = load_prompts(concept("cooking").negative, "negative")[: options["prompts"]]
    ids = ChatFormat(load_tokenizer(base)).encode_all([prompt.text for prompt in prompts])
    return {"prompts": ids, "lengths": [options["new_tokens"]] * len(ids)}


def write_shape(shape: str, folder: Path) -> None:
    """A folder that holds a configuration and no weights."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
        **SHAPES[shape],
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_demo(base: Path, folder: Path) -> None:
    """The demo's model with a direction removed from every write, by `edit`."""
    from safetensors.torch import save_file

    from orthogonalize import edit

    config = json.loads((base / "config.json").read_text())
    direction = torch.randn(config["hidden_size"], generator=torch.Generator().manual_seed(1))
    with TemporaryDirectory() as scratch:
        save_file({"direction": direction}, Path(scratch) / "direction.safetensors")
        edit(str(base), folder, direction=Path(scratch) / "direction.safetensors", method="ablate", scope="all")


def start_vllm(settings: dict[str, Any]) -> Any:
    """vLLM with its defaults, except for what a CPU needs and without caches, which would help the second pass."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    longest = max(len(ids) + n for ids, n in zip(settings["prompts"], settings["lengths"], strict=True))
    return LLM(
        model=settings["folder"],
        dtype="bfloat16",
        max_model_len=longest + 16,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        load_format="dummy" if settings["dummy"] else "auto",
        **({} if ON_CPU else {"gpu_memory_utilization": 0.85}),
    )


def natural_lengths(settings: dict[str, Any]) -> list[int]:
    """How many tokens vLLM answers each prompt with until the model ends the answer."""
    llm = start_vllm(settings)
    from vllm import SamplingParams

    parameters = [SamplingParams(temperature=0.0, max_tokens=n, detokenize=False) for n in settings["lengths"]]
    rows: list[Any] = [{"prompt_token_ids": ids} for ids in settings["prompts"]]
    return [len(o.outputs[0].token_ids) for o in llm.generate(rows, parameters, use_tqdm=False)]


def serve_vllm(settings: dict[str, Any]) -> float:
    """Generated tokens per second of one engine."""
    llm = start_vllm(settings)
    from vllm import SamplingParams

    def exactly(tokens: int) -> Any:
        return SamplingParams(
            temperature=0.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False
        )  # fmt: skip

    rows: list[Any] = [{"prompt_token_ids": ids} for ids in settings["prompts"]]
    llm.generate(rows[:8], exactly(4), use_tqdm=False)
    rates = []
    for _ in range(settings["repeats"]):
        start = time.perf_counter()
        outputs = llm.generate(rows, [exactly(n) for n in settings["lengths"]], use_tqdm=False)
        rates.append(sum(len(o.outputs[0].token_ids) for o in outputs) / (time.perf_counter() - start))
    return median(rates)


def hook_everywhere(model: Any) -> None:
    """Remove a random unit direction from every block's input, attention output and MLP output."""
    direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    unit = (direction / direction.norm()).to(model.device, model.dtype)

    def removed(x: torch.Tensor) -> torch.Tensor:
        return x - (x @ unit).unsqueeze(-1) * unit

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (removed(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": removed(kwargs["hidden_states"])}

    def after(_module: Any, _inputs: Any, output: Any) -> Any:
        return (removed(output[0]), *output[1:]) if isinstance(output, tuple) else removed(output)

    for block in model.model.layers:
        block.register_forward_pre_hook(before, with_kwargs=True)
        block.self_attn.register_forward_hook(after)
        block.mlp.register_forward_hook(after)


def serve_hooks(settings: dict[str, Any]) -> dict[int, float]:
    """Generated tokens per second by batch size, in transformers with hooks.

    A batch is generated until its longest answer is done, as `generate` does; what it writes to the others
    after their ends does not count.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cpu" if ON_CPU else "cuda"
    if settings["dummy"]:
        with torch.device(device):
            config = AutoConfig.from_pretrained(settings["folder"])
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_pretrained(settings["folder"], dtype=torch.bfloat16).to(device)
    model.eval()
    hook_everywhere(model)
    model.generation_config.eos_token_id = None  # the lengths are given

    def generate(prompts: list[list[int]], tokens: int) -> None:
        width = max(map(len, prompts))
        padded = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        model.generate(
            input_ids=padded, attention_mask=mask, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens,
            pad_token_id=0,
        )  # fmt: skip

    prompts, lengths = settings["prompts"], settings["lengths"]
    rates: dict[int, float] = {}
    with torch.inference_mode():
        generate(prompts[:2], 4)
        for size in settings["batches"]:
            count = len(prompts)
            if settings["hooked_prompts"] < count:
                count = min(count, max(size, settings["hooked_prompts"]) // size * size)
            try:
                start = time.perf_counter()
                for first in range(0, count, size):
                    last = min(first + size, count)
                    generate(prompts[first:last], max(lengths[first:last]))
                if not ON_CPU:
                    torch.cuda.synchronize()
                rates[size] = sum(lengths[:count]) / (time.perf_counter() - start)
            except torch.cuda.OutOfMemoryError:
                break
    return rates


def serve(side: str, settings: dict[str, Any]) -> Any:
    """One side in a fresh process: its device memory is free again when it ends."""
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "settings.json"
        file.write_text(json.dumps(settings))
        return hear(__file__, "--side", side, "--settings", file)


@click.command()
@click.option(
    "--shape", type=click.Choice(list(SHAPES)), help="Dummy weights of this shape, instead of the demo's model."
)
@click.option("--prompts", default=96, show_default=True)
@click.option("--prompt-tokens", default=40, show_default=True, help="Of dummy weights.")
@click.option("--new-tokens", default=512, show_default=True, help="At most, as in the reference.")
@click.option("--batches", default="8,32,96", show_default=True, help="Of transformers; the first is the reference's.")
@click.option("--hooked-prompts", default=0, help="The most prompts that transformers answers; 0: all of them.")
@click.option("--rounds", default=2, show_default=True, help="Engines per side, base and edited in turn.")
@click.option("--repeats", default=3, show_default=True, help="Timed passes per engine.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the numbers here, as JSON.")
@click.option("--side", hidden=True)
@click.option("--settings", "given", type=click.Path(path_type=Path), hidden=True)
def main(shape: str | None, batches: str, rounds: int, out: Path | None, side: str | None, given: Path | None,
         **options: int) -> None:  # fmt: skip
    """Measure, and print the table."""
    if side and given:
        sides: dict[str, Any] = {"hooks": serve_hooks, "vllm": serve_vllm, "lengths": natural_lengths}
        tell(sides[side](json.loads(given.read_text())))
        return
    with TemporaryDirectory() as scratch:
        base, edited = Path(scratch) / "base", Path(scratch) / "edited"
        if shape:
            write_shape(shape, base)
            write_shape(shape, edited)  # a removal keeps every shape; a tied head gets weights of its own
            config = json.loads((edited / "config.json").read_text()) | {"tie_word_embeddings": False}
            (edited / "config.json").write_text(json.dumps(config))
        else:
            from orthogonalize.models.demo_model import planted_model

            base = planted_model()
            write_demo(base, edited)
        vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
        common = {
            **(random_work(options, vocabulary) if shape else demo_work(base, options)), "dummy": bool(shape),
            "batches": [int(b) for b in batches.split(",")], "repeats": options["repeats"],
            "hooked_prompts": options["hooked_prompts"] or options["prompts"],
        }  # fmt: skip
        if not shape:
            common["lengths"] = serve("lengths", {**common, "folder": str(base)})
        rates: dict[str, list[float]] = {"base": [], "edited": []}
        for _ in range(rounds):
            for name, folder in (("base", base), ("edited", edited)):
                rates[name].append(serve("vllm", {**common, "folder": str(folder)}))
                click.echo(f"{name}: {rates[name][-1]:,.0f} tokens/s", err=True)
        hooks = {int(k): v for k, v in serve("hooks", {**common, "folder": str(base)}).items()}
    first, best = hooks[min(hooks)], max(hooks.values())
    result = {
        "device": platform.processor() or platform.machine() if ON_CPU else torch.cuda.get_device_name(),
        "model": shape or "demo",
        **options,
        "answered_with": {"mean": mean(common["lengths"]), "longest": max(common["lengths"])},
        "tokens_per_second": {
            "base": median(rates["base"]), "edited": median(rates["edited"]), "hooks": hooks, "runs": rates,
        },
        "edited_to_base": median(rates["edited"]) / median(rates["base"]),
        f"edited_to_hooks_at_batch_{min(hooks)}": median(rates["edited"]) / first,
        "edited_to_hooks_at_best_batch": median(rates["edited"]) / best,
    }  # fmt: skip
    show(result, out)


if __name__ == "__main__":
    main()
