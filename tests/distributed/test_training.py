"""Trainings on labels, with a teacher that learns, killed, preempted, broken: against plain torch and each other.

Each process of the cases runs several trainings, as most of its time goes into importing NeMo.
"""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_distributed
from support.training import blocks, make_models, measured, train

#: Six steps of four blocks.
SHORT: dict[str, Any] = {"count": 24, "steps": 6, "validate_every": 3}
CORRECTION: dict[str, Any] = {**SHORT, "micro_batch_size": 2, "correction": {"lr": 5e-4, "min_lr": 5e-5}}
#: 15 blocks: passes over the data begin in the middle of steps.
LONG: dict[str, Any] = {
    "count": 15, "steps": 26, "validate_every": 12, "save_every": 5, "keep_best": "kl",
    "intermediate": {"hidden": "mse", "relation_heads": 6, "balance": "dynamic"},
}  # fmt: skip
SEQUENCE_PARALLEL = {"tensor": 2, "sequence_parallel": True}
VIRTUAL = {"pipeline": 2, "virtual_pipeline": 2}
STOPPED = (
    "PreemptedError: stopped by a signal after step {} of 26: its state is saved. The same command goes on from there"
)


def one_process_case(models: str, out: str) -> None:
    train(models, f"{out}/labels", alone=True, **SHORT)
    train(models, f"{out}/corrected", **CORRECTION)
    train(models, f"{out}/corrected-resumed", at=(4, signal.SIGTERM), **CORRECTION)
    train(models, f"{out}/straight", **LONG)
    train(models, f"{out}/damaged", at=(12, signal.SIGTERM), **LONG)
    train(models, f"{out}/killed", at=(6, None), **LONG)


def resumed_case(models: str, out: str) -> list[str]:
    from nemo_minitron.distillation.training.language_model import TrainedModel

    found = [train(models, f"{out}/corrected-resumed", **CORRECTION), train(models, f"{out}/killed", **LONG)]
    # there is nothing left to do, and nothing is done
    found.append(train(models, f"{out}/killed", at=(1, None), **LONG))
    configure = TrainedModel.configure_model

    def broken(self: Any, vp_stage: int | None = None) -> None:
        configure(self, vp_stage)
        next(self.parameters()).register_hook(lambda gradient: gradient / 0)

    found += damaged_state(models, Path(out, "damaged"))
    TrainedModel.configure_model = broken  # type: ignore[method-assign]
    return [*found, train(models, f"{out}/broken", **LONG)]


def damaged_state(models: str, directory: Path) -> list[str]:
    """What a training says whose last checkpoint is damaged, and then the training from the one before it."""
    from nemo_minitron.checkpoints.formats.torch_dist.reader import TorchDist

    checkpoints = directory / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step=11-last"]
    assert [path.name for path in (directory / "previous").iterdir()] == ["step=9-last"]
    last = checkpoints / "step=11-last"
    found = []
    chunks = TorchDist(last / "weights")._chunks
    (moments,) = (chunks[key] for key in chunks if "exp_avg" in key and "linear_fc2" in key and "sq" not in key)
    common = last / "weights/common.pt"
    for file, middle in (
        (last / "weights" / moments[0].file, moments[0].start + moments[0].length // 2),
        (common, common.read_bytes().index(b"optimizer")),  # a key in its pickle
    ):
        content = file.read_bytes()
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 8]) + content[middle + 1 :])
        found.append(train(models, str(directory), **LONG))
        file.write_bytes(content)
    shutil.rmtree(last)
    metrics = directory / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join([*lines[:7], b"\xff\n", *lines[8:]]))
    found.append(train(models, str(directory), **LONG))
    assert metrics.with_name("metrics.jsonl.damaged").read_bytes().count(b"\n") == len(lines)
    return found


def preempted_case(models: str, out: str, name: str, layout: dict[str, Any], order: signal.Signals) -> list[str]:
    before = signal.getsignal(order)
    found = [train(models, f"{out}/straight-{name}", layout=layout, **LONG)]
    # once between validations, once where one is due
    found += [train(models, f"{out}/preempted-{name}", layout=layout, at=(at, order), **LONG) for at in (6, 12)]
    assert signal.getsignal(order) == before
    return [*found, train(models, f"{out}/preempted-{name}", layout=layout, **LONG)]


def in_small_chunks() -> dict[str, str]:
    """Output layer and loss together, several chunks of tokens a micro-batch."""
    from nemo_minitron.distillation.losses import fused_head

    fused_head.HEAD_BYTES["cpu"] = 5_000
    return {"logits": "chunks"}


