"""FP8 checkpoints stay FP8 checkpoints; coarser formats are refused with advice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.fp8 import FP8, LAYOUTS, quantised, widened
from helpers.llama import LAYERS, store, tiny_llama
from safetensors.torch import load_file, save_file

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.checkpoints.settings_files import quantization
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import Intervention, Site, removal, shift
from orthogonalize.edits.bake import bake
from orthogonalize.edits.scopes import map_sites, parse_scope
from orthogonalize.engines.shared_base import edited_weights

WIDTH = 192
SHAPE = {"hidden_size": WIDTH, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return store(tiny_llama(**SHAPE), tmp_path_factory.mktemp("fp8") / "base", torch.bfloat16)


def direction() -> torch.Tensor:
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return vector / vector.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("scope", "strength"), [("all", 1.0), ("layers:1-2", 2.0), ("from:1", 1.0)])
def test_fp8_checkpoint_is_edited_in_its_own_layout(original, tmp_path, layout, scope, strength):
    source = open_checkpoint(quantised(original, tmp_path / "fp8", layout))
    suffix, _, every, _ = LAYOUTS[layout]
    plan = bake(source, map_sites(parse_scope(scope), LAYERS, lambda _: removal(direction().unsqueeze(0), strength)))
    (tmp_path / "edited").mkdir()
    written = plan.write(tmp_path / "edited")
    before, after = (load_file(f / "model.safetensors") for f in (source.path, tmp_path / "edited"))
    edited = {name for name in plan.checkpoint.edits if before.get(name, torch.empty(0)).dtype == FP8}
    assert len(edited) >= 4
    scales = {name.removesuffix("weight") + suffix for name in edited}
    for name in before.keys() - plan.checkpoint.edits.keys() - scales:
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name
    kept = 0
    for name in edited:
        assert after[name].dtype == FP8
        other = name.removesuffix("weight") + suffix
        kept += int((before[other] == after[other]).sum())
        old, new = (t[name].double() * widened(t[other], t[name].shape, every).double() for t in (before, after))
        exact = plan.checkpoint.edits[name].exact(old)
        component, wanted, had = (plan.checkpoint.edits[name].component(t) for t in (new, exact, old))
        # 192 numbers of 3 bits cannot cancel as finely as the thousands of test_rounding.
        assert (component - wanted).norm() <= 1e-3 * (wanted - had).norm()
        assert written.records[name].leak <= 1e-3
        wide = widened(after[other], new.shape, every).double()
        nearest = (exact / wide).clamp(-448, 448).to(FP8).double() * wide
        assert (new - exact).norm() <= 1.4 * (nearest - exact).norm()
        assert (new - exact).abs().max() <= 40 * wide.max()  # nothing was clipped
    assert kept  # a scale is kept where the numbers still fit
    swapped = edited_weights(plan.checkpoint) | {
        name: addition.make for name, addition in plan.checkpoint.additions.items()
    }
    for name, tensor in after.items():  # a swapped engine holds what is written, including scales
        now = swapped[name]() if name in swapped else before[name]
        assert torch.equal(now.contiguous().flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


def test_block_scales_agree_with_transformers_dequantization(original, tmp_path):
    """transformers loads base and edited FP8 checkpoints on a CPU and dequantises them itself."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    source = quantised(original, tmp_path / "fp8", "small blocks")
    plan = bake(
        open_checkpoint(source), map_sites(parse_scope("all"), LAYERS, lambda _: removal(direction().unsqueeze(0)))
    )
    (tmp_path / "edited").mkdir()
    plan.write(tmp_path / "edited")
    settings = FineGrainedFP8Config(weight_block_size=(32, 64), dequantize=True)
    models = [
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32, quantization_config=settings)
        for f in (source, tmp_path / "edited")
    ]
    name = "model.layers.1.mlp.down_proj.weight"
    old, new = (dict(m.named_parameters())[name].double() for m in models)
    assert old.dtype == new.dtype != FP8
    assert (direction() @ old).norm() > 1e-2
    assert (direction() @ new).norm() <= 5e-3 * (direction() @ old).norm()  # the library dequantises to bfloat16


