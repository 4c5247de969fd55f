"""A sweep of 15 edits in one engine beside an engine start for every edit: seconds, and the same answers.

Both sides measure the same suites on the same prompts. The second writes a checkpoint and starts an
engine for each edit; as that is slow, only some edits are timed and the rest taken as their median.

    PYTHONPATH=. python benchmarks/sweep.py --run RUN      RUN made by extract from the demo's model
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import click

from orthogonalize.baking import bake
from orthogonalize.checkpoint import open_checkpoint
from orthogonalize.embedded import planted_model
from orthogonalize.engines import WeightSwap, open_engine
from orthogonalize.models import load_tokenizer
from orthogonalize.plans import make_plan
from orthogonalize.run import load_run
from orthogonalize.serving import common_folder, edited_weights
from orthogonalize.suites import Memory
from orthogonalize.variants import make_variants


@click.command()
@click.option("--run", type=click.Path(path_type=Path), required=True)
@click.option("--edits", default=15, show_default=True)
@click.option("--fresh", default=3, show_default=True, help="Edits that are also timed with an engine of their own.")
@click.option("--limit", default=8, show_default=True, help="Prompts a side.")
@click.option("--new-tokens", default=16, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Also write the numbers here, as JSON.")
def main(run: Path, edits: int, fresh: int, limit: int, new_tokens: int, out: Path | None) -> None:
    """Measure, and print."""
    folder, found = planted_model(), load_run(run)
    source, tokenizer = open_checkpoint(folder), load_tokenizer(folder)
    plan = make_plan(found, tokenizer, ["refusal", "behaviour"], new_tokens, limit)
    assert plan.answering is not None
    variants = make_variants(found)[:edits]
    plans = [bake(source, v.intervention) for v in variants]
    answers, swaps, measuring = [], [], []
    begin = time.perf_counter()
    with (
        common_folder(source, plans) as common,
        open_engine("vllm", common, tokenizer, plan.max_model_len) as engine,
    ):
        started = time.perf_counter() - begin
        swap = WeightSwap(engine, open_checkpoint(common))
        before = engine.fingerprint()
        plan.answering.measure(engine, Memory())
        for edit in plans:
            start = time.perf_counter()
            swap.apply(edited_weights(edit))
            swaps.append(time.perf_counter() - start)
            memory = Memory()
            plan.answering.measure(engine, memory)
            measuring.append(time.perf_counter() - start - swaps[-1])
            answers.append(memory.answers)
        swap.restore()
        restored = engine.fingerprint() == before
    one_engine = time.perf_counter() - begin

    each, starts, same = [], [], []
    for i in [round(n * (len(plans) - 1) / max(1, fresh - 1)) for n in range(fresh)]:
        with TemporaryDirectory() as scratch:
            start = time.perf_counter()
            target = Path(scratch) / "edited"
            target.mkdir()
            plans[i].write(target)
            written = time.perf_counter()
            with open_engine("vllm", target, tokenizer, plan.max_model_len) as engine:
                starts.append(time.perf_counter() - written)
                memory = Memory()
                plan.answering.measure(engine, memory)
            each.append(time.perf_counter() - start)
            same.append(memory.answers == answers[i])
    result = {
        "edits": len(plans), "limit": limit, "new_tokens": new_tokens, "restored": restored,
        "same_answers_as_a_fresh_engine": f"{sum(same)} of {len(same)}",
        "one_engine_s": one_engine, "engine_start_s": started, "swap_s": median(swaps),
        "measuring_s": median(measuring), "fresh_start_s": median(starts), "fresh_edit_s": median(each),
        "ratio": median(each) * len(plans) / one_engine, "ratio_start_to_swap": median(starts) / median(swaps),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
