"""`sweep`: every method over every scope, in one engine: the comparison table of the papers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from .architectures import architecture_of
from .baking import Bake, bake
from .checkpoint import Checkpoint, open_checkpoint
from .comparison import Semantics, Sweep, Swept, effect_key, harm_key, pareto
from .engines import ONE_DEVICE, Engine, EngineName, EngineOptions, TransformersEngine, WeightSwap
from .errors import NoNumberError, OrthogonalizeError
from .evaluation import (
    add_opinions,
    ask_judges,
    check_engine,
    context_length,
    data_state,
    engine_version,
    folder_state,
    run_state,
)
from .hooks import input_shifted, layer_projected
from .interventions import centred
from .journal import Journal, fingerprint_of
from .judging import ready_judges
from .launch import open_engine
from .models import find_model, load_tokenizer, public_name
from .outputs import Kind, check_free, complete_folder
from .plans import DEFAULT_SUITES, Measured, Plan, make_plan
from .progress import note, track
from .recipe import store_maps
from .report import Measures, compare_all
from .run import load_run
from .serving import common_folder, edited_weights
from .suites import Memory
from .sweep_plots import write_pareto_plot
from .variants import SCOPES, Variant, make_variants

SWEEP = Kind("sweep.json", frozenset({"sweep.json", "pareto.png"}))


@contextmanager
def residual_hooks(model: Any, variant: Variant) -> Iterator[None]:
    """The reference's own hooks: the input and both outputs of every block in scope (actadd: inputs only)."""
    with ExitStack() as stack:
        for layer in variant.layers:
            around = input_shifted if variant.choice.method == "actadd" else layer_projected
            stack.enter_context(around(model, layer, variant.on_stream))
        yield


class _Runner:
    """Measures the base, then every variant, each step through the journal."""

    def __init__(self, plan: Plan, journal: Journal) -> None:
        self.plan, self.journal, self.memory = plan, journal, Memory()
        self.measured: dict[str, Measured] = {}

    def base(self, engine: Callable[[], Engine]) -> None:
        done = self.journal.has(*self.plan.steps("base", is_base=True))
        running = None if done else engine()
        self.measured["base"] = self.plan.measure(running, self.memory, self.journal, "base", is_base=True)

    def variant(self, variant: Variant, engine: Callable[[], Engine]) -> float:
        """Seconds that it took: to swap and to measure."""
        done = self.journal.has(*self.plan.steps(variant.name))
        start = time.perf_counter()
        running = None if done else engine()
        self.measured[variant.name] = self.plan.measure(running, self.memory, self.journal, variant.name)
        return float(self.journal.step(f"{variant.name}/seconds", lambda: time.perf_counter() - start))


def _plans(source: Checkpoint, variants: Sequence[Variant]) -> tuple[dict[str, Bake], dict[str, str]]:
    """The bake plan of every variant, and why those that have none cannot be baked."""
    plans, refused = {}, {}
    for variant in variants:
        try:
            plans[variant.name] = bake(source, variant.intervention)
        except OrthogonalizeError as error:
            refused[variant.name] = str(error)
    return plans, refused


