"""Teacher and pruned model side by side, layer by layer: the pruned model's layers are refitted as they are reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_minitron.axes import KeptUnits
from nemo_minitron.config import HELD_OUT, BlockConfig
from nemo_minitron.data.blocks import Blocks
from nemo_minitron.errors import DataError, NonFiniteError
from nemo_minitron.reconstruction.block import BlockReport, BlockTraining
from nemo_minitron.reconstruction.ends import fit_output
from nemo_minitron.reconstruction.fitting import LayerFitting, MatrixReport, Targets
from nemo_minitron.reconstruction.least_squares import RIDGES
from nemo_minitron.reconstruction.parts import Layer, watched
from nemo_minitron.runtime.masks import documents_masked
from nemo_minitron.streamed import Pass, States, StreamedModel, Trail

__all__ = ["LayerReport", "Sink", "reconstruct"]

#: Called for each layer with its number (the number of layers for what lies after them), the tensors that were
#: replaced, by canonical name, and the report as JSON values.
Sink = Callable[[int, Mapping[str, torch.Tensor], dict[str, Any]], None]


@dataclass(frozen=True)
class LayerReport:
    """What became of a layer of the pruned model.

    Attributes:
        layer: its number in the pruned model; None for what lies after the layers.
        teacher: its number in the teacher.
        error: mean square of the difference between both models' hidden states after it, in the kept channels, over
            the mean square of the teacher's; over all calibration tokens.
        matrices: of every matrix and scale.
        block: what gradient steps made of it; None without any.
    """

    layer: int | None
    teacher: int | None
    error: float | None
    matrices: list[MatrixReport]
    block: BlockReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        block = None if self.block is None else self.block.to_dict()
        return {**vars(self), "matrices": [matrix.to_dict() for matrix in self.matrices], "block": block}


@torch.no_grad()
def reconstruct(
    teacher: StreamedModel,
    student: StreamedModel,
    kept: KeptUnits,
    blocks: torch.Tensor | Blocks,
    *,
    sink: Sink,
    micro_batch_size: int = 1,
    ridges: Sequence[float] = RIDGES,
    block: BlockConfig | None = None,
    budget: float = float("inf"),
    trail: Trail | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[LayerReport]:
    """Refit a pruned model to its teacher. Collective.

    Memory: a layer of each model, the hidden states of the samples (some seven times: the teacher's, the pruned
    model's, and what the layer at hand aims at), and the sums of the widest matrix in float64. With ``block`` also
    the states that enter the layer, a sample's activations in it, and some seven times its parameters.

    Args:
        teacher: unpruned.
        student: what :func:`nemo_minitron.pruning.prune_weights` left of it.
        kept: the units that stayed.
        blocks: ``[n, s + 1]`` calibration tokens of the teacher's vocabulary, the same on every rank; every fifth block
            is held out for the choice of the ridges. Data-parallel ranks share the blocks.
        sink: gets the new tensors of each layer, as soon as it is done.
        micro_batch_size: blocks that a layer takes at once.
        ridges: that are tried.
        block: gradient steps on each layer after least squares; None for none.
        budget: bytes of a model's hidden states that a rank keeps in memory; more of the teacher's go to a file in the
            trail's directory.
        trail: saves both models' states between layers, and says where a stopped reconstruction goes on; the layers
            before have gone to the sink. None keeps all in memory.
        progress: called with 1 for each layer of the pruned model, and for what lies after them.

    Returns:
        A report for each layer that was refitted now, and one for what lies after them.

    Raises:
        DataError: for fewer blocks than are needed to hold one out on each rank.
        NonFiniteError: if a value is NaN or infinite, naming the layer.
    """
    blocks, groups = Blocks.of(blocks), teacher.groups
    least = HELD_OUT * groups.layout.data
    if len(blocks) < least:
        raise DataError(
            f"{len(blocks)} calibration samples: every {HELD_OUT}th is held out, so at least {least} are needed on "
            f"{groups.layout.data} ranks; raise samples"
        )
    first = None if trail is None else trail.find()
    theirs = Pass(teacher, blocks, micro_batch_size, budget=budget, file=None if trail is None else trail.spill)
    ours = Pass(student, blocks, micro_batch_size)
    channels, masked = torch.tensor(kept.hidden), blocks.segments is not None
    if first is None or trail is None:
        theirs.embed()
        # What pruning left of the embedding gives the kept channels; a scaled one goes by the model's own width.
        factor = (student.shape.hidden_size / teacher.shape.hidden_size) ** 0.5 if _scaled(teacher) else 1.0
        ours.states.tensor.copy_(theirs.states.tensor[..., channels] * factor)
    else:
        ours.states.tensor.copy_(trail.load(theirs.states)["ours"])
        if progress is not None:
            progress(first)

    reports: list[LayerReport] = []
    begin = first or 0
    reached = kept.layers[begin] if 0 < begin < len(kept.layers) else 0
    for position, index in list(enumerate(kept.layers))[begin:]:
        for dropped in range(reached, index):
            theirs.through(teacher.layer(dropped))
        chunk = teacher.layer(index)
        with documents_masked([chunk], masked):
            targets = _targets(theirs, chunk, channels)
        del chunk
        reached = kept.layers[position + 1] if position + 1 < len(kept.layers) else teacher.shape.num_layers
        for dropped in range(index + 1, reached):
            theirs.through(teacher.layer(dropped))
        teacher.release()
        targets.after.tensor.copy_(theirs.states.tensor[..., channels])
        layer = Layer(ours, student.layer(position))
        entering = ours.states.tensor.clone() if block is not None else None
        fitting = LayerFitting(
            layer,
            position,
            teacher.checkpoint,
            kept,
            targets,
            dtype=student.architecture.dtype,
            ridges=ridges,
        )
        trained = None
        with documents_masked([layer.chunk], masked):
            fitting()
            if block is not None and entering is not None:
                trained = _train(layer, entering, targets.after, block, fitting)
        error = _difference(ours.states, targets.after, groups)
        reports.append(LayerReport(position, index, error, fitting.reports, trained))
        changed = {f"decoder.layers.{position}.{name}": tensor for name, tensor in fitting.changed.items()}
        sink(position, changed, reports[-1].to_dict())
        if trail is not None:
            trail.reach(position + 1, theirs.states, {"ours": ours.states.tensor})
        if progress is not None:
            progress(1)
    student.release()
    changed, matrices = fit_output(theirs, ours, kept, ridges=ridges)
    reports.append(LayerReport(None, None, None, matrices))
    sink(len(kept.layers), changed, reports[-1].to_dict())
    if progress is not None:
        progress(1)
    return reports


def _train(
    layer: Layer, entering: torch.Tensor, after: States, config: BlockConfig, fitting: LayerFitting
) -> BlockReport:
    """Gradient steps on a layer that least squares has refitted; states and changed tensors become those after them."""
    run, leaving = layer.run, layer.run.states.tensor
    run.states.tensor = entering
    training = BlockTraining(layer, after, config, seed=fitting.position, dtype=fitting.dtype)
    report = training()
    if training.changed:
        run.through(layer.chunk)
        fitting.changed |= training.changed
    else:
        run.states.tensor = leaving
    return report


def _scaled(model: StreamedModel) -> bool:
    """Embeddings are multiplied by the root of the hidden size."""
    return model.checkpoint.family.scaled_embedding


def _targets(run: Pass, chunk: Any, channels: torch.Tensor) -> Targets:
    """Run the teacher's layer, and keep what the pruned layer aims at; ``after`` is filled by the caller."""
    layer = Layer(run, chunk)
    samples, length, width = run.states.tensor.shape
    dtype = run.states.tensor.dtype
    targets = Targets(
        *(States(samples, length, width, dtype=dtype) for _ in range(2)),
        *(States(samples, length, len(channels), dtype=dtype) for _ in range(2)),
    )
    outputs = ("self_attention.linear_proj", "mlp.linear_fc2") if _normalised(layer) else ()
    targets.outputs = {name: States(samples, length, len(channels), dtype=dtype) for name in outputs}
    rows = channels.to(run.model.groups.device.torch)
    for batch in run.batches():
        start = batch[0]
        targets.attention_norm.write(
            start, layer.attention_norm(run.states.read(start, start + len(batch[1])).to(rows.device))
        )
        seen: dict[str, torch.Tensor] = {}
        watches = {"middle": layer.module.pre_mlp_layernorm} | {
            name: layer.module.get_submodule(name).post_layernorm for name in outputs
        }
        with _watching(watches, seen):
            after = layer.whole(batch)
        for value, module in ((seen["middle"], "self_attention"), (after, "mlp")):
            if not bool(torch.isfinite(value).all()):
                raise NonFiniteError(
                    f"decoder.layers.{layer.module.layer_number - 1} of the teacher: {module} is NaN or infinite; "
                    "check its weights, or reconstruct in runtime.dtype=float32"
                )
        targets.middle.write(start, seen["middle"][..., rows])
        targets.mlp_norm.write(start, layer.mlp_norm(seen["middle"]))
        for name, states in targets.outputs.items():
            states.write(start, seen[name][..., rows])
        run.states.write(start, after)
    return targets


def _watching(modules: Mapping[str, torch.nn.Module], seen: dict[str, torch.Tensor]) -> Any:
    """Within the block ``seen`` gets the inputs of modules by their names."""
    from contextlib import ExitStack

    stack = ExitStack()
    for name, module in modules.items():
        stack.enter_context(watched(module, lambda x, name=name: seen.__setitem__(name, x)))  # type: ignore[misc]
    return stack


def _normalised(layer: Layer) -> bool:
    """The outputs of attention and MLP are normalised before they are added to the residual stream."""
    return hasattr(layer.module.self_attention.linear_proj, "post_layernorm")


def _difference(ours: States, theirs: States, groups: Any) -> float:
    import torch.distributed as dist

    sums = torch.zeros(2, dtype=torch.float64)
    for mine, other in zip(ours.tensor, theirs.tensor, strict=True):
        sums[0] += (mine.double() - other.double()).square().sum()
        sums[1] += other.double().square().sum()
    sums = sums.to(groups.device.torch)
    dist.all_reduce(sums, group=groups.dp)
    return float(sums[0] / sums[1])
