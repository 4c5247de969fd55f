"""The package's structure: which room may import which, and how large rooms, modules and functions may be.

The source is read with `ast`, so that nothing is imported and imports inside functions count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "orthogonalize"
MAX_MODULES, MAX_LINES, MAX_PARAMETERS = 15, 400, 19

_FOUNDATION = {"core", "data", "architectures", "checkpoints", "models"}
_SELECTION = _FOUNDATION | {"directions", "edits", "selection"}
_EVALS = _SELECTION | {"engines", "evals"}
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "data": {"core"},
    "architectures": {"core"},
    "checkpoints": {"core"},
    "models": _FOUNDATION - {"models"},
    "directions": _FOUNDATION,
    "edits": _FOUNDATION | {"directions"},
    "engines": _FOUNDATION,
    "selection": _FOUNDATION | {"directions", "edits", "engines"},
    "evals": _SELECTION | {"engines"},
    "reports": _EVALS,
    "commands": _EVALS | {"reports"},
}
FRONT = {"__init__", "__main__", "cli"}  # the modules above all rooms: they may import any, and no room imports them


def modules() -> Iterator[tuple[str, Path, ast.Module]]:
    """Every module: its room (a front module's own name, outside the rooms), path and syntax tree."""
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.relative_to(PACKAGE).parts[0]
        yield first.removesuffix(".py"), path, ast.parse(path.read_text("utf-8"))


def imported(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and room (or front module) of every import from within the package; the package itself is `__init__`."""
    here = [PACKAGE.name, *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(tree):
        targets: list[list[str]] = []
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = here[: len(here) - node.level + 1] if node.level else []
            module = [*parent, *(node.module.split(".") if node.module else [])]
            targets = [[*module, alias.name] for alias in node.names]
        for package, *rest in targets:
            if package == PACKAGE.name:
                yield node.lineno, rest[0] if rest and rest[0] in MAY_IMPORT.keys() | FRONT else "__init__"


def test_every_folder_is_a_known_room():
    assert {p.parent.name for p in PACKAGE.glob("*/__init__.py")} == MAY_IMPORT.keys()
    assert {p.stem for p in PACKAGE.glob("*.py")} == FRONT


def test_rooms_import_only_rooms_below_them():
    upward = [
        f"{path.relative_to(PACKAGE)}:{line}: {room} imports {other}"
        for room, path, tree in modules()
        if room not in FRONT
        for line, other in imported(path, tree)
        if other not in MAY_IMPORT[room] | {room}
    ]
    assert upward == []


def test_the_allowed_imports_have_no_cycle():
    for room, below in MAY_IMPORT.items():
        assert all(room not in MAY_IMPORT[other] for other in below), room
        assert all(MAY_IMPORT[other] <= below for other in below), f"{room} may import all that its rooms import"


def test_folders_hold_few_modules():
    counts: dict[str, int] = {}
    for _, path, _ in modules():
        folder = str(path.parent.relative_to(PACKAGE))
        counts[folder] = counts.get(folder, 0) + (path.stem != "__init__")
    assert {folder: n for folder, n in counts.items() if n > MAX_MODULES} == {}


def test_modules_are_short():
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text("utf-8").splitlines()) for _, path, _ in modules()}
    assert {name: n for name, n in lines.items() if n > MAX_LINES} == {}


def test_functions_take_few_parameters():
    many = {}
    for _, path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
                if count > MAX_PARAMETERS:
                    many[f"{path.relative_to(PACKAGE)}: {node.name}"] = count
    assert many == {}


def test_every_room_has_an_empty_init():
    """Otherwise importing one module of a room would import others, and `--help` would wait for torch."""
    folders = {path.parent for room, path, _ in modules() if room not in FRONT}
    assert [str(f.relative_to(PACKAGE)) for f in sorted(folders) if (f / "__init__.py").read_bytes()] == []
