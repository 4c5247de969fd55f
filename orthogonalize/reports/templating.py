"""The Jinja environment of the HTML report and the model card."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from .tables import value


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
    return environment
