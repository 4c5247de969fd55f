"""`sweep`: compare every method over every scope, in one engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

from ..architectures.schema import architecture_of
from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..checkpoints.plan import CheckpointPlan
from ..core.errors import InPlaceError, NoNumberError, OrthogonalizeError
from ..core.files import fingerprint
from ..core.journal import Journal
from ..core.locks import exclusive
from ..core.output_folders import SWEEP, check_free, complete_folder
from ..core.progress import note, track
from ..data.prompts import Split
from ..data.refusals import LEAST_TOKENS
from ..edits.bake import bake
from ..edits.descriptions.automatic import learn
from ..edits.methods.registry import METHODS
from ..edits.recipe import store_maps
from ..engines.base import ONE_DEVICE, Engine, EngineOptions
from ..engines.experiment.ask import ask_server
from ..engines.registry import ENGINES
from ..engines.shared_base import SharedBase, check_room, common_folder, edited_weights, own_folder
from ..engines.weight_swap import WeightSwap
from ..evals.choosing import why_nothing_is_chosen
from ..evals.origins import check_origins, mismatches
from ..evals.plan import EvalPlan, Measurements
from ..evals.setup import check_request, prepare
from ..evals.suites.base import BaseOutputs
from ..evals.suites.registry import DEFAULT_SUITES
from ..models.hooks import input_shifted, layer_projected
from ..models.loading import check_complete
from ..models.names import public_name
from ..models.resolve import find_model
from ..reports.pages.sweep_page import write_sweep_page
from ..reports.schema import Measures, compare_all, kept_shares
from ..reports.sweep import NONE_REMOVES, Semantics, Sweep, SweepRow, effect_key, harm_key, pareto
from ..selection.grid import SweepGrid
from ..selection.readers.open_fits import open_fits
from ..selection.resolve import check_fits
from ..selection.run_folder import load_run
from ..selection.variants import Variant, centre, make_variants


@contextmanager
def residual_hooks(model: Any, variant: Variant) -> Iterator[None]:
    """The reference's hooks: on the input and both outputs of every block in scope (actadd: only inputs)."""
    with ExitStack() as stack:
        for layer in variant.layers:
            around = input_shifted if METHODS[variant.choice.method].adds else layer_projected
            assert variant.on_stream is not None
            stack.enter_context(around(model, layer, variant.on_stream))
        yield


class _Host:
    """The engine of a sweep, which holds the base and then one edit after another. It starts on first use.

    `plans` are the plans of the edits, whose weights are swapped in; None uses the reference's hooks instead. If the
    engine cannot swap weights, every edit gets its own engine.
    """

    def __init__(
        self, start: Callable[[Path], Engine], source: Checkpoint, plans: Mapping[str, CheckpointPlan] | None
    ) -> None:
        self.start, self.source, self.plans = start, source, plans
        self.stack = ExitStack()
        self.running: tuple[Engine, WeightSwap, str] | None = None
        self.held: list[bool] = []
        self.in_place = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stack.close()

    def prepare_swaps(self) -> None:
        """Start the engine that edits are swapped into; stop it if it cannot swap them."""
        if self.running is not None or not self.in_place:
            return
        self._start()
        if self.plans is None:
            return
        engine, swap, _ = self._running()
        try:
            lacking = swap.first_unswappable({name for plan in self.plans.values() for name in plan.touched})
            loaded = engine.fingerprint() if lacking is None else ""
        except InPlaceError as error:
            lacking, loaded = str(error), ""
        if lacking is None:
            self.running = engine, swap, loaded
            return
        note(f"this engine cannot swap weights in place ({lacking}), so every edit gets its own")
        self.in_place = False
        self._stop()
        check_room(self.plans.values())

    def _start(self) -> None:
        folder = self.source.path
        if self.in_place:  # otherwise no edit is swapped into this engine
            folder = self.stack.enter_context(common_folder(self.source, list((self.plans or {}).values())))
        engine = self.stack.enter_context(self.start(folder))
        self.running = engine, WeightSwap(engine, open_checkpoint(folder)), ""

    def _running(self) -> tuple[Engine, WeightSwap, str]:
        assert self.running is not None
        return self.running

    def _stop(self) -> None:
        self.stack.close()
        self.running = None

    def base(self) -> Engine:
        """The engine with the base; call it before any edit."""
        self.prepare_swaps()
        if self.running is None:
            self._start()
        return self._running()[0]

    @contextmanager
    def edited(self, variant: Variant) -> Iterator[Engine]:
        """The engine with an edit. Swapped weights stay until the next swap; hooks are removed with the context."""
        self.prepare_swaps()
        if not self.in_place:
            self._stop()
            assert self.plans is not None
            with own_folder(self.plans[variant.name]) as folder, self.start(folder) as engine:
                yield engine
            return
        engine, swap, _ = self._running()
        if self.plans is not None:
            swap.apply(edited_weights(self.plans[variant.name]))
            yield engine
        else:
            model: Any = engine.model  # type: ignore[attr-defined]  # an engine with `hooks` has one
            with residual_hooks(model, variant):
                yield engine

    def restart(self) -> bool | None:
        """Stop the engine, so that the next use starts another one; returns the old engine's `restored()`.

        NaN in a cache spoils everything that shares a block with it, masked or not, since 0 times NaN is NaN.
        """
        held = self.restored()
        if self.plans is not None:
            self._stop()
        return held

    def restored(self) -> bool | None:
        """Swap the base back in; whether every engine so far then held it, bit for bit, or None without a swap."""
        if self.plans is not None and self.running is not None and self.in_place:
            engine, swap, loaded = self.running
            swap.restore()
            self.held.append(engine.fingerprint() == loaded)
        return all(self.held) if self.held else None


