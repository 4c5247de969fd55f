"""Interrupted measurements: what was measured is kept, and reused only where it is still valid."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.chat import store_choosing
from helpers.command_line import UNTRIED

from orthogonalize.commands.evaluate import evaluate
from orthogonalize.commands.verify import verify
from orthogonalize.core import interrupts as interruption
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.files import write_after
from orthogonalize.core.journal import Journal
from orthogonalize.engines.base import EngineOptions
from orthogonalize.engines.registry import engine_state
from orthogonalize.engines.transformers import TransformersEngine
from orthogonalize.engines.weight_swap import WeightSwap
from orthogonalize.evals.plan import make_plan
from orthogonalize.evals.resumable import ResumableEngine
from orthogonalize.models.loading import load_tokenizer
from orthogonalize.models.logprobs import Completion
from orthogonalize.models.resolve import folder_state
from orthogonalize.selection.run_folder import load_run

RUN_SETTINGS, store_model = UNTRIED, store_choosing


def dies(*_arguments):
    raise OrthogonalizeError("the engine died")


def test_changed_prompts_or_counts_are_another_measurement(model, run, data):
    found, tokenizer = load_run(run), load_tokenizer(model)

    def steps(found=found, suites=("refusal", "behaviour", "loss", "alpaca"), new_tokens=4, limit=4) -> list[str]:
        return make_plan(found, tokenizer, suites, new_tokens, limit, data).steps("base", is_base=True)

    assert [step.partition("@")[0] for step in steps()] == [
        "base/answers target", "base/answers harmless", "base/behaviour", "base/loss", "base/alpaca",
    ]  # fmt: skip
    assert steps() == steps()
    with_form = steps(suites=("refusal", "behaviour", "form", "loss", "alpaca"))
    assert with_form == steps()  # counts over stored answers are recomputed
    assert [step for step in steps() if "behaviour" not in step] == steps(suites=("refusal", "loss", "alpaca"))
    other = replace(found, info=found.info.model_copy(update={"system": "be brief"}))
    assert not set(steps(other)) & set(steps())  # a system prompt changes Alpaca's prompts too
    longer = steps(new_tokens=5)
    assert not {*longer[:2], longer[3]} & set(steps())
    assert (longer[2], longer[4]) == (steps()[2], steps()[4])  # neither reads answers
    assert not set(steps(limit=3)) & set(steps())
    assert set(steps()) < set(steps(suites=("refusal", "behaviour", "loss", "alpaca", "mmlu", "orbench")))


def test_engine_state_holds_what_its_results_depend_on(monkeypatch):
    whole = EngineOptions()
    assert engine_state("hf", replace(whole, gpu_memory_utilization=0.5)) == engine_state("hf", whole)
    for change in ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"data_parallel_size": 2}):
        assert engine_state("vllm", replace(whole, **change)) != engine_state("vllm", whole)
    on_cpu = engine_state("hf", replace(whole, device="cpu"))
    monkeypatch.setattr("orthogonalize.models.loading.choose_device", lambda _: torch.device("cuda", 1))
    assert engine_state("hf", replace(whole, device="cuda:1")) != on_cpu
    monkeypatch.setattr("orthogonalize.engines.registry.version", lambda _: "another")
    assert engine_state("hf", replace(whole, device="cpu"))[1:3] != on_cpu[1:3]


def test_unchanged_results_are_not_measured_again(model, edited, run, data, tmp_path, monkeypatch):
    """After another suite was added, and `verify` wrote into the recipe, which does not count as a change."""
    checkpoint = tmp_path / "edited"
    shutil.copytree(edited, checkpoint)
    settings = {"engine": "hf", "max_new_tokens": 6, "data": data, "limit": 4}
    asked: list[str] = []
    scores = TransformersEngine.scores

    def counted(self, *arguments):
        if len(arguments[0]) > 1:  # except for the single prompt of the NaN check
            asked.append(self.folder.name)
        return scores(self, *arguments)

    monkeypatch.setattr(TransformersEngine, "scores", counted)
    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "choices", dies)
        with pytest.raises(OrthogonalizeError, match="died"):
            evaluate(checkpoint, str(model), run, tmp_path / "out", suites=["pile", "mmlu"], **settings)
    assert asked == ["model"]
    verify(str(checkpoint), str(model))
    evaluate(checkpoint, str(model), run, tmp_path / "out", suites=["alpaca", "pile", "mmlu"], **settings)
    assert asked == ["model", "model", "edited", "edited"]


def test_killed_eval_keeps_its_results_and_resumes(model, edited, run, data, tmp_path, monkeypatch):
    settings = {"suites": ["refusal", "behaviour", "kl", "mmlu"], "engine": "hf", "max_new_tokens": 12, "data": data}
    whole = evaluate(edited, str(model), run, tmp_path / "whole", **settings)
    calls: list[str] = []
    answers, choices = TransformersEngine.answers, TransformersEngine.choices

    def counted(self, *arguments):
        calls.append(self.folder.name)
        return answers(self, *arguments)

    monkeypatch.setattr(TransformersEngine, "answers", counted)
    monkeypatch.setattr(
        TransformersEngine,
        "choices",
        lambda self, *a: dies(self) if "edited" in self.folder.name else choices(self, *a),
    )
    with pytest.raises(OrthogonalizeError, match="died"):
        evaluate(edited, str(model), run, tmp_path / "cut", **settings)
    assert not (tmp_path / "cut").exists()
    assert calls == ["model", "edited"]
    monkeypatch.setattr(TransformersEngine, "choices", choices)
    resumed = evaluate(edited, str(model), run, tmp_path / "cut", **settings)
    assert calls == ["model", "edited"]  # nothing was generated a second time
    assert resumed.model_dump() == whole.model_dump()
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_suite_that_died_halfway_resumes_at_the_lost_portion(model, edited, run, data, tmp_path, monkeypatch):
    settings = {"suites": ["refusal", "pile", "mmlu"], "engine": "hf", "max_new_tokens": 4, "data": data}
    whole = evaluate(edited, str(model), run, tmp_path / "whole", **settings)
    monkeypatch.setattr("orthogonalize.evals.resumable.PORTION", 3)
    asked: list[tuple[str, str, int]] = []
    deaths = {("edited", "answers"), ("model", "scores"), ("edited", "choices")}

    def mortal(kind):
        method = getattr(TransformersEngine, kind)

        def ask(self, prompts, *more):
            asked.append((self.folder.name, kind, len(prompts)))
            portions = [one for one in asked if one[:2] == (self.folder.name, kind)]
            if len(portions) == 2 and (self.folder.name, kind) in deaths:
                deaths.remove((self.folder.name, kind))
                raise OrthogonalizeError("the engine died")
            return method(self, prompts, *more)

        return ask

    for kind in ("answers", "scores", "choices"):
        monkeypatch.setattr(TransformersEngine, kind, mortal(kind))
    for _ in range(3):
        with pytest.raises(OrthogonalizeError, match=r"died; finished measurements were kept"):
            evaluate(edited, str(model), run, tmp_path / "cut", **settings)
    resumed = evaluate(edited, str(model), run, tmp_path / "cut", **settings)
    assert resumed.model_dump() == whole.model_dump()
    assert max(size for _, _, size in asked) == 3
    first = [size for name, kind, size in asked if (name, kind) == ("edited", "answers")]
    items = whole.edited.refusal.target.n + whole.edited.refusal.harmless.n
    assert sum(first) == items + 3  # only the lost portion of the answers was asked for twice
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_portions_are_dropped_when_their_suite_is_done(tmp_path):
    journal = Journal.beside(tmp_path / "out")
    journal.step("base/mmlu", lambda: [*journal.step("base/mmlu/1/0", lambda: [1]), 2])
    assert Journal.beside(tmp_path / "out").done == {"base/mmlu": [1, 2]}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_swallowed_stop_signal_stops_the_next_request(tmp_path):
    """An exception raised in `__del__` is printed by Python, and lost."""

    class Last:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    class Engine:
        def answers(self, prompts, most):
            return [[1]] * len(prompts)

    journal = Journal.beside(tmp_path / "out")
    before = signal.getsignal(signal.SIGTERM)
    with interruption.handle_signals():
        Last()
        with pytest.raises(KeyboardInterrupt):
            ResumableEngine(Engine(), journal, "base").answers([[1]], 4)
        assert ResumableEngine(Engine(), journal, "base").answers([[1]], 4) == [[1]]  # it is raised only once
        Last()
        journal.step("seconds", lambda: 1)  # the result is stored first
    assert signal.getsignal(signal.SIGTERM) is before
    assert ResumableEngine(Engine(), journal, "base").answers([[1]], 4) == [[1]]


def test_job_started_with_sigint_ignored_keeps_ignoring_it():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruption.handle_signals():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_full_disk_is_named_and_keeps_earlier_results(tmp_path, monkeypatch):
    journal = Journal.beside(tmp_path / "out")
    journal.step("a", lambda: 1)
    monkeypatch.setattr("orthogonalize.core.journal.write_after", cut_by_full_disk)
    kept = (
        r"out.partial-measured cannot be written: No space left on device; make room; finished measurements were kept"
    )
    with pytest.raises(OrthogonalizeError, match=kept), journal.kept():
        journal.step("b", lambda: 2)
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial-measured"]
    assert Journal.beside(tmp_path / "out").done == {"a": 1}
    fresh = Journal.beside(tmp_path / "other")
    with pytest.raises(OrthogonalizeError, match=r"device; make room$"), fresh.kept():  # this one has stored nothing
        fresh.step("b", lambda: 2)
    unlocked = Journal.beside(tmp_path / "out", needed=False)
    assert unlocked.step("b", lambda: 2) == 2
    with monkeypatch.context() as patch:  # the disk has room again: what could not be written before is written now
        patch.setattr("orthogonalize.core.journal.write_after", write_after)
        unlocked.step("c", lambda: 3)
        assert Journal.beside(tmp_path / "out").done == {"a": 1, "b": 2, "c": 3}
    monkeypatch.setattr("pathlib.Path.unlink", full_disk)
    unlocked.close()


def cut_by_full_disk(file, size, data):
    write_after(file, size, data[: len(data) // 2])
    full_disk()


def full_disk(*_arguments, **_named):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_truncated_journal_line_is_ignored(tmp_path):
    journal = Journal.beside(tmp_path / "out")
    journal.step("a", lambda: 1)
    journal.step("b", lambda: 2)
    with journal.file.open("a") as file:
        file.write('{"step": "c", "resu')
    resumed = Journal.beside(tmp_path / "out")
    assert resumed.done == {"a": 1, "b": 2}
    resumed.step("d", lambda: 4)
    assert Journal.beside(tmp_path / "out").done == {"a": 1, "b": 2, "d": 4}
    assert len(resumed.file.read_text().splitlines()) == 3


def test_journal_edited_by_hand_or_of_another_version_is_dropped(tmp_path, monkeypatch):
    """From the first line on that is not as it was written, with a note."""
    said: list[str] = []
    monkeypatch.setattr("orthogonalize.core.journal.note", said.append)
    for name, value in (("a", 1.5), ("b", [2]), ("c", {"d": None})):
        Journal(tmp_path / ".journal", "ours").put({name: value})
    written = (tmp_path / ".journal").read_bytes()
    assert list(Journal(tmp_path / ".journal", "ours").done) == ["a", "b", "c"]
    assert said == []
    for before, after in ((b"[2]", b"[3]"), (b'"b"', b'"e"'), (b'"result": [2]', b'"result": []')):
        (tmp_path / ".journal").write_bytes(written.replace(before, after))
        assert Journal(tmp_path / ".journal", "ours").done == {"a": 1.5}
        assert "dropped" in said.pop()
    (tmp_path / ".journal").write_bytes(written)
    monkeypatch.setattr("orthogonalize.core.journal.version", lambda _: "another")
    assert Journal(tmp_path / ".journal", "ours").done == {}
    assert "dropped" in said.pop()


def test_journal_cut_at_any_byte_keeps_its_whole_lines_alone(tmp_path):
    steps = {"a": 1.5, "b": [2], "c": {"d": None}}
    journal = Journal(tmp_path / ".journal", "ours")
    ends = {}
    for name, value in steps.items():
        journal.put({name: value})
        ends[name] = (tmp_path / ".journal").stat().st_size
    written = (tmp_path / ".journal").read_bytes()
    for size in range(len(written)):
        (tmp_path / ".journal").write_bytes(written[:size])
        assert Journal(tmp_path / ".journal", "ours").done == {n: v for n, v in steps.items() if ends[n] <= size}


def test_folder_state_covers_every_file_that_affects_results(model, tmp_path):
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        copied = tmp_path / name.partition(".")[0]
        shutil.copytree(model, copied)
        before = folder_state(copied)
        (copied / "report").mkdir()
        (copied / "orthogonalize.json").write_text("{}")
        assert folder_state(copied) == before
        os.utime(copied / name, ns=(1, 1))  # the content counts, not the time
        assert folder_state(copied) == before
        content, stat = (copied / name).read_bytes(), (copied / name).stat()
        swapped = {".json": (b"true", b"null")}.get(Path(name).suffix, (content[-4:], bytes(4)))
        (copied / name).write_bytes(content.replace(*swapped) if swapped[0] in content else content + b" ")
        os.utime(copied / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert folder_state(copied) != before, name


def test_results_of_an_untrusted_engine_are_discarded(model, edited, run, tmp_path, monkeypatch):
    """transformers stands in for vLLM: one engine whose weights are swapped, and which then differs."""
    monkeypatch.setattr(
        "orthogonalize.evals.setup.open_engine", lambda _, folder, tokenizer, *__: TransformersEngine(folder, tokenizer)
    )
    prints = iter("abcdefgh")
    monkeypatch.setattr(WeightSwap, "first_unswappable", lambda *_: None)
    monkeypatch.setattr(TransformersEngine, "fingerprint", lambda self: next(prints))
    settings = {"suites": ["refusal"], "max_new_tokens": 4}
    with pytest.raises(OrthogonalizeError, match=r"use --separate-engines$"):
        evaluate(edited, str(model), run, tmp_path / "out", **settings)
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    assert evaluate(edited, str(model), run, tmp_path / "out", separate_engines=True, **settings).base.refusal


def test_answers_are_kept_per_set(model, edited, run, data, tmp_path, monkeypatch):
    settings = {"engine": "hf", "max_new_tokens": 4, "data": data, "limit": 3}
    asked: list[int] = []
    answers = TransformersEngine.answers

    def counted(self, prompts, most):
        asked.append(len(prompts))
        return answers(self, prompts, most)

    monkeypatch.setattr(TransformersEngine, "answers", counted)
    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "choices", dies)
        with pytest.raises(OrthogonalizeError, match="died"):
            evaluate(edited, str(model), run, tmp_path / "out", suites=["refusal", "mmlu"], **settings)
    assert asked == [6]  # the base
    found = evaluate(edited, str(model), run, tmp_path / "out", suites=["behaviour", "orbench"], **settings)
    assert asked == [6, 3, 9]  # one more set for the base, all for the edited model
    whole = evaluate(edited, str(model), run, tmp_path / "whole", suites=["behaviour", "orbench"], **settings)
    assert found.model_dump() == whole.model_dump()


def test_swapped_base_is_not_reused_for_separate_engines(model, edited, run, tmp_path, monkeypatch):
    """transformers stands in for vLLM."""
    started: list[str] = []

    def start(_, folder, tokenizer, *__):
        started.append(folder.name)
        return TransformersEngine(folder, tokenizer)

    monkeypatch.setattr("orthogonalize.evals.setup.open_engine", start)
    settings = {"suites": ["refusal"], "max_new_tokens": 4}
    fingerprint = TransformersEngine.fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(WeightSwap, "first_unswappable", lambda *_: None)
        patch.setattr(WeightSwap, "restore", lambda _: pytest.fail("the second swap"))
        with pytest.raises(BaseException, match="the second swap"):
            evaluate(edited, str(model), run, tmp_path / "out", **settings)
    assert TransformersEngine.fingerprint is fingerprint
    evaluate(edited, str(model), run, tmp_path / "out", separate_engines=True, **settings)
    assert started == ["edited", "model", "edited"]


def test_models_that_cannot_be_swapped_get_separate_engines(model, edited, run, tmp_path, monkeypatch):
    """transformers stands in for vLLM, and ignores some of the new weights, as vLLM does with some experts."""
    started: list[str] = []
    notes: list[str] = []

    def start(_, folder, tokenizer, *__):
        started.append(folder.name)
        return TransformersEngine(folder, tokenizer)

    load = TransformersEngine.load
    monkeypatch.setattr("orthogonalize.evals.setup.open_engine", start)
    monkeypatch.setattr("orthogonalize.commands.evaluate.note", notes.append)
    settings = {"suites": ["refusal", "loss"], "max_new_tokens": 4}
    swapped = evaluate(edited, str(model), run, tmp_path / "swapped", **settings)
    assert started == ["edited"]
    monkeypatch.setattr(
        TransformersEngine, "load", lambda s, w: load(s, {n: m for n, m in w.items() if "down_proj" not in n})
    )
    apart = evaluate(edited, str(model), run, tmp_path / "apart", **settings)
    assert started == ["edited", "edited", "model", "edited"]
    assert "cannot swap weights in place (model.layers.0.mlp.down_proj.weight)" in notes[0]
    assert apart.model_dump() == swapped.model_dump()


def test_out_of_memory_is_a_one_line_error_and_loses_nothing(model, edited, run, tmp_path, monkeypatch):
    def full(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    settings = {"engine": "hf", "max_new_tokens": 8, "suites": ["refusal", "kl"]}
    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "likeliest", full)
        with pytest.raises(
            OrthogonalizeError, match=r"out of memory: CUDA out of memory.*kept: re-run the same command"
        ):
            evaluate(edited, str(model), run, tmp_path / "x", **settings)
    assert evaluate(edited, str(model), run, tmp_path / "x", **settings).edited.refusal is not None


def test_nan_log_probabilities_are_a_one_line_error(model, edited, run, tmp_path, monkeypatch):
    scores = TransformersEngine.scores

    def damaged(self, prompts, completions):
        found = scores(self, prompts, completions)
        return [Completion(math.nan, False) for _ in found] if "edited" in self.folder.name else found

    monkeypatch.setattr(TransformersEngine, "scores", damaged)
    with pytest.raises(OrthogonalizeError, match=r"edited/loss: the model's log-probabilities are NaN"):
        evaluate(edited, str(model), run, tmp_path / "report", suites=["loss"], engine="hf", max_new_tokens=4)


def test_answers_of_a_model_that_gives_nan_are_not_counted(model, edited, run, tmp_path, monkeypatch):
    """An engine turns NaN into tokens like any others, and an empty answer refuses nothing."""
    monkeypatch.setattr(
        TransformersEngine, "scores", lambda self, prompts, _: [Completion(math.nan, False)] * len(prompts)
    )
    with pytest.raises(OrthogonalizeError, match=r"base/answers: the model's log-probabilities are NaN"):
        evaluate(edited, str(model), run, tmp_path / "report", suites=["refusal"], engine="hf", max_new_tokens=4)
