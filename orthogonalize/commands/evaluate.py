"""`eval`: base against edited, on the same prompts, in the same engine, with paired statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..checkpoints.checkpoint import RECIPE, open_checkpoint
from ..core.errors import InPlaceError, OrthogonalizeError
from ..core.journal import Journal
from ..core.locks import exclusive
from ..core.output_folders import REPORT, check_free, complete_folder
from ..core.progress import note
from ..data.prompts import Source
from ..data.refusals import LEAST_TOKENS, refused
from ..edits.recipe import load_recipe
from ..engines.base import ONE_DEVICE, Engine, EngineOptions
from ..engines.registry import ENGINES
from ..engines.shared_base import Weights
from ..engines.weight_swap import WeightSwap
from ..evals.judges.measured_answers import Judgements
from ..evals.metrics import same_kind
from ..evals.origins import check_origins, mismatches
from ..evals.plan import EvalPlan, Measurements
from ..evals.setup import EvalSetup, check_request, prepare
from ..evals.shared_engine import base_weights, check_pair
from ..evals.suites.base import BaseOutputs
from ..evals.suites.registry import DEFAULT_SUITES
from ..models.loading import check_complete
from ..models.names import public_name
from ..models.resolve import find_model, folder_state
from ..reports.model_card import update_card
from ..reports.pages.report_page import write_webpage
from ..reports.schema import Answer, Measures, Report, compare_all, judged_pair, kept_shares
from ..reports.searched import searched
from ..selection.run_folder import load_run
from .merge import checkpoint_of


def _shows(measured: Measurements, key: str, item: int) -> bool | None:
    """Whether an item shows the behaviour, by the series `key`; None if it was not measured or could not be read."""
    value = measured.series[key].values[item] if key in measured.series else None
    return None if value is None else bool(value)


def side_by_side(
    plan: EvalPlan, base: Measurements, edited: Measurements, judgements: tuple[Judgements, Judgements], redact: bool
) -> tuple[list[Answer], int]:
    """Every prompt with both answers, and the number of answers left out because their set is sensitive."""
    answers, left_out = [], 0
    for each in plan.sets:
        if each.name not in edited.answers:
            continue
        if redact and each.sensitive:
            left_out += len(each.items)
            continue
        for i, item in enumerate(each.items):
            before, after = base.answers[each.name][i], edited.answers[each.name][i]
            shown = [_shows(models, f"behaviour.{each.key}", i) for models in (base, edited)]
            judged = {
                name: judged_pair(judgements[0][name][each.name][i], judgements[1][name][each.name][i])
                for name in judgements[0]
            }
            answers.append(
                Answer(
                    set=each.name,
                    category=item.category,
                    prompt=item.text,
                    base=before,
                    edited=after,
                    base_refused=refused(before),
                    edited_refused=refused(after),
                    base_shows=shown[0],
                    edited_shows=shown[1],
                    sensitive=each.sensitive,
                    judges=judged,
                )
            )
    return answers, left_out


@contextmanager
def _engines(
    ready: EvalSetup, edited: Path, weights: Weights | None, distrust: Callable[[], None]
) -> Iterator[tuple[Callable[[], Engine], Callable[[], Engine]]]:
    """Functions that return an engine with the base and then one with the edited checkpoint.

    There is one engine, started on the edited checkpoint; the base's `weights` are swapped in and out. If the engine
    does not hold the edited weights again afterwards, bit for bit, `distrust` is called and an error raised. Without
    `weights`, or if the engine cannot swap weights, base and edited get one engine each.
    """
    open_now: list[Engine] = []
    source = open_checkpoint(edited)

    def close() -> None:
        while open_now:
            open_now.pop().__exit__(None, None, None)

    def start(folder: Path) -> Engine:
        close()
        open_now.append(ready.start(folder).__enter__())
        return open_now[0]

    swapped: list[tuple[WeightSwap, str]] = []  # and the fingerprint of what the engine held before

    def base() -> Engine:
        if weights is None:
            return start(ready.folder)
        running = start(edited)
        swap = WeightSwap(running, source)
        try:
            lacking = swap.first_unswappable(weights)
            if lacking is None:
                held = running.fingerprint()
                swap.apply(weights)
                swapped.append((swap, held))
                return running
        except InPlaceError as error:
            lacking = str(error)
        note(f"this engine cannot swap weights in place ({lacking}), so base and edited each get their own")
        return start(ready.folder)

    def edited_again() -> Engine:
        if not open_now or not swapped:
            return start(edited)
        swap, held = swapped[0]
        swap.restore()
        if open_now[0].fingerprint() != held:
            distrust()
            raise OrthogonalizeError(
                "the engine does not hold the checkpoint's weights after swapping them back; use --separate-engines"
            )
        return open_now[0]

    try:
        yield base, edited_again
    finally:
        close()


def _measure_both(
    ready: EvalSetup, checkpoint: Path, separate: bool, journal: Journal
) -> tuple[Measurements, Measurements, tuple[Judgements, Judgements]]:
    """The measurements of base and edited, and the judgements of their answers."""
    plan, memory = ready.plan, BaseOutputs()
    shared = ENGINES.find(ready.engine).shared and not separate
    weights = base_weights(checkpoint, ready.folder) if shared else None
    state = folder_state(checkpoint)
    base_label, edited_label = ready.label("base", None if weights is None else state), ready.label("edited", state)
    base_steps, edited_steps = plan.steps(base_label, is_base=True), plan.steps(edited_label)
    journal.announce_resume(base_steps + edited_steps)
    with journal.kept():
        with _engines(ready, checkpoint, weights, journal.close) as (base_engine, edited_engine):
            todo = not journal.has(*base_steps)
            before = plan.measure(base_engine() if todo else None, memory, journal, base_label, is_base=True)
            todo = not journal.has(*edited_steps)
            after = plan.measure(edited_engine() if todo else None, memory, journal, edited_label)
        judgements = ready.judgements({"base": before, "edited": after}, journal)
    for key in before.series.keys() & after.series.keys():
        before.series[key], after.series[key] = same_kind(before.series[key], after.series[key])
    return before, after, (judgements["base"], judgements["edited"])


@exclusive
def evaluate(
    checkpoint: Path | str,
    base: Path | str,
    run: Path | str,
    out: Path | str,
    *,
    suites: Sequence[str] = DEFAULT_SUITES,
    engine: str = "vllm",
    max_new_tokens: int = LEAST_TOKENS,
    limit: int | None = None,
    data: Path | str | None = None,
    prompts: Mapping[str, Source] | None = None,
    judges: Sequence[str] = (),
    measure: str | None = None,
    redact: bool = False,
    separate_engines: bool = False,
    allow_other_base: bool = False,
    revision: str | None = None,
    card: bool = True,
    options: EngineOptions = ONE_DEVICE,
    force: bool = False,
) -> Report:
    """Measure `base` and `checkpoint` on the test prompts of `run`; write report.json and report.html to `out`.

    With `card`, the measures also go into the checkpoint's card, if it is the one that `edit` wrote.
    An interrupted call stores its progress beside `out`; call it again to resume.

    Args:
        suites: values of `--suite` (see `evals.suites.registry`).
        engine: `vllm`, or `hf` for transformers.
        max_new_tokens: maximum length of every answer.
        limit: maximum number of items per set.
        data: a folder with local copies of public sets; by default they are read from the Hub.
        prompts: your own prompt sources (see `load_prompts`) by name, answered and counted like the run's.
        judges: names of judge models (see `evals.judges.registry`), or `NAME=MODEL`.
        measure: the run's behaviour measure again, which one that runs code of its own needs.
        redact: leave prompts of sensitive sets, and their answers, out of the report.
        separate_engines: start vLLM for each model instead of swapping weights in one engine.
        allow_other_base: measure even if `base` is not the recipe's, the run is of other weights, or base and
            checkpoint are the same; the report then begins with that.
        options: where the engine runs.

    Raises:
        OrthogonalizeError: something is missing or does not belong together, or the engine does not start.
    """
    called, checkpoint = public_name(str(checkpoint)), checkpoint_of(checkpoint, base)
    base, out, run = str(base), Path(out), Path(run)
    check_free(out, REPORT, force, [checkpoint, Path(base), run])
    check_request(suites, engine, options, data)
    if separate_engines and not ENGINES.find(engine).shared:
        raise OrthogonalizeError(
            f"--separate-engines is redundant: --engine {engine} always loads each model separately"
        )
    found = load_run(run)
    folder = find_model(base, revision)
    check_pair(checkpoint, folder)
    for each in (folder, checkpoint):
        check_complete(each)
    ready = prepare(
        found, folder,
        suites=suites, engine=engine, max_new_tokens=max_new_tokens, limit=limit, data=data, judges=judges,
        options=options, prompts=prompts, measure=measure,
    )  # fmt: skip
    unlike = mismatches(folder, base, found.info, checkpoint)
    check_origins(unlike, allow_other_base, recipe=(checkpoint / RECIPE).is_file())
    plan = ready.plan
    if redact and plan.every_model_answers and not plan.sensitive:
        note("no set is marked sensitive, so nothing is left out; extract --sensitive marks your own prompts")
    recipe = load_recipe(checkpoint) if (checkpoint / RECIPE).is_file() else None
    journal = Journal.beside(out)
    before, after, judgements = _measure_both(ready, checkpoint, separate_engines, journal)
    answers, left_out = side_by_side(plan, before, after, judgements, redact)
    report = Report(
        **ready.description(),
        base_model=public_name(base),
        checkpoint=called,
        edit=recipe.choice.describe() if recipe else None,
        recipe=recipe.fingerprint() if recipe else None,
        redacted=left_out,
        mismatches=unlike,
        base=Measures.of({key: s for key, s in before.series.items() if key in after.series}),
        edited=Measures.of(after.series),
        paired=compare_all(before.series, after.series),
        kept=kept_shares(before.series, after.series),
        search=searched(found.trials, recipe.choice if recipe and not unlike else None),
        answers=answers,
    )
    with complete_folder(out, REPORT, force) as done:
        (done / "report.json").write_text(report.model_dump_json(indent=1) + "\n", "utf-8")
        write_webpage(report, done / "report.html")
    if card and not unlike:
        update_card(checkpoint, report)
    journal.close()
    return report
