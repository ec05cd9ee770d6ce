"""Greedy generation: with transformers from a Hugging Face directory, and from a live Megatron model.

Both put a prompt through the tokenizer's chat template where there is one, so their texts can stand side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemo_minitron.errors import CheckpointError, DataError
from nemo_minitron.runtime.forward import evaluating, mask_padding
from nemo_minitron.runtime.groups import Groups

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from transformers import PreTrainedTokenizerBase

__all__ = ["Generation", "encode_prompt", "generate", "generate_megatron"]


@dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        prompt: as it was given.
        text: the answer without prompt and special tokens.
        tokens: number of tokens of the answer, an end token included.
    """

    prompt: str
    text: str
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt: one user turn through the chat template, or the plain text where there is none.

    Raises:
        DataError: for a prompt that gives no token.
    """
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise DataError(f"prompt {prompt!r} gives no token; write a longer one")
    return list(ids)


def generate(
    hf_dir: str | Path, prompts: Sequence[str], *, max_new_tokens: int, dtype: str = "float32"
) -> list[Generation]:
    """Answer each prompt greedily with transformers' own ``AutoModelForCausalLM``, in one process.

    Args:
        hf_dir: Hugging Face directory with model and tokenizer. Nothing is downloaded and no code of it runs.
        prompts: one user turn each.
        max_new_tokens: longest answer.
        dtype: of the weights.

    Raises:
        CheckpointError: if transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(hf_dir, local_files_only=True, torch_dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{hf_dir}: transformers cannot load it ({error})") from error
    model.eval()
    found = []
    for prompt in prompts:
        ids = encode_prompt(tokenizer, prompt)
        with torch.no_grad():
            output = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                # Greedy decoding has no use for the sampling settings that a generation_config.json may carry.
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
        answer = output[0, len(ids) :].tolist()
        found.append(_generation(tokenizer, prompt, answer))
    return found


def generate_megatron(
    chunks: list[GPTModel],
    groups: Groups,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    vocab_size: int,
    end_tokens: Sequence[int] = (),
) -> list[Generation]:
    """Answer each prompt greedily with a live Megatron model. To be called on every rank; every rank gets the result.

    Keys and values are cached (``megatron.core.inference``) except under sequence or virtual pipeline parallelism,
    where each new token runs over the whole text again.

    Args:
        chunks: this rank's part of the model.
        groups: of this process.
        tokenizer: of the model.
        prompts: one user turn each.
        max_new_tokens: longest answer.
        vocab_size: true vocabulary; logits beyond it are padding.
        end_tokens: ids that end an answer, beside the tokenizer's EOS.
    """
    ends = {*end_tokens, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
    found = []
    with evaluating(chunks), torch.no_grad():
        for prompt in prompts:
            ids = encode_prompt(tokenizer, prompt)
            answer = _greedy(chunks, groups, ids, max_new_tokens, vocab_size, ends)
            found.append(_generation(tokenizer, prompt, answer))
    return found


def _generation(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: list[int]) -> Generation:
    return Generation(prompt, tokenizer.decode(answer, skip_special_tokens=True).strip(), len(answer))


def _greedy(
    chunks: list[GPTModel], groups: Groups, ids: list[int], max_new_tokens: int, vocab_size: int, ends: set[int]
) -> list[int]:
    """Ids of the answer, on every rank."""
    from megatron.core.inference.contexts import StaticInferenceContext

    layout = groups.layout
    cached = not layout.sequence_parallel and not layout.virtual_pipeline
    context = StaticInferenceContext(1, len(ids) + max_new_tokens) if cached else None
    answer: list[int] = []
    todo = list(ids)
    while len(answer) < max_new_tokens:
        token = _next_token(chunks, groups, todo, vocab_size, context)
        answer.append(token)
        if token in ends:
            break
        if context is None:
            todo = [*todo, token]
        else:
            context.sequence_len_offset += len(todo)
            context.enable_decode_mode()
            todo = [token]
    return answer


def _next_token(chunks: list[GPTModel], groups: Groups, ids: list[int], vocab_size: int, context: Any) -> int:
    """The likeliest token after ``ids`` (which follow what ``context`` holds), on every rank."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    device = next(chunks[0].parameters()).device
    layout = groups.layout
    # Sequence parallelism needs a multiple of the tensor group. What stands to the right of a causal text is not seen.
    step = layout.tensor if layout.sequence_parallel else 1
    tokens = torch.tensor([ids + [0] * (-len(ids) % step)], device=device)
    start = 0 if context is None else context.sequence_len_offset
    positions = torch.arange(start, start + tokens.shape[1], device=device)[None]

    def forward_step(_: Any, model: GPTModel) -> tuple[torch.Tensor, Any]:
        logits = model(tokens, positions, None, inference_context=context)
        return logits, lambda output, non_loss_data: _best(output[0, len(ids) - 1], groups, vocab_size)

    # The interleaved schedule runs no fewer micro-batches than there are stages: all are the same.
    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None] * len(chunks) if len(chunks) > 1 else None,
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=layout.pipeline if layout.virtual_pipeline else 1,
        seq_length=tokens.shape[1],
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    best = found[0] if groups.is_last_stage else torch.zeros(1, dtype=torch.int64, device=device)
    dist.broadcast(best, src=dist.get_global_rank(groups.pp, layout.pipeline - 1), group=groups.pp)
    return int(best)


def _best(logits: torch.Tensor, groups: Groups, vocab_size: int) -> torch.Tensor:
    """``[V/tp]`` logits of this tensor-parallel rank -> ``[1]`` global index of the largest; ties go to the lowest."""
    value, index = mask_padding(logits.float(), vocab_size).max(dim=0)
    mine = torch.stack([value.double(), (index + groups.tp_rank * logits.shape[0]).double()])
    everyone = [torch.empty_like(mine) for _ in range(groups.layout.tensor)]
    dist.all_gather(everyone, mine, group=groups.tp)
    stacked = torch.stack(everyone)
    return stacked[stacked[:, 0].argmax(), 1].long()[None]
