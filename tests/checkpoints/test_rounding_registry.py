"""Rounding schemes are one table: a scheme from outside the package is edited, recorded and verified by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.llama import WIDTH, store, tiny_llama
from helpers.toward_zero import round_toward_zero
from safetensors.torch import save_file

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.checkpoints.rounding.registry import DEFAULT_ROUNDING, ROUNDING_SCHEMES, RoundingScheme
from orthogonalize.cli import main
from orthogonalize.commands.edit import edit
from orthogonalize.commands.verify import verify
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.edits.bake import bake
from orthogonalize.edits.recipe import load_recipe


@pytest.fixture
def source(tmp_path) -> Path:
    return store(tiny_llama(), tmp_path / "base", torch.bfloat16, shards=2)


@pytest.fixture
def direction(tmp_path) -> Path:
    save_file({"direction": torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))}, tmp_path / "d.safetensors")
    return tmp_path / "d.safetensors"


@pytest.fixture
def toward_zero():
    scheme = RoundingScheme("toward-zero", "drops the bits that do not fit", "helpers.toward_zero:toward_zero")
    yield ROUNDING_SCHEMES.add(scheme)
    ROUNDING_SCHEMES.remove(scheme.name)


def run(*words) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["--quiet", *map(str, words)])
    return result.exit_code, result.output


def test_a_scheme_from_outside_edits_and_verifies(source, direction, toward_zero, tmp_path):
    out = tmp_path / "edited"
    words = ["edit", source, "--direction", direction, "--scope", "layers:1-2", "--rounding", "toward-zero"]
    code, output = run(*words, "--out", out)
    assert code == 0, output
    recipe = load_recipe(out)
    assert recipe.rounding == "toward-zero"
    edited, base = open_checkpoint(out), open_checkpoint(source)
    plan = bake(base, recipe.intervention()).checkpoint
    assert plan.edits
    for name, planned in plan.edits.items():
        stored = edited.read(name)
        assert torch.equal(stored.double(), round_toward_zero(planned.exact(base.read(name)))), name
    assert any(record.leak > 1e-3 for record in recipe.tensors)  # it cancels nothing
    proof = verify(out).verification
    assert proof is not None
    assert proof.rebuilt
    assert proof.passed
    edit(str(source), tmp_path / "again", recipe=out / "orthogonalize.json")
    assert all((tmp_path / "again" / name).read_bytes() == (out / name).read_bytes() for name in base.files)


def test_the_command_line_lists_schemes_as_they_are_registered(toward_zero):
    assert "--rounding [cancelling|nearest|toward-zero]" in run("edit", "--help")[1]


def test_unknown_scheme_is_refused_by_cli_function_and_recipe(source, direction, toward_zero, tmp_path):
    edit(str(source), tmp_path / "edited", direction=direction, scope="layers:1", rounding="toward-zero")
    ROUNDING_SCHEMES.remove("toward-zero")
    try:
        code, output = run("edit", source, "--direction", direction, "--out", tmp_path / "x", "--rounding", "up")
        assert code == 2
        assert "'up' is not one of 'cancelling', 'nearest'" in output
        with pytest.raises(OrthogonalizeError, match="unknown rounding scheme 'up'; available: cancelling, nearest"):
            edit(str(source), tmp_path / "x", direction=direction, rounding="up")
        with pytest.raises(OrthogonalizeError, match=r"orthogonalize\.json: unknown rounding scheme 'toward-zero'"):
            load_recipe(tmp_path / "edited")
    finally:
        ROUNDING_SCHEMES.add(toward_zero)
    assert not (tmp_path / "x").exists()


def test_every_scheme_loads_and_the_default_is_one_of_them():
    assert DEFAULT_ROUNDING in ROUNDING_SCHEMES
    assert all(callable(scheme.load()) for scheme in ROUNDING_SCHEMES.values())
    assert all(scheme.summary for scheme in ROUNDING_SCHEMES.values())
