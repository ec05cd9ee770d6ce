"""Quantized Hugging Face directories in the unified form of NVIDIA's ModelOpt, which vLLM and TensorRT-LLM read.

``hf_quant_config.json`` and ``quantization_config`` in ``config.json`` name the algorithm and the modules that are not
quantized. Beside ``X.weight`` a matrix has ``X.weight_scale``, and by its algorithm ``X.weight_scale_2``,
``X.input_scale`` or ``X.pre_quant_scale`` (https://nvidia.github.io/Model-Optimizer/deployment/3_unified_hf.html).
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.formats.huggingface.config import read_json
from nemo_minitron.checkpoints.formats.huggingface.generation import FILE_NAME as GENERATION
from nemo_minitron.checkpoints.formats.huggingface.loader import load_transformers
from nemo_minitron.checkpoints.formats.huggingface.names import hf_names
from nemo_minitron.checkpoints.tokenizer.files import copy_tokenizer
from nemo_minitron.checkpoints.weights import torch_dtype
from nemo_minitron.errors import CheckpointError
from nemo_minitron.quantization.matrices import Matrices, matrices_of
from nemo_minitron.quantization.schemes import Scheme

if TYPE_CHECKING:
    pass

__all__ = ["without_cuda", "write_quantized"]

logger = logging.getLogger(__name__)


def write_quantized(
    floats: Path,
    source: Checkpoint,
    directory: Path,
    scheme: Scheme,
    *,
    dtype: str,
    calibrate: Callable[[Any], None],
    ranges: Mapping[str, float] | None = None,
) -> Matrices:
    """Quantize a float export and write it into ``directory``, which this creates; callers write aside.

    The whole model is in memory: ModelOpt works on transformers' model.

    Args:
        floats: the float export, a Hugging Face directory of this suite.
        source: the model, for its tokenizer and sizes.
        directory: to write.
        scheme: what to write.
        dtype: of the tensors that are not quantized, and from which the others are.
        calibrate: runs the model on calibration text; not called where the weights say it all.
        ranges: canonical name of a matrix -> largest absolute input that its training rounded by; without them
            calibration measures them.

    Returns:
        What was quantized, and what stays.

    Raises:
        CheckpointError: if ModelOpt fails on the model.
    """
    from modelopt.torch.export import export_hf_checkpoint

    matrices = matrices_of(source.family, source.shape, scheme)
    model = load_transformers(floats, torch_dtype(dtype)).eval()
    model.config.torch_dtype = torch_dtype(dtype)
    try:
        with _quiet(), without_cuda():
            quantized = _quantize(model, scheme, matrices, calibrate)
            if ranges:
                _set_ranges(quantized, source, ranges)
            export_hf_checkpoint(quantized, dtype=torch_dtype(dtype), export_dir=directory)
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"quantize={scheme.name}: ModelOpt could not quantize this model ({type(error).__name__}: {error}); leave "
            "it out, or try another quantization"
        ) from error
    _complete(floats, source, directory)
    return matrices


def _quantize(model: Any, scheme: Scheme, matrices: Matrices, calibrate: Callable[[Any], None]) -> Any:
    """ModelOpt's quantizers in a model, calibrated."""
    import modelopt.torch.quantization as mtq
    import torch

    recipe = copy.deepcopy(getattr(mtq, scheme.recipe))
    weights = recipe["quant_cfg"]["*weight_quantizer"]
    if scheme.packed_rows:
        weights["block_sizes"] = {**weights["block_sizes"], -1: scheme.group}
    for name in matrices.kept:
        recipe["quant_cfg"][f"{name}.*quantizer"] = {"enable": False}
    measured = scheme.inputs or scheme.searched  # else the weights say it all
    with torch.no_grad():
        quantized = mtq.quantize(model, recipe, calibrate if measured else None)
    if scheme.packed_rows and not scheme.searched:
        # The one form in which int4 weights are read has a scale of each column; ModelOpt's exporter asks for it.
        for name in matrices.held:
            module = quantized.get_submodule(name)
            weight = module.weight
            module.input_quantizer.pre_quant_scale = torch.ones(weight.shape[1], dtype=weight.dtype)
    return quantized


def _set_ranges(model: Any, source: Checkpoint, ranges: Mapping[str, float]) -> None:
    """Round inputs as the training did: :mod:`~nemo_minitron.quantization.live` measured the ranges before it."""
    import torch

    for canonical, limit in ranges.items():
        for name in hf_names(source.family.name, canonical):
            quantizer = model.get_submodule(name.removesuffix(".weight")).input_quantizer
            quantizer.amax = torch.tensor(limit, dtype=torch.float32)


def _complete(floats: Path, source: Checkpoint, directory: Path) -> None:
    """What transformers wrote of the configuration gives way to the float export's own; the tokenizer comes along."""
    stated = read_json(directory / "config.json")["quantization_config"]
    config = {**read_json(floats / "config.json"), "quantization_config": stated}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / GENERATION).write_bytes((floats / GENERATION).read_bytes())
    if source.tokenizer is not None:
        copy_tokenizer(source.tokenizer, directory)


@contextmanager
def without_cuda() -> Iterator[None]:
    """ModelOpt packs NVFP4 with plain torch, but asks the GPU first whether it has instructions for it."""
    from modelopt.torch.quantization.qtensor import nvfp4_tensor

    from nemo_minitron.runtime.device import decide

    if decide().is_cuda:
        yield
        return
    with mock.patch.object(nvfp4_tensor, "fp4_compatible", return_value=False):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """ModelOpt prints its progress and warns of its own code."""
    theirs = logging.getLogger("modelopt")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as printed:
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.setLevel(level)
    logger.debug("ModelOpt: %s", printed.getvalue())
