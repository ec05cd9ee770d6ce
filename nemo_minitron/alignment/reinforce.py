"""REINFORCE with NeMo-Aligner's ``ReinforceTrainer`` and actor; answers come from the Megatron model itself.

Aligner's actor generates by TensorRT-LLM, or by NeMo 1's text generation, which has no batches of prompts of different
lengths under a cache. Here it generates by :mod:`nemo_minitron.generation`. Loss, baseline and divergence are
Aligner's: the loss of a token is ``-logprob * (reward - kl_penalty * KL - baseline)``, the KL is the mean over the
answer of ``|logprob - initial logprob|`` and the baseline of an answer the mean reward of the others to its prompt
(arXiv 2402.14740), answers that did not end left out of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nemo_aligner.data.nlp.builders import build_dataloader
from nemo_aligner.utils import train_script_utils as script
from nemo_aligner.utils.server_utils import FutureResult
from nemo_aligner.utils.utils import retrieve_model_state_dict_in_cpu
from torch.utils.data import Dataset

from nemo_minitron.alignment.metrics import FiniteLoss, MetricsLog
from nemo_minitron.alignment.session import Clock, Session, last_checkpoint, open_session
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.config import AlignmentSchedule
from nemo_minitron.generation import Answer, Sampling, generate_tokens
from nemo_minitron.runtime.cpu.tensorrt_llm import optional
from nemo_minitron.runtime.groups import Groups, ParallelLayout

with optional():
    from nemo_aligner.algorithms.reinforce import ReinforceTrainer
    from nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor import MegatronGPTReinforceActorModel

__all__ = ["Prompt", "ReinforceActor", "Rewards", "Rollouts", "train_reinforce"]

#: From the prompts of a batch and the answers to them, the reward of each. Called on every rank.
Rewards = Callable[[list[int], list[Answer]], list[float]]


class Prompt(NamedTuple):
    """One prompt.

    Attributes:
        number: its index in the data, by which :data:`Rewards` knows it.
        ids: ``[n]`` tokens, up to where the assistant answers.
    """

    number: int
    ids: list[int]


@dataclass(frozen=True)
class Rollouts:
    """How answers are generated and rewarded.

    Attributes:
        sampling: how the tokens of an answer are sampled.
        seed: of the random numbers.
        ends: token ids that end an answer.
        vocab_size: true vocabulary, without padding.
        prompts_per_step, samples_per_prompt: prompts of a step, and answers to each.
        validation_prompts: answered at a validation.
        kl_penalty: weight of the divergence from the initial policy.
        batch_size: answers generated at once.
    """

    sampling: Sampling
    seed: int
    ends: tuple[int, ...]
    vocab_size: int
    prompts_per_step: int
    samples_per_prompt: int
    validation_prompts: int
    kl_penalty: float
    batch_size: int

    def settings(self, schedule: AlignmentSchedule) -> dict[str, Any]:
        """Aligner's ``model.reinforce``. Lengths and sampling must be in it, but this actor does not use them."""
        return {
            "length_params": {"max_length": self.sampling.max_new_tokens, "min_length": 1},
            "sampling_params": {"end_strings": []},
            "forward_micro_batch_size": schedule.micro_batch_size,
            "offload_adam_states": False,
        }


