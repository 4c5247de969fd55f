"""Fixtures that several rooms share; what builds them lies in `helpers`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.benchmark_files import all_sets
from helpers.chat import bake_prompts, store_chatting
from helpers.command_line import SMALL
from helpers.llama import WIDTH, store, tiny_llama

from orthogonalize.commands.edit import edit
from orthogonalize.commands.extract import extract
from orthogonalize.selection.settings import Settings


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keep each file's tests in one process; those that start vLLM share one, which begins at once."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args != ("engines",))


def pytest_addoption(parser):
    parser.addoption(
        "--proof", type=Path, help="Folder with proof.json and architectures.md, which are brought up to date."
    )


@pytest.fixture(scope="session")
def proof(request):
    """Takes what was measured about a family; at the end it goes into the documentation, if that was asked for."""
    from helpers.proof_table import record

    measured: dict[str, dict] = {}
    yield lambda name, **values: measured.setdefault(name, {}).update(values)
    folder = request.config.getoption("--proof")
    if folder is not None:
        record(folder, measured)


@pytest.fixture
def one_thread():
    """Matrices this small take longer to share than to multiply."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Tiny checkpoints of every family by name, each made once."""
    from helpers.exactness import Base

    folder = tmp_path_factory.mktemp("tiny")
    return cache(lambda name: Base(name, folder / name))


@pytest.fixture
def base(tmp_path) -> Path:
    """A tiny random Llama on disk, float64, head untied."""
    return store(tiny_llama(), tmp_path / "base")


@pytest.fixture
def basis() -> torch.Tensor:
    """Three orthonormal directions of the tiny models' stream."""
    q, _ = torch.linalg.qr(torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    return q.T.contiguous()


@pytest.fixture
def chat_model(tmp_path) -> Path:
    return store_chatting(tmp_path / "chat-model")


@pytest.fixture(scope="module")
def model(request, tmp_path_factory) -> Path:
    """A tiny model that chats; a module that needs another has a function `store_model` that writes it."""
    folder = tmp_path_factory.mktemp(request.module.__name__) / "model"
    return getattr(request.module, "store_model", store_chatting)(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("prompts")
    paths = {}
    for side, prompts in zip(("positive", "negative"), bake_prompts(), strict=True):
        (folder / f"{side}.txt").write_text("\n".join(prompts))
        paths[side] = str(folder / f"{side}.txt")
    return paths


@pytest.fixture(scope="module")
def run_settings(request) -> Settings:
    """What `run` is extracted with; a module that needs another run has RUN_SETTINGS."""
    return getattr(request.module, "RUN_SETTINGS", SMALL)


@pytest.fixture(scope="module")
def run(model, sources, run_settings, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    extract(str(model), out, **sources, settings=run_settings)
    return out


@pytest.fixture(scope="module")
def edited(model, run, tmp_path_factory) -> Path:
    """`model` without the best direction of `run`."""
    out = tmp_path_factory.mktemp("edited") / "edited"
    edit(str(model), out, run=run, method="ablate", scope="all")
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Local copies of every public set."""
    return all_sets(tmp_path_factory.mktemp("data"))
