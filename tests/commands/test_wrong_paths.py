"""Every path that a command takes is looked at before torch is loaded, which takes seconds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from orthogonalize.cli import main
from orthogonalize.commands.options import existing
from orthogonalize.commands.options.existing import Named, NewFolder

SLOW = {"torch", "transformers", "vllm"}
# What options and arguments that take a path are called, or say that they take.
PATHS = re.compile(
    r"FILE|DIR|MODEL|CHECKPOINT|ADAPTER|FOLDER|REPORT|SWEEP|^P$|folder|checkpoint|\bfile\b|^--?out$|--run$"
)
NO_PATHS = {"--endpoint", "--cache"}  # an address, and a name on the Hub
INSIDE = {"--prompts": "mine={}", "--measure": "python:{}:rule", "--judge": "wildguard={}"}  # paths within a value
RUN = """
import contextlib, io, json, runpy, sys
found = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["orthogonalize", *words]
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
        with contextlib.suppress(SystemExit):
            runpy.run_module("orthogonalize", run_name="__main__", alter_sys=True)
    found.append([said.getvalue(), sorted(sys.modules)])
print(json.dumps(found))
"""


def parameters() -> Iterator[tuple[str, click.Parameter]]:
    for name, command in main.commands.items():
        for parameter in command.params:
            yield name, parameter


def said_to_be_a_path(parameter: click.Parameter) -> bool:
    if parameter.opts[0] in NO_PATHS or getattr(parameter, "is_flag", False) or parameter.type.name == "integer":
        return False
    words = [parameter.opts[0], parameter.metavar or "", parameter.human_readable_name]
    return any(PATHS.search(word) for word in words)


def looked_at(parameter: click.Parameter) -> bool:
    return isinstance(parameter.type, Named | NewFolder) or parameter.opts[0] in INSIDE


@pytest.fixture
def right(tmp_path) -> dict[object, str]:
    """Something that exists for every type."""
    for file in ("run/run.json", "adapter/adapter_config.json", "report/report.json", "lines.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    at = {
        "RUN_FOLDER": "run",
        "RUN_TO_MAKE": "new",
        "ADAPTER": "adapter",
        "REPORT": "report",
        "FILE": "lines.txt",
        "NEW_FILE": "f.pdf",
    }
    kinds = {each: name for name, each in vars(existing).items() if isinstance(each, Named)}
    found: dict[object, str] = {each: str(tmp_path / at.get(name, "run")) for each, name in kinds.items()}
    return found | {existing.REPOSITORY: "me/model", NewFolder: str(tmp_path / "new")}


def words_of(command: click.Command, wrong: click.Parameter, value: str, right: dict[object, str]) -> list[str]:
    """The command with what it requires, and `value` for the parameter `wrong`."""
    words = [str(command.name)]
    for each in command.params:
        if each is wrong or each.required:
            given = value if each is wrong else right[each.type if each.type in right else type(each.type)]
            words += [each.opts[0], given] if isinstance(each, click.Option) else [given]
    return words


def test_every_parameter_that_takes_a_path_is_looked_at():
    unseen = [(name, p.opts[0]) for name, p in parameters() if said_to_be_a_path(p) and not looked_at(p)]
    assert unseen == []
    assert not [(name, p.opts[0]) for name, p in parameters() if isinstance(p.type, click.Path)]


def test_wrong_paths_are_refused_before_torch_is_loaded(right, tmp_path):
    """An input that is not there, and an output below a file."""
    cases = []
    for name, parameter in parameters():
        if not looked_at(parameter):
            continue
        makes = isinstance(parameter.type, NewFolder) or parameter.type in (existing.RUN_TO_MAKE, existing.NEW_FILE)
        wrong = str(tmp_path / "lines.txt" / "below" if makes else tmp_path / "no" / "such.txt")
        value = INSIDE.get(parameter.opts[0], "{}").format(wrong)
        cases.append((name, parameter.opts[0], words_of(main.commands[name], parameter, value, right)))
    assert {name for name, *_ in cases} == main.commands.keys() - {"doctor"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([words for *_, words in cases])],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (name, option, words), (said, loaded) in zip(cases, json.loads(done.stdout), strict=True):
        assert said.startswith("error: "), (name, option, said)
        assert "such.txt" in said or "lines.txt" in said, (name, option, said)
        assert not SLOW & set(loaded), (name, option)
        assert said.count("\n") == 1, words
