"""One training with NeMo-Aligner: model and trainer from a checkpoint, put together as Aligner's own scripts do.

Aligner's scripts restore a ``.nemo``. Here the model is built from the checkpoint's sizes and filled by
:func:`nemo_minitron.checkpoints.load_into`, each rank with its own shard: no copy of the model is written, and any
checkpoint of this suite will do.
"""

from __future__ import annotations

import gc
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint
from nemo_aligner.data.nlp.builders import build_dataloader
from nemo_aligner.utils import train_script_utils as script
from nemo_aligner.utils.distributed import Timer
from omegaconf import DictConfig

from nemo_minitron.alignment.metrics import MetricsLog
from nemo_minitron.alignment.settings import aligner_settings, check_model, total_steps, vocabulary_rows
from nemo_minitron.checkpoints import load_into
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.training_state import SealedStates, check_state, clear_previous, is_whole, use_previous
from nemo_minitron.config import AlignmentSchedule
from nemo_minitron.errors import CheckpointError, PreemptedError
from nemo_minitron.runtime.device import here
from nemo_minitron.runtime.groups import Groups, ParallelLayout, current
from nemo_minitron.runtime.stopping import StopRequest
from nemo_minitron.runtime.waits import bounded_groups

__all__ = ["Clock", "Session", "fill", "last_checkpoint", "open_session"]

logger = logging.getLogger(__name__)


@dataclass
class Session:
    """A model of Aligner's, ready to be trained.

    Attributes:
        model: of the requested class, with its weights.
        trainer: Lightning's; Aligner uses its strategy and checkpoints.
        config: Aligner's whole configuration.
        kind: key of the trainer's part of ``config``.
        groups: process groups of this rank.
        state: ``step``, ``consumed_samples`` and ``epoch`` of the checkpoint that is resumed, or None.
        steps: optimizer steps in all.
        directory: of checkpoints and metrics.
    """

    model: Any
    trainer: Trainer
    config: DictConfig
    kind: str
    groups: Groups
    state: dict[str, Any] | None
    steps: int
    directory: Path

    def loader(self, dataset: Any, collate: Callable[[list[Any]], Any], *, training: bool) -> Any:
        """Aligner's data loader of global batches: this data-parallel rank's part of each.

        Training samples have another order in each pass, and go on from the position of a resumed checkpoint;
        validation samples keep their order. A last batch that is not full is left out.
        """
        model = self.config.model
        return build_dataloader(
            cfg=self.config,
            dataset=dataset,
            consumed_samples=self.state["consumed_samples"] if training and self.state else 0,
            mbs=model.micro_batch_size,
            gbs=model.global_batch_size if training else model.data.validation_ds.global_batch_size,
            collate_fn=collate,
            use_random_sampler=training,
        )

    def start(self, loader: Any) -> tuple[Any, Any]:
        """Optimizer and scheduler of the model, with the state of the resumed checkpoint. Call it once.

        Returns:
            ``(optimizer, scheduler)``.
        """
        script.init_using_ptl(self.trainer, self.model, loader, loader.dataset)
        optimizer, scheduler = script.extract_optimizer_scheduler_from_ptl_model(self.model)
        return optimizer, scheduler

    @property
    def chunks(self) -> list[Any]:
        """The Megatron ``GPTModel``s of this rank, as they are before :meth:`start` wraps them."""
        return _chunks(self.model)

    @contextmanager
    def training(
        self,
        trainer_class: Callable[..., Any],
        loader: Any,
        validation: Any,
        *,
        label: str,
        max_minutes: float | None,
        **options: Any,
    ) -> Iterator[Any]:
        """A context with one of Aligner's trainers, resumed where asked for; call its ``fit`` in the block.

        Args:
            trainer_class: ``SupervisedTrainer``, ``DPOTrainer``, ...
            loader, validation: from :meth:`loader`.
            label: of the progress bar.
            max_minutes: Aligner saves a checkpoint and stops after so many minutes.
            options: further arguments of the class.

        Raises:
            PreemptedError: after SIGTERM or SIGUSR1 to any rank, once the step has ended and its state is saved.
        """
        optimizer, scheduler = self.start(loader)
        done = self.state["step"] if self.state else 0
        log = MetricsLog(
            self.directory,
            label=label,
            steps=self.steps,
            done=done,
            validate_every=int(self.config.trainer[self.kind].val_check_interval),
            writes=self.groups.is_main,
        )
        clock = Clock(max_minutes)
        made = trainer_class(
            cfg=self.config.trainer[self.kind],
            model=self.model,
            optimizer=optimizer,
            scheduler=scheduler,
            train_dataloader=loader,
            val_dataloader=validation,
            test_dataloader=None,
            logger=log,
            ckpt_callback=script.add_custom_checkpoint_callback(self.trainer, self.model),
            run_timer=clock,
            **options,
        )
        if self.state is not None:
            made.load_state_dict(self.state)
        # Aligner's DPO collects garbage after each step; of what the imports left there is none, but it takes seconds.
        gc.freeze()
        try:
            with clock.watch(made, self.steps):
                yield made
        finally:
            gc.unfreeze()
            log.close()


