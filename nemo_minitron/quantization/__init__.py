"""Models with weights of few bits: exports through NVIDIA's ModelOpt, and trainings whose student rounds as they do.

:mod:`~nemo_minitron.quantization.schemes` says what there is; :mod:`~nemo_minitron.quantization.matrices` which
matrices of a model it holds; :mod:`~nemo_minitron.quantization.fake` rounds numbers as ModelOpt does;
:mod:`~nemo_minitron.quantization.export` writes and :mod:`~nemo_minitron.quantization.reading` reads the directories
that vLLM and TensorRT-LLM serve; :mod:`~nemo_minitron.quantization.live` rounds inside a live Megatron model.
Importing this package imports no torch.
"""

from nemo_minitron._lazy import lazy
from nemo_minitron.quantization.matrices import Matrices, matrices_of
from nemo_minitron.quantization.schemes import SCHEMES, Scheme, scheme_of

__all__ = [
    "SCHEMES",
    "Matrices",
    "Scheme",
    "load_quantized",
    "matrices_of",
    "mean_loss",
    "scheme_of",
    "write_quantized",
]

__getattr__ = lazy(__name__, {"load_quantized": "reading", "mean_loss": "reading", "write_quantized": "export"})
