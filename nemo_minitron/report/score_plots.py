"""The report's figures of importance scores.

Every function returns a :class:`~nemo_minitron.report.draw.Figure`, or None if the run has nothing to show.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_minitron.config.tables import ESTIMATORS
from nemo_minitron.report.draw import Figure, Theme, clean, draw_figure
from nemo_minitron.report.run import Run, ScoreSet, stage_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

__all__ = ["heads", "hidden", "layers", "neurons"]


def _reads(stage: str, scores: ScoreSet, run: Run) -> bool:
    """Whether a stage pruned by these scores; True where its record does not say by which."""
    parents = next((made.parents for made in run.stages if made.name == stage), {})
    if "scores" not in parents:
        return True
    origin = stage_of(parents["scores"], run)
    return origin is not None and origin.name == scores.name


def _kept_by(scores: ScoreSet, run: Run) -> dict[str, Any] | None:
    """The units that the first pruning by these scores kept."""
    chosen = (model for model in run.models if model.role == "pruned" and model.kept is not None)
    return next((model.kept for model in chosen if _reads(model.name, scores, run)), None)


def layers(scores: ScoreSet, run: Run) -> Figure | None:
    """Each layer's score; layers that the scored pruning dropped are pale."""
    if "layers" not in scores.arrays:
        return None
    values = scores.arrays["layers"]
    estimator = ESTIMATORS.get(scores.info.get("estimator", "activation"))  # None: of a package that is not here
    what, meaning = estimator.layer_score if estimator else ("Importance", "The estimator's score of a layer.")
    kept = _kept_by(scores, run)
    dropped = set() if kept is None else set(range(len(values))) - set(kept["layers"])

    def draw(canvas: Canvas, theme: Theme) -> None:
        axes = canvas.subplots()
        for layer, value in enumerate(values):
            gone = layer in dropped
            axes.bar(
                layer, value, color=theme.colour("random" if gone else "teacher"), width=0.78, alpha=0.55 if gone else 1
            )
        axes.set_xlabel("layer")
        axes.set_ylabel(what.lower())
        axes.set_xlim(-0.7, len(values) - 0.3)
        axes.locator_params(axis="x", integer=True)
        clean(axes, theme, grid="y")

    order = np.argsort(values)
    note = f" Pale bars: dropped layers ({', '.join(map(str, sorted(dropped)))})." if dropped else ""
    return draw_figure(
        f"layers-{scores.name}",
        draw,
        (6.0, 2.5),
        alt=f"{what} by layer; lowest: layers {', '.join(map(str, order[:3]))}.",
        caption=f"{meaning}{note}",
    )


def neurons(scores: ScoreSet, run: Run) -> Figure | None:
    """FFN scores: layers (of a mixture: experts, layer by layer) down, neurons from highest to lowest across."""
    if "ffn" not in scores.arrays:
        return None
    values = scores.arrays["ffn"]
    ordered = -np.sort(-values.reshape(-1, values.shape[-1]), axis=1)
    rows = "layer" if values.ndim == 2 else "expert, layer by layer"
    pruned = [model for model in run.models if model.role == "pruned" and _reads(model.name, scores, run)]
    sizes = {layer.ffn_hidden_size for model in pruned for layer in model.shape.each()}
    kept = sizes.pop() if len(sizes) == 1 else None

    def draw(canvas: Canvas, theme: Theme) -> None:
        axes = canvas.subplots()
        image = axes.imshow(_log(ordered), aspect="auto", cmap=theme.colour_map, interpolation="nearest")
        if kept is not None and kept < ordered.shape[1]:
            axes.axvline(kept - 0.5, color="white", lw=1.4, ls="--")
            axes.annotate(
                f"{kept:,} kept", (kept, 0), (-6, -6), textcoords="offset points", ha="right", va="top", color="white"
            )
        axes.set_xlabel("neurons, by falling score")
        axes.set_ylabel(rows)
        axes.locator_params(axis="y", integer=True, min_n_ticks=1)
        _bar(canvas, image, axes, theme)
        clean(axes, theme, grid=None)

    return draw_figure(
        f"neurons-{scores.name}",
        draw,
        (6.0, 3.2),
        alt=f"Heat map of the scores of {ordered.shape[1]} FFN neurons in each {rows} ({ordered.shape[0]} rows).",
        caption="FFN neurons. Colour: log₁₀ of the score. Right of the dashed line a pruned layer loses its neurons.",
    )


