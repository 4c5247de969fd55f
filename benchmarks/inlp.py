"""The time of this package's INLP, compared with the published loop in one process.

    python benchmarks/inlp.py --case cpu-small      155 pairs, d = 576, 153 samples
    python benchmarks/inlp.py --case cpu-large      d = 4096, 256 samples
    python benchmarks/inlp.py --case gpu            160 pairs, d = 4096, 256 samples

The published loop (Ravfogel et al. 2020, as run on refusal by eliroc98/refusal_direction) takes one (position, layer)
pair after the other. Each classifier is fitted by L-BFGS in all d dimensions in float32; then the sum of all rowspace
projections, d x d, is decomposed (once for its rank, once for its singular vectors), and the original data are
projected off its row space. Both sides here solve the same objective with a free intercept on the same split, and
stop by the same rule, under 0.55 on the held-out samples.

The published loop fits activations as they are, and their large common mean makes L-BFGS slow: often it ends at its
200 steps, short of the solution. So it is run twice, as published and once more with the mean subtracted first, which
changes no solution. The second is the fairer comparison, and its directions are compared.

As the published loop is slow, only a few of its classifiers are timed. Ratios are of the median seconds per
classifier, the one that ends the search included; both sides run the same number. Processor time is shown beside wall
time, since other work on the machine stretches the latter.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import binary_cross_entropy_with_logits

from orthogonalize.directions.inlp.nullspace import MIN_ACCURACY, C, Subspaces, inlp, stratified_split

MOST = 100  # classifiers, as published
COMPARED = 5  # directions
AGREEMENT = 0.999  # the least |cos| of the two sides' directions
AXES = 200  # with more variance than the rest

console = Console(width=120, highlight=False)


@dataclass(frozen=True)
class Case:
    """A problem, and how much of the published loop is timed on it."""

    pairs: int
    width: int
    sides: tuple[int, int]  # samples a side, a fifth of which is held out
    timed_pairs: int  # by the published loop
    timed: int  # classifiers of each of them, from the first; from MOST on, all until it stops
    target: int
    device: str = "cpu"


CASES = {
    "cpu-small": Case(155, 576, (96, 95), timed_pairs=3, timed=MOST, target=200),
    "cpu-large": Case(16, 4096, (160, 160), timed_pairs=1, timed=2, target=1_000),
    "gpu": Case(160, 4096, (160, 160), timed_pairs=2, timed=4, target=10_000, device="cuda"),
}


@dataclass(frozen=True)
class Span:
    """Seconds on the wall, and of this process's threads on all processors."""

    wall: float
    cpu: float

    def __sub__(self, other: Span) -> Span:
        return Span(self.wall - other.wall, self.cpu - other.cpu)

    def over(self, parts: float) -> Span:
        return Span(self.wall / parts, self.cpu / parts)

    def to(self, other: Span) -> Span:
        return Span(self.wall / other.wall, self.cpu / other.cpu)


@dataclass
class Sequential:
    """The published loop on one pair: classifiers' unit weights in order, and the seconds of each timed one."""

    weights: list[torch.Tensor] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    fits: list[Span] = field(default_factory=list)
    ranks: list[Span] = field(default_factory=list)  # the singular values, for the rank alone
    decompositions: list[Span] = field(default_factory=list)
    timed: list[Span] = field(default_factory=list)


def activations(case: Case, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sides [n, pairs, d] and [m, pairs, d] in float32 that look like activations of a residual stream.

    The variances of their principal axes fall as a power law, a few dimensions stand out by far, all
    samples share a large mean, and the sides differ along several directions, each by less than the
    one before, to a degree that varies from sample to sample. INLP finds about 5 to 20 directions.
    """
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.empty(n, case.pairs, case.width) for n in case.sides]
    power = torch.arange(1.0, AXES + 1)[:, None] ** -1  # of the standard deviations
    gaps = 3 * 0.8 ** torch.arange(8.0)
    for pair in range(case.pairs):
        axes = power * torch.randn(AXES, case.width, generator=generator)
        scale = 0.02 * torch.exp(0.5 * torch.randn(case.width, generator=generator))
        centre = 2 * torch.randn(case.width, generator=generator)
        loud = torch.randperm(case.width, generator=generator)[:4]
        scale[loud] = 10
        centre[loud] *= 50
        toward = torch.linalg.qr(torch.randn(case.width, len(gaps), generator=generator)).Q.mT
        for side, sign in zip(sides, (1, -1), strict=True):
            n = len(side)
            degrees = 1 + 2 * torch.randn(n, len(gaps), generator=generator)
            noise = torch.randn(n, AXES, generator=generator) @ axes
            noise += scale * torch.randn(n, case.width, generator=generator)
            side[:, pair] = centre + noise + sign * (degrees * gaps) @ toward
    return sides[0].to(device), sides[1].to(device)


def now(device: torch.device) -> Span:
    """The clocks, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Span(time.perf_counter(), time.process_time())


def fit(samples: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """L-BFGS with the published settings on `mean(log loss) + |w|^2 / (2 C n)`: weights [d] and intercept [1]."""
    weight = torch.zeros(samples.shape[1], device=samples.device, requires_grad=True)
    intercept = torch.zeros(1, device=samples.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, intercept], lr=1.0, max_iter=200, tolerance_grad=1e-5)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits(samples @ weight + intercept, labels)
        value = value + weight.pow(2).sum() / (2 * C * len(labels))
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), intercept.detach()


