"""`edit --quantize`: a complete quantised checkpoint, which keeps the edit, and which its recipe rebuilds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from helpers.command_line import command
from helpers.compressed import decompressed, tensors_of
from helpers.fp8 import quantised
from helpers.llama import LAYERS, store, tiny_llama
from helpers.tiny_models import store_tiny
from safetensors.torch import load_file, save_file

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.checkpoints.quantization import dequantize
from orthogonalize.commands.edit import edit
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.evals.shared_engine import base_weights, check_pair
from orthogonalize.models.loading import load_model

WIDTH = 192
SHAPE = {"hidden_size": WIDTH, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
SCHEMES = ["fp8", "mxfp4", "nvfp4"]
PARTS = {
    "fp8": {"weight": torch.float8_e4m3fn, "weight_scale": torch.bfloat16},
    "mxfp4": {"weight_packed": torch.uint8, "weight_scale": torch.uint8},
    "nvfp4": {
        "weight_packed": torch.uint8, "weight_scale": torch.float8_e4m3fn, "weight_global_scale": torch.float32
    },
}  # fmt: skip
FLOAT4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
GRIDS = {
    "fp8": torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float(), "mxfp4": FLOAT4, "nvfp4": FLOAT4,
}  # fmt: skip
GROUPS = {"fp8": None, "mxfp4": 32, "nvfp4": 16}


# Sizes that are whole groups, for the tiny models that have others.
EVEN = {"intermediate_size": 192, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 128}


def unit(width: int = WIDTH) -> torch.Tensor:
    vector = torch.randn(width, generator=torch.Generator().manual_seed(4)).double()
    return vector / vector.norm()


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantize")
    store(tiny_llama(**SHAPE), folder / "base", torch.bfloat16, shards=3)
    save_file({"direction": unit().float()}, folder / "direction.safetensors")
    given = {"direction": folder / "direction.safetensors", "method": "ablate", "scope": "all"}
    edit(folder / "base", folder / "plain", **given)
    for scheme in SCHEMES:
        edit(folder / "base", folder / scheme, quantize=scheme, **given)
    return folder


def is_projection(name: str) -> bool:
    return name.endswith("_proj.weight")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_checkpoint_is_complete_and_says_what_is_quantised(work, scheme):
    stored, plain, folder = tensors_of(work / scheme), tensors_of(work / "plain"), work / scheme
    expected = {name for name in plain if not is_projection(name)}
    for name in filter(is_projection, plain):
        for suffix, dtype in PARTS[scheme].items():
            part = name.removesuffix("weight") + suffix
            assert stored[part].dtype == dtype, part
            expected.add(part)
    assert stored.keys() == expected
    for name in plain.keys() & stored.keys() - set(filter(is_projection, plain)):
        assert torch.equal(plain[name], stored[name]), name  # embedding, head and norms are those of the edit
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: f.name for f in folder.glob("*.safetensors") for name in load_file(f)}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in stored.values())
    config = json.loads((folder / "config.json").read_text())
    settings = QuantizationConfig.model_validate(config.pop("quantization_config"))
    assert config == json.loads((work / "plain" / "config.json").read_text())
    assert sorted(settings.ignore) == ["lm_head", "model.embed_tokens"]
    (group,) = settings.config_groups.values()
    assert group.targets == ["Linear"]
    assert (folder / "LICENSE").read_bytes() == (work / "base" / "LICENSE").read_bytes()
    assert load_recipe(folder).quantization.matrices == 7 * LAYERS


@pytest.mark.parametrize("scheme", SCHEMES)
def test_stored_numbers_are_read_as_compressed_tensors_reads_them(work, scheme):
    source, expected = open_checkpoint(work / scheme), decompressed(work / scheme)
    for name in filter(is_projection, expected):
        mine = dequantize(source, name)
        assert torch.allclose(mine.to(expected[name].dtype), expected[name], rtol=2**-7, atol=0), name
        assert float((mine - expected[name].double()).norm() / mine.norm()) < 2**-8, name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_edit_survives_quantisation(work, scheme):
    base, plain, source = tensors_of(work / "base"), tensors_of(work / "plain"), open_checkpoint(work / scheme)
    recorded = {change.name: change.leak for change in load_recipe(work / scheme).tensors}
    edited = [name for name in recorded if is_projection(name)]
    assert len(edited) == 2 * LAYERS
    for name in edited:
        left = float((unit() @ dequantize(source, name)).norm() / (unit() @ base[name].double()).norm())
        assert left < 2e-4, name  # rounded to nearest: 3e-2 in eight bits, 1e-1 in four
        assert recorded[name] == pytest.approx(left, rel=0.02), name
        error = dequantize(source, name) - plain[name].double()
        grid, group = GRIDS[scheme], GROUPS[scheme] or plain[name].shape[1]
        blocks = plain[name].float().unflatten(1, (-1, group))
        scales = blocks.abs().amax(-1, keepdim=True) / grid.max()
        nearest = (blocks / scales).abs().unsqueeze(-1).sub(grid).abs().amin(-1) * scales
        # MXFP4's scales are powers of two, so that its steps are up to twice those of the best scale.
        assert error.norm() < (1.8 if scheme == "mxfp4" else 1.25) * nearest.norm(), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_edits_of_what_reads_the_stream_survive_as_well(work, tmp_path, scheme):
    given = {"direction": work / "direction.safetensors", "method": "ablate", "scope": "from:2"}
    edit(work / "base", tmp_path / "edited", quantize=scheme, **given)
    base, source = tensors_of(work / "base"), open_checkpoint(tmp_path / "edited")
    for layer in (2, 3):
        block = f"model.layers.{layer}"
        for norm, readers in (("input", ("self_attn.q", "self_attn.v")), ("post_attention", ("mlp.gate", "mlp.up"))):
            read = base[f"{block}.{norm}_layernorm.weight"].double() * unit()  # along which it sees the direction
            for name in (f"{block}.{reader}_proj.weight" for reader in readers):
                assert (dequantize(source, name) @ read).norm() < 2e-4 * (base[name].double() @ read).norm(), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounded_to_nearest_every_number_is_the_nearest_one_under_its_scale(work, tmp_path, scheme):
    given = {"direction": work / "direction.safetensors", "method": "ablate", "scope": "all", "rounding": "nearest"}
    edit(work / "base", tmp_path / "plain", **given)
    edit(work / "base", tmp_path / "edited", quantize=scheme, **given)
    plain, stored = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "edited")
    source = open_checkpoint(tmp_path / "edited")
    for name in filter(is_projection, plain):
        scale = stored[name + "_scale"]
        if scheme == "mxfp4":
            scale = torch.exp2(scale.float() - 127)
        elif scheme == "nvfp4":
            scale = scale.float() / stored[name + "_global_scale"]
        wide = scale.double().repeat_interleave(GROUPS[scheme] or plain[name].shape[1], 1)
        exact = plain[name].double().abs()
        nearest = (exact.unsqueeze(-1) - GRIDS[scheme].double() * wide.unsqueeze(-1)).abs().amin(-1)
        error = (dequantize(source, name) - plain[name].double()).abs()
        assert bool((error <= nearest + 2**-7 * exact).all()), name  # it divides by scales in bfloat16


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_loads_what_is_stored(work, scheme):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work / scheme, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(3, 40).unsqueeze(0)).logits  # it decompresses in its first pass
    assert torch.isfinite(logits).all()
    expected = decompressed(work / scheme)
    loaded = model.state_dict()
    assert {name for name in loaded if name.endswith("weight")} == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_transformers_engine_runs_it_near_the_unquantised_edit(work, scheme, dtype):
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.inference_mode():
        quantised, plain = (load_model(work / name, "cpu", dtype)(ids).logits.float() for name in (scheme, "plain"))
    likeness = torch.nn.functional.cosine_similarity(quantised.flatten(), plain.flatten(), 0)
    assert likeness > {"fp8": 0.97, "mxfp4": 0.7, "nvfp4": 0.8}[scheme]  # activations are quantised as well


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_recipe_rebuilds_every_byte(work, tmp_path, scheme):
    edit(work / "base", tmp_path / "again", recipe=work / scheme, workers=3)
    for file in [*(work / scheme).glob("*.safetensors"), work / scheme / "config.json"]:
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    assert load_recipe(tmp_path / "again").weights == load_recipe(work / scheme).weights


def test_an_earlier_edit_is_quantised_by_its_recipe(work, tmp_path):
    status, said = command(
        "edit", work / "base", "--recipe", work / "plain", "--quantize", "fp8", "--out", tmp_path / "again"
    )
    assert status == 0, said
    for file in (work / "fp8").glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_matrices_that_servers_fuse_share_their_scale(work):
    stored = tensors_of(work / "nvfp4")
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        for fused in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
            scales = {stored[f"{block}.{name}.weight_global_scale"].item() for name in fused}
            assert len(scales) == 1
        own = {stored[f"{block}.{name}.weight_global_scale"].item() for name in ("mlp.gate_proj", "mlp.down_proj")}
        assert len(own) == 2


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("family", "experts", "routers"), [
    ("mixtral", ["block_sparse_moe.experts.0.w1", "block_sparse_moe.experts.1.w2"], ["block_sparse_moe.gate"]),
    ("qwen2_moe", ["mlp.experts.0.down_proj", "mlp.shared_expert.up_proj"], ["mlp.gate", "mlp.shared_expert_gate"]),
])  # fmt: skip
def test_experts_are_quantised_and_routers_are_not(tmp_path, family, scheme, experts, routers):
    base = store_tiny(family, tmp_path / "base", torch.bfloat16, 64, **EVEN)
    width = json.loads((base / "config.json").read_text())["hidden_size"]
    save_file({"direction": unit(width).float()}, tmp_path / "d.safetensors")
    given = {"direction": tmp_path / "d.safetensors", "method": "ablate", "scope": "layers:1-2"}
    recipe = edit(base, tmp_path / "edited", quantize=scheme, **given)
    stored = tensors_of(tmp_path / "edited")
    ignored = json.loads((tmp_path / "edited/config.json").read_text())["quantization_config"]["ignore"]
    for name in experts:
        assert stored.keys() >= {f"model.layers.1.{name}.{part}" for part in PARTS[scheme]}
    for name in routers:
        assert stored[f"model.layers.1.{name}.weight"].dtype == torch.bfloat16
        assert f"model.layers.1.{name}" in ignored
    edited = [change for change in recipe.tensors if "experts" in change.name]
    assert edited
    assert max(change.leak for change in edited) < 1e-3


def test_layers_of_other_kinds_stay_as_they_are_and_are_named(tmp_path):
    base = store_tiny("lfm2", tmp_path / "base", torch.bfloat16)
    width = json.loads((base / "config.json").read_text())["hidden_size"]
    save_file({"direction": unit(width).float()}, tmp_path / "d.safetensors")
    edit(base, tmp_path / "edited", direction=tmp_path / "d.safetensors", scope="layers:0-3", quantize="fp8", layer=1)
    stored = tensors_of(tmp_path / "edited")
    ignored = json.loads((tmp_path / "edited/config.json").read_text())["quantization_config"]["ignore"]
    convolutions = {name.removesuffix(".weight") for name in stored if ".conv." in name and name.endswith(".weight")}
    assert any(name.endswith("out_proj") for name in convolutions)
    assert "lm_head.weight" not in stored  # it is tied, and servers look for its name all the same
    assert "lm_head" in ignored
    assert convolutions <= set(ignored)
    for name, tensor in stored.items():
        if name.endswith(".weight") and tensor.dim() == 2:
            module = name.removesuffix(".weight")
            assert (tensor.dtype == torch.float8_e4m3fn) == (module not in ignored), name


def test_eval_takes_it_for_its_base_and_never_swaps_its_weights(work):
    for scheme in SCHEMES:
        check_pair(work / scheme, work / "base")
        assert base_weights(work / scheme, work / "base") is None


REFUSED = {
    "lora": (
        ["--scope", "layers:1-2", "--format", "lora"],
        "--quantize fp8 quantises, but an adapter is added to the base as it is; omit --format lora",
    ),
    "shard": (["--shard", "1/2"], "--quantize fp8 quantises the whole checkpoint; omit --shard"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_quantised_is_refused_in_one_line(work, tmp_path, case):
    options, reason = REFUSED[case]
    status, said = command(
        "edit", work / "base", "--direction", work / "direction.safetensors", "--method", "ablate", "--quantize", "fp8",
        *options, "--out", tmp_path / "edited",
    )  # fmt: skip
    assert (status, len(said.splitlines())) == (1, 1)
    assert reason in said
    assert list(tmp_path.iterdir()) == []


def refusal(base: Path, folder: Path, width: int, **options) -> str:
    save_file({"direction": unit(width).float()}, folder / "d.safetensors")
    before = sorted(folder.iterdir())
    given = {"direction": folder / "d.safetensors", "method": "ablate", "scope": "layers:1-2"}
    with pytest.raises(OrthogonalizeError) as caught:
        edit(base, folder / "edited", **{"quantize": "fp8", **given, **options})
    assert sorted(folder.iterdir()) == before
    return str(caught.value)


def test_a_base_that_is_quantised_is_refused(work, tmp_path):
    single = store(tiny_llama(**SHAPE), tmp_path / "single", torch.bfloat16)
    said = refusal(quantised(single, tmp_path / "fp8", "channel"), tmp_path, WIDTH)
    assert "is quantised already (compressed-tensors); leave out --quantize" in said


def test_a_recipe_is_not_quantised_by_another_scheme(work, tmp_path):
    with pytest.raises(OrthogonalizeError, match="the recipe quantises by mxfp4; leave out --quantize"):
        edit(work / "base", tmp_path / "edited", recipe=work / "mxfp4", quantize="fp8")


@pytest.mark.parametrize(("family", "reason"), [
    ("gpt2", r"attn\.c_proj\.weight is stored as \[in, out\] in gpt2 models"),
    ("granitemoe", r"output_linear\.weight holds all experts in one tensor \[4, "),
])  # fmt: skip
def test_layouts_that_no_server_reads_quantised_are_refused_by_name(tmp_path, family, reason):
    base = store_tiny(family, tmp_path / "base", torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    width = config.get("hidden_size") or config["n_embd"]
    with pytest.raises(OrthogonalizeError, match=reason):
        raise OrthogonalizeError(refusal(base, tmp_path, width))


def test_rows_that_are_no_whole_groups_are_refused(tmp_path):
    base = store(tiny_llama(), tmp_path / "base", torch.bfloat16)  # its MLP is 48 wide
    said = refusal(base, tmp_path, 32, quantize="mxfp4")
    assert "down_proj.weight has rows of 48 numbers, which are not whole groups of 32; use --quantize fp8" in said


def test_without_the_library_it_says_what_to_install(work, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    said = refusal(work / "base", tmp_path, WIDTH)
    assert said == ("fp8 needs compressed-tensors, which is not installed: pip install 'orthogonalize[quantize]'")


def test_numbers_that_cannot_be_quantised_leave_an_earlier_result_as_it_was(work, tmp_path):
    model = tiny_llama(**SHAPE)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[5, 7] = float("inf")
    damaged = store(model, tmp_path / "damaged", torch.bfloat16)
    given = {"direction": work / "direction.safetensors", "method": "ablate", "scope": "layers:1-2"}
    edit(work / "base", tmp_path / "edited", **given)
    earlier = {file.name: file.read_bytes() for file in (tmp_path / "edited").iterdir()}
    with pytest.raises(OrthogonalizeError, match=r"up_proj\.weight holds NaN or infinite values, which nvfp4 cannot"):
        edit(damaged, tmp_path / "edited", quantize="nvfp4", force=True, **given)
    assert {file.name: file.read_bytes() for file in (tmp_path / "edited").iterdir()} == earlier
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "edited"]
