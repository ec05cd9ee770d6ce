"""A real browser, without a window: what it makes of a page."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
#: Runs in the page when everything has loaded, and leaves what it saw in the title.
_LOOK = """<script>
addEventListener("load", () => {
  const images = [...document.images].map(image => [image.alt, image.complete ? image.naturalWidth : 0]);
  const width = document.documentElement;
  const parts = [...document.querySelectorAll("section")];
  const sections = parts.map(part => [part.id, part.getBoundingClientRect().height]);
  const sideways = width.scrollWidth > width.clientWidth + 1;
  const dead = [...document.querySelectorAll('a[href^="#"]')].filter(a => !document.getElementById(a.hash.slice(1)));
  document.title = JSON.stringify({images, sections, sideways, dead: dead.map(a => a.hash)});
});
</script></body>"""


def browser() -> str | None:
    """Its program, or None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def look(page: Path, width: int = 1100) -> dict[str, Any]:
    """Open a page.

    Args:
        page: HTML file; a copy of it is opened.
        width: of the window in pixels.

    Returns:
        ``images``: ``[alt, natural width]`` of each (0: not loaded); ``sections``: ``[id, height]``; ``sideways``:
        whether the page scrolls sideways; ``dead``: links to nowhere; ``console``: errors and warnings.
    """
    program = browser()
    assert program is not None
    text = page.read_text(encoding="utf-8")
    assert text.count("</body>") == 1
    with tempfile.TemporaryDirectory() as home:
        copy = Path(home) / "page.html"
        copy.write_text(text.replace("</body>", _LOOK), encoding="utf-8")
        done = subprocess.run(
            [
                program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                f"--user-data-dir={home}/profile", "--enable-logging=stderr", f"--window-size={width},900",
                "--virtual-time-budget=5000", "--dump-dom", copy.as_uri(),
            ],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title is not None, done.stderr[-2000:]
    seen: dict[str, Any] = json.loads(html.unescape(title[1]))
    seen["console"] = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return seen
