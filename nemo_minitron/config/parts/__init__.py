"""The parts that several stages share: layout, process, text, and the small groups of options.

A field without a default (``MISSING``) must be given. ``faults()`` reports what a dataclass's own fields can show to be
wrong (ranges, choices, contradictions); faults of nested dataclasses are theirs.
"""

from nemo_minitron.config.parts.attributes import ATTRIBUTE_SCHEMAS, AttributesConfig
from nemo_minitron.config.parts.chat import CHAT_TEMPLATES, ChatDataConfig
from nemo_minitron.config.parts.checks import (
    AGGREGATIONS,
    BALANCES,
    DEPTH_CRITERIA,
    DEPTH_FORMS,
    DTYPES,
    FORMATS,
    LATENCIES,
    LOGIT_LOSSES,
    MEMORY_USES,
    RECOMPUTE,
    STATE_LOSSES,
    TEACHER_PLACEMENTS,
    choice,
    not_negative,
    one_of,
    positive,
)
from nemo_minitron.config.parts.cluster import ClusterConfig
from nemo_minitron.config.parts.evaluation import HarnessConfig
from nemo_minitron.config.parts.generation import PromptsConfig, Sampling
from nemo_minitron.config.parts.losses import CorrectionConfig, IntermediateConfig, LossConfig
from nemo_minitron.config.parts.preferences import PREFERENCE_LOSSES, Preferences
from nemo_minitron.config.parts.process import ParallelLayout, RuntimeConfig
from nemo_minitron.config.parts.pruning import AggregationConfig, DepthChoiceConfig, TargetConfig, VocabularyConfig
from nemo_minitron.config.parts.schedule import (
    PRECISIONS,
    AlignmentSchedule,
    Schedule,
    ShortAlignmentSchedule,
    ShortSchedule,
    batch_faults,
)
from nemo_minitron.config.parts.search import AxisConfig, BudgetConfig, ShortDistillConfig, SpaceConfig
from nemo_minitron.config.parts.text import DataConfig, SourceConfig, TaskConfig

__all__ = [
    "AlignmentSchedule",
    "PRECISIONS",
    "PREFERENCE_LOSSES",
    "Preferences",
    "Schedule",
    "ShortAlignmentSchedule",
    "ShortSchedule",
    "batch_faults",
    "AGGREGATIONS",
    "AggregationConfig",
    "AxisConfig",
    "BALANCES",
    "BudgetConfig",
    "CHAT_TEMPLATES",
    "ATTRIBUTE_SCHEMAS",
    "AttributesConfig",
    "ChatDataConfig",
    "ClusterConfig",
    "DEPTH_CRITERIA",
    "DEPTH_FORMS",
    "DTYPES",
    "CorrectionConfig",
    "DataConfig",
    "DepthChoiceConfig",
    "FORMATS",
    "HarnessConfig",
    "IntermediateConfig",
    "LATENCIES",
    "LOGIT_LOSSES",
    "LossConfig",
    "MEMORY_USES",
    "ParallelLayout",
    "RECOMPUTE",
    "PromptsConfig",
    "RuntimeConfig",
    "STATE_LOSSES",
    "Sampling",
    "TEACHER_PLACEMENTS",
    "ShortDistillConfig",
    "SourceConfig",
    "SpaceConfig",
    "TargetConfig",
    "TaskConfig",
    "VocabularyConfig",
    "choice",
    "not_negative",
    "one_of",
    "positive",
]
