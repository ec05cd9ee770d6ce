"""The templates of the pages."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

__all__ = ["rendered"]


def rendered(template: str, content: dict[str, Any], *, markdown: bool = False) -> str:
    """A template with its values; of Markdown without runs of empty lines."""
    text = _environment().get_template(template).render(content)
    return re.sub(r"\n{3,}", "\n\n", text).lstrip() if markdown else text


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nemo_minitron.report", "templates"),
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _markdown_cell
    environment.filters["quote"] = _markdown_quote
    return environment


def _markdown_cell(text: str) -> str:
    """Text escaped for a table cell, without markup."""
    for character in "\\`*_{}[]<>|#":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())


def _markdown_quote(text: str) -> str:
    """Text as a block quote, escaped, without markup."""
    lines = [_markdown_cell(line) for line in text.splitlines()] or [""]
    return "\n".join(f"> {line}".rstrip() for line in lines)