def heads(scores: ScoreSet, run: Run) -> Figure | None:
    """Scores of attention heads: layers down, heads across, a line between query groups."""
    if "heads" not in scores.arrays or scores.arrays["heads"].shape[1] < 2:
        return None
    values = scores.arrays["heads"]
    groups = scores.arrays["groups"].shape[1] if "groups" in scores.arrays else 1
    kept = _kept_by(scores, run)
    lost = [] if kept is None else [place for place in _lost_heads(kept, values.shape[1]) if place[0] < len(values)]
    crosses = " A cross: pruned from a layer that stays." if lost else ""

    def draw(canvas: Canvas, theme: Theme) -> None:
        axes = canvas.subplots()
        image = axes.imshow(_log(values), aspect="auto", cmap=theme.colour_map, interpolation="nearest")
        if lost:
            rows, columns = zip(*lost, strict=True)
            axes.scatter(columns, rows, marker="x", s=16, lw=1.1, color="white")
        for boundary in range(1, groups):
            axes.axvline(boundary * values.shape[1] / groups - 0.5, color="white", lw=1.6)
        for axis in ("x", "y"):
            axes.locator_params(axis=axis, integer=True, min_n_ticks=1)
        axes.set_xlabel("query head")
        axes.set_ylabel("layer")
        _bar(canvas, image, axes, theme)
        clean(axes, theme, grid=None)

    return draw_figure(
        f"heads-{scores.name}",
        draw,
        (4.1, 3.2),
        alt=f"Heat map of the scores of {values.shape[1]} heads in {groups} query groups, for {len(values)} layers.",
        caption="Attention heads, white lines between query groups. Colour: log₁₀ of the score." + crosses,
    )


def hidden(scores: ScoreSet, run: Run) -> Figure | None:
    """Channels of the residual stream, from the highest score to the lowest."""
    if "hidden" not in scores.arrays:
        return None
    ordered = -np.sort(-scores.arrays["hidden"])

    def draw(canvas: Canvas, theme: Theme) -> None:
        axes = canvas.subplots()
        axes.plot(
            np.arange(1, len(ordered) + 1),
            np.maximum(ordered, np.finfo(float).tiny),
            color=theme.colour("teacher"),
            lw=1.8,
        )
        axes.set_yscale("log")
        axes.set_xlabel("channels, by falling score")
        axes.set_ylabel("score")
        clean(axes, theme, grid="y")

    return draw_figure(
        f"hidden-{scores.name}",
        draw,
        (4.1, 2.5),
        alt=f"Scores of {len(ordered)} hidden channels, from {ordered[0]:.3g} down to {ordered[-1]:.3g}.",
        caption="Channels of the residual stream.",
    )


def _bar(canvas: Canvas, image: Any, axes: Axes, theme: Theme) -> None:
    bar = canvas.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=theme.faint)


def _log(values: np.ndarray) -> np.ndarray:
    """log10; zeros are replaced by the smallest value above zero."""
    positive = values[values > 0]
    return np.log10(np.maximum(values, positive.min() if positive.size else 1.0))


def _lost_heads(kept: dict[str, Any], count: int) -> list[tuple[int, int]]:
    """``(layer, head)`` of the heads that kept layers lost."""
    lost = []
    for layer, groups in zip(kept["layers"], kept["heads"], strict=True):
        stay = {head for group in groups for head in group}
        lost += [(layer, head) for head in range(count) if head not in stay]
    return lost