def test_too_coarse_format_is_refused_with_advice(original, tmp_path):
    tensors = load_file(original / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weight = tensors.pop(name)
    stem = name.removesuffix(".weight")
    cases = [
        ({stem + "_blocks": torch.zeros(4, 16, dtype=torch.uint8)}, "MXFP4.*dequantise it first"),
        ({stem + ".weight_packed": torch.zeros(4, 16, dtype=torch.int32)}, "packed integers.*dequantise"),
        ({stem + ".qweight": torch.zeros(4, 16, dtype=torch.int32)}, "GPTQ or AWQ"),
        (
            {
                stem + ".weight_packed": torch.zeros(4, 16, dtype=torch.uint8),
                stem + ".weight_global_scale": torch.ones(1),
            },
            "stored as NVFP4.*dequantise it first",
        ),
        ({name: torch.zeros(4, 16, dtype=torch.uint8), name + "_scale_2": torch.ones(())}, "stored as NVFP4"),
        ({name: weight.to(torch.int8)}, "stored as I8"),
        ({name: weight.to(FP8)}, "without scales"),
        ({name: weight.to(FP8), name + "_scale": torch.ones(7, 1)}, "does not divide"),
    ]
    for number, (replaced, message) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(tensors | replaced, folder / "model.safetensors")
        (folder / "config.json").write_bytes((original / "config.json").read_bytes())
        with pytest.raises(OrthogonalizeError, match=message):
            bake(open_checkpoint(folder), map_sites(parse_scope("all"), LAYERS, lambda _: removal(direction()[None])))


@pytest.mark.parametrize("layout", ["small blocks", "channel"])
def test_recipe_of_an_fp8_edit_rebuilds_and_verifies(original, tmp_path, layout):
    from orthogonalize.commands.edit import edit
    from orthogonalize.commands.verify import verify

    source = quantised(original, tmp_path / "fp8", layout)
    save_file({"direction": direction()}, tmp_path / "direction.safetensors")
    edit(str(source), tmp_path / "edited", direction=tmp_path / "direction.safetensors", scope="layers:1-2")
    proof = verify(tmp_path / "edited", logits=layout == "small blocks").verification
    assert proof is not None
    assert proof.rebuilt
    assert not proof.unexpected_changes
    assert proof.passed


@pytest.mark.parametrize("layout", ["small blocks", "channel"])
def test_added_bias_has_the_dtype_of_unquantized_tensors(layout, tmp_path):
    """Not the dtype of the weights: eight bits without a scale would silently lose it."""
    plain = store(tiny_llama(**SHAPE), tmp_path / "plain", torch.bfloat16)
    source = open_checkpoint(quantised(plain, tmp_path / "base", layout))
    vector = 0.01 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = bake(source, Intervention({Site("mlp", 1): shift(vector)}))
    assert {addition.dtype for addition in plan.checkpoint.additions.values()} == {"BF16"}
    (tmp_path / "edited").mkdir()
    plan.write(tmp_path / "edited")
    edited = open_checkpoint(tmp_path / "edited")
    bias = edited.read("model.layers.1.mlp.down_proj.bias").double()
    assert (bias - vector).abs().max() <= vector.abs().max() * 2**-8
    assert all(edited.tensors[name].dtype == info.dtype for name, info in source.tensors.items())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "auto-round"}, "AutoRound"),
        ({"group_size": 64, "bits": 4}, "MLX"),
    ],
)
def test_methods_that_no_edit_fits_into_are_refused_before_any_other_reason(original, tmp_path, settings, named):
    """Also before the model's family, which no file describes; null and empty settings are none at all."""
    from orthogonalize.commands.edit import edit

    shutil.copytree(original, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": settings, "model_type": "unheard_of"}
    file.write_text(json.dumps(config))
    save_file({"direction": direction()}, tmp_path / "d.safetensors")
    with pytest.raises(OrthogonalizeError, match=rf"quantised by {named}.*start from the release"):
        edit(str(tmp_path / "base"), tmp_path / "edited", direction=tmp_path / "d.safetensors")
    for none in (None, {}, {"quant_method": None}):
        assert quantization({"quantization_config": none}) is None
    with pytest.raises(OrthogonalizeError, match="not a table of settings"):
        quantization({"quantization_config": ["a list"]})
