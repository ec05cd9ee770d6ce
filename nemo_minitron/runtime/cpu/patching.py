"""Reversible patches of modules that may not be imported yet.

A :class:`Patch` names a module and an attribute in it. :class:`PatchSet` replaces the attribute as soon as the module
is imported, before its importer sees it, and puts the original back on request. A replaced function stays safe where it
was copied by ``from module import name``: the copy asks whether the set is active and calls the original otherwise.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import wrapt

from nemo_minitron.runtime.versions import SUPPORTED, installed, matches

__all__ = ["Patch", "PatchSet"]

_MISSING = object()


@dataclass(frozen=True)
class Patch:
    """One replaced attribute.

    Attributes:
        module: dotted name of the module that owns it.
        attribute: name in the module, or ``Class.method``.
        make: from the original (or None where it is missing) to its replacement.
        why: what the original would do without CUDA, and where.
        optional: the attribute may be missing from the installed version (then it is created).
        versions: requirement of the releases that need the patch ("megatron-core>=0.13"); None for all. Where the
            installed one does not fulfil it, the module is left as it is.
        lacking: what must be missing for the patch to be wanted: "cuda", "apex" or "transformer_engine". Without CUDA
            all are; a CUDA machine without Apex, say, wants those that stand for Apex.
    """

    module: str
    attribute: str
    make: Callable[[Any], Any]
    why: str
    optional: bool = False
    versions: str | None = None
    lacking: str = "cuda"


class PatchSet:
    """A set of patches that is switched on and off together."""

    def __init__(self, patches: Iterable[Patch]) -> None:
        self.patches = tuple(patch for patch in patches if patch.versions is None or matches(patch.versions))
        self.active = False
        self._applied: list[tuple[Any, str, Any]] = []
        self._hooked: set[str] = set()

    def activate(self) -> None:
        """Apply every patch whose module is imported, and the others when it is."""
        if self.active:
            return
        self.active = True
        for module in dict.fromkeys(patch.module for patch in self.patches):
            if module in sys.modules and not _importing(sys.modules[module]):
                self._apply(sys.modules[module])
            if module not in self._hooked:
                self._hooked.add(module)
                # wrapt calls at once where the module is there already; _apply is idempotent.
                wrapt.register_post_import_hook(self._apply, module)

    def deactivate(self) -> None:
        """Put every original back, in reverse order."""
        if not self.active:
            return
        self.active = False
        while self._applied:
            owner, name, original = self._applied.pop()
            if original is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

    def _apply(self, module: Any) -> None:
        if not self.active:
            return
        done = {(id(owner), name) for owner, name, _ in self._applied}
        for patch in self.patches:
            if patch.module != module.__name__:
                continue
            *path, name = patch.attribute.split(".")
            owner = functools.reduce(getattr, path, module)
            if (id(owner), name) in done:
                continue
            original = inspect.getattr_static(owner, name, _MISSING)
            if original is _MISSING and not patch.optional:
                raise AttributeError(
                    f"{patch.module}.{patch.attribute} does not exist in the installed version ({_versions()}): "
                    "the CPU layer was written for the versions in docs/cluster.md"
                )
            current = getattr(owner, name, None)
            replacement = patch.make(current)
            if inspect.isfunction(replacement) and inspect.isroutine(current):
                replacement = self._switch(current, replacement)
            if isinstance(original, staticmethod):
                replacement = staticmethod(replacement)
            # An inherited attribute goes back by uncovering it.
            self._applied.append((owner, name, vars(owner).get(name, _MISSING)))
            setattr(owner, name, replacement)

    def _switch(self, original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def switched(*args: Any, **kwargs: Any) -> Any:
            return (replacement if self.active else original)(*args, **kwargs)

        return switched


def _versions() -> str:
    return ", ".join(f"{name} {version}" for name in SUPPORTED if (version := installed(name)) is not None)


def _importing(module: Any) -> bool:
    """The module is in ``sys.modules`` but its body has not finished."""
    spec: importlib.machinery.ModuleSpec | None = getattr(module, "__spec__", None)
    return bool(getattr(spec, "_initializing", False))
