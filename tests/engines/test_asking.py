"""What is asked of vLLM again, and what is kept: answers and reasons of the class, but no reason that may pass."""

from __future__ import annotations

import errno
import json
import subprocess

import pytest
import torch
from transformers import AutoConfig

from orthogonalize.architectures.open_questions import answered, open_names, parts_with_bias
from orthogonalize.architectures.schema import architecture_of, families, remember
from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.core.errors import OrthogonalizeError, UnansweredError
from orthogonalize.core.interventions import Intervention, Site, shift
from orthogonalize.edits.bake import bake
from orthogonalize.engines.experiment import ask as asking
from orthogonalize.engines.experiment import small_model
from orthogonalize.engines.experiment.ask import ask_server
from orthogonalize.engines.experiment.passing import may_pass
from orthogonalize.engines.experiment.questions import Told
from orthogonalize.models.describe.twin import WIDTH, save_twin

NAMES = ["head", "attn.attention", "mlp.dense"]


def left_open(name, *names):
    """A shipped description with questions left open again, by default all."""
    architecture = families()[name]
    return answered(architecture, dict.fromkeys(names or ["head", *parts_with_bias(architecture)], "unknown"))


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Small models by family."""
    made = {}
    for name in ("llama", "gpt_neox"):
        made[name] = tmp_path_factory.mktemp(name)
        save_twin(AutoConfig.for_model(name), made[name])
    return made


@pytest.fixture
def source(twins, tmp_path, monkeypatch):
    """A model whose description leaves everything open, in a process that has asked nothing yet."""
    monkeypatch.setenv("ORTHOGONALIZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(asking, "has", lambda _: True)
    opened = open_checkpoint(twins["llama"])
    another_process(monkeypatch, opened)
    yield opened
    remember(opened.config, None)


def another_process(monkeypatch, source):
    """Forget what this process knows."""
    monkeypatch.setattr(asking, "_failures", {})
    remember(source.config, left_open("llama"))


def telling(monkeypatch, *told):
    """Have vLLM tell these in turn, when it is asked; the list that is returned has what was known before."""
    times, left = [], list(told)

    def served(twin):
        times.append(json.loads((twin / "questions.json").read_text())["known"])
        return left.pop(0)

    monkeypatch.setattr(small_model, "_served", served)
    return times


FULL = Told({"head": "vllm"}, "vLLM did not answer in 900 s", passing=True)
REFUSED = Told({"head": "vllm"}, "vLLM does not run a small model of this class: it has no such layer")
RUNS = Told({"head": "vllm"})
ALL = Told(dict.fromkeys(NAMES, "vllm"))


def test_reason_that_may_pass_is_said_and_the_next_command_goes_on(source, monkeypatch):
    times = telling(monkeypatch, FULL, ALL)
    assert open_names(architecture_of(source.config)) == NAMES
    for _ in range(2):  # in one process, no edit waits for the same again
        reason = ask_server(source)
        assert reason == f"vLLM did not answer in 900 s; {small_model.AGAIN}"
    assert open_names(architecture_of(source.config)) == NAMES[1:]
    another_process(monkeypatch, source)
    assert ask_server(source) == ""
    assert open_names(architecture_of(source.config)) == []
    assert times == [{}, {"head": "vllm"}]


def test_program_that_ends_before_it_tells_anything_loses_no_answer(source, monkeypatch):
    times = telling(monkeypatch, FULL, Told({}, "vLLM ended with signal 9", passing=True), ALL)
    for _ in range(3):
        another_process(monkeypatch, source)
        ask_server(source)
        assert "head" not in open_names(architecture_of(source.config))
    assert times == [{}, {"head": "vllm"}, {"head": "vllm"}]


def test_reason_of_the_class_is_kept_with_the_way_to_ask_again(source, tmp_path, monkeypatch):
    times = telling(monkeypatch, REFUSED, RUNS, ALL)
    assert ask_server(source) == REFUSED.reason
    (kept,) = (tmp_path / "cache" / "descriptions").iterdir()
    another_process(monkeypatch, source)
    notes = []
    monkeypatch.setattr(asking, "note", notes.append)
    assert ask_server(source) == REFUSED.reason
    assert notes[0] == f"llama: an earlier experiment on vLLM failed; remove {kept} to repeat it"
    assert open_names(architecture_of(source.config)) == NAMES[1:]
    assert len(times) == 2
    kept.unlink()
    another_process(monkeypatch, source)
    assert ask_server(source) == ""


def test_what_fails_on_a_small_llama_too_is_no_reason_of_the_class(source, tmp_path, monkeypatch):
    """Such as a missing compiler: the model is not to blame, and nothing of it is kept."""
    broken = Told({}, "vLLM does not run a small model of this class: no C++ compiler")
    telling(monkeypatch, broken, broken, ALL)
    assert (
        ask_server(source) == f"{broken.reason}; no small Llama runs here either: mend that, and run the command again"
    )
    assert not (tmp_path / "cache" / "descriptions").exists()
    another_process(monkeypatch, source)
    assert ask_server(source) == ""


def test_class_without_a_small_model_is_a_reason_without_a_start(source, monkeypatch):
    def unbuilt(*_args):
        raise OrthogonalizeError("transformers cannot build or run a small model of it")

    times = telling(monkeypatch)
    monkeypatch.setattr(small_model, "save_twin", unbuilt)
    assert ask_server(source) == "transformers cannot build or run a small model of it"
    another_process(monkeypatch, source)
    assert ask_server(source) == "transformers cannot build or run a small model of it"
    assert times == []


def test_damaged_answers_in_the_cache_are_asked_again(source, tmp_path, monkeypatch):
    telling(monkeypatch, ALL, ALL, ALL, ALL)
    ask_server(source)
    (kept,) = (tmp_path / "cache" / "descriptions").iterdir()
    for text in ("{", "[]", '{"answers": {"head": "perhaps"}}'):
        kept.write_text(text)
        another_process(monkeypatch, source)
        assert ask_server(source) == ""


def program(folder, monkeypatch, script):
    """Have a shell script stand for the program that asks vLLM."""
    file = folder / "program"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setattr(small_model.sys, "executable", str(file))
    return small_model._served(folder)


PARTLY = """echo '{"partly": {"head": "vllm"}}'"""
WHOLE = """echo '{"told": {"answers": {"head": "never"}, "reason": "", "passing": false}}'"""


def test_program_that_ends_early_has_told_what_it_told_before(tmp_path, monkeypatch):
    assert program(tmp_path, monkeypatch, "exit 1") == Told({}, "vLLM ended with status 1: no message")
    crashed = program(tmp_path, monkeypatch, f"{PARTLY}; kill -SEGV $$")
    assert crashed == Told({"head": "vllm"}, "vLLM ended with signal 11: no message")
    killed = program(tmp_path, monkeypatch, f"{PARTLY}; kill -KILL $$")
    assert killed == Told({"head": "vllm"}, "vLLM ended with signal 9: no message", passing=True)
    short = program(tmp_path, monkeypatch, "echo 'RuntimeError: CUDA out of memory' >&2; exit 1")
    assert short.passing
    at_exit = program(tmp_path, monkeypatch, f"{PARTLY}; {WHOLE}; kill -SEGV $$")
    assert at_exit == Told({"head": "never"})


def test_program_that_is_stopped_has_told_what_it_told_before(tmp_path, monkeypatch):
    def run(*_args, **_options):
        raise subprocess.TimeoutExpired("server", 900, output=b'{"partly": {"head": "vllm"}}\n{"part')

    monkeypatch.setattr(small_model.subprocess, "run", run)
    assert small_model._served(tmp_path) == FULL


def wrapped(cause):
    """As an engine raises it, with its advice about memory."""
    error = OrthogonalizeError("vLLM did not start on x: why; otherwise free memory, or use --engine hf")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("cause", "passing"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOSPC, "whatever it says"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (ValueError("Free memory on device cuda:0 (1.2/80 GiB) on startup is less than desired GPU memory"), True),
        (ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("The server socket has failed to listen: Address already in use"), True),
        (OSError(errno.ENOENT, "no such file"), False),
        (ValueError("Model architectures ['XForCausalLM'] are not supported for now"), False),
        (AssertionError("CPU attention does not support head_size 16"), False),
        (KeyError("model.layers.0.mlp.bias"), False),
    ],
)
def test_what_is_short_is_told_from_what_a_class_lacks(cause, passing):
    assert may_pass(wrapped(cause)) == passing


def test_constant_goes_into_the_answered_one_of_two_biases(twins):
    """GPT-NeoX: attention and MLP side by side, so that the bias of either can hold it."""
    source = open_checkpoint(twins["gpt_neox"])
    constant = Intervention({Site("mlp", 1): shift(torch.ones(WIDTH, dtype=torch.float64))})
    asked = []

    def ask(_source):
        asked.append(1)
        return "vLLM does not run"

    try:
        remember(source.config, left_open("gpt_neox", "mlp.dense"))
        edits = bake(source, constant, ask).checkpoint.edits
        assert list(edits) == ["gpt_neox.layers.1.attention.dense.bias"]
        assert asked == []
        remember(source.config, left_open("gpt_neox", "mlp.dense", "attn.attention"))
        with pytest.raises(UnansweredError, match=r"bias .* at mlp.1 .*\(vLLM does not run\)"):
            bake(source, constant, ask)
        assert asked == [1]
        nowhere = answered(left_open("gpt_neox", "mlp.dense"), {"attn.attention": "never"})
        remember(source.config, nowhere)
        with pytest.raises(UnansweredError):
            bake(source, constant, ask)
    finally:
        remember(source.config, None)
