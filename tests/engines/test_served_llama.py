"""Two families served by vLLM by other classes than their own, which takes `make prove`."""

from __future__ import annotations

import pytest
from helpers.serving import serve

pytest.importorskip("vllm")
pytestmark = pytest.mark.prove


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return serve(["qwen2", "qwen3@own"], tmp_path_factory.mktemp("served"))


def test_vllm_serves_a_model_stored_as_llama(results):
    """It reads every tensor and scores as transformers does."""
    result = results[0]
    assert result["served_by"] == "LlamaForCausalLM"
    assert result["added"] == 17
    assert result["uninitialised"] == []
    assert result["dropped"] == []
    assert result["gap_float32"] <= 1e-4
    assert result["gap_bfloat16"] <= 2e-2
    assert result["moved"] >= 0.2


def test_bias_silently_dropped_by_vllm_is_noticed(results):
    """Why qwen3 goes to the Transformers backend: vLLM's own class would load, and drop the constant."""
    result = results[1]
    assert result["uninitialised"] == []
    assert result["dropped"] == ["model.layers.1.self_attn.o_proj.bias"]
    assert result["gap_float32"] > 2e-2
