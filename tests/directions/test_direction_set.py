"""Activations and stored directions against independent references."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.llama import LAYERS, VOCABULARY, WIDTH, load, tiny_llama
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.directions.direction_set import Directions, load_direction
from orthogonalize.directions.inlp.nullspace import Subspace, inlp
from orthogonalize.directions.leace import leace
from orthogonalize.models.activations import all_activations, batches, mean_activations


def random_ids(count=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 15, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def test_activations_equal_the_library_hidden_states(base):
    """Of each prompt run on its own, without padding."""
    model, ids = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval(), random_ids()
    found = all_activations(model, ids, 3)
    for row, prompt in zip(found, ids, strict=True):
        with torch.inference_mode():
            states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        for layer in range(LAYERS):
            assert torch.allclose(row[:, layer], states[layer][0, -3:].float(), atol=1e-6)
    # The library's last hidden state is after the final norm; ours is that norm's input.
    assert torch.allclose(model.model.norm(row[:, LAYERS].double()), states[LAYERS][0, -3:], atol=1e-5)


def test_streamed_means_equal_the_means_of_all(base):
    model, ids = load(base), random_ids()
    assert torch.allclose(mean_activations(model, ids, 3), all_activations(model, ids, 3).double().mean(0), atol=1e-6)


def test_batches_hold_every_prompt_once_within_the_limit():
    ids = random_ids(50)
    groups = list(batches(ids, tokens=40))
    assert sorted(i for g in groups for i in g) == list(range(50))
    assert all(len(g) == 1 or len(g) * max(len(ids[i]) for i in g) <= 40 for g in groups)


def test_nan_activations_name_the_layer(base):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(OrthogonalizeError, match="input of layer 2 contain NaN"):
        mean_activations(model, random_ids(4), 2)
    with pytest.raises(OrthogonalizeError, match="fewer than the 40 positions"):
        mean_activations(model, random_ids(4), 40)


def test_directions_survive_saving_and_loading(tmp_path):
    positive, negative = (torch.randn(16, 2, 3, 8) + s for s in (1, -1))
    subspaces = {((-2, -1)[i], layer): one for (i, layer), one in inlp(positive, negative, 3).items()}
    eraser = leace(positive, negative)
    cosines = {"dim": torch.rand(2, 2, 2, 3)}
    stored = Directions((-2, -1), eraser.u, subspaces, eraser.mean, eraser.v, cosines)
    stored.save(tmp_path / "directions.safetensors")
    back = Directions.load(tmp_path / "directions.safetensors")
    assert back.positions == (-2, -1)
    for name in ("mean_diffs", "means", "readers"):
        assert torch.equal(getattr(back, name), getattr(stored, name).float())
    assert torch.equal(back.stability["dim"], cosines["dim"])
    assert back.subspaces.keys() == stored.subspaces.keys()
    for key, found in stored.subspaces.items():
        assert torch.allclose(back.subspaces[key].basis, found.basis, atol=1e-7)
        assert back.subspaces[key].accuracies == pytest.approx(found.accuracies)
    # Rounded to float32 it still erases: v is rescaled so that v^T u is 1.
    for index, position in enumerate(back.positions):
        affine = back.eraser(position, 1).affine()
        assert (affine.v.T @ affine.u).item() == pytest.approx(1, abs=1e-12)
        assert torch.allclose(affine(positive[:, index, 1]).mean(0), affine(negative[:, index, 1]).mean(0), atol=1e-5)


def test_stream_in_which_no_prompt_differs_has_no_direction():
    diffs = torch.randn(1, 3, 8)
    diffs[0, 0] = 0
    directions = Directions((-1,), diffs, {(-1, 1): Subspace(torch.zeros(0, 8), ())})
    assert directions.basis("dim", -1, 0) is None
    assert directions.basis("inlp", -1, 1) is None
    unit = directions.basis("dim", -1, 2)
    assert torch.allclose(unit[0] * diffs[0, 2].double().norm(), diffs[0, 2].double())


def test_direction_file_is_read_in_every_format(tmp_path):
    vector = torch.randn(WIDTH)
    save_file({"direction": vector}, tmp_path / "a.safetensors")
    save_file({"basis": torch.randn(3, WIDTH)}, tmp_path / "b.safetensors")
    torch.save(vector, tmp_path / "direction.pt")
    (tmp_path / "direction_metadata.json").write_text(json.dumps({"pos": -5, "layer": 12}))
    plain, basis, reference = (load_direction(tmp_path / n) for n in ("a.safetensors", "b.safetensors", "direction.pt"))
    assert torch.allclose(plain.basis[0] * plain.norm, vector.double())
    assert torch.allclose(basis.basis @ basis.basis.T, torch.eye(3, dtype=torch.float64), atol=1e-12)
    assert torch.equal(reference.basis, plain.basis)
    assert (reference.position, reference.layer) == (-5, 12)


def test_bad_direction_file_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("code was run",))

    torch.save(Evil(), tmp_path / "evil.pt")
    torch.save({"a": 1}, tmp_path / "dict.pt")
    save_file({"direction": torch.zeros(4)}, tmp_path / "zero.safetensors")
    save_file({"direction": torch.tensor([1.0, float("nan")])}, tmp_path / "nan.safetensors")
    save_file({"vector": torch.ones(4)}, tmp_path / "named.safetensors")
    save_file({"direction": torch.ones(4, dtype=torch.complex64)}, tmp_path / "complex.safetensors")
    torch.save(torch.ones(1).expand(10**6, 10**6), tmp_path / "vast.pt")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    for name, message in {
        "evil.pt": "cannot be read",
        "dict.pt": "one tensor",
        "vast.pt": "1000000000000 numbers",
        "zero.safetensors": "zero, NaN",
        "nan.safetensors": "zero, NaN",
        "named.safetensors": "neither 'direction' nor 'basis'",
        "junk.safetensors": "cannot be read",
        "complex.safetensors": "complex numbers",
        "none.safetensors": "no such direction file",
    }.items():
        with pytest.raises(OrthogonalizeError, match=message):
            load_direction(tmp_path / name)
