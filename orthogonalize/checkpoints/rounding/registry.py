"""Registry of rounding schemes: how the numbers of an edited tensor are rounded to its stored format (`--rounding`).

To add a scheme, write its implementation (see `RoundingScheme.load`) and add one entry here, or in a plugin.
"""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from ...core.registry import Registry

if TYPE_CHECKING:
    from .base import Implementation

DEFAULT_ROUNDING = "cancelling"


@dataclass(frozen=True)
class RoundingScheme:
    """A way of rounding: its name (also in recipes), what it does in one line, and where its implementation is.

    `implementation` is `module:function`. It is imported on first use, because the command line reads this table
    and must not wait for torch and numba.
    """

    name: str
    summary: str
    implementation: str

    def load(self) -> Implementation:
        """The function that takes an edit of vectors (u, v, s) and a dtype, and returns the edit with its rounding.

        See `base.Implementation` and `base.VectorKernel`. The result must depend on nothing but the tensor, so that
        a recipe gives the same bytes again: not on threads, on how a tensor is cut, or on an unseeded generator.
        """
        found: Implementation = resolve_name(self.implementation)
        return found


ROUNDING_SCHEMES = Registry(
    "rounding scheme",
    [
        RoundingScheme(
            "cancelling",
            "rounding errors cancel along the edited directions, which keeps the edit",
            "orthogonalize.checkpoints.rounding.vector_edit:cancelling",
        ),
        RoundingScheme(
            "nearest",
            "each number to the nearest one that the format can hold",
            "orthogonalize.checkpoints.rounding.vector_edit:nearest",
        ),
    ],
)
