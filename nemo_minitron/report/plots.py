"""The report's figures of losses and trainings.

Every function returns a :class:`~nemo_minitron.report.draw.Figure`, or None if the run has nothing to show.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_minitron.report.benchmarks import first_metric, value_and_error
from nemo_minitron.report.draw import MARKERS, Figure, Theme, clean, draw_figure
from nemo_minitron.report.run import Curve, Run
from nemo_minitron.report.tables import duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["aligning", "benchmarks", "losses", "times", "training"]


def losses(run: Run, evaluation: dict[str, Any], name: str = "losses") -> Figure:
    """Held-out loss of each model, overall with its standard error, and by domain; ``name`` is the figure's."""
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
            axes.scatter(points, places, s=46, color=theme.colour(role), marker=MARKERS[role], label=name, zorder=3)
        axes.set_yticks(range(len(domains)), domains)
        axes.set_ylim(len(domains) - 0.5, -0.5)
        axes.set_xlabel("by domain")
        clean(axes, theme, grid="both")

    listing = ", ".join(f"{name} {models[name]['loss']:.3f}" for name in names)
    return draw_figure(
        name,
        draw,
        (9.4, 1.3 + 0.46 * max(len(names), len(domains))),
        alt=f"Held-out loss in nats per token: {listing}.",
        caption="Left: over all held-out tokens, with the standard error over blocks. Right: by source of the text. "
        "Lower is better.",
    )


def training(curve: Curve) -> Figure | None:
    """Loss, learning rate and speed of a distillation."""
    panels = [
        ("kl", "forward KL, nats per token", 1.0),
        ("lm_loss", "validation language-modelling loss", 1.0),
        _rate(curve),
        ("tokens_per_second", "tokens per second", 1.0),
    ]
    return _curves(curve, panels, noisy="kl")


def aligning(curve: Curve) -> Figure | None:
    """Loss, and what an alignment is after: preferred answers, rewards, distance from where it started."""
    panels = [
        ("loss", "loss", 1.0),
        ("acc", "share of pairs with the chosen answer ahead", 1.0),
        ("reward", "mean reward of answers", 1.0),
        ("distance", "distance from the attribute model", 1.0),
        ("kl", "divergence from the start", 1.0),
        _rate(curve),
    ]
    return _curves(curve, panels, noisy="loss")


def _rate(curve: Curve) -> tuple[str, str, float]:
    """The panel of the learning rate, in the power of ten of its largest value."""
    _, values = _series(curve.train, "lr")
    power = -math.floor(math.log10(values.max())) if values.size and values.max() > 0 else 0
    digits = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return "lr", f"learning rate × 10{digits}" if power else "learning rate", 10.0**power


def _curves(curve: Curve, panels: list[tuple[str, str, float]], *, noisy: str) -> Figure | None:
    """A panel for each metric that has two values, over the steps; ``noisy`` is drawn with a running mean."""
    rows = {"train": curve.train, "validation": curve.validation}
    shown = [panel for panel in panels if any(_series(part, panel[0])[0].size > 1 for part in rows.values())]
    if not shown:
        return None

    def draw(canvas: Canvas, theme: Theme) -> None:
        all_axes = np.atleast_1d(canvas.subplots(1, len(shown)))
        for axes, (key, title, factor) in zip(all_axes, shown, strict=True):
            both, (steps, values) = False, _series(curve.train, key)
            values = values * factor
            if steps.size:
                pale, colour = key == noisy, theme.colour("distilled")
                axes.plot(steps, values, color=colour, lw=1.0 if pale else 1.6, alpha=0.35 if pale else 1)
                if pale:
                    both = True
                    axes.plot(steps, _smooth(values), color=colour, lw=1.9, label="training")
            steps, values = _series(curve.validation, key)
            if steps.size:
                axes.plot(steps, values * factor, "o-", color=theme.colour("teacher"), lw=1.6, ms=5, label="validation")
            if key in ("kl", "tokens_per_second", "lr", "acc"):
                axes.set_ylim(bottom=0)
            if both:
                axes.legend(frameon=False, labelcolor=theme.ink)
            axes.locator_params(axis="x", integer=True)
            axes.set_title(title, fontsize=9.5, color=theme.ink, loc="left")
            axes.set_xlabel("step")
            clean(axes, theme, grid="y")
        canvas.set_layout_engine("constrained", wspace=0.07)

    _, values = _series(curve.train, noisy)
    what = {"kl": "Training KL", "loss": "Training loss"}[noisy]
    facts = f" {what} from {_smooth(values)[0]:.3f} to {_smooth(values)[-1]:.3f}." if values.size else ""
    return draw_figure(
        f"training-{curve.name}".replace("/", "-"),
        draw,
        (3.0 * len(shown) + 0.6, 2.7),
        alt=f"Curves of {curve.name} over {_steps(curve)} steps.{facts}",
        caption=f"{curve.name}. The pale line is each step, the strong one a running mean.",
    )


