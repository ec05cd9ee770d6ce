"""Alignment as recipes of nemo_run: SFT, then two rounds of RPO, as the Minitron models were aligned.

arXiv 2408.11796, section 4, says which algorithms (NeMo-Aligner's SFT, then two rounds of RPO) and names no
hyper-parameters. Those here are of NeMo-Aligner's own guides to SFT (batch 128, 5e-6) and to DPO, IPO and RPO (batches
of 256 or 512 and one epoch; ten steps of warm-up to 9e-7, slowly down to 5e-7; penalty 0.1 to 1), for models of such
sizes. RPO's form is arXiv 2406.11704's (section 3.3.3): the KL divergence of the data's preference from the policy's,
``rpo_bwd_kl`` in Aligner::

    import nemo_run as run
    from nemo_minitron.recipes.alignment import dpo_recipe, sft_recipe

    recipe = sft_recipe("runs/distilled/model", "data/chats.jsonl", "runs/sft", tensor=2, devices=8)
    recipe.config.lr = 1e-5
    run.run(recipe, executor=run.LocalExecutor(ntasks_per_node=8, launcher="torchrun"))
"""

from __future__ import annotations

from typing import Any

import nemo_run as run

from nemo_minitron.config import AlignConfig, ChatDataConfig, DpoConfig, ParallelLayout, RewardConfig, SftConfig
from nemo_minitron.errors import ConfigError

__all__ = ["align", "dpo_recipe", "reward_recipe", "sft_recipe"]


@run.cli.entrypoint(name="align", namespace="minitron")
def align(config: AlignConfig) -> dict[str, Any]:
    """Align, on every process that an executor started; what ``minitron sft`` and ``minitron dpo`` run.

    Args:
        config: of either stage.

    Returns:
        The figures of the record, on rank 0.

    Raises:
        ConfigError: with all that is wrong with the settings.
        MinitronError: as the stage.
    """
    from nemo_minitron.jobs.in_place import run_in_place

    return run_in_place(config)


@run.cli.factory(target=align, name="sft")
def sft_recipe(
    model: str,
    chats: str,
    output: str,
    num_nodes: int = 1,
    devices: int = 8,
    tensor: int = 1,
    pipeline: int = 1,
    max_length: int = 4096,
    precision: str = "bf16-mixed",
) -> run.Partial[Any]:
    """Supervised fine-tuning on conversations, several to a row.

    Args:
        model: checkpoint.
        chats: JSONL.
        output: directory.
        num_nodes, devices: processes are their product; those that ``tensor`` and ``pipeline`` leave are data-parallel.
        tensor, pipeline: parallel sizes.
        max_length: tokens of a row.
        precision: "bf16-mixed" on GPUs, "32" on a CPU.

    Returns:
        A partial of :func:`align`, to be changed and run.

    Raises:
        ConfigError: if the processes cannot be shared out.
    """
    return run.Partial(
        align,
        config=run.Config(
            SftConfig,
            output=output,
            model=model,
            data=_data(chats, max_length),
            pack=True,
            global_batch_size=128,
            lr=5e-6,
            min_lr=5e-7,
            validate_every=100,
            save_every=100,
            formats=["hf"],
            precision=precision,
            parallel=_layout(num_nodes * devices, tensor, pipeline),
        ),
    )


@run.cli.factory(target=align, name="dpo")
def dpo_recipe(
    model: str,
    pairs: str,
    output: str,
    loss: str = "rpo_bwd_kl",
    rounds: int = 2,
    num_nodes: int = 1,
    devices: int = 8,
    tensor: int = 1,
    pipeline: int = 1,
    max_length: int = 4096,
    precision: str = "bf16-mixed",
) -> run.Partial[Any]:
    """Preference optimization: two rounds of RPO, each held to the policy that it starts from.

    Args:
        model: checkpoint.
        pairs: JSONL, with ``chosen_reward`` and ``rejected_reward`` for RPO.
        output: directory.
        loss: "dpo", "ipo", "rpo_sq", "rpo_bwd_kl" or "rpo_fwd_kl".
        rounds: how often.
        num_nodes, devices, tensor, pipeline, max_length, precision: as of :func:`sft_recipe`.

    Returns:
        A partial of :func:`align`, to be changed and run.

    Raises:
        ConfigError: if the processes cannot be shared out.
    """
    return run.Partial(
        align,
        config=run.Config(
            DpoConfig,
            output=output,
            model=model,
            data=_data(pairs, max_length),
            loss=loss,
            rounds=rounds,
            beta=0.1,
            global_batch_size=256,
            lr=9e-7,
            min_lr=5e-7,
            validate_every=25,
            save_every=25,
            formats=["hf"],
            precision=precision,
            parallel=_layout(num_nodes * devices, tensor, pipeline),
        ),
    )


@run.cli.factory(target=align, name="reward")
def reward_recipe(
    model: str,
    chats: str,
    output: str,
    num_nodes: int = 1,
    devices: int = 8,
    tensor: int = 1,
    pipeline: int = 1,
    max_length: int = 4096,
    precision: str = "bf16-mixed",
) -> run.Partial[Any]:
    """SteerLM's attribute model: a regression on HelpSteer's five values.

    Batch 128 of sequences of 4096 tokens, as the ``model_config.yaml`` of Llama3-70B-SteerLM-RM and
    Nemotron-4-340B-Reward; the learning rate is this suite's own choice. Then ``minitron label``, and
    :func:`sft_recipe` with ``data.labelled``.

    Args:
        model: checkpoint.
        chats: JSONL with ``attributes``.
        output: directory.
        num_nodes, devices, tensor, pipeline, max_length, precision: as of :func:`sft_recipe`.

    Returns:
        A partial of :func:`align`, to be changed and run.

    Raises:
        ConfigError: if the processes cannot be shared out.
    """
    layout = _layout(num_nodes * devices, tensor, pipeline)
    layout.sequence_parallel = False  # the head reads the last token of an unsplit sequence
    return run.Partial(
        align,
        config=run.Config(
            RewardConfig,
            output=output,
            model=model,
            data=_data(chats, max_length),
            global_batch_size=128,
            lr=2e-6,
            min_lr=2e-7,
            validate_every=50,
            save_every=50,
            precision=precision,
            parallel=layout,
        ),
    )


def _data(path: str, max_length: int) -> run.Config[ChatDataConfig]:
    return run.Config(ChatDataConfig, path=path, max_length=max_length, held_out_fraction=0.02, long="drop")


def _layout(processes: int, tensor: int, pipeline: int) -> run.Config[ParallelLayout]:
    if processes % (tensor * pipeline):
        raise ConfigError(
            f"num_nodes * devices = {processes}: is not a multiple of tensor * pipeline = {tensor * pipeline}; change "
            "either"
        )
    data = processes // (tensor * pipeline)
    return run.Config(ParallelLayout, tensor=tensor, pipeline=pipeline, data=data, sequence_parallel=tensor > 1)
