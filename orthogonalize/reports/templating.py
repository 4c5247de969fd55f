"""The Jinja environment of the HTML report and the model card."""

from __future__ import annotations

import re

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..core.errors import shown
from .tables import value

# What Markdown or HTML could read as markup. An underscore inside a word is text.
MARKUP = re.compile(r"[\\`*\[\]<>|~&]|(?<![^\W_])_|_(?![^\W_])|(?<=:)//|^(?=[#+-])")


def escape_markdown(text: object) -> str:
    """Text as one line of Markdown that shows it and nothing else."""
    return MARKUP.sub(lambda found: "\\" + found[0], shown(text, 1000))


def templates() -> Environment:
    """The Jinja environment: HTML templates are escaped, and an undefined variable is an error."""
    environment = Environment(
        loader=PackageLoader("orthogonalize.reports"),
        autoescape=lambda name: bool(name and name.endswith(".html.j2")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda x: f"{100 * x:.1f}%"
    environment.filters["measure"] = value
    environment.filters["markdown"] = escape_markdown
    environment.filters["code"] = lambda x: shown(str(x).replace("`", "'"), 1000)
    return environment