def sequential(positive: torch.Tensor, negative: torch.Tensor, timed: int, centred: bool = False) -> Sequential:
    """The published loop on one pair, [n, d] and [m, d] in float32; `centred` subtracts the mean first.

    After `timed` classifiers it goes on, untimed, until there are enough directions to compare, and
    projects by QR then, without waiting for the SVD.
    """
    device, width = positive.device, positive.shape[-1]
    fitted, held = (rows.to(device) for rows in stratified_split(len(positive), len(negative), 0))
    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).to(device)
    original = torch.cat([positive, negative])
    if centred:  # as the intercept is free, this changes no solution
        original = original - original[fitted].mean(0)
    samples = original
    done = Sequential()
    total = torch.zeros(width, width, device=device)
    identity = torch.eye(width, device=device)
    for step in range(max(timed, COMPARED)):
        start = now(device)
        weight, intercept = fit(samples[fitted], labels[fitted])
        right = (samples[held] @ weight + intercept > 0) == (labels[held] > 0)
        accuracy = right.float().mean().item()
        fit_end = now(device)
        done.accuracies.append(accuracy)
        done.weights.append(weight / weight.norm())
        if step < timed:
            row = torch.linalg.svd(weight[None], full_matrices=False).Vh
            total = total + row.mT @ row
            values = torch.linalg.svdvals(total)
            # Published as a fixed 1e-7, which is under float32's rounding of a d x d matrix.
            rank = int((values > values[0] * width * torch.finfo(values.dtype).eps).sum())
            rank_end = now(device)
            basis = torch.linalg.svd(total, full_matrices=False).Vh[:rank]
            samples = original @ (identity - basis.mT @ basis)
            end = now(device)
            done.fits.append(fit_end - start)
            done.ranks.append(rank_end - fit_end)
            done.decompositions.append(end - rank_end)
            done.timed.append(end - start)
        else:
            basis = torch.linalg.qr(torch.stack(done.weights).mT).Q.mT
            samples = original - (original @ basis.mT) @ basis
        if accuracy < MIN_ACCURACY:
            break
    return done


def ours(positive: torch.Tensor, negative: torch.Tensor, repeats: int) -> tuple[Subspaces, list[Span]]:
    """What `inlp` finds for all pairs, and its seconds in each of `repeats` runs after one to warm up."""
    fitted, _ = stratified_split(len(positive), len(negative), 0)
    most = min(MOST, len(fitted) - 1, positive.shape[-1])
    spans = []
    for _ in range(repeats + 1):
        start = now(positive.device)
        found = inlp(positive, negative, max_rank=most)
        spans.append(now(positive.device) - start)
    assert isinstance(found, Subspaces)
    return found, spans[1:]


def measure(name: str, case: Case, device: torch.device, repeats: int, threads: int) -> dict[str, Any]:
    """Run both sides of one case; returns all measurements, as they go into the JSON."""
    load = [os.getloadavg()]
    positive, negative = activations(case, device)
    with console.status(f"{name}: ours"):
        found, spans = ours(positive, negative, repeats)
    torch.set_num_threads(threads)
    sequential(positive[:, 0, :32], negative[:, 0, :32], timed=2)  # loads the libraries
    timed_pairs = [round(i * (case.pairs - 1) / max(1, case.timed_pairs - 1)) for i in range(case.timed_pairs)]
    runs, centred_runs = [], []
    for pair in timed_pairs:
        with console.status(f"{name}: published loop, pair {pair} (slow)"):
            sides = positive[:, pair].contiguous(), negative[:, pair].contiguous()
            runs.append(sequential(*sides, case.timed))
            centred_runs.append(sequential(*sides, case.timed, centred=True))
    load.append(os.getloadavg())

    counts = [s.rank + (s.stopped_at is not None) for s in found]  # the one that ended the search was fitted too
    total = middle(spans)
    each = total.over(sum(counts))
    timed = [s for run in runs for s in run.timed]
    their_each = middle(timed)
    centred_each = middle([s for run in centred_runs for s in run.timed])
    for_rank = middle([s for run in runs for s in run.ranks])
    cosines = [
        [abs((a.double() @ b).item()) for a, b in zip(run.weights[:COMPARED], found[pair].basis, strict=False)]
        for run, pair in zip(centred_runs, timed_pairs, strict=True)
    ]
    return {
        "case": name,
        "device": describe(device),
        "torch": torch.__version__,
        "pairs": case.pairs,
        "width": case.width,
        "samples": case.sides,
        "fitted": len(stratified_split(*case.sides, 0)[0]),
        "target": case.target,
        "load_average": load,
        "ours": {
            "runs": [asdict(s) for s in spans],
            "all_pairs": asdict(total),
            "a_classifier": asdict(each),
            "classifiers": sum(counts),
            "mean_count": mean(counts),
            "mean_count_on_timed_pairs": mean(counts[pair] for pair in timed_pairs),
            "accuracies": [found[pair].accuracies for pair in timed_pairs],
        },
        "published": {
            "threads": threads,
            "timed_pairs": timed_pairs,
            "timed_classifiers": len(timed),
            "all_pairs_scaled": asdict(their_each.over(1 / sum(counts))),
            "a_classifier": asdict(their_each),
            "parts": {
                "fit by L-BFGS": asdict(middle([s for run in runs for s in run.fits])),
                "singular values, for the rank": asdict(for_rank),
                "SVD and projection": asdict(middle([s for run in runs for s in run.decompositions])),
            },
            "mean_count_on_timed_pairs": mean(len(run.accuracies) for run in runs) if case.timed >= MOST else None,
            "accuracies": [run.accuracies for run in runs],
        },
        "ratio": asdict(their_each.to(each)),
        "ratio_with_one_svd": asdict((their_each - for_rank).to(each)),
        "ratio_with_the_mean_off": asdict(centred_each.to(each)),
        "cosines": cosines,
    }


