"""The full pipeline on a tiny model: extract, edit, rebuild, verify, evaluate with transformers, and errors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.chat import tiny_tokenizer
from helpers.command_line import SMALL, command
from helpers.llama import LAYERS, WIDTH, store, tiny_llama
from safetensors.torch import load_file, save_file

from orthogonalize.cli import main
from orthogonalize.commands.edit import edit
from orthogonalize.commands.evaluate import evaluate
from orthogonalize.commands.extract import extract
from orthogonalize.commands.judge import judge
from orthogonalize.commands.verify import verify
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.data.chat import ChatFormat
from orthogonalize.data.prompts import Prompt
from orthogonalize.edits.config import EditConfig
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.models.loading import load_model
from orthogonalize.reports.schema import Report
from orthogonalize.selection.resolve import choose
from orthogonalize.selection.run_folder import load_run, save_prompts

FIGURES = True  # of runs, at which a test looks


def weights(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.glob("*.safetensors"))}


def test_run_folder_holds_everything_a_choice_needs(run):
    found = load_run(run)
    assert {f.name for f in run.iterdir()} == {
        "run.json", "prompts.jsonl", "activations.safetensors", "directions.safetensors", "candidates.json",
        "stages.json", "plots", "tokens.json", "fits",
    }  # fmt: skip
    pictures = {f.stem for f in (run / "plots").iterdir()}
    assert pictures - {"projections-inlp"} == {  # that plot needs a second INLP direction
        *(f"candidates-{method}" for method in ("dim", "inlp", "leace")),
        *("cosines", "inlp-accuracy", "probes", "projections-dim", "trials"),
    }
    assert found.directions.mean_diffs.shape == (3, LAYERS + 1, WIDTH)
    assert len(found.texts("positive", "test")) == 6
    assert {c.finder for c in found.candidates} == {"dim", "inlp", "leace"}
    assert len(found.trials) == 4
    with pytest.raises(OrthogonalizeError, match="extract chose no edit"):  # a random model shows no behaviour
        choose(found)
    shown = replace(found, info=found.info.model_copy(update={"nothing_chosen": None}))
    assert choose(shown) == found.trials[0].choice


def test_mean_difference_is_that_of_the_stored_prompts(run, model):
    """An independent computation: the library's hidden states, prompt by prompt."""
    from transformers import AutoModelForCausalLM

    found, reference = load_run(run), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    chat = ChatFormat(tiny_tokenizer())
    means = []
    for side in ("positive", "negative"):
        states = []
        for text in found.texts(side, "train"):
            with torch.inference_mode():
                hidden = reference(torch.tensor([chat.encode(text)]), output_hidden_states=True).hidden_states
            states.append(torch.stack([h[0, -3:] for h in hidden[:LAYERS]], dim=1))
        means.append(torch.stack(states).double().mean(0))
    assert torch.allclose(found.directions.mean_diffs[:, :LAYERS].double(), means[0] - means[1], atol=1e-5)


def test_same_seed_gives_the_same_run(model, sources, run, tmp_path):
    extract(str(model), tmp_path / "again", **sources, settings=SMALL)
    first, second = load_file(run / "directions.safetensors"), load_file(tmp_path / "again" / "directions.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (run / "prompts.jsonl").read_bytes() == (tmp_path / "again" / "prompts.jsonl").read_bytes()


EDITS = [
    {"pick": 1},
    {"method": "ablate", "scope": "all"},
    {"method": "ablate", "scope": "layers:1-2", "per_layer": True, "strength": 0.7},
    {"method": "ablate", "scope": "top:50%"},
    {"method": "nullspace", "scope": "upto:2", "rank": 1},
    {"method": "nullspace", "scope": "from:2", "rank": "acc95"},
    {"method": "reflect", "scope": "one", "alpha": 2.0},
    {"method": "leace"},
    {"method": "leace", "scope": "layers:1-2", "orthogonal": True},
    {"method": "leace", "scope": "upto:3", "per_layer": True, "position": -1},
    {"method": "reflect", "scope": "from:1", "alpha": 1.5},
    {"method": "actadd"},
    {"method": "actadd", "layer": 0, "position": -1, "per_layer": True, "scope": "layers:1,3", "coefficient": -2.0},
]


@pytest.mark.parametrize("settings", EDITS, ids=str)
def test_edit_verifies_and_its_recipe_rebuilds_the_same_bytes(run, model, tmp_path, settings):
    recipe = edit(str(model), tmp_path / "edited", run=run, **settings)
    proof = verify(tmp_path / "edited").verification
    assert proof is not None
    assert proof.passed, proof
    assert proof.hooks_gap is not None
    assert proof.hooks_gap <= 1e-4
    assert load_recipe(tmp_path / "edited").verification == proof
    assert recipe.tensors
    edit(str(model), tmp_path / "rebuilt", recipe=tmp_path / "edited" / "orthogonalize.json")
    assert weights(tmp_path / "rebuilt") == weights(tmp_path / "edited")
    assert (tmp_path / "rebuilt" / "config.json").read_bytes() == (tmp_path / "edited" / "config.json").read_bytes()
    card = (tmp_path / "edited" / "README.md").read_text()
    assert recipe.choice.describe() in card
    assert "claims of the base" not in card


def test_verify_notices_changed_tensors_files_and_another_base(run, model, tmp_path):
    edit(str(model), tmp_path / "edited", run=run, method="ablate", scope="layers:1")
    file = tmp_path / "edited" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.3.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name] * 1.01}, file, metadata={"format": "pt"})
    (tmp_path / "edited" / "LICENSE").write_text("another")
    audit = verify(tmp_path / "edited", record=False)
    assert set(audit.verification.unexpected_changes) == {name, "LICENSE"}
    assert not audit.verification.passed
    assert audit.changed[name] == pytest.approx(0.01, rel=1e-3)
    edited_name = "model.layers.1.mlp.down_proj.weight"
    save_file(tensors | {edited_name: tensors[edited_name] * 1.01}, file, metadata={"format": "pt"})
    assert verify(tmp_path / "edited", record=False).verification.rebuilt is False
    other = store(tiny_llama(seed=3, tie_word_embeddings=True), tmp_path / "other", torch.float32)
    with pytest.raises(OrthogonalizeError, match="not the base"):
        verify(tmp_path / "edited", str(other))