def sweep(
    model: str,
    run: Path | str,
    out: Path | str,
    *,
    suites: Sequence[str] = DEFAULT_SUITES,
    methods: Sequence[str] = (),
    scopes: Sequence[str] = SCOPES,
    engine: EngineName = "vllm",
    semantics: Semantics = "weights",
    max_new_tokens: int = 100,
    limit: int | None = None,
    data: Path | str | None = None,
    judges: Sequence[str] = (),
    revision: str | None = None,
    options: EngineOptions = ONE_DEVICE,
    force: bool = False,
) -> Sweep:
    """Measure every edit that `run` allows against `model`; write sweep.json and pareto.png to `out`.

    The engine starts once, on the base; each edit's tensors are computed as `edit` computes them, swapped
    in place, and swapped out again. A sweep that was cut off goes on where it stopped.

    Args:
        methods: of `variants.methods()`; all by default.
        scopes: as `edit` takes them, but for `from:`.
        semantics: `weights`, or `residual` (with `engine="hf"`): the reference's own hooks on block inputs
            and outputs, for those who must reproduce its numbers.

    Others as for `evaluate`.

    Raises:
        OrthogonalizeError: something is missing, or the engine does not start.
    """
    out, run = Path(out), Path(run)
    check_free(out, SWEEP, force, [Path(model), run])
    if semantics == "residual" and engine != "hf":
        raise OrthogonalizeError("--semantics residual hooks a transformers model; add --engine hf")
    found = load_run(run)
    folder = find_model(model, revision)
    check_engine(engine)
    source = open_checkpoint(folder)
    tokenizer = load_tokenizer(folder)
    data = None if data is None else Path(data)
    plan = make_plan(found, tokenizer, suites, max_new_tokens, limit, data, context_length(folder))
    ready = ready_judges(judges)
    if ready and not plan.answers_count:
        raise OrthogonalizeError("judges need answers; add --suite refusal")
    variants = make_variants(found, methods, scopes)
    if semantics == "weights" and architecture_of(source.config).norms.kind == "layer":  # as `edit` does
        variants = [replace(v, intervention=centred(v.intervention)) for v in variants]
    plans, refused = _plans(source, variants) if semantics == "weights" else ({}, {})
    for name, reason in refused.items():
        note(f"{name} is left out: {reason}")
    possible = [v for v in variants if v.name not in refused]
    if not possible:
        raise OrthogonalizeError(f"none of these edits can be baked into this model: {next(iter(refused.values()))}")
    settings = (suites, engine, engine_version(engine), semantics, max_new_tokens, limit, data_state(data))
    edits = [(v.name, store_maps(v.intervention)[2], v.layers) for v in possible]
    journal = Journal(out, fingerprint_of(settings, plan.state, folder_state(folder), edits, run_state(found)))
    runner = _Runner(plan, journal)

    with journal.kept(), ExitStack() as stack, track("sweep", len(possible) + 1, "edits") as advance:
        start_folder = folder
        if semantics == "weights":
            start_folder = stack.enter_context(common_folder(source, list(plans.values())))
        running: list[Engine] = []
        swap: list[WeightSwap] = []
        loaded: list[str] = []

        def started() -> Engine:
            if not running:
                opened = open_engine(engine, start_folder, tokenizer, plan.max_model_len, options)
                running.append(stack.enter_context(opened))
                swap.append(WeightSwap(running[0], open_checkpoint(start_folder)))
                if semantics == "weights":
                    loaded.append(running[0].fingerprint())
            return running[0]

        runner.base(started)
        advance(1)
        seconds: dict[str, float] = {}
        for variant in possible:
            with ExitStack() as around:

                def edited(variant: Variant = variant, around: ExitStack = around) -> Engine:
                    held = started()
                    if semantics == "weights":
                        swap[0].apply(edited_weights(plans[variant.name]))
                    else:
                        assert isinstance(held, TransformersEngine)
                        around.enter_context(residual_hooks(held.model, variant))
                    return held

                try:
                    seconds[variant.name] = runner.variant(variant, edited)
                except NoNumberError as error:
                    refused[variant.name] = str(error)
                    note(f"{variant.name} is left out: {error}")
            advance(1)
        if semantics == "weights" and running:
            swap[0].restore()
            if running[0].fingerprint() != loaded[0]:
                journal.close()  # what was measured may be of other weights than was thought
                raise OrthogonalizeError("the engine did not hold the base's weights again after the sweep")
            journal.step("restored", lambda: True)

    with journal.kept():
        opinions = ask_judges(ready, plan, runner.measured, engine, options, journal)
    for label, measured in runner.measured.items():
        add_opinions(plan, ready, measured, opinions[label])
    base = runner.measured["base"].series
    result = Sweep(
        engine=engine,
        engine_version=engine_version(engine),
        semantics=semantics,
        model=public_name(model),
        suites=list(suites),
        data=plan.data,
        max_new_tokens=max_new_tokens,
        sensitive=any(each.sensitive for each in plan.sets),
        effect=None,
        harm=None,
        restored=True if journal.has("restored") else None,
        base=Measures.of(base),
        variants=[_swept(v, runner, seconds, refused) for v in variants],
        pareto=[],
    )
    result.effect, result.harm = effect_key(result.base), harm_key(result.base)
    result.pareto = pareto(result)
    with complete_folder(out, SWEEP, force) as done:
        (done / "sweep.json").write_text(result.model_dump_json(indent=1) + "\n", "utf-8")
        write_pareto_plot(result, done / "pareto.png")
    journal.close()
    return result


def _swept(variant: Variant, runner: _Runner, seconds: dict[str, float], refused: dict[str, str]) -> Swept:
    swept = Swept(name=variant.name, choice=variant.choice, direction=variant.direction, layers=list(variant.layers))
    if variant.name in refused:
        swept.refused = refused[variant.name]
        return swept
    series = runner.measured[variant.name].series
    swept.measures = Measures.of(series)
    swept.paired = compare_all(runner.measured["base"].series, series)
    swept.seconds = seconds[variant.name]
    return swept
