"""Errors that users see, and detection of out-of-memory errors."""

import re

LONGEST = 400  # characters of a message
CREDENTIALS = re.compile(r"//[^/\s@]+@")  # a name and a password in an address
# Matches the messages of the libraries, but not "an illegal memory access".
OUT_OF_MEMORY = re.compile(r"out of memory|allocate memory|enough memory", re.IGNORECASE)


class OrthogonalizeError(Exception):
    """An error that the user can fix: one line that names the cause and a remedy.

    Messages quote files and names that may be anybody's, so what is not printable is made visible, and of what is
    too long the middle is left out: the beginning names the cause, the end the remedy. The command line prints the
    message without a traceback and exits with status 1. Any other exception is a bug in this package.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_without_middle(CREDENTIALS.sub("//***@", " ".join(message.split()))))


class InPlaceError(OrthogonalizeError):
    """The engine cannot swap the weights that it started with for others."""


class UnansweredError(OrthogonalizeError):
    """An edit depends on how a server runs the model, which neither a description nor an experiment says.

    Args:
        what: what is not known.
        instead: the ways out.
        reason: why it could not be tried, if it could not.
    """

    def __init__(self, what: str, instead: str, reason: str = "") -> None:
        self.what, self.instead = what, instead
        super().__init__(f"{what} is not known{f' ({reason})' if reason else ''}; {instead}")


class NoNumberError(OrthogonalizeError):
    """The model's log-probabilities are NaN: its weights are damaged, by an edit or originally."""


def ran_out_of_memory(error: BaseException) -> str | None:
    """The message for an `error` that means out of memory, on the host or a device; None for any other error."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))):
        return f"out of memory: {str(error).strip() or 'the host has no memory left'}"
    return None


def _without_middle(line: str) -> str:
    start, half = visible(line[: LONGEST + 1]), LONGEST // 2
    return start if len(start) <= LONGEST else f"{start[:half]}…{visible(line[-half:])[1 - half :]}"


def visible(text: str) -> str:
    """`text` with its control characters, line ends and unpaired surrogates as they are written in Python."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(text: object, most: int = 200) -> str:
    """Text from a file for a message: one line, shortened, control characters and unpaired surrogates visible.

    Names and passwords in addresses are left out.
    """
    whole = CREDENTIALS.sub("//***@", str(text))
    start = visible(whole[: most + 1])
    return start if len(whole) <= most and len(start) <= 2 * most else f"{start[:most]}…"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message (see `shown`), or the name of its class if the message is empty.

    A line that ends with a colon says nothing without what it announces, which is added.
    """
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):
        return shown(" ".join(lines), 400)
    return shown(lines[0], 400) if lines else type(error).__name__
