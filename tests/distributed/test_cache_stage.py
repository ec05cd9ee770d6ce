"""``minitron cache``: filled by several writers, filled up after a loss, and refused where it is another's."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import tiny_checkpoint, tiny_tokenizer
from support.distributed import run_distributed
from support.text import sentences, write_jsonl

from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.checkpoints.tokenizer.comparison import Vocabulary
from nemo_minitron.config import (
    CacheConfig,
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    LossConfig,
    ParallelLayout,
    SourceConfig,
)
from nemo_minitron.distillation.compatibility import common_with_cache
from nemo_minitron.distillation.teachers.logit_cache import LogitCache
from nemo_minitron.errors import CheckpointError, DataError, MinitronError
from nemo_minitron.stages import cache, distill, evaluate
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
    found += [
        run(),
        run(k=3),
        run(values="float16"),
        run(resume=False),
        run(k=200),
        run(k=None, overwrite=True, values="int8"),
    ]
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
        validation_batches=2, k=4, values="compact", micro_batch_size=3, samples_per_shard=2,
        parallel=ParallelLayout(data=2),
    )  # fmt: skip
    return config, run_distributed(stages_case, 2, folder, timeout=200, config=config)[0]


@pytest.mark.slow
def test_filled_filled_up_and_refused(made: tuple[CacheConfig, list[dict[str, Any]]]) -> None:
    config, (first, again, repaired, other, form, once, many, replaced, foreign) = made
    assert (first["samples"], first["written"], first["tokens"]) == (WANTED, WANTED, WANTED * 16)
    assert again["written"] == 0
    assert repaired["written"] == 4  # two shards of two samples
    assert "ConfigError" in other["error"]
    assert "holds a cache with k=4, not 3" in other["error"]
    assert "holds a cache with values=compact, not float16" in form["error"]
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
    distill._check_cache(config, Path(made[0].output), {"training": train, "validation": validation})
    assert common_with_cache(Vocabulary.of("student", student), Path(made[0].output)).whole


@pytest.mark.slow
def test_a_cache_of_something_else_is_refused(made: tuple[CacheConfig, list[dict[str, Any]]], tmp_path: Path) -> None:
    """Other data, another teacher, another tokenizer."""
    student = open_checkpoint(made[0].teacher)
    config = distillation(made[0], steps=9)
    train, _ = training_blocks(config, student)
    with pytest.raises(DataError, match="lacks 8 of the 18 samples of the training blocks"):
        distill._check_cache(config, Path(made[0].output), {"training": train})
    other = open_checkpoint(tiny_checkpoint(tmp_path / "other", seed=7))
    with pytest.raises(DataError, match="its teacher is"):
        distill._check_cache(distillation(made[0], teacher=str(other.path)), Path(made[0].output), {})
    longer = open_checkpoint(tiny_checkpoint(tmp_path / "longer", vocab_size=140))
    with pytest.raises(
        CheckpointError, match=r"student .* and cached teacher .*/tokenizer\) have different tokenizers"
    ):
        common_with_cache(Vocabulary.of("student", longer), Path(made[0].output))


@pytest.mark.slow
def test_a_cache_of_before_tokenizers_were_kept(made: tuple[CacheConfig, list[dict[str, Any]]], tmp_path: Path) -> None:
    """It opens as it did, for students of other rows too; other tokenizers are refused."""
    old = tmp_path / "old"
    shutil.copytree(made[0].output, old)
    shutil.rmtree(old / "tokenizer")
    LogitCache(old)
    student = Vocabulary.of("student", open_checkpoint(made[0].teacher))
    assert common_with_cache(student, old).whole
    padded = common_with_cache(dataclasses.replace(student, rows=140), old)
    assert (padded.size, padded.left_out) == (131, ())
    assert common_with_cache(dataclasses.replace(student, tokenizer=None), old).whole
    longer = Vocabulary.of("student", open_checkpoint(tiny_checkpoint(tmp_path / "longer", vocab_size=140)))
    with pytest.raises(DataError, match="its vocab_size is 131.*\n.*its tokenizer is"):
        common_with_cache(longer, old)
    with pytest.raises(DataError, match="is no logit cache"):
        common_with_cache(student, tmp_path / "nowhere")


def other_end_case(config: CacheConfig, folder: str) -> dict[str, Any]:
    """A base student with more rows, and a teacher that ends texts with another token: cached, and evaluated."""
    where = Path(folder)
    cached = cache.run(dataclasses.replace(config, student=str(where / "student"), output=str(where / "logits")))
    plain = cache.run(dataclasses.replace(config, output=str(where / "plain")))
    result = evaluate.run(
        EvaluateConfig(
            models={"teacher": config.teacher, "student": str(where / "student")}, baseline="student",
            output=str(where / "evaluation"), data=config.data, tokens=160,
        )
    )  # fmt: skip
    return {"cached": cached, "plain": plain, "evaluation": result}


@pytest.mark.slow
def test_models_that_end_texts_otherwise(made: tuple[CacheConfig, list[dict[str, Any]]], tmp_path: Path) -> None:
    """The student's tokenizer cuts the text of its cache; the dry runs of all stages say what differs."""
    config = dataclasses.replace(made[0], parallel=ParallelLayout())
    tiny_checkpoint(tmp_path / "student", vocab_size=140, num_hidden_layers=2, seed=3, tokenizer=False)
    tiny_tokenizer(tmp_path / "student")
    settings = tmp_path / "student" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"eos_token": "</s>"', '"eos_token": "<|im_end|>"'))
    (result,) = run_distributed(other_end_case, 1, tmp_path, timeout=200, config=config, folder=str(tmp_path))
    assert (result["cached"]["samples"], result["cached"]["written"]) == (WANTED, WANTED)

    training = distillation(config, student=str(tmp_path / "student"), teacher_cache=str(tmp_path / "logits"))
    student = open_checkpoint(training.student)
    train, validation = training_blocks(training, student)
    assert (train.tokens == 5).any() and not (train.tokens == 2).any()  # documents end as the student ends them
    blocks = {"training": train, "validation": validation}
    distill._check_cache(training, tmp_path / "logits", blocks)
    with pytest.raises(DataError, match="lacks .* samples"):
        distill._check_cache(training, tmp_path / "plain", blocks)

    models = result["evaluation"]["models"]
    assert result["evaluation"]["baseline"] == "student"
    assert {name: model["shape"]["vocab_size"] for name, model in models.items()} == {"teacher": 131, "student": 140}
    for name, path in (("teacher", config.teacher), ("student", training.student)):
        assert models[name]["loss"] == pytest.approx(plain_loss(path, tmp_path, config), rel=1e-5), name

    differences = "140 and 131 rows; eos_token_id is 5 '<|im_end|>' and 2 '</s>'"
    plans = {
        "cache": cache.plan(dataclasses.replace(config, student=training.student)),
        "distill from a cache": distill.plan(training),
        "distill": distill.plan(distillation(config, student=training.student, teacher=config.teacher,
                                             teacher_cache=None)),
        "evaluate": evaluate.plan(
            EvaluateConfig(models={"student": training.student, "teacher": config.teacher}, output="o",
                           data=config.data)
        ),
    }  # fmt: skip
    for name, plan in plans.items():
        assert not plan.faults, name
        assert [note for note in plan.notes if differences in note], name
    longer = str(tiny_checkpoint(tmp_path / "longer", vocab_size=150))
    for name, plan in {
        "distill": distill.plan(distillation(config, student=longer, teacher=config.teacher, teacher_cache=None)),
        "cached": distill.plan(distillation(config, student=longer)),
        "cache": cache.plan(dataclasses.replace(config, student=longer)),
    }.items():
        assert [fault for fault in plan.faults if "have different tokenizers: 19 tokens differ" in fault], name


def plain_loss(path: str, folder: Path, config: CacheConfig) -> float:
    """Of transformers, on the held-out blocks that the student's tokenizer cuts."""
    import torch
    from transformers import AutoModelForCausalLM

    from nemo_minitron.data import build_domain_blocks

    (blocks,) = build_domain_blocks(
        config.data, folder / "student", "held_out", blocks=160 // config.data.sequence_length
    ).values()
    model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32)
    with torch.no_grad():
        logits = model(blocks.tokens[:, :-1]).logits.double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks.tokens[:, 1:].flatten()).item()


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