class _Runner:
    """Measures the base and then every edit; every step is kept in the journal.

    `plans` say what is measured on the run's prompts of each split, and `measured` is by split and model.
    """

    def __init__(
        self, plans: Mapping[Split, EvalPlan], journal: Journal, refused: Mapping[str, str], labels: Mapping[str, str]
    ) -> None:
        self.plans, self.journal, self.labels = plans, journal, labels
        self.memories = {split: BaseOutputs() for split in plans}
        self.measured: dict[Split, dict[str, Measurements]] = {split: {} for split in plans}
        self.seconds: dict[str, float] = {}
        self.refused = dict(refused)

    def steps(self) -> list[str]:
        """The journal's steps for base and edits."""
        return [step for name in self.labels for step in self._steps(name)]

    def _steps(self, name: str) -> list[str]:
        return [step for plan in self.plans.values() for step in plan.steps(self.labels[name], name == "base")]

    def _measure(self, name: str, engine: Engine | None) -> None:
        label, is_base = self.labels[name], name == "base"
        found = {
            split: plan.measure(engine, self.memories[split], self.journal, label, is_base)
            for split, plan in self.plans.items()
        }
        for split, measurements in found.items():
            self.measured[split][name] = measurements

    def base(self, host: _Host) -> None:
        self._measure("base", None if self.journal.has(*self._steps("base")) else host.base())

    def variant(self, variant: Variant, host: _Host) -> None:
        """Measure an edit and time it, including its swap; an edit that gives NaN is skipped."""
        name, label = variant.name, self.labels[variant.name]
        steps = self._steps(name)
        done, asked = self.journal.has(*steps), fingerprint(steps)[:16]
        if self.journal.has(f"{label}/refused@{asked}"):
            self.refused[name] = self.journal.step(f"{label}/refused@{asked}", str)
            return
        if not done:
            host.prepare_swaps()  # not part of the time of the edit
        start = time.perf_counter()
        try:
            with nullcontext() if done else host.edited(variant) as engine:
                self._measure(name, engine)
        except NoNumberError as error:
            reason = str(error)
            note(f"skipping {name}: {reason}")
            self.check_restored(host.restart())
            self.refused[name] = self.journal.step(f"{label}/refused@{asked}", lambda: reason)
            return
        self.seconds[name] = float(self.journal.step(f"{label}/seconds@{asked}", lambda: time.perf_counter() - start))

    def check_restored(self, restored: bool | None) -> None:
        """Stop if the engine did not hold the base's weights again: the measurements may be of other weights."""
        if restored is False:
            self.journal.close()
            raise OrthogonalizeError("the engine did not hold the base's weights after its edits were swapped out")

    def row(self, variant: Variant) -> SweepRow:
        """The row of an edit."""
        result = SweepRow(
            name=variant.name, choice=variant.choice, direction=variant.direction, layers=list(variant.layers)
        )
        if variant.name in self.refused:
            result.refused = self.refused[variant.name]
            return result
        paired = {
            split: compare_all(models["base"].series, models[variant.name].series)
            for split, models in self.measured.items()
        }
        result.measures = Measures.of(self.measured["test"][variant.name].series)
        result.paired, result.val = paired["test"], paired.get("val", {})
        tested = self.measured["test"]
        result.kept = kept_shares(tested["base"].series, tested[variant.name].series)
        result.seconds = self.seconds[variant.name]
        return result


def _plans(source: Checkpoint, variants: Sequence[Variant]) -> tuple[dict[str, CheckpointPlan], dict[str, str]]:
    """The plan of every variant, and the reasons for those that cannot be baked."""
    plans, refused = {}, {}
    for variant in variants:
        try:
            plans[variant.name] = bake(source, variant.intervention, ask_server).checkpoint
        except OrthogonalizeError as error:
            refused[variant.name] = str(error)
            note(f"skipping {variant.name}: {error}")
    if not plans:
        raise OrthogonalizeError(f"none of these edits can be baked into this model: {next(iter(refused.values()))}")
    return plans, refused


