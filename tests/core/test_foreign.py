"""What libraries raise becomes one line; interrupts, our own errors and running out of memory keep their own way."""

from __future__ import annotations

import sys

import pytest

from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.foreign import check_has, explained, has


class PanicException(BaseException):
    """As pyo3 raises it for a panic of a Rust library."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'torchao'", name="torchao.dtypes"), "pip install torchao, or do that"),
        (ImportError("GPTQ requires optimum (`pip install optimum`)"), "pip install optimum, or do that"),
        (ImportError("run `pip install -U bitsandbytes>=0.46`"), "pip install bitsandbytes, or do that"),
        (ImportError("cannot import name x"), "cannot import name x; do that"),
        (PanicException("no entry found for key"), "no entry found for key; do that"),
        (KeyError("weight_map"), "'weight_map'; do that"),
        (RecursionError(), "RecursionError; do that"),
        (Exception("first\nsecond"), "first; do that"),
    ],
)
def test_anything_that_a_library_raises_is_one_line_with_a_way_out(error, said):
    with pytest.raises(OrthogonalizeError) as found, explained("it fails", "do that"):
        raise error
    assert str(found.value) == f"it fails: {said}" or str(found.value).endswith(said)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(1), MemoryError(), RuntimeError("CUDA out of memory"), GeneratorExit()]
)
def test_interrupts_and_memory_keep_their_own_way(error):
    with pytest.raises(type(error)), explained("it fails"):
        raise error


def test_our_own_errors_are_left_as_they_are():
    with pytest.raises(OrthogonalizeError, match=r"^ours$"), explained("it fails"):
        raise OrthogonalizeError("ours")


def test_a_missing_package_is_named_with_the_extra_that_installs_it(monkeypatch):
    assert has("torch")
    check_has("matplotlib", "plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not has("matplotlib")
    with pytest.raises(OrthogonalizeError, match=r"plot needs matplotlib, .*pip install 'orthogonalize\[plots\]'"):
        check_has("matplotlib", "plot")
