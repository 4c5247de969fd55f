"""Well-formed checkpoints that are unlike most: what they hold is kept, said or refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from helpers.llama import WIDTH, store, tiny_llama
from safetensors.torch import load_file, save_file

from orthogonalize.checkpoints.checkpoint import INDEX, open_checkpoint
from orthogonalize.checkpoints.safetensors_file import NOT_FINITE, open_tensor_file
from orthogonalize.commands.edit import edit
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.files import write_all
from orthogonalize.directions.direction_set import load_direction
from orthogonalize.edits.scopes import parse_scope
from orthogonalize.engines.vllm import VllmEngine

EDITED, OTHER = "model.layers.1.mlp.down_proj.weight", "model.layers.3.self_attn.q_proj.weight"


@pytest.fixture
def direction(tmp_path) -> Path:
    save_file({"direction": torch.randn(WIDTH)}, tmp_path / "direction.safetensors")
    return tmp_path / "direction.safetensors"


def with_value(base: Path, name: str, value: float) -> Path:
    """`base` with one number of the tensor `name` replaced."""
    tensors = load_file(base / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base


def edited(base: Path, direction: Path, out: Path) -> Path:
    edit(str(base), out, direction=direction, layer=1, scope="layers:1")
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_huge_values_are_edited_or_called_huge(dtype, direction, tmp_path):
    """The square of 1e25 is beyond float32, in which bfloat16 is edited."""
    base = with_value(store(tiny_llama(), tmp_path / "base", dtype), EDITED, 1e25)
    if dtype == torch.bfloat16:
        with pytest.raises(OrthogonalizeError, match=rf"{EDITED} holds NaN, infinite or huge values \(above 1e18\)"):
            edited(base, direction, tmp_path / "edited")
        return
    edited(base, direction, tmp_path / "edited")
    before, after = (load_file(tmp_path / n / "model.safetensors")[EDITED].double() for n in ("base", "edited"))
    unit = load_file(direction)["direction"].double()
    unit /= unit.norm()
    expected = before - unit[:, None] * (unit @ before)
    assert torch.allclose(after, expected, rtol=1e-5, atol=float(expected.abs().max()) * 1e-6)


def test_large_bfloat16_values_are_edited(direction, tmp_path):
    base = with_value(store(tiny_llama(), tmp_path / "base", torch.bfloat16), EDITED, 1e18)
    edited(base, direction, tmp_path / "edited")
    assert torch.isfinite(load_file(tmp_path / "edited" / "model.safetensors")[EDITED]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shards", [1, 3])
def test_what_is_not_finite_and_not_edited_is_said(value, shards, direction, tmp_path, monkeypatch):
    base = store(tiny_llama(), tmp_path / "base", torch.bfloat16, shards)
    file = next(f for f in base.glob("*.safetensors") if OTHER in load_file(f))
    tensors = load_file(file)
    tensors[OTHER].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    notes: list[str] = []
    monkeypatch.setattr("orthogonalize.commands.edit.note", lambda *lines: notes.extend(lines))
    edited(base, direction, tmp_path / "edited")
    said = f"the base holds NaN or infinite values where the edit leaves it as it is: {OTHER}"
    assert said in notes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
                                   torch.float8_e5m2])  # fmt: skip
def test_numbers_that_are_not_finite_are_found_in_every_format(dtype, tmp_path):
    """Every bit pattern of the small formats, and the edges of the large ones, by torch's own judgement."""
    if dtype.itemsize <= 2:
        patterns = torch.arange(256**dtype.itemsize, dtype=torch.int32)
        values = patterns.to({1: torch.uint8, 2: torch.uint16}[dtype.itemsize]).view(dtype)
    else:
        limits = torch.finfo(dtype)
        values = torch.tensor(
            [limits.max, limits.min, limits.tiny, -0.0, float("nan"), torch.inf, -torch.inf], dtype=dtype
        )
    finite = torch.isfinite(values.double())
    assert 0 < finite.sum() < len(values)
    tensors = {f"{i}": value.reshape(1) for i, value in enumerate(values[~finite])} | {"finite": values[finite]}
    save_file({name: value.clone() for name, value in tensors.items()}, tmp_path / "a.safetensors")
    file = open_tensor_file(tmp_path / "a.safetensors")
    assert {info.dtype for info in file.tensors.values()} <= NOT_FINITE.keys()
    assert set(file.not_finite(file.tensors)) == tensors.keys() - {"finite"}


def test_an_index_that_merely_mentions_the_single_file_is_refused(tmp_path):
    """transformers would read the single file, and others the shards."""
    base = store(tiny_llama(), tmp_path / "base", torch.float32, shards=2)
    save_file(load_file(next(base.glob("model-*"))), base / "model.safetensors")
    index = json.loads((base / INDEX).read_text())
    index["metadata"] = {**index.get("metadata", {}), "note": "merged from model.safetensors"}
    (base / INDEX).write_text(json.dumps(index))
    with pytest.raises(OrthogonalizeError, match=r"has both model\.safetensors\.index\.json and model"):
        open_checkpoint(base)


def test_vllm_is_not_given_a_folder_of_which_it_would_read_more(tmp_path):
    """Without an index, vLLM reads every safetensors file, and transformers only model.safetensors."""
    base = store(tiny_llama(), tmp_path / "base", torch.float32)
    open_checkpoint(base).check_nothing_beside()
    save_file({OTHER: torch.ones(2)}, base / "model.fp16.safetensors")
    with (
        pytest.raises(OrthogonalizeError, match=r"vLLM would read model\.fp16\.safetensors as well"),
        VllmEngine(base, max_model_len=16),
    ):
        pass
    sharded = store(tiny_llama(), tmp_path / "sharded", torch.float32, shards=2)
    save_file({OTHER: torch.ones(2)}, sharded / "model.fp16.safetensors")
    open_checkpoint(sharded).check_nothing_beside()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_every_file_of_a_checkpoint_has_the_permissions_that_the_umask_gives(mask, direction, tmp_path):
    base = store(tiny_llama(), tmp_path / "base", torch.bfloat16, shards=3)
    before = os.umask(mask)
    try:
        edited(base, direction, tmp_path / "edited")
    finally:
        os.umask(before)
    modes = {f.name: f.stat().st_mode & 0o777 for f in (tmp_path / "edited").rglob("*") if f.is_file()}
    assert set(modes.values()) == {0o666 & ~mask}, modes


def test_writes_that_are_cut_short_are_continued(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:3], offset))
    with open(tmp_path / "file", "wb") as file:
        write_all(file.fileno(), 2, memoryview(b"0123456789"))
    assert (tmp_path / "file").read_bytes() == b"\0\x000123456789"


def test_a_basis_of_many_directions_is_orthonormal(tmp_path):
    """As many as the stream is wide, in order; the others depend on them."""
    rows = torch.randn(3 * WIDTH, WIDTH, dtype=torch.float64)
    save_file({"basis": rows}, tmp_path / "basis.safetensors")
    basis = load_direction(tmp_path / "basis.safetensors").basis
    q, r = torch.linalg.qr(rows[:WIDTH].T)
    assert torch.allclose(basis, (q * r.diagonal().sign()).T, atol=1e-9)


@pytest.mark.parametrize("scope", ["layers:0-9999999999", "layers:3,9999999999", "layers:0-10001"])
def test_scopes_of_more_layers_than_any_model_has_are_refused(scope):
    with pytest.raises(OrthogonalizeError, match="no model has 10000 layers"):
        parse_scope(scope)
