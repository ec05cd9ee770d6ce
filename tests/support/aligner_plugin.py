"""What NeMo-Aligner's own unit tests expect of a ``conftest.py`` that its wheel leaves out, on the CPU layer.

Loaded by ``-p support.aligner_plugin`` in processes of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.runtime import cpu

cpu.prepare()

import torch  # noqa: E402 - the layer comes first


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "run_only_on(device): what upstream runs it on")
    config.addinivalue_line("markers", "mpi: needs TensorRT-LLM")
    # One device a process, as torchrun has it on a machine with GPUs.
    world = int(os.environ.get("WORLD_SIZE", "1"))
    torch.cuda.device_count = lambda: world


@pytest.fixture(autouse=True)
def _generators_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU layer rewrites devices that functions of torch are given; ``torch.Generator`` is a class."""
    original = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": original("cpu"))


@pytest.fixture
def init_model_parallel() -> Callable[..., None]:
    """Process groups of the sizes that a test asks for."""

    def initialize(tensor_model_parallel_size: int = 1, pipeline_model_parallel_size: int = 1) -> None:
        from nemo_minitron.runtime.groups import ParallelLayout
        from nemo_minitron.runtime.groups import initialize as start

        tensor, pipeline = tensor_model_parallel_size, pipeline_model_parallel_size
        world = int(os.environ.get("WORLD_SIZE", "1"))
        start(ParallelLayout(tensor, pipeline, world // (tensor * pipeline)))

    return initialize


@pytest.fixture
def dummy_gpt_model(tmp_path: Path) -> Any:
    """A tiny ``MegatronGPTModel``; upstream's has one of its own tokenizers."""
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo_aligner.utils.train_script_utils import resolve_and_create_trainer
    from support.chats import SPECIAL, chat_checkpoint, chat_tokenizer

    from nemo_minitron.alignment.settings import aligner_settings
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.config import AlignmentSchedule
    from nemo_minitron.runtime.groups import ParallelLayout

    path = chat_checkpoint(tmp_path / "model")
    chat_tokenizer(path, special=(SPECIAL[0], *SPECIAL[7:]))  # the test says that 8 and 9 are ordinary tokens
    checkpoint = open_checkpoint(path)
    sizes: dict[str, Any] = {"steps": 1, "samples": 8, "held_out": 8, "max_length": 64, "model": {}}
    data = int(os.environ.get("WORLD_SIZE", "1"))
    layout, schedule = ParallelLayout(data=data), AlignmentSchedule()
    config = aligner_settings(checkpoint, layout, schedule, seed=1234, kind="sft", **sizes)
    return MegatronGPTModel(config.model, resolve_and_create_trainer(config, "sft"))
