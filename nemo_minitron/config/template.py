"""A commented configuration with every setting, as ``minitron config`` prints it."""

from __future__ import annotations

import textwrap

from nemo_minitron.config.describe import (
    CONFIGURATIONS,
    Setting,
    direct_settings,
    faults_of_defaults,
    plain,
    summary,
)
from nemo_minitron.config.spelling import nearest
from nemo_minitron.config.stages import STAGES
from nemo_minitron.errors import ConfigError

__all__ = ["template"]

_WIDTH = 110
_COMMANDS = {
    "pipeline": "minitron run FILE",
    "slurm": "minitron run PIPELINE --slurm FILE",
    "doctor": "minitron doctor FILE --run",
}


def template(name: str) -> str:
    """YAML with all settings of a stage, of a "pipeline" or of "slurm", at their defaults; ``???`` must be given.

    Raises:
        ConfigError: if there is no such configuration.
    """
    if name not in CONFIGURATIONS:
        raise ConfigError(
            f"{name}: is no stage, nor pipeline or slurm{nearest(name, CONFIGURATIONS)}; "
            f"there are {', '.join(CONFIGURATIONS)}"
        )
    cls = CONFIGURATIONS[name]
    needed = faults_of_defaults(cls)
    lines = [
        f"# {_COMMANDS.get(name, f'minitron {name} FILE')}",
        *_comment(plain(summary(cls)), 0),
        "# All settings at their defaults; those that stay so may be left out.",
    ]
    if needed:
        lines.append("# It loads once this is given:")
        lines += [line for path, fault in needed.items() for line in _comment(f"  {path}: {fault}", 0, "    ")]
    if name == "pipeline":
        lines += _comment(f"Stages: {', '.join(STAGES)}; `minitron config <stage>` has the settings of each.", 0)
    return "\n".join([*lines, "", *_block(direct_settings(cls), 0, needed)]) + "\n"


def _block(settings: list[Setting], indent: int, needed: dict[str, str]) -> list[str]:
    """The lines of some settings and of the groups in them."""
    space = " " * indent
    lines: list[str] = []
    for setting in settings:
        if lines and setting.part is not None and indent == 0:
            lines.append("")
        lines += _comment(f"{plain(setting.text)} ({setting.type})", indent)
        if setting.needed and not setting.must:
            lines += _comment(f"Needed: {setting.needed}", indent)
        key = f"{space}{setting.last}:"
        if setting.part is None:
            lines.append(f"{key} ???  # must be given" if setting.must else f"{key} {setting.shown}")
        elif setting.listed:
            entry = _block(direct_settings(setting.part), indent + 4, faults_of_defaults(setting.part))
            entry = [f"{space}  -  # an entry; there may be several", *entry]
            # An entry of a list that may stay empty is only shown.
            lines += (
                [key, *entry] if setting.needed else [f"{key} []", *(f"{space}# {line[indent:]}" for line in entry)]
            )
        else:
            inner = direct_settings(setting.part, setting.default, f"{setting.name}.", needed)
            lines += [key, *_block(inner, indent + 2, needed)]
    return lines


def _comment(text: str, indent: int, further: str = "") -> list[str]:
    mark = f"{' ' * indent}# "
    return textwrap.wrap(text, _WIDTH, initial_indent=mark, subsequent_indent=mark + further, break_on_hyphens=False)
