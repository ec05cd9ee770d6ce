"""Benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from nemo_minitron.config.parts.checks import not_negative, positive

__all__ = ["HarnessConfig"]


@dataclass
class HarnessConfig:
    """Tasks of lm-evaluation-harness; none unless some are named.

    Attributes:
        tasks: names of its tasks and groups of tasks ("hellaswag", "mmlu"), and of those whose data packages carry
            ("ifeval_offline"; docs/evaluation.md lists them).
        include_path: directory with tasks of your own, in the harness's YAML form.
        trust_task_code: let these tasks run: their templates and the Python files that they name may do anything.
        num_fewshot: examples in the context; null takes each task's own number.
        limit: documents of each task; null takes all.
        batch_size: texts of one forward pass.
        chat_template: put the prompts through the tokenizer's chat template.
    """

    PATHS: ClassVar[tuple[str, ...]] = ("include_path",)
    #: Settings that a later release added; see ``StageConfig.ADDED``.
    ADDED: ClassVar[tuple[str, ...]] = ("trust_task_code",)

    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None
    trust_task_code: bool = False
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    chat_template: bool = False

    def faults(self) -> list[str]:
        """Ranges, tasks given twice, a directory without tasks to take from it."""
        faults = [*positive(self, "limit", "batch_size"), *not_negative(self, "num_fewshot")]
        if twice := sorted({task for task in self.tasks if self.tasks.count(task) > 1}):
            faults.append(f"tasks: {', '.join(twice)} is given twice")
        if self.include_path is not None and not self.tasks:
            faults.append(f"include_path={self.include_path}: no tasks are named; list those to run")
        if self.include_path is not None and not self.trust_task_code:
            faults.append(
                f"include_path={self.include_path}: tasks may run code, in their templates too; read them, and set "
                "trust_task_code=true if you trust them"
            )
        return faults
