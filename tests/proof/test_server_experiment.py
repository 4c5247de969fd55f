"""Shipped files say what vLLM reads; the experiment that asks it, run by `make prove`, says the same."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers.chat import tiny_tokenizer
from helpers.tiny_models import randomise
from helpers.tiny_settings import headed
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from orthogonalize.architectures.open_questions import HEAD, answered, open_names, parts_with_bias
from orthogonalize.architectures.schema import architecture_of, families, remember
from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.commands.edit import edit
from orthogonalize.engines.experiment.ask import ask_server
from orthogonalize.engines.experiment.questions import PROMPTS
from orthogonalize.models.describe.twin import save_twin
from orthogonalize.models.describe.wrapper_twin import save_wrapper_twin

pytestmark = [pytest.mark.prove, pytest.mark.usefixtures("one_thread")]
# Heads that vLLM's class has, refuses, or takes from the embedding; biases that a flag creates, that are always there,
# that only the backend reads; experts; blocks that the backend does not run.
SHIPPED = ["llama", "qwen3", "gemma2", "cohere", "olmo", "gpt_neox", "gpt_oss", "lfm2"]

# vLLM's class needs keys that transformers' does not (see `helpers.serving`).
SETTINGS = {
    "lfm2": {
        "num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2,
        "conv_dim": 192, "conv_dim_out": 192, "block_dim": 192, "block_ff_dim": 224, "block_multiple_of": 1,
    },
}  # fmt: skip


def told(architecture):
    """What a description says about the server."""
    biases = {name: bias.served for name, (_, bias) in parts_with_bias(architecture).items()}
    return {HEAD: architecture.head.untied} | biases


@pytest.mark.parametrize("name", SHIPPED)
def test_experiment_on_vllm_agrees_with_the_shipped_file(name, tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.setenv("ORTHOGONALIZE_CACHE", str(tmp_path / "cache"))
    shipped = families()[name]
    asked = answered(shipped, dict.fromkeys(told(shipped), "unknown"))
    assert open_names(asked) == list(told(shipped))
    (tmp_path / "model").mkdir()
    save_twin(AutoConfig.for_model(name, **SETTINGS.get(name, {})), tmp_path / "model")
    source = open_checkpoint(tmp_path / "model")
    remember(source.config, asked)
    try:
        reason = ask_server(source)
        found, said = told(architecture_of(source.config)), told(shipped)
    finally:
        remember(source.config, None)
    open_still = [name for name, answer in found.items() if answer == "unknown"]
    assert {name: said[name] if name in open_still else answer for name, answer in found.items()} == said
    # Where the backend does not run at all, it may be for the small model's sake; files say "never".
    assert open_still == [name for name, answer in said.items() if answer == "never"]
    assert ("does not dispatch through" in reason) == bool(open_still)


def test_experiment_on_a_wrapper_agrees_with_the_shipped_file(tmp_path, monkeypatch):
    """Gemma 3 with images, whose class in vLLM runs a head of its own."""
    pytest.importorskip("vllm")
    pytest.importorskip("torchvision")  # vLLM imports it for every multimodal class
    monkeypatch.setenv("ORTHOGONALIZE_CACHE", str(tmp_path / "cache"))
    shipped = families()["gemma3"]
    (tmp_path / "model").mkdir()
    save_wrapper_twin(AutoConfig.for_model("gemma3"), tmp_path / "model")
    source = open_checkpoint(tmp_path / "model")
    remember(source.config, answered(shipped, {HEAD: "unknown"}))
    try:
        assert ask_server(source) == ""
        assert architecture_of(source.config).head.untied == shipped.head.untied
    finally:
        remember(source.config, None)


SERVE = """
import json, sys
from pathlib import Path
from orthogonalize.engines.experiment.questions import PROMPTS
from orthogonalize.engines.vllm import VllmEngine
with VllmEngine(Path(sys.argv[1]), 32) as engine:
    found = engine.scores([p[:1] for p in PROMPTS], [p[1:] for p in PROMPTS])
print("\\n" + json.dumps([completion.logprob for completion in found]))
"""


def served(folder):
    """As `scores`, from vLLM, in a process of its own, since it changes transformers' classes."""
    done = subprocess.run([sys.executable, "-c", SERVE, str(folder)], capture_output=True, text=True, check=True)
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


@torch.inference_mode()
def scores(folder):
    """Log-probabilities of the prompts' tokens but the first, from transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(PROMPTS)
    found = model(ids).logits[:, :-1].log_softmax(-1)
    return found.gather(-1, ids[:, 1:, None]).sum((1, 2))


def test_edits_that_rest_on_answers_are_served_as_transformers_runs_them(tmp_path, monkeypatch):
    """Helium has no file; its head is tied, and a setting gives its MLP a bias."""
    pytest.importorskip("vllm")
    monkeypatch.setenv("ORTHOGONALIZE_CACHE", str(tmp_path / "cache"))
    assert "helium" not in families()
    config = AutoConfig.for_model("helium", **headed(64), head_dim=64, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    randomise(model, 0)
    base, file = tmp_path / "base", tmp_path / "direction.safetensors"
    model.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    direction = torch.randn(192, generator=torch.Generator().manual_seed(1))
    save_file({"direction": direction / direction.norm()}, file)
    edit(base, tmp_path / "removed", direction=file, method="ablate", scope="all")
    edit(base, tmp_path / "added", direction=file, method="actadd", layer=2, coefficient=20.0)
    for name in ("removed", "added"):
        edited = scores(tmp_path / name)
        gap = (served(tmp_path / name) - edited).abs().max().item()
        assert gap < 1e-3
        assert (edited - scores(base)).abs().max().item() > 1000 * gap
