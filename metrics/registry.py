"""Named plug-ins: those of a package of ours, found by walking it, and those of others, found by entry point."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from evoprune.metrics.errors import UnknownName

T = TypeVar("T")


class Registry(Generic[T]):
    """A mapping from name to plug-in, filled on first use.

    Args:
        kind: what the plug-ins are called in messages, in the singular.
        package: the package whose modules register the built-in plug-ins when imported.
        extensible: whether other distributions may add to it.

    Attributes:
        group: the entry-point group through which a distribution adds its own, ``evoprune.<package's last name>``: each
            entry point names a module, or anything else whose import registers the plug-in. None if none may.
    """

    def __init__(self, kind: str, package: str, *, extensible: bool = True) -> None:
        self.kind = kind
        self.group = f"evoprune.{package.rpartition('.')[2]}" if extensible else None
        self._package = package
        self._entries: dict[str, T] = {}
        self._loaded = False

    def add(self, name: str, plugin: T) -> T:
        """Register `plugin` under `name`.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._entries[name] = plugin
        return plugin

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of `add`."""
        return lambda plugin: self.add(name, plugin)

    def __getitem__(self, name: str) -> T:
        self._load()
        try:
            return self._entries[name]
        except KeyError:
            raise UnknownName(self.kind, name, self._entries) from None

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._load()
        return len(self._entries)

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self._package)
        for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda found: found.name):
            importlib.import_module(f"{self._package}.{module.name}")
        for point in entry_points(group=self.group) if self.group is not None else ():
            point.load()
