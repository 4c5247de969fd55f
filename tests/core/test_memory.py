"""What memory is left: the machine's, or that of a container with a limit."""

from __future__ import annotations

import os

import pytest

from orthogonalize.core import memory
from orthogonalize.core.memory import available_memory


def test_available_memory_is_at_most_the_machine_s():
    assert 0 < available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(("machine", "group", "expected"), [(8, 2, 2), (3, 5, 3), (3, None, 3), (None, 2, 2)])
def test_the_smaller_limit_counts(machine, group, expected, monkeypatch):
    monkeypatch.setattr(memory, "_free_on_machine", lambda: machine)
    monkeypatch.setattr(memory, "_left_in_group", lambda: group)
    assert available_memory() == expected


def test_an_unknown_system_is_taken_to_have_some(monkeypatch):
    monkeypatch.setattr(memory, "_free_on_machine", lambda: None)
    monkeypatch.setattr(memory, "_left_in_group", lambda: None)
    assert available_memory() == memory.UNKNOWN
