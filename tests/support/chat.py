"""A byte-level tokenizer with the special tokens of the chat templates that a test asks for."""

from __future__ import annotations

from pathlib import Path

CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
NEMOTRON = ("<extra_id_0>", "<extra_id_1>", "<extra_id_2>")


def byte_tokenizer(folder: Path, special: tuple[str, ...] = CHATML, chat_template: str | None = None) -> Path:
    """Save a tokenizer of 256 bytes, ``</s>`` and the special tokens; return its directory."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(token, special=True) for token in ("</s>", *special)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, eos_token="</s>")
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder
