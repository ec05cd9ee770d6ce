"""Which matrices of a model a scheme holds, and which have to stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nemo_minitron import axes
from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.formats.huggingface.names import hf_parts
from nemo_minitron.quantization.schemes import Scheme
from nemo_minitron.shape import ModelShape

__all__ = ["Matrices", "export_faults", "is_linear", "linears", "matrices_of", "training_faults"]


def is_linear(name: str) -> bool:
    """Whether a canonical name is that of a matrix that schemes apply to: one of attention, MLP or an expert."""
    below = axes.name_parts(name).below
    return below.startswith(("self_attention.linear_", "mlp.linear_", "linear_")) and below.endswith(".weight")


def linears(family: axes.Family, shape: ModelShape) -> list[axes.Entry]:
    """Those matrices of a model; the norms that some families keep beside them are vectors."""
    return [entry for entry in axes.parameters(family, shape) if is_linear(entry.name) and len(entry.row.axes) == 2]


@dataclass(frozen=True)
class Matrices:
    """The matrices of a model's layers under a scheme, by their names in Hugging Face, without ``.weight``.

    Attributes:
        held: what is quantized.
        kept: what is not, each with the reason.
        canonical: canonical names of the parameters that hold what is quantized.
    """

    held: tuple[str, ...]
    kept: Mapping[str, str]
    canonical: frozenset[str] = frozenset()

    def note(self) -> str | None:
        """What stays as it is, in one line; None where nothing does."""
        if not self.kept:
            return None
        reasons: dict[str, set[str]] = {}
        for name, reason in self.kept.items():
            reasons.setdefault(reason, set()).add(name.rpartition(".")[2])
        parts = [f"{', '.join(sorted(names))} ({reason})" for reason, names in reasons.items()]
        return f"{len(self.kept)} of {len(self.kept) + len(self.held)} matrices stay as they are: {'; '.join(parts)}"


def matrices_of(family: axes.Family, shape: ModelShape, scheme: Scheme) -> Matrices:
    """The matrices that a scheme holds: whole groups of columns, and an even number of rows where two share a byte.

    Queries, keys and values are held together or not at all, and so are gate and up-projection: readers fuse them.
    """
    held: list[str] = []
    canonical: list[str] = []
    kept: dict[str, str] = {}
    for entry in linears(family, shape):
        parts = {name.removesuffix(".weight"): size for name, size in hf_parts(family.name, entry).items()}
        columns = entry.shape[1]
        reason = None
        if scheme.group is not None and columns % scheme.group:
            reason = f"{columns} columns are no multiple of {scheme.group}"
        elif scheme.packed_rows and (odd := [rows for rows, _ in parts.values() if rows % 2]):
            reason = f"{odd[0]} rows, an odd number"
        if reason is None:
            held += parts
            canonical.append(entry.name)
        else:
            kept |= dict.fromkeys(parts, reason)
    return Matrices(tuple(held), kept, frozenset(canonical))


def export_faults(shape: ModelShape, architecture: Architecture, scheme: Scheme) -> list[str]:
    """Why a model cannot be exported under a scheme; empty if it can."""
    family = axes.family(architecture.family)
    where = f"quantize={scheme.name}"
    if family.hf is None:
        return [f"{where}: transformers has no models of family {family.name!r}, and ModelOpt goes through it"]
    faults = []
    if not shape.uniform:
        faults.append(
            f"{where}: layers differ in size, and ModelOpt loads models by transformers' own classes; leave it out"
        )
    if scheme.searched and (family.zero_centered_norm or family.normalization != "RMSNorm"):
        faults.append(
            f"{where}: ModelOpt multiplies the weights of norms by its scales, and those of {family.name} are stored "
            "minus one or have a bias; use int4"
        )
    if scheme.searched and family.expert:
        faults.append(f"{where}: ModelOpt's search needs every expert to see every text; use int4 for a mixture")
    return faults or _empty_faults(family, shape, scheme)


def training_faults(shape: ModelShape, architecture: Architecture, scheme: Scheme, *, tensor: int = 1) -> list[str]:
    """Why a student cannot be trained for a scheme under a layout; empty if it can.

    Args:
        shape, architecture: the student's.
        scheme: what it is trained for.
        tensor: number of tensor-parallel ranks.
    """
    family = axes.family(architecture.family)
    where = f"quantize={scheme.name}"
    if family.hf is None:
        return [f"{where}: transformers has no models of family {family.name!r}, so no quantized export either"]
    if scheme.inputs and family.expert:
        return [f"{where}: rounds inputs, whose ranges differ by expert; use int4 for a mixture"]
    faults = _empty_faults(family, shape, scheme)
    held = matrices_of(family, shape, scheme).canonical
    cut = {
        entry.shape[1]
        for entry in linears(family, shape)
        if entry.name in held and entry.row.tensor_parallel_dim == 1 and scheme.group is not None
        if entry.shape[1] // tensor % scheme.group
    }
    if cut:
        columns = ", ".join(map(str, sorted(cut)))
        faults.append(
            f"parallel.tensor={tensor}: cuts {columns} columns within groups of {scheme.group}; use fewer ranks, or a "
            f"smaller group_size"
        )
    return faults


def _empty_faults(family: axes.Family, shape: ModelShape, scheme: Scheme) -> list[str]:
    """The fault of a scheme that holds no matrix of a model."""
    where, faults = f"quantize={scheme.name}", []
    matrices = matrices_of(family, shape, scheme)
    if not matrices.held:
        widths = sorted({entry.shape[1] for entry in linears(family, shape)})
        able = [size for size in (128, 64, 32, 16) if any(width % size == 0 for width in widths)]
        remedy = (
            f"set group_size={able[0]}" if scheme.packed_rows and able else "prune to widths that are, or leave it out"
        )
        faults.append(
            f"{where}: no matrix has columns in a multiple of {scheme.group} ({', '.join(map(str, widths))}); {remedy}"
        )
    return faults
