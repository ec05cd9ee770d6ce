"""Refit what lies after the layers: the scale of the final norm, and the output layer where it is one of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from nemo_minitron import axes
from nemo_minitron.axes import Axis, KeptUnits
from nemo_minitron.checkpoints.weights import torch_dtype
from nemo_minitron.reconstruction.few_tokens import Tokens, make_sums, solve
from nemo_minitron.reconstruction.fitting import MatrixReport, held_out, tokens_of_all
from nemo_minitron.reconstruction.least_squares import Fit, Sums
from nemo_minitron.streamed import Pass

__all__ = ["fit_output"]

_NORM = "decoder.final_layernorm.weight"
_ROWS = 8192  # rows of the vocabulary at once


@torch.no_grad()
def fit_output(
    theirs: Pass, ours: Pass, kept: KeptUnits, *, ridges: Sequence[float]
) -> tuple[dict[str, torch.Tensor], list[MatrixReport]]:
    """The tensors that are replaced after the layers. Collective.

    The targets are the teacher's logits of the kept vocabulary. They are linear in its normalised states, so that they
    are never worked out. With tied embeddings only the norm's scale can change, each channel by itself; a constant that
    is added to all logits of a token does not count.

    Args:
        theirs, ours: passes of teacher and pruned model after their last layers.
        kept: units of the teacher that stayed.
        ridges: that are tried.
    """
    teacher, student = theirs.model.checkpoint, ours.model.checkpoint
    table, shape = teacher.family, teacher.shape
    norms = [run.model.final_norm() for run in (theirs, ours)]
    sums = _sums(theirs, ours, norms, few=not shape.tied_embeddings)
    dtype = torch_dtype(student.architecture.dtype)
    device = ours.model.groups.device.torch
    name = next(iter(table.first)) if shape.tied_embeddings else table.output
    vocabulary = axes.axis_rows(Axis.VOCAB, shape, kept, None)
    whole = teacher.weights.tensor(name)
    whole = (whole if vocabulary is None else whole.index_select(0, vocabulary)).to(device)
    own = student.weights.tensor(name).to(device)
    if shape.tied_embeddings:
        products = _products(own, whole)
        mapped = [_scale_problem(part, *products) for part in sums]
        start = torch.ones(1, len(kept.hidden), dtype=torch.float64, device=device)
        fit = solve(start, mapped[0], mapped[1], ridges=ridges)
        report = MatrixReport(_NORM, fit.ridge, fit.before, fit.after, fit.short)
        if fit.ridge is None:
            return {}, [report]
        centre = 1.0 if table.zero_centered_norm else 0.0
        scale = (student.weights.tensor(_NORM).to(device).double() + centre) * fit.weight[0] - centre
        return {_NORM: _same(scale.to(dtype), ours).cpu()}, [report]
    fit = _by_rows(own, whole, sums, ridges)
    report = MatrixReport(name, fit.ridge, fit.before, fit.after, fit.short)
    return ({} if fit.ridge is None else {name: _same(fit.weight.to(dtype), ours).cpu()}), [report]


def _by_rows(own: torch.Tensor, whole: torch.Tensor, sums: list[Any], ridges: Sequence[float]) -> Fit:
    """The output layer. One ridge serves all rows; rows are mapped as they are needed."""
    fitted, held = (part.mapped(whole if isinstance(part, Tokens) else whole.double()) for part in sums)
    return solve(own, fitted, held, ridges=ridges)


def _products(own: torch.Tensor, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``E' E``, ``E' E_T`` and ``E_T' E_T`` in float64, rows of the vocabulary less their mean, some rows at a time.

    The mean adds a constant to all logits of a token.
    """
    means = [torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device) for matrix in (own, whole)]
    for mean, matrix in zip(means, (own, whole), strict=True):
        for part in matrix.split(_ROWS):
            mean += part.sum(0, dtype=torch.float64)
        mean /= len(matrix)
    same = own.shape == whole.shape and torch.equal(own, whole)  # where no hidden channel went
    sizes = own.shape[1], whole.shape[1]
    ours, cross, theirs = (means[0].new_zeros(*size) for size in ((sizes[0],) * 2, sizes, (sizes[1],) * 2))
    for a, b in zip(own.split(_ROWS), whole.split(_ROWS), strict=True):
        centred = a.double() - means[0]
        ours += centred.T @ centred
        if not same:
            other = b.double() - means[1]
            cross += centred.T @ other
            theirs += other.T @ other
    return (ours, ours, ours) if same else (ours, cross, theirs)


def _scale_problem(sums: Sums, ours: torch.Tensor, cross: torch.Tensor, theirs: torch.Tensor) -> Sums:
    """The problem of a scale of each channel, as one of a matrix with a single row.

    With the logits ``z = E_T y`` and ``E (f * u)`` the error is quadratic in the factors ``f``: its matrix is
    ``(sum u u') * (E' E)``, elementwise, and its vector the row sums of ``(sum u y') * (E' E_T)``.

    Args:
        sums: of the normalised states ``u`` and ``y``.
        ours, cross, theirs: what :func:`_products` gives.
    """
    return Sums.of(
        sums.gram * ours,
        (sums.cross.T * cross).sum(1)[None],
        (theirs * sums.power).sum(),
        sums.tokens,
    )


def _sums(theirs: Pass, ours: Pass, norms: list[Any], *, few: bool) -> list[Any]:
    """Normalised states of the pruned model as inputs, of the teacher as targets: solved for, and held out.

    ``few``: tokens may stay as they are, where they are few.
    """
    groups = ours.model.groups
    device = groups.device.torch
    sizes = ours.states.tensor.shape[-1], theirs.states.tensor.shape[-1]
    most = tokens_of_all(ours) if few else sizes[0]
    both = [make_sums(*sizes, most, square=True, device=device) for _ in range(2)]
    for start, inputs, _, _ in ours.batches():
        stop = start + len(inputs)
        x, y = (
            norm(run.states.read(start, stop).to(device)) for run, norm in zip((ours, theirs), norms[::-1], strict=True)
        )
        held = held_out(groups, start, len(inputs))
        for which in (0, 1):
            chosen = held == bool(which)
            both[which].add(x[:, chosen], y[:, chosen])
    for part in both:
        part.all_reduce(groups.dp)
    return both


def _same(value: torch.Tensor, run: Pass) -> torch.Tensor:
    """The first rank's value, on every rank."""
    value = value.contiguous()
    dist.broadcast(value, dist.get_global_rank(run.model.groups.dp, 0), group=run.model.groups.dp)
    return value
