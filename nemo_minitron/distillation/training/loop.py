"""A NeMo 2 training on token blocks, built from NeMo's own parts, for distillation and correction.

:func:`trainer_of` and :func:`optimizer_of` return the objects of a NeMo recipe; :func:`train` runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.llm.gpt.model.base import GPTConfig, local_layer_spec
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler

from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.formats.nemo2.config import nemo_config
from nemo_minitron.checkpoints.training_state import check_state, use_previous
from nemo_minitron.config import Schedule
from nemo_minitron.data.blocks import Blocks
from nemo_minitron.distillation.compatibility import check_context
from nemo_minitron.distillation.training.blocks_module import BlockDataModule, DocumentMasks
from nemo_minitron.distillation.training.checkpoints import BestCheckpoint, LastCheckpoint
from nemo_minitron.distillation.training.guards import FiniteGradients, Preemption
from nemo_minitron.distillation.training.language_model import TrainedModel
from nemo_minitron.distillation.training.metrics import VALIDATION, ExactPosition, ProgressBar, StepMetrics
from nemo_minitron.distillation.training.outputs import Trained, remove_unfinished, step_of
from nemo_minitron.planning.model import Model
from nemo_minitron.planning.training import ForwardFlops
from nemo_minitron.runtime import cpu, versions
from nemo_minitron.runtime.context_attention import context_layer_spec
from nemo_minitron.runtime.device import Device
from nemo_minitron.runtime.groups import ParallelLayout
from nemo_minitron.runtime.model import pipeline_layer_layout
from nemo_minitron.runtime.stopping import StopRequest
from nemo_minitron.runtime.waits import bounded_groups
from nemo_minitron.shape import ModelShape, padded_vocab

__all__ = ["optimizer_config", "optimizer_of", "train", "trained_config", "trainer_of"]


def optimizer_config(schedule: Schedule) -> OptimizerConfig:
    """AdamW with Megatron's distributed optimizer."""
    bf16 = schedule.precision.startswith("bf16")
    return OptimizerConfig(
        optimizer="adam",
        lr=schedule.lr,
        min_lr=schedule.min_lr,
        weight_decay=schedule.weight_decay,
        adam_beta1=schedule.beta1,
        adam_beta2=schedule.beta2,
        adam_eps=1e-8,
        clip_grad=schedule.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
    )


def optimizer_of(schedule: Schedule) -> nl.MegatronOptimizerModule:
    """AdamW with Megatron's distributed optimizer, warm-up and cosine decay."""
    return nl.MegatronOptimizerModule(
        config=optimizer_config(schedule),
        lr_scheduler=CosineAnnealingScheduler(
            max_steps=schedule.steps, warmup_steps=schedule.warmup(), constant_steps=0, min_lr=schedule.min_lr
        ),
    )


