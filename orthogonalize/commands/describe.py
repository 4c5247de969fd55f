"""`describe`: draft the description of an architecture that has none."""

from __future__ import annotations

from pathlib import Path

from ..models.describe.draft import Draft, draft
from ..models.resolve import find_model


def describe(model: Path | str, revision: str | None = None) -> Draft:
    """Draft the description of `model`, a folder or a Hub id, whose architecture has none yet.

    Raises:
        OrthogonalizeError: as `draft` does, or there is no such model.
    """
    return draft(find_model(str(model), revision))