@exclusive
def sweep(
    model: Path | str,
    run: Path | str,
    out: Path | str,
    *,
    suites: Sequence[str] = DEFAULT_SUITES,
    methods: Sequence[str] = (),
    scopes: Sequence[str] = (),
    grid: SweepGrid | None = None,
    engine: str = "vllm",
    semantics: Semantics = "weights",
    max_new_tokens: int = LEAST_TOKENS,
    limit: int | None = None,
    data: Path | str | None = None,
    judges: Sequence[str] = (),
    measure: str | None = None,
    allow_other_base: bool = False,
    revision: str | None = None,
    description: Path | str | None = None,
    options: EngineOptions = ONE_DEVICE,
    force: bool = False,
) -> Sweep:
    """Measure every edit that `run` allows against `model`; write sweep.json and sweep.html to `out`.

    The engine starts once, on the base. Each edit's tensors are computed as by `edit`, swapped in and swapped out; if
    the engine cannot swap weights, each edit gets its own engine. The measures are of the run's test prompts; the best
    trade-offs are chosen on its val prompts, which every model answers as well. An interrupted call stores its progress
    beside `out`; call it again to resume.

    Args:
        methods: edit methods; by default all that the run has directions for.
        scopes: as for `edit`, except `from:`, for every method; by default each method's own, which is one layer for
            those that add a constant.
        grid: the strengths, alphas, ranks and multipliers to try; by default each method's own.
        semantics: `weights`, or `residual` (with `engine="hf"`) for the reference's hooks on block inputs and outputs,
            to reproduce its numbers.

    The other arguments are those of `evaluate`.

    Raises:
        OrthogonalizeError: something is missing, or the engine does not start.
    """
    model, out, run = str(model), Path(out), Path(run)
    check_free(out, SWEEP, force, [Path(model), run])
    check_request(suites, engine, options, data)
    if semantics == "residual" and not ENGINES.find(engine).hooks:
        raise OrthogonalizeError("--semantics residual needs --engine hf")
    found = load_run(run)
    folder = find_model(model, revision)
    check_complete(folder)
    source = open_checkpoint(folder)
    learn(source, description)
    check_fits(found, source)
    unlike = mismatches(folder, model, found.info)
    check_origins(unlike, allow_other_base)
    fits = open_fits(found, source, options.device) if semantics == "weights" else None
    variants = make_variants(found, methods, scopes, grid, fits)
    ready = prepare(
        found, folder,
        suites=suites, engine=engine, max_new_tokens=max_new_tokens, limit=limit, data=data, judges=judges,
        options=options, choose=True, measure=measure,
    )  # fmt: skip
    unmarked = why_nothing_is_chosen(found, suites)
    if unmarked:
        note(f"no best trade-off will be marked: {unmarked}")
    plans: dict[str, CheckpointPlan] | None = None
    refused: dict[str, str] = {}
    if semantics == "weights":
        if architecture_of(source.config).norms.kind == "layer":
            variants = [centre(variant, found) for variant in variants]
        plans, refused = _plans(source, variants)
    possible = [v for v in variants if v.name not in refused]
    journal = Journal.beside(out)
    common = None if plans is None else SharedBase.of(source, list(plans.values())).state  # what the engine starts on
    edits = {v.name: [semantics, store_maps(v.intervention).fingerprint, v.layers] for v in possible}
    labels = {name: ready.label(name, common, edit) for name, edit in ({"base": None} | edits).items()}
    runner = _Runner(ready.plans, journal, refused, labels)
    journal.announce_resume(runner.steps())
    restored = f"restored@{fingerprint(runner.steps())[:16]}"
    with journal.kept():
        with _Host(ready.start, source, plans) as host, track("sweep", len(possible) + 1, "edits") as advance:
            runner.base(host)
            advance(1)
            for variant in possible:
                runner.variant(variant, host)
                advance(1)
            held = host.restored()
            runner.check_restored(held)
            if held:
                journal.step(restored, lambda: True)
        ready.judgements(runner.measured["test"], journal)
    result = Sweep(
        **ready.description(),
        semantics=semantics,
        model=public_name(model),
        effect=None,
        harm=None,
        mismatches=unlike,
        restored=True if journal.has(restored) else None,
        base=Measures.of(runner.measured["test"]["base"].series),
        val=Measures.of(runner.measured["val"]["base"].series) if "val" in runner.measured else None,
        variants=[runner.row(v) for v in variants],
        pareto=[],
        unmarked=unmarked,
    )
    result.effect, result.harm = effect_key(result.val or result.base), harm_key(result.val or result.base)
    result.pareto = pareto(result)
    if not result.pareto and result.unmarked is None:
        result.unmarked = NONE_REMOVES
    with complete_folder(out, SWEEP, force) as done:
        (done / "sweep.json").write_text(result.model_dump_json(indent=1) + "\n", "utf-8")
        write_sweep_page(result, done / "sweep.html")
    journal.close()
    return result
