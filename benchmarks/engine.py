"""How fast `extract --engine vllm` reads, beside the prefill of an engine that nothing is read from.

python benchmarks/engine.py [--shape 8B] [--tensor-parallel-size 2] [--prompts 512] [--tokens 128]

The checkpoint has random weights of a stated shape and is made here. The engine that is measured against runs as `eval`
starts it, compiled where there is a GPU; each engine has a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from stream import SHAPES, random_ids, write_random

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.core.interventions import removal
from orthogonalize.engines.base import EngineOptions
from orthogonalize.engines.reading.stream_worker import BlockEdit
from orthogonalize.engines.reading.streams import READABLE, EngineStreams, Outputs, Wanted
from orthogonalize.engines.vllm import VllmEngine
from orthogonalize.engines.weight_swap import WeightSwap

console = Console()
POSITIONS = 5
ANSWER = 48  # tokens


@click.group(invoke_without_command=True)
@click.option("--shape", type=click.Choice(list(SHAPES)), default="tiny", show_default=True)
@click.option("--layers", type=int, help="Number of blocks; the shape's own by default.")
@click.option("--prompts", default=512, show_default=True)
@click.option("--tokens", default=128, show_default=True, help="Per prompt.")
@click.option("--tensor-parallel-size", default=1, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where the checkpoint is made; removed afterwards.")
@click.pass_context
def main(
    context: click.Context,
    shape: str,
    layers: int | None,
    prompts: int,
    tokens: int,
    tensor_parallel_size: int,
    folder: Path | None,
) -> None:
    """Measure prefill, reading, scoring, answers and swaps at a shape."""
    if context.invoked_subcommand:
        return
    count = layers or SHAPES[shape]["num_hidden_layers"]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        write_random(Path(place), shape, count)
        found: dict[str, float] = {}
        for side in ("own", "reading"):
            words = [side, place, str(prompts), str(tokens), str(tensor_parallel_size)]
            out = subprocess.run(
                [sys.executable, __file__, "side", *words], stdout=subprocess.PIPE, text=True, check=True
            )
            found |= json.loads(out.stdout.splitlines()[-1])
    total = prompts * tokens
    console.print(
        f"{shape} shape, {count} blocks, {prompts} prompts of {tokens} tokens, {tensor_parallel_size} workers"
    )
    for name in ("prefill", "eager", "read", "score"):
        share = f", {found['prefill'] / found[name]:.2f}x the engine's own prefill" if name != "prefill" else ""
        console.print(f"{name}: {found[name]:.2f} s, {total / found[name]:.0f} tokens/s{share}", soft_wrap=True)
    for name in ("answers", "eager answers"):
        console.print(f"{name}: {found[name]:.2f} s, {prompts * ANSWER / found[name]:.0f} new tokens/s")
    console.print(f"swap of one block in and out: {found['swap']:.2f} s; starts {found['start']:.0f} s")


@main.command("side", hidden=True)
@click.argument("side")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("prompts", type=int)
@click.argument("tokens", type=int)
@click.argument("workers", type=int)
def measure_side(side: str, folder: Path, prompts: int, tokens: int, workers: int) -> None:
    """One engine, in this process; prints JSON."""
    ids, options = random_ids(prompts, tokens), EngineOptions(tensor_parallel_size=workers)
    reading = side == "reading"
    extra: dict[str, Any] = READABLE if reading else {"enable_prefix_caching": False}
    start = time.perf_counter()
    with VllmEngine(folder, tokens + 2 * ANSWER, options, skip_tokenizer_init=True, **extra) as engine:
        found = {"start": time.perf_counter() - start}
        found |= measure_reading(engine, folder, ids) if reading else measure_own(engine, ids)
    print(json.dumps(found))


def measure_own(engine: VllmEngine, ids: list[list[int]]) -> dict[str, float]:
    """An engine's own prefill (one new token) and answers."""
    engine.answers(ids[:8], 1)  # warm up
    return {"prefill": seconds(lambda: engine.answers(ids, 1)), "answers": seconds(lambda: engine.answers(ids, ANSWER))}


def measure_reading(engine: VllmEngine, folder: Path, ids: list[list[int]]) -> dict[str, float]:
    """Prefill without hooks, streams of all layers, scores with a map on each request, answers, and a swap."""
    own = measure_own(engine, ids)
    source = open_checkpoint(folder)
    layers, width = source.config["num_hidden_layers"], source.config["hidden_size"]
    streams = EngineStreams(engine, layers, width)
    streams.check()
    directions = torch.nn.functional.normalize(torch.randn(layers, 1, width), dim=-1)
    edits = [BlockEdit(removal(each), frozenset({n}), frozenset({n})) for n, each in enumerate(directions)]
    base = [Wanted(row, base=number) for number, row in enumerate(ids)]
    edited = [Wanted(row, edit=number % layers, base=number) for number, row in enumerate(ids)]

    def read() -> None:
        for _ in streams.read("reading", [Wanted(row) for row in ids], range(layers + 1), POSITIONS):
            pass

    def score() -> None:
        for _ in streams.read("scoring", edited, outputs=Outputs([5, 9]), edits=edits):
            pass

    for _ in streams.read("the base", base, outputs=Outputs((), keep=True)):
        pass
    swap, name = WeightSwap(engine, source), "model.layers.0.mlp.down_proj.weight"

    def swap_in_and_out() -> None:
        swap.apply({name: lambda: 2 * source.read(name)})
        swap.restore()

    return {
        "eager": own["prefill"],
        "eager answers": own["answers"],
        "read": seconds(read),
        "score": seconds(score),
        "swap": seconds(swap_in_and_out),
    }


def seconds(work: Callable[[], Any]) -> float:
    """How long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
