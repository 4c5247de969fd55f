"""Architecture descriptions against experiments: every shipped file matches its class, and drafts work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.exactness import BASIS, EXACT, LAYERS, WIDTH, Base, compare, every_read, every_write, rewritten
from helpers.tiny_models import every_family, load_tiny, randomise, store_tiny
from helpers.tiny_settings import VISION, dense
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from orthogonalize.architectures import schema as architectures
from orthogonalize.architectures.schema import Architecture, architecture_of, bias_name, parse
from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.cli import main
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import Intervention, Site, removal
from orthogonalize.edits.bake import bake
from orthogonalize.edits.descriptions.proof import prove
from orthogonalize.models.describe.block_probe import FoundPart
from orthogonalize.models.describe.discovery import Findings, discover
from orthogonalize.models.describe.draft import ModelNames, draft, draft_text
from orthogonalize.models.describe.twin import save_twin, shrink_config
from orthogonalize.models.sites import AUDIO, Sites
from orthogonalize.models.stream import Stream

pytestmark = pytest.mark.usefixtures("one_thread")


def described(folder: Path, architecture: Architecture) -> dict[str, dict]:
    """What a description says about a checkpoint and its model, in the form of the findings."""
    checkpoint = open_checkpoint(folder)
    sites = Sites(architecture, checkpoint.config, checkpoint.tensors)
    model = load_tiny(folder)
    stream = Stream(model, architecture, model.config.to_dict())
    modules = dict(model.named_modules())
    parts: dict[str, dict] = {}
    for layer in range(LAYERS):
        block = stream.block_name(layer)

        def group(name: str, layer: int = layer) -> str:
            inner = name.removeprefix(sites.in_layer("", layer))
            return ".".join("{expert}" if piece.isdecimal() else piece for piece in inner.split("."))

        for kind in ("attn", "mlp"):
            for part in sites.parts(Site(kind, layer)):
                said = parts.setdefault(part.module, {"writes": {}, "reads": {}})
                norm = next((n for n in part.norm if f"{block}.{n}" in modules), None)
                factor = 1.0 if part.scale_inside else architecture.scale(part.scale, checkpoint.config)
                said |= {
                    "norms": [norm] if norm else [],
                    "post_norms": [n for n in part.post_norm if f"{block}.{n}" in modules],
                }
                said |= {"factor": pytest.approx(factor, rel=1e-3), "stored_as": part.stored_as}
                for write in sites.writes(part, layer):
                    said["writes"][group(write.name)] = write.axis
                    bias = bias_name(write.name)
                    if bias in checkpoint.tensors:
                        said["writes"][group(bias)] = len(checkpoint.tensors[bias].shape) - 1
                said["reads"] |= {group(read.name): read.axis for read in sites.reads(part, layer)}
    embed = {e.weight: e.axis for e, _ in sites.embedded() if not e.image}
    head = {"head": sites.head, "norm": architecture.head.norm, "decoder": sites.decoder}
    norms = {"kind": architecture.norms.kind, "offset": architecture.norms.offset}
    return {"parts": parts, "embed": embed, "head": head, "norms": norms, "inert": set(architecture.inert)}


def found(findings: Findings) -> dict[str, dict]:
    parts = {
        part.module: {
            key: getattr(part, key) for key in ("norms", "post_norms", "factor", "writes", "reads", "stored_as")
        }
        for kind in findings.parts.values()
        for part in kind
    }
    head = {"head": findings.head, "norm": findings.head_norm, "decoder": findings.decoder}
    norms = {"kind": findings.kind, "offset": findings.offset}
    return {"parts": parts, "embed": findings.embed, "head": head, "norms": norms, "inert": set(findings.inert)}


# Where files say other than what experiments see. Gemma 3n: its MLP reads the stream and what LAuReL adds past its norm
# (edits of what is read are refused). Llama 3.2 Vision: gates stand behind writes (which have no biases to scale).
BEYOND = {"gemma3n": {"norms", "reads"}, "mllama multimodal": {"factor"}}


@pytest.mark.parametrize("name", every_family())
def test_experiments_agree_with_every_architecture_file(name, tmp_path):
    source = store_tiny(name, tmp_path / "model", torch.float32, tie_word_embeddings=False)
    findings = found(discover(source))
    said = described(source, architecture_of(open_checkpoint(source).config))
    before = architecture_of(open_checkpoint(source).config).head.before
    beside = (
        {read for part in said["parts"].values() for read in part["reads"]}
        if "reads" in BEYOND.get(name, ())
        else set()
    )
    for parts in (findings["parts"], said["parts"]):
        for part in parts.values():
            for key in BEYOND.get(name, ()):
                del part[key]
    for part in ("parts", "embed", "head", "norms"):
        assert findings[part] == said[part], part
    unused = {n for n in findings["inert"] if not n.endswith(".bias") and not (before and n.endswith(before))}
    assert unused <= said["inert"] | beside


PATCHES = {"pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
PIXELS = {"pixel_values": torch.randn(1, 3, 28, 28)}
PICTURES = {
    "gemma3 multimodal": PIXELS,
    "ministral3 multimodal": PIXELS | {"image_sizes": torch.tensor([[28, 28]])},
    "llama4 multimodal": PIXELS,
    "qwen3_5 multimodal": PATCHES,
    "qwen3_5_moe multimodal": PATCHES,
    "qwen2_vl multimodal": PATCHES,
    "qwen2_5_vl multimodal": PATCHES,
    "qwen3_vl multimodal": PATCHES,
    "qwen3_vl_moe multimodal": PATCHES,
    "qwen3_omni_moe_thinker multimodal": PATCHES,
    "glm4v multimodal": PATCHES,
}


@torch.inference_mode()
def seen(folder: Path, picture: dict[str, torch.Tensor], direction: torch.Tensor) -> float:
    """How much of `direction` there is in the image features that enter the stream."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found = model.get_image_features(**picture)
    features = found.pooler_output
    if features is None:  # Llama 4 projects them later
        features = model.multi_modal_projector(found.last_hidden_state.flatten(0, -2))
    features = [features] if torch.is_tensor(features) else list(features)
    for deeper in getattr(found, "deepstack_features", None) or []:  # into later layers
        features += [deeper] if torch.is_tensor(deeper) else list(deeper)
    rows = torch.cat([f.reshape(-1, f.shape[-1]) for f in features])
    return ((rows @ direction).abs() / rows.norm(dim=-1)).max().item()


