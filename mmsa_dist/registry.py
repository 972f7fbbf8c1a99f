"""Parts found by name: ours, a third party's by entry point, or any class by ``package.module:Class``."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from mmsa_dist.errors import ConfigError, MmsaError
from mmsa_dist.suggest import nearest

Part = TypeVar("Part")
OURS = __name__.partition(".")[0]


@contextmanager
def theirs(kind: str, name: str, cls: type, when: str) -> Iterator[None]:
    """Makes a sentence of what a third party's class raises; ours keeps its traceback, as it is ours to mend.

    Args:
        when: what was done with it, e.g. "when it was built".

    Raises:
        ConfigError: it raised something.
    """
    try:
        yield
    except MmsaError:
        raise
    except Exception as error:
        if cls.__module__.partition(".")[0] == OURS:
            raise
        raise ConfigError(f"{kind} {name!r} failed {when}: {_told(error)}; MMSA_DEBUG=1 shows where") from error


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class Registry(Generic[Part]):
    """Classes of one kind.

    A third party adds one with an entry point in the group that has our package's name, or names it
    ``package.module:Class`` where a name is asked for; nothing of ours is edited.
    """

    def __init__(self, kind: str, base: type[Part], package: str) -> None:
        """
        Args:
            kind: what an error message calls a part.
            base: the class that every part derives from.
            package: importing it registers our own parts; also the entry points' group.
        """
        self.kind = kind
        self.base = base
        self.package = package
        self._classes: dict[str, type[Part]] = {}

    def register(self, name: str) -> Callable[[type[Part]], type[Part]]:
        """A decorator that registers a class as `name`.

        Raises:
            ConfigError: another class has the name.
        """

        def decorate(cls: type[Part]) -> type[Part]:
            other = self._classes.setdefault(name, cls)
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ConfigError(
                    f"{self.kind} {name!r} is already {other.__module__}:{other.__qualname__}; choose another name"
                )
            self._classes[name] = cls
            return cls

        return decorate

    def names(self) -> list[str]:
        """Every part that `get` finds by a bare name."""
        importlib.import_module(self.package)
        return sorted({*self._classes, *(point.name for point in entry_points(group=self.package))})

    def get(self, name: str) -> type[Part]:
        """The class registered as `name`, or at ``package.module:Class``.

        Raises:
            ConfigError: there is none; names the nearest.
        """
        importlib.import_module(self.package)
        if name in self._classes:
            return self._classes[name]
        try:
            if ":" in name:
                module, _, attribute = name.partition(":")
                return self._checked(name, getattr(importlib.import_module(module), attribute))
            for point in entry_points(group=self.package):
                if point.name == name:
                    return self._checked(name, point.load())
        except MmsaError:
            raise
        except (Exception, SystemExit) as error:  # whatever a third party's module does when it is imported
            raise ConfigError(
                f"{self.kind} {name!r} cannot be imported: {_told(error)}; wanted package.module:Class"
            ) from error
        raise ConfigError(f"unknown {self.kind} {name!r}{nearest(name, self.names())}")

    def _checked(self, name: str, found: object) -> type[Part]:
        if not (isinstance(found, type) and issubclass(found, self.base)):
            wanted = f"{self.base.__module__}.{self.base.__qualname__}"
            raise ConfigError(f"{self.kind} {name!r} is {found!r}, wanted a subclass of {wanted}")
        return found
