"""The built wheel: every data file of the package is in it, and the entry points are."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

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
        "assert {'card.md.j2', 'report.html.j2'} <= set(templates().list_templates())\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, check=True, env={"PYTHONPATH": str(tmp_path)}
    )