def times(run: Run) -> Figure | None:
    """Wall time of each stage; None for a single stage."""
    if len(run.stages) < 2:
        return None
    total = sum(stage.seconds for stage in run.stages) or 1.0

    def draw(canvas: Canvas, theme: Theme) -> None:
        axes = canvas.subplots()
        # Names need not differ between stages.
        places, seconds = range(len(run.stages)), [stage.seconds for stage in run.stages]
        axes.barh(places, seconds, color=theme.colour("teacher"), height=0.62)
        for place, value in zip(places, seconds, strict=True):
            text = f"{duration(value)}, {value / total:.0%}"
            axes.annotate(text, (value, place), (6, 0), textcoords="offset points", va="center")
        axes.set_yticks(places, [stage.name for stage in run.stages])
        axes.invert_yaxis()
        axes.margins(x=0.22)
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds")
        clean(axes, theme, grid="x")

    longest = max(run.stages, key=lambda stage: stage.seconds)
    return draw_figure(
        "times",
        draw,
        (7.4, 0.8 + 0.3 * len(run.stages)),
        alt=f"Wall time by stage; longest: {longest.name}, {duration(longest.seconds)} of {duration(total)}.",
        caption="Wall time of each stage, with its share.",
    )


def benchmarks(run: Run, evaluation: dict[str, Any], name: str = "benchmarks") -> Figure | None:
    """The first metric of each benchmark as bars, one for each model, with standard errors; None without any."""
    models = {model: values["harness"] for model, values in evaluation["models"].items() if values.get("harness")}
    metrics = {
        task: metric for results in models.values() for task in results if (metric := first_metric(results[task]))
    }
    if not metrics:
        return None
    tasks = list(metrics)

    def draw(canvas: Canvas, theme: Theme) -> None:
        axes, width = canvas.subplots(), 0.8 / len(models)
        for number, (model, results) in enumerate(models.items()):
            known = [place for place, task in enumerate(tasks) if first_metric(results.get(task)) == metrics[task]]
            pairs = [value_and_error(results[tasks[place]], metrics[tasks[place]]) for place in known]
            places = [place + (number - (len(models) - 1) / 2) * width for place in known]
            colour = theme.colour(run.roles.get(model, "other"))
            errors = [error or 0.0 for _, error in pairs]
            axes.bar(places, [value for value, _ in pairs], width * 0.92, color=colour, edgecolor="none", label=model)
            axes.errorbar(
                places, [v for v, _ in pairs], yerr=errors, fmt="none", ecolor=theme.ink, elinewidth=1, capsize=2
            )
            for place, (value, error) in zip(places, pairs, strict=True):
                axes.annotate(
                    model, (place, value + (error or 0.0)), (0, 4), textcoords="offset points", ha="center",
                    rotation=90, fontsize=7, color=theme.faint,
                )  # fmt: skip
        axes.set_xticks(range(len(tasks)), [f"{task}\n{metrics[task].partition(',')[0]}" for task in tasks])
        axes.margins(y=0.3)
        axes.set_ylim(bottom=0)
        clean(axes, theme, grid="y")

    return draw_figure(
        name,
        draw,
        (min(11.0, 1.6 + len(tasks) * max(1.4, 0.42 * len(models))), 3.0),
        alt=f"Benchmarks {', '.join(tasks)} of {', '.join(models)}.",
        caption="The first metric of each benchmark, with its standard error.",
    )


def _series(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """``(steps, values)`` of the rows that have the key."""
    pairs = [
        (row["step"], row[key]) for row in rows if all(isinstance(row.get(part), int | float) for part in ("step", key))
    ]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about a twentieth of the run; the window is shorter at the ends."""
    half = max(1, len(values) // 40)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _steps(curve: Curve) -> int:
    return max((int(row.get("step") or 0) for row in [*curve.train, *curve.validation]), default=0)
