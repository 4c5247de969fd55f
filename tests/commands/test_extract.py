"""Extraction in stages: what is kept, what is redone, and how a killed run resumes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.command_line import SMALL, command
from helpers.llama import LAYERS, WIDTH
from safetensors.torch import load_file

from orthogonalize.commands import extract as extraction
from orthogonalize.commands.extract import extract
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import Site
from orthogonalize.data.contrast import read_contrast
from orthogonalize.data.prompts import Prompt
from orthogonalize.directions import activation_store as recording
from orthogonalize.directions import fit as contrast
from orthogonalize.directions.activation_store import Recording, record
from orthogonalize.edits.build import intervention_from_directions
from orthogonalize.edits.config import EditConfig
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.models.activations import all_activations
from orthogonalize.models.loading import load_model
from orthogonalize.reports.run_plots import plot_run
from orthogonalize.selection.candidates import rank
from orthogonalize.selection.probes import probe_accuracy
from orthogonalize.selection.readers import kept_activations
from orthogonalize.selection.readers.kept_activations import KeptActivations
from orthogonalize.selection.run_folder import load_run
from orthogonalize.selection.stages import STAGES


def changed(**settings):
    return dataclasses.replace(SMALL, **settings)


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A private copy of the finished run."""
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The stages that run from here on."""
    stages: list[str] = []
    real = extraction._Extraction.run
    monkeypatch.setattr(extraction._Extraction, "run", lambda self, s: (stages.append(s), real(self, s))[1])
    return stages


def files(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file() and f.suffix != ".png"}


def test_repeated_extraction_does_nothing_and_loads_no_model(copy, model, sources, ran, monkeypatch):
    monkeypatch.setattr(
        "orthogonalize.selection.readers.choose.load_model", lambda *_: pytest.fail("the model was loaded")
    )
    before = files(copy)
    found = extract(str(model), copy, **sources, settings=SMALL)
    assert ran == []
    assert files(copy) == before
    assert found.candidates == load_run(copy).candidates


@pytest.mark.parametrize(
    ("settings", "redone"),
    [
        ({"train": 11}, ["prompts", "activations", "directions", "answers", "selection"]),
        ({"max_rank": 2}, ["directions", "answers", "selection"]),
        ({"trials": 2}, ["selection"]),
    ],
    ids=str,
)
def test_changed_setting_needs_force_and_redoes_later_stages(copy, model, sources, ran, settings, redone):
    before = files(copy)
    with pytest.raises(OrthogonalizeError, match=f"was done with a different {next(iter(settings))}; use --force"):
        extract(str(model), copy, **sources, settings=changed(**settings))
    assert files(copy) == before
    extract(str(model), copy, **sources, settings=changed(**settings), force=True)
    assert ran == redone
    after = files(copy)
    kept = {"prompts.jsonl", "activations.safetensors"} if redone[0] == "directions" else set()
    assert all(after[name] == before[name] for name in kept)


def test_other_prompts_or_weights_are_noticed(copy, model, sources, tmp_path):
    text = Path(sources["negative"]).read_text().replace("wash", "paint the")
    (tmp_path / "other.txt").write_text(text)
    with pytest.raises(OrthogonalizeError, match="a different negative"):
        extract(str(model), copy, positive=sources["positive"], negative=str(tmp_path / "other.txt"), settings=SMALL)
    other = Path(shutil.copytree(model, tmp_path / "other"))
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    with pytest.raises(OrthogonalizeError, match="a different weights"):
        extract(str(other), copy, **sources, settings=SMALL)


CHANGES = {
    "norm epsilon": ("config.json", {"rms_norm_eps": 0.5}),
    "activation": ("config.json", {"hidden_act": "gelu"}),
    "rope": ("config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}),
    "template": ("tokenizer_config.json", {"chat_template": "{{ messages[0]['content'] }} :"}),
    "template of its own": ("chat_template.jinja", {"a": "{{ messages[0]['content'] }} :"}),
    "tokenizer": ("tokenizer.json", {"truncation": None, "padding": None, "normalizer": {"type": "Lowercase"}}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_beside_the_weights_is_noticed(name, copy, model, sources, tmp_path):
    file, change = CHANGES[name]
    other = Path(shutil.copytree(model, tmp_path / "other"))
    known = json.loads((other / file).read_text()) if file.endswith(".json") and (other / file).exists() else {}
    (other / file).write_text(json.dumps(known | change))
    with pytest.raises(OrthogonalizeError, match="a different model's other files"):
        extract(str(other), copy, **sources, settings=SMALL)


def test_stages_run_one_by_one_give_the_same_run(run, model, sources, tmp_path, ran):
    out = tmp_path / "run"
    for stage in ("prompts", "activations", "directions", "answers"):
        assert extract(str(model), out, **sources, settings=SMALL, stage=stage) is None
        with pytest.raises(OrthogonalizeError, match="is unfinished; re-run the same extract command"):
            load_run(out)
    with pytest.raises(OrthogonalizeError, match="--stage selection needs stage 'prompts'"):
        extract(str(model), out, **sources, settings=changed(seed=5), stage="selection")
    assert extract(str(model), out, **sources, settings=SMALL, stage="selection") is not None
    assert ran == ["prompts", "activations", "directions", "answers", "selection"]
    mine, theirs = files(out), files(run)
    assert mine["prompts.jsonl"] == theirs["prompts.jsonl"]
    assert mine["activations.safetensors"] == theirs["activations.safetensors"]
    assert mine["directions.safetensors"] == theirs["directions.safetensors"]
    assert load_run(out).candidates == load_run(run).candidates


KILLED = """
import sys
from pathlib import Path
from helpers.command_line import SMALL
from importlib import import_module
from orthogonalize.commands.extract import extract
module = import_module('orthogonalize.{module}')
count = 0
real = module.{name}
def stopping(*args, **kwargs):
    global count
    count += 1
    if count > {calls}:
        Path(sys.argv[4]).touch()
        import time; time.sleep(60)
    return real(*args, **kwargs)
