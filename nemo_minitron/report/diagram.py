"""The shapes of a run's models as a picture: the parts of the teacher that pruning removed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron.report.draw import Figure, Theme, clean, draw_figure
from nemo_minitron.report.run import Model, Run
from nemo_minitron.report.tables import count, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

    from nemo_minitron.shape import ModelShape

__all__ = ["shape_diagram"]

#: More models than these do not fit side by side.
MOST = 5


def shape_diagram(run: Run) -> Figure | None:
    """The teacher and each other shape of the run as silhouettes; None where there are not two shapes.

    A layer is a row of three bars, as wide as its FFN, its residual stream and its attention heads. If it is known
    which layers a pruned model lost, each is an empty frame in its place.
    """
    teacher = run.teacher
    if teacher is None:
        return None
    models = [teacher]
    for model in run.models:
        if not any(_same(model, other) for other in models):
            models.append(model)
    models = models[:MOST]
    if len(models) < 2:
        return None
    widest = max(_widest(model) for model in models)
    deepest = max(model.shape.num_layers for model in models)

    def draw(canvas: Canvas, theme: Theme) -> None:
        all_axes = canvas.subplots(1, len(models), sharex=True, sharey=True)
        for axes, model in zip(all_axes, models, strict=True):
            _silhouette(axes, model, teacher, deepest, theme)
            axes.set_title(f"{model.name}\n{count(model.parameters)}", fontsize=9.5, color=theme.ink)
            axes.set_xlim(-0.54 * widest, 0.54 * widest)
            axes.set_xticks([])
        all_axes[0].set_ylabel("layer of the teacher")
        all_axes[0].set_ylim(deepest - 0.4, -0.6)
        all_axes[0].locator_params(axis="y", integer=True, min_n_ticks=1)
        from matplotlib.patches import Patch

        parts = zip(("FFN", "hidden", "heads × head dim"), _shades(theme, teacher.role), strict=True)
        canvas.legend(
            handles=[Patch(color=colour, label=name) for name, colour in parts],
            loc="outside lower center", ncols=3, frameon=False, labelcolor=theme.ink,
        )  # fmt: skip

    described = "; ".join(
        f"{m.name}: {m.shape.num_layers} layers, hidden {m.shape.hidden_size}, "
        f"FFN {span(m.shape, 'ffn_hidden_size', '')}, "
        f"{m.shape.num_attention_heads} heads"
        for m in models
    )
    return draw_figure(
        "shapes",
        draw,
        (1.5 + 1.9 * len(models), 3.6),
        alt=f"Shapes side by side: {described}.",
        caption="One row a layer, as wide as its parts. Empty frames: layers that were taken out.",
    )


def _same(model: Model, other: Model) -> bool:
    """Whether two models look alike; what is trained after pruning has the layers of what was pruned."""
    return model.shape == other.shape and (model.kept is None or _layers(model) == _layers(other))


def _layers(model: Model) -> tuple[int, ...]:
    """Indices of a model's layers in the teacher, if they are known; otherwise 0, 1, 2, ..."""
    return tuple(model.kept["layers"]) if model.kept is not None else tuple(range(model.shape.num_layers))


def _widths(sizes: ModelShape) -> tuple[int, int, int]:
    """Widths of the three bars of a layer."""
    return sizes.ffn_hidden_size, sizes.hidden_size, sizes.num_attention_heads * sizes.head_dim


def _widest(model: Model) -> int:
    return max(max(_widths(sizes)) for sizes in model.shape.each())


def _shades(theme: Theme, role: str) -> list[tuple[float, float, float, float]]:
    from matplotlib.colors import to_rgba

    red, green, blue, _ = to_rgba(theme.colour(role))
    return [(red, green, blue, alpha) for alpha in (0.35, 0.65, 1.0)]


def _silhouette(axes: Axes, model: Model, teacher: Model, deepest: int, theme: Theme) -> None:
    """Draw one model."""
    layers = _layers(model)
    each = [model.shape.at(position) for position in range(len(layers))]
    for sizes in dict.fromkeys(each):
        rows = [layer for layer, own in zip(layers, each, strict=True) if own == sizes]
        # From the widest to the narrowest, so that none hides another.
        parts = sorted(zip(_widths(sizes), _shades(theme, model.role), strict=True), key=lambda part: -part[0])
        for width, colour in parts:
            axes.barh(rows, [width] * len(rows), left=-width / 2, height=0.8, color=[colour])
    if model.kept is not None:
        gone = [layer for layer in range(deepest) if layer not in layers]
        width = _widest(teacher)
        axes.barh(
            gone, [width] * len(gone), left=-width / 2, height=0.7,
            facecolor="none", edgecolor=theme.faint, lw=0.8, ls=":",
        )  # fmt: skip
    clean(axes, theme, grid=None)
