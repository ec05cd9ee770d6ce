"""Process groups, made once and passed by value.

:func:`initialize` starts ``torch.distributed`` and Megatron's parallel state (whose modules read their groups from
there) and returns a :class:`Groups`. The algorithms of this suite take it as an argument and read no globals.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from nemo_minitron.config import ParallelLayout
from nemo_minitron.errors import ConfigError
from nemo_minitron.runtime import cpu
from nemo_minitron.runtime.device import Device

__all__ = ["Groups", "ParallelLayout", "SecondLayout", "current", "current_groups", "destroy", "initialize"]


@dataclass(frozen=True)
class Groups:
    """This process's groups and its place in them.

    Attributes:
        layout: the layout they were made for.
        tp, pp, dp, cp: tensor-, pipeline-, data- and context-parallel process groups.
        dp_cp: data- and context-parallel ranks together: the ranks that process different tokens.
        model: all ranks that hold a part of this replica of the model (tensor x pipeline).
        ep: data-parallel ranks that share the experts of a mixture.
        tp_ep: tensor- and expert-parallel ranks together, whose tokens meet in an expert.
        device: of this process.
    """

    layout: ParallelLayout
    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup
    model: dist.ProcessGroup
    ep: dist.ProcessGroup
    tp_ep: dist.ProcessGroup
    device: Device

    def without_sequence_parallel(self) -> Groups:
        """The same groups without sequence parallelism, for sequences whose lengths are no multiples of tp."""
        return replace(self, layout=replace(self.layout, sequence_parallel=False))

    @property
    def tp_rank(self) -> int:
        """Place in the tensor-parallel group."""
        return dist.get_rank(self.tp)

    @property
    def pp_rank(self) -> int:
        """Pipeline stage, which is the place in the pipeline-parallel group."""
        return dist.get_rank(self.pp)

    @property
    def dp_rank(self) -> int:
        """Place in the data-parallel group."""
        return dist.get_rank(self.dp)

    @property
    def cp_rank(self) -> int:
        """Place in the context-parallel group."""
        return dist.get_rank(self.cp)

    @property
    def ep_rank(self) -> int:
        """Place in the expert-parallel group."""
        return dist.get_rank(self.ep)

    @property
    def is_first_stage(self) -> bool:
        """Whether this pipeline stage holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this pipeline stage holds the output layer."""
        return self.pp_rank == self.layout.pipeline - 1

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints, and writes the files that only one rank may write."""
        return dist.get_rank() == 0


def initialize(
    layout: ParallelLayout, *, device: Device | None = None, seed: int = 1234, timeout_minutes: float = 30.0
) -> Groups:
    """Start ``torch.distributed`` (gloo on CPU, NCCL on CUDA) and Megatron's groups for ``layout``.

    A process that no launcher started (no ``RANK`` in its environment) becomes a world of one.

    Args:
        layout: must fill the world exactly.
        device: of this process; None for what was decided on at its start.
        seed: of Megatron's random-state tracker, needed before a model is built.
        timeout_minutes: after which a collective that does not complete fails.

    Raises:
        ConfigError: if the layout and the number of processes differ.
    """
    device = cpu.ensure(device)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        launched = "RANK" in os.environ
        device.use()
        # Alone, neither a port nor the environment, which later processes would inherit, is needed.
        alone = {} if launched else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(device.backend, timeout=datetime.timedelta(minutes=timeout_minutes), **alone)
    world = dist.get_world_size()
    if world != layout.world_size:
        raise ConfigError(
            f"parallel.tensor={layout.tensor} x parallel.pipeline={layout.pipeline} x parallel.data={layout.data} "
            f"x parallel.context={layout.context} needs {layout.world_size} processes; {world} are running"
        )
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
    )
    model_parallel_cuda_manual_seed(seed)
    return current(layout, device)


def current(layout: ParallelLayout, device: Device | None = None) -> Groups:
    """The groups that Megatron's parallel state holds already (NeMo's strategy made them).

    Args:
        layout: the layout that they were made for.
        device: of this process; None for what was decided on at its start.
    """
    device = cpu.ensure(device)
    from megatron.core import parallel_state

    return Groups(
        layout=layout,
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        model=parallel_state.get_model_parallel_group(),
        ep=parallel_state.get_expert_model_parallel_group(),
        tp_ep=parallel_state.get_expert_tensor_and_model_parallel_group(),
        device=device,
    )


def current_groups() -> Groups:
    """The groups that Megatron's parallel state holds, with the layout that follows from their sizes.

    Raises:
        ConfigError: if Megatron's parallel state is not initialised.
    """
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        raise ConfigError("Megatron's parallel state is not initialised; start it, or pass groups=")
    return current(
        ParallelLayout(
            tensor=parallel_state.get_tensor_model_parallel_world_size(),
            pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
            data=parallel_state.get_data_parallel_world_size(),
            virtual_pipeline=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
            context=parallel_state.get_context_parallel_world_size(),
            expert=parallel_state.get_expert_model_parallel_world_size(),
        )
    )


class SecondLayout:
    """Groups of a second layout over the same processes, for a second model.

    Algorithms of this suite take groups as arguments, but Megatron's modules and schedules read the globals of
    ``megatron.core.parallel_state``. Its own ``initialize_model_parallel`` makes the second set, in globals that are
    emptied for it; within :meth:`active` they stand in the first set's place. Both are whole sets of process groups, so
    no collective of one is ever taken for one of the other.

    Every process of the world makes it, and enters :meth:`active`, at the same point of the program.

    Args:
        layout: must fill the world.

    Attributes:
        groups: of this process in the second layout.

    Raises:
        ConfigError: if the layout and the number of processes differ.
    """

    def __init__(self, layout: ParallelLayout, *, timeout_minutes: float = 30.0) -> None:
        from megatron.core import parallel_state

        if (world := dist.get_world_size()) != layout.world_size:
            raise ConfigError(
                f"a second layout of {layout.world_size} processes ({layout}) cannot lie over the {world} that run"
            )
        outer = _megatron_state()
        try:
            _set_megatron_state(dict.fromkeys(outer))
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=layout.tensor,
                pipeline_model_parallel_size=layout.pipeline,
                virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
                context_parallel_size=layout.context,
                expert_model_parallel_size=layout.expert,
                distributed_timeout_minutes=max(1, round(timeout_minutes)),
            )
            self.groups = current(layout)
            self._state = _megatron_state()
        finally:
            _set_megatron_state(outer)

    @contextmanager
    def active(self) -> Iterator[Groups]:
        """Within the block, Megatron's globals are those of the second layout."""
        outer = _megatron_state()
        _set_megatron_state(self._state)
        try:
            yield self.groups
        finally:
            self._state = _megatron_state()
            _set_megatron_state(outer)


def _megatron_state() -> dict[str, Any]:
    """The globals of ``megatron.core.parallel_state`` by name: those in capitals with an underscore before them."""
    from megatron.core import parallel_state

    return {name: value for name, value in vars(parallel_state).items() if re.fullmatch(r"_[A-Z][A-Z_]*", name)}


def _set_megatron_state(state: dict[str, Any]) -> None:
    from megatron.core import parallel_state

    vars(parallel_state).update(state)


def destroy() -> None:
    """Undo :func:`initialize`."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
