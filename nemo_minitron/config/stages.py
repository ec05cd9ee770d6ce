"""One dataclass per stage, and the pipeline of them.

Whether paths exist is not checked here but by a stage's plan, since in a pipeline an earlier stage writes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, ClassVar

from omegaconf import MISSING

from nemo_minitron.config.parts import (
    DTYPES,
    FORMATS,
    AggregationConfig,
    BudgetConfig,
    DataConfig,
    DepthChoiceConfig,
    IntermediateConfig,
    LossConfig,
    ParallelConfig,
    RuntimeConfig,
    ShortDistillConfig,
    SpaceConfig,
    TargetConfig,
    TaskConfig,
    VocabularyConfig,
    choice,
    not_negative,
    one_of,
    positive,
)

PRUNE_METHODS = ("activation", "taylor", "magnitude", "random")


@dataclass
class StageConfig:
    """What every stage has.

    Attributes:
        name: how records and reports call this run of the stage; empty takes the stage's own name.
        output: directory (or ``.nemo`` file) that the stage writes.
        overwrite: replace an output that is already there.
        runtime: the process.
    """

    STAGE: ClassVar[str] = ""
    #: Fields that name something another stage may have written.
    INPUTS: ClassVar[tuple[str, ...]] = ()

    name: str = ""
    output: str = MISSING
    overwrite: bool = False
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @property
    def layout(self) -> ParallelConfig:
        """The processes that the stage runs in; one, unless the stage has a ``parallel`` field."""
        return getattr(self, "parallel", None) or ParallelConfig()

    def inputs(self) -> dict[str, str]:
        """Paths that the stage reads, by field (``models.teacher`` for a mapping's entry), fields left null absent."""
        found: dict[str, str] = {}
        for name in self.INPUTS:
            value = attrgetter(name)(self)
            if isinstance(value, dict):
                found.update({f"{name}.{key}": path for key, path in value.items()})
            elif value is not None:
                found[name] = value
        return found

    def faults(self) -> list[str]:
        """What the stage's own fields show to be wrong."""
        return []


@dataclass
class ImportConfig(StageConfig):
    """Take a model over into the suite's working format.

    Attributes:
        source: HF directory, GGUF file, NeMo 2 directory or ``.nemo`` file.
        package: instead of ``source``, a model that a Python package carries, by its name in the data room's table.
        format: what to write: "nemo2", "nemo" or "hf".
        dtype: of the written weights; null keeps the stored one.
        verify: reload the result and compare logits with the source's.
        cache_dir: where a fetched package is kept.
    """

    STAGE: ClassVar[str] = "import"
    INPUTS: ClassVar[tuple[str, ...]] = ("source",)

    source: str | None = None
    package: str | None = None
    format: str = "nemo2"
    dtype: str | None = None
    verify: bool = True
    cache_dir: str = ".cache/minitron"

    def faults(self) -> list[str]:
        """Not exactly one origin, unknown choices."""
        return [*one_of(self, "source", "package"), *choice(self, "format", FORMATS), *choice(self, "dtype", DTYPES)]


@dataclass
class ScoreConfig(StageConfig):
    """Score every unit of a model over calibration data (Minitron, arXiv 2407.14679, section 2.2).

    Attributes:
        model: checkpoint to score.
        estimator: "activation" (forward passes alone), "taylor" (gradient x activation) or "magnitude" (of the weights:
            in one process, without data).
        data: calibration text.
        samples: blocks of ``data.sequence_length`` tokens to run.
        micro_batch_size: blocks of one forward pass.
        aggregation: over sequence and batch.
        also: further aggregations, scored in the same pass; each becomes a score directory of its own inside the
            output, ``criteria/<sequence>-<batch>``.
        parallel: layout of the model.
    """

    STAGE: ClassVar[str] = "score"
    INPUTS: ClassVar[tuple[str, ...]] = ("model",)

    model: str = MISSING
    estimator: str = "activation"
    data: DataConfig = field(default_factory=DataConfig)
    samples: int = 1024
    micro_batch_size: int = 1
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    also: list[AggregationConfig] = field(default_factory=list)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def layout(self) -> ParallelConfig:
        """Magnitudes are read from the checkpoint, in one process."""
        return ParallelConfig() if self.estimator == "magnitude" else self.parallel

    def criteria(self) -> list[tuple[str, str]]:
        """Pairs of aggregations over sequence and batch, that of ``aggregation`` first."""
        own = {"taylor": "sum", "magnitude": "none"}.get(self.estimator, "mean")
        return [(one.sequence or own, one.batch) for one in (self.aggregation, *self.also)]

    def faults(self) -> list[str]:
        """Nothing to run, unknown estimators, aggregations that the estimator does not have."""
        found = [
            *choice(self, "estimator", ("activation", "taylor", "magnitude")),
            *positive(self, "samples", "micro_batch_size"),
        ]
        given = {one.sequence for one in (self.aggregation, *self.also)} - {None}
        if self.estimator == "taylor" and given:
            found.append(f"aggregation.sequence={given.pop()}: estimator=taylor sums over the sequence; leave it null")
        if self.estimator == "magnitude" and self.also:
            found.append("also: estimator=magnitude has nothing to aggregate; leave it out")
        pairs = self.criteria()
        if len(set(pairs)) != len(pairs):
            found.append("also: a pair of aggregations is given twice")
        return found


@dataclass
class DepthConfig(StageConfig):
    """Measure a model without some of its layers: the loss, and the accuracy on a task (arXiv 2407.14679, 2408.11796).

    A run that is stopped goes on where it stood when the stage is started again.

    Attributes:
        model: checkpoint to measure.
        data: calibration text.
        samples: blocks of ``data.sequence_length`` tokens to run for each candidate.
        micro_batch_size: blocks of one forward pass.
        single: measure without each layer alone.
        block_lengths: measure without each run of so many neighbouring layers.
        greedy: drop up to so many layers one by one, measuring all others again after each; 0 for not at all.
        greedy_by: criterion of ``greedy``, "loss" or "task".
        task: measured besides the loss.
        reuse_prefix: keep the hidden states at which a candidate parts from the one before it, which saves half of the
            layers' work and takes memory on the host.
        parallel: layout of the model.
    """

    STAGE: ClassVar[str] = "depth"
    INPUTS: ClassVar[tuple[str, ...]] = ("model",)

    model: str = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    samples: int = 128
    micro_batch_size: int = 1
    single: bool = True
    block_lengths: list[int] = field(default_factory=list)
    greedy: int = 0
    greedy_by: str = "loss"
    task: TaskConfig = field(default_factory=TaskConfig)
    reuse_prefix: bool = True
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def inputs(self) -> dict[str, str]:
        """The model, and the task where it is a file."""
        return {**super().inputs(), **({} if self.task.path is None else {"task": self.task.path})}

    def faults(self) -> list[str]:
        """Nothing to measure, lengths below 1, a criterion without its task."""
        found = [
            *positive(self, "samples", "micro_batch_size"),
            *not_negative(self, "greedy"),
            *choice(self, "greedy_by", ("loss", "task")),
            *(f"block_lengths: {length} must be above 0" for length in self.block_lengths if length <= 0),
        ]
        if not self.single and not self.block_lengths and not self.greedy:
            found.append("single: nothing is to be measured; set single=true, block_lengths or greedy")
        if self.greedy and self.greedy_by == "task" and self.task.given is None:
            found.append("greedy_by=task: there is no task; set task.path or task.builtin")
        return found


@dataclass
class TokensConfig(StageConfig):
    """Count the tokens of a text, for trimming a model's vocabulary.

    Attributes:
        model: checkpoint whose tokenizer is used.
        data: text.
        split: of the text, "train", "calibration" or "held_out".
        blocks: blocks of ``data.sequence_length`` tokens to count; null counts the whole split.
    """

    STAGE: ClassVar[str] = "tokens"
    INPUTS: ClassVar[tuple[str, ...]] = ("model",)

    model: str = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    split: str = "train"
    blocks: int | None = None

    def faults(self) -> list[str]:
        """Unknown splits, nothing to count."""
        return [*choice(self, "split", ("train", "calibration", "held_out")), *positive(self, "blocks")]


@dataclass
class PruneConfig(StageConfig):
    """Remove the units that matter least.

    Attributes:
        model: checkpoint to prune.
        scores: directory that ``score`` wrote; needed unless the method is "random", or nothing but layers and tokens
            goes and ``layers_to_drop`` or ``depth_scores`` say which layers.
        method: "activation", "taylor" or "magnitude" keep the highest scores of that estimator, "random" draws the kept
            units (a baseline).
        target: sizes of the pruned model.
        vocabulary: a smaller vocabulary, which the tokenizer follows.
        merge_pruned_heads: add what tells pruned heads from kept ones to those (arXiv 2407.14679, section 2.3).
        student_layout: layout that the pruned model is meant for; a target that it cannot split is refused.
        depth: how the layers to drop are chosen, by scores.
        depth_scores: directory that ``depth`` wrote; needed by ``depth.criterion`` "loss" and "task".
        layers_to_drop: layers to remove whatever their scores (0-based); their number then fixes ``num_layers``.
        format: what to write: "nemo2", "nemo" or "hf".
    """

    STAGE: ClassVar[str] = "prune"
    INPUTS: ClassVar[tuple[str, ...]] = ("model", "scores", "depth_scores", "vocabulary.frequencies")

    model: str = MISSING
    scores: str | None = None
    method: str = "activation"
    target: TargetConfig = field(default_factory=TargetConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    merge_pruned_heads: bool = False
    student_layout: ParallelConfig = field(default_factory=ParallelConfig)
    depth: DepthChoiceConfig = field(default_factory=DepthChoiceConfig)
    depth_scores: str | None = None
    layers_to_drop: list[int] | None = None
    format: str = "nemo2"

    def faults(self) -> list[str]:
        """Missing scores, nothing to prune, contradictory depths."""
        found = [*choice(self, "method", PRUNE_METHODS), *choice(self, "format", FORMATS)]
        narrower = self.target.given().keys() - {"num_layers"}
        named = self.layers_to_drop is not None or self.depth_scores is not None or not self.target.given()
        if self.method != "random" and self.scores is None and (narrower or not named):
            found.append(f"scores: method={self.method} needs the directory that `minitron score` wrote")
        if not self.target.given() and not self.layers_to_drop and self.vocabulary.size is None:
            found.append(
                "target: nothing is to be pruned; give at least one size of the target, layers_to_drop or "
                "vocabulary.size"
            )
        if self.merge_pruned_heads and (self.scores is None or self.method == "random"):
            found.append("merge_pruned_heads: needs scores, and a method that goes by them, to know which heads matter")
        measured = self.depth.criterion in ("loss", "task")
        if measured and self.depth_scores is None:
            found.append(
                f"depth_scores: criterion={self.depth.criterion} needs the directory that `minitron depth` wrote"
            )
        if self.depth_scores is not None and not measured:
            found.append(
                "depth_scores: is read by depth.criterion=loss or task alone; set one of them or leave it null"
            )
        if self.depth != DepthChoiceConfig() and self.method == "random":
            found.append("depth: method=random draws the layers; leave depth out")
        if self.depth != DepthChoiceConfig() and self.layers_to_drop is not None:
            found.append("layers_to_drop: names the layers already; leave depth out")
        if self.layers_to_drop is not None:
            found += [
                f"layers_to_drop: {n} is not a layer number (they count from 0)" for n in self.layers_to_drop if n < 0
            ]
            if len(set(self.layers_to_drop)) != len(self.layers_to_drop):
                found.append(f"layers_to_drop={self.layers_to_drop}: a layer is named twice")
            if self.layers_to_drop and self.target.num_layers is not None:
                found.append("layers_to_drop: already fixes the depth; leave target.num_layers null")
        return found


@dataclass
class IterateConfig(StageConfig):
    """Prune in rounds, scoring what is left before each: score, prune, score, prune.

    A run that is stopped goes on after its last finished round.

    Attributes:
        model: checkpoint to prune.
        target: sizes of the pruned model.
        rounds: how many.
        spacing: of the shapes in between, "geometric" (equal ratios) or "linear" (equal steps).
        estimator, data, samples, micro_batch_size, aggregation, parallel: of the scores, as in ``score``; "activation"
            or "taylor".
        format: what to write: "nemo2", "nemo" or "hf".
    """

    STAGE: ClassVar[str] = "iterate"
    INPUTS: ClassVar[tuple[str, ...]] = ("model",)

    model: str = MISSING
    target: TargetConfig = field(default_factory=TargetConfig)
    rounds: int = 4
    spacing: str = "geometric"
    estimator: str = "activation"
    data: DataConfig = field(default_factory=DataConfig)
    samples: int = 1024
    micro_batch_size: int = 1
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    format: str = "nemo2"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def faults(self) -> list[str]:
        """Nothing to prune, unknown choices."""
        found = [
            *positive(self, "rounds", "samples", "micro_batch_size"),
            *choice(self, "spacing", ("geometric", "linear")),
            *choice(self, "estimator", ("activation", "taylor")),
            *choice(self, "format", FORMATS),
        ]
        if not self.target.given():
            found.append("target: nothing is to be pruned; give at least one size of the target")
        if self.estimator == "taylor" and self.aggregation.sequence is not None:
            found.append(
                f"aggregation.sequence={self.aggregation.sequence}: estimator=taylor sums over the sequence; leave it "
                "null"
            )
        return found


@dataclass
class SearchConfig(StageConfig):
    """Search the shapes within a budget for the one that loses least (arXiv 2407.14679, section 4).

    All are ranked by the loss of the pruned, untrained model; the best ones again after a short distillation. A run
    that is stopped goes on where it stood, and no finished candidate is done again.

    Attributes:
        model: checkpoint to prune.
        scores: directory that ``score`` wrote.
        method, depth, depth_scores: how units and layers are chosen, as in ``prune``.
        space: which sizes are candidates.
        budget: what a shape may cost.
        student_layout: layout that every shape must fit, and that the memory is of.
        max_candidates: no more shapes are ranked; of more, some that are spread over all of them.
        data: text; losses are of its calibration split, the distillation trains on its train split.
        samples: calibration blocks of ``data.sequence_length`` tokens for each loss.
        micro_batch_size: blocks of one forward pass.
        measure_latency: time each candidate, without a budget of latency too.
        best: candidates that are distilled; 0 for none.
        distill: the short distillation.
        save_student: keep the best distilled student.
        resume: go on from what ``output`` holds.
        parallel: layout of the models in ranking and distillation.
    """

    STAGE: ClassVar[str] = "search"
    INPUTS: ClassVar[tuple[str, ...]] = ("model", "scores", "depth_scores")

    model: str = MISSING
    scores: str = MISSING
    method: str = "activation"
    depth: DepthChoiceConfig = field(default_factory=DepthChoiceConfig)
    depth_scores: str | None = None
    space: SpaceConfig = field(default_factory=SpaceConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    student_layout: ParallelConfig = field(default_factory=ParallelConfig)
    max_candidates: int = 32
    data: DataConfig = field(default_factory=DataConfig)
    samples: int = 32
    micro_batch_size: int = 1
    measure_latency: bool = False
    best: int = 3
    distill: ShortDistillConfig = field(default_factory=ShortDistillConfig)
    save_student: bool = False
    resume: bool = True
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def layout(self) -> ParallelConfig:
        """One process leads; it starts the others when they are needed."""
        return ParallelConfig()

    @property
    def timed(self) -> bool:
        """Whether latency is measured."""
        return self.measure_latency or self.budget.latency_ms is not None

    def pruning(self, output: str, target: TargetConfig) -> PruneConfig:
        """The stage that prunes to one of the shapes."""
        return PruneConfig(
            output=output, runtime=self.runtime, model=self.model, scores=self.scores, method=self.method,
            target=target, depth=self.depth, depth_scores=self.depth_scores,
        )  # fmt: skip

    def distillation(self, output: str, student: str) -> DistillConfig:
        """The stage that distils one of the students; it validates at its start and its end."""
        short = {one.name: getattr(self.distill, one.name) for one in fields(self.distill)}
        return DistillConfig(
            output=output, runtime=self.runtime, student=student, teacher=self.model, data=self.data,
            parallel=self.parallel, validate_every=self.distill.steps, validation_batches=1,
            save_every=max(1, min(100, self.distill.steps)), **short,
        )  # fmt: skip

    def faults(self) -> list[str]:
        """Nothing to rank, and what pruning and distilling would refuse."""
        found = [
            *positive(self, "max_candidates", "samples", "micro_batch_size"),
            *not_negative(self, "best"),
            *choice(self, "method", PRUNE_METHODS[:3]),
        ]
        if self.best > self.max_candidates > 0:
            found.append(f"best={self.best}: lies above max_candidates={self.max_candidates}")
        if self.save_student and self.best == 0:
            found.append("save_student=true: no student is distilled with best=0")
        some = TargetConfig(num_layers=1)
        found += self.pruning("", some).faults()
        if self.best:
            found += [f"distill.{fault}" for fault in self.distillation("", "").faults()]
        if self.timed and self.parallel.world_size > 1:
            found.append("measure_latency: candidates are timed in one process; set parallel to 1 x 1 x 1")
        return found


@dataclass
class DistillConfig(StageConfig):
    """Train a student on its teacher's logits (Minitron, arXiv 2407.14679, section 3).

    Attributes:
        student, teacher: checkpoints.
        data: training text; its held-out split validates.
        steps: optimizer steps.
        micro_batch_size: blocks of one forward pass on one data-parallel rank.
        global_batch_size: blocks of one optimizer step.
        lr, min_lr, warmup_steps: linear warm-up to ``lr``, then cosine decay to ``min_lr`` at ``steps``.
        weight_decay, beta1, beta2, clip_grad: AdamW and the gradient norm it is clipped to (0 for no clipping).
        loss: of a token's logits.
        intermediate: losses of the states inside the models; none by default.
        max_minutes: stop in good order when this time is used up; null for no limit.
        validate_every, validation_batches: steps between validations, micro-batches of each.
        log_every, save_every: steps between metrics and between checkpoints.
        resume: go on from the last checkpoint in ``output``.
        precision: "32" or "bf16-mixed".
        parallel: layout of student and teacher.
    """

    STAGE: ClassVar[str] = "distill"
    INPUTS: ClassVar[tuple[str, ...]] = ("student", "teacher")

    student: str = MISSING
    teacher: str = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    steps: int = 300
    micro_batch_size: int = 1
    global_batch_size: int = 8
    lr: float = 1e-4
    min_lr: float = 1e-5
    warmup_steps: int = 10
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_grad: float = 1.0
    loss: LossConfig = field(default_factory=LossConfig)
    intermediate: IntermediateConfig = field(default_factory=IntermediateConfig)
    max_minutes: float | None = None
    validate_every: int = 50
    validation_batches: int = 8
    log_every: int = 1
    save_every: int = 100
    resume: bool = True
    precision: str = "32"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def tokens(self) -> int:
        """Tokens that the whole training sees."""
        return self.steps * self.global_batch_size * self.data.sequence_length

    def faults(self) -> list[str]:
        """Ranges, a batch that does not divide, a schedule that does not fit."""
        found = [
            *positive(
                self, "steps", "micro_batch_size", "global_batch_size", "lr", "max_minutes",
                "validate_every", "validation_batches", "log_every", "save_every",
            ),
            *not_negative(self, "min_lr", "warmup_steps", "weight_decay", "clip_grad"),
            *choice(self, "precision", ("32", "bf16-mixed")),
            *(f"{b}: must lie in [0, 1)" for b in ("beta1", "beta2") if not 0 <= getattr(self, b) < 1),
        ]  # fmt: skip
        if self.min_lr > self.lr:
            found.append(f"min_lr={self.min_lr}: lies above lr={self.lr}")
        if self.warmup_steps > 0 and self.warmup_steps >= self.steps > 0:
            found.append(f"warmup_steps={self.warmup_steps}: leaves nothing of steps={self.steps}")
        one_pass = self.micro_batch_size * self.parallel.data
        if one_pass > 0 and self.global_batch_size > 0 and self.global_batch_size % one_pass:
            found.append(
                f"global_batch_size={self.global_batch_size}: is not a multiple of "
                f"micro_batch_size * parallel.data = {one_pass}"
            )
        elif one_pass > 0 and self.parallel.virtual_pipeline and self.parallel.pipeline > 0:
            passes = self.global_batch_size // one_pass
            if passes % self.parallel.pipeline:
                found.append(
                    f"global_batch_size={self.global_batch_size}: makes {passes} micro-batches a rank; virtual "
                    f"pipeline stages need a multiple of parallel.pipeline={self.parallel.pipeline}"
                )
        return found


@dataclass
class ExportConfig(StageConfig):
    """Write a model for others: ``output/hf``, ``output/nemo2``, ``output/model.nemo``.

    Attributes:
        model: checkpoint to export.
        formats: any of "hf", "nemo2", "nemo".
        dtype: of the written weights; null keeps the stored one.
        verify: reload each result with the other side's own loader and compare logits.
    """

    STAGE: ClassVar[str] = "export"
    INPUTS: ClassVar[tuple[str, ...]] = ("model",)

    model: str = MISSING
    formats: list[str] = field(default_factory=lambda: ["hf"])
    dtype: str | None = None
    verify: bool = True

    def faults(self) -> list[str]:
        """Unknown or no formats."""
        found = [
            f"formats: {name!r} must be one of {', '.join(FORMATS)}" for name in self.formats if name not in FORMATS
        ]
        if not self.formats:
            found.append(f"formats: none is given; list any of {', '.join(FORMATS)}")
        return [*found, *choice(self, "dtype", DTYPES)]


@dataclass
class EvaluateConfig(StageConfig):
    """Held-out loss and sample generations of several models on the same tokens.

    Attributes:
        models: path of each model by the name that the report shows.
        baseline: name of the model that the others are compared with; null takes the first.
        data: text whose held-out split is used.
        tokens: held-out tokens to score, rounded down to whole blocks.
        micro_batch_size: blocks of one forward pass.
        prompts: each is answered by every model, greedily, through the chat template where there is one.
        max_new_tokens: longest answer.
        parallel: layout of each model.
    """

    STAGE: ClassVar[str] = "evaluate"
    INPUTS: ClassVar[tuple[str, ...]] = ("models",)

    models: dict[str, str] = field(default_factory=dict)
    baseline: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    tokens: int = 65536
    micro_batch_size: int = 1
    prompts: list[str] = field(default_factory=list)
    max_new_tokens: int = 48
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def faults(self) -> list[str]:
        """No models, an unknown baseline, less than one block."""
        found = positive(self, "tokens", "micro_batch_size", "max_new_tokens")
        if not self.models:
            found.append("models: none is given; map at least one name to a path")
        if self.baseline is not None and self.baseline not in self.models:
            found.append(f"baseline={self.baseline}: is none of the models ({', '.join(self.models)})")
        if 0 < self.tokens < self.data.sequence_length:
            found.append(
                f"tokens={self.tokens}: less than one block of data.sequence_length={self.data.sequence_length}"
            )
        return found


@dataclass
class ReportConfig(StageConfig):
    """Write ``index.html`` and ``report.md`` from the records that a run directory holds.

    Attributes:
        run: directory with the stages' outputs.
        output: where to write; ``run`` + "/report" unless given.
        overwrite: on, since a report can always be made again from the records.
        title: heading of the report; empty takes the directory's name.
    """

    STAGE: ClassVar[str] = "report"
    INPUTS: ClassVar[tuple[str, ...]] = ("run",)

    run: str = MISSING
    output: str = "${run}/report"
    overwrite: bool = True
    title: str = ""


@dataclass
class PipelineConfig:
    """Stages one after the other, each in its own processes.

    ``${...}`` interpolation reaches the whole file: ``model: ${output}/teacher``.

    Attributes:
        name: how the run is called.
        output: directory of the run; a stage without ``output`` writes to ``output/<its name>``.
        vars: values of the file's own, for interpolation.
        defaults: keys handed to every stage that has them (``runtime``, ``data``, ...), its own keys winning.
        stages: each ``{stage: distill, name: ..., <the stage's keys>}``; the name is the stage's own unless given.
    """

    name: str = "pipeline"
    output: str = MISSING
    vars: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)

    def faults(self) -> list[str]:
        """No stages."""
        return [] if self.stages else ["stages: none is given"]


#: The configuration of each stage, in the order of a typical pipeline.
STAGES: dict[str, type[StageConfig]] = {
    config.STAGE: config
    for config in (
        ImportConfig,
        ScoreConfig,
        DepthConfig,
        TokensConfig,
        PruneConfig,
        IterateConfig,
        SearchConfig,
        DistillConfig,
        ExportConfig,
        EvaluateConfig,
        ReportConfig,
    )
}
