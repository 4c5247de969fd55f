"""Checkpoints in four bits (and integers) that are streamed as stored: the model that transformers makes of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.compressed import KINDS, decompressed, packed, tensors_of
from helpers.four_bits import nf4, plain, random_mxfp4
from helpers.llama import store, tiny_llama
from helpers.tiny_models import TINY, randomise, store_tiny
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.checkpoints.decoding.weights import stored_weights
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
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return store(tiny_llama(**SHAPE), tmp_path_factory.mktemp("base") / "llama", torch.bfloat16)


def streamed(folder: Path, tmp_path: Path) -> torch.Tensor:
    """Activations [prompts, positions, layers + 1, d]."""
    assert can_stream(open_checkpoint(folder))
    model = StreamedModel(PartialModel(open_checkpoint(folder), "cpu", torch.float32))
    recording = record_streamed(model, {PROMPTS: IDS}, POSITIONS, tmp_path / "activations.safetensors", "test")
    return torch.stack([recording.read(PROMPTS, layer) for layer in range(model.layer_count + 1)], dim=2)


def resident(folder: Path) -> torch.Tensor:
    return all_activations(load_model(folder, "cpu", torch.float32), IDS, POSITIONS)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    "kind",
    [kind if kind in ("int4 asymmetric", "nvfp4") else pytest.param(kind, marks=pytest.mark.prove) for kind in KINDS],
)
def test_what_compressed_tensors_packs_is_streamed_as_it_runs(kind, llama, tmp_path):
    folder = packed(llama, tmp_path / "packed", kind)
    found = streamed(folder, tmp_path)
    if kind.endswith("fp4"):  # transformers computes these in bfloat16, whatever is asked for
        expected = resident(plain(folder, tmp_path / "plain", decompressed(folder)))
    else:
        expected = resident(folder)
    assert difference(found, expected) < 1e-6
    assert difference(found, resident(llama)) > 1e-3, "quantising changed nothing"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoded_weights_are_those_of_transformers_bit_for_bit(kind, dtype, llama, tmp_path):
    folder = packed(llama, tmp_path / "packed", kind)
    model = load_model(folder, "cpu", dtype)
    found = stored_weights(open_checkpoint(folder), dtype)
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.3.mlp.down_proj"):
        expected = model.get_submodule(name).weight
        assert torch.equal(found[f"{name}.weight"].read(CPU), expected.to(dtype)), name


def test_packed_experts_and_a_packed_embedding_are_streamed(tmp_path):
    names = r".*(_proj|experts.*|embed_tokens)\.weight$"
    base = store_tiny("qwen3_moe", tmp_path / "base", torch.bfloat16)
    folder = packed(base, tmp_path / "packed", "int8", names)
    assert any("experts.3." in name and name.endswith("weight_packed") for name in tensors_of(folder))
    expected = plain(folder, tmp_path / "plain", decompressed(folder, torch.float32))
    assert difference(streamed(folder, tmp_path), resident(expected)) < 1e-6


def test_experts_in_mxfp4_are_streamed_as_transformers_dequantises_them(tmp_path):
    model = AutoModelForCausalLM.from_config(TINY["gpt_oss"].config(32), dtype=torch.bfloat16)
    randomise(model, 0)
    base = tmp_path / "base"
    model.save_pretrained(base)
    folder = random_mxfp4(base, tmp_path / "mxfp4")
    assert difference(streamed(folder, tmp_path), resident(folder)) < 1e-6


@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_of_bitsandbytes_are_streamed_as_what_they_stand_for(nested, llama, tmp_path):
    folder, meant = nf4(llama, tmp_path / "nf4", nested)
    found = streamed(folder, tmp_path)
    assert difference(found, resident(plain(llama, tmp_path / "plain", meant))) < 1e-6
    assert difference(found, resident(llama)) > 1e-3, "quantising changed nothing"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_that_bitsandbytes_wrote_are_decoded_as_it_does(kind, nested, llama, tmp_path):
    functional = pytest.importorskip("bitsandbytes").functional
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=settings, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    weights = stored_weights(open_checkpoint(tmp_path / "model"), torch.bfloat16)
    for number, layer in enumerate(model.model.layers):
        weight = layer.mlp.down_proj.weight
        expected = functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(weights[f"model.layers.{number}.mlp.down_proj.weight"].read(CPU), expected)


def with_settings(folder: Path, **changes) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refused(folder: Path, why: str) -> None:
    assert not can_stream(open_checkpoint(folder))
    with pytest.raises(OrthogonalizeError, match=f"cannot be streamed: .*{why}.* use --engine hf"):
        PartialModel(open_checkpoint(folder), "cpu")


def test_what_is_rotated_or_says_nothing_of_its_packing_is_refused(llama, tmp_path):
    folder = packed(llama, tmp_path / "packed", "int4")
    refused(with_settings(folder, transform_config={"config_groups": {"u": {}}}), "transform_config rotates")
    unsaid = with_settings(folder, transform_config=None, config_groups={})
    refused(unsaid, "weight_packed is stored as packed integers")
    refused(with_settings(folder, config_groups={"a": {"targets": 3}}), "does not understand the quantization_config")


def test_without_the_library_its_checkpoints_are_refused_with_its_name(llama, tmp_path, monkeypatch):
    folder = packed(llama, tmp_path / "packed", "int4")
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    refused(folder, "compressed-tensors, which is not installed: pip install")


def test_a_damaged_state_of_bitsandbytes_is_refused_by_name(llama, tmp_path):
    folder, _ = nf4(llama, tmp_path / "nf4", False)
    tensors = tensors_of(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    for part, value in (
        (".quant_state.bitsandbytes__nf4", torch.tensor(list(b'{"shape": [3, 2]}'), dtype=torch.uint8)),
        (".absmax", tensors[f"{name}.absmax"][:-1].contiguous()),
        (".quant_map", torch.zeros(15)),
    ):
        save_file(tensors | {name + part: value}, folder / "model.safetensors")
        refused(folder, f"does not fit what is stored of {name}; fetch the checkpoint again")


def test_a_packed_matrix_that_the_library_cannot_decode_is_named(llama, tmp_path):
    folder = packed(llama, tmp_path / "packed", "int4")
    tensors = tensors_of(folder)
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"][:7].contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(OrthogonalizeError, match=rf"cannot decode {name}: .*fetch the checkpoint again"):
        streamed(folder, tmp_path)
