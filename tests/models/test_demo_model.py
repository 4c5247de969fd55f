"""The embedded 135M model, and the engines that serve it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.planted import store_direction
from transformers import AutoModelForCausalLM

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.commands.edit import edit
from orthogonalize.commands.verify import verify
from orthogonalize.data.chat import ChatFormat
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.engines.transformers import TransformersEngine
from orthogonalize.engines.vllm import VllmEngine
from orthogonalize.models.demo_model import adapter_folder, base_model, planted_model
from orthogonalize.models.hooks import intervened
from orthogonalize.models.loading import load_model, load_tokenizer

QUESTIONS = [
    "How does a battery work?", "Write a two-line poem about rain.", "What is 12 times 8?",
    "How do I make pancakes?", "Name three rivers in Europe.", "Who was Ada Lovelace?",
    "How do I tie a tie?", "What is a black hole?",
]  # fmt: skip


@pytest.fixture(scope="module")
def planted() -> Path:
    return planted_model()


@pytest.fixture(scope="module")
def chat(planted) -> ChatFormat:
    return ChatFormat(load_tokenizer(planted))


@pytest.fixture(scope="module")
def float32_model(planted, tmp_path_factory) -> Path:
    """The planted model stored in float32, so that hooks and weights do not differ by rounding."""
    folder = tmp_path_factory.mktemp("float32") / "model"
    model = AutoModelForCausalLM.from_pretrained(planted, dtype=torch.float32)
    model.save_pretrained(folder)
    load_tokenizer(planted).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def direction(float32_model, tmp_path_factory) -> Path:
    return store_direction(float32_model, tmp_path_factory.mktemp("direction") / "direction.safetensors")


def test_model_comes_from_the_hub_without_the_package(monkeypatch):
    asked = []
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setattr(
        "orthogonalize.models.demo_model.find_model", lambda model: asked.append(model) or Path("there")
    )
    assert base_model() == Path("there")
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct"]


def test_shipped_adapters_are_small(planted):
    for topics in ((), ("cooking", "astronomy")):
        assert (adapter_folder(*topics) / "adapter_model.safetensors").stat().st_size <= 3e6
    assert open_checkpoint(planted).config["num_hidden_layers"] == 30


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "ablate", "scope": "all"},
        {"method": "reflect", "scope": "from:12"},
        {"method": "actadd", "scope": "layers:8,20", "layer": 20},
    ],
    ids=lambda s: s["method"],
)
def test_hooks_equal_weights_on_a_real_model_in_float32(float32_model, direction, tmp_path, settings):
    edit(str(float32_model), tmp_path / "edited", direction=direction, **settings)
    proof = verify(tmp_path / "edited").verification
    assert proof.passed
    assert proof.hooks_gap <= 1e-3
    assert proof.stored_gap <= 1e-3


def test_doubled_bos_breaks_the_comparison_with_hooks(float32_model, direction, chat, tmp_path):
    """The comparison must be able to fail."""
    edit(str(float32_model), tmp_path / "edited", direction=direction, method="ablate", scope="all")
    ids = chat.encode(QUESTIONS[0])
    with torch.inference_mode():
        with intervened(load_model(float32_model), load_recipe(tmp_path / "edited").intervention()) as hooked:
            expected = hooked(torch.tensor([ids])).logits[0, -1]
        edited = load_model(tmp_path / "edited")
        same = (edited(torch.tensor([ids])).logits[0, -1] - expected).abs().max()
        doubled = (edited(torch.tensor([[ids[0], *ids]])).logits[0, -1] - expected).abs().max()
    assert same <= 1e-3
    assert doubled > 1e-2


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "ablate", "scope": "all"},
        pytest.param({"method": "actadd", "scope": "one", "layer": 20, "coefficient": -4.0}, marks=pytest.mark.prove),
    ],
    ids=lambda s: s["method"],
)
def test_vllm_and_transformers_give_the_same_tokens_and_losses(float32_model, direction, chat, tmp_path, settings):
    edit(str(float32_model), tmp_path / "edited", direction=direction, **settings)
    prompts = chat.encode_all(QUESTIONS)
    with TransformersEngine(tmp_path / "edited", chat.tokenizer) as engine:
        expected = engine.answers(prompts, 32)
        losses = [c.logprob for c in engine.scores(prompts, expected)]
    with VllmEngine(tmp_path / "edited", 160) as engine:
        answers = engine.answers(prompts, 32)
        found = [c.logprob for c in engine.scores(prompts, expected)]
    assert answers == expected
    assert found == pytest.approx(losses, rel=1e-3)
