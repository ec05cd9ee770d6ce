"""A picture of layouts: memory of the fullest rank, and the parts of a step's time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.config.parts import ClusterConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.planning.cluster import accelerator
from nemo_minitron.planning.layouts import LayoutCost, best_layout
from nemo_minitron.runtime.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_layouts"]

#: Told apart by colour-blind readers too (after Okabe and Ito, 2008).
_MEMORY = {
    "weights": "#0b6fb8",
    "gradients": "#5db3f0",
    "optimizer": "#8c4a94",
    "activations": "#c77700",
    "teacher": "#0a8f68",
}
_TIME = {
    "arithmetic": "#0b6fb8",
    "bubble": "#8a8f98",
    "tensor": "#c77700",
    "pipeline": "#8c4a94",
    "data": "#0a8f68",
}


def plot_layouts(
    trainings: Sequence[tuple[str, Sequence[LayoutCost]]], cluster: ClusterConfig, path: Path, *, rows: int = 10
) -> None:
    """Draw a row of two charts for each training.

    Args:
        trainings: name and layouts, the fastest first.
        cluster: its memory is drawn as a line.
        path: PNG, SVG or PDF, by its suffix; replaced at once.
        rows: number of layouts to show.

    Raises:
        ConfigError: for a suffix that cannot be drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    formats = FigureCanvasAgg(Figure()).get_supported_filetypes()
    if path.suffix.removeprefix(".") not in formats:
        raise ConfigError(f"plot {path}: its suffix must be one of {', '.join(sorted(formats))}")
    shown = [(name, list(costs[:rows])) for name, costs in trainings]
    height = sum(1.2 + 0.28 * len(costs) for _, costs in shown)
    figure = Figure(figsize=(11, max(height, 2.0)), layout="constrained")
    grid = figure.subplots(len(shown), 2, squeeze=False, height_ratios=[1.2 + 0.28 * len(costs) for _, costs in shown])
    limit = cluster.usable * accelerator(cluster).memory / 2**30
    for (memory, time), (name, costs) in zip(grid, shown, strict=True):
        best = best_layout(costs)
        labels = [f"{'→ ' if cost is best else ''}{_label(cost)}" for cost in costs]
        _bars(memory, labels, {
            part: [getattr(cost.fullest, part) / 2**30 for cost in costs] for part in _MEMORY
        }, _MEMORY)  # fmt: skip
        memory.axvline(limit, color="#20252c", linestyle="--", linewidth=1, label=f"limit {limit:.0f} GiB")
        memory.set_title(f"{name}: GiB of the fullest rank", loc="left", fontsize=10)
        _bars(time, labels, {part: [cost.seconds[part] for cost in costs] for part in _TIME}, _TIME)
        time.set_title(f"{name}: seconds of a step", loc="left", fontsize=10)
        time.set_yticklabels([])
        for axes in (memory, time):
            axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=6, frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix.removeprefix("."), dpi=130)
    replace_file(path, image.getvalue())


def _bars(axes: Axes, labels: list[str], parts: dict[str, list[float]], colours: dict[str, str]) -> None:
    """Stacked horizontal bars, the first on top."""
    starts = [0.0] * len(labels)
    for part, values in parts.items():
        axes.barh(range(len(labels)), values, left=starts, color=colours[part], label=part, height=0.7)
        starts = [start + value for start, value in zip(starts, values, strict=True)]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=8)


def _label(cost: LayoutCost) -> str:
    layout = cost.layout
    full = "" if cost.recompute == "none" else f", {cost.recompute}"
    return f"TP {layout.tensor} PP {layout.pipeline} DP {layout.data}{full}"