def trainer_of(
    shape: ModelShape, layout: ParallelLayout, schedule: Schedule, device: Device | None = None
) -> nl.Trainer:
    """NeMo's trainer of a model under a layout.

    Args:
        shape: of the model.
        layout: of the model.
        schedule: hyper-parameters.
        device: of this process; None for what was decided on at its start.
    """
    device = cpu.ensure(device)
    dtype = torch.bfloat16 if schedule.precision.startswith("bf16") else torch.float32
    strategy = nl.MegatronStrategy(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        **versions.layer_layout(pipeline_layer_layout(shape, layout)),
        sequence_parallel=layout.sequence_parallel,
        pipeline_dtype=dtype,
        process_group_backend=device.backend,
        ddp=DistributedDataParallelConfig(check_for_nan_in_grad=False, use_distributed_optimizer=True),
        gradient_as_bucket_view=True,
        ckpt_async_save=False,
        replace_progress_bar=False,
    )
    per_node = device.per_node(layout.world_size)
    return nl.Trainer(
        accelerator=device.accelerator,
        devices=per_node,
        num_nodes=layout.world_size // per_node,
        max_steps=schedule.steps,
        max_time=_days_hours_minutes_seconds(schedule.max_minutes) if schedule.max_minutes else None,
        # FiniteGradients looks at the gradients instead, and tells every rank
        strategy=strategy,
        plugins=nl.MegatronMixedPrecision(precision=schedule.precision),
        val_check_interval=min(schedule.validate_every, schedule.steps),
        # Lightning counts micro-batches here.
        limit_val_batches=schedule.validation_batches
        * (schedule.global_batch_size // (schedule.micro_batch_size * layout.data)),
        num_sanity_val_steps=0,
        log_every_n_steps=schedule.log_every,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def trained_config(
    initial: Checkpoint, layout: ParallelLayout, schedule: Schedule, device: Device | None = None
) -> GPTConfig:
    """NeMo's configuration of a model that is trained under a layout.

    Its vocabulary has as many rows as :func:`nemo_minitron.runtime.model.build_model` gives it.

    Args:
        initial: the model.
        layout: of the model.
        schedule: hyper-parameters.
        device: of this process; None for what was decided on at its start.
    """
    device = cpu.ensure(device)
    config: GPTConfig = nemo_config(
        initial.shape,
        initial.architecture,
        dtype="bfloat16" if schedule.precision.startswith("bf16") else "float32",
        multiple=128,
        rows=padded_vocab(initial.shape.vocab_size, tensor=layout.tensor),
    )
    config.expert_model_parallel_size = layout.expert
    if initial.shape.num_moe_experts is not None and layout.tensor > 1:
        # Megatron scales the loss that balances experts by the tokens of a rank, and the gradients by those of all:
        # under sequence parallelism it would weigh less, the more ranks share a sequence.
        config.moe_aux_loss_coeff *= layout.tensor
        if not device.is_cuda:
            # NeMo's "alltoall" gathers different numbers of tokens over the tensor-parallel ranks, which gloo does not
            config.moe_token_dispatcher_type = "allgather"  # noqa: S105 (no password)
    if schedule.recompute != "none":
        config.recompute_granularity = schedule.recompute
    if schedule.recompute == "full":
        config.recompute_method, config.recompute_num_layers = "uniform", 1
    if layout.virtual_pipeline is not None:
        # As in :func:`nemo_minitron.runtime.model.transformer_config`, where the reasons stand.
        config.overlap_p2p_comm, config.batch_p2p_comm = True, False
        config.deallocate_pipeline_outputs = device.is_cuda
    if device.is_cuda and not device.transformer_engine:
        config.transformer_layer_spec = local_layer_spec  # NeMo would take Transformer Engine's where it is installed
    if layout.context > 1 and not device.transformer_engine:
        # NeMo writes into the context of a checkpoint what a configuration was made with: this stays out of it.
        config.transformer_layer_spec = context_layer_spec
    return config


def train(
    model: TrainedModel,
    initial: Checkpoint,
    train_blocks: torch.Tensor | Blocks,
    validation_blocks: torch.Tensor | Blocks,
    *,
    layout: ParallelLayout,
    schedule: Schedule,
    seed: int = 0,
    directory: Path,
    resume: bool = True,
    callbacks: Sequence[pl.Callback] = (),
    forward: Sequence[Checkpoint] = (),
    numbered: bool = False,
    title: str = "training",
) -> Trained:
    """Train a model with NeMo's ``llm.train``. Every rank calls it.

    Args:
        model: with its loss, configured by :func:`trained_config`.
        initial: its weights to start from.
        train_blocks, validation_blocks: ``[n, s + 1]`` token blocks, or blocks that say which documents they hold; the
            same on every rank.
        layout: of the model.
        schedule: hyper-parameters.
        seed: of the order of repeated passes over the data.
        directory: gets ``checkpoints/``, ``best/`` where it is kept, ``tensorboard/`` and ``metrics.jsonl``.
        resume: go on from the last whole checkpoint in ``directory``.
        callbacks: callbacks of the loss; they run before those of this function.
        forward: further models that run forward on the tokens of each step; they are counted in the FLOPs.
        numbered: training samples have their numbers, ``sample``, for a callback that takes them out.
        title: of the progress bar.

    Raises:
        CheckpointError: if the checkpoint that the training would go on from is damaged.
        ConfigError: for blocks of several documents under context parallelism.
        NonFiniteError: if the loss or a gradient is not finite; before the weights change.
        PreemptedError: after SIGTERM or SIGUSR1, once the step has ended and the training state is saved.
    """
    packed = Blocks.of(train_blocks).segments is not None
    check_context(layout, documents=packed)
    length = Blocks.of(train_blocks).sequence_length
    tokens_per_step = schedule.global_batch_size * length
    # A backward pass is two forward ones.
    passes = 3 * _forward_flops(initial, length) + sum(_forward_flops(model, length) for model in forward)
    data = BlockDataModule(
        train_blocks,
        validation_blocks,
        steps=schedule.steps,
        micro_batch_size=schedule.micro_batch_size,
        global_batch_size=schedule.global_batch_size,
        seed=seed,
        numbered=numbered,
    )
    trainer = trainer_of(initial.shape, layout, schedule)
    # Appended here and not given to the trainer, whose arguments NeMo writes into the context of each checkpoint.
    # Before NeMo's checkpoints: what a checkpoint has behind it shall be written when it is saved.
    trainer.callbacks[:0] = [
        *callbacks,
        DocumentMasks(packed),
        ExactPosition(),
        FiniteGradients(),
        StepMetrics(
            directory / "metrics.jsonl",
            tokens_per_step=tokens_per_step,
            flops_per_step=passes * tokens_per_step,
            every=schedule.log_every,
        ),
        ProgressBar(title, schedule.steps, tokens_per_step=tokens_per_step),
        Preemption(request := StopRequest()),
    ]
    last, best = LastCheckpoint(directory / "checkpoints", every=schedule.save_every), None
    if schedule.keep_best is not None:
        best = BestCheckpoint(directory / "best", VALIDATION + schedule.keep_best)
        trainer.callbacks.append(best)
    log = nl.NeMoLogger(
        log_dir=str(directory),
        name="log",
        use_datetime_version=False,
        ckpt=last,
        tensorboard=TensorBoardLogger(save_dir=str(directory), name="tensorboard", version=""),
        update_logger_directory=False,
    )
    checkpoints = directory / "checkpoints"
    remove_unfinished(checkpoints)
    remove_unfinished(directory / "best")
    if resume:
        use_previous(checkpoints)
        if saved := [path for path in checkpoints.glob("*") if path.is_dir()]:
            check_state(max(saved, key=step_of), begin_again="give overwrite=true to begin again", model=initial)
    with request, bounded_groups():
        llm.train(
            model,
            data,
            trainer,
            log=log,
            resume=nl.AutoResume(
                resume_if_exists=resume, resume_ignore_no_checkpoint=True, resume_from_directory=str(checkpoints)
            ),
        )
    kept = best.best_model_path if best is not None else ""
    return Trained(_directory(last.last_model_path), _directory(kept) if kept else None)


def _forward_flops(model: Checkpoint, sequence_length: int) -> float:
    """Operations of a forward pass for one token."""
    return ForwardFlops.of(Model(model.shape, model.architecture), sequence_length).total


def _directory(checkpoint: str) -> Path:
    """The directory of a NeMo checkpoint; Lightning's name for it is that of a file."""
    return Path(checkpoint.removesuffix(".ckpt"))


def _days_hours_minutes_seconds(minutes: float) -> str:
    """Lightning's text form: NeMo tries to wrap the class of each argument and cannot wrap ``timedelta``."""
    seconds = max(1, round(minutes * 60))
    return f"{seconds // 86400:02}:{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
