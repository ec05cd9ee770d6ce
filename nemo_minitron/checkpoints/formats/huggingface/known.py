"""What lies in a Hugging Face directory and changes nothing that its model computes, each with the reason."""

from __future__ import annotations

import re

__all__ = ["FILES", "KEYS", "NEUTRAL_KEYS", "REFUSED_FILES", "TENSORS"]

_NOTE = "a note of the program that saved the file"
_TRAINING = "of transformers' own training; ours has settings of its own"
_GENERATION = "how answers are drawn, not what the model computes"
_OUTPUTS = "which outputs a forward pass returns"
_CLASSES = "of classification heads, which these models have not"

#: Keys of ``config.json`` -> why they change nothing, whatever their value.
KEYS: dict[str, str] = {
    "_attn_implementation": "how attention is computed, not what",
    "_attn_implementation_autoset": _NOTE,
    "_attn_implementation_internal": "how attention is computed, not what",
    "_commit_hash": _NOTE,
    "_flash_attn_2_enabled": "how attention is computed, not what",
    "_model_name_or_path": _NOTE,
    "_name_or_path": _NOTE,
    "attn_implementation": "how attention is computed, not what",
    "cache_implementation": "how keys and values are kept between the tokens of an answer",
    "attention_dropout": _TRAINING,
    "chunk_size_feed_forward": "computes the MLP in pieces",
    "dtype": "the tensors' own is read",
    "embd_pdrop": _TRAINING,
    "finetuning_task": _NOTE,
    "gradient_checkpointing": _TRAINING,
    "hidden_dropout": _TRAINING,
    "id2label": _CLASSES,
    "initializer_range": _TRAINING,
    "is_decoder": "every model here is one",
    "is_llama_config": _NOTE,
    "keys_to_ignore_at_inference": _OUTPUTS,
    "label2id": _CLASSES,
    "max_sequence_length": "a note of FastChat's; transformers goes by max_position_embeddings",
    "max_window_layers": "of Qwen's sliding windows, which are refused",
    "num_labels": _CLASSES,
    "output_attentions": _OUTPUTS,
    "output_hidden_states": _OUTPUTS,
    "output_router_logits": _OUTPUTS,
    "output_scores": _OUTPUTS,
    "pretraining_tp": "computes products in slices",
    "problem_type": _CLASSES,
    "resid_pdrop": _TRAINING,
    "return_dict": _OUTPUTS,
    "return_dict_in_generate": _OUTPUTS,
    "task_specific_params": _GENERATION,
    "tf_legacy_loss": _NOTE,
    "tokenizer_class": "the tokenizer's own files say it",
    "tokenizer_model_max_length": "the tokenizer's own files say it",
    "tokenizer_padding_side": "the tokenizer's own files say it",
    "torch_dtype": "the tensors' own is read",
    "torchscript": _OUTPUTS,
    "transformers.js_config": "of another library",
    "transformers_version": _NOTE,
    "unk_token_id": "the tokenizer's own files say it",
    "unsloth_fixed": _NOTE,
    "unsloth_version": _NOTE,
    "use_bfloat16": "the tensors' own dtype is read",
    "use_cache": "keeps keys and values between the tokens of an answer",
    **dict.fromkeys(
        (
            "bad_words_ids",
            "begin_suppress_tokens",
            "diversity_penalty",
            "do_sample",
            "early_stopping",
            "encoder_no_repeat_ngram_size",
            "exponential_decay_length_penalty",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "length_penalty",
            "max_length",
            "max_new_tokens",
            "min_length",
            "no_repeat_ngram_size",
            "num_beam_groups",
            "num_beams",
            "num_return_sequences",
            "remove_invalid_values",
            "repetition_penalty",
            "sep_token_id",
            "suppress_tokens",
            "temperature",
            "top_k",
            "top_p",
            "typical_p",
        ),
        _GENERATION,
    ),
}

#: Keys of ``config.json`` -> the value at which they change nothing; null, false, zero and empty do not either.
NEUTRAL_KEYS: dict[str, float | bool] = {
    # other families' switches and factors, which forks write into configurations of these
    "add_cross_attention": False,
    "attention_multiplier": False,
    "cross_attention_hidden_size": False,
    "embedding_multiplier": 1.0,
    "is_encoder_decoder": False,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "pruned_heads": False,
    "residual_multiplier": 1.0,
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
    "use_mrope": False,
}

#: Names of tensors that are not parameters -> why they are passed over.
TENSORS: dict[re.Pattern[str], str] = {
    re.compile(r"(^|\.)rotary_emb\.inv_freq$"): "a buffer that old transformers releases stored; it follows from "
    "the configuration",
}

#: Files and folders beside the weights, as shell patterns -> why they are passed over.
FILES: dict[str, str] = {
    ".*": "of version control and caches",
    "*.md": "documentation",
    "*.txt": "documentation",
    "*.pdf": "documentation",
    "*.png": "documentation",
    "*.jpg": "documentation",
    "*.svg": "documentation",
    "LICENSE*": "documentation",
    "NOTICE*": "documentation",
    "*.log": "of the training",
    "all_results.json": "of the training",
    "checkpoint-*": "of the training",
    "eval_results.json": "of the training",
    "events.out.tfevents.*": "of the training",
    "global_step*": "of the training",
    "latest": "of the training",
    "optimizer.*": "of the training",
    "rng_state*": "of the training",
    "runs": "of the training",
    "scaler.pt": "of the training",
    "scheduler.pt": "of the training",
    "train_results.json": "of the training",
    "trainer_state.json": "of the training",
    "training_args.bin": "of the training",
    "zero_to_fp32.py": "of the training",
    "original": "the same model in its maker's own format",
    "consolidated*": "the same model in its maker's own format",
    "params.json": "the same model in its maker's own format",
    "tekken.json": "the same tokenizer in its maker's own format",
    "config.yaml": "of a stage of this suite",
    "kept.json": "of a stage of this suite",
    "logs": "of a stage of this suite",
    "metrics.jsonl": "of a stage of this suite",
    "record.json": "of a stage of this suite",
    "skipped.jsonl": "of a stage of this suite",
    "*.gguf": "a model of its own",
    "onnx": "a model of its own",
}

_QUANTIZED = "quantized weights are for serving; open the float model that they were made from, or dequantize them"

#: Files that change what the model computes, as shell patterns -> the remedy.
REFUSED_FILES: dict[str, str] = {
    "adapter_config.json": "transformers would add the adapter to the model; merge it into the weights first "
    "(peft's merge_and_unload), or move it away",
    "hf_quant_config.json": _QUANTIZED,
    "quant_config.json": _QUANTIZED,
    "quantize_config.json": _QUANTIZED,
}
