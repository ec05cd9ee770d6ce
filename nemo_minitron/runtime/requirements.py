"""Packages that a part of the suite needs beside the light dependencies, checked before the part starts.

``pip install nemo-minitron`` brings none of NVIDIA's stack (docs/cluster.md, "Versions"). Before anything is
computed, :func:`require` names every package that is missing or too old, with the remedy. :func:`missing` makes the
same message of an ``ImportError`` that happens all the same.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet

from nemo_minitron.errors import MissingDependency
from nemo_minitron.runtime.versions import SUPPORTED, WITH_NEMO_1, installed

__all__ = ["PARTS", "Part", "faults", "missing", "require"]

_STACK = 'pip install "nemo-minitron[stack]" -c constraints.txt'
_CONTAINER = "or start from a container of docker/README.md"


@dataclass(frozen=True)
class Part:
    """A package that some part of the suite imports.

    Attributes:
        module: name that is imported.
        distribution: name of the distribution that holds it.
        remedy: what to do where it is missing or of a version that does not work.
        supported: versions that work; None takes those of :data:`~nemo_minitron.runtime.versions.SUPPORTED`.
    """

    module: str
    distribution: str
    remedy: str
    supported: str | None = None

    @property
    def range(self) -> str:
        """Versions that work, as pip writes them; empty for any."""
        return SUPPORTED.get(self.distribution, "") if self.supported is None else self.supported


#: By the first part of the module's name.
_BY_MODULE: dict[str, Part] = {
    part.module.partition(".")[0]: part
    for part in (
        Part("torch", "torch", f"{_STACK}, {_CONTAINER}"),
        Part("numpy", "numpy", f"{_STACK}, {_CONTAINER}"),
        Part("megatron.core", "megatron-core", f"{_STACK}, {_CONTAINER}"),
        Part("nemo", "nemo-toolkit", f"{_STACK}, {_CONTAINER}"),
        Part("nemo_run", "nemo-run", "pip install nemo-run==0.4.0"),
        Part("nemo_aligner", "nemo-aligner", "pip install --no-deps nemo-aligner==0.7.0"),
        Part("lightning", "lightning", f"{_STACK}, {_CONTAINER}"),
        Part("transformers", "transformers", f"{_STACK}, {_CONTAINER}"),
        Part("tokenizers", "tokenizers", f"{_STACK}, {_CONTAINER}"),
        Part("sentencepiece", "sentencepiece", 'pip install "sentencepiece<0.2.2"'),
        Part("datasets", "datasets", 'pip install "nemo-minitron[data]"'),
        Part("pyarrow", "pyarrow", 'pip install "nemo-minitron[data]"'),
        Part("gguf", "gguf", 'pip install "nemo-minitron[gguf]"'),
        Part(
            "llama_cpp",
            "llama-cpp-python",
            'CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" pip install '
            '"nemo-minitron[llama-cpp]"',
        ),
        Part("modelopt", "nvidia-modelopt", 'pip install "nvidia-modelopt>=0.37,<0.38"'),
        Part("lm_eval", "lm-eval", 'pip install "nemo-minitron[harness]"'),
        Part("matplotlib", "matplotlib", 'pip install "nemo-minitron[report]"'),
        Part("scipy", "scipy", 'pip install "nemo-minitron[report]"'),
        Part("tensorboard", "tensorboard", 'pip install "nemo-minitron[report]"'),
        Part("hydra", "hydra-core", f"{_STACK}, {_CONTAINER}"),
        Part("jsonlines", "jsonlines", "pip install jsonlines"),
        Part("fiddle", "fiddle", f"{_STACK}, {_CONTAINER}"),
    )
}

PARTS: dict[str, Part] = {
    **_BY_MODULE,
    # The models of NeMo 1 that nemo-aligner subclasses.
    "nemo 1": Part("nemo", "nemo-toolkit", f"{_STACK}, {_CONTAINER}", supported=WITH_NEMO_1),
}


def faults(needs: Mapping[str, Iterable[str]]) -> list[str]:
    """The packages that are missing or too old, a line for each remedy; empty if all are there. Imports nothing.

    Args:
        needs: keys of :data:`PARTS`, by what needs them: the subject of a sentence ("alignment").
    """
    subjects: dict[tuple[str, str], list[str]] = {}  # by what is wrong and its remedy: who needs it
    for subject, modules in needs.items():
        for module in modules:
            part = PARTS[module]
            fault = _fault(part)
            if fault is not None:
                subjects.setdefault((fault, part.remedy), []).append(subject)
    lines: dict[tuple[str, str], list[str]] = {}
    for (fault, remedy), names in subjects.items():
        lines.setdefault((_joined(names), remedy), []).append(fault)
    return [
        f"{names} {'need' if ' and ' in names else 'needs'} {', '.join(wrong)}: {remedy}"
        for (names, remedy), wrong in lines.items()
    ]


def require(*modules: str, for_: str) -> None:
    """Raise an error with the remedy, instead of an ``ImportError`` later, if packages are missing.

    Args:
        modules: keys of :data:`PARTS`.
        for_: what needs them, as the subject of a sentence: "alignment".

    Raises:
        MissingDependency: with all packages that are missing or too old.
    """
    lacking = faults({for_: modules})
    if lacking:
        raise MissingDependency("\n".join(lacking))


def missing(error: BaseException, *, for_: str) -> MissingDependency | None:
    """The error to raise instead of an ``ImportError``; None if that is not about a package of :data:`PARTS`.

    A fault inside an installed package is left as it is, with its traceback.
    """
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    name = error.name.partition(".")[0]
    lacking = faults({for_: [name]}) if name in _BY_MODULE else []
    return MissingDependency(lacking[0]) if lacking else None


def _joined(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _fault(part: Part) -> str | None:
    wanted = f"{part.distribution}{part.range}"
    if not _there(part.module):
        return f"{wanted} (not installed)"
    version = installed(part.distribution)
    if version is not None and not SpecifierSet(part.range).contains(version, prereleases=True):
        return f"{wanted} ({version} is installed)"
    return None


def _there(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False
