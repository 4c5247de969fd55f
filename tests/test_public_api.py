"""The public API: what `orthogonalize` exports, and that importing it or asking for `--help` does not load torch."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import orthogonalize
from orthogonalize.cli import main
from orthogonalize.core.registry import Registry

COMMANDS = tuple(main.commands)
SLOW = {"torch", "transformers", "vllm"}

ORDERED = """
import importlib, json, sys
modules, names = json.loads(sys.argv[1])
for module in modules:
    importlib.import_module(module)
import orthogonalize
found = {name: getattr(orthogonalize, name) for name in names}
print(json.dumps({name: [type(it).__name__, it.__module__, getattr(it, "__qualname__", repr(it))]
                  for name, it in found.items()}))
"""

HELP = """
import contextlib, io, json, runpy, sys
loaded = {}
for command in json.loads(sys.argv[1]):
    sys.argv = ["orthogonalize", *command, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
        runpy.run_module("orthogonalize", run_name="__main__", alter_sys=True)
    assert page.getvalue().startswith("Usage:"), command
    loaded[" ".join(command)] = sorted(sys.modules)
print(json.dumps(loaded))
"""


REFUSED = """
import contextlib, io, json, runpy, sys
loaded = {}
for command in json.loads(sys.argv[1]):
    sys.argv = ["orthogonalize", *command.split()]
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
        runpy.run_module("orthogonalize", run_name="__main__", alter_sys=True)
    loaded[command] = [said.getvalue(), sorted(sys.modules)]
print(json.dumps(loaded))
"""
MISSPELT = {
    "extract nowhere --concept lists --out run": "no such model: 'nowhere'",
    "extract . --positive nowhere.txt --negative nowhere.txt --out run": "no such prompt file: nowhere.txt",
    "extract . --positive nowhere --negative nowhere --out run": "prompt source 'nowhere' is neither",
    "edit nowhere --method ablate --out edited": "no such model: 'nowhere'",
    "edit . --run nowhere --out edited": "nowhere is not a run folder",
    "edit . --direction nowhere.pt --method ablate --out edited": "no such file: nowhere.pt",
    "eval . --base nowhere --run . --out report": "no such model: 'nowhere'",
    "eval . --base . --run nowhere --out report": "nowhere is not a run folder",
    "chat nowhere": "no such model folder: nowhere",
    "verify nowhere": "no such model folder: nowhere",
    "push nowhere me/model": "no such model folder: nowhere",
    "merge nowhere --out merged": "nowhere is not an adapter folder",
    "sweep . --run nowhere --out sweep": "nowhere is not a run folder",
    "rank nowhere": "nowhere is not a run folder",
    "judge nowhere.json": "no such file: nowhere.json",
    "compare nowhere nowhere": "no report at nowhere",
    "plot nowhere --out f.pdf": "no such file: nowhere",
    "describe nowhere": "no such model: 'nowhere'",
}


def python(code: str, argument: object):
    """The JSON that `code` prints in a new process, given `argument`."""
    words = [sys.executable, "-c", code, json.dumps(argument)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(orthogonalize.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_exports_are_listed_once_and_by_dir():
    assert len(set(orthogonalize.__all__)) == len(orthogonalize.__all__)
    assert set(orthogonalize.__all__) <= set(dir(orthogonalize))


def test_exports_have_no_name_of_a_submodule():
    """Importing a submodule sets an attribute of its name on the package, which would hide the export."""
    folder = Path(orthogonalize.__file__).parent
    submodules = {p.stem for p in folder.glob("*.py")} | {p.parent.name for p in folder.glob("*/__init__.py")}
    assert not submodules & set(orthogonalize.__all__)


def test_unknown_names_are_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        _ = orthogonalize.nonesuch


@pytest.mark.parametrize("name", orthogonalize.__all__)
def test_exports_resolve_to_the_same_object_twice(name):
    first = getattr(orthogonalize, name)
    assert not inspect.ismodule(first)
    assert getattr(orthogonalize, name) is first
    if isinstance(first, Registry):
        assert len(first) > 0
        assert first.kind in repr(first)
    else:
        assert getattr(sys.modules[first.__module__], first.__name__) is first


@pytest.mark.parametrize("order", ["reversed", "modules first"])
def test_exports_do_not_depend_on_the_order_of_imports(order):
    found = {name: getattr(orthogonalize, name) for name in orthogonalize.__all__}
    expected = {
        name: [type(it).__name__, it.__module__, getattr(it, "__qualname__", repr(it))] for name, it in found.items()
    }
    modules = sorted({it.__module__ for it in found.values()}) if order == "modules first" else []
    assert python(ORDERED, [modules, list(reversed(orthogonalize.__all__))]) == expected


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_a_help_page(command):
    result = CliRunner().invoke(main, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_help_pages_do_not_load_torch():
    loaded = python(HELP, [[], *([command] for command in COMMANDS)])
    assert loaded.keys() == {"", *COMMANDS}
    assert {command for command, found in loaded.items() if SLOW & set(found)} == set()


def test_misspelt_paths_are_refused_before_torch_is_loaded():
    refused = python(REFUSED, list(MISSPELT))
    assert {command.split()[0] for command in MISSPELT} == {*COMMANDS} - {"demo", "doctor"}
    for command, expected in MISSPELT.items():
        said, loaded = refused[command]
        assert said.startswith(f"error: {expected}"), command
        assert not SLOW & set(loaded), command


def test_importing_the_package_does_not_load_torch():
    code = "import json, sys; import orthogonalize; dir(orthogonalize); print(json.dumps(sorted(sys.modules)))"
    assert not SLOW & set(python(code, None))
