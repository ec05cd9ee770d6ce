"""The report's figures, each drawn twice: for a light and for a dark page.

Every function returns a :class:`Figure`, or None if the run has nothing to show. Agg only: no display is needed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nemo_minitron.config.tables import ESTIMATORS
from nemo_minitron.report.collect import Curve, Run, ScoreSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

__all__ = [
    "COLOURS",
    "Figure",
    "Theme",
    "clean",
    "draw_figure",
    "heads",
    "hidden",
    "layers",
    "losses",
    "neurons",
    "training",
]

#: By role, on a light and on a dark page; told apart by colour-blind readers too (after Okabe and Ito, 2008).
COLOURS: dict[str, tuple[str, str]] = {
    "teacher": ("#0b6fb8", "#5db3f0"),
    "pruned": ("#c77700", "#f0b050"),
    "random": ("#8a8f98", "#8f96a3"),
    "distilled": ("#0a8f68", "#35c79b"),
    "other": ("#8c4a94", "#cf8fd8"),
}
_MARKERS = {"teacher": "o", "pruned": "s", "random": "X", "distilled": "D", "other": "^"}


@dataclass(frozen=True)
class Theme:
    """Colours of a page. ``index`` chooses from the pairs of :data:`COLOURS`."""

    index: int
    ink: str
    faint: str
    grid: str
    colour_map: str

    def colour(self, role: str) -> str:
        """The colour of a role."""
        return COLOURS[role][self.index]


LIGHT = Theme(0, "#20252c", "#66707d", "#e4e8ed", "viridis")
DARK = Theme(1, "#e8ebef", "#98a2b0", "#2c333d", "viridis")


@dataclass(frozen=True)
class Figure:
    """A drawn figure.

    Attributes:
        name: file name without suffix.
        light, dark: PNG images of the two themes.
        alt: what it shows, in words and numbers.
        caption: how to read it.
        width: of the image at normal size, in CSS pixels.
    """

    name: str
    light: bytes
    dark: bytes
    alt: str
    caption: str
    width: int

    def uri(self, theme: str) -> str:
        """``data:`` URI of one theme."""
        return "data:image/png;base64," + base64.b64encode(getattr(self, theme)).decode("ascii")


def losses(run: Run, evaluation: dict[str, Any]) -> Figure:
    """Held-out loss of each model, overall with its standard error, and by domain."""
    models = evaluation["models"]
    names = list(models)
    domains = sorted({domain for model in models.values() for domain in model["domains"]})

    def draw(canvas: Canvas, theme: Theme) -> None:
        both = canvas.subplots(1, 2, gridspec_kw={"width_ratios": [1.15, 1]}) if domains else [canvas.subplots()]
        axes = both[0]
        values = [models[name]["loss"] for name in names]
        errors = [models[name].get("standard_error") or 0.0 for name in names]
        colours = [theme.colour(run.roles.get(name, "other")) for name in names]
        axes.barh(names, values, color=colours, height=0.62)
        axes.errorbar(values, names, xerr=errors, fmt="none", ecolor=theme.ink, elinewidth=1.1, capsize=3)
        for name, value, error in zip(names, values, errors, strict=True):
            axes.annotate(f"{value:.2f}", (value + error, name), (6, 0), textcoords="offset points", va="center")
        axes.invert_yaxis()
        axes.margins(x=0.14)
        axes.set_xlim(left=0)
        axes.set_xlabel("held-out loss, nats per token")
        clean(axes, theme, grid="x")
        if not domains:
            return
        axes = both[1]
        for name in names:
            role = run.roles.get(name, "other")
            places = [place for place, domain in enumerate(domains) if domain in models[name]["domains"]]
            points = [models[name]["domains"][domains[place]]["loss"] for place in places]
            axes.scatter(points, places, s=46, color=theme.colour(role), marker=_MARKERS[role], label=name, zorder=3)
        axes.set_yticks(range(len(domains)), domains)
        axes.set_ylim(len(domains) - 0.5, -0.5)
        axes.set_xlabel("by domain")
        clean(axes, theme, grid="both")

    listing = ", ".join(f"{name} {models[name]['loss']:.3f}" for name in names)
    return draw_figure(
        "losses",
        draw,
        (9.4, 1.3 + 0.46 * max(len(names), len(domains))),
        alt=f"Held-out loss in nats per token: {listing}.",
        caption="Left: over all held-out tokens, with the standard error over blocks. Right: by source of the text. "
        "Lower is better.",
    )


def training(run: Run, curve: Curve) -> Figure | None:
    """Loss, learning rate and speed of a distillation."""
    panels = [
        ("kl", "forward KL, nats per token", 1.0),
        ("lm_loss", "validation language-modelling loss", 1.0),
        ("lr", "learning rate × 10⁴", 1e4),
        ("tokens_per_second", "tokens per second", 1.0),
    ]
    rows = {"train": curve.train, "validation": curve.validation}
    shown = [panel for panel in panels if any(_series(part, panel[0])[0].size > 1 for part in rows.values())]
    if not shown:
        return None

    def draw(canvas: Canvas, theme: Theme) -> None:
        all_axes = np.atleast_1d(canvas.subplots(1, len(shown)))
        for axes, (key, title, factor) in zip(all_axes, shown, strict=True):
            steps, values = _series(curve.train, key)
            values = values * factor
            if steps.size:
                noisy = key == "kl"
                axes.plot(
                    steps, values, color=theme.colour("distilled"), lw=1.0 if noisy else 1.6, alpha=0.35 if noisy else 1
                )
                if noisy:
                    axes.plot(steps, _smooth(values), color=theme.colour("distilled"), lw=1.9, label="training")
            steps, values = _series(curve.validation, key)
            if steps.size:
                axes.plot(steps, values, "o-", color=theme.colour("teacher"), lw=1.6, ms=5, label="validation")
            if key in ("kl", "tokens_per_second", "lr"):
                axes.set_ylim(bottom=0)
            if key == "kl":
                axes.legend(frameon=False, labelcolor=theme.ink)
            axes.set_title(title, fontsize=9.5, color=theme.ink, loc="left")
            axes.set_xlabel("step")
            clean(axes, theme, grid="y")
        canvas.set_layout_engine("constrained", wspace=0.07)

    _, kl = _series(curve.train, "kl")
    facts = f" Training KL from {_smooth(kl)[0]:.3f} to {_smooth(kl)[-1]:.3f}." if kl.size else ""
    return draw_figure(
        f"training-{curve.name}",
        draw,
        (3.0 * len(shown) + 0.6, 2.7),
        alt=f"Curves of {curve.name} over {_steps(curve)} steps.{facts}",
        caption="The pale line is each step, the strong one a running mean.",
    )


def layers(scores: ScoreSet, run: Run) -> Figure | None:
    """Each layer's score; layers that the scored pruning dropped are pale."""
    if "layers" not in scores.arrays:
        return None
    values = scores.arrays["layers"]
    estimator = ESTIMATORS.get(scores.info.get("estimator", "activation"))  # None: of a package that is not here
    what, meaning = estimator.layer_score if estimator else ("Importance", "The estimator's score of a layer.")
    dropped = set() if run.kept is None else set(range(len(values))) - set(run.kept["layers"])

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
    sizes = {layer.ffn_hidden_size for model in run.models if model.role == "pruned" for layer in model.shape.each()}
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
    lost = _lost_heads(run.kept, values.shape[1]) if run.kept is not None else []
    crosses = " A cross: pruned from a layer that stays." if lost else ""

    def draw(canvas: Canvas, theme: Theme) -> None:
        axes = canvas.subplots()
        image = axes.imshow(_log(values), aspect="auto", cmap=theme.colour_map, interpolation="nearest")
        if lost:
            rows, columns = zip(*lost, strict=True)
            axes.scatter(columns, rows, marker="x", s=16, lw=1.1, color="white")
        for boundary in range(1, groups):
            axes.axvline(boundary * values.shape[1] / groups - 0.5, color="white", lw=1.6)
        axes.locator_params(axis="x", integer=True)
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


