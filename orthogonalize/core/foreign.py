"""Other libraries: those that only some commands need, and what they raise, as one line with the way out."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import OrthogonalizeError, first_line, ran_out_of_memory

# How libraries ask for a package in messages.
ASKED = re.compile(r"pip3? install (?:-U |--upgrade )?[`'\"]?([A-Za-z][\w.-]*)", re.IGNORECASE)

EXTRAS = {"matplotlib": "plots", "peft": "demo", "lm_eval": "tasks"}  # what installs a package


def has(package: str) -> bool:
    """Whether a package is installed; it is not imported."""
    return importlib.util.find_spec(package) is not None


def check_has(package: str, what: str) -> None:
    """Check that `what` can be done, which needs a package of an extra.

    Raises:
        OrthogonalizeError: the package is not installed.
    """
    if not has(package):
        way_out = f"run `pip install 'orthogonalize[{EXTRAS[package]}]'`"
        raise OrthogonalizeError(f"{what} needs {package}, which is not installed; {way_out}")


@contextmanager
def explained(failure: str, way_out: str = "") -> Iterator[None]:
    """A context in which whatever a library raises is an `OrthogonalizeError`: the failure, its reason, a way out.

    Files may be anybody's, so a library may raise anything, the panics of Rust ones included, which are no `Exception`.
    Our own errors, interrupts and running out of memory keep their own way.

    Args:
        failure: what could not be done with which thing, such as "transformers cannot load FOLDER".
        way_out: what to do instead; where a package is missing, its name comes before.
    """
    try:
        yield
    except OrthogonalizeError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if ran_out_of_memory(error):
            raise
        package = _missing_package(error)
        advice = [*([f"pip install {package}"] if package else []), *([way_out] if way_out else [])]
        end = f"; {', or '.join(advice)}" if advice else ""
        raise OrthogonalizeError(f"{failure}: {first_line(error)}{end}") from error


def _missing_package(error: BaseException) -> str | None:
    """The package that `error` says is missing, if it does."""
    if not isinstance(error, ImportError):
        return None
    asked = ASKED.search(str(error))
    if asked is not None:
        return asked[1].rstrip(".")
    return error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else None
