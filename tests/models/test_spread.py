"""Resident models that accelerate has spread over several places, with its own hooks around every module.

There is one device here, so some blocks are on the disk instead of a second GPU: their hooks are the same.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny_models import store_tiny
from transformers import AutoModelForCausalLM

from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import Intervention, Site, block_sites, removal, shift
from orthogonalize.directions.conditional import Weights
from orthogonalize.edits.fitting.fit import AnsweredTokens, FitTokens, fit_conditional
from orthogonalize.models import loading
from orthogonalize.models.activations import all_activations, last_tokens
from orthogonalize.models.generation import generate
from orthogonalize.models.hooks import intervened
from orthogonalize.models.loading import check_on_gpus, choose_device, is_spread, load_model
from orthogonalize.selection.scoring import LocalScorer, first_token_probabilities

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH = 48
IDS = [torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (17, 5, 9, 16, 12)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model as `load_model` gives it, and the same with every second block on the disk."""
    folder = store_tiny("llama", tmp_path_factory.mktemp("spread") / "model", torch.float32)
    whole = load_model(folder, "cpu", torch.float32)
    blocks = {f"model.layers.{n}": "disk" if n % 2 else "cpu" for n in range(whole.config.num_hidden_layers)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    offload = tmp_path_factory.mktemp("offload")
    spread = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map=blocks | rest, offload_folder=offload
    )
    assert spread.model.layers[1].mlp.down_proj.weight.is_meta, "nothing is elsewhere"
    return whole, spread.eval()


def same(models, function) -> None:
    whole, spread = (function(model) for model in models)
    assert torch.equal(whole, spread)


def test_activations_answers_and_first_tokens_are_those_of_one_device(models):
    same(models, lambda model: all_activations(model, IDS, 3))
    same(models, lambda model: first_token_probabilities(model, IDS))
    assert generate(models[0], IDS, 5, [2]) == generate(models[1], IDS, 5, [2])


def test_edits_with_hooks_are_those_of_one_device(models):
    basis = torch.linalg.qr(torch.randn(WIDTH, 1, generator=torch.Generator().manual_seed(1)))[0].mT
    edit = Intervention(writes=dict.fromkeys([Site("embed"), *block_sites(range(4))], removal(basis)))

    def edited(model):
        with intervened(model, edit):
            return first_token_probabilities(model, IDS)

    same(models, edited)


def test_scores_that_start_in_the_middle_are_those_of_one_device_and_leave_its_hooks(models):
    along = shift(torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1)))

    def scored(model):
        scorer = LocalScorer(model, IDS)
        return torch.stack([scorer.outputs(layer, along, projected=False).probabilities for layer in (3, 1)])

    hooked = [vars(block).get("forward") for block in models[1].model.layers]
    assert all(hooked), "accelerate has hooked no block"
    same(models, scored)
    assert [vars(block).get("forward") for block in models[1].model.layers] == hooked


def test_conditional_fits_are_those_of_one_device(models):
    answered = AnsweredTokens([[*row, 7, 8] for row in IDS], [len(row) for row in IDS])
    others = AnsweredTokens([[*row[::-1], 9] for row in IDS], [len(row) for row in IDS])
    basis = torch.linalg.qr(torch.randn(WIDTH, 1, generator=torch.Generator().manual_seed(1)))[0].mT

    def fitted(model):
        maps = fit_conditional(
            model, FitTokens(2, answered, others), lambda _: basis, block_sites(range(1, 4)), Weights()
        ).maps
        return torch.cat([each.c.flatten() for _, each in sorted(maps.items(), key=lambda item: str(item[0]))])

    same(models, fitted)


def test_a_model_is_spread_if_asked_or_if_one_gpu_is_too_small(monkeypatch):
    monkeypatch.setattr(loading, "choose_device", lambda _: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ([100, 80, 60][torch.device(device).index or 0], 0))
    assert not is_spread("auto", 84)
    assert is_spread("auto", 86)
    assert is_spread("all", 1)
    assert not is_spread("cuda:0", 10_000)  # one device was asked for
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert not is_spread("all", 86)


def test_all_devices_of_a_host_without_gpus_are_its_cpu(tmp_path):
    assert choose_device("all").type == ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(store_tiny("llama", tmp_path / "model", torch.float32), "all", torch.float32)
    assert not hasattr(model, "hf_device_map") or torch.cuda.is_available()


def test_a_gpu_that_others_fill_is_named_with_the_ways_out(monkeypatch):
    def full(*_shape, **_given):
        raise torch.AcceleratorError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(
        OrthogonalizeError, match=r"^device 'cuda:0' is not available: its memory is full; free it, or "
    ):
        choose_device("cuda:0")


def test_gpus_that_do_not_hold_the_model_together_are_named():
    check_on_gpus(Path("model"), {"model.embed_tokens": 0, "model.layers.0": 1})
    with pytest.raises(OrthogonalizeError, match=r"do not hold model: model.layers.1 would be on the disk; use --eng"):
        check_on_gpus(Path("model"), {"model.layers.0": 0, "model.layers.1": "disk"})


def test_the_last_tokens_are_found_where_the_stream_is():
    found = last_tokens(torch.empty(2, 5, 4, device="meta"), torch.tensor([5, 3]), 3)
    assert (tuple(found.shape), found.device.type) == ((2, 3, 4), "meta")