class ReinforceActor(FiniteLoss, MegatronGPTReinforceActorModel):  # type: ignore[misc]
    """Aligner's actor; call :meth:`prepare` before it answers."""

    def prepare(self, rollouts: Rollouts, groups: Groups) -> None:
        """Set how answers are generated.

        Args:
            rollouts: of the training.
            groups: of this rank.
        """
        self._rollouts = rollouts
        # Aligner switches sequence parallelism off while the model answers.
        self._groups = groups.without_sequence_parallel()
        self.start_at(0, 1)
        self.answers: list[Answer] = []

    def start_at(self, request: int, copies: int) -> None:
        """Before the prompts of a step, or of a validation, are answered.

        Args:
            request: number of the first answer's random draws. It depends on the step alone, also after a resume.
            copies: how often in a row each batch of prompts will be given.
        """
        self._request, self._copies = request, copies
        self._made: list[list[Answer]] = []

    def get_loss_and_metrics(self, batch: dict[str, torch.Tensor], forward_only: bool) -> tuple[float, dict[str, Any]]:
        """As Aligner's, whose product of ``[b, s]`` log-probabilities and ``[b]`` rewards is right for one answer at a
        time only (the micro-batch of its examples): the rewards get their second dimension here.

        Args:
            batch: what :class:`~nemo_aligner.algorithms.reinforce.ReinforceTrainer` gathers of the answers.
            forward_only: always False here.
        """
        batch = {**batch, **{name: batch[name][:, None] for name in ("rewards_with_kl", "baseline")}}
        return super().get_loss_and_metrics(batch, forward_only)

    @torch.no_grad()
    def infer(self, inference_batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Answer prompts.

        At the first call, all answers to the prompts are generated at once: a step of generation costs nearly the same
        for few sequences as for many. The random draws of an answer do not depend on the batch.

        Args:
            inference_batch: ``text`` ``[b, s]``, padded at the end, and ``length``, ``number`` ``[b]``.

        Returns:
            ``response_tokens`` ``[b, s]``: prompt, answer, padding; ``response_lengths`` (prompt and answer),
            ``prompt_lengths``, ``number`` and ``is_end`` (the answer ended with an end token) ``[b]``.
        """
        rollouts, lengths = self._rollouts, inference_batch["length"].tolist()
        rows = [row[:length] for row, length in zip(inference_batch["text"].tolist(), lengths, strict=True)]
        if not self._made:
            count = len(rows) * self._copies
            made = generate_tokens(
                list(self.get_model_module_list()),
                self._groups,
                rows * self._copies,
                sampling=rollouts.sampling,
                seed=rollouts.seed,
                ends=rollouts.ends,
                vocab_size=rollouts.vocab_size,
                requests=range(self._request, self._request + count),
                batch_size=rollouts.batch_size,
            )
            self._request += count
            self._made = [made[start : start + len(rows)] for start in range(0, count, len(rows))]
        self.answers = self._made.pop(0)
        texts = [row + answer.tokens for row, answer in zip(rows, self.answers, strict=True)]
        device = next(self.parameters()).device
        tokens = torch.full((len(texts), max(map(len, texts))), int(self.tokenizer.eos_id), device=device)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = torch.tensor(text, device=device)
        return {
            "response_tokens": tokens,
            "response_lengths": torch.tensor([len(text) for text in texts], device=device),
            "prompt_lengths": inference_batch["length"].to(device),
            "number": inference_batch["number"].to(device),
            "is_end": torch.tensor([answer.finish == "stop" for answer in self.answers], device=device),
        }


class _Trainer(ReinforceTrainer):  # type: ignore[misc]
    """Aligner's trainer; it gives its actor the number of the first random draw of each step and validation."""

    def _run_inference(self, dataloader_builder: Any, consumed_samples: int, is_validation: bool) -> Any:
        rollouts = self.model._rollouts
        per_step = rollouts.prompts_per_step * rollouts.samples_per_prompt
        # Validations have the same draws each time, beyond those of any step.
        if is_validation:
            self.model.start_at(2**40, copies=1)
        else:
            self.model.start_at(self.step * per_step, copies=rollouts.samples_per_prompt)
        return super()._run_inference(dataloader_builder, consumed_samples, is_validation)


class _Prompts(Dataset[Prompt]):
    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]


