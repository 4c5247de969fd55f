"""FP8 checkpoints that are streamed as they are stored: the model of the dequantised weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.fp8 import FP8, LAYOUTS, quantised, widened
from helpers.llama import store, tiny_llama
from helpers.tiny_models import store_tiny
from safetensors.torch import load_file, save_file

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.directions.activation_store import PROMPTS, record_streamed
from orthogonalize.models.activations import all_activations
from orthogonalize.models.loading import load_model
from orthogonalize.models.streaming.lanes import StreamedModel
from orthogonalize.models.streaming.weights import PartialModel, can_stream

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
POSITIONS = 3
IDS = [torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (17, 5, 9, 16, 12)]


def stored(name: str, folder: Path) -> Path:
    if name == "llama":
        return store(tiny_llama(**SHAPE), folder, torch.bfloat16)
    store_tiny(name, folder, torch.float32)
    parts = list(folder.glob("*.safetensors"))
    tensors = {key: value for part in parts for key, value in load_file(part).items()}
    for part in (*parts, *folder.glob("*.index.json")):
        part.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def dequantised(source: Path, target: Path, layout: str) -> Path:
    """The same model in float32, dequantised in plain torch."""
    suffix, _, every, _ = LAYOUTS[layout]
    tensors = load_file(source / "model.safetensors")
    result = {}
    for name, tensor in tensors.items():
        scales = tensors.get(name.removesuffix("weight") + suffix)
        if name.endswith("weight"):
            result[name] = tensor.float() * (widened(scales, tensor.shape, every) if scales is not None else 1)
    target.mkdir()
    save_file(result, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    return target


def streamed(folder: Path, tmp_path: Path) -> torch.Tensor:
    """Activations [prompts, positions, layers + 1, d]."""
    model = StreamedModel(PartialModel(open_checkpoint(folder), "cpu", torch.float32))
    recording = record_streamed(model, {PROMPTS: IDS}, POSITIONS, tmp_path / "activations.safetensors", "test")
    return torch.stack([recording.read(PROMPTS, layer) for layer in range(model.layer_count + 1)], dim=2)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("name", "layout"),
    [*(("llama", layout) for layout in LAYOUTS), ("qwen3_moe", "small blocks"), ("gemma2", "tensor")],
)
def test_fp8_weights_are_streamed_as_their_dequantised_numbers(name, layout, tmp_path):
    folder = quantised(stored(name, tmp_path / "base"), tmp_path / "fp8", layout)
    assert any(tensor.dtype == FP8 for tensor in load_file(folder / "model.safetensors").values())
    expected = load_model(dequantised(folder, tmp_path / "plain", layout), "cpu", torch.float32)
    found = streamed(folder, tmp_path)
    assert difference(found, all_activations(expected, IDS, POSITIONS)) < 1e-6
    original = all_activations(load_model(tmp_path / "base", "cpu", torch.float32), IDS, POSITIONS)
    assert difference(found, original) > 1e-3, "quantising changed nothing"


def test_fp8_blocks_give_what_transformers_own_quantizer_gives(tmp_path):
    folder = quantised(stored("llama", tmp_path / "base"), tmp_path / "fp8", "small blocks")
    whole = load_model(folder, "cpu", torch.float32)
    assert difference(streamed(folder, tmp_path), all_activations(whole, IDS, POSITIONS)) < 1e-6


def test_other_quantised_formats_are_refused_by_name(tmp_path):
    folder = quantised(stored("llama", tmp_path / "base"), tmp_path / "fp8", "tensor")
    packed = tmp_path / "packed"
    shutil.copytree(folder, packed)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    tensors[f"{name}_packed"] = tensors.pop(name).view(torch.uint8)
    save_file(tensors, packed / "model.safetensors")
    source = open_checkpoint(packed)
    assert can_stream(open_checkpoint(folder))
    assert not can_stream(source)
    with pytest.raises(OrthogonalizeError, match=rf"{name}_packed is stored as packed integers .* use --engine hf"):
        PartialModel(source, "cpu")


def test_fp8_without_scales_is_refused_by_name(tmp_path):
    folder = quantised(stored("llama", tmp_path / "base"), tmp_path / "fp8", "tensor")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(OrthogonalizeError, match=r"layers.1.mlp.up_proj.weight is stored as F8_E4M3 without scales"):
        PartialModel(open_checkpoint(folder), "cpu")
