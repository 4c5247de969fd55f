"""How the objects that a notebook shows look: one short line each."""

from __future__ import annotations

import torch
from helpers.command_line import UNTRIED
from helpers.llama import LAYERS, WIDTH

from orthogonalize import (
    Intervention,
    bake,
    evaluate,
    inlp,
    intervention_from_directions,
    leace,
    load_direction,
    load_recipe,
    load_run,
    removal,
    shift,
    sweep,
    verify,
)
from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.edits.config import EditConfig

RUN_SETTINGS = UNTRIED
QUICK = {"engine": "hf", "max_new_tokens": 4, "suites": ["refusal", "kl"]}


def check(shown: object, wanted: str) -> None:
    assert repr(shown) == wanted
    assert len(wanted) < 120
    assert "\n" not in wanted


def test_maps_and_interventions(run):
    check(removal(torch.eye(WIDTH)[:2]), f"AffineMap(rank 2, width {WIDTH})")
    check(shift(torch.ones(WIDTH)), f"AffineMap(rank 0, width {WIDTH}, with a shift)")
    check(shift(torch.zeros(3, WIDTH)), f"AffineMap(batch [3], rank 0, width {WIDTH})")
    check(Intervention(), "Intervention(empty)")
    directions = load_run(run).directions
    place = {"position": -1, "layer": 2}
    edit = intervention_from_directions(EditConfig(method="ablate", **place), directions)
    check(edit, f"Intervention({2 * LAYERS + 1} writes, rank 1, width {WIDTH})")
    edit = intervention_from_directions(EditConfig(method="ablate", scope="from:1", **place), directions)
    check(edit, f"Intervention({2 * (LAYERS - 1) + 1} reads, rank 1, width {WIDTH})")
    edit = intervention_from_directions(EditConfig(method="leace", **place), directions)
    check(edit, f"Intervention({2 * LAYERS + 1} writes, rank 1, width {WIDTH}, 1 with a shift)")


def test_runs_plans_recipes_and_proofs(model, run, edited):
    found = load_run(run)
    check(found, f"Run(model: dim, inlp, leace; {len(found.candidates)} candidates, 0 edits tried)")
    edit = intervention_from_directions(EditConfig(method="ablate", position=-1, layer=2), found.directions)
    check(bake(open_checkpoint(model), edit), f"EditPlan(llama: {2 * LAYERS + 1} tensors edited, 1 added)")
    verified = verify(edited)
    proven = f"{len(verified.changed)} tensors changed, {len(verified.added)} added, 0 missing; passed"
    check(verified, f"Verified({proven})")
    recipe = load_recipe(edited)
    check(recipe, f"Recipe({recipe.choice.describe()}; {len(recipe.tensors)} tensors edited, verified)")
    assert str(recipe) == repr(recipe)
    long = recipe.model_copy(update={"choice": EditConfig(method="ablate", scope="layers:" + "1,3," * 60 + "5")})
    assert len(repr(long)) < 120


def test_reports_and_sweeps(model, run, edited, tmp_path):
    report = evaluate(edited, str(model), run, tmp_path / "report", **QUICK)
    check(report, f"Report(edited against model: refusal, kl; {len(report.answers)} answers)")
    assert str(report) == repr(report)
    found = sweep(str(model), run, tmp_path / "sweep", methods=["ablate"], scopes=["one", "all"], **QUICK)
    check(found, f"Sweep(model: 2 edits, {len(found.pareto)} on the Pareto front)")


def test_results_of_the_finders(run, tmp_path):
    sides = [torch.randn(20, 2, WIDTH, generator=torch.Generator().manual_seed(i)) + i for i in (0, 1)]
    check(leace(*sides), f"Eraser(batch [2], width {WIDTH})")
    check(leace(*sides)[0], f"Eraser(rank 1, width {WIDTH})")
    found = inlp(*sides, max_rank=2, min_accuracy=0.0)
    check(found, f"Subspaces(shape (2,), ranks 2 to 2, width {WIDTH})")
    first, last = (f"{a:.2f}" for a in found[0].accuracies)
    check(found[0], f"Subspace(rank 2, width {WIDTH}, accuracies {first} to {last})")
    torch.save(torch.ones(WIDTH), tmp_path / "direction.pt")
    check(load_direction(tmp_path / "direction.pt"), f"GivenDirection(rank 1, width {WIDTH})")
    (tmp_path / "direction_metadata.json").write_text('{"pos": -2, "layer": 3}')
    check(load_direction(tmp_path / "direction.pt"), f"GivenDirection(rank 1, width {WIDTH}, position -2, layer 3)")
    check(
        load_run(run).directions,
        f"Directions(dim, inlp, leace; positions -3 to -1, layers 0 to {LAYERS}, width {WIDTH})",
    )
