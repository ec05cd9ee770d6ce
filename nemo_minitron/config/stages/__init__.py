"""One dataclass per stage, and the pipeline of them.

Whether paths exist is not checked here but by a stage's plan, since in a pipeline an earlier stage writes them.
"""

from __future__ import annotations

from nemo_minitron.config.stages.alignment import AlignConfig, DpoConfig, SftConfig
from nemo_minitron.config.stages.base import StageConfig
from nemo_minitron.config.stages.cache import CacheConfig
from nemo_minitron.config.stages.checkpoints import ExportConfig, ImportConfig
from nemo_minitron.config.stages.distillation import CorrectConfig, DistillConfig
from nemo_minitron.config.stages.doctor import DOCTOR_CHECKS, DoctorConfig
from nemo_minitron.config.stages.evaluation import EvaluateConfig, ReportConfig
from nemo_minitron.config.stages.generation import GenerateConfig
from nemo_minitron.config.stages.importance import DepthConfig, ScoreConfig, TokensConfig
from nemo_minitron.config.stages.pipeline import PipelineConfig
from nemo_minitron.config.stages.pruning import IterateConfig, PruneConfig
from nemo_minitron.config.stages.search import SearchConfig
from nemo_minitron.config.stages.steering import (
    LabelConfig,
    ReinforceConfig,
    RewardConfig,
    Steerlm2Config,
    SteerlmConfig,
)

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
        CorrectConfig,
        CacheConfig,
        GenerateConfig,
        DistillConfig,
        SftConfig,
        DpoConfig,
        RewardConfig,
        LabelConfig,
        SteerlmConfig,
        Steerlm2Config,
        ReinforceConfig,
        ExportConfig,
        EvaluateConfig,
        ReportConfig,
        DoctorConfig,
    )
}


__all__ = [
    "LabelConfig",
    "ReinforceConfig",
    "RewardConfig",
    "Steerlm2Config",
    "SteerlmConfig",
    "AlignConfig",
    "DOCTOR_CHECKS",
    "DoctorConfig",
    "CacheConfig",
    "CorrectConfig",
    "DepthConfig",
    "DistillConfig",
    "DpoConfig",
    "EvaluateConfig",
    "ExportConfig",
    "GenerateConfig",
    "ImportConfig",
    "IterateConfig",
    "PipelineConfig",
    "PruneConfig",
    "ReportConfig",
    "STAGES",
    "ScoreConfig",
    "SearchConfig",
    "SftConfig",
    "StageConfig",
    "TokensConfig",
]
