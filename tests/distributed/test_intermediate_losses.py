"""Intermediate losses: value and gradient under any layout against one process, and that against transformers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import tiny_hf_model
from support.distributed import run_distributed
from support.states import watch

SEQUENCE, MICRO_BATCHES, ALPHA = 16, 4, 0.7
KEPT = (0, 2, 4, 5, 7)
CASES: dict[str, dict[str, Any]] = {
    # thinner, with its own heads: projections; one relation's teacher lies on the other stage at PP 2
    "thin": {
        "hidden": "mse", "embedding": "cosine", "relation_heads": 4, "attention_layers": {0: 0, 1: 4, 3: 7},
        "hidden_weight": 0.5, "attention_weight": 2.0,
    },
    # five of the teacher's eight layers, stages of three and two; the third was the teacher's fifth
    "cut": {"hidden": "cosine", "embedding": "mse"},
}  # fmt: skip
LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "thin": [
        {"tensor": 2},
        {"tensor": 2, "sequence_parallel": True},
        {"pipeline": 2},
        {"data": 2},
        {"pipeline": 2, "virtual_pipeline": 2},
    ],
    "cut": [{"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 256, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 64}
    tiny_hf_model(folder / "teacher", num_hidden_layers=8, head_dim=16, hidden_size=48, seed=1, **sizes)
    tiny_hf_model(folder / "thin", num_hidden_layers=4, head_dim=8, hidden_size=32, seed=2, **sizes)
    tiny_hf_model(folder / "cut", num_hidden_layers=5, head_dim=16, hidden_size=48, seed=3, **sizes)
    return folder


def batches() -> list[dict[str, torch.Tensor]]:
    """Micro-batches of one sequence with uneven masks; of one, nothing counts."""
    generator = torch.Generator().manual_seed(5)
    causal = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(diagonal=1)
    found = []
    for index in range(MICRO_BATCHES):
        mask = (torch.rand(1, SEQUENCE, generator=generator) > 0.3).float()
        found.append({
            "tokens": torch.randint(6, 256, (1, SEQUENCE), generator=generator),
            "position_ids": torch.arange(SEQUENCE)[None],
            "attention_mask": causal,
            "loss_mask": mask * (index != 2),
        })  # fmt: skip
    return found


def gradients_case(models: str, layouts: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A step of each case under each layout, in plain Megatron: this rank's gradients, and the losses."""
    from nemo_minitron.runtime.groups import ParallelLayout, initialize

    found = []
    for case, choices in layouts.items():
        for layout in choices:
            groups = initialize(ParallelLayout(**layout))
            found.append(step(Path(models), case, groups))
    return found


def alone_case(models: str) -> dict[str, Any]:
    """Each case in one process, and what cannot be trained on."""
    from nemo_minitron.errors import MinitronError
    from nemo_minitron.runtime.groups import ParallelLayout, initialize

    groups = initialize(ParallelLayout())
    found: dict[str, Any] = {case: step(Path(models), case, groups) for case in CASES}
    for name, fault in (("poisoned", poison), ("recomputed", recompute)):
        try:
            step(Path(models), "thin", groups, fault)
        except MinitronError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def poison(chunk: Any) -> None:
    with torch.no_grad():
        chunk.decoder.layers[1].mlp.linear_fc2.weight[0, 0] = float("nan")


def recompute(chunk: Any) -> None:
    chunk.config.recompute_granularity = "full"


