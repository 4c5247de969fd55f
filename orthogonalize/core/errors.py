"""The one exception that a user is meant to see, and what running out of memory looks like."""

import re

# What libraries say of it; "an illegal memory access" is another matter.
EXHAUSTED = re.compile(r"out of memory|allocate memory|enough memory", re.IGNORECASE)


class OrthogonalizeError(Exception):
    """Something the user can mend: one line that names the thing and the way out.

    The command line prints it without a traceback and exits with status 1. Anything else that
    escapes is a defect of this package.
    """


class InPlaceError(OrthogonalizeError):
    """An engine cannot hold other weights in place of those that it started with."""


class NoNumberError(OrthogonalizeError):
    """A model whose log-probabilities are NaN: its weights are damaged, by an edit or before."""


def ran_out_of_memory(error: BaseException) -> str | None:
    """What to say where `error` means that memory ran out, of the machine or of a device; None where it does not."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and EXHAUSTED.search(str(error))):
        return f"memory ran out: {str(error).strip() or 'of this machine'}"
    return None


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
