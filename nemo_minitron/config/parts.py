"""The parts that several stages share: layout, process, text, and the small groups of options.

A field without a default (``MISSING``) must be given. ``faults()`` reports what a dataclass's own fields can show to be
wrong (ranges, choices, contradictions); faults of nested dataclasses are theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

AGGREGATIONS = ("mean", "l1", "l2", "variance", "max")
FORMATS = ("nemo2", "nemo", "hf")
DTYPES = ("float32", "bfloat16")
DEPTH_CRITERIA = ("block_influence", "loss", "task")
DEPTH_FORMS = ("lowest", "contiguous", "greedy")
LOGIT_LOSSES = ("forward_kl", "reverse_kl", "jensen_shannon", "top_k")
STATE_LOSSES = ("mse", "cosine")
BALANCES = ("fixed", "dynamic")
MEMORY_USES = ("inference", "training")
LATENCIES = ("prefill", "decode")


def positive(config: Any, *names: str) -> list[str]:
    """Faults of the named fields that are given and not above zero."""
    values = ((name, getattr(config, name)) for name in names)
    return [f"{name}={value}: must be above 0" for name, value in values if value is not None and value <= 0]


def not_negative(config: Any, *names: str) -> list[str]:
    """Faults of the named fields that are given and below zero."""
    values = ((name, getattr(config, name)) for name in names)
    return [f"{name}={value}: must be 0 or more" for name, value in values if value is not None and value < 0]


def choice(config: Any, name: str, choices: Iterable[str]) -> list[str]:
    """The fault of a field that is given and none of ``choices``."""
    value = getattr(config, name)
    return [] if value is None or value in choices else [f"{name}={value}: must be one of {', '.join(choices)}"]


def one_of(config: Any, *names: str) -> list[str]:
    """The fault of alternatives of which not exactly one is given."""
    given = [name for name in names if getattr(config, name) is not None]
    if len(given) == 1:
        return []
    state = f"{' and '.join(given)} are both given" if given else "none is given"
    return [f"{names[0]}: give exactly one of {', '.join(names)} ({state})"]


@dataclass
class ParallelConfig:
    """How a model is laid over processes. ``tensor * pipeline * data`` processes are started.

    Attributes:
        tensor: tensor_model_parallel_size.
        pipeline: pipeline_model_parallel_size.
        data: data-parallel replicas.
        virtual_pipeline: virtual_pipeline_model_parallel_size, or null for none.
        sequence_parallel: shard the activations between tensor-parallel regions along the sequence.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    virtual_pipeline: int | None = None
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tensor * self.pipeline * self.data

    @property
    def stages(self) -> int:
        """Pipeline stages, virtual ones counted."""
        return self.pipeline * (self.virtual_pipeline or 1)

    def sequence_faults(self, length: int) -> list[str]:
        """Why sequences of ``data.sequence_length`` cannot be sharded over the tensor-parallel ranks."""
        if not self.sequence_parallel or length % self.tensor == 0:
            return []
        return [
            f"data.sequence_length={length}: cannot be split over parallel.tensor={self.tensor}; set a multiple of it, "
            "or parallel.sequence_parallel=false"
        ]

    def faults(self) -> list[str]:
        """Sizes below 1 and options that need a size above 1."""
        found = positive(self, "tensor", "pipeline", "data", "virtual_pipeline")
        if not found and self.virtual_pipeline is not None and self.pipeline == 1:
            found.append(f"virtual_pipeline={self.virtual_pipeline}: needs parallel.pipeline above 1; set it to null")
        if not found and self.sequence_parallel and self.tensor == 1:
            found.append("sequence_parallel=true: needs parallel.tensor above 1; set it to false")
        return found


@dataclass
class RuntimeConfig:
    """The process itself.

    Attributes:
        device: "auto" takes CUDA where there is any and otherwise the CPU; "cpu" and "cuda" insist.
        seed: of every random generator.
        threads: torch threads of one process; null shares the machine's cores among the processes.
        timeout_minutes: a stage that runs longer is stopped; null for no limit.
        collective_timeout_minutes: a rank that waits longer for the others gives up.
        dtype: of weights and activations in scoring and evaluation, "float32" or "bfloat16".
    """

    device: str = "auto"
    seed: int = 1234
    threads: int | None = None
    timeout_minutes: float | None = None
    collective_timeout_minutes: float = 10.0
    dtype: str = "float32"

    def faults(self) -> list[str]:
        """Unknown choices and limits that leave nothing."""
        return [
            *choice(self, "device", ("auto", "cpu", "cuda")),
            *choice(self, "dtype", DTYPES),
            *not_negative(self, "seed"),
            *positive(self, "threads", "timeout_minutes", "collective_timeout_minutes"),
        ]


