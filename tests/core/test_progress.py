"""Progress on a terminal and in a log: how much is done, at what rate, and how long the rest takes."""

from __future__ import annotations

import io
import re
import threading

import pytest
from rich.console import Console

from orthogonalize.core import progress


class Written(io.StringIO):
    """What a console wrote; `wait_for` waits until that has a text."""

    def __init__(self) -> None:
        super().__init__()
        self.more = threading.Condition()

    def write(self, text: str) -> int:
        with self.more:
            count = super().write(text)
            self.more.notify_all()
        return count

    def wait_for(self, text: str) -> None:
        with self.more:
            assert self.more.wait_for(lambda: text in self.getvalue(), timeout=60), self.getvalue()


@pytest.fixture
def written(monkeypatch, request):
    """What is shown on a terminal, or in a log that has a line as often as possible."""
    found = Written()
    terminal = getattr(request, "param", False)
    monkeypatch.setattr(progress, "console", Console(file=found, width=200, force_terminal=terminal))
    monkeypatch.setattr(progress, "EVERY", 0.01)
    progress.show()
    yield found
    progress.show(False)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min"), (200, "3 min 20 s"), (3600, "1 h"), (7_500, "2 h 5 min")],
)
def test_durations_are_in_words(seconds, text):
    assert progress.duration(seconds) == text


@pytest.mark.parametrize(
    ("done", "total", "seconds", "text"),
    [
        (0, 90, 5, ""),
        (30, 90, 60, "2 s each, 2 min left"),
        (300, 900, 60, "5 per s, 2 min left"),
        (30, None, 15, "2 per s"),
        (91, 90, 91, "1 per s, 0 s left"),
    ],
)
def test_time_left_is_that_of_the_rest_at_the_rate_so_far(done, total, seconds, text):
    assert progress.pace(done, total, seconds) == text


def test_log_has_lines_while_a_step_runs_and_one_at_the_end(written):
    with progress.track("scoring", 90, "layers") as advance:
        written.wait_for("scoring: 0 of 90 layers (0 s)\n")
        advance(30)
        written.wait_for("scoring: 30 of 90 layers (")
        written.wait_for(" left)\n")
    assert "\nscoring: 90 layers in " in written.getvalue()
    assert "\x1b" not in written.getvalue()


def test_log_of_bytes_is_in_megabytes(written):
    with progress.track("writing", 250_000_000, "bytes") as advance:
        advance(130_000_000)
        written.wait_for("writing: 130 of 250 MB (")


def test_log_of_a_failure_does_not_say_that_the_work_is_done(written):
    with pytest.raises(ValueError, match="stop"), progress.track("scoring", 90, "layers"):
        raise ValueError("stop")
    assert "90 layers in" not in written.getvalue()


@pytest.mark.parametrize("written", [True], indirect=True)
def test_terminal_has_one_line_per_bar(written, monkeypatch):
    """A bar that is broken over two lines cannot be read."""
    monkeypatch.setattr(progress.console, "width", 80)
    with progress.track("reading activations", 9000, "prompts") as advance:
        advance(3000)
        written.wait_for("left")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())
    assert all("reading activations" in line for line in re.split(r"[\r\n]+", plain) if line.strip())


@pytest.mark.parametrize("written", [True], indirect=True)
def test_terminal_has_a_bar_with_the_time_left(written):
    with progress.track("scoring", 90, "layers") as advance:
        advance(30)
        written.wait_for("left")
    assert "90/90" in written.getvalue()


@pytest.mark.parametrize("written", [False, True], indirect=True)
def test_notes_never_break_a_path(written, monkeypatch):
    monkeypatch.setattr(progress.console, "width", 20)
    path = "/some/where/far/away/from/here/and yet further/model-00001-of-00002.safetensors"
    progress.note(f"not copied: {path}")
    assert written.getvalue() == f"not copied: {path}\n"


def test_waiting_is_a_line_only_if_it_takes_long(written, monkeypatch):
    with progress.track("starting", None):
        written.wait_for("starting (0 s)\n")
    assert " in " not in written.getvalue()
    monkeypatch.setattr(progress, "BRIEF", 0.0)
    with progress.track("starting", None):
        pass
    assert written.getvalue().endswith("starting in 0 s\n")


def test_library_is_silent(written):
    progress.show(False)
    with progress.track("scoring", 90, "layers") as advance:
        advance(30)
    progress.note("anything")
    assert written.getvalue() == ""
