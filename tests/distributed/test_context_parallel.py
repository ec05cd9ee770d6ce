"""Context parallelism: the attention against torch's, and trainings under it against one process."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.distributed import run_distributed
from support.training import measured, train

#: Four steps of four blocks, of which uneven runs of labels count; all losses inside models of unlike widths, and a
#: teacher that learns.
DISTILLED: dict[str, Any] = {
    "count": 16, "steps": 4, "validate_every": 2, "micro_batch_size": 2, "uneven": True,
    "intermediate": {"hidden": "mse", "embedding": "cosine", "relation_heads": 4, "balance": "dynamic"},
    "correction": {"lr": 5e-4, "min_lr": 5e-5},
}  # fmt: skip
LABELS: dict[str, Any] = {"count": 8, "steps": 2, "validate_every": 2, "uneven": True, "alone": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "cp-tp": {"context": 2, "tensor": 2, "sequence_parallel": True},
    "cp-dp": {"context": 2, "data": 2},  # recomputes the attention
    "cp-pp": {"context": 2, "pipeline": 2},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 72}
    tiny_checkpoint(folder / "teacher", tied=True, num_hidden_layers=3, seed=1, **sizes)
    tiny_checkpoint(folder / "student", tied=True, num_hidden_layers=2, hidden_size=36, seed=2, **sizes)
    return folder


def one_process_case(models: str, out: str) -> None:
    train(models, f"{out}/distilled", **DISTILLED)
    train(models, f"{out}/labels", **LABELS)


def two_processes_case(models: str, out: str) -> dict[str, Any]:
    layout = {"context": 2}
    errors = [
        train(models, f"{out}/distilled", layout=layout, at=(2, signal.SIGTERM), **DISTILLED),
        train(models, f"{out}/distilled", layout=layout, **DISTILLED),
        train(models, f"{out}/labels", layout=layout, **LABELS),
    ]
    return {"errors": errors, **attention(), "sliced": sliced(), "cached": cached(Path(out) / "cache")}


def four_processes_case(models: str, out: str) -> list[str]:
    from nemo_minitron.runtime.groups import ParallelLayout, initialize

    torch.distributed.init_process_group("gloo")
    found = []
    for name, layout in LAYOUTS.items():
        initialize(ParallelLayout(**layout))
        recompute = "selective" if name == "cp-dp" else "none"
        found.append(train(models, f"{out}/{name}", layout=layout, recompute=recompute, **DISTILLED))
    return found


def attention() -> dict[str, float]:
    """Largest deviations of the attention and its gradients from torch's, in float64, under causal and document masks;
    the groups are those of the training before."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from nemo_minitron.runtime.context import rank_part
    from nemo_minitron.runtime.context_attention import ContextParallelAttention
    from nemo_minitron.runtime.groups import current_groups
    from nemo_minitron.runtime.masks import attention_mask

    groups, sequence, rows = current_groups(), 24, 3
    config = TransformerConfig(
        num_layers=1, hidden_size=48, num_attention_heads=6, num_query_groups=2, kv_channels=8,
        context_parallel_size=2, attention_dropout=0.0, masked_softmax_fusion=False,
    )  # fmt: skip
    module = ContextParallelAttention(config, 1, AttnMaskType.causal, "self")
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, second in (("causal", sequence), ("documents", 11)):
        whole = [
            torch.randn(sequence, rows, heads, 8, generator=generator, dtype=torch.float64, requires_grad=True)
            for heads in (6, 2, 2)
        ]
        weights = torch.randn(sequence, rows, 48, generator=generator, dtype=torch.float64)
        mask = attention_mask((torch.arange(sequence) >= second).int())[None]
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x.permute(1, 2, 0, 3) for x in whole), attn_mask=~mask, enable_gqa=True
        )
        expected = expected.permute(2, 0, 1, 3).flatten(2)
        (expected * weights).sum().backward()

        mine = [rank_part(x.detach(), groups, dim=0).requires_grad_() for x in whole]
        output = module(*mine, rank_part(mask, groups, dim=2))
        (output * rank_part(weights, groups, dim=0)).sum().backward()
        pairs = [(output, expected), *((ours.grad, theirs.grad) for ours, theirs in zip(mine, whole, strict=True))]
        found[name] = max((ours - rank_part(theirs, groups, dim=0)).abs().max().item() for ours, theirs in pairs)
    return found


