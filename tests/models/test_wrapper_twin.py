"""Small image-text wrappers for experiments on a server: the text model's twin, beside a tiny encoder of images."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from helpers.tiny_models import store_tiny
from safetensors.torch import save_file
from transformers import AutoConfig

from orthogonalize.architectures.open_questions import answered, open_flags, parts_with_bias
from orthogonalize.architectures.schema import architecture_of, families
from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.edits.descriptions.automatic import learn
from orthogonalize.engines.experiment import server, small_model
from orthogonalize.engines.experiment.questions import QUESTIONS, open_questions
from orthogonalize.models.describe.twin import load_twin, logits, save_twin, token_ids
from orthogonalize.models.describe.wrapper_twin import save_wrapper_twin
from orthogonalize.models.sites import Sites

pytestmark = pytest.mark.usefixtures("one_thread")
# Their text model's tensors, in the wrapper; a part of the encoder's width is the text model's in some.
WRAPPERS = {
    "llava_next": "language_model.",
    "idefics3": None,
    "gemma3": "language_model.",
    "internvl": "language_model.",
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapper_without_an_image_is_its_text_model(name, tmp_path):
    """The text model alone, with the wrapper's tensors under its own names, gives the same logits."""
    wrapper, text = tmp_path / "wrapper", tmp_path / "text"
    wrapper.mkdir()
    text.mkdir()
    small = save_wrapper_twin(AutoConfig.for_model(name), wrapper)
    save_twin(AutoConfig.for_model(name).get_text_config(), text)
    alone, held = open_checkpoint(text), open_checkpoint(wrapper)
    start = WRAPPERS[name]
    if start is None:
        names = {n: n.replace("model.", "model.text_model.") for n in alone.tensors}
    else:
        names = {n: start + n for n in alone.tensors}
    assert set(names.values()) <= held.tensors.keys()
    assert small.get_text_config().tie_word_embeddings is False
    save_file({n: held.read(stored) for n, stored in names.items()}, text / "model.safetensors", {"format": "pt"})
    ids = token_ids(load_twin(text))
    assert (logits(load_twin(wrapper), ids) - logits(load_twin(text), ids)).abs().max() < 1e-12


def test_wrapper_is_asked_with_all_that_its_text_model_is_asked(tmp_path, monkeypatch):
    """The flags of biases go into its text model's configuration; the questions are about tensors that it has.

    The Transformers backend for text is not asked: an edit that needs it would be served without images.
    """
    monkeypatch.setattr(small_model, "has", lambda _: True)
    shipped = families()["gemma3"]
    architecture = answered(shipped, dict.fromkeys(["head", *parts_with_bias(shipped)], "unknown"))
    config = AutoConfig.for_model("gemma3")
    assert small_model._store_questions(config, architecture, {}, tmp_path) == set()
    asked = json.loads((tmp_path / QUESTIONS).read_text())
    stored = open_checkpoint(tmp_path)
    assert stored.config["model_type"] == "gemma3"
    assert all(stored.config["text_config"][flag] is value for flag, value in open_flags(architecture).items())
    assert asked["control"] == "language_model.model.embed_tokens.weight"
    assert {name for question in asked["questions"] for name in question["tensors"]} <= stored.tensors.keys()
    assert "head" in {question["name"] for question in asked["questions"]}
    assert len(asked["expected"]) == 16
    assert asked["backend"] is None


def test_variant_of_a_wrapper_ties_the_head_in_both_configurations(tmp_path):
    """Classes look for the flag in either."""
    shipped = families()["gemma3"]
    wrapper, variant = tmp_path / "wrapper", tmp_path / "variant"
    wrapper.mkdir()
    variant.mkdir()
    save_wrapper_twin(AutoConfig.for_model("gemma3"), wrapper)
    source = open_checkpoint(wrapper)
    (head,) = open_questions(Sites(answered(shipped, {"head": "unknown"}), source.config, source.tensors))
    server._store_variant(source, variant, [head], [], None)
    plain = open_checkpoint(variant)
    assert source.tensors.keys() - plain.tensors.keys() == {"language_model.lm_head.weight"}
    assert plain.config["tie_word_embeddings"] is plain.config["text_config"]["tie_word_embeddings"] is True
    ids = torch.tensor([[5, 6, 7, 8]])
    tied = load_twin(variant)
    assert torch.equal(tied.get_output_embeddings().weight, tied.get_input_embeddings().weight)
    assert not torch.allclose(logits(tied, ids), logits(load_twin(wrapper), ids))


def test_wrapper_without_what_vllm_needs_for_it_is_asked_later(monkeypatch):
    monkeypatch.setattr(small_model, "has", lambda name: name != "torchvision")
    told, started = small_model._tried(AutoConfig.for_model("gemma3"), families()["gemma3"], {"head": "vllm"})
    assert not started
    assert told.passing
    assert told.answers == {"head": "vllm"}
    assert told.reason.endswith("only with torchvision, which is not installed")


def test_thinker_among_other_models_is_refused_with_a_way_out_that_works(tmp_path):
    """As Qwen3-Omni is stored: the thinker's tensors have its name before theirs."""
    store_tiny("qwen3_omni_moe_thinker multimodal", tmp_path / "thinker", torch.float32)
    thinker = open_checkpoint(tmp_path / "thinker")
    whole = tmp_path / "whole"
    whole.mkdir()
    save_file({f"thinker.{n}": thinker.read(n) for n in thinker.tensors}, whole / "model.safetensors", {"format": "pt"})
    config = {"model_type": "qwen3_omni_moe", "architectures": ["Qwen3OmniMoeForConditionalGeneration"]}
    (whole / "config.json").write_text(json.dumps(config | {"thinker_config": thinker.config}))
    with pytest.raises(OrthogonalizeError, match=r"edit its thinker alone.*--engine hf") as refused:
        learn(open_checkpoint(whole))
    named = re.search(r"transformers\.(\w+)\.from_pretrained", str(refused.value))[1]
    getattr(transformers, named).from_pretrained(whole).save_pretrained(tmp_path / "alone")
    alone = open_checkpoint(tmp_path / "alone")
    assert architecture_of(alone.config).family == "qwen3_omni_moe_thinker"
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(logits(load_twin(tmp_path / "alone"), ids), logits(load_twin(tmp_path / "thinker"), ids))


def test_class_without_images_is_no_wrapper(tmp_path):
    with pytest.raises(OrthogonalizeError, match="no model of texts and images for LlamaConfig"):
        save_wrapper_twin(AutoConfig.for_model("llama"), tmp_path)
