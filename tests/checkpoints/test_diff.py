"""What `verify` finds in checkpoints that somebody else edited with plain torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from orthogonalize.checkpoints.tensor_diff import difference
from orthogonalize.cli import main
from orthogonalize.commands.verify import verify

WIDTH, LAYERS = 256, 3


def tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A model of no known family: linear, transposed, fused and single-expert writes, reads, an embedding, norms."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(*shape, generator=generator)).to(dtype)

    result = {"embed.weight": random(600, WIDTH), "head.weight": random(600, WIDTH), "norm.weight": random(WIDTH) + 1}
    for layer in range(LAYERS):
        result |= {
            f"layers.{layer}.q.weight": random(WIDTH, WIDTH),
            f"layers.{layer}.o.weight": random(WIDTH, WIDTH),
            f"layers.{layer}.c_proj.weight": random(320, WIDTH),
            f"layers.{layer}.experts.down": random(4, WIDTH, 96),
            f"layers.{layer}.experts_t.down": random(4, 96, WIDTH),
            f"layers.{layer}.experts.0.down.weight": random(WIDTH, 80),
            f"layers.{layer}.bias": random(WIDTH),
        }
    return result


AXES = {"embed": -1, "o": 0, "c_proj": -1, "experts.down": 1, "experts_t.down": -1, "experts.0.down": 0}


def axis_of(name: str) -> int | None:
    short = name.removesuffix(".weight")
    return AXES.get(short.split(".", 2)[2] if short.startswith("layers.") else short)


def orthogonalised(weights: dict[str, torch.Tensor], basis: torch.Tensor, strength: float = 1.0):
    """A plain script's edit: float32, one matrix product, rounded to nearest."""
    edited = dict(weights)
    for name, weight in weights.items():
        axis = axis_of(name)
        if axis is not None:
            x = weight.float().movedim(axis, -1)
            edited[name] = (x - strength * (x @ basis.T) @ basis).movedim(-1, axis).to(weight.dtype).contiguous()
    return edited


def relative(new: torch.Tensor, old: torch.Tensor) -> float:
    return float((new.float() - old.float()).norm() / old.float().norm())


def folder(path: Path, weights: dict[str, torch.Tensor], **config: object) -> Path:
    path.mkdir()
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "unheard_of", "hidden_size": WIDTH, **config}))
    (path / "tokenizer.json").write_text(json.dumps({"version": "1", "added_tokens": config.get("tokens", [])}))
    return path


def directions(k: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(WIDTH, k, generator=torch.Generator().manual_seed(7)))[0].T


@pytest.fixture
def base(tmp_path) -> Path:
    return folder(tmp_path / "base", tensors())


@pytest.mark.parametrize(("dtype", "rank"), [(torch.bfloat16, 1), (torch.bfloat16, 4), (torch.float16, 1)])
def test_direction_removed_by_a_plain_script_is_recovered(tmp_path, dtype, rank):
    weights, basis = tensors(dtype), directions(rank)
    base = folder(tmp_path / "base", weights)
    found = verify(folder(tmp_path / "edited", orthogonalised(weights, basis)), str(base))
    expected = {name for name in weights if axis_of(name) is not None}
    assert set(found.changed) == expected
    assert found.common is not None
    assert found.common.basis.shape == (rank, WIDTH)
    cosines = torch.linalg.svdvals(found.common.basis @ basis.T.double())
    assert cosines.min() >= 0.99
    assert found.common.shared_by[0] == found.common.of == len(expected)
    assert found.projected().keys() == expected
    assert found.verdict().startswith(f"an orthogonalisation of rank {rank}")
    for name in expected:
        assert found.differences[name].rank == rank
        assert found.differences[name].energy > 0.9
        own = next(d for d in found.differences[name].directions if d.axis == axis_of(name) % weights[name].dim())
        assert torch.linalg.svdvals(own.basis @ basis.T.double()).min() >= 0.99
        assert own.left <= 0.02
        assert own.strength == pytest.approx(1, abs=0.01)


