"""A sweep of 15 edits in one engine beside an engine for every edit: seconds, and the same answers.

Both sides measure the same suites on the same prompts, each in processes of their own, timed from start to
end. The second side is what there is without a sweep: a process that writes a checkpoint, starts an
engine on it and measures it. As that is slow, only some edits are timed, and all are taken to need their median.

    PYTHONPATH=. python benchmarks/sweep.py --run RUN      RUN made by extract from the demo's model
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import click
from sides import hear, show, tell

from orthogonalize.baking import bake
from orthogonalize.checkpoint import open_checkpoint
from orthogonalize.embedded import planted_model
from orthogonalize.engines import WeightSwap
from orthogonalize.launch import open_engine
from orthogonalize.models import load_tokenizer
from orthogonalize.plans import make_plan
from orthogonalize.run import load_run
from orthogonalize.serving import common_folder, edited_weights
from orthogonalize.suites import Memory
from orthogonalize.variants import make_variants


class Case:
    """What both sides need to measure the run's first edits."""

    def __init__(self, run: Path, edits: int, limit: int, new_tokens: int) -> None:
        folder, found = planted_model(), load_run(run)
        self.source, self.tokenizer = open_checkpoint(folder), load_tokenizer(folder)
        self.plan = make_plan(found, self.tokenizer, ["refusal", "behaviour"], new_tokens, limit)
        self.interventions = [variant.intervention for variant in make_variants(found)[:edits]]

    def engine(self, folder: Path):
        return open_engine("vllm", folder, self.tokenizer, self.plan.max_model_len)

    def answers(self, engine) -> dict[str, list[str]]:
        assert self.plan.answering is not None
        memory = Memory()
        self.plan.answering.measure(engine, memory)
        return memory.answers


def one_engine(case: Case) -> dict[str, Any]:
    """All edits, swapped in place."""
    plans = [bake(case.source, intervention) for intervention in case.interventions]
    answers, swaps, measuring = [], [], []
    begin = time.perf_counter()
    with common_folder(case.source, plans) as common, case.engine(common) as engine:
        started = time.perf_counter() - begin
        swap = WeightSwap(engine, open_checkpoint(common))
        before = engine.fingerprint()
        case.answers(engine)
        for edit in plans:
            start = time.perf_counter()
            swap.apply(edited_weights(edit))
            swaps.append(time.perf_counter() - start)
            answers.append(case.answers(engine))
            measuring.append(time.perf_counter() - start - swaps[-1])
        swap.restore()
        restored = engine.fingerprint() == before
    return {
        "answers": answers, "restored": restored, "engine_start_s": started, "swap_s": median(swaps),
        "measuring_s": median(measuring),
    }  # fmt: skip


def own_engine(case: Case, number: int) -> dict[str, Any]:
    """One edit, written and served."""
    with TemporaryDirectory() as scratch:
        target = Path(scratch) / "edited"
        target.mkdir()
        bake(case.source, case.interventions[number]).write(target)
        written = time.perf_counter()
        with case.engine(target) as engine:
            return {"engine_start_s": time.perf_counter() - written, "answers": case.answers(engine)}


def timed(words: list[str]) -> tuple[dict[str, Any], float]:
    """What this program tells when run with `words`, and its seconds."""
    start = time.perf_counter()
    return hear(__file__, *words), time.perf_counter() - start


@click.command()
@click.option("--run", type=click.Path(path_type=Path), required=True)
@click.option("--edits", default=15, show_default=True)
@click.option("--fresh", default=3, show_default=True, help="Edits that are also timed with an engine of their own.")
@click.option("--limit", default=8, show_default=True, help="Prompts a side.")
@click.option("--new-tokens", default=16, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Also write the numbers here, as JSON.")
@click.option("--side", hidden=True, help="`all`, or the number of an edit.")
def main(run: Path, edits: int, fresh: int, limit: int, new_tokens: int, out: Path | None, side: str | None) -> None:
    """Measure, and print."""
    if side:
        case = Case(run, edits, limit, new_tokens)
        tell(one_engine(case) if side == "all" else own_engine(case, int(side)))
        return
    words = ["--run", str(run), "--edits", str(edits), "--limit", str(limit), "--new-tokens", str(new_tokens)]
    swept, together = timed([*words, "--side", "all"])
    answers = swept.pop("answers")
    starts, each, same = [], [], []
    for number in [round(n * (len(answers) - 1) / max(1, fresh - 1)) for n in range(fresh)]:
        alone, seconds = timed([*words, "--side", str(number)])
        starts.append(alone["engine_start_s"])
        each.append(seconds)
        same.append(alone["answers"] == answers[number])
    result = {
        "edits": len(answers), "limit": limit, "new_tokens": new_tokens, **swept,
        "same_answers_as_an_engine_of_its_own": f"{sum(same)} of {len(same)}",
        "all_in_one_engine_s": together, "own_engine_start_s": median(starts), "own_engine_s": median(each),
        "ratio": median(each) * len(answers) / together,
    }  # fmt: skip
    show(result, out)


if __name__ == "__main__":
    main()
