"""``minitron cache``: filled by several writers, filled up after a loss, and refused where it is another's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import tiny_checkpoint
from support.distributed import run_distributed
from support.text import sentences, write_jsonl

from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.config import CacheConfig, DataConfig, DistillConfig, LossConfig, ParallelLayout, SourceConfig
from nemo_minitron.errors import DataError, MinitronError
from nemo_minitron.stages import cache, distill
from nemo_minitron.stages.shared.training import training_blocks

WANTED = 14  # 5 steps of 2 blocks, and 2 batches of validation


def stages_case(config: CacheConfig) -> list[dict[str, Any]]:
    """The stage, one time after another, on every rank."""
    import torch.distributed as dist

    def run(**changes: Any) -> dict[str, Any]:
        try:
            return cache.run(dataclasses.replace(config, **changes))
        except MinitronError as error:
            return {"error": f"{type(error).__name__}: {error}"}

    found = [run(), run()]
    dist.barrier()
    if dist.get_rank() == 0:
        first, second, *_ = sorted(Path(config.output).glob("shard-*"))
        first.unlink()
        second.write_bytes(second.read_bytes()[:-100])
        (Path(config.output) / ".shard-1.safetensors.partial.9").write_bytes(b"left by a killed writer")
    dist.barrier()
    found += [run(), run(k=3), run(resume=False), run(k=200), run(k=None, overwrite=True, values="int8")]
    found.append(run(output=str(Path(config.output).parent)))
    dist.barrier()  # the first rank, which holds the store, ends last
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[CacheConfig, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("cache")
    tiny_checkpoint(folder / "teacher")
    data = DataConfig(
        sources=[SourceConfig(name="text", path=str(write_jsonl(folder / "text.jsonl", sentences(40, 30, 0))))],
        sequence_length=16,
        held_out_fraction=0.3,
        cache_dir=str(folder / "blocks"),
    )
    config = CacheConfig(
        teacher=str(folder / "teacher"), output=str(folder / "logits"), data=data, steps=5, global_batch_size=2,
        validation_batches=2, k=4, micro_batch_size=3, samples_per_shard=2, parallel=ParallelLayout(data=2),
    )  # fmt: skip
    return config, run_distributed(stages_case, 2, folder, timeout=200, config=config)[0]


@pytest.mark.slow
def test_filled_filled_up_and_refused(made: tuple[CacheConfig, list[dict[str, Any]]]) -> None:
    config, (first, again, repaired, other, once, many, replaced, foreign) = made
    assert (first["samples"], first["written"], first["tokens"]) == (WANTED, WANTED, WANTED * 16)
    assert again["written"] == 0
    assert repaired["written"] == 4  # two shards of two samples
    assert "ConfigError" in other["error"]
    assert "holds a cache with k=4, not 3" in other["error"]
    assert "resume=false" in once["error"]
    assert "k=200: the vocabulary has 131 tokens" in many["error"]
    assert replaced["written"] == WANTED
    assert replaced["bytes_per_token"] == pytest.approx(131 + 8 + 40 / 16, abs=20)  # and the headers of small shards
    assert "already exists" in foreign["error"]
    assert not list(Path(config.output).glob("*.partial*"))


def distillation(config: CacheConfig, **changes: Any) -> DistillConfig:
    return DistillConfig(
        **{
            "student": config.teacher, "teacher": None, "teacher_cache": config.output, "output": "unused",
            "data": config.data, "steps": 5, "global_batch_size": 2, "validation_batches": 2, "warmup_steps": 1,
            **changes,
        }
    )  # fmt: skip


@pytest.mark.slow
def test_a_distillation_of_these_blocks_finds_them(made: tuple[CacheConfig, list[dict[str, Any]]]) -> None:
    config = distillation(made[0], teacher=made[0].teacher, loss=LossConfig("reverse_kl", temperature=2.0))
    assert config.faults() == []
    student = open_checkpoint(config.student)
    train, validation = training_blocks(config, student)
    distill._check_cache(config, Path(made[0].output), student, {"training": train, "validation": validation})


@pytest.mark.slow
def test_a_cache_of_something_else_is_refused(made: tuple[CacheConfig, list[dict[str, Any]]], tmp_path: Path) -> None:
    """Other data, another teacher, another tokenizer."""
    student = open_checkpoint(made[0].teacher)
    config = distillation(made[0], steps=9)
    train, _ = training_blocks(config, student)
    with pytest.raises(DataError, match="lacks 8 of the 18 samples of the training blocks"):
        distill._check_cache(config, Path(made[0].output), student, {"training": train})
    other = open_checkpoint(tiny_checkpoint(tmp_path / "other", seed=7))
    with pytest.raises(DataError, match="its teacher is"):
        distill._check_cache(distillation(made[0], teacher=str(other.path)), Path(made[0].output), other, {})
    tiny_checkpoint(tmp_path / "longer", vocab_size=140)
    with pytest.raises(DataError, match="its vocab_size is 131.*\n.*its tokenizer is"):
        distill._check_cache(config, Path(made[0].output), open_checkpoint(tmp_path / "longer"), {})


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"teacher_placement": "own_ranks"}, "leave out teacher_placement"),
        ({"teacher_cache": None}, "name a checkpoint or a teacher_cache"),
        ({"teacher_cache": None, "teacher": "t", "teacher_placement": "far"}, "must be one of shared"),
        (
            {"teacher_cache": None, "teacher": "t", "teacher_placement": "own_layout",
             "teacher_parallel": ParallelLayout(tensor=2)},
            "makes 2 ranks of the 1",
        ),
        ({"teacher_cache": None, "teacher": "t", "teacher_parallel": ParallelLayout(tensor=2)}, "leave out teacher"),
        (
            {"teacher_cache": None, "teacher": "t", "teacher_placement": "own_ranks",
             "teacher_parallel": ParallelLayout(pipeline=2, virtual_pipeline=2)},
            "virtual_pipeline=2: a teacher only runs forward",
        ),
    ],
)  # fmt: skip
def test_placements_that_cannot_be(changes: dict[str, Any], fault: str) -> None:
    config = DistillConfig(**{"student": "s", "teacher": None, "teacher_cache": "c", "output": "o", **changes})
    assert any(fault in found for found in config.faults()), config.faults()


def test_intermediate_losses_need_a_teacher_in_the_students_layout() -> None:
    from nemo_minitron.config import IntermediateConfig

    config = DistillConfig(
        student="s", teacher=None, teacher_cache="c", output="o", intermediate=IntermediateConfig(hidden="mse")
    )
    assert any("intermediate losses need" in fault for fault in config.faults())
