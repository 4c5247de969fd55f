"""Measure `python:FILE:function`: one's own function of a prompt and its answer."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import OrthogonalizeError, shown
from .base import AnswerMeasure, Opening, Shows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...core.journal import Journal
    from .base import Pair


def open_python(opening: Opening) -> Shows:
    """The function that `FILE:function` names; it takes a prompt and an answer, and returns True, False or None.

    Raises:
        OrthogonalizeError: the file or the function does not exist, or the file cannot be run.
    """
    rule = load_function(opening.argument)

    def shows(pairs: Sequence[Pair], _journal: Journal) -> list[bool | None]:
        return [_answer_of(rule, opening.argument, *pair) for pair in pairs]

    return shows


def check_argument(text: str) -> None:
    """Check that the file of `FILE:function` exists.

    Raises:
        OrthogonalizeError: it does not.
    """
    file = text.rpartition(":")[0]
    if not file or not Path(file).is_file():
        raise OrthogonalizeError(f"--measure python:FILE:function: no such file: {file or text}")


def load_function(text: str) -> Callable[[str, str], Any]:
    """The function that `FILE:function` names.

    Raises:
        OrthogonalizeError: as `open_python`.
    """
    check_argument(text)
    file, _, name = text.rpartition(":")
    path = Path(file)
    spec = spec_from_file_location(f"orthogonalize_measure_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise OrthogonalizeError(f"{file} is not a Python file (.py)")
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code can raise anything
        raise OrthogonalizeError(f"{file} cannot be run: {type(error).__name__}: {shown(error)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise OrthogonalizeError(f"{file} has no function {name!r}")
    return found  # type: ignore[no-any-return]


def _answer_of(rule: Callable[[str, str], Any], name: str, prompt: str, answer: str) -> bool | None:
    try:
        found = rule(prompt, answer)
    except Exception as error:
        raise OrthogonalizeError(f"{name} failed on an answer: {type(error).__name__}: {shown(error)}") from error
    if found is not None and not isinstance(found, bool):
        raise OrthogonalizeError(f"{name} returned {type(found).__name__}; it has to return True, False or None")
    return found


MEASURE = AnswerMeasure(
    "python",
    "answers for which your own function returns True",
    open_python,
    argument="FILE:function",
    own_code=True,
    check=check_argument,
)
