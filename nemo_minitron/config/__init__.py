"""What each stage can be told, and how it is read: strictly, with every fault in one error.

:mod:`~nemo_minitron.config.parts` and :mod:`~nemo_minitron.config.stages` hold the dataclasses,
:mod:`~nemo_minitron.config.load` reads YAML files and ``key=value`` overrides into them. Nothing here imports torch, so
that a configuration error answers at once.
"""

from nemo_minitron.config.load import find_config, load, load_pipeline, shipped_configs
from nemo_minitron.config.parts import (
    AggregationConfig,
    DataConfig,
    DepthChoiceConfig,
    IntermediateConfig,
    LossConfig,
    ParallelConfig,
    RuntimeConfig,
    SourceConfig,
    TargetConfig,
    TaskConfig,
    VocabularyConfig,
)
from nemo_minitron.config.stages import (
    STAGES,
    DepthConfig,
    DistillConfig,
    EvaluateConfig,
    ExportConfig,
    ImportConfig,
    IterateConfig,
    PipelineConfig,
    PruneConfig,
    ReportConfig,
    ScoreConfig,
    StageConfig,
    TokensConfig,
)

__all__ = [
    "STAGES",
    "AggregationConfig",
    "DataConfig",
    "DepthChoiceConfig",
    "DepthConfig",
    "DistillConfig",
    "EvaluateConfig",
    "ExportConfig",
    "ImportConfig",
    "IterateConfig",
    "IntermediateConfig",
    "LossConfig",
    "ParallelConfig",
    "PipelineConfig",
    "PruneConfig",
    "ReportConfig",
    "RuntimeConfig",
    "ScoreConfig",
    "SourceConfig",
    "StageConfig",
    "TargetConfig",
    "TaskConfig",
    "TokensConfig",
    "VocabularyConfig",
    "find_config",
    "load",
    "load_pipeline",
    "shipped_configs",
]
