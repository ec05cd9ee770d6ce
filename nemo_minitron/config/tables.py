"""Tables of the names that a setting can have: formats, losses and the like. An installed package can add entries.

The tables are declared here, since the configuration needs their names; the entries are beside the code that they
describe. Neither imports torch: an entry names its functions by :func:`deferred`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, TypeVar

from nemo_minitron.errors import ConfigError

__all__ = [
    "ESTIMATORS",
    "FAMILIES",
    "FORMATS",
    "LOGIT_LOSSES",
    "STATE_LOSSES",
    "Choices",
    "Entry",
    "Table",
    "WrittenFormats",
    "deferred",
]


class Entry(Protocol):
    """The attributes of every entry."""

    @property
    def name(self) -> str:
        """Its name in the configuration."""
        ...

    @property
    def note(self) -> str:
        """A few words for ``--help``; may be empty."""
        ...


E = TypeVar("E", bound=Entry)


class Table(Mapping[str, E]):
    """Entries by name. They come from three places, in this order:

    - the package's own entries, which are imported at the first use of the table;
    - :meth:`register`, for this process alone;
    - installed packages, by their entry points of ``group``: ``name = "module:ENTRY"``. These are searched when
      an unknown name, or all names, are asked for; the module is imported when its entry is needed.

    Args:
        what: noun for an entry, for messages.
        own: ``module:NAME`` of the package's own entries; the module must not import torch.
        group: of the entry points.
    """

    def __init__(self, what: str, *, own: str, group: str) -> None:
        self.what, self.group = what, group
        self._where = own
        self._added: dict[str, E] = {}

    def register(self, entry: E) -> E:
        """Add an entry; it replaces an added entry of the same name.

        Returns:
            The entry.

        Raises:
            ConfigError: for a name of the package's own.
        """
        if entry.name in self._own:
            raise ConfigError(f"{self.what} {entry.name!r}: is nemo_minitron's own; give yours another name")
        self._added[entry.name] = entry
        return entry

    def unregister(self, name: str) -> None:
        """Remove the entry that :meth:`register` added under a name."""
        self._added.pop(name, None)

    def described(self) -> str:
        """The names, with the notes of entries that are imported already, for a setting's help."""
        return _listed(self, {name: entry.note for name, entry in self._known().items()})

    def __getitem__(self, name: str) -> E:
        known = self._known()
        return known[name] if name in known else self._load(self._installed[name])

    def __contains__(self, name: object) -> bool:
        return name in self._known() or name in self._installed

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._known(), *self._installed]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    @functools.cached_property
    def _own(self) -> dict[str, E]:
        module, _, name = self._where.partition(":")
        return {entry.name: entry for entry in getattr(import_module(module), name)}

    def _known(self) -> dict[str, E]:
        return self._own | self._added

    @functools.cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def _load(self, point: EntryPoint) -> E:
        where = f"{self.what} {point.name!r}: the installed package {point.dist.name if point.dist else '?'}"
        try:
            entry: E = point.load()
        except Exception as error:  # whatever a foreign module raises
            raise ConfigError(f"{where} cannot be imported ({error}); mend or remove it") from error
        if entry.name != point.name:
            raise ConfigError(f"{where} names it {entry.name!r} in {point.value}; give both the same name")
        return self.register(entry)


class Choices(Protocol):
    """What a setting can name, as the ``TABLES`` of its class say it."""

    def described(self) -> str:
        """The names, for a setting's help."""
        ...


class WrittenFormats:
    """The checkpoint formats that can be written.

    Args:
        without: names that are left out.
        exports: those among them that only other programs read, which no stage's output is in.
    """

    def __init__(self, *without: str, exports: bool = False) -> None:
        self._without, self._exports = without, exports

    def names(self) -> list[str]:
        """In the order of :data:`FORMATS`."""
        return [
            name
            for name, entry in FORMATS.items()
            if name not in self._without and (entry.write is not None or (self._exports and entry.export is not None))
        ]

    def described(self) -> str:
        """The names, for a setting's help."""
        return _listed(self.names(), {})


def _listed(names: Iterable[str], notes: Mapping[str, str]) -> str:
    texts = [f'"{name}" ({notes[name]})' if notes.get(name) else f'"{name}"' for name in names]
    return ", ".join(texts[:-1]) + f" or {texts[-1]}"


def deferred(path: str) -> Callable[..., Any]:
    """A function or class that is imported when it is first called, so that a table of them needs no imports.

    Args:
        path: ``module:name``.

    Returns:
        A function that passes its arguments on to it.
    """
    module, _, name = path.partition(":")

    @functools.cache
    def target() -> Callable[..., Any]:
        called: Callable[..., Any] = getattr(import_module(module), name)
        return called

    def call(*args: Any, **kwargs: Any) -> Any:
        return target()(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    return call


ESTIMATORS: Table[Any] = Table(
    "estimator", own="nemo_minitron.importance.estimators:OWN_ESTIMATORS", group="nemo_minitron.estimators"
)
"""Of :class:`~nemo_minitron.importance.estimators.Estimator`."""
FAMILIES: Table[Any] = Table("model family", own="nemo_minitron.families:OWN_FAMILIES", group="nemo_minitron.families")
"""Of :class:`~nemo_minitron.families.entry.Family`."""
FORMATS: Table[Any] = Table(
    "checkpoint format", own="nemo_minitron.checkpoints.formats:OWN_FORMATS", group="nemo_minitron.formats"
)
"""Of :class:`~nemo_minitron.checkpoints.formats.entry.Format`."""
LOGIT_LOSSES: Table[Any] = Table(
    "logit loss", own="nemo_minitron.distillation.losses.table:OWN_LOGIT_LOSSES", group="nemo_minitron.losses"
)
"""Of :class:`~nemo_minitron.distillation.losses.table.LogitLoss`."""
STATE_LOSSES: Table[Any] = Table(
    "state loss", own="nemo_minitron.distillation.losses.table:OWN_STATE_LOSSES", group="nemo_minitron.state_losses"
)
"""Of :class:`~nemo_minitron.distillation.losses.table.StateLoss`."""