def _collate(batch: list[Prompt], *, width: int) -> dict[str, torch.Tensor]:
    """Pad to one width: Aligner recognises the answers to a prompt by equal rows."""
    text = torch.zeros(len(batch), width, dtype=torch.int64)
    for row, prompt in enumerate(batch):
        text[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
    numbers = torch.tensor([prompt.number for prompt in batch])
    return {"text": text, "length": torch.tensor([len(prompt.ids) for prompt in batch]), "number": numbers}


@dataclass
class _Batches:
    """The batches of a step, one after the other: Aligner's ``DefaultBatchIterator``, whose module needs flask."""

    sampler_iter: Iterator[list[int]]
    num_microbatches: int
    dataset: _Prompts
    collate_fn: Callable[[list[Prompt]], dict[str, torch.Tensor]]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for indices in itertools.islice(self.sampler_iter, self.num_microbatches):
            yield self.collate_fn([self.dataset[index] for index in indices])


class _Given(FutureResult):  # type: ignore[misc]
    def __init__(self, rewards: torch.Tensor) -> None:
        self.rewards = rewards

    def result(self) -> torch.Tensor:
        return self.rewards


class _Rewarding:
    """Rewards behind the interface of Aligner's client of a reward model server."""

    def __init__(self, model: ReinforceActor, rewards: Rewards) -> None:
        self.model, self.rewards = model, rewards

    def infer_rm(self, rollout_batch: dict[str, torch.Tensor]) -> _Given:
        """Rewards ``[b, 1]`` of the answers that the actor gave last."""
        numbers = rollout_batch["number"].tolist()
        values = self.rewards(numbers, self.model.answers)
        return _Given(torch.tensor(values, device=rollout_batch["number"].device)[:, None])


class _Log:
    """Merges the several log calls that Aligner makes for a step into one line."""

    def __init__(self, log: MetricsLog) -> None:
        self.log = log
        self.step: dict[str, float] = {}
        self.losses: list[float] = []

    def log_metrics(self, metrics: dict[str, Any], step: int, prefix: str) -> None:
        """Gather the metrics of a step; Aligner logs its timers last."""
        if prefix == "train_rollouts/":
            self.step = {_NAMES.get(name, name): float(value) for name, value in metrics.items()}
            self.losses = []
        elif prefix == "train_optim/":
            self.losses.append(float(metrics["loss"]))
            self.step["lr"] = float(metrics["lr"])
        elif prefix == "timers/":
            seconds = {f"{name}_seconds": float(metrics[name]) for name in ("rollout_time", "train_time")}
            self.step["loss"] = sum(self.losses) / len(self.losses)
            self.log.log_metrics({**self.step, **seconds}, step, "train/")
        elif prefix == "val_rollouts/":
            self.log.log_metrics({_NAMES.get(name, name): value for name, value in metrics.items()}, step, "val/")

    def log_table(self, key: str, dataframe: Any, step: int) -> None:
        """Tables of sample answers are not logged."""

    def finalize(self) -> None:
        """The last step is done."""


_NAMES = {"rewards": "reward", "init_policy_kl": "kl", "fraction_of_samples_properly_ended": "ended"}


def train_reinforce(
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    rewards: Rewards,
    rollouts: Rollouts,
    *,
    layout: ParallelLayout,
    schedule: AlignmentSchedule,
    seed: int = 1234,
    directory: Path,
    max_length: int,
    resume: bool = True,
    prepare: Callable[[Groups], None] | None = None,
) -> Path:
    """Train. Every rank calls it, with the same prompts.

    Each step's line in ``metrics.jsonl`` has ``reward``, ``rewards_with_kl``, ``kl``, ``ended`` (share of the answers),
    ``generation_length``, ``loss`` and ``lr``.

    Args:
        checkpoint: the policy to start from; the KL divergence is measured from it too. A copy of its weights stays on
            the CPU beside the trained weights.
        prompts, held_out: training and held-out prompts; a validation answers the first ``validation_prompts`` of
            the held-out prompts.
        rewards: function that gives the rewards of answers.
        rollouts: how answers are generated.
        layout: of the model; data-parallel size 1 (Aligner's trainer gives each replica all the answers of a step).
        schedule: hyper-parameters; each of its ``steps`` generates answers once and then takes ``prompts_per_step *
            samples_per_prompt / global_batch_size`` optimizer steps. ``epochs`` is not used.
        seed: of the order of the samples.
        directory: gets ``checkpoints/``, ``metrics.jsonl`` and ``tensorboard/``.
        max_length: of prompt and answer, in tokens.
        resume: go on from the last checkpoint in ``directory``.
        prepare: called once the process groups exist, before the first answer.

    Returns:
        The last training checkpoint.

    Raises:
        MinitronError: see :func:`~nemo_minitron.alignment.session.open_session`.
    """
    per_step = rollouts.prompts_per_step * rollouts.samples_per_prompt
    steps = schedule.steps or max(1, len(prompts) // rollouts.prompts_per_step)
    updates = steps * per_step // schedule.global_batch_size
    session = open_session(
        ReinforceActor,
        checkpoint,
        layout=layout,
        schedule=replace(schedule, steps=updates),
        seed=seed,
        kind="reinforce",
        directory=directory,
        samples=max(len(prompts), schedule.global_batch_size),
        held_out=schedule.global_batch_size,  # its validations have batches of their own
        max_length=max_length,
        resume=resume,
        model={"reinforce": rollouts.settings(schedule), "activations_checkpoint_layers_per_pipeline": None},
    )
    session.model.prepare(rollouts, session.groups)
    session.model.init_policy_state_dict = retrieve_model_state_dict_in_cpu(session.model, megatron_amp_O2=False)
    if prepare is not None:
        prepare(session.groups)
    width = max(len(prompt.ids) for prompt in (*prompts, *held_out))
    collate = partial(_collate, width=width)
    own = session.config.trainer.reinforce
    own.update(
        {
            "max_steps": steps,
            "max_epochs": math.ceil(steps / (len(prompts) // rollouts.prompts_per_step)),
            "initial_policy_kl_penalty": rollouts.kl_penalty,
            "use_absolute_kl": True,
            "rollout_batch_seq_length": None,
            "num_rollouts_per_prompt": rollouts.samples_per_prompt,
            "model_gbs": schedule.global_batch_size,
        }
    )
    loaders = [
        partial(
            build_dataloader,
            cfg=session.config,
            dataset=_Prompts(part),
            mbs=count,
            gbs=count,
            collate_fn=collate,
            load_gbs=False,
            use_random_sampler=training,
        )
        for part, count, training in (
            (prompts, rollouts.prompts_per_step, True),
            (held_out[: rollouts.validation_prompts], rollouts.validation_prompts, False),
        )
    ]
    _fit(session, loaders, collate, rewards, steps=steps, updates=updates, schedule=schedule)
    return last_checkpoint(directory)


def _fit(
    session: Session,
    loaders: list[Any],
    collate: Any,
    rewards: Rewards,
    *,
    steps: int,
    updates: int,
    schedule: AlignmentSchedule,
) -> None:
    optimizer, scheduler = session.start(loaders[0](consumed_samples=0))
    log = MetricsLog(
        session.directory,
        label="REINFORCE",
        steps=steps,
        done=session.state["step"] if session.state else 0,
        validate_every=schedule.validate_every,
        writes=session.groups.is_main,
    )
    clock = Clock(schedule.max_minutes)
    trainer = _Trainer(
        cfg=session.config.trainer.reinforce,
        model=session.model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader_builder=loaders[0],
        val_dataloader_builder=loaders[1],
        collate_fn=collate,
        rm=_Rewarding(session.model, rewards),
        batch_iterator_cls=_Batches,
        logger=_Log(log),
        ckpt_callback=script.add_custom_checkpoint_callback(session.trainer, session.model),
        run_timer=clock,
    )
    if session.state is not None:
        # Aligner's scripts read its numbers from the checkpoint's name, which has three of the four.
        done = session.state["step"] * (updates // steps)
        trainer.load_state_dict({**session.state, "reinforce_optimization_step": done})
    try:
        if session.state is None:  # what the initial policy gets
            metrics = trainer.run_validation()
            trainer.timer.consume_durations()  # it refuses to measure again what nobody read
            metrics.pop("table")
            trainer.logger.log_metrics(metrics, 0, "val_rollouts/")
        with clock.watch(trainer, steps):
            trainer.fit()
    finally:
        log.close()
