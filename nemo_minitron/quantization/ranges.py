"""What a student was trained for, beside the model: the quantization, and the ranges that its inputs were rounded by.

The weights of such a student are floats, and their own ranges follow from them. Those of inputs do not: an export takes
them from here, so that it rounds as the training did.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nemo_minitron.errors import CheckpointError, first_line
from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.files import replace_file

__all__ = ["FILE_NAME", "TrainedFor"]

FILE_NAME = "trained_quantization.json"


@dataclass(frozen=True)
class TrainedFor:
    """The quantization that a student was trained for.

    Attributes:
        quantize: name of the scheme.
        group_size: columns that share a scale; None where a matrix has one.
        ranges: canonical name of a matrix -> largest absolute input; empty where inputs are not rounded.
    """

    quantize: str
    group_size: int | None = None
    ranges: Mapping[str, float] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Write it into a directory."""
        content = {**asdict(self), "ranges": dict(sorted(self.ranges.items()))}
        replace_file(directory / FILE_NAME, json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path) -> TrainedFor | None:
        """What lies in a directory; None if nothing does.

        Raises:
            CheckpointError: if the file is damaged.
        """
        file = directory / FILE_NAME
        if not file.is_file():
            return None
        try:
            content = parse_json(file.read_text(encoding="utf-8"))
            group = content["group_size"]
            return cls(
                str(content["quantize"]),
                None if group is None else int(group),
                {str(name): float(limit) for name, limit in content["ranges"].items()},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{file} is damaged ({first_line(error)}); restore it, or remove it to calibrate anew"
            ) from error
