"""Peak memory and time of reading activations block by block, from random checkpoints of a stated shape made here.

python benchmarks/stream.py [--shape 8B] [--device cuda:0] [--device all] [--layers 16,32] [--resident] [--cached]

The time is set against the slower of reading the weight files once and computing every block at the rate of a resident
one (on the same devices), and with --resident against the resident path itself. Every measurement is made in a process
of its own, with the files out of the page cache, or, with --cached, in it: later passes over a model that fits there
read it from there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
from rich.console import Console
from safetensors.torch import save_file

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.directions.activation_store import record, record_streamed
from orthogonalize.models.loading import choose_devices, load_model
from orthogonalize.models.streaming.lanes import StreamedModel
from orthogonalize.models.streaming.weights import PartialModel

if TYPE_CHECKING:
    from transformers import LlamaConfig

console = Console()
POSITIONS = 5
INDEX = "model.safetensors.index.json"
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "num_hidden_layers": 8, "vocab_size": 1024,
    },
    "6.4GB": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8,
        "head_dim": 128, "num_hidden_layers": 28, "vocab_size": 128256,
    },
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "num_hidden_layers": 32, "vocab_size": 128256,
    },
    "24B": {
        "hidden_size": 5120, "intermediate_size": 32768, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "num_hidden_layers": 40, "vocab_size": 131072,
    },
}  # fmt: skip


def write_random(folder: Path, shape: str, layers: int) -> None:
    """Write a Llama of `shape` with random bfloat16 weights, one file per block; all blocks have the same values."""
    config = random_config(shape, layers)
    generator = torch.Generator().manual_seed(0)
    block = random_block(config, generator)
    embedding = random_matrix(config.vocab_size, config.hidden_size, generator)
    write_model(folder, config, lambda _layer: block, embedding, embedding)


def random_config(shape: str, layers: int) -> LlamaConfig:
    from transformers import LlamaConfig

    tied = shape == "6.4GB"
    config = LlamaConfig(**SHAPES[shape] | {"num_hidden_layers": layers}, tie_word_embeddings=tied, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    return config


def random_matrix(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Of bfloat16 values that keep the variance of what they multiply."""
    return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(torch.bfloat16)


def random_block(config: LlamaConfig, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The weights of one block, by their names in it."""
    d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * h, config.num_key_value_heads * h
    shapes = {
        "self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
    }  # fmt: skip
    block = {name: random_matrix(*each, generator) for name, each in shapes.items()}
    norm = torch.ones(d, dtype=torch.bfloat16)
    return block | {"input_layernorm": norm, "post_attention_layernorm": norm.clone()}


def write_model(
    folder: Path,
    config: LlamaConfig,
    block: Callable[[int], dict[str, torch.Tensor]],
    embedding: torch.Tensor,
    head: torch.Tensor,
) -> None:
    """Write a checkpoint, one file per block; `head` is left out if the configuration ties it."""
    config.save_pretrained(folder)
    norm = torch.ones(config.hidden_size, dtype=torch.bfloat16)
    index: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    write("model-embedding.safetensors", {"model.embed_tokens.weight": embedding, "model.norm.weight": norm})
    if not config.tie_word_embeddings:
        write("model-head.safetensors", {"lm_head.weight": head})
    for layer in range(config.num_hidden_layers):
        tensors = {f"model.layers.{layer}.{name}.weight": each for name, each in block(layer).items()}
        write(f"model-{layer:03}.safetensors", tensors)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def forget(folder: Path) -> None:
    """Drop the files of `folder` from the page cache."""
    os.sync()
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def random_ids(prompts: int, tokens: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 1000, (prompts, tokens), generator=generator).tolist()


def peak_memory() -> int:
    """The peak of this process's memory so far, in bytes; getrusage would inherit that of the process before it."""
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def synchronise(device: str) -> None:
    for each in gpus(device):
        torch.cuda.synchronize(each)


def gpus(device: str) -> list[torch.device]:
    """The GPUs that a --device stands for; none if it is a CPU."""
    return [each for each in choose_devices(device) if each.type == "cuda"]


@click.group(invoke_without_command=True)
@click.option("--shape", type=click.Choice(list(SHAPES)), default="6.4GB", show_default=True)
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="A Llama that is there, instead.")
@click.option("--device", "devices", multiple=True, default=["auto"], help="Repeat it to compare; all is every GPU.")
@click.option("--layers", help="Numbers of blocks, such as 14,28; the shape's own by default.")
@click.option("--prompts", default=256, show_default=True)
@click.option("--tokens", default=64, show_default=True, help="Per prompt.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where checkpoints are made; removed afterwards.")
@click.option("--cached", is_flag=True, help="Leave the files in the page cache.")
@click.option("--resident", is_flag=True, help="Also measure the resident path, in which the whole model is loaded.")
@click.pass_context
def main(
    context: click.Context,
    shape: str,
    model: Path | None,
    devices: tuple[str, ...],
    layers: str | None,
    prompts: int,
    tokens: int,
    folder: Path | None,
    cached: bool,
    resident: bool,
) -> None:
    """Measure streaming at a shape, for each number of blocks."""
    if context.invoked_subcommand:
        return
    sides = ["reading", "computing", "streaming", *(["whole"] if resident else [])]

    def measure(place: Path) -> None:
        for device in devices:
            found: dict[str, float] = {}
            for side in sides:
                if not cached:
                    forget(place)
                found |= measured(side, str(place), device, prompts, tokens)
            console.print(f"{device}, {described(found)}", soft_wrap=True)

    if model:
        console.print(f"{model}, {prompts} prompts of {tokens} tokens", soft_wrap=True)
        measure(model)
        return
    for count in [int(word) for word in layers.split(",")] if layers else [SHAPES[shape]["num_hidden_layers"]]:
        console.print(f"{shape} shape, {count} blocks, {prompts} prompts of {tokens} tokens")
        with tempfile.TemporaryDirectory(dir=folder) as place:
            write_random(Path(place), shape, count)
            measure(Path(place))


