"""The time to score candidates, compared with the plain loop over them, which gives the same scores.

    python benchmarks/selection.py [--prompts 12] [--layers 3] [--repeats 3]

The loop does what the published pipeline does: for every (method, position, layer) it sets hooks and runs the whole
model on the val prompts, once for bypass, once for KL and once for each multiplier of induce. Layers are spread
evenly over the model, so that the saving of starting at the edited layer is the average one.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import click
import torch
from rich.console import Console

from orthogonalize.core.interventions import shift
from orthogonalize.data.chat import ChatFormat
from orthogonalize.data.prompts import load_prompts
from orthogonalize.directions.direction_set import Directions
from orthogonalize.directions.inlp.nullspace import inlp
from orthogonalize.directions.leace import leace
from orthogonalize.models.activations import all_activations, pad
from orthogonalize.models.demo_model import planted_model
from orthogonalize.models.hooks import input_shifted, layer_projected
from orthogonalize.models.loading import load_model, load_tokenizer
from orthogonalize.models.logprobs import smoothed_kl
from orthogonalize.selection.candidates import Candidate, Mean
from orthogonalize.selection.readers.direction_scoring import MULTIPLIERS
from orthogonalize.selection.readers.meters import ResidentMeter
from orthogonalize.selection.readers.resident_scores import resident_scoring
from orthogonalize.selection.readouts import FirstToken, behaviour_score

METHODS = ("dim", "inlp", "leace")
BATCH = 32


def probabilities(model: Any, ids: list[list[int]]) -> torch.Tensor:
    """First-token probabilities, the plain way: whole batches through the whole model, head and all."""
    parts = []
    for start in range(0, len(ids), BATCH):
        padded, lengths = pad(ids[start : start + BATCH], model.device)
        with torch.inference_mode():
            logits = model(input_ids=padded, use_cache=False).logits
        parts.append(logits[torch.arange(len(padded)), lengths - 1].float().softmax(-1))
    return torch.cat(parts)


def plain_loop(
    model: Any, positive: Any, negative: Any, directions: Directions, layers: list[int], tokens: list[int]
) -> list[tuple[float, float, float]]:
    """(bypass, induce, kl) of every candidate, one after the other."""
    base = probabilities(model, negative)
    scores = []
    for layer in layers:
        for method in METHODS:
            for position in directions.positions:
                affine = directions.removal(method, position, layer)
                first = directions.basis(method, position, layer)
                if affine is None or first is None:
                    continue
                with layer_projected(model, layer, affine):
                    bypass = behaviour_score(probabilities(model, positive), tokens).mean().item()
                    kl = smoothed_kl(base, probabilities(model, negative)).mean().item()
                length = directions.mean_diff(position, layer).norm()
                induced = []
                for multiplier in MULTIPLIERS:
                    with input_shifted(model, layer, shift(multiplier * length * first[0])):
                        induced.append(behaviour_score(probabilities(model, negative), tokens).mean().item())
                scores.append((bypass, median(induced), kl))
    return scores


def ours(
    model: Any, positive: Any, negative: Any, directions: Directions, layers: list[int], tokens: list[int]
) -> list[Candidate]:
    """The same candidates as `score_candidates` scores them, streams of the unedited model included."""
    meter = ResidentMeter(model, {"positive": positive, "negative": negative}, FirstToken(tuple(tokens)))
    scoring = resident_scoring(meter, directions, everywhere=False)
    induced: dict[tuple[int, int], Mean] = {}
    return [
        c for layer in layers for method in METHODS for c in scoring.layer(method, layer, directions.positions, induced)
    ]


@click.command()
@click.option("--prompts", default=12, show_default=True, help="Val prompts per side.")
@click.option("--layers", default=3, show_default=True, help="How many layers, evenly spread.")
@click.option("--repeats", default=3, show_default=True)
def main(prompts: int, layers: int, repeats: int) -> None:
    """Print times, their ratio, and the largest difference of a score."""
    folder = planted_model()
    model, chat = load_model(folder, dtype=torch.float32), ChatFormat(load_tokenizer(folder))
    sides = [
        chat.encode_all([p.text for p in load_prompts(f"planted:contrast_{n}.jsonl")]) for n in ("cooking", "other")
    ]
    positions = tuple(chat.positions())
    train = [all_activations(model, side[:40], len(positions)) for side in sides]
    found = {(positions[i], layer): s for (i, layer), s in inlp(train[0], train[1], 5).items()}  # type: ignore[union-attr]
    eraser = leace(train[0], train[1])
    directions = Directions(positions, eraser.u, found, eraser.mean, eraser.v)
    count = directions.layer_count
    picked = [round((i + 0.5) * count / layers) for i in range(layers)]
    arguments = (model, sides[0][40 : 40 + prompts], sides[1][40 : 40 + prompts], directions, picked, [57])
    walls: dict[str, list[float]] = {"plain": [], "ours": []}
    cpus: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(repeats):
        for name, function in (("ours", ours), ("plain", plain_loop)):
            wall, cpu = time.perf_counter(), time.process_time()
            result = function(*arguments)
            walls[name].append(time.perf_counter() - wall)
            cpus[name].append(time.process_time() - cpu)
            if name == "ours":
                scored = [(c.bypass, c.induce, c.kl) for c in result]  # type: ignore[union-attr]
    plain = [tuple(row) for row in result]  # type: ignore[arg-type]
    gap = max(abs(a - b) for x, y in zip(scored, plain, strict=True) for a, b in zip(x, y, strict=True))
    console = Console()
    console.print(
        f"{len(plain)} candidates (layers {picked}), {prompts} prompts a side, {torch.get_num_threads()} threads"
    )
    for label, times in (("wall", walls), ("processor", cpus)):
        ratio = median(p / o for p, o in zip(times["plain"], times["ours"], strict=True))
        console.print(
            f"{label} time: plain loop {median(times['plain']):.1f} s, ours {median(times['ours']):.1f} s: {ratio:.2f}x"
        )
    console.print(f"largest difference of a score: {gap:.1e}")


if __name__ == "__main__":
    main()
