"""Run Megatron, NeMo and NeMo-Aligner on the CPU, by patches where they need CUDA. See ``docs/runtime.md``."""

from nemo_minitron.runtime.cpu.layer import (
    activate,
    complete,
    deactivate,
    ensure,
    is_active,
    markdown,
    needed,
    patches,
    prepare,
)

__all__ = ["activate", "complete", "deactivate", "ensure", "is_active", "markdown", "needed", "patches", "prepare"]
