"""Which runtimes read an edited checkpoint, against llama.cpp's rules as its sources state them."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from helpers.llama import WIDTH, store, tiny_llama
from helpers.tiny_models import store_tiny
from safetensors.torch import save_file

from orthogonalize.commands.edit import edit, readers
from orthogonalize.reports.runtimes import HEAD, LLAMA_CPP, runtimes, summary


def reads(config: dict, added: list[str]) -> dict[str, bool | None]:
    return {each.name: each.reads for each in runtimes(config, added)}


def test_every_architecture_of_llama_cpp_that_is_named_exists():
    assert set(LLAMA_CPP.values()) <= set(gguf.MODEL_ARCH_NAMES.values())


@pytest.mark.parametrize("kind", sorted(LLAMA_CPP))
def test_a_head_is_read_exactly_where_the_converter_has_a_place_for_it(kind):
    """`convert_hf_to_gguf.py` maps every tensor by `gguf.TensorNameMap` and stops at one that it does not know."""
    config = {"model_type": kind, "architectures": ["AnyForCausalLM"]}
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == LLAMA_CPP[kind])
    placed = gguf.MODEL_TENSOR.OUTPUT in gguf.MODEL_TENSORS[architecture]
    assert reads(config, [HEAD])["llama.cpp"] is placed
    assert reads(config, [])["llama.cpp"] is True


def test_classes_that_no_other_runtime_knows_are_said_to_be_unread():
    config = {"model_type": "qwen3", "architectures": ["TransformersForCausalLM"]}
    assert reads(config, []) == {"vLLM": True, "transformers": True, "llama.cpp": False, "SGLang": None}
    assert "not by llama.cpp (its converter knows no class TransformersForCausalLM)" in summary(runtimes(config, []))


def test_families_without_a_rule_are_not_guessed():
    assert reads({"model_type": "unheard_of"}, [])["llama.cpp"] is None
    biased = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert reads(biased, ["model.layers.0.mlp.down_proj.bias"])["llama.cpp"] is None


def test_the_edit_of_the_blocks_alone_is_offered_and_adds_no_head(tmp_path):
    """For Gemma 2, whose head is the embedding: `all` separates the two, and llama.cpp would drop the head."""
    base = store_tiny("gemma2", tmp_path / "base", torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    save_file({"direction": torch.randn(config["hidden_size"])}, tmp_path / "direction.safetensors")
    named = {"direction": tmp_path / "direction.safetensors", "layer": 1}
    written = edit(base, tmp_path / "all", **named)
    assert written.added == [HEAD]
    told = readers(written, tmp_path / "all")
    assert "not by llama.cpp" in told[0]
    scope = f"layers:0-{config['num_hidden_layers'] - 1}"
    assert scope in told[1]
    card = (tmp_path / "all" / "README.md").read_text()
    assert "| llama.cpp | no |" in card
    assert scope in card
    assert edit(base, tmp_path / "blocks", scope=scope, **named).added == []


def test_a_plain_edit_is_read_by_all(tmp_path):
    base = store(tiny_llama(), tmp_path / "base", torch.bfloat16)
    save_file({"direction": torch.randn(WIDTH)}, tmp_path / "direction.safetensors")
    written = edit(base, tmp_path / "edited", direction=tmp_path / "direction.safetensors", layer=2)
    assert readers(written, tmp_path / "edited") == ["read by vLLM, transformers, llama.cpp, SGLang"]


def test_of_a_quantised_result_only_what_was_run_is_claimed(tmp_path):
    pytest.importorskip("compressed_tensors")
    base = store(tiny_llama(), tmp_path / "base", torch.bfloat16)
    save_file({"direction": torch.randn(WIDTH)}, tmp_path / "direction.safetensors")
    written = edit(base, tmp_path / "fp8", direction=tmp_path / "direction.safetensors", layer=1, quantize="fp8")
    (told,) = readers(written, tmp_path / "fp8")
    assert told.startswith("read by vLLM, transformers; llama.cpp: not known")
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    four = {each.name: each.reads for each in runtimes(config, [], "nvfp4")}
    assert four == {"vLLM": None, "transformers": True, "llama.cpp": None, "SGLang": None}
