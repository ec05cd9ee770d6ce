"""Import NeMo-Aligner's generating models without TensorRT-LLM.

``nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor`` imports ``GPTGenerateTRTLLM`` of
``nemo_aligner.utils.trt_llm``, whose first lines import ``tensorrt_llm`` unguarded (0.7.0; a guarded import of the same
follows them). The class is only used where ``reinforce.trt_llm.enable`` says so.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from nemo_minitron.errors import MissingDependency

__all__ = ["optional"]

_MODULE = "nemo_aligner.utils.trt_llm"


class GPTGenerateTRTLLM:
    """Replaces Aligner's class of that name; making one raises an error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise MissingDependency(
            "generation by TensorRT-LLM needs the package tensorrt_llm, which is not installed; leave "
            "reinforce.trt_llm out: the model then generates by itself"
        )


@contextmanager
def optional() -> Iterator[None]:
    """Within the block, Aligner's models import without TensorRT-LLM; afterwards its own module is absent as before.

    Where TensorRT-LLM is installed, nothing is done.
    """
    if _MODULE in sys.modules or importlib.util.find_spec("tensorrt_llm") is not None:
        yield
        return
    stand_in = ModuleType(_MODULE, __doc__)
    stand_in.GPTGenerateTRTLLM = GPTGenerateTRTLLM  # type: ignore[attr-defined]
    sys.modules[_MODULE] = stand_in
    try:
        yield
    finally:
        del sys.modules[_MODULE]