def test_verify_audits_a_checkpoint_without_a_recipe(run, model, tmp_path):
    edit(str(model), tmp_path / "edited", run=run, method="ablate", scope="all")
    (tmp_path / "edited" / "orthogonalize.json").unlink()
    audit = verify(tmp_path / "edited", str(model))
    assert audit.verification is None
    assert audit.added == ["lm_head.weight"]
    assert len(audit.changed) == 1 + 2 * LAYERS
    assert audit.config == {"tie_word_embeddings": (True, False)}
    with pytest.raises(OrthogonalizeError, match="give --base"):
        verify(tmp_path / "edited")


def test_evaluation_matches_independent_counts_and_losses(run, model, tmp_path):
    edit(str(model), tmp_path / "edited", run=run, method="ablate", scope="all")
    report = evaluate(tmp_path / "edited", str(model), run, tmp_path / "report", engine="hf", max_new_tokens=12)
    stored = Report.model_validate_json((tmp_path / "report" / "report.json").read_text())
    assert stored == report
    assert report.base.refusal.target.n == report.edited.refusal.harmless.n == 6
    assert len(report.answers) == 12
    page = (tmp_path / "report" / "report.html").read_text()
    assert "://" not in page  # it fetches nothing
    assert page.count('<details class="item" id="prompt-') == 12
    again = judge(tmp_path / "report")  # the stored answers, counted by wording once more
    for label, judged in (("base", again.base), ("edited", again.edited)):
        counted = getattr(report, label).refusal
        for name in ("target", "harmless"):
            assert judged.refusal.by_category[name].value == getattr(counted, name).value, (label, name)
    assert command("judge", tmp_path / "report" / "report.json")[0] == 0
    # The loss of the base's greedy answers, computed by hand from the library's own loss.
    from transformers import AutoModelForCausalLM

    from orthogonalize.engines.transformers import TransformersEngine

    chat = ChatFormat(tiny_tokenizer())
    prompts = chat.encode_all(load_run(run).texts("negative", "test"))
    with TransformersEngine(model, tiny_tokenizer()) as engine:
        answers = engine.answers(prompts, 12)
    pairs = [(p, a) for p, a in zip(prompts, answers, strict=True) if a]
    for folder, measured in ((model, report.base), (tmp_path / "edited", report.edited)):
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        total = 0.0
        for prompt, answer in pairs:
            labels = torch.tensor([[-100] * len(prompt) + answer])
            with torch.inference_mode():
                total += reference(torch.tensor([prompt + answer]), labels=labels).loss.item() * len(answer)
        expected = total / sum(len(a) for _, a in pairs)
        assert measured.loss.own_completions.value == pytest.approx(expected, abs=1e-3)
    difference = report.paired["loss.own_completions"].difference
    ratio = report.edited.loss.own_completions.value / report.base.loss.own_completions.value
    assert difference == pytest.approx(ratio - 1)


def test_incomplete_checkpoint_is_refused_before_any_engine(run, model, tmp_path):
    edit(str(model), tmp_path / "edited", run=run, method="ablate", scope="all")
    file = tmp_path / "edited" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(OrthogonalizeError, match=r"lacks model\.layers\.2\.mlp\.down_proj\.weight"):
        evaluate(tmp_path / "edited", str(model), run, tmp_path / "report", engine="hf")


