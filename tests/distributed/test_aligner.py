"""NeMo-Aligner's supervised fine-tuning on CPU: GPTSFTModel and SupervisedTrainer, unmodified, under gloo."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import tiny_checkpoint
from support.distributed import run_distributed

STEPS = 6
SAVED_AT = 3
VOCABULARY = 128


def fine_tune(restored: str, tokenizer: str, data: str, out: str, tensor: int, steps: int) -> dict[str, Any]:
    """What the recipe of NeMo-Aligner for SFT does, through its own functions; losses by step.

    A checkpoint that an earlier call left in ``out`` is resumed.
    """
    from nemo.utils.exp_manager import exp_manager
    from nemo_aligner.algorithms.supervised import SupervisedTrainer
    from nemo_aligner.data.nlp.builders import build_dataloader, build_sft_dataset
    from nemo_aligner.models.nlp.gpt.gpt_sft_model import GPTSFTModel
    from nemo_aligner.utils import train_script_utils as script
    from nemo_aligner.utils.distributed import Timer
    from nemo_aligner.utils.utils import load_and_override_model_config, load_from_nemo
    from omegaconf import OmegaConf

    split = {
        "file_path": data,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "max_seq_length": 32,
        "min_seq_length": 1,
        "prompt_template": "{input} {output}",
        "label_key": "output",
        "truncation_field": "input",
    }
    config = OmegaConf.create(
        {
            "trainer": {
                "devices": tensor,
                "num_nodes": 1,
                "accelerator": "cpu",
                "precision": 32,
                "logger": False,
                "enable_checkpointing": False,
                "use_distributed_sampler": False,
                "max_epochs": -1,
                "max_steps": -1,
                "enable_progress_bar": False,
                "gradient_clip_val": 1.0,  # mcore_distributed_optim clips by itself and reads it here
                "sft": {
                    "max_epochs": 1,
                    "max_steps": steps,
                    "val_check_interval": SAVED_AT,
                    "save_interval": SAVED_AT,
                    "limit_val_batches": 2,
                    "limit_train_batches": 1.0,
                    "gradient_clip_val": 1.0,
                },
            },
            "exp_manager": {
                "explicit_log_dir": out,
                "create_tensorboard_logger": False,
                "create_checkpoint_callback": True,
                "resume_if_exists": True,
                "resume_ignore_no_checkpoint": True,
                "log_tflops_per_sec_per_gpu": False,
                "checkpoint_callback_params": {
                    "monitor": "val_loss",
                    "mode": "min",
                    "save_top_k": 1,
                    "save_nemo_on_train_end": False,
                    "save_best_model": False,
                    "filename": "sft--{val_loss:.3f}-{step}-{consumed_samples}-{epoch}",
                },
            },
            "model": {
                "restore_from_path": restored,
                "micro_batch_size": 2,
                "global_batch_size": 4,
                "tensor_model_parallel_size": tensor,
                # NeMo 1 pads the vocabulary to this times the tensor-parallel size; the padding rows take part in the
                # softmax, so two layouts have one loss only if they have one padding.
                "make_vocab_size_divisible_by": VOCABULARY // tensor,
                "tokenizer": {"type": tokenizer},
                "seed": 1,
                "data": {"num_workers": 0, "train_ds": split, "validation_ds": split},
                "optim": {
                    "name": "mcore_distributed_optim",
                    "lr": 1e-2,
                    "weight_decay": 0.0,
                    "betas": [0.9, 0.95],
                    "sched": {
                        "name": "CosineAnnealing",
                        "warmup_steps": 2,
                        "constant_steps": 0,
                        "min_lr": 1e-3,
                        "max_steps": 20,
                    },
                },
                "peft": {"peft_scheme": "none", "restore_from_path": None},
            },
        }
    )
    config.model = load_and_override_model_config(restored, config.model)
    trainer = script.resolve_and_create_trainer(config, "sft")
    exp_manager(trainer, config.exp_manager)
    model = load_from_nemo(GPTSFTModel, config.model, trainer, strict=True, restore_path=restored)
    state = script.retrieve_custom_trainer_state_dict(trainer)
    script.init_distributed(trainer, model, config.model.transformer_engine)

    loaders = []
    for part, seen in (
        (config.model.data.train_ds, state["consumed_samples"] if state else 0),
        (config.model.data.validation_ds, 0),
    ):
        dataset = build_sft_dataset(part, model.tokenizer, None, answer_only_loss=True, is_chat=False)
        loader = build_dataloader(
            cfg=config,
            dataset=dataset,
            consumed_samples=seen,
            mbs=part.micro_batch_size,
            gbs=part.global_batch_size,
            collate_fn=dataset.collate_fn,
            use_random_sampler=False,
        )
        loaders.append(loader)
    script.init_using_ptl(trainer, model, loaders[0], loaders[0].dataset)
    optimizer, scheduler = script.extract_optimizer_scheduler_from_ptl_model(model)

    logged: list[dict[str, float]] = []

    class Recorder:
        def log_metrics(self, metrics: dict[str, float], step: int, prefix: str = "") -> None:
            logged.append({"step": step, **{prefix + name: float(value) for name, value in metrics.items()}})

        def finalize(self) -> None:
            pass

    supervised = SupervisedTrainer(
        cfg=config.trainer.sft,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader=loaders[0],
        val_dataloader=loaders[1],
        test_dataloader=None,
        logger=Recorder(),
        ckpt_callback=script.add_custom_checkpoint_callback(trainer, model),
        run_timer=Timer(None),
        run_init_validation=state is None,
    )
    if state is not None:
        supervised.load_state_dict(state)
    supervised.fit()
    rows = {name: {row["step"]: row[name] for row in logged if name in row} for name in ("train/loss", "val/loss")}
    return {"resumed from": trainer.ckpt_path, **rows}


def nemo1(restored: str, tokenizer: str, data: str, out: str, tensor: int) -> dict[str, Any]:
    """NeMo 1 without Aligner: construct, train a little, ``save_to``, ``restore_from``."""
    import torch
    from lightning.pytorch import Trainer
    from megatron.core import parallel_state
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.modules.common.megatron.clip_grads import clip_grad_norm_fp32
    from nemo.collections.nlp.modules.common.megatron.utils import get_params_for_weight_decay_optimization
    from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy
    from omegaconf import OmegaConf

    config = OmegaConf.load(f"{restored}/model_config.yaml")
    config.tokenizer.type = tokenizer
    config.tensor_model_parallel_size = tensor
    trainer = Trainer(
        devices=tensor,
        accelerator="cpu",
        precision=32,
        strategy=NLPDDPStrategy(),
        logger=False,
        enable_checkpointing=False,
    )
    model = MegatronGPTModel(config, trainer)
    (module,) = model.get_model_module_list()
    ids = torch.arange(12)[None]
    mask = torch.ones(12, 12, dtype=torch.bool).triu(1)[None, None]
    module(ids, torch.arange(12)[None], mask, labels=ids).mean().backward()
    parts = [parameter.grad.square().sum() for parameter in module.parameters() if parameter.dim() > 1]
    whole = [parameter.grad.square().sum() for parameter in module.parameters() if parameter.dim() == 1]
    squares = torch.stack(parts).sum()
    torch.distributed.all_reduce(squares, group=parallel_state.get_tensor_model_parallel_group())
    expected = float((squares + torch.stack(whole).sum()).sqrt())
    norm = float(clip_grad_norm_fp32(list(module.parameters()), expected / 2))
    decayed, plain = get_params_for_weight_decay_optimization(module)

    model.save_to(out)
    again = MegatronGPTModel.restore_from(out, trainer=trainer)
    ours, theirs = (dict(one.get_model_module_list()[0].named_parameters()) for one in (model, again))
    return {
        "norms": (norm, expected),
        "decayed": [{parameter.dim() for parameter in group["params"]} for group in (decayed, plain)],
        "parameters": len(ours),
        "same": all(torch.equal(ours[name], theirs[name]) for name in ours) and ours.keys() == theirs.keys(),
    }


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny ``.nemo``, unpacked (NeMo 1 cannot point into an archive for a Hugging Face tokenizer), and its data."""
    from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
    from nemo_minitron.checkpoints.formats.nemo1.checkpoint import unpack_nemo1

    folder = tmp_path_factory.mktemp("aligner")
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    source = open_checkpoint(tiny_checkpoint(folder / "hf", **sizes, **heads))
    write_checkpoint(source, folder / "tiny.nemo", "nemo")
    config = unpack_nemo1(folder / "tiny.nemo", folder / "unpacked")
    rows = [
        {
            "input": " ".join(f"w{(i + j) % 40}" for j in range(4)),
            "output": " ".join(f"w{(i + j) % 40}" for j in range(4, 9)),
        }
        for i in range(64)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "restored": str(folder / "unpacked"),
        "tokenizer": config["tokenizer"]["type"],
        "data": str(folder / "data.jsonl"),
    }


