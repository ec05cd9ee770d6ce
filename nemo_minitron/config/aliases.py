"""What the field calls settings: names of transformers, Megatron-LM, NeMo, PyTorch and llama.cpp, for hints.

Nothing is read under these names. A fault of a setting that does not exist names the setting that has its meaning.
"""

from __future__ import annotations

__all__ = ["ALIASES", "NOTES"]

#: The settings that a name may stand for, the likeliest first: the end of a setting's dotted name.
ALIASES: dict[tuple[str, ...], tuple[str, ...]] = {
    # parallel layout
    ("tp", "tp_size", "tensor_parallel", "tensor_parallel_size", "tensor_model_parallel_size", "tensor_parallelism"):
        ("parallel.tensor", "student_layout.tensor"),
    ("pp", "pp_size", "pipeline_parallel", "pipeline_parallel_size", "pipeline_model_parallel_size"):
        ("parallel.pipeline", "student_layout.pipeline"),
    ("dp", "dp_size", "data_parallel", "data_parallel_size"): ("parallel.data",),
    ("cp", "cp_size", "context_parallel", "context_parallel_size"): ("parallel.context",),
    ("ep", "ep_size", "expert_parallel", "expert_model_parallel_size", "expert_parallel_size"): ("parallel.expert",),
    ("vp", "vpp", "virtual_pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage"):
        ("parallel.virtual_pipeline", "student_layout.virtual_pipeline"),
    ("sp",): ("parallel.sequence_parallel",),
    ("gpus", "num_gpus", "n_gpus", "ngpus", "nproc", "nproc_per_node", "world_size", "num_nodes", "nodes", "devices",
     "layout", "parallelism"): ("parallel", "student_layout"),
    # sizes of a model
    ("hidden_dim", "d_model", "dim", "n_embd", "embed_dim", "hidden", "embedding_size", "width", "model_dim"):
        ("target.hidden_size", "space.hidden_size"),
    ("intermediate_size", "ffn_dim", "ffn_size", "ffn_hidden_dim", "d_ff", "mlp_dim", "mlp_hidden_size",
     "intermediate_dim", "n_inner", "moe_intermediate_size", "moe_ffn_hidden_size", "feed_forward_length"):
        ("target.ffn_hidden_size", "space.ffn_hidden_size"),
    ("n_layers", "n_layer", "num_hidden_layers", "layers", "num_layer", "block_count", "decoder_layers"):
        ("target.num_layers", "space.num_layers"),
    ("num_heads", "n_heads", "n_head", "heads", "attention_heads", "head_count"):
        ("target.num_attention_heads", "space.num_attention_heads"),
    ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "n_head_kv", "query_groups", "kv_channels"):
        ("target.num_query_groups", "space.num_query_groups"),
    ("num_experts", "num_local_experts", "n_experts", "experts", "n_routed_experts"):
        ("target.num_moe_experts", "space.num_moe_experts"),
    ("vocab_size", "vocabulary_size", "n_vocab"): ("vocabulary.size",),
    ("sparsity", "pruning_ratio", "prune_ratio", "ratio", "compression", "compression_ratio"):
        ("target", "budget.share"),
    ("target_shape", "shape", "sizes", "student_config"): ("target", "space"),
    ("params", "num_parameters", "num_params", "target_params"): ("budget.parameters", "target"),
    ("drop_layers", "layers_to_prune", "prune_layers", "dropped_layers"): ("layers_to_drop",),
    # schedules
    ("learning_rate", "max_lr", "peak_lr", "base_lr"): ("lr",),
    ("min_learning_rate", "end_lr", "final_lr", "lr_min"): ("min_lr",),
    ("max_steps", "num_steps", "n_steps", "train_steps", "max_iters", "train_iters", "num_train_steps", "iterations",
     "iters", "total_steps"): ("steps",),
    ("num_train_epochs", "num_epochs", "max_epochs", "n_epochs", "epoch", "epochs"): ("epochs", "steps"),
    ("batch_size", "train_batch_size", "total_batch_size", "batch", "gbs", "global_batch"):
        ("global_batch_size", "micro_batch_size", "budget.batch_size", "generation_batch"),
    ("per_device_train_batch_size", "per_device_batch_size", "per_gpu_batch_size", "micro_batch", "mbs",
     "per_device_eval_batch_size", "eval_batch_size"): ("micro_batch_size",),
    ("gradient_accumulation_steps", "accumulate_grad_batches", "grad_accum", "accumulation_steps"):
        ("global_batch_size",),
    ("warmup", "num_warmup_steps", "lr_warmup_steps", "warmup_iters", "lr_warmup_iters", "warmup_ratio"):
        ("warmup_steps",),
    ("wd", "weight_decay_rate"): ("weight_decay",),
    ("adam_beta1", "betas", "adam_betas"): ("beta1",),
    ("adam_beta2",): ("beta2",),
    ("max_grad_norm", "grad_clip", "gradient_clip_val", "gradient_clipping", "clip_grad_norm"): ("clip_grad",),
    ("save_steps", "save_interval", "checkpoint_interval", "save_freq", "checkpoint_every", "every_n_train_steps"):
        ("save_every",),
    ("eval_steps", "eval_interval", "val_check_interval", "eval_every", "eval_freq", "validation_interval"):
        ("validate_every",),
    ("limit_val_batches", "eval_iters", "eval_batches", "val_batches"): ("validation_batches",),
    ("logging_steps", "log_interval", "log_every_n_steps", "log_freq"): ("log_every",),
    ("max_time", "time_limit", "max_hours", "max_time_per_run"): ("max_minutes", "runtime.timeout_minutes"),
    ("gradient_checkpointing", "activation_checkpointing", "activations_checkpoint_granularity", "checkpointing",
     "recompute_granularity", "activation_recompute"): ("recompute", "budget.recompute"),
    ("bf16", "fp16", "mixed_precision", "amp", "fp32"): ("precision", "runtime.dtype", "dtype"),
    ("torch_dtype", "params_dtype", "data_type"): ("dtype", "runtime.dtype"),
    ("resume_from_checkpoint", "resume_if_exists", "auto_resume"): ("resume",),
    ("accelerator", "backend", "cuda", "use_cpu", "no_cuda"): ("runtime.device",),
    ("random_seed", "manual_seed"): ("runtime.seed",),
    ("num_threads", "omp_num_threads", "cpus"): ("runtime.threads",),
    # losses
    ("kd_temperature", "distill_temperature", "temp", "t"): ("loss.temperature", "temperature"),
    ("alpha", "kd_alpha", "ce_weight", "hard_label_weight", "lambda", "kd_weight"): ("loss.label_weight",),
    ("loss_type", "loss_fn", "kd_loss", "divergence", "type"): ("loss.kind", "loss"),
    ("ref_policy_kl_penalty", "dpo_beta"): ("beta",),
    # data
    ("seq_length", "seq_len", "sequence_len", "max_seq_length", "max_seq_len", "block_size", "context_length",
     "encoder_seq_length", "max_sequence_length", "sequence_length", "ctx_len", "n_ctx",
     "max_position_embeddings", "model_max_length", "cutoff_len"):
        ("data.sequence_length", "data.max_length", "sequence_length", "max_length"),
    ("dataset", "datasets", "data_path", "data_paths", "dataset_path", "dataset_name", "train_data", "train_file",
     "train_ds", "data_dir", "text", "corpus", "train_files", "sources", "path", "file", "files"):
        ("data.sources", "data.path", "prompts.path"),
    ("val_data", "validation_file", "validation_ds", "eval_data", "val_file"):
        ("data.validation", "data.held_out_fraction"),
    ("val_split", "eval_split", "test_size", "validation_split", "val_fraction"): ("data.held_out_fraction",),
    ("num_workers", "dataloader_num_workers", "preprocessing_num_workers"): ("data.workers",),
    ("chat_template", "prompt_template", "prompt_format"): ("template", "data.template"),
    ("num_samples", "n_samples", "calibration_samples", "num_calibration_samples", "calib_samples", "calib_size",
     "nsamples", "calib_dataset_size"): ("samples",),
    ("packing", "pack_sequences", "packed_sequence"): ("pack", "data.packing"),
    # models and places
    ("model_path", "model_name", "model_name_or_path", "model_id", "checkpoint", "checkpoint_path", "hf_model",
     "pretrained_model_name_or_path", "base_model", "model_dir", "restore_from_path", "input", "src", "hf_path",
     "nemo_path", "ckpt", "model", "source", "teacher", "student"):
        ("model", "student", "source", "teacher", "models", "reward", "run"),
    ("teacher_model", "teacher_path", "teacher_model_path", "teacher_model_name_or_path"): ("teacher",),
    ("student_model", "student_path", "student_model_path"): ("student",),
    ("ref_model", "reference_model", "ref_model_path"): ("reference", "base"),
    ("reward_model", "rm_path"): ("reward", "attribute_model"),
    ("logits", "teacher_logits", "logit_cache", "cached_logits", "cache"): ("teacher_cache",),
    ("scores_path", "score", "importance", "importance_scores"): ("scores",),
    ("output_dir", "out_dir", "save_dir", "out", "results_dir", "output_path", "save_path", "outdir", "log_dir", "dst",
     "destination", "save"): ("output",),
    ("run_name", "experiment_name", "exp_name", "job_name", "stage_name"): ("name",),
    ("force", "overwrite_output_dir", "replace"): ("overwrite",),
    ("output_format", "export_format", "target_format", "to"): ("format", "formats"),
    ("shard_size", "max_shard"): ("max_shard_size",),
    ("criterion", "importance_method", "pruning_method", "metric", "scorer", "estimator", "method"):
        ("method", "estimator"),
    # generation and evaluation
    ("max_tokens", "max_length", "max_gen_len", "max_new", "n_predict", "tokens_to_generate"):
        ("max_new_tokens", "sampling.max_new_tokens", "data.max_length", "data.sequence_length"),
    ("do_sample", "sample"): ("greedy", "sampling.greedy"),
    ("tasks", "benchmarks", "benchmark"): ("harness.tasks", "task"),
    ("num_fewshot", "n_shot", "fewshot", "num_shots"): ("harness.num_fewshot",),
}  # fmt: skip

#: What differs from the name's meaning elsewhere, by name and the setting that is suggested.
NOTES: dict[tuple[str, str], str] = {
    ("epochs", "steps"): "a training on text counts optimizer steps",
    ("gradient_accumulation_steps", "global_batch_size"):
        "it is micro_batch_size * parallel.data * the number of accumulated passes",
    ("gpus", "parallel"): "tensor * pipeline * data * context processes are started",
    ("sparsity", "target"): "sizes, such as target.num_layers; a share is for `minitron search`, budget.share",
    ("bf16", "precision"): '"32", "bf16-mixed" or "auto"',
    ("do_sample", "greedy"): "with the opposite meaning",
    ("do_sample", "sampling.greedy"): "with the opposite meaning",
    ("warmup", "warmup_steps"): "a number of steps",
    ("alpha", "loss.label_weight"): "the share of the labels' loss",
    ("gradient_checkpointing", "recompute"): '"none", "selective" or "full"',
}  # fmt: skip