def test_choice_is_completed_from_the_run(run):
    found = load_run(run)
    best = found.candidates[0]
    assert choose(found, method="ablate", scope="all") == EditConfig(
        method="ablate", scope="all", position=best.position, layer=best.layer
    )
    inlp = next(c for c in found.candidates if c.finder == "inlp")
    chosen = choose(found, method="nullspace")
    assert (chosen.position, chosen.layer, chosen.scope) == (inlp.position, inlp.layer, "all")
    assert choose(found, method="actadd").scope == "one"
    assert choose(found, method="ablate", layer=2, position=-2).layer == 2


def test_bad_input_is_a_one_line_error_and_writes_nothing(model, run, sources, tmp_path):
    out = tmp_path / "out"
    sides = ("--positive", sources["positive"], "--negative", sources["negative"])
    narrow, same = tmp_path / "narrow.safetensors", tmp_path / "few.txt"
    save_file({"direction": torch.randn(7)}, narrow)
    same.write_text("one\ntwo\n")
    bare = store(tiny_llama(), tmp_path / "bare", torch.float32)
    tiny_tokenizer(None).save_pretrained(bare)
    deeper = store(tiny_llama(num_hidden_layers=5), tmp_path / "deeper", torch.float32)
    wide = tmp_path / "wide.safetensors"
    save_file({"basis": torch.randn(3, WIDTH)}, wide)
    existing = tmp_path / "existing"
    existing.mkdir()
    (existing / "notes.txt").write_text("mine")
    cases = [
        (("extract", "nowhere", "--out", out, *sides), "no such model"),
        (("extract", model, "--out", out), "give a named --concept, or both"),
        (("extract", model, "--out", out, "--positive", same, "--negative", sources["negative"]), "at least 8"),
        (("extract", model, "--out", out, sides[0], sides[1], "--negative", sides[1]), "both sides"),
        (("extract", model, "--out", out, *sides, "--behaviour-tokens", "sorry"), "--no-filter"),
        (("extract", model, "--out", out, *sides, "--behaviour-tokens", "not a token"), "must be one"),
        (("extract", model, "--out", existing, *sides), "exists"),
        (("extract", model, "--out", out, *sides, "--methods", "magic"), "--finders must name dim"),
        (("extract", bare, "--out", out, *sides), "--no-chat-template"),
        (("edit", model, "--out", out), "exactly one of --run, --direction and --recipe"),
        (("edit", model, "--out", out, "--direction", narrow), "width 7 and the model's residual stream 32"),
        (("edit", model, "--out", out, "--run", tmp_path), "not a run folder"),
        (("edit", model, "--out", out, "--run", run, "--scope", "some"), "scope 'some'"),
        (("edit", model, "--out", out, "--run", run, "--position", "-9"), "position"),
        (("edit", model, "--out", out, "--run", run, "--scope", "layers:99"), "no layer 99"),
        (("edit", model, "--out", existing, "--run", run), "exists"),
        (("eval", model, "--base", "nowhere", "--run", run, "--out", out, "--engine", "hf"), "no such model"),
        (("eval", model, "--base", model, "--run", run, "--out", out, "--suite", "magic"), "unknown suite"),
        (("edit", model, "--out", out, "--run", run, "--strength", "nan"), "finite"),
        (("edit", model, "--out", out, "--run", run, "--strength", "0"), "changes nothing"),
        (("edit", model, "--out", out, "--run", run, "--coefficient", "2"), "--coefficient belongs to actadd"),
        (("edit", model, "--out", out, "--run", run, "--method", "nullspace", "--rank", "30"), "rank 30"),
        (
            ("edit", model, "--out", out, "--run", run, "--method", "nullspace", "--per-layer", "--rank", "30"),
            "directions of layer",
        ),
        (("edit", deeper, "--out", out, "--run", run), "the run's model has 4 layers, but this one has 5"),
        (("edit", model, "--out", out, "--direction", wide, "--layer", "77"), "no layer 77"),
        (("edit", model, "--out", out, "--direction", wide, "--method", "ablate"), "one direction, not 3"),
        (("extract", model, "--out", out, *sides, "--device", "nonsense"), "device 'nonsense'"),
        (("extract", model, "--out", out, *sides, "--behaviour-tokens", "999999"), "is not in the model's vocabulary"),
        (("extract", model, "--out", out, *sides, "--template-argument", "tokenize=false"), "rejects this prompt"),
        (("extract", model, "--out", narrow / "x", *sides), "narrow.safetensors"),
        (("extract", model, "--out", out, *sides, "--stage", "directions"), "needs stage 'prompts'"),
        (("extract", model, "--out", out, *sides, "--classifier", "svm"), "--solver sklearn"),
        (("extract", model, "--out", out, *sides, "--scoring", "global"), "--scoring must name local"),
        (
            ("edit", model, "--out", out, "--run", run, "--method", "leace", "--scope", "from:1"),
            "leace cannot use scope 'from'",
        ),
        (("edit", model, "--out", out, "--direction", wide, "--method", "leace"), "leace needs the covariances"),
        (("edit", model, "--out", out, "--direction", wide, "--method", "nullspace", "--rank", "acc99"), "use --run"),
        (("edit", model, "--out", out, "--run", run, "--orthogonal"), "--orthogonal belongs to leace"),
        (("verify", model), "give --base"),
        (("push", model, "me/model"), "no recipe"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for words, message in cases:
        status, said = command(*words)
        assert status == 1, (words, said)
        assert message in said, (words, said)
        assert said.startswith("error: ")
        assert "\n" not in said
        assert sorted(tmp_path.rglob("*")) == before, words


def test_constant_without_an_exact_place_is_refused(model, run, tmp_path, monkeypatch):
    from orthogonalize.architectures.schema import families
    from orthogonalize.edits import plan as planning

    llama = families()["llama"]
    part = llama.mlp["dense"].model_copy(update={"bias": None})
    monkeypatch.setattr(planning, "architecture_of", lambda _config: llama.model_copy(update={"mlp": {"dense": part}}))
    with pytest.raises(OrthogonalizeError, match=r"no bias at mlp\.1.*--layer 0"):
        edit(str(model), tmp_path / "out", run=run, method="actadd", layer=2, position=-1)
    save_file({"direction": torch.randn(WIDTH)}, tmp_path / "direction.safetensors")
    recipe = edit(str(model), tmp_path / "out", direction=tmp_path / "direction.safetensors", method="actadd", layer=0)
    assert [t.name for t in recipe.tensors] == ["model.embed_tokens.weight"]


def test_nan_weights_stop_extraction_and_name_the_layer(sources, tmp_path):
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    folder = store(broken, tmp_path / "broken", torch.float32)
    tiny_tokenizer().save_pretrained(folder)
    status, said = command(
        "extract", folder, "--out", tmp_path / "out", "--positive", sources["positive"],
        "--negative", sources["negative"],
    )  # fmt: skip
    assert status == 1
    assert "input of layer 1 contain NaN" in said


def test_remote_code_runs_only_if_allowed_and_needed(tmp_path):
    folder = store(tiny_llama(), tmp_path / "model", torch.float32)
    config = json.loads((folder / "config.json").read_text())
    remote = {"auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}}
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (folder / "config.json").write_text(json.dumps(config | remote))
    assert type(load_model(folder)).__name__ == "LlamaForCausalLM"  # transformers supports it without remote code
    (folder / "config.json").write_text(json.dumps(config | remote | {"model_type": "nobody_knows"}))
    with pytest.raises(OrthogonalizeError, match="only run by extract --trust-remote-code"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


def test_ctrl_c_exits_with_130_and_leaves_nothing(model, run, tmp_path, monkeypatch):
    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("orthogonalize.commands.edit._write", interrupted)
    status, said = command("edit", model, "--out", tmp_path / "out", "--run", run, "--pick", "1")
    assert status == 130
    assert "interrupted" in said
    assert list(tmp_path.iterdir()) == []


def test_out_of_memory_is_a_one_line_error_in_every_command(model, run, tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    monkeypatch.setattr("orthogonalize.commands.edit._write", full)
    status, said = command("edit", model, "--out", tmp_path / "out", "--run", run, "--pick", "1")
    assert status == 1
    assert "out of memory: DefaultCPUAllocator" in said
    assert "no partial output was left behind. Re-run the command to resume." in said
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("orthogonalize.commands.edit._write", lambda *_: [][1])
    words = ["edit", str(model), "--out", str(tmp_path / "out"), "--run", str(run), "--pick", "1"]
    assert isinstance(CliRunner().invoke(main, words).exception, IndexError)


def test_verify_notices_a_config_flag_that_disables_the_edit(run, model, tmp_path):
    edit(str(model), tmp_path / "edited", run=run, method="actadd")
    file = tmp_path / "edited" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mlp_bias": False}))
    proof = verify(tmp_path / "edited").verification
    assert proof.unexpected_changes == ["config.json: mlp_bias"]
    assert not proof.passed


def test_unicode_line_separators_survive_the_run_folder(run, tmp_path):
    odd = [*load_run(run).prompts, Prompt("one\u2028two\u0085three", "positive", "test")]
    shutil.copytree(run, tmp_path / "run")
    save_prompts(odd, tmp_path / "run")
    assert load_run(tmp_path / "run").prompts == odd