def test_uneven_rows_do_not_raise_the_rank(tmp_path):
    """The rounding noise of long rows of an embedding is no direction of the edit."""
    weights, basis = tensors(), directions(1)
    lengths = torch.randn(600, 1, generator=torch.Generator().manual_seed(1)).mul(1.2).exp()
    for name, axis in (("embed.weight", 0), ("layers.1.o.weight", 1)):
        scale = lengths if axis == 0 else lengths[:WIDTH].T
        weights[name] = (weights[name].float() * scale).to(torch.bfloat16)
    base = folder(tmp_path / "base", weights)
    found = verify(folder(tmp_path / "edited", orthogonalised(weights, basis)), str(base))
    assert {difference.rank for difference in found.differences.values()} == {1}
    assert found.projected().keys() == {name for name in weights if axis_of(name) is not None}
    along = found.along_common("embed.weight")
    assert along.left <= 0.02
    assert along.strength == pytest.approx(1, abs=0.01)


def test_what_is_left_is_measured_along_the_common_direction_alone(tmp_path):
    """A tensor that was changed in another way as well still has all of the common direction projected out."""
    weights, basis = tensors(), directions(1)
    base, edited = folder(tmp_path / "base", weights), orthogonalised(weights, basis)
    generator = torch.Generator().manual_seed(5)
    own = torch.nn.functional.normalize(torch.randn(WIDTH, generator=generator), dim=0)
    own = own - (own @ basis[0]) * basis[0]
    name = "layers.0.c_proj.weight"
    edited[name] = (edited[name].float() + 0.3 * torch.outer(torch.randn(320, generator=generator), own)).bfloat16()
    found = verify(folder(tmp_path / "edited", edited), str(base))
    assert found.differences[name].rank == 2
    assert found.along_common(name).left <= 0.02
    assert found.along_common(name).strength == pytest.approx(1, abs=0.01)
    assert name in found.projected()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_direction_is_recovered_from_an_edit_in_another_dtype(dtype, tmp_path):
    weights, basis = tensors(), directions(1)
    base = folder(tmp_path / "base", weights)
    edited = orthogonalised({name: w.to(dtype) for name, w in weights.items()}, basis)
    found = verify(folder(tmp_path / "edited", edited), str(base))
    assert (found.common.basis @ basis.T.double()).abs().item() >= 0.99
    assert found.changed.keys() == weights.keys()  # the dtype counts as a difference
    assert found.projected().keys() == {name for name in weights if axis_of(name) is not None}
    assert found.verdict().startswith("an orthogonalisation of rank 1")


def test_same_numbers_in_another_dtype_are_recognised(tmp_path):
    weights = tensors()
    base = folder(tmp_path / "base", weights)
    found = verify(folder(tmp_path / "wide", {name: w.float() for name, w in weights.items()}), str(base))
    assert found.verdict() == "the weights are identical to the base's, in another number format"


