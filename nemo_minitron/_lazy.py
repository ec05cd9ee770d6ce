"""Names that a package offers from its modules, each of which is imported when one of its names is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazy"]


def lazy(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """A module ``__getattr__`` (PEP 562) for the ``__init__.py`` of a package whose modules import torch or NeMo.

    Args:
        package: its ``__name__``.
        modules: the names that it offers, each with the module of the package that defines it.

    Returns:
        The function, which raises AttributeError for any other name.
    """

    def of(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    return of
