"""The logits of a model under the layout."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from nemo_minitron.doctor.checks import Context
from nemo_minitron.runtime.forward import document_inputs, evaluating
from nemo_minitron.runtime.groups import Groups

__all__ = ["logits_of", "run"]

ROWS = 4


def run(context: Context) -> dict[str, torch.Tensor]:
    """``logits`` ``[rows, s, V]`` of the teacher."""
    groups, teacher = context.groups(), context.material.teacher
    chunks = context.model(teacher, groups)
    return {"logits": logits} if (logits := logits_of(chunks, groups, context)) is not None else {}


@torch.no_grad()
def logits_of(chunks: list[Any], groups: Groups, context: Context) -> torch.Tensor | None:
    """``[rows, s, V]`` float32 on the CPU, on one rank of the last pipeline stage; None elsewhere. Collective."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    # The interleaved schedule wants a multiple of the pipeline's length.
    blocks = context.material.blocks(ROWS * context.material.layout.pipeline, seed=2)
    tokens = blocks[:, :-1]

    def step(batches: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
        inputs = next(batches).to(next(model.parameters()).device)
        return model(inputs, *document_inputs(inputs, None)), partial(_gathered, groups=groups)

    iterators = [iter(tokens.split(1)) for _ in chunks]
    with evaluating(chunks):
        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(tokens),
            seq_length=tokens.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not groups.is_last_stage or groups.tp_rank or groups.dp_rank:
        return None
    return torch.cat(outputs)[..., : context.material.teacher.shape.vocab_size].contiguous()


def _gathered(logits: torch.Tensor, *, groups: Groups, non_loss_data: bool = True) -> torch.Tensor:
    """``[b, s, V/tp]`` of this rank -> ``[b, s, V]`` of all."""
    logits = logits.float().contiguous()
    parts = [torch.empty_like(logits) for _ in range(groups.layout.tensor)]
    dist.all_gather(parts, logits, group=groups.tp)
    return torch.cat(parts, dim=-1).cpu()