def last_checkpoint(directory: Path) -> Path:
    """The training checkpoint with the most steps below ``directory``: distributed, with optimizer state.

    Called when the training has ended: the checkpoint before it goes.

    Raises:
        CheckpointError: if there is none.
    """
    checkpoints = _saved(directory / "checkpoints")
    if not checkpoints:
        raise CheckpointError(f"{directory}/checkpoints holds no checkpoint; the training saved none")
    clear_previous(directory / "checkpoints")
    return checkpoints[-1]


def open_session(
    model_class: Callable[..., Any],
    checkpoint: Checkpoint,
    *,
    layout: ParallelLayout,
    schedule: AlignmentSchedule,
    seed: int = 1234,
    kind: str,
    directory: Path,
    samples: int,
    held_out: int,
    max_length: int,
    resume: bool = True,
    model: dict[str, Any] | None = None,
    skip: Sequence[str] = (),
) -> Session:
    """Build and fill one of Aligner's models. Every rank calls it.

    Args:
        model_class: ``GPTSFTModel``, ``MegatronGPTDPOModel``, ...
        checkpoint: initial weights and tokenizer.
        layout: of the model; must fill the world.
        schedule: hyper-parameters.
        seed: of the order of the samples.
        kind: Aligner's name of the trainer's settings ("sft", "dpo", ...).
        directory: gets ``checkpoints/``, ``metrics.jsonl`` and ``tensorboard/``.
        samples, held_out: of training and validation data.
        max_length: of a sample, in tokens.
        resume: go on from the last whole checkpoint in ``directory``; otherwise checkpoints there are removed.
        model: settings of the model that the algorithm adds.
        skip: parameters with these name prefixes keep their initial values (the head of a reward model).

    Raises:
        MinitronError: see :func:`~nemo_minitron.alignment.settings.check_model`; a DataError for too few samples.
    """
    check_model(checkpoint, layout, max_length=max_length)
    steps = total_steps(schedule, samples)
    config = aligner_settings(
        checkpoint,
        layout,
        schedule,
        seed=seed,
        kind=kind,
        steps=steps,
        samples=samples,
        held_out=held_out,
        max_length=max_length,
        model=model or {},
    )
    _clear(directory / "checkpoints", everything=not resume)
    destroy_num_microbatches_calculator()  # of an earlier session of this process
    trainer = script.resolve_and_create_trainer(config, kind)
    _add_checkpoints(trainer, directory / "checkpoints", checkpoint)
    with bounded_groups():
        made = model_class(config.model, trainer)
        state = script.retrieve_custom_trainer_state_dict(trainer)
        script.init_distributed(trainer, made, config.model.transformer_engine)
    groups = current(layout)
    fill(made, checkpoint, groups, skip=skip)
    _mask_padding(made, checkpoint.shape.vocab_size, groups)
    if state is not None:
        logger.info("goes on after step %d of %d", state["step"], steps)
    return Session(made, trainer, config, kind, groups, state, steps, directory)


class _Checkpoints(SealedStates, NeMoModelCheckpoint):
    """NeMo's checkpoint callback; Aligner's trainers use only its saving."""

    # Aligner reads its state from the name.
    CHECKPOINT_NAME_LAST = "step={step}-consumed_samples={consumed_samples}-epoch={epoch}-last"

    def __init__(self, directory: Path) -> None:
        super().__init__(
            dirpath=str(directory),
            filename=self.CHECKPOINT_NAME_LAST.removesuffix("-last"),
            auto_insert_metric_name=False,
            monitor="step",
            save_top_k=0,  # the last one alone: it holds the optimizer too
            save_last=True,
            save_nemo_on_train_end=False,
            save_best_model=False,
        )


