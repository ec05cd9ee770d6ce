"""How the report draws: the colours of roles, and figures drawn twice, for a light and for a dark page.

Agg only: no display is needed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

__all__ = ["COLOURS", "DARK", "LIGHT", "MARKERS", "Figure", "Theme", "clean", "draw_figure"]

#: By role, on a light and on a dark page; told apart by colour-blind readers too (after Okabe and Ito, 2008).
COLOURS: dict[str, tuple[str, str]] = {
    "teacher": ("#0b6fb8", "#5db3f0"),
    "pruned": ("#c77700", "#f0b050"),
    "random": ("#8a8f98", "#8f96a3"),
    "reconstructed": ("#b8433f", "#f0877f"),
    "distilled": ("#0a8f68", "#35c79b"),
    "aligned": ("#8c4a94", "#cf8fd8"),
    "other": ("#7a6a52", "#b8a88c"),
}
DPI = 192
"""Of the images: two dots for a CSS pixel."""
MARKERS = {
    "teacher": "o", "pruned": "s", "random": "X", "reconstructed": "v", "distilled": "D", "aligned": "P", "other": "^",
}  # fmt: skip


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
            canvas.savefig(out, format="png", dpi=DPI, transparent=transparent, metadata={"Software": None})
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
