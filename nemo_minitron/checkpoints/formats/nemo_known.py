"""Settings of NeMo's and Megatron's model configurations that change nothing a model computes, each with the reason.

NeMo hands every key that is a field of Megatron's ``TransformerConfig`` on to it, in NeMo 1 too
(``MegatronBaseModel.build_transformer_config``). What is neither read by the formats' readers nor on these lists is
refused, or named in a warning where it is switched off.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.accounting import by_pattern, refusable

__all__ = [
    "DENSE",
    "EXPERTS",
    "EXPERTS_NEUTRAL",
    "LAYER_SPECS",
    "MEGATRON",
    "NEMO1",
    "NEMO1_NEUTRAL",
    "NEMO2",
    "NEMO2_NEUTRAL",
    "NEUTRAL",
    "unknown_settings",
]

_TRAINING = "of its training; ours has settings of its own"
_LAYOUT = "how ranks share the work"
_KERNELS = "how it is computed, not what"
_PRECISION = "in which precision a run computes; ours has settings of its own"
_FIRST = "how weights are drawn before a training"
_ANSWERS = "how answers are drawn, not what the model computes"
_ELSEWHERE = "of Mamba and hybrid models, which is_hybrid_model switches on"
_DEAD = "NeMo computes it of another key"
_NOTE = "a note of the program that wrote the file"

#: Shell patterns of keys -> why they change nothing, whatever their value. Of Megatron, so of both formats.
MEGATRON: dict[str, str] = {
    # layout
    "*_parallel_size": _LAYOUT,
    "hierarchical_context_parallel_sizes": _LAYOUT,
    "sequence_parallel": _LAYOUT,
    "*pipeline_model_parallel*": _LAYOUT,
    "*in_first_pipeline_stage": _LAYOUT,
    "*in_last_pipeline_stage": _LAYOUT,
    "account_for_*_in_pipeline_split": _LAYOUT,
    "microbatch_group_size_per_vp_stage": _LAYOUT,
    "moe_extended_tp": _LAYOUT,
    "cp_comm_type": _LAYOUT,
    "tp_comm_*": _LAYOUT,
    "tp_only_amax_red": _LAYOUT,
    "overlap_*": _LAYOUT,
    "batch_p2p_*": _LAYOUT,
    "use_ring_exchange_p2p": _LAYOUT,
    "async_tensor_model_parallel_allreduce": _LAYOUT,
    "symmetric_ar_type": _LAYOUT,
    "scatter_embedding_sequence_parallel": _LAYOUT,
    "clone_scatter_output_in_embedding": _LAYOUT,
    "parallel_output": _LAYOUT,
    "make_vocab_size_divisible_by": "the stored rows say it",
    # kernels and memory
    "*_fusion": _KERNELS,
    "cross_entropy_fusion_impl": _KERNELS,
    "attention_backend": _KERNELS,
    "apply_query_key_layer_scaling": "divides scores by a number and multiplies them by it again",
    "persist_layer_norm": _KERNELS,
    "memory_efficient_layer_norm": _KERNELS,
    "use_kitchen": _KERNELS,
    "use_te_rng_tracker": _KERNELS,
    "use_transformer_engine*": _KERNELS,
    "*cuda_graph*": _KERNELS,
    "*cpu_offloading*": _KERNELS,
    "deallocate_pipeline_outputs": _KERNELS,
    "variable_seq_lengths": _KERNELS,
    "disable_parameter_transpose_cache": _KERNELS,
    "flash_decode": _KERNELS,
    "mlp_chunks_for_prefill": _KERNELS,
    "inference_*": _KERNELS,
    "deterministic_mode": _KERNELS,
    "timers": _NOTE,
    "barrier_with_L1_time": _NOTE,
    "config_logger_dir": _NOTE,
    "test_mode": _NOTE,
    "hetereogenous_dist_checkpoint": "the stored keys say it",
    # precision
    "fp16": _PRECISION,
    "bf16": _PRECISION,
    "*_dtype": _PRECISION,
    "enable_autocast": _PRECISION,
    "fp8*": _PRECISION,
    "*_fp8": _PRECISION,
    "activation_func_fp8_input_store": _PRECISION,
    "*_in_bf16": _PRECISION,
    "first_last_layers_bf16": _PRECISION,
    "quant_recipe": _PRECISION,
    "fp16_lm_cross_entropy": _PRECISION,
    "fp32_residual_connection": _PRECISION,
    "attention_softmax_in_fp32": _PRECISION,
    "disable_bf16_reduced_precision_matmul": _PRECISION,
    # training
    "*dropout": _TRAINING,
    "*_func": _TRAINING,
    "recompute_*": _TRAINING,
    "distribute_saved_activations": _TRAINING,
    "num_micro*batches_with_partial_activation_checkpoints": _TRAINING,
    "defer_embedding_wgrad_compute": _TRAINING,
    "wgrad_deferral_limit": _TRAINING,
    "delay_wgrad_compute": _TRAINING,
    "calculate_per_token_loss": _TRAINING,
    "mtp_loss_scaling_factor": _TRAINING,
    "perform_initialization": _FIRST,
    "use_cpu_initialization": _FIRST,
    "*init_method*": _FIRST,
    "init_model_with_meta_device": _FIRST,
    # other models
    "mamba_*": _ELSEWHERE,
    "use_mamba_mem_eff_path": _ELSEWHERE,
}

#: Keys of Megatron -> the only values at which they change nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "apply_residual_connection_post_layernorm": (False,),
    "heterogeneous_block_specs": (False,),
    "is_hybrid_model": (False,),
    "mrope_section": (None,),
    "mtp_num_layers": (None, 0),
    "no_rope_freq": (None,),
    "softmax_scale": (None,),
    "softmax_type": ("vanilla",),
}

#: Of models without experts.
DENSE: dict[str, str] = {"moe_*": "of experts, which num_moe_experts switches on"}

#: Of models with experts.
EXPERTS: dict[str, str] = {
    "moe_*dispatcher*": _LAYOUT,
    "moe_enable_deepep": _LAYOUT,
    "moe_deepep_num_sms": _LAYOUT,
    "moe_grouped_gemm": _KERNELS,
    "moe_use_legacy_grouped_gemm": _KERNELS,
    "moe_router_padding_for_fp8": _KERNELS,
    "moe_layer_recompute": _TRAINING,
    "moe_per_layer_logging": _NOTE,
    "moe_z_loss_coeff": _TRAINING,
    "moe_input_jitter_eps": _TRAINING,
    "moe_router_bias_update_rate": _TRAINING,
    "moe_shared_expert_overlap": "of shared experts, which are refused",
    "moe_token_drop_policy": "of tokens that are dropped, which is refused",
    "moe_pad_expert_input_to_capacity": "of tokens that are dropped, which is refused",
}
EXPERTS_NEUTRAL: dict[str, tuple[object, ...]] = {
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    "moe_router_topk_limited_devices": (None,),
    "moe_router_group_topk": (None,),
    "moe_router_force_load_balancing": (False,),
    "moe_token_dropping": (False,),
}

#: Of a NeMo 2 ``model.yaml``, beside :data:`MEGATRON`.
NEMO2: dict[str, str] = {
    "_target_": "the class; it is read",
    "seq_length": "the context, where the class has no max_position_embeddings",
    "bias_dropout_add_fusion": _KERNELS,
    "forward_step_fn": _TRAINING,
    "data_step_fn": _TRAINING,
    "generation_config": _ANSWERS,
    "rope_scaling_factor": "of a scaling that is switched off",
    "qk_layernorm": "read where layers follow it; those of families with layer types have the norms whatever it says",
    "is_vision_language": "which weights NeMo's import from Hugging Face takes",
}
NEMO2_NEUTRAL: dict[str, tuple[object, ...]] = {"qk_l2_norm": (False,), "rope_scaling": (False, None)}
#: Where a ``transformer_layer_spec`` may come from; another package's may compute anything.
LAYER_SPECS = ("nemo.collections.llm.", "megatron.core.", "megatron.bridge.", "nemo_minitron.")

#: Of a NeMo 1 ``model_config.yaml``, beside :data:`MEGATRON`.
NEMO1: dict[str, str] = {
    **dict.fromkeys(("target", "name", "nemo_version", "restore_*", "pretrained_*", "resume_*"), _NOTE),
    **dict.fromkeys(
        (
            "answer_only_loss",
            "cross_entropy*",
            "data",
            "do_layer_norm_weight_decay",
            "dpo",
            "drop_last",
            "global_batch_size",
            "grad_*",
            "gradient_*",
            "hysteresis",
            "knowledge_distillation",
            "kto",
            "log_*",
            "micro_batch_size",
            "native_amp_*",
            "optim",
            "ppo",
            "rampup_batch_size",
            "reinforce",
            "reset_lr*",
            "rlhf",
            "rs",
            "save_nemo_on_validation_end",
            "seed",
            "sft",
            "skip_train",
            "spin",
            "steerlm2",
            "sync_batch_comm",
            "use_loss_mask",
            "validation_param_sync_overlap",
            "with_fp32_embedding_grads",
            "activations_checkpoint_*",
            "async_grad_allreduce",
            "distributed_adam_*",
        ),
        _TRAINING,
    ),
    **dict.fromkeys(
        (
            "fsdp*",
            "nccl_*",
            "reduce_amax",
            "sharp",
            "tensor_model_parallel_world_size",
            "ub_tp_comm_*",
            "use_tp_pp_dp_mapping",
            "pre_process",
            "post_process",
        ),
        _LAYOUT,
    ),
    **dict.fromkeys(
        (
            "apex_transformer_log_level",
            "enable_megatron_timers",
            "megatron_timer_kwargs",
            "memory_profile",
            "nsys_profile",
            "gc_interval",
            "dist_ckpt_*",
        ),
        _NOTE,
    ),
    **dict.fromkeys(
        (
            "get_attention_mask_from_fusion",
            "onnx_safe",
            "transformer_engine",
            "use_emha",
            "use_flash_attention",
        ),
        _KERNELS,
    ),
    **dict.fromkeys(("precision", "megatron_amp_O2", "skip_fp8_attention_checkpoint_load"), _PRECISION),
    "use_scaled_init_method": _FIRST,
    "inference": _ANSWERS,
    "tokenizer": "read with the archive's files",
    "sep_id": "of questions and answers in one text",
    "max_position_embeddings": "of learned positions, which are refused",
    "layernorm_zero_centered_gamma": _DEAD,
    "add_bias_linear": _DEAD,
    "add_qkv_bias": _DEAD,
    "gated_linear_unit": _DEAD,
    "activation_func": _DEAD,
    "apply_residual_connection_post_layernorm": _DEAD,
    **dict.fromkeys(
        ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len"),
        "of a scaling that scale_positional_embedding switches on",
    ),
}
NEMO1_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention_type": ("multihead",),
    "drop_layers": (None, []),
    "encoder": (None,),
    "headscale": (False,),
    "hyena": (None,),
    "megatron_legacy": (False,),
    "multi_latent_attention": (False,),
    "normalize_attention_scores": (True,),
    "openai_gelu": (False,),
    "peft": (None, {}, {"peft_scheme": None}, {"peft_scheme": "none"}),
    "transformer_block_type": ("pre_ln",),
}


def unknown_settings(
    left: Mapping[str, Any],
    source: Path,
    *,
    harmless: Mapping[str, str],
    neutral: Mapping[str, tuple[object, ...]],
    experts: bool = False,
) -> list[str]:
    """Refusals of the settings that nobody asked for; warns of those that are switched off.

    Args:
        left: the settings.
        source: the file, for messages.
        harmless: patterns of the format beside :data:`MEGATRON`.
        neutral: of the format beside :data:`NEUTRAL`.
        experts: of a mixture of experts.
    """
    patterns = {**MEGATRON, **(EXPERTS if experts else DENSE), **harmless}
    values = {**NEUTRAL, **(EXPERTS_NEUTRAL if experts else {}), **neutral}
    # a neutral value before a pattern: moe_* and the like are wide
    pinned = {key: value for key, value in left.items() if key in values and key not in harmless}
    faults = [
        f"{key}={value!r} is not supported (needed: {' or '.join(map(repr, values[key]))})"
        for key, value in pinned.items()
        if value not in values[key]
    ]
    others = {key: value for key, value in left.items() if key not in pinned}
    active = refusable(others, source=source, what="settings", harmless=by_pattern(others, patterns))
    return faults + [
        f"{key}={str(value)[:80]} is not known, and may change what the model computes; if it does not, remove the key"
        for key, value in active.items()
    ]
