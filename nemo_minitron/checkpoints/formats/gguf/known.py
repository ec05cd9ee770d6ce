"""What lies in a GGUF file and changes nothing that its model computes, each with the reason."""

from __future__ import annotations

__all__ = ["KEYS", "NEUTRAL", "TENSORS"]

_NOTE = "a note of the program that made the file, or of where the model comes from"
_TOKENS = "the number of a token for a purpose that transformers has no name for"

#: Keys of the header, as shell patterns -> why they change nothing, whatever their value.
KEYS: dict[str, str] = {
    "general.alignment": "where tensors begin; the gguf package reads it",
    "general.file_type": "each tensor says how it is stored",
    "general.quantization_version": "each tensor says how it is stored",
    "general.name": _NOTE,
    **dict.fromkeys(
        (
            "general.author",
            "general.base_model.*",
            "general.basename",
            "general.dataset*",
            "general.datasets*",
            "general.description",
            "general.doi",
            "general.finetune",
            "general.languages",
            "general.license*",
            "general.organization",
            "general.quantized_by",
            "general.repo_url",
            "general.repository",
            "general.sampling.*",
            "general.size_label",
            "general.source.*",
            "general.tags",
            "general.url",
            "general.uuid",
            "general.version",
        ),
        _NOTE,
    ),
    "quantize.imatrix.*": _NOTE,
    "mradermacher.*": _NOTE,
    "split.*": "of files in several parts; they are held against each other",
    "tokenizer.ggml.seperator_token_id": _TOKENS,
    "tokenizer.ggml.cls_token_id": _TOKENS,
    "tokenizer.ggml.mask_token_id": _TOKENS,
    "tokenizer.ggml.eot_token_id": _TOKENS,
    "tokenizer.ggml.eom_token_id": _TOKENS,
    "tokenizer.ggml.eog_token_ids": _TOKENS,
    "tokenizer.ggml.prefix_token_id": _TOKENS,
    "tokenizer.ggml.suffix_token_id": _TOKENS,
    "tokenizer.ggml.middle_token_id": _TOKENS,
    "tokenizer.ggml.fim_*_token_id": _TOKENS,
    "tokenizer.ggml.add_sep_token": "of pairs of texts",
    "tokenizer.ggml.token_type_count": "of models with token types",
    "tokenizer.huggingface.json": "the same tokenizer in another form",
    "*.rope.scaling.finetuned": "whether the model was trained with the scaling",
    "*.tensor_data_layout": "a note of old converters; the order of the rows is that of the architecture",
}

#: Keys of the header -> the only values at which they change nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "general.type": ("model",),
    "tokenizer.ggml.remove_extra_whitespaces": (False,),
    "tokenizer.ggml.precompiled_charsmap": ([],),
}

#: Tensors, as shell patterns -> why they are passed over.
TENSORS: dict[str, str] = {
    "blk.*.attn_rot_embd*": "a buffer that old converters stored; it follows from the header",
}