@pytest.mark.parametrize("name", PICTURES)
def test_experiments_agree_with_every_image_projector(name, tmp_path):
    """The last tensor that image features pass, against the file of every multimodal wrapper."""
    source = store_tiny(name, tmp_path / "model", torch.float32)
    checkpoint = open_checkpoint(source)
    sites = Sites(architecture_of(checkpoint.config), checkpoint.config, checkpoint.tensors)
    described = {(n, e.axis) for e, n in sites.embedded() if e.image and not AUDIO.search(n)}
    described |= {(bias_name(n), 0) for n, _ in described if bias_name(n) in checkpoint.tensors}
    candidates = [
        (n, axis)
        for n, info in checkpoint.tensors.items()
        if not n.startswith(sites.decoder) and n != sites.head
        for axis, size in enumerate(info.shape)
        if size == WIDTH
    ]
    direction = BASIS[0].float()

    def seen_without(number: int, axes: list[tuple[str, int]]) -> float:
        def change(tensors):
            for n, axis in axes:
                rows = tensors[n].movedim(axis, -1)
                tensors[n] = (rows - (rows @ direction).unsqueeze(-1) * direction).movedim(-1, axis)
            return tensors

        return seen(rewritten(source, tmp_path / str(number), change), PICTURES[name], direction)

    assert seen_without(0, candidates) < 1e-5
    left_out = [seen_without(1 + i, [c for c in candidates if c != one]) for i, one in enumerate(candidates)]
    assert {one for one, left in zip(candidates, left_out, strict=True) if left > 1e-3} == described
    assert described


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ('"mlp.experts.down_proj" = 1', '"mlp.experts.down_proj" = 2'),
        ("offset = 1.0", "offset = 0.0"),
        ('post_norm = "pre_feedforward_layernorm"', 'post_norm = "post_feedforward_layernorm"'),
    ],
)
def test_experiments_expose_a_wrong_axis_offset_or_norm(wrong, right, tmp_path):
    name = "gpt_oss" if "experts" in wrong else "gemma2" if "post_norm" in wrong else "mistral"
    text = (Path(architectures.__file__).parent / f"{name}.toml").read_text()
    if "offset" in wrong:
        text += '\n[norms]\nkind = "rms"\nepsilon = "rms_norm_eps"\noffset = 1.0\n'
    else:
        assert right in text
        text = text.replace(right, wrong)
    architecture = parse(text, name)
    assert architecture is not None
    source = store_tiny(name, tmp_path / "model", torch.float32, tie_word_embeddings=False)
    assert found(discover(source)) != described(source, architecture)


UNDESCRIBED = ["cwm", "jais2", "solar_open"]


