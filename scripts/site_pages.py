"""Pages of the documentation's site that are made when it is built, as a hook of MkDocs (see mkdocs.yml).

The README and its neighbours are pages, as are the examples, every command's `--help` and the public API. Links are
written for the repository; here they are turned to the site's pages.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
TOP = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CITATION.cff": "citation.md",
    "LICENSE": "licence.md",
    "examples": "examples.md",
}


def slug(heading: str, separator: str) -> str:
    """The anchor of a heading as hosts of repositories make it, so that links hold in both places."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def _fenced(text: str, language: str = "text") -> str:
    return f"````{language}\n{text.rstrip()}\n````\n"


def _commands() -> str:
    """Every command's own help."""
    from orthogonalize.cli import main

    parts = ["# Commands\n\nWhat every command says of itself with `--help`.\n"]
    for name in ("", *main.commands):
        said = CliRunner().invoke(main, [*([name] if name else []), "--help"], prog_name="orthogonalize").output
        parts.append(f"## orthogonalize {name}".rstrip() + f"\n\n{_fenced(said)}")
    return "\n".join(parts)


def _python() -> str:
    """The public names: functions of commands and others, classes, and registries."""
    import orthogonalize

    groups: dict[str, list[str]] = {"Functions": [], "Classes": [], "Registries": []}
    for name in orthogonalize.__all__:
        group = "Registries" if name.isupper() else "Classes" if name[0].isupper() else "Functions"
        groups[group].append(name)
    parts = ["# Python\n\nEverything is imported from `orthogonalize`; whatever is below it may move.\n"]
    for title, names in groups.items():
        parts += [f"## {title}\n", *(f"::: orthogonalize.{name}\n" for name in names)]
    return "\n".join(parts)


def _examples() -> str:
    files = sorted((ROOT / "examples").glob("*.py"))
    return "# Examples\n\n" + "\n".join(
        f"## {file.name}\n\n{_fenced(file.read_text('utf-8'), 'python')}" for file in files
    )


def _top(name: str) -> Callable[[], str]:
    text = (ROOT / name).read_text("utf-8")
    title = {"CITATION.cff": "Citation", "LICENSE": "Licence"}.get(name)
    return lambda: text if title is None else f"# {title}\n\n{_fenced(text)}"


PAGES: dict[str, Callable[[], str]] = {
    **{page: _top(name) for name, page in TOP.items() if name != "examples"},
    "examples.md": _examples,
    "commands.md": _commands,
    "python.md": _python,
}


def on_config(config: Any) -> Any:
    """Anchors as in the repository."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made."""
    for page, content in PAGES.items():
        files.append(File.generated(config, page, content=content()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository to pages of the site."""
    from_top = page.file.src_uri in TOP.values()

    def turned(found: re.Match[str]) -> str:
        path, anchor = found[1], found[2] or ""
        path = path.removeprefix("docs/") if from_top else path.removeprefix("../")
        return f"]({TOP.get(path.rstrip('/'), path)}{anchor})"

    return re.sub(r"\]\((?![a-z]+:)([^)#\s]+)(#[^)\s]*)?\)", turned, markdown)
