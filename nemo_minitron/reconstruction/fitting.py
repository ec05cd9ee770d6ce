"""Refit the matrices of one layer of a pruned model to its teacher's hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from nemo_minitron import axes
from nemo_minitron.axes import Axis, KeptUnits
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.weights import torch_dtype
from nemo_minitron.config import HELD_OUT
from nemo_minitron.errors import NonFiniteError
from nemo_minitron.reconstruction.few_tokens import Tokens, make_sums, solve
from nemo_minitron.reconstruction.least_squares import RIDGES, Fit, Sums
from nemo_minitron.reconstruction.parts import Batch, Layer
from nemo_minitron.reconstruction.scales import ChannelSums
from nemo_minitron.runtime.groups import Groups
from nemo_minitron.runtime.model import ACTIVATIONS
from nemo_minitron.streamed import Pass, States

__all__ = ["LayerFitting", "MatrixReport", "Targets", "held_out", "tokens_of_all"]

#: Inputs ``[tokens, k]``, targets ``[tokens, m]`` and the tokens' samples ``[tokens]`` within a micro-batch.
Pairs = Callable[[Batch], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass
class Targets:
    """What a layer of the pruned model aims at, for this rank's samples; from the teacher's layer.

    Attributes:
        attention_norm, mlp_norm: ``[n, s, H]``, what the teacher's attention and MLP read.
        middle: ``[n, s, h]``, its hidden states after attention, in the kept channels.
        after: ``[n, s, h]``, its hidden states before the next kept layer, in the kept channels.
        outputs: ``[n, s, h]`` by module, what its projections give before they are normalised, in families that
            normalise them; empty elsewhere.
    """

    attention_norm: States
    mlp_norm: States
    middle: States
    after: States
    outputs: dict[str, States] = field(default_factory=dict)


@dataclass(frozen=True)
class MatrixReport:
    """What became of a matrix or scale.

    Attributes:
        name: canonical name below the layer, or of a tensor outside the layers.
        ridge: that was chosen; None where the pruned tensor stays.
        before, after: error on held-out calibration tokens, relative to the targets' power.
        short: there were fewer tokens than columns.
    """

    name: str
    ridge: float | None
    before: float
    after: float
    short: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


class LayerFitting:
    """Refit one layer, each matrix on what the ones before it, already refitted, give.

    Matrices that read the residual stream aim at the teacher's outputs of the kept rows. Those that write to it aim at
    the teacher's stream after the part, in the kept channels, less the pruned model's own stream before it: so they
    make up for the error of all earlier layers, and of layers that were dropped. Every token counts alike: weights of
    one over a token's size in the stream, which take the few tokens with massive activations (arXiv 2402.17762) for no
    more than the others, leave larger held-out losses of SmolLM2 (by 0.01 to 0.09 nats).

    Args:
        layer: of the pruned model, with its weights; they are replaced.
        position: its number in the pruned model.
        teacher: the whole model's checkpoint.
        kept: units of it that stayed.
        targets: of this layer.
        dtype: of the pruned model's checkpoint, to which every solution is rounded.
        ridges: that are tried.

    Attributes:
        changed: the tensors that were replaced, by name below the layer, in ``dtype``.
        reports: of every matrix and scale, in order.
    """

    def __init__(
        self,
        layer: Layer,
        position: int,
        teacher: Checkpoint,
        kept: KeptUnits,
        targets: Targets,
        *,
        dtype: str,
        ridges: Sequence[float] = RIDGES,
    ) -> None:
        self.layer, self.position, self.teacher, self.kept, self.targets = layer, position, teacher, kept, targets
        self.run: Pass = layer.run
        self.groups = self.run.model.groups
        self.table = teacher.family
        self.dtype, self.ridges = torch_dtype(dtype), ridges
        self.changed: dict[str, torch.Tensor] = {}
        self.reports: list[MatrixReport] = []

    @torch.no_grad()
    def __call__(self) -> None:
        """Refit the layer; the states of the pass are those that leave it.

        Raises:
            NonFiniteError: if a value is NaN or infinite, naming layer and module.
        """
        layer, targets, run = self.layer, self.targets, self.run
        states = run.states

        self._norm("self_attention.linear_qkv.layer_norm", layer.attention_norm, targets.attention_norm, states)
        self._reader("self_attention.linear_qkv", layer.attention_norm, targets.attention_norm, states)
        self._writer("self_attention.linear_proj", layer.heads, targets.middle, states)

        middle = States(*states.tensor.shape, dtype=states.tensor.dtype)
        for batch in run.batches():
            middle.write(batch[0], self._finite(layer.middle(batch), "self_attention"))

        if layer.mixture:
            self._norm("pre_mlp_layernorm", layer.mlp_norm, targets.mlp_norm, middle)
            self._reader("mlp.router", layer.mlp_norm, targets.mlp_norm, middle)
            self._experts(middle)
        else:
            self._norm("mlp.linear_fc1.layer_norm", layer.mlp_norm, targets.mlp_norm, middle)
            self._reader("mlp.linear_fc1", layer.mlp_norm, targets.mlp_norm, middle)

            def neurons(batch: Batch) -> torch.Tensor:
                return layer.neurons(self._read(middle, batch))

            self._writer("mlp.linear_fc2", neurons, targets.after, middle)
        for batch in run.batches():
            before = self._read(middle, batch)
            states.write(batch[0], self._finite(before + layer.mlp(before), "mlp"))

    # ------------------------------------------------------------------------------------------------- kinds of tensors

    def _reader(self, name: str, norm: Callable[[torch.Tensor], torch.Tensor], targets: States, states: States) -> None:
        """A matrix that reads the residual stream through a norm: it aims at the teacher's outputs of the kept rows."""
        bias = f"{name}.bias" if f"{name}.bias" in self.layer.parameters else None

        def pairs(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            ours, theirs = norm(self._read(states, batch)), self._read(targets, batch)
            return _tokens(*((_with_one(ours), _with_one(theirs)) if bias else (ours, theirs)))

        fitted, held = self._sums(pairs, name, square=True)
        whole = self._teachers(f"{name}.weight")
        start = self.layer.parameters[f"{name}.weight"]
        if bias:
            whole = torch.cat([whole, self._teachers(bias)[:, None]], dim=1)
            start = torch.cat([start, self.layer.parameters[bias][:, None]], dim=1)
        fit = solve(start, fitted.mapped(whole), held.mapped(whole), ridges=self.ridges)
        self._take(f"{name}.weight", fit, fit.weight[:, :-1] if bias else fit.weight)
        if bias and fit.ridge is not None:
            self._put(bias, fit.weight[:, -1])

    def _writer(self, name: str, inputs: Callable[[Batch], torch.Tensor], after: States, before: States) -> None:
        """A matrix that writes to the residual stream: it aims at the teacher's after it, less the own before it."""
        outputs = self.targets.outputs.get(name)

        def missing(batch: Batch) -> torch.Tensor:
            return self._read(after, batch) - self._read(before, batch)

        def pairs(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return _tokens(inputs(batch), missing(batch) if outputs is None else self._read(outputs, batch))

        fitted, held = self._sums(pairs, name)
        fit = solve(self.layer.parameters[f"{name}.weight"], fitted, held, ridges=self.ridges)
        self._take(f"{name}.weight", fit, fit.weight)
        if outputs is not None:
            # The norm after it takes up what the streams differ by, channel by channel.
            module = self.layer.module.get_submodule(name)
            scale = f"{name}.post_layernorm.weight"

            def normalised(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
                output = module.post_layernorm(torch.nn.functional.linear(inputs(batch), module.weight))
                return _tokens(output, missing(batch))

            self._scales(scale, normalised)

    def _norm(self, name: str, norm: Callable[[torch.Tensor], torch.Tensor], targets: States, states: States) -> None:
        """The scale of a norm: fewer channels have another mean square. One factor for all of its channels."""
        if len(self.kept.hidden) == self.teacher.shape.hidden_size:
            return
        weight, bias = _names_of_norm(name)
        kept = self._kept_channels()
        shift = self.layer.parameters.get(bias)

        def pairs(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            ours, theirs = norm(self._read(states, batch)), self._read(targets, batch)[..., kept]
            if shift is not None:
                ours, theirs = ours - shift, theirs - shift
            samples = _tokens(ours, theirs)[2].repeat_interleave(len(kept))
            return ours.flatten()[:, None], theirs.flatten()[:, None], samples

        fitted, held = self._sums(pairs, name)
        fit = solve(torch.ones(1, 1, device=self.groups.device.torch), fitted, held, ridges=[1e-6])
        self._scale(weight, fit, fit.weight[0])

    def _scales(self, name: str, pairs: Pairs) -> None:
        """The scale of a norm, each channel by itself."""
        sums = [ChannelSums(len(self.kept.hidden), self.groups.device.torch) for _ in range(2)]
        for batch in self.run.batches():
            ours, theirs, samples = pairs(batch)
            held = held_out(self.groups, batch[0], len(batch[1]))[samples]
            for which in (0, 1):
                chosen = held == bool(which)
                sums[which].add(ours[chosen].double(), theirs[chosen].double())
        for part_sums in sums:
            part_sums.all_reduce(self.groups.dp)
        fit = sums[0].solve(sums[1], self.ridges)
        self._scale(name, fit, fit.weight[0])

    def _experts(self, middle: States) -> None:
        """The experts of a mixture, each by the tokens that reach it in the pruned model.

        First what they read, and what they write, each expert by itself: it aims at what the teacher's expert gives for
        the same tokens. Then what they write once more, one after the other: each takes up what the streams still
        differ by at its tokens, after the ones before it.
        """
        layer = self.layer
        for expert in range(len(layer.module.mlp.experts.local_experts)):
            self._expert_reader(expert, middle)
            self._expert_output(expert, middle)
        missing = States(*middle.tensor.shape, dtype=middle.tensor.dtype)
        for batch in self.run.batches():
            before = self._read(middle, batch)
            missing.write(batch[0], self._read(self.targets.after, batch) - before - layer.mlp(before))
        for expert in range(len(layer.module.mlp.experts.local_experts)):
            self._expert_writer(expert, middle, missing)

    def _expert_reader(self, expert: int, middle: States) -> None:
        name = f"{axes.EXPERTS}{expert}.linear_fc1.weight"

        def pairs(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            ours = self.layer.mlp_norm(self._read(middle, batch))
            x, y, samples = _tokens(ours, self._read(self.targets.mlp_norm, batch))
            reached = self.layer.routing(ours)[:, expert]
            return x[reached], y[reached], samples[reached]

        fitted, held = self._sums(pairs, name, square=True)
        whole = self._teachers(name)
        fit = solve(self.layer.parameters[name], fitted.mapped(whole), held.mapped(whole), ridges=self.ridges)
        self._take(name, fit, fit.weight)

    def _expert_output(self, expert: int, middle: States) -> None:
        name = f"{axes.EXPERTS}{expert}.linear_fc2.weight"
        theirs = self._teachers_expert(expert)

        def pairs(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            before = self._read(middle, batch)
            normed = self.layer.mlp_norm(before)
            reached = self.layer.routing(normed)[:, expert]
            _, y, samples = _tokens(normed, self._read(self.targets.mlp_norm, batch))
            share = self.layer.shares(normed)[reached, expert]
            return self.layer.expert_neurons(expert, before), share[:, None] * theirs(y[reached]), samples[reached]

        fitted, held = self._sums(pairs, name)
        fit = solve(self.layer.parameters[name], fitted, held, ridges=self.ridges)
        self._take(name, fit, fit.weight)

    def _teachers_expert(self, expert: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """``[tokens, H] -> [tokens, h]``, what an expert of the teacher gives in the kept channels."""
        place = f"decoder.layers.{self.position}.{axes.EXPERTS}{expert}."
        up, down = (
            self.teacher.weights.tensor(self.kept.source(f"{place}{name}.weight")).to(
                self.groups.device.torch, self.run.model.dtype
            )
            for name in ("linear_fc1", "linear_fc2")
        )
        activation, kept = ACTIVATIONS[self.table.activation], self._kept_channels()

        def output(x: torch.Tensor) -> torch.Tensor:
            gate, value = torch.nn.functional.linear(x, up).chunk(2, dim=-1)
            return torch.nn.functional.linear(activation(gate) * value, down[kept])

        return output

    def _expert_writer(self, expert: int, middle: States, missing: States) -> None:
        name = f"{axes.EXPERTS}{expert}.linear_fc2.weight"
        weight = self.layer.parameters[name]

        def parts(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            """``[tokens, F]`` inputs, with the router's weight in them; which tokens; and the samples of all."""
            before = self._read(middle, batch)
            reached = self.layer.routing(self.layer.mlp_norm(before))[:, expert]
            return self.layer.expert_neurons(expert, before), reached, _tokens(before, before)[2]

        def pairs(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            x, reached, samples = parts(batch)
            left = self._read(missing, batch).flatten(0, 1)[reached]
            return x, left + torch.nn.functional.linear(x, weight), samples[reached]

        fitted, held = self._sums(pairs, name)
        was = weight.clone()
        fit = solve(weight, fitted, held, ridges=self.ridges)
        self._take(name, fit, fit.weight)
        if fit.ridge is None:
            return
        for batch in self.run.batches():
            x, reached, _ = parts(batch)
            left = self._read(missing, batch)
            flat = left.flatten(0, 1).clone()
            flat[reached] -= torch.nn.functional.linear(x, weight - was)
            missing.write(batch[0], flat.view_as(left))

    # ------------------------------------------------------------------------------------------------------- the pieces

    def _sums(self, pairs: Pairs, name: str, *, square: bool = False) -> tuple[Sums, Sums] | tuple[Tokens, Tokens]:
        """Sums over the tokens that are solved for, and over those that are held out; of all ranks. Collective."""
        both: list[Any] = []
        most = tokens_of_all(self.run)
        for batch in self.run.batches():
            inputs, targets, samples = pairs(batch)
            self._finite(inputs, f"{name} (its input)")
            if not both:
                sizes, device = (inputs.shape[-1], targets.shape[-1]), inputs.device
                # The power of the targets that are solved for is not asked for.
                both = [make_sums(*sizes, most, square=square and held, device=device) for held in (False, True)]
            out = held_out(self.groups, batch[0], len(batch[1]))[samples]
            for sums, chosen in zip(both, (~out, out), strict=True):
                sums.add(inputs[chosen], targets[chosen])
        for sums in both:
            sums.all_reduce(self.groups.dp)
        return both[0], both[1]

    def _read(self, states: States, batch: Batch) -> torch.Tensor:
        """``[s, b, ...]`` states of the samples of a micro-batch."""
        return states.read(batch[0], batch[0] + len(batch[1])).to(self.groups.device.torch)

    def _teachers(self, name: str) -> torch.Tensor:
        """The teacher's tensor with the kept rows and all columns, in float64."""
        whole = f"decoder.layers.{self.position}.{name}"
        row = axes.parameter(self.table, whole)
        tensor = self.teacher.weights.tensor(self.kept.source(whole))
        rows = axes.axis_rows(row.axes[0], self.teacher.shape, self.kept, self.position, row.expert)
        if rows is not None:
            tensor = tensor.index_select(0, rows)
        return tensor.to(self.groups.device.torch, torch.float64)

    def _kept_channels(self) -> torch.Tensor:
        rows = axes.axis_rows(Axis.HIDDEN, self.teacher.shape, self.kept, None)
        assert rows is not None
        return rows.to(self.groups.device.torch)

    def _take(self, name: str, fit: Fit, weight: torch.Tensor) -> None:
        self.reports.append(MatrixReport(name, fit.ridge, fit.before, fit.after, fit.short))
        if fit.ridge is not None:
            self._put(name, weight)

    def _scale(self, name: str, fit: Fit, factor: torch.Tensor) -> None:
        """Multiply a norm's scale."""
        self.reports.append(MatrixReport(name, fit.ridge, fit.before, fit.after, fit.short))
        if fit.ridge is None:
            return
        weight = self.layer.parameters[name].double()
        centre = 1.0 if self.table.zero_centered_norm else 0.0
        self._put(name, (weight + centre) * factor - centre)

    def _put(self, name: str, value: torch.Tensor) -> None:
        """Replace a tensor, rounded to the checkpoint's dtype; ranks take that of the first."""
        parameter = self.layer.parameters[name]
        rounded = value.to(self.dtype).contiguous()
        dist.broadcast(rounded, dist.get_global_rank(self.groups.dp, 0), group=self.groups.dp)
        parameter.copy_(rounded)
        self.changed[name] = rounded.cpu()

    def _finite(self, value: torch.Tensor, module: str) -> torch.Tensor:
        """The value, if it is finite."""
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"decoder.layers.{self.position} of the pruned model: {module} is NaN or infinite; check its weights, "
                "or reconstruct in runtime.dtype=float32"
            )
        return value


def held_out(groups: Groups, start: int, samples: int) -> torch.Tensor:
    """``[b]`` bool, which samples of a micro-batch are held out: by their number among all ranks' samples.

    They take part in the choice of the ridges and not in the solutions that it is made by.

    Args:
        groups: of this process.
        start: this rank's number of the first sample.
        samples: ``b``.
    """
    numbers = (start + torch.arange(samples)) * groups.layout.data + groups.dp_rank
    return (numbers % HELD_OUT == HELD_OUT - 1).to(groups.device.torch)


def tokens_of_all(run: Pass) -> int:
    """Number of tokens of all data-parallel ranks. Collective."""
    groups = run.model.groups
    count = torch.tensor([run.blocks.sequence_length * len(run.blocks)], device=groups.device.torch)
    dist.all_reduce(count, group=groups.dp)
    return int(count)


def _tokens(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[s, b, k]`` and ``[s, b, m]`` -> ``[s * b, k]``, ``[s * b, m]`` and the samples ``[s * b]``."""
    length, samples = inputs.shape[:2]
    numbers = torch.arange(samples, device=inputs.device).repeat(length)
    return inputs.flatten(0, 1), targets.flatten(0, 1), numbers


def _with_one(x: torch.Tensor) -> torch.Tensor:
    """``[..., k]`` -> ``[..., k + 1]``, a 1 at the end: the column of a bias."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)


def _names_of_norm(name: str) -> tuple[str, str]:
    """Names of a norm's scale and shift."""
    joint = "_" if name.endswith("layer_norm") else "."
    return f"{name}{joint}weight", f"{name}{joint}bias"
