"""The choices of a pipeline, from model, budget, text and machine: shape, sequences, steps, batches, layout.

:mod:`~nemo_minitron.proposal.stages` writes them down as stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_minitron.config import HELD_OUT, DataConfig, ParallelLayout
from nemo_minitron.errors import ConfigError, DataError
from nemo_minitron.importance.estimators import ESTIMATORS
from nemo_minitron.planning import HOST_FLOAT64, Model, ReconstructionFlops, Training
from nemo_minitron.proposal.chats import Answers
from nemo_minitron.proposal.layout import Placed, place, step_seconds
from nemo_minitron.proposal.machine import CORE_FLOPS, Machine
from nemo_minitron.proposal.model import Subject
from nemo_minitron.proposal.schedule import Amount, amount, wanted_tokens
from nemo_minitron.proposal.shape import Proportions, ShapeBudget, propose_shape
from nemo_minitron.proposal.text import Text
from nemo_minitron.shape import SIZES

__all__ = ["CORRECTION_TOKENS", "LONG_TOKENS", "Plan", "Refit", "Request", "align", "make_plan"]

#: Tokens of a training that wins back a narrower residual stream. The papers rank shapes after 1.8 B tokens
#: (arXiv 2407.14679, section 4).
LONG_TOKENS = 1e9
#: Tokens from which a teacher is corrected first. The papers take about 100 B (arXiv 2408.11796, section 2).
CORRECTION_TOKENS = 1e8
#: Minutes of training where nobody says: on processors, and on GPUs of this machine. A cluster has no limit.
HOST_MINUTES, GPU_MINUTES = 30.0, 24 * 60.0

#: What each training takes of the time, beside the others that there are.
_PARTS = {"correct": 3.0, "distill": 6.0, "sft": 2.0, "dpo": 1.0}
_SHORTEST = 32
_SAMPLES = 1024  # arXiv 2407.14679, section 4: calibration samples
#: Blocks for the reconstruction: on processors, where it is to take minutes, and on GPUs (``recipes/published.py``).
_HOST_REFITTED, _GPU_REFITTED = 64, 256
#: Of the time of the trainings the reconstruction may take so much beside it, by fewer blocks.
_REFIT_SHARE = 0.5
#: Times that an operation in float64 takes of one of a forward pass, on GPUs.
_GPU_FLOAT64 = 8.0
#: Estimators: the papers', and the one for a model that is reconstructed.
PAPERS, REFITTED = "activation", "reconstruction"
_TOKENS_PER_NEURON = 4  # of the scores' text; docs/results.md has 8 and 10


@dataclass(frozen=True)
class Request:
    """What the user asks for, beside model, machine and data.

    Attributes:
        name: of the pipeline, and of the directory of its outputs.
        output: that directory.
        minutes: of training, all trainings together; None for the machine's default.
        steps: of each training, instead.
        search: find the shape by a search.
        cache_dir: where fetched sources are kept.
    """

    name: str
    output: str
    minutes: float | None = None
    steps: int | None = None
    search: bool = False
    cache_dir: str = ".cache/minitron"


@dataclass(frozen=True)
class Aligned:
    """One training with NeMo-Aligner.

    Attributes:
        answers: what it trains on.
        steps: optimizer steps.
        batch, micro_batch: samples of a step, and of a pass.
        layout: of the model.
    """

    answers: Answers
    steps: int
    batch: int
    micro_batch: int
    layout: ParallelLayout


@dataclass(frozen=True)
class Refit:
    """The reconstruction of the pruned model.

    Attributes:
        samples: blocks of calibration text.
        sequence_length: tokens of each.
        data: processes that share them.
        seconds: that it is expected to take.
    """

    samples: int
    sequence_length: int
    data: int
    seconds: float

    @property
    def tokens(self) -> int:
        """Of calibration."""
        return self.samples * self.sequence_length


@dataclass(frozen=True)
class Plan:
    """All choices.

    Attributes:
        subject: the model.
        machine: what trains.
        budget: of the student.
        student: the student.
        proportions: that its sizes were cut in.
        text: to distil on.
        data: sequence length and splits.
        blocks: of each split.
        amount: of the distillation.
        placed: the distillation on the machine.
        minutes: of all trainings; None without a limit.
        correction: the teacher's correction on the machine; None without one.
        samples: of scoring.
        estimator: of scoring.
        refit: the reconstruction; None for a student that only loses layers, or with too little text.
        sft, dpo: alignment, or None.
        notes: what the user should know.
    """

    subject: Subject
    machine: Machine
    budget: ShapeBudget
    student: Model
    proportions: Proportions
    text: Text
    data: DataConfig
    blocks: Mapping[str, int]
    amount: Amount
    placed: Placed
    minutes: float | None
    correction: Placed | None
    samples: int
    estimator: str
    refit: Refit | None = None
    sft: Aligned | None = None
    dpo: Aligned | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def teacher(self) -> Model:
        """The unpruned model."""
        return self.subject.model

    @property
    def corrected(self) -> bool:
        """The teacher is corrected first."""
        return self.correction is not None

    def part(self, training: str) -> float | None:
        """Minutes of one of the trainings."""
        if self.minutes is None:
            return None
        return self.minutes * _share(training, self.corrected, self.sft is not None, self.dpo is not None)


def make_plan(
    subject: Subject,
    machine: Machine,
    budget: ShapeBudget,
    text: Text,
    request: Request,
    *,
    chat: bool = False,
    pairs: bool = False,
) -> Plan:
    """The choices of a pipeline up to the distilled student; :func:`align` adds the alignment.

    Args:
        subject: the model; all its layers alike.
        machine: what trains.
        budget: of the student.
        text: to distil on.
        request: of the user.
        chat, pairs: alignment follows, and takes its part of the time.

    Raises:
        MinitronError: for a budget, a text or a machine that is too small.
    """
    teacher = subject.model
    minutes = request.minutes if request.minutes is not None else _default_minutes(machine, request)
    data, blocks = _splits(text, teacher, machine, request)
    shape, proportions = propose_shape(teacher, budget, long=False)
    student = Model(shape, teacher.architecture)
    correction: Placed | None = None
    for _ in range(2):
        corrected = correction is not None
        seconds = None if minutes is None else 60 * minutes * _share("distill", corrected, chat, pairs)
        made = _amount(student, teacher, data, blocks, machine, seconds, request.steps)
        long = made.tokens >= LONG_TOKENS
        correction = _correction(teacher, made, machine) if text.own and made.tokens >= CORRECTION_TOKENS else None
        shape, proportions = propose_shape(teacher, budget, long=long)
        student = Model(shape, teacher.architecture)
    placed = place(_training(student, teacher, made), machine)
    cores = 128 if machine.cluster is None else _SAMPLES
    samples = max(1, min(cores, blocks["calibration"]))
    widths = request.search or any(
        getattr(shape, name) != getattr(teacher.shape, name) for name in SIZES if name != "num_layers"
    )
    refit = _refit(student, teacher, data, blocks["calibration"], machine, placed, made, minutes) if widths else None
    estimator = PAPERS
    if refit is not None and not request.search:
        fewer = min(samples, refit.samples)
        if _repays(teacher, data, fewer, machine, refit):
            estimator, samples = REFITTED, fewer
    return Plan(
        subject, machine, budget, student, proportions, text, data, blocks, made, placed, minutes, correction, samples,
        estimator, refit, notes=_notes(subject, student, text, made),
    )  # fmt: skip


def align(plan: Plan, request: Request, *, chat: Answers | None, pairs: Answers | None) -> Plan:
    """A plan with fine-tuning and preference optimization."""
    return dataclasses.replace(
        plan,
        sft=None if chat is None else _aligned(plan, chat, request, "sft", chat=True, pairs=pairs is not None),
        dpo=None if pairs is None else _aligned(plan, pairs, request, "dpo", chat=chat is not None, pairs=True),
    )


def _share(training: str, corrected: bool, chat: bool, pairs: bool) -> float:
    there = {"distill": True, "correct": corrected, "sft": chat, "dpo": pairs}
    return _PARTS[training] / sum(_PARTS[name] for name, held in there.items() if held)


def _default_minutes(machine: Machine, request: Request) -> float | None:
    if not machine.here or request.steps is not None:
        return None
    return HOST_MINUTES if machine.cluster is None else GPU_MINUTES


def _splits(text: Text, teacher: Model, machine: Machine, request: Request) -> tuple[DataConfig, dict[str, int]]:
    """Sequence length, and the shares that are set aside: such that every source has some blocks in each split.

    4,096 tokens as arXiv 2407.14679 on GPUs; 256 on processors, as the demonstration, whose steps are to be many.
    """
    length = min(4096 if machine.cluster is not None else 256, teacher.architecture.max_position_embeddings)
    begin = teacher.table.scaled_embedding  # Gemma's models are lost without their first token
    fractions: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2)
    if text.tokens >= LONG_TOKENS:
        fractions = (0.01, *fractions)
    while length >= _SHORTEST:
        for fraction in fractions:
            data = DataConfig(
                sequence_length=length,
                calibration_fraction=fraction,
                held_out_fraction=fraction,
                begin_pieces=begin,
                cache_dir=request.cache_dir,
            )
            blocks = text.blocks(data)
            if blocks["held_out"] >= 8 and blocks["calibration"] >= 8 and blocks["train"] >= 32:
                return data, blocks
        length //= 2
    raise DataError(
        f"--text: holds {text.tokens:,.0f} tokens in all, too few to train, score and evaluate on tokens of their own; "
        "give more text, each source some thousand tokens in several documents"
    )


def _amount(
    student: Model,
    teacher: Model,
    data: DataConfig,
    blocks: Mapping[str, int],
    machine: Machine,
    seconds: float | None,
    steps: int | None,
) -> Amount:
    def seconds_of(batch: int) -> float:
        training = _training(student, teacher, Amount(1, batch, data.sequence_length, 0.0, ""))
        if machine.cluster is None:
            return step_seconds(training, machine)
        return place(training, machine).seconds

    return amount(
        data.sequence_length,
        wanted=wanted_tokens(student.parameters),
        blocks=blocks["train"],
        seconds=seconds,
        step_seconds=seconds_of,
        multiple=max(1, machine.gpus),
        steps=steps,
        most_batch=max(1, blocks["held_out"]),
    )


def _refit(
    student: Model,
    teacher: Model,
    data: DataConfig,
    blocks: int,
    machine: Machine,
    placed: Placed,
    made: Amount,
    minutes: float | None,
) -> Refit | None:
    """On as many blocks as there are and the time allows; None with too few to hold any out."""
    length, cluster = data.sequence_length, machine.cluster
    ranks = 1 if cluster is None else max(1, min(cluster.gpus_per_node, machine.gpus))

    def seconds(samples: int) -> float:
        flops = ReconstructionFlops.of(teacher, student, samples * length)
        if cluster is None:
            return _host_seconds(flops.forward, flops.float64, machine)
        speed = _training(student, teacher, made).flops_per_step / placed.seconds / machine.gpus  # of one GPU
        return (flops.forward + _GPU_FLOAT64 * flops.float64) / (speed * ranks)

    samples = min(_HOST_REFITTED if cluster is None else _GPU_REFITTED, blocks)
    while minutes is not None and samples > HELD_OUT and seconds(samples) > 60 * minutes * _REFIT_SHARE:
        samples //= 2
    ranks = min(ranks, samples // HELD_OUT)
    return Refit(samples, length, ranks, seconds(samples)) if ranks else None


def _repays(teacher: Model, data: DataConfig, samples: int, machine: Machine, refit: Refit) -> bool:
    """Whether to score by losses after reconstruction: on processors, where it was measured that they choose better
    units, with enough text for their sums, if that takes no longer than the reconstruction itself.
    """
    estimator, tokens = ESTIMATORS[REFITTED], samples * data.sequence_length
    if machine.cluster is not None or tokens < _TOKENS_PER_NEURON * teacher.shape.ffn_hidden_size:
        return False
    assert estimator.work is not None
    solving = estimator.work(teacher.shape, tokens, teacher.architecture.moe_router_topk or 1)
    return _host_seconds(2.0 * estimator.passes * tokens * teacher.parameters, solving, machine) <= refit.seconds


def _host_seconds(forward: float, float64: float, machine: Machine) -> float:
    """Of so many operations on processors, in a model's precision and in float64."""
    return (forward + HOST_FLOAT64 * float64) / (CORE_FLOPS * machine.cores)