def _add_checkpoints(trainer: Trainer, directory: Path, model: Checkpoint) -> None:
    """Save into ``directory``, and resume from the last checkpoint there.

    NeMo's ``exp_manager`` would do that too, and on a resume move all other files of the output away.
    """
    callback = _Checkpoints(directory)
    use_previous(directory)
    saved = _saved(directory)
    if saved:
        check_state(saved[-1], begin_again="give overwrite=true to begin again", model=model)
        trainer.ckpt_path = callback.last_model_path = str(saved[-1])
    trainer.callbacks.append(callback)


def fill(model: Any, checkpoint: Checkpoint, groups: Groups, *, skip: Sequence[str] = ()) -> None:
    """Put a checkpoint's weights into one of Aligner's models, whatever wraps it. Every rank reads its own shard."""
    load_into(_chunks(model), checkpoint, groups, skip=skip)


def _chunks(model: Any) -> list[Any]:
    """The Megatron ``GPTModel``s of this rank."""
    return list(model.get_model_module_list())


def _mask_padding(model: Any, vocab_size: int, groups: Groups) -> None:
    """Keep the padding rows of the vocabulary out of every softmax.

    Their zero logits would take probability from the others.
    """
    if vocab_size == vocabulary_rows(vocab_size, groups.layout.tensor):
        return

    def hook(layer: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        logits, bias = output
        real = vocab_size - groups.tp_rank * logits.shape[-1]
        if real >= logits.shape[-1]:
            return output
        padding = torch.arange(logits.shape[-1], device=logits.device) >= real
        return logits.masked_fill(padding, -1e4), bias

    for chunk in _chunks(model):
        if chunk.post_process:
            chunk.output_layer.register_forward_hook(hook)


def _clear(checkpoints: Path, *, everything: bool) -> None:
    """Remove unfinished checkpoints of a killed run (NeMo marks them) and checkpoints it had no time to remove, or all.

    NeMo saves a checkpoint and then removes the one before. Every rank tries; the first one removes, and nothing else
    touches the directory before training starts.
    """
    if everything:
        shutil.rmtree(checkpoints, ignore_errors=True)
        clear_previous(checkpoints)
    for marker in checkpoints.glob("*" + NeMoModelCheckpoint.UNFINISHED_CHECKPOINT_SUFFIX):
        whole = str(marker).removesuffix(NeMoModelCheckpoint.UNFINISHED_CHECKPOINT_SUFFIX)
        shutil.rmtree(whole, ignore_errors=True)
        marker.unlink(missing_ok=True)
    *others, last = _saved(checkpoints) or [checkpoints]
    if is_whole(last):
        for older in others:
            shutil.rmtree(older, ignore_errors=True)


def _saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder, that of the most steps last."""
    return sorted((path for path in folder.glob("*-last") if path.is_dir()), key=_steps_of)


def _steps_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    match = re.search(r"step=(\d+)", checkpoint.name)
    return int(match[1]) if match else -1


class Clock(Timer):
    """Tells Aligner after each step whether to stop: the time is over, or any rank has received a signal."""

    def __init__(self, minutes: float | None) -> None:
        seconds = None if minutes is None else max(1, round(minutes * 60))
        super().__init__(None if seconds is None else f"0:0:0:{seconds}")
        self._request = StopRequest()
        self._asked = False

    @contextmanager
    def watch(self, trainer: Any, steps: int) -> Iterator[None]:
        """Note signals while the block trains.

        Raises:
            PreemptedError: if a signal ended the training before its last step; its state is saved.
        """
        with self._request:
            yield
        if self._asked and trainer.step < steps:
            raise PreemptedError(
                f"stopped by a signal after step {trainer.step} of {steps}: its state is saved. The same command goes "
                "on from there"
            )

    def is_finished(self) -> bool:
        """Whether to stop; the same on every rank. Collective."""
        over = torch.tensor([self.get_time_remaining() <= 0, bool(self._request.received)], dtype=torch.float)
        over = over.to(here().torch)
        torch.distributed.all_reduce(over, torch.distributed.ReduceOp.MAX)
        self._asked = bool(over[1])
        return bool(over.any())
