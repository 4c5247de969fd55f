"""The package's templates, of which reports and cards are made."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from .tables import value


def templates() -> Environment:
    """The package's templates; HTML is escaped, a missing value is an error."""
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