def _correction(teacher: Model, made: Amount, machine: Machine) -> Placed | None:
    """The training of the teacher on as much text; None if the machine does not hold it."""
    try:
        return place(_training(teacher, None, made), machine)
    except ConfigError:
        return None


def _training(student: Model, teacher: Model | None, made: Amount) -> Training:
    return Training(
        name="distilled",
        student=student,
        teacher=teacher,
        steps=made.steps,
        global_batch_size=made.batch,
        micro_batch_size=1,
        sequence_length=made.sequence_length,
        layout=ParallelLayout(),
        bytes=2,
    )


def _aligned(plan: Plan, answers: Answers, request: Request, kind: str, *, chat: bool, pairs: bool) -> Aligned:
    """Batches of 8 on processors, up to 128 on GPUs, in steps that see the samples once or fit in the time."""
    layout = dataclasses.replace(plan.placed.layout, virtual_pipeline=None, context=1, expert=1)
    while layout.data > 1 and (layout.data * 8 > answers.trained or layout.data > answers.held_out):
        layout = dataclasses.replace(layout, data=max(n for n in range(1, layout.data) if layout.data % n == 0))
    most = 8 if plan.machine.cluster is None else 128
    batch = layout.data
    while batch * 2 <= most and batch * 2 * 10 <= answers.trained:
        batch *= 2
    micro = 1 if kind == "dpo" or plan.machine.cluster is not None else min(4, batch)
    while micro > 1 and (batch % micro or answers.held_out < micro * layout.data):
        micro //= 2
    steps = max(1, answers.trained // batch)
    if request.steps is not None:
        steps = min(steps, request.steps)
    elif plan.minutes is not None:
        seconds = 60 * plan.minutes * _share(kind, plan.corrected, chat, pairs)
        length = answers.length * (2 if kind == "dpo" else 1)
        made = Amount(steps, batch, length, 0.0, "")
        training = _training(plan.student, plan.student if kind == "dpo" else None, made)
        each = step_seconds(training, plan.machine, micro) if plan.machine.cluster is None else plan.placed.seconds
        steps = max(1, min(steps, int(seconds / each)))
    return Aligned(answers, steps, batch, micro, layout)


def _notes(subject: Subject, student: Model, text: Text, made: Amount) -> list[str]:
    notes = [subject.notice] if subject.notice else []
    share = student.parameters / subject.model.parameters
    if share < 0.45:
        notes.append(
            f"{100 * share:.0f} % of the model is far: the papers remove at most half at once; consider two runs, the "
            "second from the first one's student"
        )
    embedding = sum(count for part, count in subject.model.parts().items() if part in ("embedding", "output layer"))
    if embedding > subject.model.parameters / 2:
        notes.append(
            f"{100 * embedding / subject.model.parameters:.0f} % of the model is its vocabulary of "
            f"{subject.model.shape.vocab_size:,} tokens; prune.vocabulary trims it (docs/pruning.md)"
        )
    if not text.own:
        notes.append("no --text is given, so the text is that of Python packages; give text like that of your use")
    if made.tokens < 1e7:
        notes.append(
            f"{made.tokens:,} tokens only begin to win back what pruning costs; the papers distil for 94 to 380 billion"
        )
    return notes


def settings(layout: ParallelLayout) -> dict[str, Any]:
    """The settings of a layout that differ from one process."""
    default = ParallelLayout()
    return {
        item.name: getattr(layout, item.name)
        for item in dataclasses.fields(layout)
        if getattr(layout, item.name) != getattr(default, item.name)
    }
