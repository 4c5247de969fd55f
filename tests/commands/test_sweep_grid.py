"""The values that a sweep tries, and the finder that an edit takes its direction from, through the command line."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from helpers.command_line import UNTRIED, command
from helpers.forked import orthogonalize

from orthogonalize.edits.build import intervention_from_directions
from orthogonalize.edits.config import EditConfig
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.reports.sweep import Sweep
from orthogonalize.selection.grid import SweepGrid
from orthogonalize.selection.run_folder import load_run
from orthogonalize.selection.variants import make_variants

RUN_SETTINGS = UNTRIED
QUICK = ("--engine", "hf", "--suite", "refusal", "--limit", "2", "--max-new-tokens", "2")


def swept(model, run, out, *words):
    return command("sweep", model, "--run", run, "--out", out, *QUICK, *words)


def test_what_is_printed_to_no_terminal_has_no_escape_sequence(model, run, tmp_path):
    words = ("--methods", "ablate", "--scopes", "one", "--json")
    done = orthogonalize(
        ["sweep", str(model), "--run", str(run), "--out", str(tmp_path / "out"), *QUICK, *words], os.environ
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert "sweep" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_given_values_are_tried_in_all_combinations(model, run, tmp_path):
    words = ("--methods", "nullspace,reflect,actadd", "--scopes", "one", "--strengths", "0.5,1", "--alphas", "1.5")
    status, said = swept(model, run, tmp_path / "out", *words, "--ranks", "1,acc99", "--multipliers", "3")
    assert status == 0, said
    found = Sweep.model_validate_json((tmp_path / "out" / "sweep.json").read_text())
    pairs = [f"rank {rank} strength {strength}" for rank in (1, "acc99") for strength in ("0.5", "1")]
    removals = [f"{method} {pair} one" for method in ("nullspace", "reflect 1.5") for pair in pairs]
    additions = [f"actadd {finder} {sign}3 one" for finder in ("dim", "inlp") for sign in "-+"]
    assert sorted(v.name for v in found.variants) == sorted([*removals, *additions])
    assert all(f"{name} " in said for name in (*removals, *additions))
    by_name = {v.name: v.choice for v in found.variants}
    weak = by_name["reflect 1.5 rank acc99 strength 0.5 one"]
    assert (weak.alpha, weak.rank, weak.strength) == (1.5, "acc99", 0.5)
    directions = load_run(run).directions
    best = by_name["actadd dim +3 one"]
    length = directions.mean_diff(best.position, best.layer).norm().item()
    assert {round(v.coefficient / length, 6) for v in by_name.values() if v.method == "actadd"} == {-3, 3}


def test_defaults_are_those_of_the_methods(run):
    plain, given = make_variants(load_run(run)), make_variants(load_run(run), grid=SweepGrid(multipliers=(0.5, 1, 2)))
    assert [(v.name, v.choice) for v in plain] == [(v.name, v.choice) for v in given]
    assert [v.name for v in make_variants(load_run(run), ["reflect"], ["one"])] == ["reflect 1 one", "reflect 2 one"]


def test_methods_are_compared_at_one_place_as_well(run):
    """Every method at its finder's best place, and at the given one; once if these are the same."""
    found = load_run(run)
    methods = ["ablate", "nullspace", "leace", "actadd"]
    own = make_variants(found, methods, ["one"])
    best = (own[0].choice.position, own[0].choice.layer)
    others = [(c.position, c.layer) for c in found.candidates if c.finder == "inlp"][-2:]
    for at in (best, *others):
        given = make_variants(found, methods, ["one"], SweepGrid(at=at))
        assert [v.name for v in given if " at " not in v.name] == [v.name for v in own]
        added = {v.name.partition(" at ")[0]: v for v in given if " at " in v.name}
        assert all((v.choice.position, v.choice.layer) == at for v in added.values())
        found_there = {finder for finder in ("dim", "inlp", "leace") if found.directions.basis(finder, *at) is not None}
        there = [v for v in own if v.direction in found_there]
        elsewhere = {v.name for v in there if (v.choice.position, v.choice.layer) != at}
        assert elsewhere <= added.keys()
        again = [v for v in own if v.name in added.keys() - elsewhere]
        assert all(v.choice.coefficient != added[v.name].choice.coefficient for v in again), "of another length only"
        for name, variant in added.items():
            assert variant.name == f"{name} at {at[0]},{at[1]}"
            assert variant.layers == (at[1],)


@pytest.mark.parametrize("text", ["", "1,2", "-1", "-1,x", "-1,2,3"])
def test_a_place_is_a_position_and_a_layer(model, run, tmp_path, text):
    status, said = swept(model, run, tmp_path / "out", "--at", text)
    assert status == 1
    assert "not a position, from the end of the prompt, and a layer, such as -1,12" in said


def test_a_place_that_the_run_does_not_have_is_refused(model, run, tmp_path):
    status, said = swept(model, run, tmp_path / "out", "--at", "-1,99")
    assert status == 1
    assert "99" in said


def test_strength_scales_what_is_removed(run):
    weak, full = make_variants(load_run(run), ["ablate"], ["one"], SweepGrid(strengths=(0.25, 1.0)))
    (site,) = {s for s in full.intervention.writes if s.kind == "mlp"}
    assert torch.equal(weak.intervention.writes[site].u, 0.25 * full.intervention.writes[site].u)