def middle(spans: Sequence[Span]) -> Span:
    """The median of each clock."""
    return Span(median(s.wall for s in spans), median(s.cpu for s in spans))


def describe(device: torch.device) -> str:
    """The processor, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} processors"


def show(result: dict[str, Any]) -> None:
    """Print one case."""
    mine, theirs, load = result["ours"], result["published"], result["load_average"]
    positive, negative = result["samples"]
    table = Table(
        title=f"{result['case']}: {result['pairs']} pairs, d = {result['width']}, {positive} + {negative} samples, "
        f"{result['fitted']} of them fitted\n{result['device']}, torch {result['torch']}"
    )
    for column in ("medians", "published", "ours", "ratio", "target"):
        table.add_column(column, justify="left" if column == "medians" else "right")
    for what, key, aim in (("a classifier", "a_classifier", f"{result['target']:,}x"), ("all pairs", "all_pairs", "")):
        for clock, label in (("wall", "wall time"), ("cpu", "processor time")):
            table.add_row(
                f"{label}, {what}",
                seconds(theirs.get(key, theirs.get(f"{key}_scaled"))[clock]),
                seconds(mine[key][clock]),
                f"{result['ratio'][clock]:,.0f}x",
                aim,
            )
    table.add_row("wall time, had it taken one SVD", "", "", f"{result['ratio_with_one_svd']['wall']:,.0f}x")
    table.add_row("wall time, with the mean off first", "", "", f"{result['ratio_with_the_mean_off']['wall']:,.0f}x")
    for part, span in theirs["parts"].items():
        table.add_row(f"  wall time of {part}", seconds(span["wall"]))
    counted = theirs["mean_count_on_timed_pairs"]
    table.add_row(
        "mean classifiers, the timed pairs",
        "cut short" if counted is None else f"{counted:.2f}",
        f"{mine['mean_count_on_timed_pairs']:.2f}",
    )
    table.add_row("mean classifiers, all pairs", "", f"{mine['mean_count']:.2f}")
    console.print(table)
    for pair, cosines in zip(theirs["timed_pairs"], result["cosines"], strict=True):
        console.print(f"pair {pair}: |cos| of the first directions " + " ".join(f"{c:.5f}" for c in cosines))
    console.print(
        f"Ours: medians of {len(mine['runs'])} runs on all pairs. Published: {theirs['timed_classifiers']} classifiers "
        f"(pair {', '.join(map(str, theirs['timed_pairs']))}) timed, with {theirs['threads']} threads; all pairs "
        f"scaled from their median to ours' {mine['classifiers']:,} classifiers. "
        f"Load average {load[0][0]:.1f} before, {load[1][0]:.1f} after.\n"
    )


def seconds(value: float) -> str:
    return f"{value:,.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 0.1 else f"{value * 1e3:.3f} ms"


@click.command()
@click.option("--case", "names", multiple=True, type=click.Choice(list(CASES)), help="Default: all the device can.")
@click.option("--device", default=None, help="Instead of the case's own.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1), help="Runs of ours that are timed.")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1), help="Of the published loop.")
@click.option("--classifiers", type=click.IntRange(1), help="The most classifiers of the published loop per pair.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write all measurements here.")
def main(
    names: tuple[str, ...], device: str | None, repeats: int, threads: int, classifiers: int | None, path: Path | None
) -> None:
    """Time INLP and the published loop; fail if their first directions differ."""
    results = []
    for name in names or [n for n, case in CASES.items() if case.device == "cpu" or torch.cuda.is_available()]:
        case = CASES[name]
        case = replace(case, timed=min(case.timed, classifiers or MOST))
        results.append(measure(name, case, torch.device(device or case.device), repeats, threads))
        show(results[-1])
        if path:
            path.write_text(json.dumps(results, indent=2) + "\n")
    if any(cosine < AGREEMENT for result in results for pair in result["cosines"] for cosine in pair):
        raise click.ClickException(f"directions differ: |cos| under {AGREEMENT}")


if __name__ == "__main__":
    main()
