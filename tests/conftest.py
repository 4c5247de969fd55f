"""Fixtures shared by several rooms; the code that builds them is in `helpers`."""

from __future__ import annotations

import signal
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.benchmark_files import all_sets
from helpers.chat import bake_prompts, store_chatting
from helpers.command_line import SMALL
from helpers.llama import WIDTH, store, tiny_llama

from orthogonalize.commands.edit import edit
from orthogonalize.commands.extract import _Extraction, extract
from orthogonalize.core.interrupts import STOPPING
from orthogonalize.selection.settings import Settings

# Files that start vLLM; they share one process where two run tests, since two engines at a time would not fit.
START_VLLM = {
    "edits/test_lora.py",
    "commands/test_served_extract.py",
    "engines/test_engine_streams.py",
    "engines/test_openai_client.py",
    "engines/test_served_llama.py",
    "engines/test_vllm.py",
    "evals/test_judges.py",
    "models/test_demo_model.py",
    "pipeline/test_demo.py",
}


def pytest_configure():
    """Hear every signal, also where a shell runs the suite in the background and has it ignore some."""
    for number in STOPPING:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def process_of(nodeid: str) -> str:
    """Which tests share a process: each file's, and those of all files that start vLLM.

    Of the judges' tests, those that do not start vLLM have a process of their own.
    """
    file = nodeid.split("::")[0]
    starts = any(file.endswith(name) for name in START_VLLM)
    return "vllm" if starts and (not file.endswith("test_judges.py") or "vllm" in nodeid) else file


def pytest_collection_modifyitems(items):
    """Begin with the process that has the most to do."""
    items.sort(key=lambda item: process_of(item.nodeid) != "vllm")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByProcess(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return process_of(nodeid)

    return ByProcess(config, log)


def pytest_addoption(parser):
    parser.addoption("--proof", type=Path, help="Folder with proof.json and architectures.md, to be updated.")


@pytest.fixture(scope="session")
def proof(request):
    """Collects measurements per family; with --proof they are written to the documentation at the end."""
    from helpers.proof_table import record

    measured: dict[str, dict] = {}
    yield lambda name, **values: measured.setdefault(name, {}).update(values)
    folder = request.config.getoption("--proof")
    if folder is not None:
        record(folder, measured)


@pytest.fixture(scope="session")
def class_proof(request):
    """Collects what was found of every class of transformers; with --proof it is written to the documentation."""
    from helpers.proof_table import record_classes

    measured: dict[str, dict] = {}
    yield measured
    folder = request.config.getoption("--proof")
    if folder is not None:
        record_classes(folder, measured)


@pytest.fixture(scope="module", autouse=True)
def figures_only_on_request(request):
    """Draw the figures of runs only in modules that look at them (`FIGURES = True`).

    They take longer than all the rest of a tiny model's run.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "FIGURES", False):
            patch.setattr(_Extraction, "_plot", lambda *_: None)
        yield


@pytest.fixture
def one_thread():
    """Run torch on one thread: matrices this small take longer to distribute than to multiply."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Tiny checkpoints of every family by name, each built once."""
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
    """A tiny chat model; a test module can define `store_model` to write another one."""
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
    """Settings of the fixture `run`; a test module can define RUN_SETTINGS to change them."""
    return getattr(request.module, "RUN_SETTINGS", SMALL)


@pytest.fixture(scope="module")
def run(model, sources, run_settings, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    extract(str(model), out, **sources, settings=run_settings)
    return out


@pytest.fixture(scope="module")
def edited(model, run, tmp_path_factory) -> Path:
    """`model` with the best direction of `run` removed."""
    out = tmp_path_factory.mktemp("edited") / "edited"
    edit(str(model), out, run=run, method="ablate", scope="all")
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Local copies of every public set."""
    return all_sets(tmp_path_factory.mktemp("data"))