# ---------------------------------------------------------------------------------------------------------------- parts


def draw_figure(
    name: str, draw: Callable[[Canvas, Theme], None], size: tuple[float, float], *, alt: str, caption: str
) -> Figure:
    """Draw a figure of ``size`` inches for both themes."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    images = []
    for theme in (LIGHT, DARK):
        settings = {
            "font.family": "DejaVu Sans",
            "font.size": 8.5,
            "text.color": theme.ink,
            "axes.labelcolor": theme.faint,
            "axes.edgecolor": theme.grid,
            "xtick.color": theme.faint,
            "ytick.color": theme.faint,
        }
        with mpl.rc_context(settings):
            canvas = Canvas(figsize=size, layout="constrained")
            FigureCanvasAgg(canvas)
            draw(canvas, theme)
            out = io.BytesIO()
            # Without a date and version in it, the same run gives the same bytes.
            # The light one has a white ground, so that it can be read on any page.
            transparent = theme is DARK
            canvas.savefig(out, format="png", dpi=192, transparent=transparent, metadata={"Software": None})
            images.append(out.getvalue())
    return Figure(name, images[0], images[1], alt, caption, round(size[0] * 96))


def clean(axes: Axes, theme: Theme, *, grid: Literal["x", "y", "both"] | None) -> None:
    """Remove unneeded frame lines and ticks, and draw a grid behind the plot."""
    for side in ("top", "right", *(("left", "bottom") if grid is None else ())):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    if grid is not None:
        axes.grid(axis=grid, color=theme.grid, lw=0.8)
        axes.set_axisbelow(True)


def _bar(canvas: Canvas, image: Any, axes: Axes, theme: Theme) -> None:
    bar = canvas.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=theme.faint)


def _log(values: np.ndarray) -> np.ndarray:
    """log10; zeros are replaced by the smallest value above zero."""
    positive = values[values > 0]
    return np.log10(np.maximum(values, positive.min() if positive.size else 1.0))


def _series(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """``(steps, values)`` of the rows that have the key."""
    pairs = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float) and "step" in row]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about a twentieth of the run; the window is shorter at the ends."""
    half = max(1, len(values) // 40)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _lost_heads(kept: dict[str, Any], count: int) -> list[tuple[int, int]]:
    """``(layer, head)`` of the heads that kept layers lost."""
    lost = []
    for layer, groups in zip(kept["layers"], kept["heads"], strict=True):
        stay = {head for group in groups for head in group}
        lost += [(layer, head) for head in range(count) if head not in stay]
    return lost


def _steps(curve: Curve) -> int:
    return max((int(row.get("step", 0)) for row in [*curve.train, *curve.validation]), default=0)
