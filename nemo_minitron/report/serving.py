"""What models cost to serve, as ``minitron benchmark`` measured it: tables, and loss against speed and size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_minitron.report.draw import MARKERS, Figure, Theme, clean, draw_figure
from nemo_minitron.report.run import Run
from nemo_minitron.report.tables import Table, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["PUBLISHED", "serving_notes", "serving_plots", "serving_tables"]

#: What the papers say of their students, for a reader who compares.
PUBLISHED = (
    "Published, on other models and machines, and not measured here: Llama-3.1-Minitron 4B against Llama 3.1 8B in "
    "TensorRT-LLM with FP8 on one H100 gives 2.7 times the throughput where it was pruned in depth and 1.8 times where "
    "it was pruned in width (Sreenivas et al., 2024, LLM Pruning and Distillation in Practice)."
)


def serving_tables(run: Run, content: dict[str, Any]) -> list[Table]:
    """A table for each engine: size, memory, and speeds with the ratios to the engine's baseline.

    Args:
        run: for the roles of the models.
        content: of ``benchmark.json``.
    """
    tables = []
    for engine, facts in content["engines"].items():
        base = facts["baseline"]
        names = [name for name, model in content["models"].items() if engine in model["engines"]]
        headings = [
            "model", "weights", "held-out loss", "size on disk", "memory, peak", "first token, ms",
            "prefill, tokens/s", "decoding, tokens/s", f"prefill, of {base}", f"decoding, of {base}",
        ]  # fmt: skip
        rows = []
        for name in names:
            model = content["models"][name]
            own = model["engines"][engine]
            ratios = own["ratios"]
            memory = size(own["memory_bytes"])
            if own["gpu_bytes"]:
                memory += f" + {size(own['gpu_bytes'])} GPU"
            rows.append([
                name,
                own["weights"],
                "–" if model["loss"] is None else f"{model['loss']:.3f}",
                f"{size(model['size_bytes'])} ({ratios['size']:.2f}×)",
                f"{memory} ({ratios['memory']:.2f}×)",
                _spread(own["first_token_seconds"], 1000),
                _spread(own["prefill_tokens_per_second"]),
                _spread(own["decode_tokens_per_second"]),
                *("1" if name == base else _spread(ratios[key], form=".2f") + "×" for key in ("prefill", "decode")),
            ])  # fmt: skip
        caption = f"{engine} {facts['version']} on the {_DEVICES.get(facts['device'], facts['device'])}"
        roles = [run.roles.get(name, "other") for name in names]
        tables.append(Table(f"Served with {caption}: median (lowest to highest)", headings, rows, roles))
    return tables


_DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def serving_notes(content: dict[str, Any]) -> list[str]:
    """How it was measured, and what the papers say."""
    loss = content["loss_from"] or {}
    notes = [
        f"{content['batch_size']:,} sequences of {content['prompt_tokens']:,} tokens, {content['new_tokens']:,} tokens "
        f"after each, {content['repeats']} measurements in turns; {content['threads']} threads on "
        f"{content['processor']}.",
        "Each model is in a process of its own; its memory is the largest resident size, with libraries and runtime. "
        "The first token is that of a single prompt.",
    ]
    if "tokens" in loss:
        notes.append(f"Losses: over {loss['tokens']:,} held-out tokens ({', '.join(loss['sources'])}).")
    elif "evaluation" in loss:
        notes.append(f"Losses: of the evaluation {loss['evaluation']}.")
    return [*notes, PUBLISHED]


def _spread(figure: dict[str, float], factor: float = 1.0, form: str = "") -> str:
    """``212 (198 to 220)``."""
    values = [figure[name] * factor for name in ("median", "low", "high")]
    form = form or (",.0f" if values[0] >= 100 else ".1f" if values[0] >= 10 else ".2f")
    median, low, high = (format(value, form) for value in values)
    return median if low == high else f"{median} ({low} to {high})"


def serving_plots(run: Run, content: dict[str, Any], name: str = "serving") -> list[Figure]:
    """Loss against decoding speed, a panel for each engine, and loss against size; none without losses.

    Args:
        run: for the roles of the models.
        content: of ``benchmark.json``.
        name: beginning of the figures' names.
    """
    models = {key: model for key, model in content["models"].items() if model["loss"] is not None}
    if not models:
        return []
    engines = [engine for engine in content["engines"] if any(engine in model["engines"] for model in models.values())]
    speeds = {
        engine: {
            key: model["engines"][engine]["decode_tokens_per_second"]
            for key, model in models.items()
            if engine in model["engines"]
        }
        for engine in engines
    }

    def draw_speed(canvas: Canvas, theme: Theme) -> None:
        panels = canvas.subplots(1, len(engines), squeeze=False, sharey=True)[0]
        for axes, engine in zip(panels, engines, strict=True):
            for key, figure in speeds[engine].items():
                _point(run, axes, theme, key, figure["median"], models[key]["loss"], figure)
            axes.set_title(engine, fontsize=9.5, color=theme.ink, loc="left")
            axes.set_xlabel("decoding, tokens/s")
            axes.set_xlim(left=0)
            axes.margins(0.18)
            clean(axes, theme, grid="both")
        panels[0].set_ylabel("held-out loss, nats per token")

    def draw_size(canvas: Canvas, theme: Theme) -> None:
        axes = canvas.subplots()
        for key, model in models.items():
            _point(run, axes, theme, key, model["size_bytes"] / 2**20, model["loss"])
        axes.set_xlabel("size on disk, MiB")
        axes.set_ylabel("held-out loss, nats per token")
        axes.set_xlim(left=0)
        axes.margins(0.18)
        clean(axes, theme, grid="both")

    speed_facts = "; ".join(
        f"{key} in {engine} {figure['median']:.3g} tokens/s"
        for engine, figures in speeds.items()
        for key, figure in figures.items()
    )
    losses = ", ".join(f"{key} {model['loss']:.3f}" for key, model in models.items())
    size_facts = ", ".join(f"{key} {size(model['size_bytes'])}" for key, model in models.items())
    return [
        draw_figure(
            f"{name}-speed",
            draw_speed,
            (0.8 + 3.6 * len(engines), 3.2),
            alt=f"Held-out loss ({losses}) against decoding speed: {speed_facts}.",
            caption="Loss against speed: further down is better, further right is faster. Bars: lowest to highest.",
        ),
        draw_figure(
            f"{name}-size",
            draw_size,
            (4.8, 3.2),
            alt=f"Held-out loss ({losses}) against size on disk: {size_facts}.",
            caption="Loss against size: further down is better, further left is smaller.",
        ),
    ]


def _point(
    run: Run, axes: Any, theme: Theme, name: str, x: float, y: float, figure: dict[str, float] | None = None
) -> None:
    role = run.roles.get(name, "other")
    if figure is not None:
        bars = [[x - figure["low"]], [figure["high"] - x]]
        axes.errorbar([x], [y], xerr=bars, fmt="none", ecolor=theme.faint, elinewidth=1.1, capsize=3)
    axes.scatter([x], [y], s=52, color=theme.colour(role), marker=MARKERS[role], zorder=3)
    axes.annotate(name, (x, y), (0, 8), textcoords="offset points", ha="center", fontsize=8, color=theme.ink)
