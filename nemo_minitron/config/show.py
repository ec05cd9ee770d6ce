"""The settings as tables for a terminal, as ``--help`` shows them."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from nemo_minitron.config.describe import Setting, faults_of_defaults, plain, settings_of

__all__ = ["show_settings"]


def show_settings(cls: type[Any], console: Console, prefix: str = "") -> None:
    """Print the settings of a configuration: its own, then those of each group.

    Args:
        cls: dataclass of :mod:`nemo_minitron.config`.
        console: to print on.
        prefix: put before each name ("cluster.").
    """
    needed = {f"{prefix}{name}": fault for name, fault in faults_of_defaults(cls).items()}
    own: list[Setting] = []
    groups: dict[str, tuple[Setting, list[Setting]]] = {}
    for setting in settings_of(cls, prefix=prefix, needed=needed):
        first = setting.name.removeprefix(prefix).replace("[]", "").split(".")[0]
        if first in groups:
            groups[first][1].append(setting)
        elif setting.part is not None:
            groups[first] = (setting, [])
        else:
            own.append(setting)
    if needed:
        console.print("[bold red]*[/] must be given, or what takes its place:", highlight=False)
        for name, fault in needed.items():
            console.print(Padding(Text(f"{name}: {fault}"), (0, 0, 0, 4)))
    _panel(console, "Settings", own, "")
    for group, settings in groups.values():
        title = f"{group.name}{'[]' if group.listed else ''}{' *' if group.needed else ''}"
        _panel(console, title, settings, f"{group.name}{'[]' if group.listed else ''}.", plain(group.text))


def _panel(console: Console, title: str, settings: list[Setting], prefix: str, text: str = "") -> None:
    table = Table(box=None, show_header=False, padding=(0, 1), expand=True)
    names = [f"{setting.name.removeprefix(prefix)}{' *' if setting.needed else ''}" for setting in settings]
    table.add_column(style="cyan", width=min(max(map(len, names), default=0), 32), overflow="fold")
    table.add_column(
        style="green", width=min(max((len(setting.shown) for setting in settings), default=0), 16), overflow="fold"
    )
    table.add_column(ratio=1)
    for setting, name in zip(settings, names, strict=True):
        meaning = Text(plain(setting.text))
        if not setting.is_group:
            meaning.append(f" ({setting.type})", style="dim")
        table.add_row(Text(name), Text(setting.shown), meaning)
    content = Group(Padding(Text(text, style="italic"), (0, 1)), table) if text else table
    console.print(Panel(content, title=Text(title), title_align="left", border_style="dim"))
