"""Sweeps of a tiny model in transformers: the table, resuming, the reference's hooks, and in-place weight swaps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from helpers.chat import tiny_tokenizer
from helpers.command_line import UNTRIED
from helpers.llama import LAYERS, store, tiny_llama

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.cli import main
from orthogonalize.commands import sweep as sweeps
from orthogonalize.commands.edit import edit
from orthogonalize.commands.evaluate import evaluate
from orthogonalize.commands.extract import extract
from orthogonalize.commands.sweep import residual_hooks, sweep
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.data.chat import ChatFormat
from orthogonalize.edits.bake import bake
from orthogonalize.edits.methods.registry import METHODS
from orthogonalize.engines.shared_base import SharedBase
from orthogonalize.engines.transformers import TransformersEngine
from orthogonalize.engines.weight_swap import WeightSwap
from orthogonalize.models.generation import generate
from orthogonalize.reports.sweep import Sweep, pareto
from orthogonalize.selection.readers.open_fits import open_fits
from orthogonalize.selection.run_folder import load_run
from orthogonalize.selection.variants import make_variants

SWEPT = (
    "ablate one",
    "ablate all",
    "nullspace one",
    "reflect 2 top:50%",
    "actadd dim +1 one",
    "actadd inlp -1 one",
    "leace all",
)
QUICK = {"engine": "hf", "max_new_tokens": 8}


@pytest.fixture(scope="module")
def run_settings():
    return UNTRIED


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = store(tiny_llama(tie_word_embeddings=True), tmp_path_factory.mktemp("sweep") / "model", torch.float32)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def swept(model, run, tmp_path_factory) -> Sweep:
    out = tmp_path_factory.mktemp("out") / "sweep"
    chosen = make_variants(load_run(run))
    kept = [v for v in chosen if v.name in SWEPT]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orthogonalize.commands.sweep.make_variants", lambda *_: kept)
        found = sweep(str(model), run, out, **QUICK)
    assert {p.name for p in out.iterdir()} == {"sweep.json", "sweep.html"}
    assert all(row.name in (out / "sweep.html").read_text() for row in found.variants)
    assert Sweep.model_validate_json((out / "sweep.json").read_text()) == found
    return found


def test_every_method_is_tried_over_every_scope(run):
    additions = [f"actadd {kind} {m}" for kind in ("dim", "inlp") for m in ("-2", "-1", "-0.5", "+0.5", "+1", "+2")]
    firsts = ["ablate", "nullspace", "reflect 1", "reflect 2", *additions, "leace"]
    variants = make_variants(load_run(run))
    removals = [name for name in firsts if name not in additions]
    expected = [f"{name} {scope}" for name in removals for scope in ("one", "top:50%", "all")]
    assert sorted(v.name for v in variants) == sorted([*expected, *(f"{name} one" for name in additions)])
    assert {v.choice.method for v in variants} == {m.name for m in METHODS.values() if not m.fitted}
    for variant in variants:
        assert len(variant.layers) == {"one": 1, "top:50%": LAYERS // 2, "all": LAYERS}[variant.name.split()[-1]]
    asked = make_variants(load_run(run), ["actadd"], ["all", "one"])
    assert sorted(v.name for v in asked) == sorted(f"{name} {scope}" for name in additions for scope in ("all", "one"))
    accumulating = [v.name for v in asked if "one constant per layer, which accumulate" in v.choice.describe()]
    assert accumulating == [v.name for v in asked if v.name.endswith("all")]


def test_fitted_edits_are_swept_where_the_run_has_answers(model, sources, tmp_path):
    """With the tensors of the edit that `edit` writes."""
    run = tmp_path / "run"
    extract(str(model), run, **sources, settings=replace(UNTRIED, trials=1, finders=("dim",)))
    found, source = load_run(run), open_checkpoint(model)
    variants = make_variants(found, ["conditional"], fits=open_fits(found, source, "cpu"))
    assert [v.name for v in variants] == [
        f"conditional {weight} from:{LAYERS // 2}" for weight in ("0.1", "0.3", "1")
    ]  # fmt: skip
    edit(str(model), tmp_path / "edited", run=run, method="conditional", target_weight=1.0)
    swapped = bake(source, variants[2].intervention).checkpoint
    edited = open_checkpoint(tmp_path / "edited")
    assert swapped.edits
    assert all(swapped.edited(name).equal(edited.read(name)) for name in edited.tensors)
    with pytest.raises(OrthogonalizeError, match="needs a run with the model's own answers"):
        make_variants(found, ["conditional"])


def test_method_without_directions_is_skipped_or_refused(run, monkeypatch):
    """Skipped with a note by default; refused where it is asked for by name."""
    notes: list[str] = []
    monkeypatch.setattr("orthogonalize.selection.variants.note", notes.append)
    found = load_run(run)
    bare = replace(
        found,
        info=found.info.model_copy(update={"finders": ["dim", "inlp"]}),
        directions=replace(found.directions, readers=None),
    )
    assert "leace" not in {v.choice.method for v in make_variants(bare)}
    assert notes == ["skipping leace: the run has no directions for it (extract --finders dim,leace)"]
    with pytest.raises(OrthogonalizeError, match="no directions for leace; extract again with --finders dim,leace"):
        make_variants(bare, ["ablate", "leace"])
    for wanted, scopes in ((["ablate", "ablate"], ["one"]), (["ablate"], ["one", "one"])):
        with pytest.raises(OrthogonalizeError, match="is given twice"):
            make_variants(found, wanted, scopes)


@pytest.mark.parametrize(("changed", "message"), [
    ({"num_hidden_layers": LAYERS + 2}, f"the run's model has {LAYERS} layers, but this one has {LAYERS + 2}"),
    (
        {"hidden_size": 40, "head_dim": 8},
        "the run's directions have width 32, but the model's residual stream has width 40",
    ),
])  # fmt: skip
@pytest.mark.parametrize("semantics", ["weights", "residual"])
def test_run_of_another_model_shape_is_refused_before_any_engine(
    changed, message, semantics, run, tmp_path, monkeypatch
):
    monkeypatch.setattr("orthogonalize.evals.setup.open_engine", lambda *a: pytest.fail("an engine was started"))
    other = store(tiny_llama(tie_word_embeddings=True, **changed), tmp_path / "other", torch.float32)
    tiny_tokenizer().save_pretrained(other)
    with pytest.raises(OrthogonalizeError, match=message):
        sweep(str(other), run, tmp_path / "out", semantics=semantics, **QUICK)


def test_edits_that_cannot_be_swapped_get_their_own_engines(swept, model, run, tmp_path, monkeypatch):
    started: list[Path] = []
    enter, load = TransformersEngine.__enter__, TransformersEngine.load

    def counted(self):
        started.append(self.folder)
        return enter(self)

    kept = [v for v in make_variants(load_run(run)) if v.name in SWEPT]
    monkeypatch.setattr("orthogonalize.commands.sweep.make_variants", lambda *_: kept)
    monkeypatch.setattr(TransformersEngine, "__enter__", counted)
    monkeypatch.setattr(
        TransformersEngine, "load", lambda s, w: load(s, {n: m for n, m in w.items() if "o_proj" not in n})
    )
    found = sweep(str(model), run, tmp_path / "apart", **QUICK)
    assert len(started) == 2 + len(SWEPT)  # the shared folder, the base itself, and every edit
    assert started[0] != started[1] == model
    assert found.restored is None
    assert not any(folder.exists() for folder in started[2:])
    for mine, other in zip(found.variants, swept.variants, strict=True):
        assert mine.measures == other.measures, mine.name


def test_killed_sweep_without_swaps_starts_no_needless_engine(model, run, tmp_path, monkeypatch):
    settings = {**QUICK, "suites": ["refusal"], "methods": ["ablate"], "scopes": ["one", "all"]}
    started: list[Path] = []
    enter, load, answers = TransformersEngine.__enter__, TransformersEngine.load, TransformersEngine.answers

    def counted(self):
        started.append(self.folder)
        return enter(self)

    def third_dies(self, *arguments):
        if len(started) == 4:
            raise OrthogonalizeError("the engine died")
        return answers(self, *arguments)

    monkeypatch.setattr(TransformersEngine, "__enter__", counted)
    monkeypatch.setattr(
        TransformersEngine, "load", lambda s, w: load(s, {n: m for n, m in w.items() if "o_proj" not in n})
    )
    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "answers", third_dies)
        with pytest.raises(OrthogonalizeError, match="died"):
            sweep(str(model), run, tmp_path / "out", **settings)
    started.clear()
    sweep(str(model), run, tmp_path / "out", **settings)
    assert len(started) == 2  # one to find out that it cannot be swapped, one for the remaining edit


def test_missing_disk_space_for_a_checkpoint_is_reported(model, run, tmp_path, monkeypatch):
    load = TransformersEngine.load
    monkeypatch.setattr(
        TransformersEngine, "load", lambda s, w: load(s, {n: m for n, m in w.items() if "o_proj" not in n})
    )
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(OrthogonalizeError, match="make room or set TMPDIR to a folder with room"):
        sweep(str(model), run, tmp_path / "out", methods=["ablate"], scopes=["one"], **QUICK)


def test_refused_edits_are_remembered_per_choice_of_suites(model, run, data, tmp_path, monkeypatch):
    settings = {**QUICK, "methods": ["ablate"], "scopes": ["one", "all"], "data": data, "limit": 3}
    answers, choices = TransformersEngine.answers, TransformersEngine.choices

    def nan(self, contexts, rows):
        found = choices(self, contexts, rows)
        return [[float("nan")] * len(row) for row in found] if swapped else found

    swapped: list[int] = []
    apply = WeightSwap.apply
    monkeypatch.setattr(WeightSwap, "first_unswappable", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(WeightSwap, "apply", lambda self, edited: swapped.append(1) or apply(self, edited))
        patch.setattr(TransformersEngine, "choices", nan)
        patch.setattr(TransformersEngine, "answers", lambda s, *a: answers(s, *a) if len(swapped) < 3 else 1 / 0)
        with pytest.raises(ZeroDivisionError):  # at the second edit, after the first was refused because of its MMLU
            sweep(str(model), run, tmp_path / "out", suites=["refusal", "mmlu"], **settings)
    found = sweep(str(model), run, tmp_path / "out", suites=["refusal"], **settings)
    assert [v.refused for v in found.variants] == [None, None]


def test_results_are_kept_per_shared_base(model, run):
    """Whatever one edit adds to the shared engine, all of them and the base are measured with."""
    source, found = open_checkpoint(model), load_run(run)
    plans = {
        v.name: bake(source, v.intervention).checkpoint for v in make_variants(found, ["ablate", "actadd"], ["one"])
    }
    plain = SharedBase.of(source, [plans["ablate one"]]).state
    assert SharedBase.of(source, [plans["ablate one"]]).state == plain
    assert SharedBase.of(source, list(plans.values())).state != plain


def test_table_has_every_measure_of_every_edit(swept):
    assert tuple(sorted(v.name for v in swept.variants)) == tuple(sorted(SWEPT))
    assert swept.restored is True
    keys = swept.base.flat().keys()
    for variant in swept.variants:
        assert variant.refused is None
        assert variant.measures.flat().keys() == keys == variant.paired.keys()


def test_actadd_lengths_and_signs_match_for_dim_and_inlp(run):
    """Both kinds of direction point to the positive side and are added at the same lengths."""
    found = load_run(run)
    lengths: dict[str, list[float]] = {}
    for variant in make_variants(found, ["actadd"], ["one"]):
        (shift,) = [m.s for m in variant.intervention.writes.values()]
        lengths.setdefault(variant.direction, []).append(shift.norm().item())
        towards = shift @ found.directions.mean_diff(variant.choice.position, variant.choice.layer)
        assert (towards > 0) == (variant.choice.coefficient > 0)
    assert lengths["dim"] == pytest.approx(lengths["inlp"])
    best = next(v.choice for v in make_variants(found, ["actadd"], ["one"]))
    norm = found.directions.mean_diff(best.position, best.layer).norm().item()
    assert sorted({round(x / norm, 6) for x in lengths["dim"]}) == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("name", SWEPT[1:])
def test_swept_edit_measures_as_the_written_checkpoint(name, swept, model, run, tmp_path):
    variant = next(v for v in swept.variants if v.name == name)
    given = {k: v for k, v in variant.choice.model_dump().items() if k in ("method", "scope", "position", "layer")}
    if variant.choice.method == "reflect":
        given["alpha"] = variant.choice.alpha
    if variant.choice.method == "actadd":
        given |= {"coefficient": variant.choice.coefficient, "finder": variant.choice.finder}
    edit(str(model), tmp_path / "edited", run=run, **given)
    report = evaluate(tmp_path / "edited", str(model), run, tmp_path / "report", **QUICK)
    expected = report.edited.flat()
    for key, measure in variant.measures.flat().items():
        assert measure.value == pytest.approx(expected[key].value, abs=1e-5), key


def test_killed_sweep_resumes_where_it_stopped(model, run, tmp_path, monkeypatch):
    settings = {**QUICK, "methods": ["ablate", "reflect"], "scopes": ["one", "layers:1,2"]}
    whole = sweep(str(model), run, tmp_path / "whole", **settings)
    assert [v.name for v in whole.variants][:2] == ["ablate one", "ablate layers:1,2"]
    loads: list[int] = []
    load = TransformersEngine.load

    def dies(self, weights):
        loads.append(1)
        if len(loads) == 3:
            raise OrthogonalizeError("the engine died")
        load(self, weights)

    monkeypatch.setattr(WeightSwap, "first_unswappable", lambda *_: None)  # the check would load weights too
    monkeypatch.setattr(TransformersEngine, "load", dies)
    with pytest.raises(OrthogonalizeError, match="died"):
        sweep(str(model), run, tmp_path / "cut", **settings)
    answered: list[int] = []
    answers = TransformersEngine.answers
    monkeypatch.setattr(TransformersEngine, "answers", lambda *a: answered.append(1) or answers(*a))
    resumed = sweep(str(model), run, tmp_path / "cut", **settings)
    assert len(answered) == 2 * (len(whole.variants) - 2)  # test and val; the base and two edits had been measured
    for found, expected in zip(resumed.variants, whole.variants, strict=True):
        assert found.measures == expected.measures
    assert resumed.pareto == whole.pareto


def test_sweep_is_repeated_if_the_engine_was_not_restored(model, run, tmp_path, monkeypatch):
    settings = {**QUICK, "methods": ["ablate"], "scopes": ["one"]}
    with monkeypatch.context() as patch:
        seen: list[int] = []
        patch.setattr(WeightSwap, "first_unswappable", lambda *_: None)
        patch.setattr(TransformersEngine, "fingerprint", lambda self: str(seen.append(1) or len(seen)))
        with pytest.raises(
            OrthogonalizeError, match=r"did not hold the base's weights after its edits were swapped out$"
        ):
            sweep(str(model), run, tmp_path / "sweep", **settings)
    answered: list[int] = []
    answers = TransformersEngine.answers
    monkeypatch.setattr(TransformersEngine, "answers", lambda *a: answered.append(1) or answers(*a))
    assert sweep(str(model), run, tmp_path / "sweep", **settings).restored is True
    assert len(answered) == 5  # base and edit to test and val prompts, and the base to other ones


def test_residual_hooks_match_the_reference(model, run):
    """Against its hooks written out: block inputs, attention and MLP outputs, in every layer of the scope."""
    found = load_run(run)
    variants = {v.name: v for v in make_variants(found)}
    prompts = ChatFormat(tiny_tokenizer()).encode_all(found.texts("positive", "test"))
    tried = ("ablate top:50%", "nullspace all", "reflect 2 all", "actadd inlp +1 one", "leace top:50%", "leace one")
    for name in tried:
        variant = variants[name]
        kind, choice = variant.direction, variant.choice
        if choice.method == "leace":
            eraser = found.directions.eraser(choice.position, choice.layer, False)
            taken, read = eraser.u.float()[:, None], eraser.v.float()[:, None]
            kept = eraser.mean.float() @ read @ taken.mT  # the stream keeps its own mean
        else:
            taken = read = found.directions.basis(kind, choice.position, choice.layer).float().mT
            kept = torch.zeros(())
        with TransformersEngine(model, tiny_tokenizer(), "cpu") as engine, residual_hooks(engine.model, variant):
            ours = generate(engine.model, prompts, 8, [2])
        with TransformersEngine(model, tiny_tokenizer(), "cpu") as engine:
            factor = choice.alpha if choice.method == "reflect" else 1.0
            shift = None
            if choice.method == "actadd":
                unit = taken[:, 0]
                if unit @ found.directions.mean_diff(choice.position, choice.layer).float() < 0:
                    unit = -unit
                shift = choice.coefficient * unit

            def edited(h, taken=taken, read=read, factor=factor, shift=shift):
                return h + shift if shift is not None else h - factor * (h @ read) @ taken.mT

            def before(_m, args, kwargs, edited=edited, kept=kept):
                return ((edited(args[0]) + kept, *args[1:]), kwargs) if args else (
                    args, {**kwargs, "hidden_states": edited(kwargs["hidden_states"]) + kept})  # fmt: skip

            def after(_m, _i, out, edited=edited):
                return (edited(out[0]), *out[1:]) if isinstance(out, tuple) else edited(out)

            for layer in variant.layers:
                block = engine.model.model.layers[layer]
                block.register_forward_pre_hook(before, with_kwargs=True)
                if shift is None:
                    block.self_attn.register_forward_hook(after)
                    block.mlp.register_forward_hook(after)
            assert generate(engine.model, prompts, 8, [2]) == ours, name


def test_residual_semantics_equal_weights_only_over_all_layers(model, run, swept, tmp_path):
    """Over all layers, projecting inputs and outputs equals projecting every write; over one layer it does not."""
    found = sweep(str(model), run, tmp_path / "sweep", semantics="residual", methods=["ablate"], suites=["kl"], **QUICK)
    assert found.restored is None
    hooked = {v.name: v.measures.kl.completions.value for v in found.variants}
    baked = {v.name: v.measures.kl.completions.value for v in swept.variants if v.name in hooked}
    assert hooked["ablate all"] == pytest.approx(baked["ablate all"], abs=1e-4)
    assert hooked["ablate one"] != pytest.approx(baked["ablate one"], rel=0.01)
    with pytest.raises(OrthogonalizeError, match="--semantics residual needs --engine hf"):
        sweep(str(model), run, tmp_path / "x", semantics="residual")


def test_unreadable_judge_is_not_shown_as_zero(swept):
    from orthogonalize.evals.metrics import yes_no_series
    from orthogonalize.reports.schema import Judged, Rates
    from orthogonalize.reports.sweep import sweep_columns, sweep_rows

    unread = {"guard": Judged(harmful=Rates(target=yes_no_series([None, None]).measure()))}
    half = {"guard": Judged(harmful=Rates(target=yes_no_series([None, True]).measure()))}
    first = swept.variants[0]
    judged = swept.model_copy(update={
        "base": swept.base.model_copy(update={"judges": half}),
        "variants": [first.model_copy(update={"measures": first.measures.model_copy(update={"judges": unread})})],
    })  # fmt: skip
    column = sweep_columns(judged).index("harmful by guard, target prompts")
    assert [row[column] for row in sweep_rows(judged)] == ["100.0% (1 unreadable)", "- (2 unreadable)"]
    assert "KL to base, along own answers" in sweep_columns(swept)


def test_pareto_keeps_edits_that_no_other_beats(swept):
    def fake(name: str, gone: float, harm: float):
        variant = swept.variants[0].model_copy(deep=True)
        variant.name = name
        variant.val[swept.effect].difference = -gone
        variant.val[swept.harm].difference = harm
        variant.paired[swept.effect].difference = gone - 1  # on test prompts, the order is the reverse
        variant.paired[swept.harm].difference = -harm
        return variant

    points = [fake("a", 0.9, 0.1), fake("b", 0.9, 0.2), fake("c", 0.5, 0.0), fake("d", 0.4, 0.0), fake("e", 1.0, 3.0)]
    assert pareto(swept.model_copy(update={"variants": points})) == ["a", "c", "e"]


def test_command_prints_the_table_and_refuses_unknown_names(model, run, tmp_path):
    words = ["-q", "sweep", str(model), "--run", str(run), "--out", str(tmp_path / "out"), "--engine", "hf",
             "--max-new-tokens", "6", "--suite", "refusal,loss", "--limit", "3"]  # fmt: skip
    result = CliRunner().invoke(main, [*words, "--methods", "ablate", "--scopes", "one,layers:0,2-3,all"])
    assert result.exit_code == 0, result.output
    for name in ("base", "ablate one", "ablate layers:0,2-3", "ablate all"):
        assert name in result.output
    assert len(json.loads((tmp_path / "out" / "sweep.json").read_text())["variants"]) == 3
    for more, message in (
        (["--methods", "magic"], "unknown edit method 'magic'"),
        (["--scopes", "from:2"], "scope 'from', which edits reads"),
        (["--scopes", "some"], "scope 'some'"),
        ([], "exists"),
    ):
        out = [] if not more else ["--out", str(tmp_path / "other")]
        result = CliRunner().invoke(main, [*words, *out, *more])
        assert result.exit_code == 1
        assert message in result.output


def test_edit_giving_nan_is_skipped_and_the_engine_replaced(model, run, tmp_path, monkeypatch):
    """NaN in the engine's cache must not reach the edits after it."""
    settings = {**QUICK, "suites": ["refusal", "loss"], "methods": ["ablate"], "scopes": ["one", "layers:1,2", "all"]}
    whole = sweep(str(model), run, tmp_path / "whole", **settings)
    swaps: list[int] = []
    true = sweeps.edited_weights

    def second_is_nan(plan):
        swaps.append(1)
        made = true(plan)
        if len(swaps) == 3:
            raise OrthogonalizeError("the engine died")
        if len(swaps) != 2:
            return made
        return {name: lambda make=make: torch.full_like(make(), torch.nan) for name, make in made.items()}

    monkeypatch.setattr(sweeps, "edited_weights", second_is_nan)
    starts: list[int] = []
    enter = TransformersEngine.__enter__
    monkeypatch.setattr(TransformersEngine, "__enter__", lambda self: starts.append(1) or enter(self))
    with pytest.raises(OrthogonalizeError, match="died"):
        sweep(str(model), run, tmp_path / "sweep", **settings)
    assert len(starts) == 2
    found = sweep(str(model), run, tmp_path / "sweep", **settings)
    assert (len(starts), len(swaps)) == (3, 4)  # an edit known to give NaN is not tried again
    first, second, third = found.variants
    assert "NaN" in second.refused
    assert (first.measures, third.measures) == (whole.variants[0].measures, whole.variants[2].measures)
    assert found.restored is True


def test_engine_broken_by_an_edit_is_still_checked(model, run, tmp_path, monkeypatch):
    settings = {**QUICK, "suites": ["loss"], "methods": ["ablate"], "scopes": ["one"]}
    true = sweeps.edited_weights
    nan = lambda plan: {n: lambda make=make: torch.full_like(make(), torch.nan) for n, make in true(plan).items()}  # noqa: E731
    monkeypatch.setattr(sweeps, "edited_weights", nan)
    assert sweep(str(model), run, tmp_path / "whole", **settings).restored is True
    seen: list[int] = []
    monkeypatch.setattr(WeightSwap, "first_unswappable", lambda *_: None)
    monkeypatch.setattr(TransformersEngine, "fingerprint", lambda self: str(seen.append(1) or len(seen)))
    with pytest.raises(OrthogonalizeError, match="did not hold the base's weights after its edits"):
        sweep(str(model), run, tmp_path / "sweep", **settings)
