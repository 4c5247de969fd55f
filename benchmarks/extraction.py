"""The time to read activations, compared with the bare forward pass; and memory by the number of prompts.

python benchmarks/extraction.py speed [--prompts 96] [--repeats 5] python benchmarks/extraction.py memory [--counts
200,800,2400]
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import click
import torch
from rich.console import Console

from orthogonalize.architectures.schema import architecture_of
from orthogonalize.data.chat import ChatFormat
from orthogonalize.data.prompts import load_prompts
from orthogonalize.directions.activation_store import record
from orthogonalize.directions.fit import DirectionSettings, find_directions
from orthogonalize.models.activations import batches, pad
from orthogonalize.models.demo_model import planted_model
from orthogonalize.models.loading import load_model, load_tokenizer

console = Console()


def _model_and_ids(count: int):
    folder = planted_model()
    chat = ChatFormat(load_tokenizer(folder))
    prompts = load_prompts("planted:contrast_cooking.jsonl") + load_prompts("planted:contrast_other.jsonl")
    ids = chat.encode_all([p.text for p in prompts])
    return load_model(folder), [ids[i % len(ids)] for i in range(count)], len(chat.positions())


@click.group()
def main() -> None:
    """Extraction benchmarks."""


@main.command()
@click.option("--prompts", default=96, show_default=True)
@click.option("--repeats", default=5, show_default=True)
def speed(prompts: int, repeats: int) -> None:
    """Prompts per second: recording to disk (all layers, the template's tokens), and the bare blocks without a head."""
    model, ids, positions = _model_and_ids(prompts)
    layers = model.config.num_hidden_layers + 1
    decoder = model.get_submodule(architecture_of(model.config.to_dict()).decoder)

    def bare() -> None:
        with torch.inference_mode():
            for group in batches(ids):
                padded, _ = pad([ids[i] for i in group], model.device)
                decoder(input_ids=padded, use_cache=False)

    def recorded() -> None:
        with tempfile.TemporaryDirectory() as folder:
            record(model, {"positive.train": ids}, positions, layers, Path(folder), "benchmark")

    bare()
    ratios = []
    for _ in range(repeats):
        times = []
        for function in (bare, recorded):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    console.print(
        f"{prompts} prompts, {positions} positions, {layers} streams: recording runs at {median(ratios):.2f}x of the "
        f"bare forward pass (median of {repeats} pairs; {min(ratios):.2f} to {max(ratios):.2f})"
    )


@main.command()
@click.option("--counts", default="200,800,2400", show_default=True)
def memory(counts: str) -> None:
    """Peak memory of recording and diff-in-means, in one process per number of prompts."""
    for count in counts.split(","):
        out = subprocess.run([sys.executable, __file__, "peak", count], check=True, capture_output=True, text=True)
        console.print(out.stdout.strip())


@main.command(hidden=True)
@click.argument("count", type=int)
def peak(count: int) -> None:
    """One measurement of `memory`."""
    model, ids, positions = _model_and_ids(count)
    layers = model.config.num_hidden_layers + 1
    with tempfile.TemporaryDirectory() as folder:
        sets = {f"{side}.train": ids for side in ("positive", "negative")} | {
            f"{side}.spare": [] for side in ("positive", "negative")
        }
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        recording = record(model, sets, positions, layers, Path(folder), "benchmark")
        settings = DirectionSettings(("dim",), None, "newton", "logistic", 0, 1)
        find_directions(recording, tuple(range(-positions, 0)), layers, settings, torch.device("cpu"))
        size = recording.file.stat().st_size
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{count} prompts per side: peak {grown / 1024:.0f} MiB above the loaded model; {size / 1e6:.0f} MB on disk")


if __name__ == "__main__":
    main()
