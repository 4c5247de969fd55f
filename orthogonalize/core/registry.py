"""Registries: one table per extension point (edit methods, suites, judges, ...)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Protocol, TypeVar

from .errors import OrthogonalizeError

PLUGINS = "orthogonalize.plugins"


class Named(Protocol):
    """An object that a registry can hold: it has a name."""

    @property
    def name(self) -> str: ...


Entry = TypeVar("Entry", bound=Named)


class Registry(Mapping[str, Entry]):
    """Entries by name, in the order in which they were added, which is also their order in help texts and tables.

    `kind` is what messages call an entry ("edit method"). Entries must be cheap to import: the command line reads
    registries before it knows whether torch is needed.
    """

    def __init__(self, kind: str, entries: Iterable[Entry] = ()) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}
        for entry in entries:
            self.add(entry)

    def add_modules(self, package: str, modules: Iterable[str], attribute: str) -> None:
        """Add the object called `attribute` from each of `modules` in `package`."""
        for module in modules:
            self.add(getattr(import_module(f"{package}.{module}"), attribute))

    def add(self, entry: Entry) -> Entry:
        """Add an entry; plugins also call this.

        Raises:
            ValueError: the name is taken.
        """
        if entry.name in self._entries:
            raise ValueError(f"{self.kind} {entry.name!r} already exists")
        self._entries[entry.name] = entry
        return entry

    def remove(self, name: str) -> None:
        """Remove the entry called `name`."""
        del self._entries[name]

    def find(self, name: str) -> Entry:
        """The entry called `name`.

        Raises:
            OrthogonalizeError: there is no such entry.
        """
        if name not in self._entries:
            raise OrthogonalizeError(f"unknown {self.kind} {name!r}; available: {', '.join(self._entries)}")
        return self._entries[name]

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<{self.kind} registry: {', '.join(self._entries)}>"


def load_plugins() -> None:
    """Import the plugins that installed packages declare in the entry point group `orthogonalize.plugins`.

    A plugin adds its registry entries when it is imported.
    """
    for plugin in entry_points(group=PLUGINS):
        plugin.load()
