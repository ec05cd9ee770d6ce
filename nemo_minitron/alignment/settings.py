"""NeMo-Aligner's complete configuration from this suite's: no default inside Aligner's code decides anything."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.formats.nemo1.config import nemo1_families, nemo1_faults, to_nemo1
from nemo_minitron.config import AlignmentSchedule
from nemo_minitron.errors import CheckpointError, ConfigError, DataError, ShapeError
from nemo_minitron.runtime import cpu
from nemo_minitron.runtime.device import Device
from nemo_minitron.runtime.groups import ParallelLayout
from nemo_minitron.shape import ModelShape, uniform_faults

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["aligner_settings", "check_model", "total_steps", "validation_batch", "vocabulary_rows"]


def total_steps(schedule: AlignmentSchedule, samples: int) -> int:
    """Optimizer steps of a training on ``samples``; a last batch that is not full is left out, as Aligner does.

    Raises:
        DataError: if the samples do not fill one global batch, or the warm-up is not shorter than the training.
    """
    per_epoch = samples // schedule.global_batch_size
    if not per_epoch:
        raise DataError(
            f"{samples} training samples do not fill one global batch of {schedule.global_batch_size}; give more data "
            "or lower global_batch_size"
        )
    steps = schedule.steps or per_epoch * schedule.epochs
    if 0 < steps <= schedule.warmup(steps):
        raise DataError(
            f"warmup_steps={schedule.warmup_steps} leaves nothing of the {steps} steps that {samples} samples make; "
            "lower it, leave it out, or give more data"
        )
    return steps


def validation_batch(schedule: AlignmentSchedule, samples: int, data_parallel: int) -> int:
    """Size of a validation's global batch: at most the training's, and so that as few samples as possible are left out.

    Raises:
        DataError: if the samples do not fill one micro-batch on each data-parallel rank.
    """
    unit = schedule.micro_batch_size * data_parallel
    sizes = range(unit, min(schedule.global_batch_size, samples) + 1, unit)
    if not sizes:
        raise DataError(
            f"{samples} held-out samples do not fill one micro-batch of {schedule.micro_batch_size} on {data_parallel} "
            "data-parallel ranks; set more aside (data.held_out_fraction) or lower micro_batch_size"
        )
    return max(sizes, key=lambda size: (samples // size * size, size))


def check_model(checkpoint: Checkpoint, layout: ParallelLayout, *, max_length: int) -> None:
    """Refuse a model that NeMo 1, on which Aligner's models are built, cannot hold or split.

    Raises:
        CheckpointError: for another family, or without a tokenizer.
        ShapeError: for sizes that the layout does not divide, or layers that differ in size.
        ConfigError: for samples longer than the model's context.
    """
    family, shape = checkpoint.architecture.family, checkpoint.shape
    trained = nemo1_families()
    if family not in trained:
        raise CheckpointError(
            f"{checkpoint.path}: NeMo-Aligner trains {', '.join(trained)} models, this is a {family} model"
        )
    if faults := nemo1_faults(shape, checkpoint.architecture):
        raise CheckpointError(f"{checkpoint.path}: NeMo-Aligner trains models of NeMo 1; " + "; ".join(faults))
    if checkpoint.tokenizer is None:
        raise CheckpointError(f"{checkpoint.path} carries no tokenizer; put its files beside the weights")
    faults = uniform_faults(shape, "alignment")
    faults += shape.layout_faults(tensor=layout.tensor, pipeline=layout.pipeline_stages)
    if not faults:
        faults = _pipeline_faults(shape, layout)
    if faults:
        raise ShapeError(faults)
    context = checkpoint.architecture.max_position_embeddings
    if max_length > context:
        raise ConfigError(
            f"data.max_length={max_length}: {checkpoint.path} has a context of {context} tokens; lower it"
        )


def vocabulary_rows(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding: the vocabulary up to a multiple of 128 that the tensor-parallel ranks divide.

    It is the same under every usual layout, so that a training can be resumed under another layout: padding rows that
    are missing in a checkpoint would get an arbitrary optimizer state.
    """
    multiple = math.lcm(128, tensor)
    return -(-vocab_size // multiple) * multiple


def aligner_settings(
    checkpoint: Checkpoint,
    layout: ParallelLayout,
    schedule: AlignmentSchedule,
    *,
    seed: int,
    kind: str,
    steps: int,
    samples: int,
    held_out: int,
    max_length: int,
    model: dict[str, Any],
    device: Device | None = None,
) -> DictConfig:
    """The configuration that Aligner's scripts read from Hydra: ``trainer``, ``exp_manager`` and ``model``.

    Args:
        checkpoint: the model to train.
        layout: of the model.
        schedule: hyper-parameters.
        seed: of the order of the samples.
        kind: key of Aligner's own trainer settings below ``trainer`` ("sft", "dpo").
        steps: optimizer steps in all.
        samples, held_out: of training and validation data.
        max_length: of a sample, in tokens.
        model: settings of the model that an algorithm adds.
        device: of this process; None for the device chosen at its start.

    Raises:
        DataError: if the held-out samples do not fill one micro-batch on each data-parallel rank.
    """
    import yaml
    from omegaconf import OmegaConf

    device = cpu.ensure(device)
    bf16 = schedule.precision.startswith("bf16")
    per_node = device.per_node(layout.world_size)
    batches = {"micro_batch_size": schedule.micro_batch_size, "global_batch_size": schedule.global_batch_size}
    validation = validation_batch(schedule, held_out, layout.data)
    settings = yaml.safe_load(
        to_nemo1(
            checkpoint.shape,
            checkpoint.architecture,
            dtype="bfloat16" if bf16 else "float32",
            multiple=1,
            rows=vocabulary_rows(checkpoint.shape.vocab_size, layout.tensor),
        )
    )
    settings |= {
        **batches,
        "encoder_seq_length": max_length,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "sequence_parallel": layout.sequence_parallel,
        **_uneven_pipeline(checkpoint.shape, layout),
        "transformer_engine": device.transformer_engine,
        "megatron_amp_O2": device.is_cuda and bf16,
        "seed": seed,
        "get_attention_mask_from_fusion": True,
        "data": {
            "num_workers": 0,
            "train_ds": dict(batches),
            "validation_ds": batches | {"global_batch_size": validation},
        },
        "optim": {
            "name": "mcore_distributed_optim",
            "lr": schedule.lr,
            "weight_decay": schedule.weight_decay,
            "betas": [schedule.beta1, schedule.beta2],
            "overlap_grad_sync": False,
            "overlap_param_sync": False,
            "sched": {
                "name": "CosineAnnealing",
                "warmup_steps": schedule.warmup(steps),
                "constant_steps": 0,
                "min_lr": schedule.min_lr,
                "max_steps": steps,
            },
        },
        "peft": {"peft_scheme": "none", "restore_from_path": None},
        **model,
    }
    settings["tokenizer"]["type"] = str(checkpoint.tokenizer)
    per_epoch = samples // schedule.global_batch_size
    own = {
        "max_epochs": -(-steps // per_epoch),
        "max_steps": steps,
        "val_check_interval": schedule.validate_every,
        "save_interval": schedule.save_every,
        "limit_train_batches": 1.0,
        "limit_val_batches": 1.0 if schedule.validation_batches is None else schedule.validation_batches,
        "gradient_clip_val": schedule.clip_grad,
    }
    return OmegaConf.create(
        {
            "trainer": {
                "devices": per_node,
                "num_nodes": layout.world_size // per_node,
                "accelerator": device.accelerator,
                "precision": schedule.precision if bf16 else 32,
                "logger": False,
                "enable_checkpointing": False,
                "use_distributed_sampler": False,
                "max_epochs": -1,
                "max_steps": -1,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "gradient_clip_val": schedule.clip_grad,  # the optimizer clips by itself and reads it here
                kind: own,
            },
            "exp_manager": {
                "create_checkpoint_callback": False,
                "log_tflops_per_sec_per_gpu": False,
                "checkpoint_callback_params": {"async_save": False},
            },
            "model": settings,
        }
    )


def _uneven_pipeline(shape: ModelShape, layout: ParallelLayout) -> dict[str, int]:
    """NeMo 1's settings for pipeline stages of different size: the first or the last stage may have its own."""
    sizes = shape.pipeline_stage_sizes(layout.pipeline)
    if len(set(sizes)) == 1:
        return {}
    if len(set(sizes[1:])) == 1:
        return {"num_layers_in_first_pipeline_stage": sizes[0]}
    return {"num_layers_in_last_pipeline_stage": sizes[-1]}


def _pipeline_faults(shape: ModelShape, layout: ParallelLayout) -> list[str]:
    sizes = shape.pipeline_stage_sizes(layout.pipeline)
    if len(set(sizes[1:])) <= 1 or len(set(sizes[:-1])) <= 1:
        return []
    return [
        f"parallel.pipeline={layout.pipeline}: {shape.num_layers} layers make stages of {sizes}; NeMo-Aligner takes "
        "one stage that differs, the first or the last"
    ]