@pytest.mark.parametrize("model_type", UNDESCRIBED)
def test_draft_for_an_undescribed_architecture_is_exact(model_type, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    config = shrink_config(AutoConfig.for_model(model_type))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + 0.3 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(OrthogonalizeError, match="orthogonalize describe"):
        architecture_of(open_checkpoint(tmp_path / "model").config)
    drafted = draft(tmp_path / "model")
    monkeypatch.setattr(architectures, "families", lambda: {model_type: drafted.architecture})
    base = Base(model_type, tmp_path / "model")
    assert compare(base, every_write(), tmp_path / "written") <= EXACT
    if drafted.architecture.norms.kind == "layer":
        with pytest.raises(OrthogonalizeError, match="LayerNorm with a bias"):
            bake(base.checkpoint, every_read())
    else:
        assert compare(base, every_read(), tmp_path / "read", rescaled=True) <= EXACT


def test_draft_of_a_wrapper_asks_for_the_image_projector(tmp_path, monkeypatch):
    """Nothing is edited until that is answered: what images add to the stream would silently be left."""
    text = dense(16) | {"model_type": "llama", "tie_word_embeddings": False}
    vision = VISION | {"model_type": "clip_vision_model", "projection_dim": 24}
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision, image_token_index=90)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).double().eval()
    randomise(model, 0)
    model.save_pretrained(tmp_path / "llava")
    drafted = draft(tmp_path / "llava")
    assert drafted.architecture.model_types == ("llava",)
    (question,) = [q for q in drafted.open_questions if "images" in q]
    assert "multi_modal_projector.linear_1.weight or multi_modal_projector.linear_2.weight" in question
    monkeypatch.setattr(architectures, "families", lambda: {"llava": drafted.architecture})
    with pytest.raises(OrthogonalizeError, match=r"does not say through which tensor .* add an \[embed\.images\]"):
        bake(open_checkpoint(tmp_path / "llava"), every_write())
    answer = (
        '\n[embed.images]\nweight = "multi_modal_projector.linear_2.weight"\naxis = 0\nrows = false\nimage = true\n'
    )
    completed = parse(drafted.text + answer, "llava")
    monkeypatch.setattr(architectures, "families", lambda: {"llava": completed})
    base = Base("llava", tmp_path / "llava")
    assert compare(base, every_write(), tmp_path / "written") <= EXACT
    assert compare(base, every_read(), tmp_path / "read", rescaled=True) <= EXACT
    changed = bake(base.checkpoint, every_write()).checkpoint.edits.keys()
    assert {"multi_modal_projector.linear_2.weight", "multi_modal_projector.linear_2.bias"} <= changed


def test_model_with_an_audio_encoder_is_refused(tmp_path):
    """What it adds to the stream would silently be left unedited."""
    folder = store_tiny("llama", tmp_path / "model", torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"audio_config": {"hidden_size": 24}}))
    assert bake(
        open_checkpoint(folder), every_write()
    ).checkpoint.edits  # a default in the config, without an audio encoder
    heard = rewritten(folder, tmp_path / "hears", lambda t: t | {"audio_projector.weight": torch.zeros(48, 24)})
    with pytest.raises(OrthogonalizeError, match=r"has an audio encoder \(audio_config\)"):
        bake(open_checkpoint(heard), every_write())


def test_wrapper_that_transformers_cannot_build_is_refused(tmp_path):
    config = AutoConfig.for_model("qwen2_audio", text_config=dense(16) | {"model_type": "qwen2"})
    model = AutoModelForCausalLM.from_config(config.get_text_config())
    model.save_pretrained(tmp_path / "model")
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(OrthogonalizeError, match="qwen2_audio wraps a text model in a way that cannot be described"):
        draft(tmp_path / "model")


