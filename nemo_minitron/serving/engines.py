"""Open a model in the engine that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nemo_minitron.serving.engine import Engine, Options

__all__ = ["open_engine"]


def open_engine(name: str, path: str | Path, options: Options) -> Engine:
    """Load a model into this process.

    Args:
        name: of the engine.
        path: Hugging Face directory for transformers, any checkpoint of the suite for Megatron, GGUF file for
            llama.cpp.
        options: how.

    Raises:
        MinitronError: for a model that cannot be loaded, or a library that is not installed.
    """
    return _OPENERS[name](Path(path), options)


def _transformers(path: Path, options: Options) -> Engine:
    from nemo_minitron.serving.transformers_engine import TransformersEngine

    return TransformersEngine(path, options)


def _megatron(path: Path, options: Options) -> Engine:
    from nemo_minitron.serving.megatron_engine import MegatronEngine

    return MegatronEngine(path, options)


def _llama(path: Path, options: Options) -> Engine:
    from nemo_minitron.runtime.requirements import require

    require("llama_cpp", for_=f"{path.name} in llama.cpp")
    from nemo_minitron.serving.llama_engine import LlamaEngine

    return LlamaEngine(path, options)


_OPENERS: dict[str, Callable[[Path, Options], Engine]] = {
    "transformers": _transformers,
    "megatron": _megatron,
    "llama.cpp": _llama,
}
