"""Names of quantizations, and the text that an export is calibrated on."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron.config.parts.text import DataConfig

__all__ = ["QUANTIZED_EXPORTS", "QUANTIZED_TRAININGS", "OptionalDataConfig", "group_size_faults"]

#: What ``export`` can write through ModelOpt.
QUANTIZED_EXPORTS = ("fp8", "int4", "int4_awq", "nvfp4")
#: What ``distill`` can train a student for. "int4_awq" is none: its scales are searched after the training.
QUANTIZED_TRAININGS = ("fp8", "int4", "nvfp4")
_GROUPED = ("int4", "int4_awq")


def group_size_faults(group_size: int | None, names: list[str]) -> list[str]:
    """Faults of the columns that share a scale, for these quantizations."""
    if group_size is None:
        return []
    if not any(name in _GROUPED for name in names):
        return [f"group_size={group_size}: is a setting of {' and '.join(_GROUPED)}; set it to null"]
    if group_size < 2 or group_size % 2:
        return [f"group_size={group_size}: must be an even number of columns, such as 128, 64 or 32"]
    return []


@dataclass
class OptionalDataConfig(DataConfig):
    """As ``data`` of other stages; it may be left out where nothing is measured."""

    @property
    def given(self) -> bool:
        """Whether there is any text."""
        return bool(self.sources or self.blend)

    def faults(self) -> list[str]:
        """Those of a text; none where it is left out."""
        return super().faults() if self.given else []