@pytest.mark.parametrize(("words", "message"), [
    (("--strengths", "much"), "error: --strengths much: not a number"),
    (("--strengths", "0.5,nan"), "error: --strengths nan: not a finite number"),
    (("--strengths", "0"), "error: --strengths 0.0: an edit of that size changes nothing"),
    (("--alphas", "1,2,1"), "error: --alphas: 1.0 is given twice"),
    (("--alphas", ","), "error: --alphas is empty"),
    (("--ranks", "0"), "error: --ranks 0: neither a positive number nor acc99 or acc95"),
    (("--ranks", "acc90"), "error: --ranks acc90: neither a positive number nor acc99 or acc95"),
    (("--ranks", "9"), "error: --ranks 9: nullspace has only "),
    (("--multipliers", "-1"), "error: --multipliers -1.0: not a positive number; both signs are tried"),
    (
        ("--methods", "ablate,nullspace", "--alphas", "1"),
        "error: --alphas belongs to reflect, but the sweep tries only ablate and nullspace",
    ),
    (("--methods", "actadd", "--strengths", "2"), "error: --strengths belongs to ablate and "),
    (("--methods", "leace", "--ranks", "1"), "error: --ranks belongs to nullspace and reflect, but the sweep"),
    (("--methods", "ablate", "--multipliers", "1"), "error: --multipliers belongs to actadd, but the sweep tries only"),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")  # fmt: skip
def test_wrong_values_are_one_line_before_any_engine(words, message, model, run, tmp_path, monkeypatch):
    monkeypatch.setattr("orthogonalize.evals.setup.open_engine", lambda *a: pytest.fail("an engine was started"))
    status, said = swept(model, run, tmp_path / "out", *words)
    assert status == 1
    assert said.startswith(message), said
    assert "\n" not in said


def test_actadd_takes_inlps_first_direction_at_the_difference_s_length(model, run, tmp_path):
    words = ("edit", model, "--run", run, "--method", "actadd")
    for finder in ("dim", "inlp"):
        status, said = command(*words, "--finder", finder, "--out", tmp_path / finder)
        assert status == 0, said
        assert f"finder {finder}" in said
    recipe, found = load_recipe(tmp_path / "inlp"), load_run(run)
    choice = recipe.choice
    best = next(c for c in found.candidates if c.finder == "inlp")
    assert (choice.finder, choice.position, choice.layer) == ("inlp", best.position, best.layer)
    (added,) = [m.s for m in recipe.intervention().writes.values()]
    difference = found.directions.mean_diff(choice.position, choice.layer)
    first = found.directions.basis("inlp", choice.position, choice.layer)[0]
    assert added.norm().item() == pytest.approx(difference.norm().item())
    assert abs(added @ first).item() == pytest.approx(added.norm().item())
    assert added @ difference > 0
    (plain,) = [m.s for m in load_recipe(tmp_path / "dim").intervention().writes.values()]
    command(*words, "--out", tmp_path / "default")
    assert load_recipe(tmp_path / "default").choice.finder is None
    (default,) = [m.s for m in load_recipe(tmp_path / "default").intervention().writes.values()]
    assert torch.equal(plain, default)
    status, said = command("edit", model, "--recipe", tmp_path / "inlp" / "orthogonalize.json", "--out", tmp_path / "b")
    assert status == 0, said
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "inlp" / "model.safetensors").read_bytes()


def test_inlps_first_direction_is_turned_to_the_positive_side(run):
    found = load_run(run).directions
    choice = EditConfig(method="actadd", scope="one", position=-1, layer=2, finder="inlp")
    subspace = found.subspaces[-1, 2]
    assert subspace.rank == 2
    for sign in (1, -1):
        turned = replace(found, subspaces={(-1, 2): replace(subspace, basis=sign * subspace.basis)})
        (added,) = [m.s for m in intervention_from_directions(choice, turned).writes.values()]
        assert added @ found.mean_diff(-1, 2) > 0
        expected = (added @ subspace.basis[0]).sign() * found.mean_diff(-1, 2).norm() * subspace.basis[0]
        assert torch.allclose(added, expected, atol=1e-6)


def test_reflect_mirrors_the_mean_difference_if_asked(model, run, tmp_path):
    words = ("edit", model, "--run", run, "--method", "reflect", "--finder", "dim", "--scope", "one")
    status, said = command(*words, "--out", tmp_path / "out")
    assert status == 0, said
    recipe = load_recipe(tmp_path / "out")
    basis = load_run(run).directions.basis("dim", recipe.choice.position, recipe.choice.layer)
    u = next(iter(recipe.intervention().writes.values())).u
    assert torch.allclose(u[:, 0].abs(), 2 * basis[0].abs(), atol=1e-6)


def test_finder_that_a_method_does_not_take_is_one_line(model, run, tmp_path):
    from safetensors.torch import save_file

    words = ("edit", model, "--out", tmp_path / "out")
    status, said = command(*words, "--run", run, "--method", "ablate", "--finder", "inlp")
    assert (status, said) == (1, "error: ablate does not take --finder inlp; it takes dim")
    save_file({"direction": torch.ones(32)}, tmp_path / "d.safetensors")
    given = ("--direction", tmp_path / "d.safetensors", "--method", "actadd", "--layer", "1", "--finder", "inlp")
    assert command(*words, *given) == (1, "error: --finder chooses among the directions of a run; use --run")
