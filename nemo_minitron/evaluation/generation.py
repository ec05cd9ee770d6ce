"""Greedy generation: with transformers from a Hugging Face directory, and from a live Megatron model.

Both put a prompt through the tokenizer's chat template if it has one, so their texts can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemo_minitron.checkpoints.tokenizer.opening import find_tokenizer
from nemo_minitron.data.chat.templates import choose_template, prompt_ids
from nemo_minitron.data.chat.turns import Message
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import CheckpointError, DataError
from nemo_minitron.generation import Sampling, generate_tokens
from nemo_minitron.runtime.groups import Groups

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from transformers import PreTrainedTokenizerBase

__all__ = ["Generation", "encode_prompt", "generate", "generate_megatron"]


@dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        prompt: the prompt, before any template.
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
        DataError: for a prompt that gives no token, or that the chat template refuses.
    """
    if tokenizer.chat_template:
        messages = [Message("user", prompt)]
        ids = prompt_ids(messages, tokenizer, choose_template(tokenizer), where=f"prompt {prompt!r}")
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise DataError(f"prompt {prompt!r} gives no token; write a longer one")
    return list(ids)


def generate(
    hf_dir: str | Path, prompts: Sequence[str], *, max_new_tokens: int, dtype: str = "float32"
) -> list[Generation]:
    """Answer each prompt greedily with transformers' own model, in one process.

    Args:
        hf_dir: Hugging Face directory with model and tokenizer. Nothing is downloaded, and none of its code runs.
        prompts: one user turn each.
        max_new_tokens: longest answer.
        dtype: of the weights.

    Raises:
        CheckpointError: if transformers cannot load it.
    """
    from nemo_minitron.checkpoints.formats.huggingface.loader import load_transformers

    try:
        model = load_transformers(Path(hf_dir), getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{hf_dir}: transformers cannot load it ({error})") from error
    tokenizer = load_tokenizer(find_tokenizer(Path(hf_dir)))
    model.eval()
    answers = []
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
        answers.append(_generation(tokenizer, prompt, answer))
    return answers


def generate_megatron(
    chunks: list[GPTModel],
    groups: Groups,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    vocab_size: int,
    end_tokens: Sequence[int] = (),
    max_length: int | None = None,
) -> list[Generation]:
    """Answer each prompt greedily with a live Megatron model. Collective; every rank gets the result.

    See :func:`nemo_minitron.generation.generate_tokens`, which does the work.

    Args:
        chunks: this rank's part of the model.
        groups: of this process.
        tokenizer: of the model.
        prompts: one user turn each.
        max_new_tokens: longest answer.
        vocab_size: true vocabulary; logits beyond it are padding.
        end_tokens: ids that end an answer, beside the tokenizer's EOS.
        max_length: tokens of prompt and answer together; None for no limit.

    Raises:
        DataError: for prompts without a token or longer than ``max_length``.
    """
    answers = generate_tokens(
        chunks,
        groups,
        [encode_prompt(tokenizer, prompt) for prompt in prompts],
        sampling=Sampling(max_new_tokens=max_new_tokens, greedy=True),
        ends=[*end_tokens, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])],
        vocab_size=vocab_size,
        max_length=max_length,
    )
    return [_generation(tokenizer, prompt, answer.tokens) for prompt, answer in zip(prompts, answers, strict=True)]


def _generation(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: list[int]) -> Generation:
    return Generation(prompt, tokenizer.decode(answer, skip_special_tokens=True).strip(), len(answer))
