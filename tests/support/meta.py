"""Models of real sizes on the meta device: one rank of a large world, without its other processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemo_minitron.planning import Model

__all__ = ["rank_of_world"]


@contextmanager
def rank_of_world(layout: Any, rank: int) -> Iterator[Any]:
    """Megatron's groups as ``rank`` of ``layout`` sees them; collectives do nothing.

    Args:
        layout: :class:`~nemo_minitron.runtime.groups.ParallelLayout`.
        rank: global.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from nemo_minitron.runtime.groups import current, destroy

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1)
        yield current(layout)
    finally:
        destroy()


def meta_chunks(model: Model, groups: Any) -> list[Any]:
    """This rank's part of a model, bf16, without memory."""
    from nemo_minitron.runtime.model import build_model

    with torch.device("meta"):
        return list(build_model(model.shape, model.architecture, groups, dtype=torch.bfloat16))
