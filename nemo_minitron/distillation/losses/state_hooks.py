"""Intermediate losses on a live Megatron student, under any layout, on any pipeline stage.

A forward hook on a mapped module computes the loss from its rank's part of the state. It passes the state on unchanged,
through an autograd function that adds the loss's gradient in the backward pass (as Megatron does with the auxiliary
losses of its experts, ``MoEAuxLossAutoScaler``). So each loss is taken on the stage of its layer, and the schedule,
which only knows the loss of the last stage, needs no change.

What makes gradients right, stage by stage: the losses are sums over valid tokens, which Megatron divides by the tokens
of the global batch (``calculate_per_token_loss``). Hidden states are whole on each tensor-parallel rank, where Megatron
expects whole gradients, so every rank adds the same; under sequence parallelism each rank adds the loss of its own
tokens, and the projections are marked for Megatron's all-reduce over the tensor-parallel group. Attention relations are
of disjoint relation heads on each rank. Context-parallel ranks have other tokens, as data-parallel ones do; attention
relations alone need those of the others, and gather them. No other collective runs inside the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from nemo_minitron import axes
from nemo_minitron.config import IntermediateConfig
from nemo_minitron.distillation.losses.layer_maps import LayerMaps, layer_ranks
from nemo_minitron.distillation.losses.states import attention_relations
from nemo_minitron.distillation.losses.table import STATE_LOSSES
from nemo_minitron.errors import ConfigError, NonFiniteError
from nemo_minitron.runtime.context import whole_sequence
from nemo_minitron.runtime.groups import Groups
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from nemo_minitron.distillation.losses.balance import Balance

__all__ = ["Plan", "Site", "StudentLosses", "TeacherStates", "initial_projection"]


class Site(NamedTuple):
    """Where a state is read: "hidden" (a layer's output), "attention" (its projected queries, keys and values) or
    "embedding" (layer -1).
    """

    part: str
    layer: int = -1


@dataclass(frozen=True)
class Plan:
    """All configured losses, and the pipeline ranks of their layers. The same on all ranks.

    Attributes:
        config: the losses.
        student, teacher: shapes.
        sites: the student's site -> the teacher's.
        student_ranks, teacher_ranks: pipeline rank of each layer.
    """

    config: IntermediateConfig
    student: ModelShape
    teacher: ModelShape
    sites: dict[Site, Site]
    student_ranks: list[int]
    teacher_ranks: list[int]

    @classmethod
    def of(
        cls, config: IntermediateConfig, maps: LayerMaps, student: ModelShape, teacher: ModelShape, groups: Groups
    ) -> Plan:
        """The plan for a configuration and its layer maps under a layout."""
        sites = {Site("hidden", ours): Site("hidden", theirs) for ours, theirs in maps.hidden.items()}
        sites |= {Site("attention", ours): Site("attention", theirs) for ours, theirs in maps.attention.items()}
        if config.embedding is not None:
            sites[Site("embedding")] = Site("embedding")
        ranks = (layer_ranks(shape, groups.layout) for shape in (student, teacher))
        return cls(config, student, teacher, dict(sorted(sites.items())), *ranks)

    def moves(self) -> list[tuple[Site, int, int]]:
        """The states to be sent, ``(teacher's site, from rank, to rank)``, each once, in the same order everywhere."""
        moves = {
            (theirs, self.teacher_ranks[theirs.layer], self.student_ranks[ours.layer])
            for ours, theirs in self.sites.items()
            if ours.part != "embedding"
        }
        return sorted(move for move in moves if move[1] != move[2])

    def weight(self, site: Site) -> float:
        """Weight of a site's loss: the weight of its kind divided by the number of sites of that kind."""
        return self.config.weights()[site.part] / sum(other.part == site.part for other in self.sites)


def _modules(chunk: GPTModel) -> Iterator[tuple[Site, torch.nn.Module]]:
    """The modules of a chunk whose outputs are the states, by site."""
    if chunk.pre_process:
        yield Site("embedding"), chunk.embedding
    for layer in chunk.decoder.layers:
        yield Site("hidden", layer.layer_number - 1), layer
        yield Site("attention", layer.layer_number - 1), layer.self_attention.linear_qkv


def _first(output: Any) -> torch.Tensor:
    """The state in a module's output: layers return ``(hidden, context)``, Megatron's linears ``(output, bias)``."""
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


class TeacherStates:
    """Keeps the teacher's states of a step's micro-batches, and brings them to the ranks of the student's layers.

    Memory: for each micro-batch of a step and each mapped layer ``[s (/tp), b, H]`` of the teacher, of attention
    relations ``[s, b, (heads + 2 groups) head_dim / tp]``. Communication: the same, once a step, point to point, for
    layers that live on another pipeline rank than the student's.
    """

    def __init__(self, plan: Plan, chunks: Sequence[GPTModel], groups: Groups) -> None:
        self.plan = plan
        self.groups = groups
        self._kept: dict[Site, list[torch.Tensor]] = {}
        self._chunks = chunks

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Within the block, the states of the teacher's forward passes are kept."""
        wanted = set(self.plan.sites.values())
        self._kept = {}
        handles = [
            module.register_forward_hook(self._keeper(site))
            for chunk in self._chunks
            for site, module in _modules(chunk)
            if site in wanted
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keeper(self, site: Site) -> Callable[..., None]:
        kept = self._kept.setdefault(site, [])

        def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            # Another view of the same memory: the schedule may free its own.
            kept.append(_first(output).detach())

        return keep

    def exchanged(self, micro_batches: int, micro_batch_size: int, sequence: int) -> list[dict[Site, torch.Tensor]]:
        """The states that this rank's student layers need, by the student's site, of each micro-batch.

        Called on every rank after the teacher's pass, with the number and sizes of its micro-batches.
        """
        rank, plan = self.groups.pp_rank, self.plan
        received: dict[Site, list[torch.Tensor]] = {}
        messages = []
        for site, source, target in plan.moves():
            if rank == source:
                tensors, post, peer = [t.contiguous() for t in self._kept[site]], dist.isend, target
            elif rank == target:
                tensors = [self._empty(site, micro_batch_size, sequence) for _ in range(micro_batches)]
                received[site], post, peer = tensors, dist.irecv, source
            else:
                continue
            address = dist.get_global_rank(self.groups.pp, peer)
            messages += [dist.P2POp(post, tensor, address, group=self.groups.pp) for tensor in tensors]
        for work in dist.batch_isend_irecv(messages) if messages else []:
            work.wait()
        available = {**self._kept, **received}
        self._kept = {}
        needed = {
            student_site: available[teacher_site]
            for student_site, teacher_site in plan.sites.items()
            if rank == (0 if student_site.part == "embedding" else plan.student_ranks[student_site.layer])
        }
        return [{site: states[index] for site, states in needed.items()} for index in range(micro_batches)]

    def _empty(self, site: Site, micro_batch_size: int, sequence: int) -> torch.Tensor:
        layout, shape = self.groups.layout, self.plan.teacher
        sequence //= layout.context
        if site.part == "attention":
            channels = (shape.num_attention_heads + 2 * shape.num_query_groups) * shape.head_dim // layout.tensor
        else:
            channels = shape.hidden_size
            sequence //= layout.tensor if layout.sequence_parallel else 1
        parameter = next(self._chunks[0].parameters())
        return torch.empty(sequence, micro_batch_size, channels, dtype=parameter.dtype, device=parameter.device)


class StudentLosses:
    """The intermediate losses of one chunk of the student.

    Adds to the chunk, where the widths of the models differ, a module ``intermediate`` with the learned projections
    ``[H_t, H_s]`` of its sites: they train, are clipped and are saved with the student.

    Memory: of each mapped layer the loss's own float32 states, from the forward pass of a micro-batch to its backward
    pass; of attention relations three ``[b, R/tp, s (/cp), s]`` of each model.

    Args:
        plan: the losses.
        chunk: a Megatron ``GPTModel``, filled.
        groups: of this process.
        balance: weighs the losses and gathers their values.

    Raises:
        ConfigError: if the model recomputes whole layers in the backward pass, where hooks would run twice.
    """

    def __init__(self, plan: Plan, chunk: GPTModel, groups: Groups, balance: Balance) -> None:
        if chunk.config.recompute_granularity == "full":
            raise ConfigError(
                "recompute_granularity=full: intermediate losses are taken in hooks, which recomputed layers would run "
                "twice; use selective, or no intermediate losses"
            )
        self.plan, self.groups, self.balance = plan, groups, balance
        self.config = chunk.config
        self._batch: dict[str, Any] | None = None
        self._states: dict[Site, torch.Tensor] = {}
        here = [(site, module) for site, module in _modules(chunk) if site in plan.sites]
        self._projections = self._add_projections(chunk, [site for site, _ in here])
        for site, module in here:
            module.register_forward_hook(self._hook(site))

    def _add_projections(self, chunk: GPTModel, sites: list[Site]) -> dict[Site, torch.nn.Linear]:
        student, teacher = self.plan.student.hidden_size, self.plan.teacher.hidden_size
        projections = {}
        for site in sites:
            if site.part == "attention" or student == teacher:
                continue
            linear = torch.nn.Linear(student, teacher, bias=False, dtype=self.config.params_dtype)
            with torch.no_grad():
                linear.weight.copy_(initial_projection(site.layer, student, teacher))
            linear.weight.sequence_parallel = self.groups.layout.sequence_parallel
            projections[site] = linear.to(next(chunk.parameters()).device)
        if projections:
            names = {site: "embedding" if site.layer < 0 else f"hidden_{site.layer}" for site in projections}
            chunk.intermediate = torch.nn.ModuleDict({names[site]: linear for site, linear in projections.items()})
        return projections

    @contextmanager
    def micro_batch(self, batch: dict[str, Any], states: dict[Site, torch.Tensor]) -> Iterator[None]:
        """Within the block, the chunk's forward pass computes the losses.

        Args:
            batch: with ``loss_mask`` ``[b, s (/cp)]`` and ``attention_mask`` ``[b or 1, 1, s (/cp), s]``.
            states: of the teacher, by the student's site; those of this chunk are removed from the mapping.
        """
        self._batch, self._states = batch, states
        try:
            yield
        finally:
            self._batch, self._states = None, {}

    def _hook(self, site: Site) -> Callable[..., Any]:
        def attach(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
            if self._batch is None:
                return None
            state = _first(output)
            loss = self._loss(site, state)
            self.balance.add(site.part, self.plan.weight(site) * loss.detach(), shared=self._shared(site))
            if not torch.is_grad_enabled():
                return None
            scaled = loss * (self.plan.weight(site) * self.balance.alpha)
            attached = _attached(state, scaled, self.config.grad_scale_func)
            return (attached, *output[1:]) if isinstance(output, tuple) else attached

        return attach

    def _shared(self, site: Site) -> bool:
        """Whether every tensor-parallel rank has the whole value of a loss, not a part of its sum."""
        return site.part != "attention" and not self.groups.layout.sequence_parallel

    def _loss(self, site: Site, state: torch.Tensor) -> torch.Tensor:
        """Sum over this rank's valid tokens.

        Args:
            site: where.
            state: ``[s (/tp), b, H]``, or ``[s, b, (heads + 2 groups) head_dim / tp]``.

        Raises:
            NonFiniteError: before any gradient is computed.
        """
        assert self._batch is not None
        theirs, mask = self._states.pop(site), self._batch["loss_mask"].float().T
        if site.part == "attention":
            losses = self._relations(state, theirs).T
        else:
            if self.groups.layout.sequence_parallel:
                mask = mask.chunk(self.groups.layout.tensor)[self.groups.tp_rank]
            kind = self.plan.config.hidden if site.part == "hidden" else self.plan.config.embedding
            assert kind is not None
            projection = self._projections[site].weight if site in self._projections else None
            losses = STATE_LOSSES[kind].function(state, theirs, projection)
        loss = (losses * mask).sum()
        if not torch.isfinite(loss):
            where = f"layer {site.layer}" if site.layer >= 0 else "the embedding"
            raise NonFiniteError(
                f"the {site.part} loss of {where} is {loss.item()}; nothing was updated. "
                "Lower lr, raise warmup_steps, or look for damaged weights with `minitron evaluate`"
            )
        return loss

    def _relations(self, student_states: torch.Tensor, teacher_states: torch.Tensor) -> torch.Tensor:
        """This rank's part of the attention relations' loss, ``[b, s]``: that of its own relation heads."""
        assert self._batch is not None
        heads, layout = self.plan.config.relation_heads, self.groups.layout
        assert heads is not None
        tensor, models = layout.tensor, ((student_states, self.plan.student), (teacher_states, self.plan.teacher))
        columns = None
        if layout.context > 1:
            student_whole, teacher_whole = (
                _queries_keys_values(whole_sequence(mixed, self.groups.cp), shape) for mixed, shape in models
            )
            columns = student_whole, teacher_whole
        local = attention_relations(
            _queries_keys_values(student_states, self.plan.student),
            _queries_keys_values(teacher_states, self.plan.teacher),
            heads=heads // tensor,
            masked=self._batch["attention_mask"][:, 0].to(student_states.device),
            columns=columns,
        )
        return local / tensor


def initial_projection(layer: int, student: int, teacher: int) -> torch.Tensor:
    """``[teacher, student]`` float32, normal, of the variance that keeps a state's size; -1 is the embedding's.

    Drawn by the layer and not by the rank, so the same under every layout.
    """
    generator = torch.Generator().manual_seed(layer + 1)
    return torch.randn(teacher, student, generator=generator) * student**-0.5


def _queries_keys_values(mixed: torch.Tensor, shape: ModelShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[s, b, (heads + 2 groups) head_dim / tp]`` as Megatron mixes them, group by group -> three ``[b, s, C/tp]``."""
    queries, keys, values = axes.split_qkv(mixed.transpose(0, 1), shape, dim=-1)
    return queries, keys, values


def _attached(state: torch.Tensor, loss: torch.Tensor, grad_scale_func: Any) -> torch.Tensor:
    """``state``, through which the gradient of ``loss`` joins the backward pass, scaled as Megatron scales its own."""
    from megatron.core.utils import make_viewless_tensor

    scale = 1.0 if grad_scale_func is None else float(grad_scale_func(torch.ones(1, device=state.device)))
    # What leaves a pipeline stage must be no view: the schedule frees its memory.
    attached: torch.Tensor = make_viewless_tensor(
        _Attach.apply(state, loss, scale), requires_grad=True, keep_graph=True
    )
    return attached


class _Attach(torch.autograd.Function):
    """The identity on a state; in the backward pass the loss's gradient is its scale."""

    @staticmethod
    def forward(ctx: Any, state: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(loss)
        ctx.scale = scale
        return state

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (loss,) = ctx.saved_tensors
        return gradients[0], torch.full_like(loss, ctx.scale), None
