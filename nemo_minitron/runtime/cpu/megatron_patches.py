"""The part of the CPU layer that stands in for CUDA-only spots of Megatron-core."""

from __future__ import annotations

import copy
import queue
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from nemo_minitron.errors import ShapeError
from nemo_minitron.runtime.cpu.patching import Patch

__all__ = ["PATCHES"]


def _get_state(original: Any) -> Callable[..., torch.Tensor]:
    def _get_cuda_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.random.default_generator.get_state()

    return _get_cuda_rng_state


def _set_state(original: Any) -> Callable[..., None]:
    def _set_cuda_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.random.default_generator.set_state(new_state)

    return _set_cuda_rng_state


_saving_synchronously: ContextVar[bool] = ContextVar("saving_synchronously", default=False)


def _save(original: Any) -> Callable[..., Any]:
    def save(self: Any, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        token = _saving_synchronously.set(True)
        try:
            self.async_save(sharded_state_dict, checkpoint_dir).execute_sync()
        finally:
            _saving_synchronously.reset(token)

    return save


def _results_queue(original: Any) -> Callable[[], Any]:
    results: queue.Queue[Any] = queue.Queue()

    def _get_write_results_queue() -> Any:
        return results if _saving_synchronously.get() else original()

    return _get_write_results_queue


def _optimizer_state_dict(original: Any) -> Callable[[Any], Any]:
    def state_dict(self: Any) -> Any:
        adam = self.optimizer
        if isinstance(adam, torch.optim.AdamW):
            for group in adam.param_groups:
                for parameter in group["params"]:
                    if parameter not in adam.state:
                        # What torch.optim.AdamW starts from at its first step.
                        adam.state[parameter] = {
                            "step": torch.tensor(0.0),
                            "exp_avg": torch.zeros_like(parameter),
                            "exp_avg_sq": torch.zeros_like(parameter),
                        }
        return original(self)

    return state_dict


def _optimizer_load_state_dict(original: Any) -> Callable[[Any, Any], None]:
    def load_state_dict(self: Any, state_dict: Any) -> None:
        original(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    return load_state_dict


def _set_optimizer_states(original: Any) -> Callable[[Any, Any, dict[str, Any]], None]:
    def _set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        step = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]].get("step")
        original(self, model_param, tensors if step is None else {"step": step, **tensors})

    return _set_main_param_and_optimizer_states