module.{name} = stopping
extract(sys.argv[1], sys.argv[3], positive=sys.argv[2] + "/positive.txt", negative=sys.argv[2] + "/negative.txt",
        settings=SMALL)
"""


@pytest.mark.parametrize(
    ("module", "name", "calls", "done"),
    [
        ("directions.activation_store", "_Writing.store", 10, ["prompts"]),
        ("selection.readouts", "behaviour_score", 8, ["prompts", "activations", "directions", "answers"]),
        (
            "selection.scoring",
            "read_outputs",
            2,
            ["prompts", "activations", "directions", "answers"],
        ),
    ],
    ids=["activations", "scores", "trials"],
)
def test_killed_run_resumes_where_it_stopped(
    run, model, sources, tmp_path, ran, monkeypatch, module, name, calls, done
):
    out, flag = tmp_path / "run", tmp_path / "reached"
    code = KILLED.format(module=module, name=name, calls=calls)
    words = [str(model), str(Path(sources["positive"]).parent), str(out), str(flag)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=Path(__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not flag.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(json.loads((out / "stages.json").read_text())) == done
    calls_now = []
    if done == ["prompts"]:
        real = kept_activations.capture
        monkeypatch.setattr(
            kept_activations, "capture", lambda m, ids, p: (calls_now.append(len(ids)), real(m, ids, p))[1]
        )
    extract(str(model), out, **sources, settings=SMALL)
    assert ran == [s for s in STAGES if s not in done]
    if done == ["prompts"]:
        assert 0 < sum(calls_now) < 2 * (SMALL.train + SMALL.val), "what was read before is not read again"
    mine, theirs = files(out), files(run)
    assert mine["activations.safetensors"] == theirs["activations.safetensors"]
    assert mine["directions.safetensors"] == theirs["directions.safetensors"]
    assert load_run(out).candidates == load_run(run).candidates
    assert load_run(out).trials == load_run(run).trials
    assert not [f for f in out.iterdir() if f.name.startswith(".")], "no journal is left"


@pytest.mark.parametrize("force", [False, True], ids=["resumed", "forced"])
@pytest.mark.parametrize(
    "damage", [b"\xff\xfe[", b'{"inputs": 3}\n[[[\n', b"null\n" * 3], ids=["bytes", "line", "null"]
)
def test_a_damaged_journal_is_dropped_and_wedges_nothing(damage, force, copy, run, model, sources, monkeypatch):
    notes: list[str] = []
    monkeypatch.setattr("orthogonalize.core.journal.note", notes.append)
    stages = json.loads((copy / "stages.json").read_text())
    del stages["selection"]
    (copy / "stages.json").write_text(json.dumps(stages))
    (copy / ".selection.journal").write_bytes(damage)
    found = extract(str(model), copy, **sources, settings=SMALL, force=force)
    assert any("is damaged, and is dropped" in each for each in notes)
    assert found.candidates == load_run(run).candidates
    assert not (copy / ".selection.journal").exists()


def random_ids(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 15, (count,), generator=generator).tolist()
    return [torch.randint(3, 90, (n,), generator=generator).tolist() for n in lengths]


def test_stored_activations_are_those_of_the_model(model, tmp_path):
    loaded, ids = load_model(model, dtype=torch.float32), random_ids(20)
    sets = {"positive.train": ids[:13], "negative.train": ids[13:], "negative.spare": []}
    found = record(loaded, sets, 3, LAYERS + 1, tmp_path, "inputs")
    expected = all_activations(loaded, ids, 3)
    for layer in range(LAYERS + 1):
        assert torch.equal(found.read("positive.train", layer), expected[:13, :, layer])
        assert torch.equal(found.read("negative.train", layer, slice(2, 4)), expected[15:17, :, layer])
        assert torch.allclose(found.mean("negative.train", layer), expected[13:, :, layer].double().mean(0), atol=1e-12)
    assert found.count("negative.spare") == 0
    with pytest.raises(OrthogonalizeError, match=r"no activations of positive\.val"):
        found.read("positive.val", 0)
    with pytest.raises(OrthogonalizeError, match="--stage activations"):
        Recording(tmp_path / "none.safetensors")


def test_diff_in_means_alone_never_holds_all_prompts_in_memory(run, monkeypatch):
    found = Recording(run / "activations.safetensors")
    monkeypatch.setattr(recording, "ROWS_AT_A_TIME", 4)
    most = []
    real = Recording.read
    monkeypatch.setattr(
        Recording, "read", lambda self, *args: (most.append(len(real(self, *args))), real(self, *args))[1]
    )
    settings = contrast.DirectionSettings(("dim",), None, "newton", "logistic", 0, 1)
    alone = contrast.find_directions(found, (-3, -2, -1), LAYERS + 1, settings, torch.device("cpu"))
    assert max(most) <= 4
    assert torch.allclose(alone.mean_diffs.float(), load_run(run).directions.mean_diffs, atol=1e-6)


def test_several_seeds_show_the_stability_of_the_directions(model, sources, run, tmp_path):
    extract(str(model), tmp_path / "run", **sources, settings=changed(seeds=3, trials=0, train=10))
    found = load_run(tmp_path / "run")
    assert {p.split for p in found.prompts} == {"train", "val", "test", "spare"}
    for method in ("dim", "inlp"):
        cosines = found.directions.stability[method]
        assert cosines.shape == (3, 3, LAYERS + 1)
        assert (cosines.abs() <= 1 + 1e-6).all()
        assert 0 < cosines[0, -1, LAYERS] < 1 - 1e-4, "halves without a common prompt have different directions"
        assert len(set(cosines[:, -1, LAYERS].tolist())) == 3, "each draw halves the prompts anew"
    # The run's own directions are the same, whatever the number of seeds.
    extract(str(model), tmp_path / "one", **sources, settings=changed(trials=0, train=10))
    one = load_run(tmp_path / "one").directions
    assert torch.equal(one.mean_diffs, found.directions.mean_diffs)
    assert not one.stability
    plot_run(found, tmp_path / "run")
    assert (tmp_path / "run" / "plots" / "cosines.png").stat().st_size > 5000


def test_global_scores_and_their_rank_correlation_are_optional(model, sources, tmp_path):
    settings = changed(scoring=("local", "global"), trials=0, finders=("dim", "leace"), enough=0)
    extract(str(model), tmp_path / "run", **sources, settings=settings)
    found = load_run(tmp_path / "run")
    assert all(c.global_bypass is not None and c.global_kl >= 0 for c in found.candidates)
    stored = json.loads((tmp_path / "run" / "candidates.json").read_text())
    assert set(stored["spearman"]) == {"dim", "leace"}
    assert all(-1 <= value <= 1 for value in stored["spearman"].values())


def test_rewritten_ranks_are_those_that_edit_uses(copy, model, tmp_path):
    loose = rank(load_run(copy).candidates, kl=1e9, induce=-1e9, prune=0.0)
    status, said = command("rank", copy, "--kl", "1e9", "--induce", "-1e9", "--prune", "0", "--write")
    assert status == 0
    assert "ranks written" in said
    assert load_run(copy).candidates == loose
    status, said = command(
        "edit", model, "--run", copy, "--method", "ablate", "--out", tmp_path / "edited", "--scope", "all"
    )
    assert status == 0
    choice = load_recipe(tmp_path / "edited").choice
    assert (choice.position, choice.layer) == (loose[0].position, loose[0].layer)


def test_chosen_subspaces_are_probed_before_and_after(run, model, tmp_path):
    found = load_run(run)
    assert {p.method for p in found.probes} == {"dim", "inlp", "leace"}
    for p in found.probes:
        assert 0 <= p.after <= 1
        assert (p.chance, p.n) == (0.5, 8)
    dim = next(p for p in found.probes if p.method == "dim")
    held = Recording(run / "activations.safetensors")
    index = found.directions.positions.index(dim.position)
    sets = {split: {side: held.read(f"{side}.{split}", dim.layer)[:, index] for side in ("positive", "negative")}
            for split in ("train", "val")}  # fmt: skip
    assert probe_accuracy(sets["train"], sets["val"]) == dim.before
    status, _ = command("edit", model, "--run", run, "--method", "nullspace", "--out", tmp_path / "edited")
    assert status == 0
    recipe = load_recipe(tmp_path / "edited")
    subspace = found.directions.subspaces[recipe.choice.position, recipe.choice.layer]
    assert [(p.layer, p.rank) for p in recipe.probes] == [(recipe.choice.layer, subspace.rank)]


def test_probe_tells_erased_from_not_erased():
    generator = torch.Generator().manual_seed(0)
    sets = {}
    for split, n in (("train", 60), ("val", 40)):
        sets[split] = {s: torch.randn(n, 50, generator=generator) for s in ("positive", "negative")}
        sets[split]["positive"][:, 3] += 6
    assert probe_accuracy(sets["train"], sets["val"]) > 0.95
    for part in sets.values():
        for side in part.values():
            side[:, 3] = 0
    assert probe_accuracy(sets["train"], sets["val"]) < 0.65
    same = {side: torch.ones(8, 50) for side in ("positive", "negative")}
    assert probe_accuracy(same, same) == 0.5


@pytest.mark.parametrize("scope", ["all", "upto:3", "layers:1-2", "one"])
def test_leace_restores_the_removed_mean_exactly_once(run, scope):
    directions = load_run(run).directions
    choice = EditConfig(method="leace", scope=scope, position=-1, layer=2)
    writes = intervention_from_directions(choice, directions).writes
    eraser = directions.eraser(-1, 2)
    shifted = [site for site, m in writes.items() if m.shifts]
    if scope in ("all", "upto:3"):
        assert shifted == [Site("embed")]
        mean = directions.mean(-1, 2)
    else:
        assert shifted == [Site("mlp", 2)]
        mean = directions.mean(-1, 3) - directions.mean(-1, 1 if scope == "layers:1-2" else 2)
    assert torch.allclose(writes[shifted[0]].s, (eraser.v @ mean) * eraser.u)
    for affine in writes.values():
        assert torch.equal(affine.unshifted.u, eraser.affine().u)
        assert torch.allclose(affine.v.T @ affine.u, torch.ones(1, 1, dtype=torch.float64))


def test_identical_activations_on_both_sides_are_reported(model, sources, tmp_path, monkeypatch):
    real = KeptActivations.capture

    def constant(kept, m, ids, positions):
        for group, hidden in real(kept, m, ids, positions):
            yield group, torch.ones_like(hidden)

    monkeypatch.setattr(KeptActivations, "capture", constant)
    with pytest.raises(OrthogonalizeError, match="the same activations everywhere"):
        extract(str(model), tmp_path / "run", **sources, settings=SMALL)


def test_too_few_prompts_for_a_rank_states_how_many_are_needed(model, sources, tmp_path):
    with pytest.raises(
        OrthogonalizeError, match=r"rank 30 needs at least 31 samples to fit \(about 20 prompts per side"
    ):
        extract(str(model), tmp_path / "run", **sources, settings=changed(max_rank=30))


def test_directions_file_holds_the_documented_tensors(run):
    stored = load_file(run / "directions.safetensors")
    for name in ("mean_diffs", "means", "negative_means", "leace.readers"):
        assert stored[name].shape == (3, LAYERS + 1, WIDTH)
    assert "leace.differences" not in stored, "LEACE's differences are the stored ones"
    assert any(name.startswith("inlp.") and name.endswith(".accuracies") for name in stored)


def test_prompts_are_marked_sensitive_by_option_or_known_source(copy, model, sources, monkeypatch):
    """Your own prompts by `--sensitive`; well-known harmful sets without asking."""
    assert not load_run(copy).info.sensitive
    marked = extract(str(model), copy, **sources, settings=changed(sensitive=True), force=True)
    assert marked.info.sensitive == ["positive", "negative"]
    monkeypatch.setattr(
        "orthogonalize.data.contrast.load_prompts",
        lambda source, side, *_: [Prompt(f"{source} {i}", side) for i in range(8)],
    )
    assert read_contrast(None, "walledai/AdvBench", "tatsu-lab/alpaca")[2] == ["positive"]
    assert read_contrast(None, "tatsu-lab/alpaca", "walledai/HarmBench")[2] == ["negative"]
    assert not read_contrast(None, "tatsu-lab/alpaca", "monology/pile-uncopyrighted")[2]