def test_describe_prints_a_draft_with_open_questions(tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(shrink_config(AutoConfig.for_model("helium")))
    model.save_pretrained(tmp_path / "model")
    result = CliRunner().invoke(
        main, ["--quiet", "describe", str(tmp_path / "model"), "--out", str(tmp_path / "x.toml")]
    )
    assert result.exit_code == 0, result.output
    text = (tmp_path / "x.toml").read_text()
    assert parse(text, "x") is not None
    assert "does vLLM support an untied head" in text
    assert 'writes = { "mlp.down_proj.weight" = 0 }' in CliRunner().invoke(
        main, ["--quiet", "describe", str(tmp_path / "model")]
    ).output  # fmt: skip


def test_names_of_tensors_are_text_in_a_draft():
    """Here of a decoder, of modules and of what images might enter through, which a question names."""
    name = 'a"\n[refused]\nembed = "b\\'
    attn, mlp = (
        FoundPart(kind + name, 1.0, [name], [name], [name], {name: 0}, {name: 1}, {name: name})
        for kind in ("attn", "mlp")
    )
    findings = Findings(
        name, name, name + "{layer}", {"attn": [attn], "mlp": [mlp]}, {name: 1}, 1.0, name, name, "rms", 0.0, True,
        [name], embed_module=name,
    )  # fmt: skip
    small = shrink_config(AutoConfig.for_model("llama"))
    text, _ = draft_text(findings, small, ModelNames("llama", name, name, name, (name,)))
    found = parse(text, "the draft")
    assert found is not None
    assert not found.refused
    assert (found.decoder_modules, found.inert, found.layer) == ((name,), (name,), name + "{layer}")
    [part] = found.mlp.values()
    assert (part.module, part.writes, part.reads) == ("mlp" + name, {name: 0}, {name: 1})


def test_a_class_that_stays_large_is_refused_before_it_takes_memory(tmp_path):
    """By keys that are not among the sizes that are made small."""
    config = AutoConfig.for_model("mamba", conv_kernel=2**33, num_hidden_layers=2)
    with pytest.raises(OrthogonalizeError, match="parameters at the smallest"):
        save_twin(config, tmp_path)


@pytest.mark.parametrize("broken", [{"rope_parameters": {"rope_type": "default", "rope_theta": False}}])
def test_settings_that_lead_to_nan_are_refused(broken, tmp_path):
    base = store_tiny("llama", tmp_path / "base", torch.float32)
    stored = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(stored | broken))
    with pytest.raises(OrthogonalizeError, match=r"puts out NaN: one in config\.json makes no sense; fetch it again$"):
        draft(base)


def test_stream_that_passes_through_norms_leaves_only_edits_of_blocks(tmp_path):
    """What no block writes comes back through such a norm, so there is no scope `all`."""
    save_twin(AutoConfig.for_model("minimax"), tmp_path)
    drafted = draft(tmp_path).architecture
    assert drafted.normalised
    assert drafted.refused.keys() == {"embed", "reads"}
    assert drafted.attn["self_attn"].writes == {"self_attn.out_proj.weight": 0, "self_attn.o_proj.weight": 0}


def test_head_without_a_norm_leaves_only_edits_of_blocks(tmp_path):
    """The blocks' own norms, through which the stream passes, are the last ones."""
    source = store_tiny("opt", tmp_path / "opt", torch.float64, do_layer_norm_before=False, tie_word_embeddings=False)
    drafted = draft(source).architecture
    assert drafted.head.norm is None
    assert drafted.refused.keys() == {"embed", "reads"}
    assert prove(drafted, tmp_path / "opt").gaps.keys() == {"blocks", "conditional", "constants"}


@pytest.mark.parametrize("model_type", ["doge", "hy_v4"])
def test_stream_that_is_more_than_a_sum_has_the_writes_of_its_blocks(model_type, tmp_path):
    """Scales per channel, and several streams that blocks mix: what modules write is found by what they leave out."""
    save_twin(AutoConfig.for_model(model_type), tmp_path)
    drafted = draft(tmp_path).architecture
    assert drafted.attn["self_attn"].writes == {"self_attn.o_proj.weight": 0}
    assert all(name.startswith("mlp.") for part in drafted.mlp.values() for name in part.writes)
    assert drafted.refused.keys() == {"embed", "reads"}


def test_write_that_a_gate_follows_is_refused(tmp_path):
    """RWKV multiplies what its second block writes by a gate per channel: no weight removes a direction there."""
    save_twin(AutoConfig.for_model("rwkv"), tmp_path)
    with pytest.raises(OrthogonalizeError, match=r"feed_forward\..* changes the stream"):
        draft(tmp_path)


def test_description_that_omits_a_write_is_refused(bases, tmp_path):
    """The other way in which a wrong file shows: the width of the shared experts gives them away."""
    base = bases("qwen2_moe")
    part = base.architecture.mlp["dense"]
    fewer = {name: axis for name, axis in part.writes.items() if "shared" not in name}
    wrong = base.architecture.model_copy(update={"mlp": {"dense": part.model_copy(update={"writes": fewer})}})
    with pytest.raises(OrthogonalizeError, match=r"shared_expert\.down_proj\.weight"):
        Sites(wrong, base.checkpoint.config, base.checkpoint.tensors).check_complete()
    assert bake(base.checkpoint, Intervention({Site("mlp", 1): removal(BASIS)})).checkpoint.edits