def step(models: Path, case: str, groups: Any, fault: Any = None) -> dict[str, Any]:
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.checkpoints.live import canonical_parameters, load_into
    from nemo_minitron.config import IntermediateConfig
    from nemo_minitron.distillation.losses.balance import Balance
    from nemo_minitron.distillation.losses.layer_maps import layer_maps
    from nemo_minitron.distillation.losses.state_hooks import Plan, StudentLosses, TeacherStates
    from nemo_minitron.distillation.losses.vocabulary_parallel import vocabulary_parallel_forward_kl
    from nemo_minitron.distillation.teachers.frozen import Teacher
    from nemo_minitron.runtime.model import build_model

    student, teacher = open_checkpoint(models / case), open_checkpoint(models / "teacher")
    config = IntermediateConfig(**CASES[case])
    maps = layer_maps(
        config,
        student.shape,
        teacher.shape,
        tensor=groups.layout.tensor,
        kept_layers=KEPT if case == "cut" else None,
    )
    plan = Plan.of(config, maps, student.shape, teacher.shape, groups)
    balance = Balance(list(config.weights()), dynamic=True)
    balance.alpha = ALPHA
    chunks = build_model(student.shape, student.architecture, groups)
    load_into(chunks, student, groups)
    if fault is not None:
        fault(chunks[0])
    losses = {id(chunk): StudentLosses(plan, chunk, groups, balance) for chunk in chunks}
    for chunk in chunks:
        chunk.config.calculate_per_token_loss = True
        chunk.config.finalize_model_grads_func = finalize_model_grads
    wrapped = [DistributedDataParallel(c.config, DistributedDataParallelConfig(), c) for c in chunks]

    frozen = Teacher.load(teacher, groups)
    frozen.states = TeacherStates(plan, frozen.chunks, groups)
    mine = [batch for index, batch in enumerate(batches()) if index % groups.layout.data == groups.dp_rank]
    hidden = frozen.run(mine)
    states = frozen.states.exchanged(len(mine), 1, SEQUENCE)
    items = [
        {**batch, "states": s, "hidden": h}
        for batch, s, h in zip(mine, states, hidden or [None] * len(mine), strict=True)
    ]

    def forward_step(data: Any, model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(data)
        with losses[id(model.module)].micro_batch(batch, batch["states"]):
            output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"])

        def loss(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            mask = batch["loss_mask"].T
            kl = vocabulary_parallel_forward_kl(
                logits.transpose(0, 1), frozen.logits(batch["hidden"]), groups.tp, vocab_size=256
            )
            total, tokens = (kl * mask).sum(), mask.sum()
            balance.add_logits(total, tokens)
            return total, tokens.int(), {}

        return output, loss

    balance.begin(groups)
    several = len(wrapped) > 1
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(items) for _ in wrapped] if several else iter(items),
        model=wrapped if several else wrapped[0],
        num_microbatches=len(items),
        seq_length=SEQUENCE,
        micro_batch_size=1,
        forward_only=False,
    )
    balance.end(groups, training=True)
    return {
        "gradients": {
            name: parameter.main_grad.clone() for chunk in chunks for name, parameter in canonical_parameters(chunk)
        },
        "means": balance.means,
        "next alpha": balance.alpha,
        "tp": groups.tp_rank,
        "projections": {
            name: parameter.detach().clone()
            for chunk in chunks
            for name, parameter in chunk.named_parameters()
            if name.startswith("intermediate.")
        },
    }


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds."""
    out: dict[str, Any] = run_distributed(
        alone_case, 1, tmp_path_factory.mktemp("one"), timeout=180, models=str(models)
    )[0]
    return out


@pytest.mark.slow
def test_what_cannot_be_trained_on_is_refused(alone: dict[str, Any]) -> None:
    assert alone["poisoned"].startswith("NonFiniteError: the hidden loss of layer 1 is nan; nothing was updated.")
    assert alone["recomputed"].startswith("ConfigError: recompute_granularity=full: intermediate losses are taken in")


@pytest.mark.slow
def test_gradients_equal_one_process(models: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    """Of every parameter and projection, to 1e-5 of the largest, under tensor, sequence, pipeline (also uneven and
    virtual) and data parallelism; layers with losses lie on every stage."""
    from nemo_minitron import axes
    from nemo_minitron.checkpoints import open_checkpoint

    ranks = run_distributed(gradients_case, 2, tmp_path, timeout=240, models=str(models), layouts=LAYOUTS)
    runs = [(case, layout) for case, layouts in LAYOUTS.items() for layout in layouts]
    for index, (case, layout) in enumerate(runs):
        shape, expected = open_checkpoint(models / case).shape, alone[case]
        table = {entry.name: entry.row for entry in axes.parameters(axes.family("llama"), shape)}
        seen = set()
        for rank in (found[index] for found in ranks):
            for name, gradient in rank["gradients"].items():
                whole = expected["gradients"][name]
                dim = table[name].tensor_parallel_dim if name in table else None
                if dim is not None and (tensor := layout.get("tensor", 1)) > 1:
                    whole = cut(whole, gradient, dim, rank["tp"], tensor, gated=name.endswith("linear_fc1.weight"))
                torch.testing.assert_close(
                    gradient,
                    whole,
                    rtol=1e-5,
                    atol=1e-5 * float(whole.abs().max()),
                    msg=partial("{} {}: {}".format, layout, name),
                )
                seen.add(name)
            assert rank["means"] == pytest.approx(expected["means"], rel=1e-5), layout
            assert (
                rank["next alpha"] == ranks[0][index]["next alpha"] == pytest.approx(expected["next alpha"], rel=1e-5)
            )
        assert seen == expected["gradients"].keys(), layout


def cut(whole: torch.Tensor, like: torch.Tensor, dim: int, rank: int, world: int, *, gated: bool) -> torch.Tensor:
    """A tensor-parallel rank's part; of a gated MLP's first matrix, of each half."""
    if gated:
        return whole.unflatten(0, (2, -1)).chunk(world, 1)[rank].flatten(0, 1)
    return whole.chunk(world, dim)[rank]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_one_process_equals_transformers(case: str, models: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    """Losses and gradients against autograd on the states that transformers' models show."""
    from transformers import AutoModelForCausalLM

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.distillation.losses.layer_maps import proportional
    from nemo_minitron.distillation.losses.reference import forward_kl
    from nemo_minitron.distillation.losses.states import STATE_LOSSES, attention_relations

    config, found = CASES[case], alone[case]
    projections = {name: p.clone().requires_grad_() for name, p in found["projections"].items()}
    student, teacher = (AutoModelForCausalLM.from_pretrained(models / which) for which in (case, "teacher"))
    ours, theirs = watch(student), watch(teacher)
    layers = dict(enumerate(KEPT)) if case == "cut" else proportional(4, 8)
    data = {key: torch.cat([batch[key] for batch in batches()]) for key in ("tokens", "loss_mask")}
    kl = forward_kl(student(data["tokens"]).logits, teacher(data["tokens"]).logits)

    def state_loss(kind: str, site: str, other: str, projection: str) -> torch.Tensor:
        return STATE_LOSSES[kind](ours[site], theirs[other], projections.get(projection))

    parts = {
        "hidden": sum(
            state_loss(config["hidden"], f"layer {i}", f"layer {j}", f"intermediate.hidden_{i}.weight")
            for i, j in layers.items()
        )
        / len(layers)
        * config.get("hidden_weight", 1),
        "embedding": state_loss(config["embedding"], "embedding", "embedding", "intermediate.embedding.weight"),
    }
    if "relation_heads" in config:
        masked = batches()[0]["attention_mask"][0]
        parts["attention"] = (
            2.0
            * sum(
                attention_relations(
                    tuple(ours[f"{x} {i}"] for x in "qkv"),
                    tuple(theirs[f"{x} {j}"] for x in "qkv"),
                    heads=4,
                    masked=masked,
                )
                for i, j in config["attention_layers"].items()
            )
            / 3
        )
    mask = data["loss_mask"]
    means = {name: (part * mask).sum() / mask.sum() for name, part in {"logits": kl, **parts}.items()}
    intermediate = sum(value for name, value in means.items() if name != "logits")
    (means["logits"] + ALPHA * intermediate).backward()
    assert found["means"] == pytest.approx({**{k: v.item() for k, v in means.items()}, "alpha": ALPHA}, rel=1e-5)
    assert found["next alpha"] == pytest.approx((means["logits"] / intermediate).item(), rel=1e-5)

    with torch.no_grad():
        for parameter in student.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    student.save_pretrained(tmp_path / "gradients")
    expected = open_checkpoint(tmp_path / "gradients").weights
    assert found["gradients"].keys() == {*expected.names(), *projections}
    for name, gradient in found["gradients"].items():
        whole = projections[name].grad if name in projections else expected.tensor(name)
        torch.testing.assert_close(
            gradient, whole, rtol=1e-4, atol=2e-5 * float(whole.abs().max()), msg=partial("{}: {}".format, name)
        )
