"""The built wheel: every data file of the package is in it, and the entry points are."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

from orthogonalize.core.foreign import EXTRAS

ROOT = Path(__file__).parents[1]
UNPACKAGED = {"__pycache__"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of this checkout, built by setuptools from a copy, so that no build folder is left here."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    shutil.copytree(ROOT / "orthogonalize", copy / "orthogonalize", ignore=shutil.ignore_patterns(*UNPACKAGED))
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    (built,) = (copy / "dist").glob("*.whl")
    return built


def test_an_editable_install_is_a_path_that_type_checkers_read(wheel):
    """An import hook would hide the package, and its py.typed, from mypy."""
    copy = wheel.parents[1]
    code = "from setuptools import build_meta; build_meta.build_editable('editable')"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    (built,) = (copy / "editable").glob("*.whl")
    with ZipFile(built) as files:
        paths = [files.read(name).decode().strip() for name in files.namelist() if name.endswith(".pth")]
        assert not [name for name in files.namelist() if "finder" in name]
    assert paths == [str(copy)]
    assert (copy / "orthogonalize" / "py.typed").is_file()


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    ours = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "orthogonalize").rglob("*")
        if path.is_file() and not UNPACKAGED & set(path.parts)
    }
    assert ours <= set(ZipFile(wheel).namelist())


def test_the_source_distribution_builds_the_same_wheel(wheel):
    copy = wheel.parents[1]
    code = "from setuptools import build_meta; build_meta.build_sdist('source')"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    (built,) = (copy / "source").glob("*.tar.gz")
    with tarfile.open(built) as files:
        files.extractall(copy / "unpacked", filter="data")
    (unpacked,) = (copy / "unpacked").iterdir()
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=unpacked, check=True, capture_output=True)
    (again,) = (unpacked / "dist").glob("*.whl")
    with ZipFile(wheel) as first, ZipFile(again) as second:
        assert {each.filename: each.CRC for each in first.infolist()} == {e.filename: e.CRC for e in second.infolist()}


# What draws with Matplotlib; everything else works without it.
DRAWING = {"run_plots", "rate_plot", "pareto_plot", "paper"}


def test_nothing_but_figures_needs_a_package_of_an_extra():
    """Every module is imported while these packages cannot be."""
    paths = [path.relative_to(ROOT).with_suffix("").parts for path in sorted((ROOT / "orthogonalize").rglob("*.py"))]
    apart = DRAWING | {"__init__", "__main__", "template_worker", "forced_decoding"}  # the last is loaded by vLLM
    modules = [".".join(parts) for parts in paths if not apart & set(parts)]
    assert "orthogonalize.commands.extract" in modules
    code = (
        "import importlib, sys\n"
        "for name in ('matplotlib', 'peft', 'lm_eval', 'vllm'): sys.modules[name] = None\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *modules], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_dependency_has_a_lower_bound_and_a_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    bounds = runpy.run_path(str(ROOT / "scripts" / "lower_bounds.py"))["lower_bounds"](["plots", "demo", "tasks"])
    assert len(bounds) == len(project["dependencies"]) + 3
    lines = (ROOT / "pyproject.toml").read_text("utf-8").split("\ndependencies = [\n")[1].split("\n]")[0].splitlines()
    assert [line for line in lines if not re.fullmatch(r'    "[\w.>=-]+", +# \S.*', line)] == []
    assert set(EXTRAS.values()) <= set(project["optional-dependencies"])


def test_the_wheel_has_the_command(wheel):
    with ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith("entry_points.txt"))
        assert "orthogonalize = orthogonalize.cli:main" in files.read(name).decode()


def test_the_installed_wheel_finds_its_data(wheel, tmp_path):
    """Unpacked elsewhere: templates, judges' forms, planted prompts and architectures load from there."""
    ZipFile(wheel).extractall(tmp_path)
    code = (
        "import orthogonalize, sys\n"
        "from orthogonalize.architectures.schema import families\n"
        "from orthogonalize.data.prompts import concept, load_prompts\n"
        "from orthogonalize.evals.judges.registry import JUDGES\n"
        "from orthogonalize.evals.suites.other_prompts import other_prompts\n"
        "from orthogonalize.models.demo_model import adapter_folder\n"
        "from orthogonalize.reports.templating import templates\n"
        "assert orthogonalize.__file__.startswith(sys.argv[1]), orthogonalize.__file__\n"
        "named = concept('cooking')\n"
        "assert len(load_prompts(named.positive, 'positive')) > 100\n"
        "assert len(other_prompts()) == 64\n"
        "assert 'llama' in families() and 'wildguard' in JUDGES\n"
        "assert (adapter_folder() / 'adapter_model.safetensors').is_file()\n"
        "names = {'card.md.j2', 'report.html.j2', 'sweep.html.j2', 'page.css', 'charts.js'}\n"
        "assert names <= set(templates().list_templates())\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, check=True, env={"PYTHONPATH": str(tmp_path)}
    )