@dataclass
class SourceConfig:
    """One source of text.

    Attributes:
        name: how reports call it; each source is a domain of the evaluation.
        path: text, JSONL or Parquet file, or a glob of them.
        package: a source that an installable package carries, by its name in the data room's table.
        text_key: JSONL key or Parquet column that holds the text.
        weight: share of this source in the mixture, relative to the others.
        max_characters: read no more than this.
    """

    name: str = MISSING
    path: str | None = None
    package: str | None = None
    text_key: str = "text"
    weight: float = 1.0
    max_characters: int | None = None

    def faults(self) -> list[str]:
        """Not exactly one origin, or nothing to read."""
        return [*one_of(self, "path", "package"), *positive(self, "weight", "max_characters")]


@dataclass
class DataConfig:
    """Token blocks of fixed length from a mixture of sources, split by document into train, calibration and held-out.

    Attributes:
        sources: where the text comes from.
        sequence_length: tokens of one block (its last label needs one more).
        calibration_fraction: share of the documents set aside for scoring.
        held_out_fraction: share of the documents set aside for evaluation and validation.
        seed: of the split and of the order.
        cache_dir: where fetched sources and token blocks are kept.
    """

    sources: list[SourceConfig] = field(default_factory=list)
    sequence_length: int = 512
    calibration_fraction: float = 0.05
    held_out_fraction: float = 0.05
    seed: int = 1234
    cache_dir: str = ".cache/minitron"

    def faults(self) -> list[str]:
        """No or doubled sources, splits that leave nothing to train on."""
        found = [*positive(self, "sequence_length"), *not_negative(self, "seed")]
        if not self.sources:
            found.append("sources: none is given; list at least one {name, path} or {name, package}")
        names = [source.name for source in self.sources]
        found += [
            f"sources: the name {name!r} is given twice" for name in sorted({n for n in names if names.count(n) > 1})
        ]
        fractions = ("calibration_fraction", "held_out_fraction")
        outside = [name for name in fractions if not 0 < getattr(self, name) < 1]
        found += [f"{name}={getattr(self, name)}: must lie between 0 and 1" for name in outside]
        if not outside and self.calibration_fraction + self.held_out_fraction >= 1:
            found.append("calibration_fraction + held_out_fraction must stay below 1: nothing is left to train on")
        return found


@dataclass
class AggregationConfig:
    """How activations become one score per unit: "mean", "l1", "l2", "variance" or "max".

    Attributes:
        sequence: over the tokens of a sample; null is the mean (of the Taylor estimator, the sum it always takes).
        batch: over the samples.
    """

    sequence: str | None = None
    batch: str = "l2"

    def faults(self) -> list[str]:
        """Unknown choices."""
        return [*choice(self, "sequence", AGGREGATIONS), *choice(self, "batch", AGGREGATIONS)]


