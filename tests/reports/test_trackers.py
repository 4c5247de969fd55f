"""Trackers get the numbers of extract, eval and sweep, and nothing that is private."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from click.testing import CliRunner
from helpers.command_line import UNTRIED

from orthogonalize import load_report, load_run, load_sweep
from orthogonalize.cli import main
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.reports.trackers.base import TrackedRun, TrackerEntry
from orthogonalize.reports.trackers.metrics import track_result
from orthogonalize.reports.trackers.registry import TRACKERS

RUN_SETTINGS = UNTRIED
SHORT = ("--engine", "hf", "--max-new-tokens", "4", "--limit", "3", "--suite", "refusal,loss")


class Recorder:
    def __init__(self, run: TrackedRun) -> None:
        self.run, self.steps, self.closed = run, {}, False

    def log(self, metrics, step) -> None:
        assert not self.closed
        self.steps[step] = dict(metrics)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def recorded():
    """What a tracker called recorder is given."""
    runs: list[Recorder] = []

    def begin(run: TrackedRun) -> Recorder:
        runs.append(Recorder(run))
        return runs[-1]

    TRACKERS.add(TrackerEntry("recorder", "this test", "json", "nothing to install", begin))
    yield runs
    TRACKERS.remove("recorder")
    assert all(each.closed for each in runs)


def done(*words) -> None:
    result = CliRunner().invoke(main, ["--quiet", *map(str, words)])
    assert result.exit_code == 0, result.output


def test_eval_and_sweep_give_the_measures_of_their_files(model, edited, run, recorded, tmp_path):
    done("eval", edited, "--base", model, "--run", run, "--out", tmp_path / "report", *SHORT, "--track", "recorder")
    words = ("--methods", "ablate", "--scopes", "one,all")
    done("sweep", model, "--run", run, "--out", tmp_path / "sweep", *words, *SHORT, "--track", "recorder")
    evaluated, swept = recorded
    report, sweep = load_report(tmp_path / "report"), load_sweep(tmp_path / "sweep")
    expected = {f"base/{key}": measure.value for key, measure in report.base.flat().items()}
    expected |= {f"edited/{key}": measure.value for key, measure in report.edited.flat().items()}
    assert evaluated.steps == {0: expected}
    assert "edited/refusal.target" in expected
    rows = [sweep.base, *(row.measures for row in sweep.variants)]
    assert swept.steps == {
        step: {f"measure/{key}": measure.value for key, measure in measures.flat().items()}
        for step, measures in enumerate(rows)
    }
    assert swept.run.facts["step 2"] == sweep.variants[1].name
    assert (evaluated.run.job, evaluated.run.name, swept.run.name) == ("eval", "report", "sweep")


def test_extract_gives_its_best_directions(run, recorded, tmp_path):
    found = load_run(run)
    track_result("recorder", found, run)
    (tracked,) = recorded
    best = next(c for c in found.candidates if c.finder == "dim")
    assert tracked.steps[0]["best/dim/bypass"] == best.bypass
    assert tracked.steps[0]["best/dim/kl"] == best.kl


def test_no_path_and_no_prompt_is_given(model, edited, run, recorded, tmp_path):
    done("eval", edited, "--base", model, "--run", run, "--out", tmp_path / "report", *SHORT, "--track", "recorder")
    track_result("recorder", load_run(run), run)
    given = json.dumps([[each.run.facts, each.run.job, each.run.name, each.steps] for each in recorded])
    assert str(tmp_path) not in given
    assert str(model.parent) not in given
    assert not any(text in given for text in load_run(run).texts("positive", "test"))
    assert recorded[0].run.facts["model"] == model.name


def test_tensorboard_reads_back_what_was_given(run, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    found = load_run(run)
    track_result("tensorboard", found, tmp_path / "my-run")
    (folder,) = (tmp_path / "tensorboard").iterdir()
    assert folder.name == "extract-my-run"
    read = events.EventAccumulator(str(folder))
    read.Reload()
    best = next(c for c in found.candidates if c.finder == "dim")
    (scalar,) = read.Scalars("best/dim/bypass")
    assert (scalar.step, scalar.value) == (0, pytest.approx(best.bypass))
    (facts,) = read.Tensors("facts/text_summary")[0].tensor_proto.string_val
    assert f'"model": "{found.info.model.rpartition("/")[2]}"' in facts.decode()


def test_a_tracker_that_fails_is_one_line(run, recorded, monkeypatch):
    monkeypatch.setattr(Recorder, "log", lambda *_: 1 / 0)
    with pytest.raises(
        OrthogonalizeError, match="is complete, but recorder did not take its numbers: division by zero"
    ):
        track_result("recorder", load_run(run), run)


@pytest.fixture
def module(monkeypatch):
    """A module of some name that notes what its functions are called with."""

    def make(name: str):
        calls: list[tuple] = []
        made = ModuleType(name)
        made.__spec__ = SimpleNamespace(name=name)
        log = lambda metrics, step: calls.append(("log", metrics, step))  # noqa: E731
        made.init = lambda **options: (
            calls.append(("init", options)) or SimpleNamespace(log=log, finish=lambda: calls.append(("finish",)))
        )
        made.log, made.finish = log, lambda: calls.append(("finish",))
        made.Settings = lambda **options: options
        monkeypatch.setitem(sys.modules, name, made)
        return calls

    return make


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_are_called_as_they_document_it(name, module, run, tmp_path):
    calls = module(name)
    track_result(name, load_run(run), tmp_path / "my-run")
    (begin, options), (log, metrics, step), end = calls
    assert (begin, log, end, step) == ("init", "log", ("finish",), 0)
    assert options["project"] == "orthogonalize"
    assert options["config"]["finders"] == "dim, inlp, leace"
    assert set(map(type, metrics.values())) == {float}


def test_wandb_is_told_to_send_nothing_of_its_own(module, run, tmp_path):
    calls = module("wandb")
    track_result("wandb", load_run(run), tmp_path / "my-run")
    settings = calls[0][1]["settings"]
    assert settings["console"] == "off"
    assert all(settings[name] for name in ("disable_git", "disable_code", "x_disable_meta", "x_disable_machine_info"))
    assert not any(settings[name] for name in ("save_code", "x_save_requirements", "host", "username", "program"))


@pytest.mark.parametrize("name", ["eval", "sweep", "extract"])
def test_a_tracker_that_is_not_there_is_told_before_anything_runs(name, monkeypatch, tmp_path):
    monkeypatch.setattr("orthogonalize.reports.trackers.registry.importlib.util.find_spec", lambda _: None)
    result = CliRunner().invoke(main, ["--quiet", name, "some/model", "--out", str(tmp_path / "o"), "--track", "wandb"])
    assert result.exit_code == 1
    assert "--track wandb needs wandb, which is not installed; run `pip install wandb`" in result.output


@pytest.mark.parametrize(
    "words", ["extract a/b --out o", "eval . --base a/b --run . --out o", "sweep a/b --run . --out o"]
)
def test_trackers_are_off_by_default(words, monkeypatch):
    seen: dict = {}
    monkeypatch.setattr("orthogonalize.commands.options.existing.check_finished_run", lambda _: None)
    monkeypatch.setattr(main.commands[words.split()[0]], "callback", lambda **options: seen.update(options))
    done(*words.split())
    assert seen["track"] is None
