"""What is left to llama.cpp itself, through ``llama-cpp-python`` or its programs: logits, and its own quantizer."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoints.formats.gguf.importance import read_importance
from nemo_minitron.checkpoints.formats.gguf.kinds import KINDS
from nemo_minitron.errors import CheckpointError, MissingDependency
from nemo_minitron.runtime.requirements import PARTS, require

if TYPE_CHECKING:
    import torch

__all__ = [
    "check_quantizer",
    "gguf_logits",
    "gguf_loss",
    "gguf_needs",
    "has_llama_cpp",
    "open_model",
    "quantize_file",
    "quantizer",
]

_PROGRAM = "llama-quantize"
#: ``enum ggml_type``: keys and values of attention are kept in float32, as everywhere here.
_F32 = 0


def has_llama_cpp() -> bool:
    """Whether ``llama-cpp-python`` is installed. Imports nothing."""
    return importlib.util.find_spec("llama_cpp") is not None


def quantizer() -> str | None:
    """How llama.cpp's quantizer can be had: its program's path, or "llama_cpp"; None where it cannot."""
    return shutil.which(_PROGRAM) or ("llama_cpp" if has_llama_cpp() else None)


def check_quantizer(kinds: Sequence[str]) -> str:
    """:func:`quantizer`, needed for files of these kinds.

    Raises:
        MissingDependency: where it cannot be had, with the command that installs it.
    """
    how = quantizer()
    if how is None:
        raise MissingDependency(
            f"gguf.types {', '.join(kinds)} need llama.cpp's quantizer, and neither {_PROGRAM} nor llama-cpp-python is "
            f"installed: {PARTS['llama_cpp'].remedy}"
        )
    return how


def gguf_needs(config: Any) -> tuple[str, ...]:
    """What an export's types need beside the ``gguf`` package: keys of the table of required packages."""
    return ("llama_cpp",) if config.gguf.quantizes and quantizer() is None else ()


def open_model(path: Path, *, context: int, threads: int | None = None, batch: int = 512) -> Any:
    """A ``llama_cpp.Llama`` that keeps the logits of every position, with states in float32.

    Args:
        path: of the file.
        context: tokens that it has room for.
        threads: that it computes with; None takes what OMP_NUM_THREADS says, or all cores.
        batch: tokens that it computes at once.

    Raises:
        CheckpointError: for a file that llama.cpp refuses.
        MissingDependency: without ``llama-cpp-python``.
    """
    require("llama_cpp", for_="llama.cpp")
    from llama_cpp import Llama

    count = threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count()
    try:
        return Llama(
            str(path),
            n_ctx=context,
            n_batch=min(context, batch),
            n_threads=count,
            n_threads_batch=count,
            logits_all=True,
            type_k=_F32,
            type_v=_F32,
            flash_attn=False,
            verbose=False,
        )
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be loaded by llama.cpp ({error}); do not use it") from error


def gguf_logits(path: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[rows, s, vocabulary rows]`` float32 logits of a file for ``[rows, s]`` tokens, by llama.cpp.

    ``dtype``, which weights are rounded to, is the file's own business.
    """
    import numpy as np
    import torch

    model = open_model(path, context=ids.shape[1], batch=ids.shape[1])
    rows = []
    for row in ids.tolist():
        model.reset()
        model.eval(row)
        rows.append(torch.from_numpy(np.array(model.scores[: len(row)], dtype=np.float32)))
    return torch.stack(rows)


def gguf_loss(model: Any, blocks: Sequence[Sequence[int]]) -> float:
    """Mean cross-entropy of the next token in nats, by llama.cpp's logits.

    Args:
        model: of :func:`open_model`, with room for the longest block.
        blocks: tokens, each block by itself.
    """
    import numpy as np
    import torch

    total, count = 0.0, 0
    for block in blocks:
        ids = list(block)
        model.reset()
        model.eval(ids)
        logits = torch.from_numpy(np.array(model.scores[: len(ids) - 1], dtype=np.float32))
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
        count += len(ids) - 1
    return total / count


def quantize_file(
    source: Path,
    target: Path,
    kind: str,
    *,
    importance: Path | None = None,
    threads: int | None = None,
) -> None:
    """Write a file in one of the kinds that only llama.cpp writes, in a process of its own.

    Args:
        source: a GGUF file in float32, float16 or bfloat16.
        target: the file to write.
        kind: of :data:`~nemo_minitron.checkpoints.formats.gguf.kinds.KINDS`.
        importance: an importance matrix in llama.cpp's GGUF form.
        threads: that it computes with.

    Raises:
        CheckpointError: if llama.cpp fails.
        MissingDependency: where there is neither its program nor ``llama-cpp-python``.
    """
    how = check_quantizer([kind])
    count = str(threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1)
    if how == "llama_cpp":
        module = "nemo_minitron.checkpoints.formats.gguf.llama_cpp"
        command = [sys.executable, "-m", module, str(source), str(target), kind, count]
        command += [str(importance)] if importance is not None else []
    else:
        given = [] if importance is None else ["--imatrix", str(importance)]
        command = [how, *given, str(source), str(target), kind, count]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not target.is_file():
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise CheckpointError(
            f"llama.cpp could not quantize to {kind} (exit code {done.returncode}): "
            f"{said[-1] if said else 'it said nothing'}"
        )


def _quantize(source: str, target: str, kind: str, threads: str, importance: str | None = None) -> int:
    """The process of :func:`quantize_file`."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = int(threads), KINDS[kind].file_type
    held: Any = None
    if importance is not None:
        held = _importance(Path(importance))
        params.imatrix = held[0]
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))


def _importance(path: Path) -> tuple[Any, list[Any]]:
    """llama.cpp's array of importances, ended by an empty entry, and what it points to."""
    import llama_cpp

    entry = llama_cpp.llama_model_imatrix_data
    means = read_importance(path)
    array, kept = (entry * (len(means) + 1))(), []
    for place, (name, mean) in enumerate(means.items()):
        kept.append((name.encode(), mean))
        array[place] = entry(kept[-1][0], mean.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), mean.size)
    return array, kept


if __name__ == "__main__":
    sys.exit(_quantize(*sys.argv[1:]))
