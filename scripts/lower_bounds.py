"""Print the lowest versions that pyproject.toml allows, as constraints for pip.

    pip install -c <(python scripts/lower_bounds.py plots) -e '.[plots]'

Words name extras whose bounds count too.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def lower_bounds(extras: list[str]) -> list[str]:
    """`name==version` for every dependency and those of `extras`.

    Raises:
        ValueError: a dependency has no lower bound.
    """
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    found = []
    for each in [*project["dependencies"], *(d for name in extras for d in project["optional-dependencies"][name])]:
        match = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?[>=]=([\w.]+)", each)
        if match is None:
            raise ValueError(f"{each} has no lower bound")
        found.append(f"{match[1]}=={match[2]}")
    return found


if __name__ == "__main__":
    print("\n".join(lower_bounds(sys.argv[1:])))