def test_direction_is_recovered_from_scaled_fp8(tmp_path):
    """Stored codes mean nothing without their scales, which differ from row to row."""

    def quantised(weights):
        result = dict(weights)
        for name, weight in weights.items():
            if name.endswith(".o.weight"):
                scale = weight.float().abs().amax(1, keepdim=True) / 448
                result |= {name: (weight.float() / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
        return result

    weights, basis = tensors(), directions(1)
    base = folder(tmp_path / "base", quantised(weights))
    found = verify(folder(tmp_path / "edited", quantised(orthogonalised(weights, basis))), str(base))
    name = "layers.1.o.weight"
    (along,) = [d for d in found.differences[name].directions if d.axis == 0]
    assert (along.basis @ basis.T.double()).abs().item() >= 0.98
    assert found.differences[name].rank == 1
    assert found.changed[name] == pytest.approx(relative(orthogonalised(weights, basis)[name], weights[name]), rel=0.3)


def test_mirror_is_reported_with_its_strength(base, tmp_path):
    """A reflection is an edit of rank 1 and strength 2, not an orthogonalisation."""
    found = verify(folder(tmp_path / "edited", orthogonalised(tensors(), directions(1), 2.0)), str(base))
    assert found.projected() == {}
    assert "an edit of rank 1" in found.verdict()
    along = [found.along_common(name) for name in found.changed]
    assert [d.strength for d in along] == pytest.approx([2] * len(along), abs=0.02)
    assert "strength about 2," in found.verdict()


def test_fine_tuned_model_shares_no_direction(base, tmp_path):
    weights = tensors()
    generator = torch.Generator().manual_seed(3)
    tuned = {n: (w.float() + 1e-3 * torch.randn(w.shape, generator=generator)).to(w.dtype) for n, w in weights.items()}
    found = verify(folder(tmp_path / "tuned", tuned), str(base))
    assert found.projected() == {}
    assert "high rank" in found.verdict()
    assert found.differences["layers.0.o.weight"].rank is None


def test_merged_adapters_show_their_rank(base, tmp_path):
    weights = tensors()
    generator = torch.Generator().manual_seed(4)
    for layer in range(LAYERS):
        name = f"layers.{layer}.q.weight"
        a, b = torch.randn(WIDTH, 3, generator=generator), torch.randn(3, WIDTH, generator=generator)
        weights[name] = (weights[name].float() + 3e-4 * a @ b).to(torch.bfloat16)
    found = verify(folder(tmp_path / "merged", weights), str(base))
    assert {name: f.rank for name, f in found.differences.items()} == {
        f"layers.{layer}.q.weight": 3 for layer in range(LAYERS)
    }
    assert "low rank (at most 3)" in found.verdict()


def test_constant_in_the_biases_is_the_common_direction(base, tmp_path):
    weights, vector = tensors(), directions(1)[0]
    for layer in range(LAYERS):
        weights[f"layers.{layer}.bias"] = (weights[f"layers.{layer}.bias"].float() + vector).to(torch.bfloat16)
    found = verify(folder(tmp_path / "edited", weights), str(base))
    assert found.common is not None
    assert abs(found.common.basis[0] @ vector.double()) >= 0.99
    assert found.common.shared_by == (LAYERS,)


def test_every_other_difference_is_in_the_table_and_the_json(base, tmp_path):
    """Added, missing and re-typed tensors, configuration keys and files."""
    weights = orthogonalised(tensors(), directions(1))
    del weights["head.weight"]
    weights["extra"] = torch.ones(3)
    weights["norm.weight"] = weights["norm.weight"].float()
    edited = folder(tmp_path / "edited", weights, tokens=["<x>"], torch_dtype="bfloat16")
    words = ["--quiet", "verify", str(edited), "--base", str(base)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "orthogonalisation" in " ".join(result.output.split())
    found = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert found["added"] == ["extra"]
    assert found["missing"] == ["head.weight"]
    assert found["changed"]["norm.weight"] == {"change": 0.0}  # the same numbers in another dtype
    assert found["config"] == {"tokens": [None, ["<x>"]], "torch_dtype": [None, "bfloat16"]}
    assert found["files"] == {"tokenizer.json": "differs in added_tokens"}
    assert abs(torch.tensor(found["common"]["directions"][0]) @ directions(1)[0]) >= 0.99
    assert found["changed"]["embed.weight"]["rank"] == 1


def test_copy_is_recognised_as_the_base(base, tmp_path):
    found = verify(folder(tmp_path / "copy", load_file(base / "model.safetensors")), str(base))
    assert found.verdict() == "the weights are identical to the base's"
    assert found.same == len(tensors())


@pytest.mark.parametrize("axis", [0, 1])
def test_tensor_read_in_parts_gives_the_same_directions(axis):
    """Large matrices, such as embeddings, arrive some rows at a time; a direction along the rows spans all parts."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(90, 40, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(old.shape[axis], generator=generator), dim=0)
    removed = old.movedim(axis, -1) - (old.movedim(axis, -1) @ direction)[..., None] * direction
    new = removed.movedim(-1, axis)
    whole = difference(old.shape, old.dtype, lambda: iter([(old, new)]))
    parts = difference(old.shape, old.dtype, lambda: iter(list(zip(old.split(13), new.split(13), strict=True))))
    for found in (whole, parts):
        assert found.rank == 1
        along = next(d for d in found.directions if d.axis == axis)
        assert abs(along.basis[0].float() @ direction) > 0.9999
        assert along.left < 1e-4
    for a, b in zip(whole.directions, parts.directions, strict=True):
        assert (a.axis, a.basis.shape) == (b.axis, b.basis.shape)
        assert abs(a.basis[0] @ b.basis[0]) > 0.9999
        assert a.strength == pytest.approx(b.strength, abs=1e-4)
