"""Check that scores belong to a given model."""

from __future__ import annotations

from nemo_minitron.checkpoints.fingerprint import same_fingerprint
from nemo_minitron.errors import CheckpointError, ShapeError
from nemo_minitron.shape import ModelShape

__all__ = ["check_subject"]


def check_subject(
    scored: tuple[ModelShape, str | None], model: tuple[ModelShape, str | None], *, where: str, remedy: str
) -> None:
    """Make sure that scores were made from a given model.

    Args:
        scored, model: shape and fingerprint of the model that was scored, and of the given model; if a fingerprint is
            None, the weights are not checked.
        where: name of the scores in errors.
        remedy: how to get the right scores.

    Raises:
        ShapeError: if the sizes differ.
        CheckpointError: if the weights differ.
    """
    ours, theirs = scored[0].to_dict(), model[0].to_dict()
    if faults := [
        f"{k}: {ours.get(k)} in {where}, {theirs.get(k)} in the model"
        for k in {**ours, **theirs}
        if ours.get(k) != theirs.get(k)
    ]:
        raise ShapeError([f"{fault}; {remedy}" for fault in faults])
    if scored[1] is not None and model[1] is not None and not same_fingerprint(scored[1], model[1]):
        raise CheckpointError(
            f"{where}: made from other weights (fingerprint {scored[1]}) than the model's ({model[1]}); {remedy}"
        )
