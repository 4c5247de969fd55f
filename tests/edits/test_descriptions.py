"""Models that no file describes: described by experiment, proven on a small random twin, or refused with the reason."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from helpers.chat import tiny_tokenizer
from helpers.exactness import BASIS
from helpers.tiny_models import randomise
from helpers.tiny_settings import dense
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from orthogonalize.architectures import schema
from orthogonalize.architectures.schema import architecture_of, families, parse, remember, remembered
from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.cli import main
from orthogonalize.commands.edit import edit
from orthogonalize.commands.verify import verify
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import ConditionalMap, Intervention, Site, WriteMatrix, shift
from orthogonalize.edits.bake import bake
from orthogonalize.edits.descriptions import automatic
from orthogonalize.edits.descriptions.automatic import describe_by_experiment, learn
from orthogonalize.edits.descriptions.proof import EXACT, SHOWS, prove
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.engines.experiment import ask as asking
from orthogonalize.engines.experiment.ask import ask_server
from orthogonalize.engines.experiment.questions import Told
from orthogonalize.evals.shared_engine import base_weights
from orthogonalize.models.describe.draft import draft_with_twin
from orthogonalize.models.describe.twin import save_twin

pytestmark = pytest.mark.usefixtures("one_thread")
HELIUM = {"num_key_value_heads": 2, "head_dim": 12}  # a family without a file


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ORTHOGONALIZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def no_failures(monkeypatch):
    monkeypatch.setattr(asking, "_failures", {})


@pytest.fixture
def direction(tmp_path):
    save_file({"direction": BASIS[0].float()}, tmp_path / "direction.safetensors")
    return tmp_path / "direction.safetensors"


def stored(folder, model_type="helium", **settings):
    """A tiny model of a family, stored with a tokenizer."""
    config = AutoConfig.for_model(model_type, **dense(16) | {"tie_word_embeddings": False} | settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    randomise(model, 0)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def no_experiments(*_args):
    raise AssertionError("an experiment was made")


def test_undescribed_model_is_edited_verified_and_rebuilt(tmp_path, direction, monkeypatch):
    """The recipe holds the description, so that neither verifying nor rebuilding needs another experiment."""
    assert "helium" not in families()
    base = stored(tmp_path / "base", **HELIUM)
    edit(base, tmp_path / "edited", direction=direction, method="ablate", scope="all")
    found = load_recipe(tmp_path / "edited").description
    assert found is not None
    assert found.attn.keys() == {"self_attn"}
    monkeypatch.setattr(automatic, "draft_with_twin", no_experiments)
    monkeypatch.setattr(automatic, "cache_folder", lambda: tmp_path / "nothing")
    remember(open_checkpoint(base).config, None)
    proof = verify(tmp_path / "edited").verification
    assert proof.passed
    assert proof.hooks_gap < 1e-4
    edit(base, tmp_path / "again", recipe=tmp_path / "edited")
    assert load_recipe(tmp_path / "again").weights == load_recipe(tmp_path / "edited").weights


def test_experiments_are_kept_by_all_that_they_depend_on(tmp_path, cache, monkeypatch):
    base = stored(tmp_path / "base", **HELIUM)
    learn(open_checkpoint(base))
    (kept,) = (cache / "descriptions").iterdir()
    assert parse(kept.read_text(), "kept").model_types == ("helium",)
    with monkeypatch.context() as patched:
        patched.setattr(automatic, "draft_with_twin", no_experiments)
        learn(open_checkpoint(base))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    learn(open_checkpoint(base))
    assert len(list((cache / "descriptions").iterdir())) == 2


def answering(monkeypatch, answers, reason=""):
    """Have vLLM, if it were asked, give `answers`; the list that is returned counts how often."""
    times = []

    def experiment(_source, _architecture, known):
        times.append(1)
        return Told({**known, **answers}, reason)

    monkeypatch.setattr(asking, "has", lambda _: True)
    monkeypatch.setattr(asking, "experiment", experiment)
    return times


TIED = HELIUM | {"tie_word_embeddings": True}
CONSTANT = {"method": "actadd", "scope": "layers:2", "layer": 2, "coefficient": 3.0}


def test_what_only_a_server_can_tell_is_refused_without_one_and_the_rest_goes_through(tmp_path, direction, monkeypatch):
    monkeypatch.setattr(asking, "has", lambda _: False)
    base = stored(tmp_path / "base", **TIED)
    ways = r"is not known .*vllm is not installed.*layers:.*--method conditional.*--description"
    with pytest.raises(OrthogonalizeError, match=rf"whether vLLM runs one of its own {ways}"):
        edit(base, tmp_path / "edited", direction=direction, method="ablate", scope="all")
    with pytest.raises(OrthogonalizeError, match=r"reads the bias .* mlp.1 .*vllm is not installed.*ablate.*--descr"):
        edit(base, tmp_path / "edited", direction=direction, **CONSTANT)
    assert not (tmp_path / "edited").exists()
    edit(base, tmp_path / "edited", direction=direction, method="ablate", scope="layers:0-3")
    assert verify(tmp_path / "edited").verification.passed
    matrix = WriteMatrix(Site("mlp", 1), "mlp.down_proj")
    inputs = open_checkpoint(base).tensors["model.layers.1.mlp.down_proj.weight"].shape[1]
    conditional = Intervention(conditional={matrix: ConditionalMap(BASIS[:2], torch.ones(2, inputs).double())})
    assert bake(open_checkpoint(base), conditional, ask_server).checkpoint.edits.keys() == {
        "model.layers.1.mlp.down_proj.weight"
    }


def test_answer_of_the_server_goes_into_the_recipe_and_the_cache(tmp_path, direction, monkeypatch):
    base = stored(tmp_path / "base", **TIED)
    times = answering(monkeypatch, {"head": "transformers", "mlp.mlp": "vllm"})
    edit(base, tmp_path / "edited", direction=direction, method="ablate", scope="all")
    recipe = load_recipe(tmp_path / "edited")
    assert recipe.description.head.untied == "transformers"
    assert recipe.description.mlp["mlp"].bias.served == "vllm"
    config = json.loads((tmp_path / "edited" / "config.json").read_text())
    assert config["architectures"] == ["TransformersForCausalLM"]
    assert verify(tmp_path / "edited").verification.passed
    edit(base, tmp_path / "constant", direction=direction, **CONSTANT)
    assert verify(tmp_path / "constant").verification.passed
    assert "model.layers.0.mlp.up_proj.bias" in load_recipe(tmp_path / "constant").added
    assert len(times) == 1
    remember(open_checkpoint(base).config, None)
    assert base_weights(tmp_path / "edited", base).keys() >= {"lm_head.weight"}  # as in another process, for `eval`


def test_edit_that_does_not_depend_on_the_server_does_not_ask_it(tmp_path, direction, monkeypatch):
    times = answering(monkeypatch, {})
    edit(stored(tmp_path / "base", **TIED), tmp_path / "edited", direction=direction, method="ablate", scope="layers:1")
    edit(stored(tmp_path / "untied", **HELIUM), tmp_path / "all", direction=direction, method="ablate", scope="all")
    assert times == []


def test_parameters_that_the_server_does_not_read_are_not_written(tmp_path, direction, monkeypatch):
    base = stored(tmp_path / "base", **TIED)
    answering(monkeypatch, {"head": "never", "mlp.mlp": "never"})
    with pytest.raises(OrthogonalizeError, match=r"vLLM always takes the embedding of helium.*layers:"):
        edit(base, tmp_path / "edited", direction=direction, method="ablate", scope="all")
    with pytest.raises(OrthogonalizeError, match="vLLM does not read its biases"):
        edit(base, tmp_path / "edited", direction=direction, **CONSTANT)
    assert not (tmp_path / "edited").exists()


def test_server_that_cannot_run_a_small_model_is_asked_once_and_named_in_the_refusal(tmp_path, direction, monkeypatch):
    base = stored(tmp_path / "base", **TIED)
    times = answering(monkeypatch, {}, "vLLM ended with SIGSEGV: no message")
    for _ in range(2):
        with pytest.raises(OrthogonalizeError, match=r"is not known \(vLLM ended with SIGSEGV.*\); use a scope of bl"):
            edit(base, tmp_path / "edited", direction=direction, method="ablate", scope="all")
    assert len(times) == 1


def test_answer_to_one_question_counts_where_another_has_none(tmp_path, direction, monkeypatch):
    base = stored(tmp_path / "base", **TIED)
    times = answering(monkeypatch, {"head": "vllm"}, "vLLM stops at biases")
    edit(base, tmp_path / "edited", direction=direction, method="ablate", scope="all")
    assert load_recipe(tmp_path / "edited").description.head.untied == "vllm"
    source, constant = open_checkpoint(base), Intervention({Site("mlp", 1): shift(BASIS[0])})
    with pytest.raises(OrthogonalizeError, match=r"reads the bias .*\(vLLM stops at biases\)"):
        bake(source, constant, ask_server)
    assert len(times) == 1


@pytest.mark.parametrize("name", ["llama", "olmo", "gpt_neox", "gpt_oss", "mixtral", "gemma2"])
def test_biases_are_found_where_shipped_files_have_them(name, tmp_path):
    """All but those behind a norm, which hold no constant; a constant in each is the same with hooks and in weights."""
    save_twin(AutoConfig.for_model(name), tmp_path / "model")
    drafted = draft_with_twin(open_checkpoint(tmp_path / "model"), tmp_path / "twin").architecture
    shipped = families()[name]
    for kind in ("attn", "mlp"):
        found = {part.module: part.bias for part in drafted.parts(kind).values() if part.bias}
        said = {p.module: p.bias for p in shipped.parts(kind).values() if p.bias and not p.post_norm}
        assert found.keys() == said.keys()
        for module, bias in found.items():
            stored_anyway = name in ("gpt_neox", "gpt_oss")  # the class's default has them
            assert bias.flags == ({} if stored_anyway else said[module].flags)
            assert set(bias.zeros) == (set() if stored_anyway else set(said[module].zeros))
            assert bias.served == "unknown"
    proof = prove(drafted, tmp_path / "twin")
    assert ("constants" in proof.gaps) == (name not in ("mixtral", "gemma2"))
    assert proof.gaps.get("constants", 0) <= EXACT


def test_constants_that_a_bias_does_not_hold_are_refused(tmp_path, monkeypatch):
    """Here the constant would be written twice: into both of two biases whose outputs are added."""
    save_twin(AutoConfig.for_model("llama", attention_bias=True, mlp_bias=True), tmp_path)
    architecture = families()["llama"]
    part = architecture.attn["attention"]
    wrong = part.model_copy(update={"scale": "sqrt_width", "scale_inside": True})
    proof = prove(architecture.model_copy(update={"attn": {"attention": wrong}}), tmp_path)
    assert "edited weights differ from hooks" in proof.refused["constants"]
    monkeypatch.setattr(
        schema, "families", lambda: {"llama": architecture.model_copy(update={"refused": proof.refused})}
    )
    with pytest.raises(OrthogonalizeError, match=r"cannot be edited by constants in blocks.*conditional"):
        bake(open_checkpoint(tmp_path), Intervention({Site("mlp", 1): shift(BASIS[0])}))
    assert bake(open_checkpoint(tmp_path), Intervention({Site("embed"): shift(BASIS[0])})).checkpoint.edits


def test_model_whose_blocks_scale_the_stream_is_edited_in_its_blocks_alone(tmp_path, direction):
    base = stored(tmp_path / "base", "doge", is_moe=False)
    with pytest.raises(OrthogonalizeError, match=r"blocks do more with the stream than add to it.*layers:"):
        edit(base, tmp_path / "edited", direction=direction, method="ablate", scope="all")
    assert not (tmp_path / "edited").exists()
    edit(base, tmp_path / "edited", direction=direction, method="ablate", scope="layers:1")
    assert verify(tmp_path / "edited").verification.passed


def test_model_that_experiments_cannot_describe_is_refused_before_anything_is_written(tmp_path, direction):
    """RWKV multiplies what its second block writes by a gate."""
    base = stored(tmp_path / "base", "rwkv", attention_hidden_size=48)
    with pytest.raises(OrthogonalizeError, match=r"'rwkv' is not supported.*experiments .* cannot: .*--description"):
        edit(base, tmp_path / "edited", direction=direction, method="ablate", scope="layers:1")
    assert not (tmp_path / "edited").exists()


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """A twin whose block outputs pass a norm, and its true description."""
    folder = tmp_path_factory.mktemp("twin")
    save_twin(AutoConfig.for_model("gemma2"), folder)
    return folder, families()["gemma2"]


def changed(architecture, **update):
    part = architecture.mlp["dense"].model_copy(update=update)
    return architecture.model_copy(update={"mlp": {"dense": part}})


def test_true_description_is_proven_of_every_kind_of_edit(twin):
    folder, architecture = twin
    proof = prove(architecture, folder)
    assert proof.gaps.keys() == {"blocks", "conditional", "embed", "reads"}
    assert max(proof.gaps.values()) <= EXACT
    assert proof.missed > SHOWS
    assert proof.refused == {}


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"writes": {}}, r"does not describe .*down_proj|still writes"),
        ({"post_norm": ()}, r"differ from hooks|still writes"),
        ({"writes": {"mlp.down_proj.weight": 0, "mlp.up_proj.weight": 1}}, r"differ from hooks|does not show"),
    ],
)
def test_wrong_description_is_not_proven(update, message, twin):
    folder, architecture = twin
    with pytest.raises(OrthogonalizeError, match=message):
        prove(changed(architecture, **update), folder)


def test_missed_write_shows_even_if_it_is_called_inert(twin):
    """The stream itself is looked at, not only what the description names."""
    folder, architecture = twin
    named = ("mlp.down_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight")
    with pytest.raises(OrthogonalizeError, match="still writes a direction"):
        prove(architecture.model_copy(update={"mlp": {}, "inert": named}), folder)


def test_routed_and_shared_experts_of_one_block_are_edited_apart(tmp_path):
    """Both are stacks of matrices, with a conditional map each."""
    settings = {"num_hidden_layers": 1, "mlp_layer_types": ["sparse"], "layer_types": ["hybrid"]}
    save_twin(AutoConfig.for_model("inkling_text", **settings), tmp_path / "model")
    drafted = draft_with_twin(open_checkpoint(tmp_path / "model"), tmp_path / "twin")
    writes = drafted.architecture.mlp["mlp"].writes
    assert writes == {"mlp.experts.down_proj": 1, "mlp.shared_experts.down_proj": 1}
    assert prove(drafted.architecture, tmp_path / "twin").gaps["conditional"] <= EXACT


def test_wrong_norms_leave_only_what_does_not_need_them(tmp_path):
    save_twin(AutoConfig.for_model("mistral"), tmp_path)
    architecture = families()["mistral"]
    wrong = architecture.model_copy(update={"norms": architecture.norms.model_copy(update={"offset": 1.0})})
    proof = prove(wrong, tmp_path)
    assert proof.refused.keys() == {"reads"}
    assert "differ from hooks" in proof.refused["reads"]


def test_description_of_ones_own_counts_more_and_is_proven(tmp_path, direction):
    base = stored(tmp_path / "base", **HELIUM)
    text, _ = describe_by_experiment(open_checkpoint(base))
    (tmp_path / "mine.toml").write_text(text.replace('untied = "unknown"', 'untied = "transformers"'))
    options = ["--direction", str(direction), "--scope", "layers:1", "--description", str(tmp_path / "mine.toml")]
    result = CliRunner().invoke(main, ["edit", str(base), "--out", str(tmp_path / "edited"), *options])
    assert result.exit_code == 0, result.output
    assert load_recipe(tmp_path / "edited").description.head.untied == "transformers"
    (tmp_path / "mine.toml").write_text(text.replace('"mlp.down_proj.weight" = 0', '"mlp.up_proj.weight" = 1'))
    result = CliRunner().invoke(main, ["edit", str(base), "--out", str(tmp_path / "other"), *options])
    assert result.exit_code == 1
    assert "mlp.down_proj.weight" in result.output
    assert not (tmp_path / "other").exists()


def test_description_of_another_family_is_refused(tmp_path):
    base = stored(tmp_path / "base", **HELIUM)
    text, _ = describe_by_experiment(open_checkpoint(base))
    (tmp_path / "mine.toml").write_text(text.replace('["helium"]', '["walrus"]'))
    with pytest.raises(OrthogonalizeError, match="does not describe models of type 'helium'"):
        learn(open_checkpoint(base), tmp_path / "mine.toml")


def test_what_is_remembered_belongs_to_one_model():
    llama = families()["llama"]
    one, other = ({"model_type": "llama", "hidden_size": size, "pad_token_id": size} for size in (48, 64))
    mine = llama.model_copy(update={"family": "mine"})
    remember(one, mine)
    try:
        assert architecture_of(one | {"pad_token_id": 3, "vocab_size": 100}) is mine
        assert architecture_of(other) is llama
    finally:
        remember(one, None)
    assert remembered(one) is None