def tensor_parallel_case(models: str, out: str) -> list[str]:
    chunks = in_small_chunks()
    found = [
        train(models, f"{out}/labels-tp", layout=SEQUENCE_PARALLEL, alone=True, **SHORT, **chunks),
        train(models, f"{out}/corrected-tp", layout=SEQUENCE_PARALLEL, **CORRECTION, **chunks),
    ]
    return found + preempted_case(models, out, "tp", {"tensor": 2}, signal.SIGTERM)


def virtual_stages_case(models: str, out: str) -> list[str]:
    chunks = in_small_chunks()
    found = [
        train(models, f"{out}/labels-vpp", layout=VIRTUAL, alone=True, **SHORT, **chunks),
        train(models, f"{out}/corrected-vpp", layout=VIRTUAL, **CORRECTION, **chunks),
    ]
    return found + preempted_case(models, out, "vpp", VIRTUAL, signal.SIGUSR1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def one_process(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    with pytest.raises(FileNotFoundError, match="result0"):  # killed, it never came to return
        run_distributed(one_process_case, 1, out, timeout=280, models=str(models), out=str(out))
    assert [path.name for path in (out / "killed/checkpoints").iterdir()] == ["step=4-last"]
    return out


@pytest.fixture(scope="module")
def resumed(models: Path, one_process: Path) -> list[str]:
    """What each training of the second process said."""
    case = {"models": str(models), "out": str(one_process)}
    found: list[str] = run_distributed(resumed_case, 1, one_process, timeout=280, **case)[0]
    return found


def two_processes(function: Any, models: Path, out: Path) -> Path:
    """The trainings of a case. (Groups of another layout in the same processes lose their connections under gloo.)"""
    expected = ["", "", "", STOPPED.format(6), STOPPED.format(12), ""]
    found = run_distributed(function, 2, out, timeout=290, models=str(models), out=str(out))
    assert found == [expected] * 2
    return out


@pytest.fixture(scope="module")
def tp(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_processes(tensor_parallel_case, models, tmp_path_factory.mktemp("tp"))


@pytest.fixture(scope="module")
def vpp(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_processes(virtual_stages_case, models, tmp_path_factory.mktemp("vpp"))


def assert_close(directory: Path, expected: Path) -> None:
    """Every value of every line to a relative 1e-4."""
    found, lines = measured(directory), measured(expected)
    assert [line.keys() for line in found] == [line.keys() for line in lines]
    for ours, theirs in zip(found, lines, strict=True):
        numbers = {name: value for name, value in theirs.items() if name != "split"}
        assert {name: ours[name] for name in numbers} == pytest.approx(numbers, rel=1e-4)


def assert_equal(directory: Path, expected: Path) -> None:
    """Every line of the metrics, all weights of the last and of the best checkpoint, bit for bit."""
    from nemo_minitron.checkpoints import open_checkpoint

    assert measured(directory) == measured(expected)
    for part in ("checkpoints/step=25-last", f"best/{next((expected / 'best').iterdir()).name}"):
        ours, theirs = (open_checkpoint(one / part).weights for one in (directory, expected))
        for tensor in theirs.names():
            assert torch.equal(ours.tensor(tensor), theirs.tensor(tensor)), (part, tensor)


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, lr: float) -> float:
    """One update; the norm of the gradient."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    for parameters in optimizer.param_groups:
        parameters["lr"] = lr
    optimizer.step()
    return norm


def label_loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())


@pytest.mark.slow
def test_training_on_labels_equals_a_plain_torch_loop(models: Path, one_process: Path) -> None:
    """Loss and gradient norm of every step, validations, and the weights after the last."""
    from transformers import AutoModelForCausalLM

    from nemo_minitron.checkpoints import open_checkpoint

    model = AutoModelForCausalLM.from_pretrained(models / "teacher")
    optimizer, data = optimizer_of(model), blocks(24)
    for line in measured(one_process / "labels"):
        if "split" in line:
            with torch.no_grad():
                assert line["lm_loss"] == pytest.approx(label_loss(model, data[:4]).item(), rel=2e-5)
            continue
        loss = label_loss(model, data[4 * line["step"] - 4 : 4 * line["step"]])
        norm = step(model, optimizer, loss, line["lr"])
        assert "kl" not in line
        assert line["lm_loss"] == pytest.approx(loss.item(), rel=2e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=2e-4)
    weights = open_checkpoint(one_process / "labels/checkpoints/step=5-last").weights
    embedding = model.get_input_embeddings().weight.detach()
    trained = weights.tensor("embedding.word_embeddings.weight")
    torch.testing.assert_close(trained[: len(embedding)], embedding, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_a_learning_teacher_and_its_student_equal_plain_torch_loops(models: Path, one_process: Path) -> None:
    """The student learns from the teacher as it was before the step, the teacher from the labels of the step."""
    from transformers import AutoModelForCausalLM

    from nemo_minitron.distillation.losses.reference import forward_kl

    student, teacher = (AutoModelForCausalLM.from_pretrained(models / which) for which in ("student", "teacher"))
    optimizers, data = (optimizer_of(student), optimizer_of(teacher)), blocks(24)
    for line in measured(one_process / "corrected"):
        if "split" in line:
            with torch.no_grad():
                kl = forward_kl(student(data[:4, :-1]).logits, teacher(data[:4, :-1]).logits).mean()
            assert line["kl"] == pytest.approx(kl.item(), rel=2e-5)
            continue
        batch = data[4 * line["step"] - 4 : 4 * line["step"]]
        with torch.no_grad():
            target = teacher(batch[:, :-1]).logits
        kl, lm_loss = forward_kl(student(batch[:, :-1]).logits, target).mean(), label_loss(teacher, batch)
        norms = (
            step(student, optimizers[0], kl, line["lr"]),
            step(teacher, optimizers[1], lm_loss, line["teacher_lr"]),
        )
        assert line["teacher_lr"] == pytest.approx(line["lr"] / 2)
        assert (line["kl"], line["teacher_lm_loss"]) == pytest.approx((kl.item(), lm_loss.item()), rel=2e-5)
        assert (line["grad_norm"], line["teacher_grad_norm"]) == pytest.approx(norms, rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp", "vpp"])
@pytest.mark.parametrize("case", ["labels", "corrected"])
def test_layouts_equal_one_process(layout: str, case: str, one_process: Path, request: pytest.FixtureRequest) -> None:
    assert_close(request.getfixturevalue(layout) / f"{case}-{layout}", one_process / case)


@pytest.mark.slow
def test_a_killed_training_goes_on_exactly(one_process: Path, resumed: list[str]) -> None:
    """Killed after step 6, with a checkpoint of step 5, in the middle of a pass: the next 21 steps, bit for bit."""
    assert resumed[1:3] == ["", ""]
    assert_equal(one_process / "killed", one_process / "straight")
    # the learning teacher's weights, optimizer and learning rate come out of the checkpoint as well
    assert resumed[0] == ""
    assert measured(one_process / "corrected-resumed") == measured(one_process / "corrected")


@pytest.mark.slow
def test_a_damaged_state_is_refused_and_the_one_before_goes_on(one_process: Path, resumed: list[str]) -> None:
    """A flipped bit of the optimizer's state, or of what NeMo would unpickle; then from step 10, bit for bit."""
    last = one_process / "damaged/checkpoints/step=11-last"
    chunk, common, after = resumed[3:6]
    assert chunk.startswith(f"CheckpointError: the training state in {last} is damaged: {last}/weights/")
    assert "the stored chunk is damaged (the checksum of" in chunk
    assert common.startswith(f"CheckpointError: the training state in {last} is damaged: {last}/weights/common.pt ")
    for message in (chunk, common):
        assert message.endswith(f"; remove {last} to go on from step=9-last, the checkpoint before")
    assert after == ""
    assert [path.name for path in last.parent.iterdir()] == ["step=25-last"]
    assert not (one_process / "damaged/previous").exists()
    straight = [line for line in measured(one_process / "straight") if line["step"] > 10]
    assert [line for line in measured(one_process / "damaged") if line["step"] > 10] == straight


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp", "vpp"])
def test_a_preempted_training_goes_on_exactly(layout: str, request: pytest.FixtureRequest) -> None:
    """The signal comes to one rank; all end their step and save."""
    out: Path = request.getfixturevalue(layout)
    assert_equal(out / f"preempted-{layout}", out / f"straight-{layout}")


@pytest.mark.slow
def test_metrics_and_the_best_checkpoint(one_process: Path) -> None:
    lines = measured(one_process / "straight")
    training = [line for line in lines if "split" not in line]
    validations = [line for line in lines if "split" in line]
    assert [line["step"] for line in training] == list(range(1, 27))
    assert [line["step"] for line in validations] == [12, 24, 26]
    best = min(validations, key=lambda line: line["kl"])
    (kept,) = (one_process / "straight/best").iterdir()
    assert kept.name == f"step={best['step'] - 1}-val_kl={best['kl']:.8f}"
    line = json.loads((one_process / "straight/metrics.jsonl").read_text().splitlines()[0])
    assert line["tflops"] > 0
    assert 1e7 < line["memory"] < 1e11
    assert line["tokens_per_second"] > 0


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_stops_before_the_update(one_process: Path, resumed: list[str]) -> None:
    assert resumed[6].startswith("NonFiniteError: a gradient of step 0 is not finite; nothing was updated")
    assert measured(one_process / "broken") == []
    assert not list((one_process / "broken/checkpoints").glob("*"))