@dataclass
class TargetConfig:
    """Sizes of the pruned model; null keeps the model's own."""

    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    num_moe_experts: int | None = None

    def given(self) -> dict[str, int]:
        """The sizes that are asked for."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def faults(self) -> list[str]:
        """Sizes below 1 and heads that do not fill their groups."""
        found = positive(self, *(f.name for f in dataclasses.fields(self)))
        heads, groups = self.num_attention_heads, self.num_query_groups
        if not found and heads is not None and groups is not None and heads % groups:
            found.append(f"num_attention_heads={heads}: is not a multiple of num_query_groups={groups}")
        return found


@dataclass
class VocabularyConfig:
    """A smaller vocabulary: the most frequent tokens, and what they and any text need.

    Attributes:
        size: tokens to keep; null keeps all.
        frequencies: what ``minitron tokens`` wrote, or a file with one ``id<TAB>count`` a line.
    """

    size: int | None = None
    frequencies: str | None = None

    def faults(self) -> list[str]:
        """One without the other."""
        found = positive(self, "size")
        if (self.size is None) != (self.frequencies is None):
            missing = "size" if self.size is None else "frequencies"
            found.append(f"{missing}: a vocabulary is trimmed to a size by frequencies; give both or none")
        return found


@dataclass
class LossConfig:
    """The loss of a token's logits, as defined in :mod:`nemo_minitron.distillation.losses`.

    Attributes:
        kind: "forward_kl" (the papers' choice), "reverse_kl", "jensen_shannon" or "top_k" (the teacher's likeliest
            tokens and one ghost token for all others).
        temperature: T of both distributions; the divergence comes times T squared.
        beta: weight of the teacher in "jensen_shannon".
        k: tokens that "top_k" keeps.
        label_weight: share ``w`` of the labels' cross-entropy (at temperature 1): ``(1 - w) divergence + w CE``.
    """

    kind: str = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    k: int = 64
    label_weight: float = 0.0

    def faults(self) -> list[str]:
        """Unknown kinds and values out of range."""
        found = [*choice(self, "kind", LOGIT_LOSSES), *positive(self, "temperature", "k")]
        if not 0 < self.beta < 1:
            found.append(f"beta={self.beta}: must lie between 0 and 1; their limits are forward_kl and reverse_kl")
        if not 0 <= self.label_weight < 1:
            found.append(f"label_weight={self.label_weight}: must lie in [0, 1); with 1 there is no distillation")
        return found


@dataclass
class IntermediateConfig:
    """Losses between the states inside the two models, as in :mod:`nemo_minitron.distillation.intermediate`.

    Attributes:
        hidden: "mse" or "cosine" between the hidden states that leave the mapped layers, the mean over these layers;
            null for none.
        embedding: the same between the outputs of the embeddings.
        relation_heads: R of the attention relations, the mean over their mapped layers; null for none.
        layers: student layer -> teacher layer, counted from 0, of the hidden states; null maps each layer of a pruned
            student to the layer that it was, of any other to the teacher's at the same share of the depth.
        attention_layers: the same of the attention relations; null takes the last layer alone.
        hidden_weight, embedding_weight, attention_weight: of each loss in their sum.
        balance: "fixed" adds the sum to the loss of the logits; "dynamic" scales it to the size that the loss of the
            logits had in the step before (arXiv 2407.14679, section 3).
    """

    hidden: str | None = None
    embedding: str | None = None
    relation_heads: int | None = None
    layers: dict[int, int] | None = None
    attention_layers: dict[int, int] | None = None
    hidden_weight: float = 1.0
    embedding_weight: float = 1.0
    attention_weight: float = 1.0
    balance: str = "fixed"

    def weights(self) -> dict[str, float]:
        """The weights of the losses that are asked for: "hidden", "embedding", "attention"."""
        asked = {"hidden": self.hidden, "embedding": self.embedding, "attention": self.relation_heads}
        return {part: getattr(self, f"{part}_weight") for part, given in asked.items() if given is not None}

    def faults(self) -> list[str]:
        """Unknown choices, values out of range, options of a loss that is not asked for."""
        found = [
            *choice(self, "hidden", STATE_LOSSES),
            *choice(self, "embedding", STATE_LOSSES),
            *choice(self, "balance", BALANCES),
            *positive(self, "relation_heads", "hidden_weight", "embedding_weight", "attention_weight"),
        ]
        for name, loss in (("layers", "hidden"), ("attention_layers", "relation_heads")):
            layers = getattr(self, name)
            if layers is not None and getattr(self, loss) is None:
                found.append(f"{name}={layers}: is of the loss {loss}, which is not asked for")
            elif layers is not None and not layers:
                found.append(f"{name}={{}}: maps no layer; leave it null for the automatic map")
        if self.balance == "dynamic" and not self.weights():
            found.append("balance=dynamic: there is no intermediate loss to balance; ask for one")
        return found


@dataclass
class TaskConfig:
    """A multiple-choice task, for the layers whose absence costs the least accuracy; none unless one is named.

    Attributes:
        path: JSONL file; a line is ``{"prompt": "...", "choices": ["...", "..."], "answer": 0}``.
        builtin: instead, a task that is built from a package's text, by its name in the data room's table.
        questions: use no more than this.
    """

    path: str | None = None
    builtin: str | None = None
    questions: int | None = None

    @property
    def given(self) -> str | None:
        """What the task is called, or None without one."""
        return self.path or self.builtin

    def faults(self) -> list[str]:
        """Two tasks, no questions."""
        found = positive(self, "questions")
        if self.path is not None and self.builtin is not None:
            found.append("path: give one of path and builtin, not both")
        return found


@dataclass
class DepthChoiceConfig:
    """How the layers to drop are chosen.

    Attributes:
        criterion: "block_influence" (of the scores), or "loss" or "task" (of ``depth_scores``).
        form: "lowest", those that cost least alone; "contiguous", the run of neighbours that costs least as one;
            "greedy", the cheapest one by one, each measured after those before it are gone.
    """

    criterion: str = "block_influence"
    form: str = "lowest"

    def faults(self) -> list[str]:
        """Unknown choices, influence chosen greedily."""
        found = [
            *choice(self, "criterion", DEPTH_CRITERIA),
            *choice(self, "form", DEPTH_FORMS),
        ]
        if self.criterion == "block_influence" and self.form == "greedy":
            found.append("form=greedy: block influence is measured once; choose lowest, or criterion=loss")
        return found


@dataclass
class AxisConfig:
    """Candidates of one size of a searched shape; an axis that gives neither ``min`` nor ``values`` stays as it is.

    Attributes:
        min, max: smallest and largest; without ``max``, up to the model's own size.
        multiple: all of them are multiples of this.
        values: instead, the candidates themselves.
    """

    min: int | None = None
    max: int | None = None
    multiple: int = 1
    values: list[int] | None = None

    def faults(self) -> list[str]:
        """Sizes below 1, contradictions."""
        found = positive(self, "min", "max", "multiple")
        if self.values is not None:
            found += [f"values: {value} must be above 0" for value in self.values if value <= 0]
            if not self.values:
                found.append("values: is empty; leave it null to keep the model's own size")
            if (self.min, self.max, self.multiple) != (None, None, 1):
                found.append("values: names the candidates already; leave min, max and multiple out")
        elif self.min is None and (self.max is not None or self.multiple != 1):
            found.append("min: is needed with max or multiple; or give values")
        elif self.min is not None and self.max is not None and self.min > self.max:
            found.append(f"min={self.min}: lies above max={self.max}")
        return found


@dataclass
class SpaceConfig:
    """The sizes that a search may change. Where groups change and heads are not named, each group keeps its heads."""

    num_layers: AxisConfig = field(default_factory=AxisConfig)
    hidden_size: AxisConfig = field(default_factory=AxisConfig)
    ffn_hidden_size: AxisConfig = field(default_factory=AxisConfig)
    num_attention_heads: AxisConfig = field(default_factory=AxisConfig)
    num_query_groups: AxisConfig = field(default_factory=AxisConfig)
    num_moe_experts: AxisConfig = field(default_factory=AxisConfig)

    def given(self) -> dict[str, AxisConfig]:
        """The axes that are searched."""
        axes = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return {name: axis for name, axis in axes.items() if axis != AxisConfig()}

    def faults(self) -> list[str]:
        """Nothing to search."""
        if self.given():
            return []
        return ["num_layers: no axis is searched; give at least one axis {min, multiple} or {values}"]


@dataclass
class BudgetConfig:
    """What a searched shape may cost; every budget that is given holds.

    Attributes:
        parameters: number of parameters, within ``tolerance``.
        share: instead, share of the model's own number.
        tolerance: of ``parameters`` or ``share``: 0.05 allows 5 % to either side.
        memory_gib: GiB of the fullest rank of ``student_layout``, by the memory model.
        memory_of: "inference" (weights and the cache of keys and values) or "training" (weights, gradients, Adam,
            activations).
        latency_ms: milliseconds on the running device, measured.
        latency_of: "prefill" (a whole batch of sequences) or "decode" (one further token of each).
        floor: without ``parameters`` and ``share``, shapes that use less than this share of the memory or latency are
            left out.
        batch_size, sequence_length: of the workload that memory and latency are of.
        dtype: of weights and cache in the memory model; latency is measured in ``runtime.dtype``.
        recompute: of "training": activations within a layer are computed again in the backward pass.
    """

    parameters: float | None = None
    share: float | None = None
    tolerance: float = 0.05
    memory_gib: float | None = None
    memory_of: str = "inference"
    latency_ms: float | None = None
    latency_of: str = "prefill"
    floor: float = 0.8
    batch_size: int = 1
    sequence_length: int = 512
    dtype: str = "bfloat16"
    recompute: bool = False

    def faults(self) -> list[str]:
        """No budget, two of the same kind, values out of range."""
        found = [
            *positive(self, "parameters", "share", "memory_gib", "latency_ms", "batch_size", "sequence_length"),
            *choice(self, "memory_of", MEMORY_USES),
            *choice(self, "latency_of", LATENCIES),
            *choice(self, "dtype", DTYPES),
            *(f"{name}={getattr(self, name)}: must lie in [0, 1)" for name in ("tolerance", "floor")
              if not 0 <= getattr(self, name) < 1),
        ]  # fmt: skip
        if self.share is not None and self.share > 1:
            found.append(f"share={self.share}: pruning does not grow a model; give at most 1")
        if self.parameters is not None and self.share is not None:
            found.append("parameters: give one of parameters and share, not both")
        if all(value is None for value in (self.parameters, self.share, self.memory_gib, self.latency_ms)):
            found.append("parameters: no budget is given; set parameters, share, memory_gib or latency_ms")
        return found


@dataclass
class ShortDistillConfig:
    """The short distillation that ranks the best shapes of a search; its data are the search's.

    Attributes:
        steps, micro_batch_size, global_batch_size, lr, min_lr, warmup_steps, loss, precision: as in ``distill``.
    """

    steps: int = 300
    micro_batch_size: int = 1
    global_batch_size: int = 8
    lr: float = 1e-4
    min_lr: float = 1e-5
    warmup_steps: int = 10
    loss: LossConfig = field(default_factory=LossConfig)
    precision: str = "32"

    def faults(self) -> list[str]:
        """Left to the distillation's own configuration, which the search makes of it."""
        return []