def sliced() -> bool:
    """Whether a batch is shared out as Megatron does it."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    from nemo_minitron.runtime.context import rank_batch
    from nemo_minitron.runtime.groups import current_groups

    batch = {
        "tokens": torch.arange(32).view(2, 16),
        "loss_mask": torch.rand(2, 16),
        "attention_mask": torch.rand(1, 1, 16, 16) > 0.5,
    }
    ours, theirs = rank_batch(batch, current_groups()), get_batch_on_this_cp_rank(dict(batch))
    return all(torch.equal(ours[name], theirs[name]) for name in batch)


def cached(directory: Path) -> bool:
    """Whether a rank finds the logits of its tokens in a cache of whole samples."""
    from nemo_minitron.config import LossConfig
    from nemo_minitron.distillation.teachers.cached import CachedTeacher
    from nemo_minitron.distillation.teachers.logit_cache import LogitCache, Manifest, encode, sample_keys, write_shard
    from nemo_minitron.runtime.context import rank_part
    from nemo_minitron.runtime.groups import current_groups

    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 40, (2, 16), generator=generator)
    logits = torch.randn(2, 16, 40, generator=generator).log_softmax(-1)
    manifest = Manifest("m", "t", 40, 16, None, "float32", "float32")
    if torch.distributed.get_rank() == 0:
        manifest.write(directory)
        samples = [encode(manifest, log_probabilities=one) for one in logits]
        write_shard(directory, manifest, list(zip(sample_keys(tokens, 0 * tokens), samples, strict=True)))
    torch.distributed.barrier()
    teacher = CachedTeacher(LogitCache(directory), current_groups(), LossConfig())
    (kept,) = teacher.run([{"tokens": tokens, "position_ids": torch.arange(16).expand(2, -1)}])
    found = teacher.logits(kept)
    assert isinstance(found, torch.Tensor)
    return torch.equal(found[..., :40], rank_part(logits.transpose(0, 1), current_groups(), dim=0))


@pytest.fixture(scope="module")
def one_process(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    run_distributed(one_process_case, 1, out, models=str(models), out=str(out))
    return out


@pytest.fixture(scope="module")
def two_processes(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("two")
    return out, run_distributed(two_processes_case, 2, out, models=str(models), out=str(out))


@pytest.fixture(scope="module")
def four_processes(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("four")
    found = run_distributed(four_processes_case, 4, out, models=str(models), out=str(out))
    assert found == [[""] * len(LAYOUTS)] * 4
    return out


def assert_close(directory: Path, expected: Path, last: int) -> None:
    """Every value of every line, and the last weights."""
    from nemo_minitron.checkpoints import open_checkpoint

    found, lines = measured(directory), measured(expected)
    assert [line.keys() for line in found] == [line.keys() for line in lines]
    for ours, theirs in zip(found, lines, strict=True):
        numbers = {name: value for name, value in theirs.items() if name != "split"}
        assert {name: ours[name] for name in numbers} == pytest.approx(numbers, rel=1e-5)
    ours, theirs = (open_checkpoint(one / f"checkpoints/step={last}-last").weights for one in (directory, expected))
    for name in theirs.names():
        # Adam makes a step of the size of lr from a gradient of any size, noise too
        torch.testing.assert_close(ours.tensor(name), theirs.tensor(name), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_two_context_parallel_ranks_equal_one_process(
    one_process: Path, two_processes: tuple[Path, list[dict[str, Any]]]
) -> None:
    """KL, losses inside the models, alpha, gradient norms and validations of every step, the teacher that learns; in
    the middle the training is preempted and goes on. And a training on labels alone."""
    out, found = two_processes
    for rank in found:
        assert rank["errors"][0].startswith("PreemptedError: stopped by a signal after step 2 of 4")
        assert rank["errors"][1:] == ["", ""]
    assert_close(out / "distilled", one_process / "distilled", 3)
    assert_close(out / "labels", one_process / "labels", 1)
    alphas = [line["alpha"] for line in measured(out / "distilled") if "split" not in line]
    assert alphas[0] == 1 and len(set(alphas)) == 4


@pytest.mark.slow
def test_attention_batches_and_caches_of_a_rank(two_processes: tuple[Path, list[dict[str, Any]]]) -> None:
    """The attention and its gradients equal torch's in float64; a batch and a cache's samples are cut alike."""
    for rank in two_processes[1]:
        assert rank["causal"] < 1e-13 and rank["documents"] < 1e-13
        assert rank["sliced"] and rank["cached"]


@pytest.mark.slow
def test_checkpoints_open_without_us(two_processes: tuple[Path, list[dict[str, Any]]]) -> None:
    """Their context names NeMo's own layers."""
    context = two_processes[0] / "distilled/checkpoints/step=3-last/context/model.yaml"
    assert "nemo_minitron" not in context.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_with_other_parallelism_equals_one_process(name: str, one_process: Path, four_processes: Path) -> None:
    assert_close(four_processes / name, one_process / "distilled", 3)