def _one_pass(original: Any) -> Callable[..., torch.optim.Optimizer]:
    def adam(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = original(*args, fused=True, **kwargs)
        return optimizer

    return adam


def _scale_in_place(original: Any) -> Callable[..., None]:
    def local_multi_tensor_scale(chunk_size: int, noop_flag: Any, tensors: Any, scale: float) -> None:
        for source, target in zip(*tensors, strict=True):
            torch.mul(source, scale, out=target)

    return local_multi_tensor_scale


class _ZeroCenteredLayerNorm(torch.nn.LayerNorm):
    """LayerNorm whose weight is stored minus one (NeMo's "layernorm1p")."""

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(input, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class _ZeroCenteredRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight is stored minus one, in float32 at least until the result is rounded (as Gemma's)."""

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(input.dtype, torch.float32)
        normed = torch.nn.functional.rms_norm(input.to(wide), self.normalized_shape, self.weight.to(wide) + 1, self.eps)
        return normed.to(input.dtype)


_ZERO_CENTERED: dict[str, Any] = {"LayerNorm": _ZeroCenteredLayerNorm, "RMSNorm": _ZeroCenteredRMSNorm}


def _torch_norm(original: Any) -> Callable[..., torch.nn.Module]:
    def __new__(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:  # noqa: N807
        plain = copy.copy(config)
        plain.sequence_parallel = plain.layernorm_zero_centered_gamma = False
        norm = original(cls, plain, *args, **kwargs)
        if config.layernorm_zero_centered_gamma:
            if config.normalization not in _ZERO_CENTERED:
                raise ShapeError(
                    f"normalization={config.normalization} with layernorm_zero_centered_gamma=True: without CUDA only "
                    f"{' and '.join(_ZERO_CENTERED)} can have it; set it to False, or run where Transformer Engine is"
                )
            norm = _ZERO_CENTERED[config.normalization](norm.normalized_shape, eps=norm.eps)
        if config.sequence_parallel:
            for parameter in norm.parameters():
                parameter.sequence_parallel = True
        return norm

    return __new__


def _param_groups(original: Any) -> Callable[..., list[dict[str, Any]]]:
    def _get_param_groups(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        keys = ("is_expert_parallel", "is_decoupled_lr", "lr_mult", "wd_mult")
        return sorted(original(*args, **kwargs), key=lambda group: [group[key] for key in keys])

    return _get_param_groups


def _local_spec(original: Any) -> Callable[..., Any]:
    def get_gpt_layer_local_spec(num_experts: int | None = None, *args: Any, **kwargs: Any) -> Any:
        spec = original(num_experts, *args, **kwargs)
        if num_experts is not None:
            spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
        return spec

    return get_gpt_layer_local_spec


def _no_gemm(original: Any) -> None:
    """The router asks whether there is one before it calls it."""


def _as_numpy(original: Any) -> Callable[..., Any]:
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, **options: Any) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else original(tensor, as_numpy, **options)

    return maybe_move_tensor_to_cpu


def _no_fp8_parameters(original: Any) -> Callable[..., None]:
    def _quantize_param_shard_impl(model_params: Any, *args: Any, **kwargs: Any) -> None:
        if model_params:
            original(model_params, *args, **kwargs)

    return _quantize_param_shard_impl


PATCHES: tuple[Patch, ...] = (
    Patch(
        "megatron.core.fp8_utils",
        "_quantize_param_shard_impl",
        _no_fp8_parameters,
        "before 0.13, without Transformer Engine, it raises 'Invalid Transformer Engine version' at every step of the "
        "distributed optimizer, although there are no FP8 parameters to quantize",
        versions="megatron-core<0.13",
        lacking="transformer_engine",
    ),
    Patch(
        "megatron.core.transformer.moe.moe_utils",
        "te_general_gemm",
        _no_gemm,
        "imported from Transformer Engine only; the router of a mixture of experts asks whether it is None (NameError "
        "in router_gating_linear) and otherwise multiplies with torch",
        optional=True,
        lacking="transformer_engine",
    ),
    Patch(
        "megatron.core.transformer.moe.token_dispatcher",
        "maybe_move_tensor_to_cpu",
        _as_numpy,
        "makes plain numbers of the sizes of messages to expert-parallel ranks only on the way from CUDA; as tensors, "
        "all_to_all_single does not take them",
    ),
    Patch(
        "megatron.core.models.gpt.gpt_layer_specs",
        "get_gpt_layer_local_spec",
        _local_spec,
        "saves the norm before a mixture of experts under the name it would have inside a dense MLP's first linear, "
        "where Transformer Engine's spec, with no linear to put it into, saves it under its own: neither opens the "
        "other's distributed checkpoints",
        lacking="transformer_engine",
    ),
    Patch(
        "megatron.core.transformer.torch_norm",
        "WrappedTorchNorm.__new__",
        _torch_norm,
        "asserts that there is no sequence parallelism, because torch's norms do not mark their weights as "
        "'sequence_parallel' for finalize_model_grads to sum their gradients over the tensor-parallel group; Apex's "
        "and Transformer Engine's do. A norm is per token, the mark is all that is missing. Nor does it know weights "
        "that are stored minus one (layernorm_zero_centered_gamma, Nemotron's and Gemma's)",
        lacking="apex",
    ),
    Patch(
        "megatron.core.tensor_parallel.random",
        "_get_cuda_rng_state",
        _get_state,
        "reads a CUDA generator; CudaRNGStatesTracker.fork (dropout, weight initialisation) calls it",
    ),
    Patch(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        _set_state,
        "sets a CUDA generator through torch._C._cuda_setRNGState",
    ),
    Patch(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "_get_write_results_queue",
        _results_queue,
        "starts a manager process with 'spawn', which imports the whole stack again (about 10 s a save) and needs a "
        "__main__ guard in the caller; a synchronous save reads the queue in the process that filled it, so a plain "
        "queue does. Asynchronous saves keep the manager",
    ),
    Patch(
        "megatron.core.dist_checkpointing.strategies.base",
        "AsyncSaveShardedStrategy.save",
        _save,
        "runs even a synchronous save in a forked child; here it runs in the process itself and tells "
        "_get_write_results_queue so",
    ),
    Patch(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.state_dict",
        _optimizer_state_dict,
        "without Apex's FusedAdam it reads 'step' from torch's AdamW and asserts that there is one, which fails when a "
        "checkpoint is loaded before the first step",
        lacking="apex",
    ),
    Patch(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.load_state_dict",
        _optimizer_load_state_dict,
        "without FusedAdam it puts one 'step' tensor into the state of every parameter; each parameter then advances "
        "it, so after a resume the bias correction of AdamW counts one step as many",
        lacking="apex",
    ),
    Patch(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer._set_main_param_and_optimizer_states",
        _set_optimizer_states,
        "copies every entry of the optimizer's state from the checkpoint, where 'step' of torch's AdamW is kept apart "
        "(KeyError: 'step'); load_state_dict has set it already",
        lacking="apex",
    ),
    Patch(
        "megatron.core.optimizer",
        "Adam",
        _one_pass,
        "is torch's AdamW, which on the CPU takes some ten passes over weights and state; its fused form takes one, a "
        "seventh of the time, and gives the same to the last bit or two",
    ),
    Patch(
        "megatron.core.optimizer.clip_grads",
        "multi_tensor_scale_impl",
        _scale_in_place,
        "without Apex it scales gradients into new memory and copies them back: twice the time, for the same bits",
    ),
    Patch(
        "megatron.core.optimizer",
        "_get_param_groups",
        _param_groups,
        "orders the groups by a stage's first parameter. With the local layer spec that is a norm (no weight decay) on "
        "every stage but the first; a checkpoint keeps the first stage's order, so after a resume the other stages "
        "decay their norms and not their matrices",
        lacking="transformer_engine",
    ),
)
