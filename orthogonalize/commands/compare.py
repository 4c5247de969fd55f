"""`compare`: set two reports of `eval` side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import OrthogonalizeError
from ..reports.comparison import comparison_document, comparison_rows, differences
from ..reports.schema import Report, load_report


@dataclass(frozen=True, repr=False)
class Comparison:
    """Two reports; `rows` are those of the table, and `unlike` what the two were not measured alike in."""

    first: Report
    second: Report

    @property
    def rows(self) -> list[tuple[str, ...]]:
        return comparison_rows(self.first, self.second)

    @property
    def unlike(self) -> list[str]:
        return differences(self.first, self.second)

    def document(self) -> dict[str, Any]:
        """The comparison as JSON: unrounded numbers by measure, under its dotted key."""
        return {
            "first": self.first.checkpoint,
            "second": self.second.checkpoint,
            "unlike": self.unlike,
            "measures": comparison_document(self.first, self.second),
        }

    def __repr__(self) -> str:
        return f"Comparison({self.first.checkpoint} and {self.second.checkpoint}: {len(self.rows)} measures)"


def compare(first: Path | str, second: Path | str) -> Comparison:
    """Set two reports of `eval` (folders, or their report.json) side by side.

    Refusals are compared prompt by prompt, with an interval and McNemar's test; other measures by their values.

    Raises:
        OrthogonalizeError: a report is missing or damaged, or the two have no measure in common.
    """
    found = Comparison(load_report(Path(first)), load_report(Path(second)))
    if not found.first.edited.flat().keys() & found.second.edited.flat().keys():
        raise OrthogonalizeError(f"{first} and {second} have no measure in common; run eval with the same --suite")
    return found
