"""The Hub's refusals and cut connections, as one line that says what to do."""

from __future__ import annotations

from typing import Any

from ...core.errors import OrthogonalizeError, first_line

TOKENS = "https://huggingface.co/settings/tokens"
STORAGE = ("storage", "quota")  # what the Hub's message names when an account is full


def status_of(error: Exception) -> int | None:
    """The HTTP status of the Hub's answer; None for errors without one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_cut(error: Exception) -> bool:
    """Whether the connection failed, or the server for a moment, so that trying again can help."""
    status = status_of(error)
    if status is not None:
        return status >= 500 and status != 507
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or "TransportError" in names or _is_of_xet(error)


def _is_of_xet(error: Exception) -> bool:
    """Whether the client for the Hub's chunked storage lost its connection, which it says in words only."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in ("connect", "timed out", "reset"))


def explain(error: Exception, repository: str) -> OrthogonalizeError:
    """The error that tells the user what the Hub's refusal means."""
    status, owner = status_of(error), repository.partition("/")[0]
    said = str(getattr(error, "server_message", None) or error).lower()
    if status == 507 or (status in (402, 403, 413) and any(word in said for word in STORAGE)):
        advice = f"{owner}'s storage on the Hub is full; delete something there, upload --recipe-only or use --public"
    elif status == 401:
        advice = f"the Hub does not accept the token; make one with write access at {TOKENS} and run `hf auth login`"
    elif status == 403:
        advice = f"the token may not write there; use one with write access to {owner} ({TOKENS})"
    elif status == 404:
        advice = "there is no such repository, or the token cannot see it; check the name, or leave out --create-pr"
    elif status == 409:
        advice = "somebody else changed it at the same time; run the command again"
    elif status == 413:
        advice = "a file is larger than the Hub takes; write smaller files with --shard, or upload --recipe-only"
    elif status == 429:
        advice = f"the Hub limits the rate of requests; wait {_wait(error)} and run the command again to resume"
    elif is_cut(error):
        advice = f"{first_line(error)}; run the command again to resume: what the Hub has is not sent again"
    else:
        advice = first_line(error)
    return OrthogonalizeError(f"uploading to {repository} failed: {advice}")


def _wait(error: Any) -> str:
    seconds = str(error.response.headers.get("Retry-After", ""))
    return f"{seconds} s" if seconds.isdecimal() else "a few minutes"
