"""The time of a sweep of 15 edits in one engine, compared with an engine per edit; and that the answers are the same.

    python benchmarks/sweep.py --run RUN      RUN made by extract from the demo's model

The edits are of all methods and scopes, evenly chosen among those that `sweep` tries. Both sides measure the same
suites on the same prompts, each in processes of their own, timed from start to end. One side is `sweep` itself. The
other is the way without it: for every edit, a process that writes a checkpoint, starts an engine on it and measures
it. The answers are compared as they come from the engines, token by token.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import click
from sides import hear, show, tell

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.commands import sweep as sweeps
from orthogonalize.core.journal import Journal
from orthogonalize.edits.bake import bake
from orthogonalize.engines.registry import open_engine
from orthogonalize.evals import setup as preparation
from orthogonalize.evals.plan import make_plan
from orthogonalize.evals.suites.base import BaseOutputs
from orthogonalize.models.demo_model import planted_model
from orthogonalize.models.loading import load_tokenizer
from orthogonalize.selection.run_folder import load_run
from orthogonalize.selection.variants import Variant, make_variants

SUITES = ("refusal", "behaviour")


def chosen(run: Path, edits: int) -> list[Variant]:
    """`edits` of all that a sweep of `run` tries, evenly spread over methods and scopes."""
    every = make_variants(load_run(run))
    return [every[i * (len(every) - 1) // max(1, edits - 1)] for i in range(edits)]


class Recorded:
    """An engine that records its answers and the time that it took to start."""

    def __init__(self, *arguments: Any) -> None:
        self.engine = open_engine(*arguments)
        self.answered: list[list[list[int]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def __enter__(self) -> Recorded:
        begin = time.perf_counter()
        self.engine.__enter__()
        self.started = time.perf_counter() - begin
        return self

    def __exit__(self, *exc: object) -> None:
        self.engine.__exit__(*exc)

    def answers(self, prompts: Any, max_new_tokens: int) -> list[list[int]]:
        found = self.engine.answers(prompts, max_new_tokens)
        self.answered.append(found)
        return found


@contextmanager
def recorded() -> Iterator[list[Recorded]]:
    """Make `sweep` start recorded engines."""
    opened: list[Recorded] = []

    def opening(*arguments: Any) -> Recorded:
        opened.append(Recorded(*arguments))
        return opened[-1]

    preparation.open_engine = opening
    yield opened


def one_engine(run: Path, edits: int, limit: int, new_tokens: int) -> dict[str, Any]:
    """All edits, by `sweep`."""
    variants = chosen(run, edits)
    sweeps.make_variants = lambda *_: variants
    with recorded() as opened, TemporaryDirectory() as scratch:
        found = sweeps.sweep(
            str(planted_model()), run, Path(scratch) / "out", suites=SUITES, limit=limit, max_new_tokens=new_tokens
        )
    (engine,) = opened
    assert not any(v.refused for v in found.variants)
    return {
        "names": [v.name for v in found.variants],
        "answers": engine.answered[1:], "restored": found.restored, "engine_start_s": engine.started,
        "edit_s": median(v.seconds for v in found.variants),
    }  # fmt: skip


def own_engine(run: Path, edits: int, limit: int, new_tokens: int, number: int) -> dict[str, Any]:
    """One edit, written and served."""
    folder = planted_model()
    tokenizer = load_tokenizer(folder)
    plan = make_plan(load_run(run), tokenizer, SUITES, new_tokens, limit)
    assert plan.answering is not None
    with TemporaryDirectory() as scratch:
        target = Path(scratch) / "edited"
        target.mkdir()
        bake(open_checkpoint(folder), chosen(run, edits)[number].intervention).write(target)
        with Recorded("vllm", target, tokenizer, plan.max_model_len) as engine:
            plan.measure(engine, BaseOutputs(), Journal.beside(Path(scratch) / "none"), "own")
            return {"engine_start_s": engine.started, "answers": engine.answered[0]}


def timed(words: list[str]) -> tuple[dict[str, Any], float]:
    """The result that this program prints when run with `words`, and its seconds."""
    start = time.perf_counter()
    return hear(__file__, *words), time.perf_counter() - start


@click.command()
@click.option("--run", type=click.Path(path_type=Path), required=True)
@click.option("--edits", default=15, show_default=True)
@click.option("--limit", default=8, show_default=True, help="Prompts per side.")
@click.option("--new-tokens", default=16, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Also write the numbers here, as JSON.")
@click.option("--side", hidden=True, help="`all`, or the number of an edit.")
def main(run: Path, edits: int, limit: int, new_tokens: int, out: Path | None, side: str | None) -> None:
    """Measure, and print."""
    if side:
        case = (run, edits, limit, new_tokens)
        tell(one_engine(*case) if side == "all" else own_engine(*case, int(side)))
        return
    words = ["--run", str(run), "--edits", str(edits), "--limit", str(limit), "--new-tokens", str(new_tokens)]
    swept, together = timed([*words, "--side", "all"])
    answers, names = swept.pop("answers"), swept.pop("names")
    alone = [timed([*words, "--side", str(number)]) for number in range(len(names))]
    same = [found["answers"] == answers[number] for number, (found, _) in enumerate(alone)]
    result = {
        "edits": names, "limit": limit, "new_tokens": new_tokens, **swept,
        "same_answers_as_an_engine_of_its_own": f"{sum(same)} of {len(same)}",
        "different": [name for name, equal in zip(names, same, strict=True) if not equal],
        "all_in_one_engine_s": together, "own_engine_start_s": median(found["engine_start_s"] for found, _ in alone),
        "engines_of_their_own_s": sum(seconds for _, seconds in alone),
        "ratio": sum(seconds for _, seconds in alone) / together,
    }  # fmt: skip
    show(result, out)


if __name__ == "__main__":
    main()