def measured(*words: str | int) -> dict[str, float]:
    """One measurement (see `measure_side`), in a process of its own."""
    command = [sys.executable, __file__, "side", *map(str, words)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(out.stdout.splitlines()[-1])
    return found


def described(found: dict[str, float]) -> str:
    slower = max(found["read"], found["compute"])
    beside = f", resident path {found['whole']:.2f} s" if "whole" in found else ""
    gpu = f", of each GPU {found['gpu'] / 1e6:.0f} MB" if "gpu" in found else ""
    blocks = (found["peak"] - found["streams"]) / found["block"]
    return (
        f"{found['weights'] / 1e9:.1f} GB: streamed in {found['stream']:.2f} s, "
        f"{found['stream'] / slower:.2f}x the slower of reading once ({found['read']:.2f} s) and computing "
        f"({found['compute']:.2f} s){beside}; peak memory of the host {found['peak'] / 1e6:.0f} MB above the "
        f"libraries{gpu}, which is the streams ({found['streams'] / 1e6:.0f} MB) and {blocks:.2f} blocks "
        f"({found['block'] / 1e6:.0f} MB each in memory)"
    )


@main.command("side", hidden=True)
@click.argument("side")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("device")
@click.argument("prompts", type=int)
@click.argument("tokens", type=int)
def measure_side(side: str, folder: Path, device: str, prompts: int, tokens: int) -> None:
    """One measurement, in this process; prints JSON."""
    os.environ["TQDM_DISABLE"] = "1"
    for each in gpus(device):
        torch.zeros(1, device=each)  # its start is no part of any side
    measures = {"reading": reading, "computing": computing, "streaming": streaming, "whole": whole}
    print(json.dumps(measures[side](folder, device, random_ids(prompts, tokens))))


def reading(folder: Path, _device: str, _ids: list[list[int]]) -> dict[str, float]:
    """The time to read the weight files once."""
    buffer = memoryview(bytearray(2**24))
    start, size = time.perf_counter(), 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(buffer):
                size += count
    return {"read": time.perf_counter() - start, "weights": size}


def computing(folder: Path, device: str, ids: list[list[int]]) -> dict[str, float]:
    """The time to push all prompts through one block that stays, times the number of blocks."""
    streamed = StreamedModel(PartialModel(open_checkpoint(folder), device))
    (lanes,) = streamed.enter([ids])
    streamed.parts.hold(0)
    streamed.advance_all(0, [lane.fork() for lane in lanes[: 2 * len(streamed.replicas)]])  # warm up
    synchronise(device)
    start = time.perf_counter()
    streamed.advance_all(0, lanes)
    synchronise(device)
    return {"compute": (time.perf_counter() - start) * streamed.layer_count}


def streaming(folder: Path, device: str, ids: list[list[int]]) -> dict[str, float]:
    """The time to record the activations of a streamed model, and the memory that it takes above the libraries."""
    from transformers import LlamaForCausalLM  # noqa: F401  (a library, whose memory does not count)

    before = peak_memory()
    start = time.perf_counter()
    streamed = StreamedModel(PartialModel(open_checkpoint(folder), device))
    with tempfile.TemporaryDirectory() as out:
        record_streamed(streamed, {"prompts": ids}, POSITIONS, Path(out) / "activations.safetensors", "benchmark")
    synchronise(device)
    wall = time.perf_counter() - start
    itemsize = streamed.dtype.itemsize
    found = {
        "stream": wall,
        "peak": peak_memory() - before,
        "block": streamed.parts.block_bytes(0),
        "streams": sum(map(len, ids)) * streamed.width * itemsize,
    }
    most = [torch.cuda.max_memory_reserved(each) for each in gpus(device)]
    return found | ({"gpu": max(most)} if most else {})


def whole(folder: Path, device: str, ids: list[list[int]]) -> dict[str, float]:
    """The time to load the whole model and record the same activations."""
    start = time.perf_counter()
    model = load_model(folder, device)
    layers = model.config.num_hidden_layers + 1
    with tempfile.TemporaryDirectory() as out:
        record(model, {"prompts": ids}, POSITIONS, layers, Path(out), "benchmark")
    synchronise(device)
    return {"whole": time.perf_counter() - start}


if __name__ == "__main__":
    main()