@pytest.mark.slow
def test_nemo1_saves_and_restores(workspace: dict[str, str], tmp_path: Path) -> None:
    """Also what NeMo 1 has and the distributed optimizer does not use: clipping, the choice of decayed weights."""
    results = run_distributed(nemo1, 2, tmp_path, timeout=120, **workspace, out=str(tmp_path / "saved.nemo"), tensor=2)
    for result in results:
        assert result["same"]
        assert result["parameters"] == 15
        assert result["decayed"] == [{2}, {1}], "matrices are decayed, norms are not"
        assert result["norms"][0] == pytest.approx(result["norms"][1], rel=1e-5)
    with tarfile.open(tmp_path / "saved.nemo") as archive:
        names = archive.getnames()
    assert "./model_config.yaml" in names
    assert "./model_weights/.metadata" in names


@pytest.mark.slow
def test_sft_is_the_same_under_tensor_parallelism_and_across_a_resume(
    workspace: dict[str, str], tmp_path: Path
) -> None:
    """TP 1 in one go against TP 2 that stops half way and goes on in new processes."""
    from torch.distributed.checkpoint import FileSystemReader

    (whole,) = run_distributed(
        fine_tune, 1, tmp_path, timeout=120, **workspace, out=str(tmp_path / "one"), tensor=1, steps=STEPS
    )
    two = {**workspace, "out": str(tmp_path / "two"), "tensor": 2}
    first = run_distributed(fine_tune, 2, tmp_path, timeout=120, **two, steps=SAVED_AT)
    second = run_distributed(fine_tune, 2, tmp_path, timeout=120, **two, steps=STEPS)

    assert whole["resumed from"] is None
    assert first[0]["resumed from"] is None
    assert f"step={SAVED_AT}-" in second[0]["resumed from"]
    assert first[0]["train/loss"] == first[1]["train/loss"]
    assert list(whole["train/loss"]) == list(range(STEPS))
    assert list(whole["val/loss"]) == [0, SAVED_AT, STEPS]
    for name in ("train/loss", "val/loss"):
        # The second half depends on the optimizer's moments and step count as they were saved.
        assert first[0][name] | second[0][name] == pytest.approx(whole[name], abs=1e-4)
    losses = whole["val/loss"]
    assert losses[SAVED_AT] < losses[0] - 0.5

    (last,) = (tmp_path / "two" / "checkpoints").glob(f"*step={STEPS}-*-last")
    stored = FileSystemReader(last).read_metadata().state_dict_metadata
    assert any("exp_avg_sq" in name for name in stored)
