"""The part of the CPU layer that stands in for CUDA, Apex and Transformer Engine in NeMo and NeMo-Aligner.

Where NeMo 1 guards a whole feature by ``HAVE_APEX`` but uses only a name or two of Apex, those names come from
Megatron-core or torch, which do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from nemo_minitron.runtime.cpu.patching import Patch

__all__ = ["PATCHES"]


def _no_timers(original: Any) -> Callable[..., str]:
    def log_megatron_timers(self: Any, timers: Any) -> str:
        return ""

    return log_megatron_timers


def _true(original: Any) -> bool:
    return True


def _no_accelerator(original: Any) -> Callable[[], bool]:
    def is_available() -> bool:
        return False

    return is_available


def _absent_class(name: str) -> Callable[[Any], type]:
    """A class without instances, for names that are only asked about by ``isinstance``."""
    return lambda original: type(name, (), {"__doc__": "Stands for a class of Apex, which is not installed."})


def _class(replacement: type) -> Callable[[Any], type]:
    return lambda original: replacement


def _optimizer_wrapper(original: Any) -> Any:
    from nemo.core.optim.mcore_optim import McoreDistributedOptimizer

    return McoreDistributedOptimizer


def _no_optimizations(original: Any) -> Callable[[Any], None]:
    def _enable_nvidia_optimizations(self: Any) -> None:
        return None

    return _enable_nvidia_optimizations


def _with_groups(original: Any) -> Callable[..., None]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        from megatron.core import parallel_state

        original(self, *args, **kwargs)
        if not parallel_state.is_initialized():
            strategy = self.trainer.strategy
            if strategy.launcher is not None:
                strategy.launcher.launch(lambda: None, trainer=self.trainer)
            strategy.setup_environment()

    return __init__


def _tensor_parallel_defaults(original: Any) -> Callable[[torch.Tensor], None]:
    from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes

    return set_defaults_if_not_set_tensor_model_parallel_attributes


def _local_spec(original: Any) -> Callable[..., Any]:
    def get_specs(
        spec_name: str,
        transformer_config: Any = None,
        use_te: bool = True,
        hyena_cfg: Any = None,
        fp8: bool = False,
    ) -> Any:
        if spec_name not in ("", "te_gpt"):
            return original(spec_name, transformer_config, use_te, hyena_cfg, fp8)
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        return get_gpt_layer_local_spec(
            num_experts=getattr(transformer_config, "num_moe_experts", None),
            moe_grouped_gemm=getattr(transformer_config, "moe_grouped_gemm", False),
            qk_layernorm=getattr(transformer_config, "qk_layernorm", False),
            normalization=getattr(transformer_config, "normalization", None),
        )

    return get_specs


def _gemma3(original: Any) -> Callable[..., Any]:
    def configure_model(
        self: Any, tokenizer: Any, pre_process: Any = None, post_process: Any = None, vp_stage: int | None = None
    ) -> Any:
        from nemo_minitron.runtime.nemo_layer_types import architecture_of
        from nemo_minitron.runtime.nemo_layer_types import configure_model as build

        options = {"pre_process": pre_process, "post_process": post_process, "vp_stage": vp_stage}
        return build(self, architecture_of(self, "gemma3"), tokenizer, transformer_engine=False, **options)

    return configure_model


def _mistral(original: Any) -> Callable[..., Any]:
    def configure_model(
        self: Any, tokenizer: Any, pre_process: Any = None, post_process: Any = None, vp_stage: int | None = None
    ) -> Any:
        from nemo_minitron.runtime.nemo_layer_types import configure_model as build
        from nemo_minitron.runtime.nemo_layer_types import windowed_architecture

        options = {"pre_process": pre_process, "post_process": post_process, "vp_stage": vp_stage}
        if self.window_size is None:
            return original(self, tokenizer, **options)
        return build(self, windowed_architecture(self, "llama"), tokenizer, transformer_engine=False, **options)

    return configure_model


def _uncompiled(original: Any) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(original, "_torchdynamo_orig_callable", original)
    return function


def _listify_model(original: Any) -> Callable[[Any], list[Any]]:
    def listify_model(model: Any) -> list[Any]:
        return model if isinstance(model, list) else [model]

    return listify_model


def _multi_tensor_applier(original: Any) -> Callable[..., Any]:
    def multi_tensor_applier(
        operation: Callable[..., Any], overflow: torch.Tensor, tensors: Sequence[Sequence[torch.Tensor]], *args: Any
    ) -> Any:
        return operation(overflow, tensors, *args)

    return multi_tensor_applier


def _amp_c(original: Any) -> SimpleNamespace:
    def multi_tensor_l2norm(
        overflow: torch.Tensor, tensors: Sequence[Sequence[torch.Tensor]], per_tensor: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        norms = torch.stack(torch._foreach_norm(list(tensors[0])))
        return torch.linalg.vector_norm(norms), norms if per_tensor else None

    return SimpleNamespace(multi_tensor_l2norm=multi_tensor_l2norm)


def _rebalance(original: Any) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    def rebalance_nd_tensor(tensor: torch.Tensor, group: Any) -> torch.Tensor:
        import torch.distributed as dist

        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, torch.tensor([len(tensor)]), group=group)
        parts = [int(size) for size in sizes]
        # gloo adds no truth values
        numbers = tensor.to(torch.uint8) if tensor.dtype is torch.bool else tensor
        output = numbers.new_zeros(sum(parts), *tensor.shape[1:])
        output.split(parts)[dist.get_rank(group)].copy_(numbers)
        dist.all_reduce(output, group=group)
        return output.to(tensor.dtype)

    return rebalance_nd_tensor


def _no_bert(original: Any) -> Callable[[], list[str]]:
    def get_megatron_pretrained_bert_models() -> list[str]:
        return []

    return get_megatron_pretrained_bert_models


_PARTS = "nemo.collections.nlp.parts.nlp_overrides"
_GPT = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model"
_BASE = "nemo.collections.nlp.models.language_modeling.megatron_base_model"
_COMMON = "nemo.collections.nlp.modules.common.megatron"
_NORMS = {
    "FusedLayerNorm": torch.nn.LayerNorm,
    "FastLayerNorm": torch.nn.LayerNorm,
    "MixedFusedRMSNorm": torch.nn.RMSNorm,
}

PATCHES: tuple[Patch, ...] = (
    Patch(
        "nemo.lightning.pytorch.callbacks.progress_printer",
        "ProgressPrinter.log_megatron_timers",
        _no_timers,
        "on_train_batch_end returns early on every rank but 0, and rank 0 alone enters the world-wide all-gather of "
        "megatron.core.timers.Timers.get_all_timers_string. Under gloo that gather pairs with the next broadcast of "
        "the other ranks: with ModelCheckpoint(save_top_k=...) all ranks hang in file_exists. The timers measure CUDA "
        "events",
    ),
    Patch(
        "lightning.pytorch.accelerators.cuda",
        "CUDAAccelerator.is_available",
        _no_accelerator,
        "counts devices (num_cuda_devices), and torch.cuda.device_count answers 1 under this layer: Trainer would "
        "choose CUDA for accelerator='auto'",
    ),
    Patch(
        _PARTS,
        "HAVE_APEX",
        _true,
        "NLPDDPStrategy.__init__ raises 'Apex was not found', although it uses only the two names below",
        lacking="apex",
    ),
    Patch(
        _PARTS,
        "McoreDistributedOptimizer",
        _optimizer_wrapper,
        "imported behind Apex in the same try block; it is NeMo's own and needs no Apex",
        optional=True,
        lacking="apex",
    ),
    Patch(
        _PARTS,
        "MegatronDistributedFusedAdam",
        _absent_class("MegatronDistributedFusedAdam"),
        "NLPDDPStrategy.optimizer_sharded_state_dict asks isinstance of this class of Apex (NameError)",
        optional=True,
        lacking="apex",
    ),
    Patch(
        _BASE,
        "MegatronBaseModel._enable_nvidia_optimizations",
        _no_optimizations,
        "outside NVIDIA's containers NVIDIA_PYTORCH_VERSION is unset, and re.fullmatch(..., None) raises TypeError; "
        "what it sets is nvFuser's",
        lacking="apex",
    ),
    Patch(
        _BASE,
        "MegatronBaseModel.__init__",
        _with_groups,
        "only writes the ranks down; the process groups come with trainer.fit or the loading of weights, after the "
        "model is built. Megatron-core's own attention (megatron/core/transformer/dot_product_attention.py), which "
        "Transformer Engine's replaces elsewhere, needs the tensor-parallel group while it is built",
        lacking="transformer_engine",
    ),
    Patch(
        f"{_COMMON}.build_model",
        "set_defaults_if_not_set_tensor_model_parallel_attributes",
        _tensor_parallel_defaults,
        "imported from Apex only (NameError in build_model); Megatron-core has the same function",
        optional=True,
        lacking="apex",
    ),
    Patch(
        f"{_COMMON}.megatron_utils",
        "get_megatron_pretrained_bert_models",
        _no_bert,
        "imports NeMo's BERT whenever a model is built, for a list of its pretrained models; before 2.4 that cannot be "
        "imported without Transformer Engine (NameError: ApexGuardDefaults in bert_spec)",
        versions="nemo-toolkit<2.4",
        lacking="transformer_engine",
    ),
    Patch(
        _GPT,
        "get_specs",
        _local_spec,
        "builds every known layer specification, Transformer Engine's among them, before it picks one; here the plain "
        "GPT layer is Megatron-core's local one and the others are left to upstream",
        lacking="transformer_engine",
    ),
    Patch(
        "nemo.collections.llm.gpt.model.gemma3",
        "Gemma3Config.configure_model",
        _gemma3,
        "builds Transformer Engine's layers, whose classes are missing; here the suite's own, with the parts of "
        "Megatron-core's local ones",
        lacking="transformer_engine",
    ),
    Patch(
        "nemo.collections.llm.gpt.model.mistral",
        "MistralConfig7B.configure_model",
        _mistral,
        "hands its window to Megatron-core's own attention, which refuses one; here the suite's, which obeys it",
        lacking="transformer_engine",
    ),
    Patch(
        "nemo.collections.nlp.parts.utils_funcs",
        "squared_relu",
        _uncompiled,
        "torch.compile'd when it is imported; dynamo cannot trace the function mode that rewrites device='cuda' "
        "(Nemotron's activation)",
    ),
    Patch(
        f"{_COMMON}.utils",
        "listify_model",
        _listify_model,
        "imported from Apex only (NameError in get_params_for_weight_decay_optimization)",
        optional=True,
        lacking="apex",
    ),
    *(
        Patch(
            f"{_COMMON}.utils",
            name,
            _class(norm),
            "get_params_for_weight_decay_optimization asks isinstance of this class of Apex (NameError), to spare "
            "norms the weight decay; Megatron-core's local layers have torch's norms",
            optional=True,
            lacking="apex",
        )
        for name, norm in _NORMS.items()
    ),
    Patch(
        f"{_COMMON}.clip_grads",
        "multi_tensor_applier",
        _multi_tensor_applier,
        "imported from Apex only (NameError in clip_grad_norm_fp32)",
        optional=True,
        lacking="apex",
    ),
    Patch(
        f"{_COMMON}.clip_grads",
        "amp_C",
        _amp_c,
        "an extension of Apex; clip_grad_norm_fp32 takes the norm of the gradients from it",
        optional=True,
        lacking="apex",
    ),
    Patch(
        "nemo_aligner.utils.distributed",
        "rebalance_nd_tensor",
        _rebalance,
        "gathers a tensor without dimensions and sums truth values, which NCCL does and gloo refuses "
        "(ReinforceRolloutBatch.gather_and_balance_globally)",
    ),
)
