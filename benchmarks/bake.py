"""The time and memory of an edit, compared with a copy of the same checkpoint.

    python benchmarks/bake.py [--folder DIR] [--layers 28] [--rounds 3] [--cases rank1-nearest,...]

Writes a sharded bfloat16 checkpoint of random weights in the shape of Llama-3.2-3B (28 layers: 6.4 GB, of which each
layer is 0.2 GB), then alternates `cp -r` + sync with `edit` of every write + sync, each in a process of its own and
every other time the edit first, and prints medians of the ratios. The time is that of all of `edit`, from opening the
checkpoint to its card, without the interpreter's start, imports and the compiling of loops; peak memory is that of
the edit's process, less what these need.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

WIDTH, INNER, HEADS, KEY_VALUE_HEADS, VOCABULARY = 3072, 8192, 24, 8, 128256
SHARD = 2 * 10**9  # bytes
CASES = {
    "rank1-nearest": (1, "nearest", 1.3),
    "rank1-cancelling": (1, "cancelling", 2.0),
    "rank16-nearest": (16, "nearest", 1.6),
    "rank16-cancelling": (16, "cancelling", 2.5),
}


def make_checkpoint(folder: Path, layers: int) -> int:
    """Write the checkpoint shard by shard; returns its size in bytes."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": WIDTH,
        "intermediate_size": INNER, "num_attention_heads": HEADS, "num_key_value_heads": KEY_VALUE_HEADS,
        "num_hidden_layers": layers, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    narrow = WIDTH * KEY_VALUE_HEADS // HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "self_attn.q_proj.weight": (WIDTH, WIDTH), prefix + "self_attn.k_proj.weight": (narrow, WIDTH),
            prefix + "self_attn.v_proj.weight": (narrow, WIDTH), prefix + "self_attn.o_proj.weight": (WIDTH, WIDTH),
            prefix + "mlp.gate_proj.weight": (INNER, WIDTH), prefix + "mlp.up_proj.weight": (INNER, WIDTH),
            prefix + "mlp.down_proj.weight": (WIDTH, INNER), prefix + "input_layernorm.weight": (WIDTH,),
            prefix + "post_attention_layernorm.weight": (WIDTH,),
        }  # fmt: skip
    shapes["model.norm.weight"] = (WIDTH,)
    shards: list[list[str]] = [[]]
    sizes = [0]
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if sizes[-1] and sizes[-1] + size > SHARD:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(2**22, generator=generator).mul_(0.02).to(torch.bfloat16)
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            count = torch.Size(shapes[name]).numel()
            shift = int(torch.randint(len(block), (1,), generator=generator))
            tensors[name] = block.roll(shift).repeat(-(-count // len(block)))[:count].reshape(shapes[name])
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(sizes)


def edit_once(source: Path, target: Path, rank: int, rounding: str, workers: int) -> None:
    """The timed process: edit every write of `source` into `target`, and print time and memory."""
    from safetensors.torch import save_file

    from orthogonalize import edit
    from orthogonalize.checkpoints.tensor_edit import TensorEdit
    from orthogonalize.core.interventions import Site, removal

    basis = torch.linalg.qr(torch.randn(WIDTH, rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    for shape in ((WIDTH, 64), (64, WIDTH)):  # imports and compiled loops are not the edit's
        axis = 0 if shape[0] == WIDTH else 1
        warm = TensorEdit("warm", Site("embed"), axis, removal(basis[0].T), "matrix")
        warm.apply(torch.randn(shape).to(torch.bfloat16), rounding)
    direction = target.parent / "basis.safetensors"
    save_file({"basis": basis[0].T.contiguous()}, direction)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    spent = sum(os.times()[:2])
    start = time.perf_counter()
    edit(str(source), target, direction=direction, method="nullspace", scope="all", rounding=rounding, workers=workers)
    os.sync()
    seconds = time.perf_counter() - start
    result = {"seconds": seconds, "peak": memory("VmHWM") - before, "cpu": sum(os.times()[:2]) - spent}
    print(json.dumps(result))


def memory(which: str) -> int:
    """Bytes of resident memory of this process: now (VmRSS) or at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(which)).split()[1])


def remove(folder: Path) -> None:
    """Delete a folder, and give the disk (and a virtual machine's host) time to reclaim it before the next turn."""
    shutil.rmtree(folder)
    os.sync()
    time.sleep(4)


def timed_copy(source: Path, target: Path) -> float:
    """Seconds of `cp -r` and sync."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    os.sync()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="a folder with room for three times the checkpoint")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--verbose", action="store_true", help="print every pair")
    parser.add_argument("--edit", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.edit:
        source, target, rank, rounding = arguments.edit
        edit_once(Path(source), Path(target), int(rank), rounding, arguments.workers)
        return
    room = Path(tempfile.mkdtemp(prefix="bake-", dir=arguments.folder))
    try:
        source, target = room / "source", room / "target"
        size = make_checkpoint(source, arguments.layers)
        free = shutil.disk_usage(room).free
        if free < 2.2 * size:
            raise SystemExit(f"{room} has {free / 1e9:.1f} GB free; {2.2 * size / 1e9:.1f} GB are needed")
        print(f"{size / 1e9:.2f} GB, {arguments.layers} layers, {os.cpu_count()} cores")
        os.sync()
        timed_copy(source, target)
        remove(target)
        for case in arguments.cases.split(","):
            rank, rounding, target_ratio = CASES[case]
            ratios, seconds, copies, peaks, cpus = [], [], [], [], []
            for turn in range(arguments.rounds):
                if turn % 2 == 0:
                    copies.append(timed_copy(source, target))
                    remove(target)
                command = [sys.executable, __file__, "--workers", str(arguments.workers), "--edit"]
                command += [str(source), str(target), str(rank), rounding]
                result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                remove(target)
                if turn % 2:
                    copies.append(timed_copy(source, target))
                    remove(target)
                seconds.append(result["seconds"])
                peaks.append(result["peak"])
                cpus.append(result["cpu"])
                ratios.append(seconds[-1] / copies[-1])
                if arguments.verbose:
                    print(f"  cp {copies[-1]:.2f}  edit {result}", flush=True)
            print(
                f"{case:18} edit {statistics.median(seconds):6.1f} s  cp+sync {statistics.median(copies):6.1f} s  "
                f"ratio {statistics.median(ratios):.2f} (target {target_ratio})  peak {max(peaks) / 2**20:5.0f} MiB  "
                f"CPU {statistics.median(cpus):.1f} s",
                flush=True,
            )
    finally:
        shutil.rmtree(room)


if __name__ == "__main__":
    main()
