"""Check a conversion: the target format's own loader must compute the source's logits."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.formats import FORMATS
from nemo_minitron.errors import CheckpointError
from nemo_minitron.jobs.launch import launched_here
from nemo_minitron.jobs.warm import reachable_pool
from nemo_minitron.jobs.warm_client import end_process
from nemo_minitron.runtime.environment import local_environment
from nemo_minitron.shape import require_uniform

if TYPE_CHECKING:
    import torch

__all__ = ["TOLERANCE", "Verification", "compare_logits", "verify"]

TOLERANCE = 1e-4
#: Modules that run as processes of their own; the second is above this package.
LOADERS = "nemo_minitron.checkpoints.verification.loaders"
STREAMED_LOADERS = "nemo_minitron.streamed.loaders"
ROWS, LENGTH = 2, 16


@dataclasses.dataclass(frozen=True)
class Verification:
    """The outcome of a comparison.

    Attributes:
        max_difference: largest absolute difference of any logit.
        scale: largest absolute logit of the source.
        same_choice: fraction of positions at which both have the same most likely token.
        dtype: both models' weights were rounded to it; logits are computed in float32.
        loader: name of the loader of the target.
    """

    max_difference: float
    scale: float
    same_choice: float
    dtype: str
    loader: str

    @property
    def relative(self) -> float:
        """``max_difference`` in units of ``scale``."""
        return self.max_difference / self.scale


def verify(
    source: Checkpoint,
    target: Checkpoint,
    *,
    tolerance: float = TOLERANCE,
    timeout_minutes: float = 60.0,
    streamed: bool = False,
) -> Verification:
    """Load ``target`` with its format's own loader and compare its logits with the source's.

    A HF source is computed by transformers, another source by a plain Megatron-core model that is filled without
    unpickling (NeMo's own loaders run what a file names, so they load only targets, which this suite wrote). Each model
    runs in a process of its own and holds the whole model in float32; they run one after the other.

    With ``streamed`` one layer's weights, or those of the embedding or output layer, are in memory: the layers are
    transformers' own or Megatron's, and the weights of NeMo's formats are read by Megatron's own reader.

    Args:
        source: opened from a path; its weights may not be wrapped, since the loader reads the path.
        target: the conversion's result.
        tolerance: on the largest difference, relative to the largest logit. Where the target's dtype is narrower, the
            source is rounded to it first.
        timeout_minutes: for each loader.
        streamed: a layer at a time is in memory, not the whole model.

    Returns:
        The figures, if they are within the tolerance.

    Raises:
        CheckpointError: if a loader fails or times out, the logits differ by more, or are not finite.
        ShapeError: if layers differ in size; there is no loader of such models here.
    """
    for shape in (source.shape, target.shape):
        require_uniform(shape, "comparing a conversion's logits (verify)")
    result = compare_logits(source, target, timeout_minutes=timeout_minutes, streamed=streamed)
    # written so that NaN fails
    if not result.max_difference <= tolerance * result.scale:
        raise CheckpointError(
            f"{target.path} does not compute what {source.path} does: logits differ by {result.max_difference:.3g} "
            f"where {tolerance:.0e} x {result.scale:.3g} is allowed; do not use it, and report the conversion"
        )
    return result


def compare_logits(
    source: Checkpoint, target: Checkpoint, *, timeout_minutes: float = 60.0, streamed: bool = False
) -> Verification:
    """The figures of :func:`verify`, whatever they are.

    Raises:
        CheckpointError: if a loader fails or times out, or the vocabularies differ.
    """
    import torch

    vocab = min(source.shape.vocab_size, target.shape.vocab_size)
    ids = torch.randint(0, vocab, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    dtype = target.architecture.dtype
    loaders = _loader_of(source, trusted=False), _loader_of(target, trusted=True)
    expected, logits = (
        _logits(kind, checkpoint, ids, dtype, timeout_minutes, streamed)
        for kind, checkpoint in zip(loaders, (source, target), strict=True)
    )
    if source.shape.vocab_size != target.shape.vocab_size:
        raise CheckpointError(
            f"{target.path} has a vocabulary of {target.shape.vocab_size}, its source {source.path} of "
            f"{source.shape.vocab_size}; convert it again"
        )
    expected, logits = expected[..., :vocab], logits[..., :vocab]
    return Verification(
        max_difference=(expected - logits).abs().max().item(),
        scale=expected.abs().max().item(),
        same_choice=(expected.argmax(-1) == logits.argmax(-1)).float().mean().item(),
        dtype=dtype,
        loader=loaders[1],
    )


def _loader_of(checkpoint: Checkpoint, *, trusted: bool) -> str:
    """The format's own loader, if this suite wrote the checkpoint or the loader is safe; else "megatron"."""
    entry = FORMATS[checkpoint.format]
    return entry.name if entry.loader is not None and (trusted or entry.safe_loader) else "megatron"


def _logits(
    kind: str, checkpoint: Checkpoint, ids: torch.Tensor, dtype: str, timeout_minutes: float, streamed: bool
) -> torch.Tensor:
    """``[rows, s, vocabulary rows]`` logits, which a process of its own takes from one of ``verification.loaders``."""
    from safetensors.torch import load_file, save_file

    path = checkpoint.path
    environment = local_environment(os.environ) | {"HF_HUB_OFFLINE": "1"} | launched_here()
    with tempfile.TemporaryDirectory() as scratch:
        tokens, out, log = Path(scratch, "tokens.safetensors"), Path(scratch, "out.safetensors"), Path(scratch, "log")
        save_file({"ids": ids}, tokens)
        args = [kind, str(path.resolve()), str(tokens), str(out), dtype]
        try:
            code = _run(kind, args, environment, log, 60 * timeout_minutes, streamed)
        except subprocess.TimeoutExpired:
            raise CheckpointError(
                f"loading {path} ({kind}) took more than {timeout_minutes:g} minutes; allow more time"
            ) from None
        if code or not out.is_file():
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise CheckpointError(
                f"{path} could not be loaded by the {kind} loader (exit code {code}): "
                f"{lines[-1] if lines else 'it said nothing'}"
            )
        return load_file(out)["logits"]


def _run(kind: str, args: list[str], environment: dict[str, str], log: Path, timeout: float, streamed: bool) -> int:
    """Exit code of the loader: forked where there are warm parents, else a fresh interpreter."""
    module, pool = STREAMED_LOADERS if streamed else LOADERS, reachable_pool()
    if pool is not None:
        level = "megatron" if streamed or kind == "megatron" else "nemo"
        process = pool.start(level, module, args, environment=environment, cwd=Path.cwd(), output=log)
        if process is not None:
            try:
                return process.wait(timeout)
            finally:
                end_process(process)
    with open(log, "wb") as stream:
        command = [sys.executable, "-m", module, *args]
        return subprocess.run(
            command, stdout=stream, stderr=stream, env=environment, timeout=timeout, check=False
        ).returncode
