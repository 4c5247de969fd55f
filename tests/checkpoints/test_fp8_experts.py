"""FP8 weights of experts that are stored as one tensor, and scales of tensors that are written in several chunks."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.exactness import BASIS, LAYERS
from helpers.fp8 import FP8
from helpers.tiny_models import store_tiny
from safetensors.torch import load_file, save_file

from orthogonalize.checkpoints import chunks
from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.checkpoints.decoding.weights import stored_weights
from orthogonalize.checkpoints.quantization import dequantize
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import removal
from orthogonalize.edits.bake import bake
from orthogonalize.edits.scopes import map_sites, parse_scope

BLOCKS = {"blocks": (8, 16), "row": (1, None), "column": (None, 1), "expert": (None, None)}


def wide(scales, shape, blocks):
    rows, columns = (block or size for block, size in zip(blocks, shape[1:], strict=True))
    return scales.repeat_interleave(rows, 1).repeat_interleave(columns, 2)[:, : shape[1], : shape[2]]


def quantised(folder, target, blocks):
    """Every expert of a tiny Llama 4 in FP8, with scales as tensors of three dimensions."""
    tensors = {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
    for name in [n for n in tensors if n.endswith(("experts.down_proj", "experts.gate_up_proj"))]:
        real = tensors[name].float()
        rows, columns = (block or size for block, size in zip(blocks, real.shape[1:], strict=True))
        parts = [[b.abs().amax((1, 2)) / 448 for b in s.split(columns, 2)] for s in real.split(rows, 1)]
        scales = torch.stack([torch.stack(strip, 1) for strip in parts], 1)
        tensors[name] = (real / wide(scales, real.shape, blocks)).clamp(-448, 448).to(FP8)
        tensors[name + "_scale_inv"] = scales
    target.mkdir()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    size = None if None in blocks else list(blocks)
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": size}
    (target / "config.json").write_text(json.dumps(config))
    return open_checkpoint(target)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return store_tiny("llama4", tmp_path_factory.mktemp("llama4") / "base", torch.bfloat16)


@pytest.mark.parametrize("scope", ["layers:0-3", "from:1"])
@pytest.mark.parametrize("layout", BLOCKS)
def test_fp8_experts_are_edited_in_their_own_layout(original, tmp_path, layout, scope):
    source = quantised(original, tmp_path / "fp8", BLOCKS[layout])
    plan = bake(source, map_sites(parse_scope(scope), LAYERS, lambda _: removal(BASIS[:1])))
    (tmp_path / "edited").mkdir()
    written = plan.write(tmp_path / "edited")
    edited = open_checkpoint(tmp_path / "edited")
    names = [name for name in plan.checkpoint.edits if source.tensors[name].dtype == "F8_E4M3"]
    assert names
    for name in names:
        assert edited.tensors[name].dtype == "F8_E4M3"
        old, new = (
            c.read(name).double() * wide(c.read(name + "_scale_inv").double(), c.tensors[name].shape, BLOCKS[layout])
            for c in (source, edited)
        )
        assert dequantize(edited, name).equal(new)
        streamed = stored_weights(edited, torch.float32)[name].read(torch.device("cpu"))
        assert streamed.sub(new).abs().max() <= 1e-6 * new.abs().max()
        edit = plan.checkpoint.edits[name]
        exact = edit.exact(old)
        lost, wanted = edit.component(new - exact).norm(), edit.component(exact - old).norm()
        assert lost <= 0.05 * wanted  # 48 numbers of 3 bits cancel no finer
        assert written.records[name].leak == pytest.approx((lost / wanted).item(), rel=0.05, abs=1e-5)
        assert (new - exact).norm() <= 0.06 * exact.norm()
        assert plan.checkpoint.edited(name).view(torch.uint8).equal(edited.read(name).view(torch.uint8))
    for name in source.tensors.keys() - plan.checkpoint.changed_tensors:
        assert source.read(name).view(torch.uint8).equal(edited.read(name).view(torch.uint8)), name


@pytest.mark.parametrize("layout", ["blocks", "row"])
@pytest.mark.parametrize("scope", ["layers:0-3", "from:1"])
def test_a_tensor_in_many_chunks_has_the_scales_of_each(original, tmp_path, monkeypatch, layout, scope):
    source = quantised(original, tmp_path / "fp8", BLOCKS[layout])
    plan = bake(source, map_sites(parse_scope(scope), LAYERS, lambda _: removal(BASIS[:1])))
    for name, chunk in (("whole", chunks.CHUNK), ("pieces", 512)):
        monkeypatch.setattr(chunks, "CHUNK", chunk)
        monkeypatch.setattr(chunks, "WHOLE", 2 * chunk)
        monkeypatch.setattr(chunks, "RUN", 8)
        (tmp_path / name).mkdir()
        plan.write(tmp_path / name)
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "pieces/model.safetensors").read_bytes()


def test_scales_of_another_number_of_experts_are_refused(original, tmp_path):
    folder = quantised(original, tmp_path / "fp8", BLOCKS["blocks"]).path
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("experts.down_proj_scale_inv"))
    tensors[name] = tensors[name][:2].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(OrthogonalizeError, match="has no scales for"):
        bake(open_checkpoint(folder), map_sites(parse_scope("layers:0-3"), LAYERS, lambda _: removal(BASIS[:1])))


def test_blocks_of_modelopt_have_their_only_size(original, tmp_path):
    """FP8_PB_WO: scales as [rows, 1, columns, 1], of blocks of 128, which the configuration does not say."""
    tensors = {k: v for file in sorted(original.glob("*.safetensors")) for k, v in load_file(file).items()}
    name = "model.layers.0.self_attn.o_proj.weight"
    wanted = tensors[name].float()
    scale = wanted.abs().max() / 448
    tensors[name] = (wanted / scale).to(FP8)
    tensors[name + "_scale"] = scale.reshape(1, 1, 1, 1)
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    config = json.loads((original / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO", "kv_cache_scheme": None}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    source = open_checkpoint(tmp_path / "base")
    assert (dequantize(source, name) - wanted).norm() <= 0.05 * wanted.norm()
    plan = bake(source, map_sites(parse_scope("layers:0"), LAYERS, lambda _: removal(BASIS[:1])))
    edited = plan.checkpoint.edited(name).double() * scale
    assert (BASIS[0] @ edited).norm() <= 0.02 * (BASIS[0] @ wanted.double()).norm()
