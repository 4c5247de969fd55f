"""Compiled functions where numba can keep them, and where it cannot."""

from __future__ import annotations

import numpy as np
import pytest
from numba.core import caching, config

from orthogonalize.core.compiled import compiled


def twice(x):
    return 2 * x


def test_a_package_and_home_that_are_read_only_are_no_error(monkeypatch):
    """numba then finds no place for what it compiles, and raises where the function is defined."""
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    function = compiled(nogil=True)(twice)
    assert function(3) == 6
    assert not function.stats.cache_path


def test_what_is_compiled_is_kept_where_it_can_be():
    assert compiled()(twice).stats.cache_path


def test_other_errors_of_numba_are_not_hidden(monkeypatch):
    def refuses(**_options):
        raise RuntimeError("no such processor")

    monkeypatch.setattr("orthogonalize.core.compiled.njit", refuses)
    with pytest.raises(RuntimeError, match="no such processor"):
        compiled()(twice)


@pytest.mark.skipif(not config.BOUNDSCHECK, reason="only `make prove` compiles so")
def test_every_index_is_checked():
    """Otherwise the second run of `make prove` would show nothing."""

    def second(x):
        return x[1]

    with pytest.raises(IndexError):
        compiled(nogil=True)(second)(np.zeros(1))
